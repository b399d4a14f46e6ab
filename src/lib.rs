//! A training engine for retrieval language models: text becomes a RetroMAE pre-trained encoder that the usual libraries load.
//!
//! One binary does the work, `retromae-engine`, and this library is all of it; `main.rs` only parses, dispatches and prints the one
//! error. What happens in one training step is [`train::step`], from top to bottom: read that first.
//!
//! # The way of the data
//!
//! ```text
//! text files ─ data::source ─ data::tokenize ─ data::shard ─ data::batch ─ graph ─ ops ─ device
//!              records        tokenizers       mapped files  packed, masks  forward, backward
//!                                                                 │
//!              train::step  =  batch → forward → backward → norm → AdamW → report
//! ```
//!
//! # Code map
//!
//! A module uses only modules of the lines above its own, and of a line only what stands left of it there.
//!
//! | layer | modules |
//! | --- | --- |
//! | 0 | [`error`]: the one error type; [`files`]: files that appear whole or not at all; [`rng`]: all randomness |
//! | 1 | [`device`]: tensors and where they lie; [`data`]: from text to packed batches. They do not know each other |
//! | 2 | [`ops`]: one operation a file, forward and backward |
//! | 3 | [`model`]: configurations, checkpoints' names and formats, export; [`graph`]: the transformer out of ops |
//! | 4 | [`eval`]: metrics of ranked lists |
//! | 5 | [`retrieve`]: encode, search, mine, rerank |
//! | 6 | [`train`]: the step, and the run around it, which judges a dev set by what lies below |
//! | 7 | [`mod@bench`]: measurements of all of it |
//! | 8 | [`report`]: runs as a page, and in a terminal |
//! | 9 | [`cli`]: one file for each subcommand |
//!
//! # Invariants
//!
//! - **Packed everywhere.** A batch is one stream of tokens with `cu_seqlens`; nothing in the graph is padded.
//! - **Randomness is a pure function** of seed, step, site and element ([`rng`]). The order of the samples is one of seed, epoch and
//!   index. Nothing depends on threads, on how a batch is split, or on the clock; the same command gives the same bits.
//! - **Nothing is written under its final name** before it is complete and durable ([`files`]). Killed at any instant, a run goes on
//!   from its newest checkpoint and ends with the bits of an undisturbed one.
//! - **Every file we write carries digests**; data that does not match them is refused and never trained on.
//! - **Input is checked once, where it enters.** A wrong input is one line with path, place, cause and remedy ([`error`]), never a
//!   panic. Below that, sizes are trusted.
//! - **No tape.** Every `backward` stands below its `forward` and is that list reversed; a step allocates nothing.
//!
//! # Glossary
//!
//! Shapes are written with these letters: `B` sequences of a batch, `S` query rows of a layer, `T` tokens of a batch, `L` length of
//! a sequence, `C` hidden width, `H` heads, `D` head size (`C = H D`), `V` vocabulary. `cu_seqlens` `[B + 1]` holds where each
//! sequence begins in the stream. A *text* is a document as it was read, a *sequence* what a text became, a *sample* the use of a
//! sequence in one epoch.

#![deny(missing_docs)]
#![deny(rustdoc::broken_intra_doc_links)]

pub mod bench;
pub mod cli;
pub mod data;
pub mod device;
pub mod error;
pub mod eval;
pub mod files;
pub mod graph;
pub mod model;
pub mod ops;
pub mod report;
pub mod retrieve;
pub mod rng;
pub mod train;

pub use error::{Error, Result};
