//! What a trained model is for: texts to embeddings, embeddings to ranked lists, lists to hard negatives and to reranked lists.

pub mod rerank;
pub mod scorer;
