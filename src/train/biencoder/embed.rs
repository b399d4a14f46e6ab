//! Embeddings of a bi-encoder in training, for those who judge it.

use super::{BiEncoder, Piece};
use crate::data::pairs::texts::TextBatch;
use crate::error::Result;
use crate::graph::params::to_f32;
use crate::graph::{Capacity, StepDropout};
use crate::ops::joined::Words;
use crate::retrieve::representation::Embedded;

impl BiEncoder {
    /// Most texts and most tokens that [`Self::embed`] takes at once, of queries (0) or passages (1).
    pub fn limits(&self, side: usize) -> (usize, usize) {
        let capacity = self.capacity(side);
        (capacity.sequences, capacity.tokens)
    }

    /// Room of the tower of queries (0) or passages (1).
    pub fn capacity(&self, side: usize) -> Capacity {
        self.capacities[if self.options.untied { side } else { 0 }]
    }

    /// Widths of what [`Self::embed`] gives: of dense embeddings, and how many words; 0 without.
    pub fn widths(&self) -> (usize, usize) {
        (self.options.shape.width(&self.config), self.options.lexical.unwrap_or(0))
    }

    /// Embeddings of queries (0) or passages (1) by the weights as they are. A text without words has the word 0 of no weight.
    ///
    /// # Errors
    /// A failure of the GPU.
    pub fn embed(&mut self, side: usize, texts: &TextBatch) -> Result<Embedded> {
        let (tower, count) = (if self.options.untied { side } else { 0 }, texts.sequences());
        let places: Vec<u32> = (0..count as u32).collect();
        let (bounds, dropout) = (self.inputs[tower].set(texts, &places, false), StepDropout::OFF.thresholds());
        StepDropout::OFF.announce(self.device);
        let mut records = std::mem::take(&mut self.records);
        records.run(self.device, Piece::Forward { tower, bounds, dropout }, || {
            self.towers[tower].forward(&self.pass(StepDropout::OFF), &self.inputs[tower], self.head.all.whole());
        });
        self.records = records;
        let pass = self.pass(StepDropout::OFF);
        let (dense, words) = self.towers[tower].embedded(&pass);
        let (width, k) = self.widths();
        let mut embedded = Embedded { dense: to_f32(&dense.slice(0..count * width)), ..Embedded::default() };
        if let Some(Words { ids, weights }) = words {
            embedded.ids = ids.slice(0..count * k).to_vec();
            embedded.weights = to_f32(&weights.slice(0..count * k));
            for (id, weight) in embedded.ids.iter_mut().zip(&mut embedded.weights).filter(|(id, _)| **id == u32::MAX) {
                (*id, *weight) = (0, 0.0);
            }
        }
        self.device.check().map(|()| embedded)
    }
}
