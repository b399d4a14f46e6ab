//! What a trained model is for: texts to embeddings, embeddings to ranked lists, lists to hard negatives and to reranked lists.
//!
//! - [`topk`]: the best rows of each query, exactly
//! - [`scorer`], [`rerank`]: a cross-encoder's scores, and lists in their order

pub mod rerank;
pub mod scorer;
pub mod topk;
