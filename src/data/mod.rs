//! From text files to packed batches: readers, tokenization, shards, masks, batches.

pub mod batch;
pub mod corpus;
mod draws;
pub mod loader;
pub mod masking;
pub mod order;
pub mod pairs;
pub mod picture;
pub mod shard;
pub mod source;
pub mod tokenize;
pub mod tokenizer;
mod wordpiece;
