//! From text files to packed batches: readers, tokenization, shards, masks, batches.

pub mod batch;
