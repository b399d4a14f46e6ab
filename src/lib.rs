//! A GPU training engine for retrieval language models.

pub mod cli;
pub mod data;
pub mod device;
pub mod error;
pub mod files;
pub mod graph;
pub mod model;
pub mod ops;
pub mod rng;
pub mod train;

pub use error::{Error, Result};
