//! Model folders: configuration, checkpoint names, weights, export.
//!
//! Reading goes `hub` (which folder) → `config` (sizes) → `weights` (one view over every checkpoint form, in canonical `names`);
//! models for retrieval come as `towers` (with the `sentence` settings of their folders) and `reranker`. Writing goes through `export`.
//! `safetensors` and `torch_bin` (with `pickle`) are the two file formats below `weights`.

pub mod card;
pub mod config;
pub mod digest;
pub mod element;
pub mod export;
pub mod hub;
pub mod names;
pub mod parameters;
mod pickle;
pub mod presets;
pub mod reranker;
pub mod safetensors;
pub mod sentence;
mod small_file;
pub mod tensor_file;
mod tokenizer_files;
mod torch_bin;
pub mod towers;
pub mod weights;
