//! Fine-tuning's data.

pub mod batch;
