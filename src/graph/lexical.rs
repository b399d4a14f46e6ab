//! BERT's masked-LM head over all rows of a batch, for the lexical representation of its texts: of the logits the largest of every word in
//! a text, the K largest of these kept ([`crate::ops::lexical`]).
//!
//! In training the gradients of the weights go back through the row in which a word is largest ([`crate::ops::joined`]).

use super::activations::{Plan, Slot};
use super::inputs::TokenInputs;
use super::mlm::{Buffers, MlmHead};
use super::params::{Id, Table};
use super::{Dims, Pass};
use crate::device::{DType, Device, Output, Tensor};
use crate::model::config::BertConfig;
use crate::ops::joined::{self, Words};
use crate::ops::lexical::{self, Lexical};

/// The head.
pub struct LexicalHead {
    dims: Dims,
    head: MlmHead,
    k: usize,
    /// `[chunk, V]`.
    maxima: Slot,
    /// `[S, K]`.
    ids: Tensor,
    weights: Slot,
    training: Option<Training>,
}

/// What a backward needs besides.
struct Training {
    /// `[S, K]`.
    d_weights: Slot,
    winners: Tensor,
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
        let (dims, head) = (Dims::new(config), MlmHead::new((device, storage), t, plan, config, word, rows));
        LexicalHead {
            dims,
            k,
            maxima: plan.add("lexical.maxima", head.chunk(), dims.vocabulary),
            ids: device.zeros(DType::U32, sequences * k),
            weights: plan.add_wide("lexical.weights", sequences, k),
            training: None,
            head,
        }
    }

    /// The same for training.
    pub fn trained(
        on: (Device, DType),
        (t, plan): (&mut Table, &mut Plan),
        config: &BertConfig,
        word: Id,
        (rows, sequences): (usize, usize),
        k: usize,
    ) -> Self {
        let head = Self::new(on, (t, plan), config, word, (rows, sequences), k);
        let d_weights = plan.add_wide("lexical.d_weights", sequences, k);
        let winners = on.0.zeros(DType::U32, sequences * k);
        LexicalHead { training: Some(Training { d_weights, winners }), ..head }
    }

    /// The words of each text, from the last hidden states `h [T, C]` of all its rows.
    pub fn forward(&self, p: &Pass<'_>, tokens: &TokenInputs, h: &Tensor) {
        let rows = tokens.count.get();
        self.head.transform(p, rows, h);
        let Buffers { y, w, b, logits, .. } = self.head.buffers(p);
        lexical::run(
            p.device,
            &Lexical {
                shape: lexical::Shape {
                    rows,
                    cu_seqlens: &tokens.cu_seqlens,
                    sequence: tokens.names().sequence,
                    width: self.dims.hidden,
                    vocabulary: self.dims.vocabulary,
                    chunk: self.head.chunk(),
                    k: self.k,
                },
                h: y,
                w,
                b,
                logits,
                maxima: p.b(self.maxima),
                ids: &self.ids,
                weights: p.b(self.weights),
            },
        );
    }

    /// Adds the gradients of all parameters, and to `dh [T, C]` those of the hidden states, from those of the weights in [`Self::d_words`].
    /// The forward of the same texts comes before.
    pub fn backward(&self, p: &Pass<'_>, tokens: &TokenInputs, h: &Tensor, dh: &Tensor) {
        let Some(Training { winners, .. }) = &self.training else { panic!("a head without buffers for gradients") };
        let rows = tokens.count.get();
        let Buffers { y, dy, w, dw_acc, db_acc, logits, .. } = self.head.buffers(p);
        joined::backward(
            p.device,
            &joined::Backward {
                shape: self.shape(tokens, 0),
                rows,
                width: self.dims.hidden,
                chunk: self.head.chunk(),
                h: y,
                w,
                d_words: self.d_words(p),
                winners,
                g: logits,
                dh: dy,
                dw_acc,
                db_acc,
            },
        );
        self.head.transform_backward(p, rows, h, (dh, Output::Add));
    }

    /// Of joined embeddings whose dense part is `dense` wide.
    pub fn shape<'a>(&self, tokens: &'a TokenInputs, dense: usize) -> joined::Shape<'a> {
        let (texts, cu_seqlens) = (tokens.sequences.get(), &tokens.cu_seqlens);
        joined::Shape { texts, cu_seqlens, dense, vocabulary: self.dims.vocabulary, k: self.k }
    }

    /// K.
    pub fn k(&self) -> usize {
        self.k
    }

    /// `[S, K]`: the words that [`Self::forward`] left, and their weights.
    pub fn words<'p>(&'p self, p: &'p Pass<'_>) -> Words<'p> {
        Words { ids: &self.ids, weights: p.b(self.weights) }
    }

    /// The same words, and the gradients of their weights.
    pub fn d_words<'p>(&'p self, p: &'p Pass<'_>) -> Words<'p> {
        let Some(training) = &self.training else { panic!("a head without buffers for gradients") };
        Words { ids: &self.ids, weights: p.b(training.d_weights) }
    }
}
