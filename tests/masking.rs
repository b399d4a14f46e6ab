//! Masks, order and batches: the rules of the published collator, their distribution, and that nothing but the sample decides them.

#[path = "masking/batches.rs"]
mod batches;
#[path = "masking/common.rs"]
mod common;
#[path = "masking/distribution.rs"]
mod distribution;
#[path = "masking/frozen.rs"]
mod frozen;
#[path = "masking/loading.rs"]
mod loading;
#[path = "masking/ordering.rs"]
mod ordering;
#[path = "masking/rules.rs"]
mod rules;
