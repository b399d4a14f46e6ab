//! From text files to packed batches: readers, tokenization, shards, masks, batches.

pub mod batch;
pub mod shard;
pub mod source;
pub mod tokenize;
pub mod tokenizer;
mod wordpiece;
