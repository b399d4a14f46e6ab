//! Scores of pairs of query and passage by a cross-encoder: forward only, with no memory for gradients.

use crate::data::pairs::texts::TextBatch;
use crate::device::{DType, Device};
use crate::error::Result;
use crate::graph::activations::{Activations, Plan};
use crate::graph::biencoder::TowerInputs;
use crate::graph::cross_encoder::{COLUMNS, CrossEncoder};
use crate::graph::extent::Bounds;
use crate::graph::params::{Params, Table, to_f32};
use crate::graph::records::Records;
use crate::graph::{Capacity, Pass, StepDropout, check_gpu};
use crate::model::config::BertConfig;
use crate::ops::pool::Pooling;

/// A cross-encoder with room for batches up to a capacity.
pub struct Scorer {
    device: Device,
    capacity: Capacity,
    params: Params,
    buffers: Activations,
    graph: CrossEncoder,
    inputs: TowerInputs,
    records: Records<Bounds>,
}

impl Scorer {
    /// Allocates everything for batches up to `capacity` (sequences are pairs); weights are zero until [`Params::load`].
    ///
    /// # Errors
    /// Not enough memory, or a model whose sizes the kernels do not have.
    pub fn new(device: Device, config: &BertConfig, capacity: Capacity, storage: DType) -> Result<Self> {
        if device.is_gpu() {
            check_gpu(config)?;
        }
        let capacity = Capacity { length: capacity.length.min(config.max_position_embeddings), ..capacity };
        let (mut table, mut plan) = (Table::default(), Plan::forward_only());
        let graph = CrossEncoder::new(&mut table, &mut plan, config, capacity);
        let scorer = Scorer {
            device,
            capacity,
            params: table.allocate_weights(device, storage),
            buffers: plan.allocate(device, storage),
            graph,
            inputs: TowerInputs::new(device, config, capacity, Pooling::Cls),
            records: Records::default(),
        };
        device.check().map(|()| scorer)
    }

    /// The weights.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The largest batch.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// The score of each pair of a batch that fits the capacity: the raw logit, in f32. On the CPU it does not depend on the other pairs.
    ///
    /// # Errors
    /// A failure of the GPU.
    pub fn scores(&mut self, pairs: &TextBatch) -> Result<Vec<f32>> {
        let count = pairs.sequences();
        let places: Vec<u32> = (0..count as u32).collect();
        let bounds = self.inputs.set(pairs, &places, false);
        self.records.run(self.device, bounds, || {
            let (params, buffers) = (&self.params, &self.buffers);
            let pass = Pass { device: self.device, params, buffers, dropout: StepDropout::OFF, complete: None };
            self.graph.forward(&pass, &self.inputs);
        });
        let all = to_f32(&self.buffers.tensor(self.graph.scores()).slice(0..count * COLUMNS));
        self.device.check().map(|()| all.into_iter().step_by(COLUMNS).collect())
    }
}
