//! Evaluation: how well ranked lists answer judged queries.
//!
//! - [`qrels`]: judgements with grades
//! - [`metrics`]: the usual figures, under the rules of the two programs that everyone compares with

pub mod metrics;
pub mod qrels;
