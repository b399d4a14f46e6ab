//! Evaluation: how well ranked lists answer judged queries.
//!
//! - [`qrels`]: judgements with grades
//! - [`metrics`]: the usual figures, under the rules of the two programs that everyone compares with
//! - [`compare`]: whether one run is better than another
//! - [`mteb`]: results in the form of MTEB
//! - [`bm25`]: the lists that shared words alone give

pub mod bm25;
pub mod compare;
pub mod metrics;
pub mod mteb;
pub mod qrels;
