//! BERT's masked-LM head over all rows of a batch, for the lexical representation of its texts: `y = LN(act(h W + b))`, and of the logits
//! `y Eᵀ + c` over the tied word embeddings E the largest of every word in a text, the K largest of these kept ([`crate::ops::lexical`]).
//!
//! Forward only. The parameters are those of [`super::mlm::MlmHead`], under the same names.

use super::activations::{Plan, Slot};
use super::block::{Linear, Norm};
use super::inputs::TokenInputs;
use super::params::{Id, Init, Table};
use super::{Dims, Pass};
use crate::device::{DType, Device, Tensor};
use crate::model::config::BertConfig;
use crate::ops::lexical::{Lexical, Shape};
use crate::ops::{activation, layernorm, lexical};

/// Bytes of logits that exist at a time: on the CPU, and on a GPU, where they stay in the second-level cache.
const LOGITS_BYTES: usize = 64 << 20;
const LOGITS_BYTES_GPU: usize = 32 << 20;

/// The head.
pub struct LexicalHead {
    dims: Dims,
    transform: Linear,
    norm: Norm,
    /// Tied to the embedding table.
    word: Id,
    bias: Id,
    k: usize,
    chunk: usize,
    u: Slot,
    z: Slot,
    mean: Slot,
    rstd: Slot,
    y: Slot,
    logits: Slot,
    maxima: Slot,
    /// `[S, K]`.
    ids: Tensor,
    weights: Slot,
}

impl LexicalHead {
    /// For up to `rows` rows of `sequences` texts, of which the `k` largest words are kept; `word` is the embedding table.
    pub fn new(
        (device, storage): (Device, DType),
        (t, plan): (&mut Table, &mut Plan),
        config: &BertConfig,
        word: Id,
        (rows, sequences): (usize, usize),
        k: usize,
    ) -> Self {
        let dims = Dims::new(config);
        let (c, v) = (dims.hidden, dims.vocabulary);
        let bytes = if device.is_gpu() { LOGITS_BYTES_GPU } else { LOGITS_BYTES };
        let chunk = (bytes / (storage.size().min(4) * v)).clamp(16, rows.max(16));
        // Whole tiles of the products, where there are enough rows.
        let chunk = if chunk > 128 { chunk / 128 * 128 } else { chunk };
        let transform = Linear::new(t, "cls.predictions.transform.dense".into(), c, c);
        let norm = Norm::new(t, "cls.predictions.transform.LayerNorm", c);
        let bias = t.vectors(&["cls.predictions.bias".into()], config.vocab_size, Init::Zeros);
        t.pad(bias, v, f32::NEG_INFINITY);
        LexicalHead {
            dims,
            transform,
            norm,
            word,
            bias,
            k,
            chunk,
            u: plan.add("head.u", rows, c),
            z: plan.add("head.z", rows, c),
            mean: plan.add_wide("head.mean", rows, 1),
            rstd: plan.add_wide("head.rstd", rows, 1),
            y: plan.add("head.y", rows, c),
            logits: plan.add("lexical.logits", chunk, v),
            maxima: plan.add("lexical.maxima", chunk, v),
            ids: device.zeros(DType::U32, sequences * k),
            weights: plan.add_wide("lexical.weights", sequences, k),
        }
    }

    /// The words of each text, from the last hidden states `h [T, C]` of all its rows.
    pub fn forward(&self, p: &Pass<'_>, tokens: &TokenInputs, h: &Tensor) {
        let (c, rows) = (self.dims.hidden, tokens.count.get());
        self.transform.forward(p, (rows, c, c), h, p.b(self.u));
        activation::forward(p.device, self.dims.activation, p.b(self.u), p.b(self.z), (rows, c));
        layernorm::forward(
            p.device,
            &layernorm::Forward {
                shape: layernorm::Shape { rows, width: c, eps: self.dims.eps },
                x: p.b(self.z),
                residual: None,
                dropout: None,
                gamma: p.master(self.norm.gamma),
                beta: p.master(self.norm.beta),
                y: p.b(self.y),
                mean: p.b(self.mean),
                rstd: p.b(self.rstd),
            },
        );
        lexical::run(
            p.device,
            &Lexical {
                shape: Shape {
                    rows,
                    cu_seqlens: &tokens.cu_seqlens,
                    sequence: tokens.names().sequence,
                    width: c,
                    vocabulary: self.dims.vocabulary,
                    chunk: self.chunk,
                    k: self.k,
                },
                h: p.b(self.y),
                w: p.w(self.word),
                b: p.master(self.bias),
                logits: p.b(self.logits),
                maxima: p.b(self.maxima),
                ids: &self.ids,
                weights: p.b(self.weights),
            },
        );
    }

    /// K.
    pub fn k(&self) -> usize {
        self.k
    }

    /// `[S, K]` u32: the words that [`Self::forward`] left, and their weights.
    pub fn words<'p>(&'p self, p: &'p Pass<'_>) -> (&'p Tensor, &'p Tensor) {
        (&self.ids, p.b(self.weights))
    }

    /// The head's parameters: embedding table `[V, C]`, bias `[V]`.
    pub fn projection(&self) -> (Id, Id) {
        (self.word, self.bias)
    }
}
