//! A GPU training engine for retrieval language models.

pub mod cli;
pub mod data;
pub mod error;
pub mod files;
pub mod model;
pub mod rng;

pub use error::{Error, Result};
