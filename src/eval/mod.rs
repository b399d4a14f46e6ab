//! Evaluation: how well ranked lists answer judged queries.
//!
//! - [`qrels`]: judgements with grades
//! - [`metrics`]: the usual figures, under the rules of the two programs that everyone compares with
//! - [`compare`]: whether one run is better than another
//! - [`mteb`]: results in the form of MTEB

pub mod compare;
pub mod metrics;
pub mod mteb;
pub mod qrels;
