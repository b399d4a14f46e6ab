//! What a trained model is for: texts to embeddings, embeddings to ranked lists, lists to hard negatives and to reranked lists.
//!
//! - [`topk`]: the best rows of each query, exactly

pub mod topk;
