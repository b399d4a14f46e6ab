//! A cross-encoder: from packed pairs of query and passage to one score each, as `BertForSequenceClassification` computes it:
//! `s = w · dropout(tanh(W h_[CLS] + b)) + c`. Scores are not rounded, whatever hidden states are stored as.

use super::activations::{Plan, Slot};
use super::biencoder::TowerInputs;
use super::block::Linear;
use super::encoder::Encoder;
use super::params::{Entries, Init, Table};
use super::{Capacity, Pass};
use crate::device::{Matrix, Output, Tensor};
use crate::model::config::BertConfig;
use crate::ops::activation::{self, Function};
use crate::ops::{dropout, gather, linear};

/// Columns of the scores' matrix: the score is the first, the others are 0. Products and kernels want eight.
pub const COLUMNS: usize = 8;

/// The encoder and its head.
pub struct CrossEncoder {
    encoder: Encoder,
    /// Behind those of the encoder.
    others: Entries,
    width: usize,
    site: u32,
    pooler: Linear,
    classifier: Linear,
    /// `[S, C]` before and after tanh, and the gradient of either.
    dense: Slot,
    pooled: Slot,
    d_pooled: Slot,
    /// `[S, COLUMNS]` scores, their gradient, and that in the storage type.
    scores: Slot,
    d_scores: Slot,
    d_scores_rounded: Slot,
}

impl CrossEncoder {
    /// Adds parameters and buffers to the tables, for batches up to `capacity`.
    pub fn new(t: &mut Table, plan: &mut Plan, config: &BertConfig, capacity: Capacity) -> Self {
        let (s, c) = (capacity.sequences, config.hidden_size);
        let encoder = Encoder::new(t, plan, config, capacity, s);
        let pooler = Linear::new(t, "bert.pooler.dense".into(), c, c);
        let classifier = Linear {
            weight: t.matrices(&["classifier.weight".into()], 1, c, Init::Normal),
            bias: t.vectors(&["classifier.bias".into()], 1, Init::Zeros),
        };
        t.pad(classifier.weight, COLUMNS, 0.0);
        t.pad(classifier.bias, COLUMNS, 0.0);
        CrossEncoder {
            site: encoder.next_site(),
            others: t.since(encoder.end()),
            encoder,
            width: c,
            pooler,
            classifier,
            dense: plan.add("pooler.dense", s, c),
            pooled: plan.add("pooler.pooled", s, c),
            d_pooled: plan.add_gradient("pooler.d_pooled", s, c),
            scores: plan.add_wide("scores", s, COLUMNS),
            d_scores: plan.add_wide_gradient("d_scores", s, COLUMNS),
            d_scores_rounded: plan.add_gradient("d_scores.rounded", s, COLUMNS),
        }
    }

    /// Its entries in the order in which [`Self::backward`] completes their gradients.
    pub fn completed(&self) -> Vec<Entries> {
        [vec![self.others.clone()], self.encoder.completed()].concat()
    }

    /// Where [`Self::forward`] leaves the scores `[S, COLUMNS]`.
    pub fn scores(&self) -> Slot {
        self.scores
    }

    /// Where the gradient of the scores must be before [`Self::backward`].
    pub fn score_gradient(&self) -> Slot {
        self.d_scores
    }

    /// Scores the pairs.
    pub fn forward(&self, p: &Pass<'_>, inputs: &TowerInputs) {
        let (count, c) = (inputs.count.get(), self.width);
        self.encoder.forward(p, &inputs.tokens, &inputs.rows);
        self.pooler.forward(p, (count, c, c), p.b(self.encoder.output()), p.b(self.dense));
        activation::forward(p.device, Function::Tanh, p.b(self.dense), p.b(self.pooled), (count, c));
        let names = inputs.tokens.names_of(&inputs.rows);
        dropout::apply(p.device, p.dropout.hidden(self.site), names, (count, c), p.b(self.pooled));
        linear::forward(
            p.device,
            &linear::Forward {
                rows: count,
                inputs: c,
                outputs: COLUMNS,
                x: Matrix::new(p.b(self.pooled), c),
                w: p.w(self.classifier.weight),
                b: Some(p.master(self.classifier.bias)),
                y: Matrix::new(p.b(self.scores), COLUMNS),
            },
        );
    }

    /// Adds the gradients of all parameters.
    pub fn backward(&self, p: &Pass<'_>, inputs: &TowerInputs) {
        let (count, c) = (inputs.count.get(), self.width);
        let (wide, storage) = (p.b(self.d_scores), p.b(self.d_scores_rounded));
        let d_scores: &Tensor = gather::rounded(p.device, wide, count, COLUMNS, storage);
        let d_pooled = p.b(self.d_pooled);
        let dx = Some((Matrix::new(d_pooled, c), Output::Set));
        let (dw_acc, db_acc) = (p.g(self.classifier.weight), Some(p.g(self.classifier.bias)));
        let (x, dy) = (Matrix::new(p.b(self.pooled), c), Matrix::new(d_scores, COLUMNS));
        let w = p.w(self.classifier.weight);
        let (rows, inputs_of, outputs) = (count, c, COLUMNS);
        linear::backward(
            p.device,
            &linear::Backward { rows, inputs: inputs_of, outputs, x, w, dy, dx, dw_acc, db_acc },
        );
        let names = inputs.tokens.names_of(&inputs.rows);
        dropout::apply(p.device, p.dropout.hidden(self.site), names, (count, c), d_pooled);
        activation::backward(p.device, Function::Tanh, p.b(self.dense), d_pooled, (count, c));
        let dx = (p.b(self.encoder.gradients.rows), Output::Set);
        self.pooler.backward(p, (count, c, c), p.b(self.encoder.output()), d_pooled, dx);
        p.complete(&self.others);
        self.encoder.backward(p, &inputs.tokens, &inputs.rows);
    }
}
