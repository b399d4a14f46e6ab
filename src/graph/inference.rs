//! The encoder alone, without dropout and without gradients: last hidden states of a packed token stream.

use super::activations::{Activations, Plan};
use super::encoder::Encoder;
use super::extent::Bounds;
use super::inputs::{Rows, TokenInputs};
use super::params::{Params, Table};
use super::{Capacity, Pass, StepDropout};
use crate::device::{DType, Device, Tensor};
use crate::error::Result;
use crate::model::config::BertConfig;

/// An encoder with buffers for batches up to a capacity.
pub struct Inference {
    device: Device,
    params: Params,
    buffers: Activations,
    encoder: Encoder,
    tokens: TokenInputs,
    rows: Rows,
    capacity: Capacity,
}

impl Inference {
    /// Allocates weights (zero until [`Params::load`]) and buffers.
    pub fn new(device: Device, config: &BertConfig, capacity: Capacity, dtype: DType) -> Result<Self> {
        if device.is_gpu() {
            super::check_gpu(config)?;
        }
        let (mut table, mut plan) = (Table::default(), Plan::forward_only());
        let encoder = Encoder::new(&mut table, &mut plan, config, capacity, capacity.tokens);
        let inference = Inference {
            device,
            params: table.allocate_weights(device, dtype),
            buffers: plan.allocate(device, dtype),
            encoder,
            tokens: TokenInputs::new(device, capacity, config.vocab_size, config.type_vocab_size),
            rows: Rows::new(device, capacity.tokens, capacity),
            capacity,
        };
        device.check().map(|()| inference)
    }

    /// The weights.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Last hidden states `[R, C]` of the rows `rows` (ascending, numbered in the stream) of a batch: `ids` `[T]`, token types `[T]`,
    /// `cu_seqlens` `[S + 1]`.
    pub fn hidden_states(&mut self, ids: &[u32], types: &[u32], cu_seqlens: &[u32], rows: &[u32]) -> &Tensor {
        let samples: Vec<u64> = (0..cu_seqlens.len() as u64 - 1).collect();
        let (tokens, sequences, length) = (ids.len(), samples.len(), self.capacity.length);
        let exact = Bounds { tokens, sequences, labels: 0, decoder_rows: rows.len(), length, head_chunks: 0 };
        let bounds = if self.device.is_gpu() { exact.rounded(self.capacity) } else { exact };
        self.tokens.set(ids, types, cu_seqlens, &samples, &bounds);
        self.rows.set(rows, cu_seqlens, bounds.decoder_rows, &bounds);
        let p = Pass {
            device: self.device,
            params: &self.params,
            buffers: &self.buffers,
            dropout: StepDropout::OFF,
            complete: None,
        };
        self.encoder.forward(&p, &self.tokens, &self.rows);
        self.buffers.tensor(self.encoder.output())
    }
}
