//! From text files to shards: readers, token ids, the shard format, and what happens to bad input.

#[path = "data/support.rs"]
mod support;

#[path = "data/bad_input.rs"]
mod bad_input;
#[path = "data/damage.rs"]
mod damage;
#[path = "data/readers.rs"]
mod readers;
#[path = "data/shards.rs"]
mod shards;
#[path = "data/tokens.rs"]
mod tokens;
