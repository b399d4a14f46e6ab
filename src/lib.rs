//! A GPU training engine for retrieval language models.

pub mod data;
pub mod device;
pub mod error;
pub mod model;
pub mod rng;

pub use error::{Error, Result};
