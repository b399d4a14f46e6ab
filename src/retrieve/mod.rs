//! What a trained model is for: texts to embeddings, embeddings to ranked lists, lists to hard negatives and to reranked lists.
//!
//! - [`model`]: a bi-encoder with its tokenizer; [`embedder`]: its tower, forward only; [`representation`]: what that makes of a text
//! - [`encode`]: files of texts to a folder of embeddings
//! - [`embeddings`]: that folder; [`npy`]: its files
//! - [`search`]: embeddings to ranked lists; [`topk`]: the best rows of each query, exactly; [`joined`]: with lexical embeddings;
//!   [`merged`]: by several ranks
//! - [`mine`]: ranked lists to hard negatives
//! - [`scorer`], [`rerank`]: a cross-encoder's scores, and lists in their order
//! - [`beir`]: a data set in BEIR's layout, from texts to figures

pub mod beir;
pub mod embedder;
pub mod embeddings;
pub mod encode;
pub mod joined;
pub mod merged;
pub mod mine;
pub mod model;
pub mod npy;
pub mod representation;
pub mod rerank;
pub mod scorer;
pub mod search;
pub mod topk;
