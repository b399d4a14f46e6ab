//! What of a text is kept for retrieval: its dense embedding, its lexical one, or both, as DupMAE (arXiv 2211.08769) joins them.
//!
//! The lexical embedding is sparse: the K tokens of the vocabulary whose largest logit over the text's positions but the first is largest,
//! with these logits as weights, as they are ([`crate::ops::lexical`]). Two texts score with the inner product of their dense embeddings
//! plus the sum, over the tokens that both have, of the products of the weights. The paper cuts the passages to their largest tokens and
//! sums over these; how many a query keeps is a choice of its own here (`--lexical-top-k`), and may differ from that of the passages.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::npy::Number;

/// See the module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Representation {
    /// The dense embedding: the state of `[CLS]`, or what else the model pools.
    #[default]
    Cls,
    /// The K largest tokens of the MLM head.
    Lexical,
    /// Both; scores are added.
    Both,
}

impl Representation {
    /// Whether there is a dense embedding.
    pub fn dense(self) -> bool {
        self != Representation::Lexical
    }

    /// Whether there is a lexical one.
    pub fn lexical(self) -> bool {
        self != Representation::Cls
    }

    /// For serde.
    pub(super) fn is_cls(&self) -> bool {
        *self == Representation::Cls
    }

    /// The name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Representation::Cls => "cls",
            Representation::Lexical => "lexical",
            Representation::Both => "both",
        }
    }
}

/// Some texts' embeddings; what the representation lacks is empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Embedded<N = f32> {
    /// `[n, W]`.
    pub dense: Vec<N>,
    /// `[n, K]`: token ids, in the order of their weights.
    pub ids: Vec<u32>,
    /// `[n, K]`.
    pub weights: Vec<f32>,
}

impl<N: Number> Embedded<N> {
    /// For `n` texts of width `dim` and `k` tokens, which may be 0.
    pub fn zeros(n: usize, dim: usize, k: usize) -> Embedded<N> {
        Embedded { dense: vec![N::default(); n * dim], ids: vec![0; n * k], weights: vec![0.0; n * k] }
    }

    /// Texts, of these widths.
    pub fn len(&self, (dim, k): (usize, usize)) -> usize {
        self.dense.len().checked_div(dim).unwrap_or(self.ids.len() / k.max(1))
    }

    /// Removes all texts.
    pub fn clear(&mut self) {
        self.dense.clear();
        self.ids.clear();
        self.weights.clear();
    }

    /// Appends the texts `range` of `other`.
    pub fn append(&mut self, other: &Embedded<N>, range: Range<usize>, (dim, k): (usize, usize)) {
        self.dense.extend_from_slice(&other.dense[range.start * dim..range.end * dim]);
        self.ids.extend_from_slice(&other.ids[range.start * k..range.end * k]);
        self.weights.extend_from_slice(&other.weights[range.start * k..range.end * k]);
    }

    /// Whether text `i` has its numbers and tokens, all finite.
    pub fn is_finite(&self, i: usize, (dim, k): (usize, usize)) -> bool {
        let dense = self.dense[i * dim..(i + 1) * dim].iter().fold(true, |all, x| all & x.is_finite());
        self.weights[i * k..(i + 1) * k].iter().fold(dense, |all, x| all & x.is_finite())
    }

    /// Copies text `from` of `other` to place `to`.
    pub fn set(&mut self, to: usize, other: &Embedded<N>, from: usize, (dim, k): (usize, usize)) {
        self.dense[to * dim..(to + 1) * dim].copy_from_slice(&other.dense[from * dim..(from + 1) * dim]);
        self.ids[to * k..(to + 1) * k].copy_from_slice(&other.ids[from * k..(from + 1) * k]);
        self.weights[to * k..(to + 1) * k].copy_from_slice(&other.weights[from * k..(from + 1) * k]);
    }
}
