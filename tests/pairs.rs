//! The data of fine-tuning: ids, files that name texts, rows that bring them, groups, batches, runs.

#[path = "pairs/support.rs"]
mod support;

#[path = "pairs/assembled.rs"]
mod assembled;
#[path = "pairs/bad_input.rs"]
mod bad_input;
#[path = "pairs/batches.rs"]
mod batches;
#[path = "pairs/groups.rs"]
mod groups;
#[path = "pairs/ids.rs"]
mod ids;
#[path = "pairs/readers.rs"]
mod readers;
#[path = "pairs/rows.rs"]
mod rows;
#[path = "pairs/runs.rs"]
mod runs;
