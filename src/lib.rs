//! A GPU training engine for retrieval language models.

pub mod data;
pub mod error;
pub mod model;
pub mod rng;
pub mod train;

pub use error::{Error, Result};
