//! Training.

pub mod contract;
pub mod step;
