//! One training step of a cross-encoder: pairs of query and passage in, a score each out, and the cross entropy of the positive among the
//! scores of its query's group.

use crate::data::pairs::batch::CrossBatch;
use crate::data::pairs::texts::TextBatch;
use crate::device::{DType, Device, Tensor};
use crate::error::Result;
use crate::graph::activations::{Activations, Plan, Slot};
use crate::graph::biencoder::TowerInputs;
use crate::graph::cross_encoder::{COLUMNS, CrossEncoder};
use crate::graph::extent::{Bounds, Extent};
use crate::graph::params::{Entries, Params, Table, to_f32};
use crate::graph::records::Records;
use crate::graph::{Capacity, Pass, StepDropout, check_gpu};
use crate::model::config::BertConfig;
use crate::ops::group_loss;
use crate::ops::optimizer::AdamW;
use crate::ops::pool::Pooling;
use crate::train::EvalPart;
use crate::train::step::Footprint;
use crate::train::updates::{self, Optimizer, Scales, Trainable, one_of};

/// Sums over the queries of one or more batches.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Losses {
    /// Queries.
    pub queries: usize,
    /// Sum of their losses.
    pub sum: f64,
    /// Queries whose positive scores highest of its group.
    pub correct: f64,
}

impl Losses {
    /// Mean loss.
    pub fn total(&self) -> f64 {
        self.sum / self.queries.max(1) as f64
    }
}

/// What makes pieces of work equal.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Segment {
    bounds: Bounds,
    group: usize,
    first: bool,
    gradients: bool,
    update: bool,
    /// Ranks begin to sum gradients as soon as they are complete.
    sums: bool,
    /// Scores only.
    scores: bool,
    dropout: [u32; 2],
}

/// A cross-encoder in training: parameters, buffers, optimizer.
pub struct Ranker {
    device: Device,
    config: BertConfig,
    temperature: f32,
    capacity: Capacity,
    params: Params,
    buffers: Activations,
    graph: CrossEncoder,
    inputs: TowerInputs,
    queries: Extent,
    /// `[Q]` loss of each query, and whether it is correct.
    loss: Slot,
    correct: Tensor,
    /// Of a query.
    scales: Scales<1>,
    optimizer: Optimizer,
    /// f64: `[2]` losses and correct queries, `[1]` ‖g‖², `[1]` that of this rank's own gradients.
    results: Tensor,
    records: Records<Segment>,
}

impl Ranker {
    /// The graph and its tables, for batches up to `capacity` pairs.
    fn parts(config: &BertConfig, capacity: Capacity) -> (Table, Plan, CrossEncoder, Slot) {
        let (mut table, mut plan) = (Table::default(), Plan::default());
        let graph = CrossEncoder::new(&mut table, &mut plan, config, capacity);
        let loss = plan.add_wide("loss", capacity.sequences, 1);
        (table, plan, graph, loss)
    }

    /// Memory that [`Self::new`] would take with `storage`.
    pub fn footprint(config: &BertConfig, capacity: Capacity, storage: DType) -> Footprint {
        let (table, plan, ..) = Self::parts(config, capacity);
        Footprint::of(&table, &plan, storage)
    }

    /// Allocates everything for batches up to `capacity` (sequences are pairs); weights are zero until [`Params::load`].
    ///
    /// # Errors
    /// Not enough memory, or a model whose sizes the kernels do not have.
    pub fn new(
        device: Device,
        config: &BertConfig,
        temperature: f32,
        capacity: Capacity,
        storage: DType,
    ) -> Result<Self> {
        if device.is_gpu() {
            check_gpu(config)?;
        }
        let capacity = Capacity { length: capacity.length.min(config.max_position_embeddings), ..capacity };
        let (table, plan, graph, loss) = Self::parts(config, capacity);
        let (params, completed) = (table.allocate(device, storage), graph.completed());
        let model = Ranker {
            device,
            config: config.clone(),
            temperature,
            capacity,
            buffers: plan.allocate(device, storage),
            graph,
            inputs: TowerInputs::new(device, config, capacity, Pooling::Cls),
            queries: Extent::new(device),
            loss,
            correct: device.zeros(DType::U32, capacity.sequences),
            scales: Scales::new(device),
            optimizer: Optimizer::new(device, &params, &completed),
            results: device.zeros(DType::F64, 3),
            records: Records::default(),
            params,
        };
        device.check().map(|()| model)
    }

    /// Most pairs and most tokens that [`Self::scores`] takes at once.
    pub fn limits(&self) -> (usize, usize) {
        (self.capacity.sequences, self.capacity.tokens)
    }

    /// The score of each pair, without dropout.
    ///
    /// # Errors
    /// A failure of the GPU.
    pub fn scores(&mut self, pairs: &TextBatch) -> Result<Vec<f32>> {
        let segment = Segment {
            bounds: self.set(pairs, false),
            group: 1,
            first: false,
            gradients: false,
            update: false,
            sums: false,
            scores: true,
            dropout: [0; 2],
        };
        let mut records = std::mem::take(&mut self.records);
        records.run(self.device, segment, || self.graph.forward(&self.pass(StepDropout::OFF), &self.inputs));
        self.records = records;
        let count = pairs.sequences();
        let all = to_f32(&self.buffers.tensor(self.graph.scores()).slice(0..count * COLUMNS));
        self.device.check().map(|()| all.into_iter().step_by(COLUMNS).collect())
    }

    fn pass(&self, dropout: StepDropout) -> Pass<'_> {
        Pass { device: self.device, params: &self.params, buffers: &self.buffers, dropout, complete: None }
    }

    /// Uploads a batch.
    fn set(&mut self, pairs: &TextBatch, gradients: bool) -> Bounds {
        let places: Vec<u32> = (0..pairs.sequences() as u32).collect();
        self.inputs.set(pairs, &places, gradients)
    }

    /// All work between the upload of a micro-batch and that of the next.
    fn segment(&self, segment: Segment, dropout: StepDropout, complete: &dyn Fn(&Entries)) {
        if segment.first {
            updates::zero(self.device, &self.results, &self.params, segment.gradients);
        }
        let p = Pass { complete: segment.sums.then_some(complete), ..self.pass(dropout) };
        self.graph.forward(&p, &self.inputs);
        let (scale, ds) = (self.scales.get(0), p.b(self.graph.score_gradient()));
        group_loss::run(
            self.device,
            &group_loss::GroupLoss {
                shape: group_loss::Shape {
                    queries: self.queries.get(),
                    group: segment.group,
                    stride: COLUMNS,
                    temperature: self.temperature,
                },
                kind: group_loss::Kind::CrossEntropy,
                scores: p.b(self.graph.scores()),
                loss: p.b(self.loss),
                correct: &self.correct,
                sums_acc: &self.results.slice(0..2),
                gradient: segment.gradients.then_some(group_loss::Gradient { scale, ds }),
            },
        );
        if segment.gradients {
            self.graph.backward(&p, &self.inputs);
        }
        if segment.update {
            self.optimizer.update(&self.params, &self.results.slice(2..3));
        }
    }
}

impl Trainable for Ranker {
    type Batch = CrossBatch;
    type Losses = Losses;

    fn config(&self) -> &BertConfig {
        &self.config
    }

    fn device(&self) -> Device {
        self.device
    }

    fn params(&self) -> &Params {
        &self.params
    }

    fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    fn optimizer_mut(&mut self) -> &mut Optimizer {
        &mut self.optimizer
    }

    fn size(batch: &CrossBatch) -> (usize, usize) {
        (batch.pairs.sequences(), batch.pairs.tokens())
    }

    fn parts(&self, l: &Losses) -> Vec<EvalPart> {
        let (loss_sum, correct) = (l.sum, Some(l.correct as u64));
        vec![EvalPart { name: "ranking", loss_sum, correct, labels: l.queries as u64, weight: 1.0 }]
    }

    fn prepare(&mut self, adamw: &AdamW, lr: f64, t: u64) {
        if self.optimizer.prepare(adamw, lr, t) {
            self.records.clear();
        }
    }

    fn begin(&mut self, micro: &[CrossBatch], dropout: StepDropout, gradients: bool, update: bool) -> Result<Losses> {
        let queries = |batch: &CrossBatch| batch.pairs.samples.len() / batch.group;
        let team = self.optimizer.team(gradients);
        let [total] = team.totals([micro.iter().map(queries).sum()])?;
        self.scales.set([one_of(total)]);
        dropout.announce(self.device);
        if micro.is_empty() {
            // The last step's queries were too few for every rank.
            updates::zero(self.device, &self.results, &self.params, gradients);
        }
        let mut records = std::mem::take(&mut self.records);
        for (i, batch) in micro.iter().enumerate() {
            let (bounds, last) = (self.set(&batch.pairs, gradients), i + 1 == micro.len());
            // Whole groups of what the pairs' work is laid out for.
            self.queries.set(queries(batch), bounds.sequences / batch.group);
            let segment = Segment {
                bounds,
                group: batch.group,
                first: i == 0,
                gradients,
                update: update && last && !team.is_shared(),
                sums: last && self.optimizer.overlaps(gradients),
                scores: false,
                dropout: dropout.thresholds(),
            };
            let work = |complete: &dyn Fn(&Entries)| self.segment(segment, dropout, complete);
            let complete = |entries: &Entries| self.optimizer.complete(&self.params, entries);
            records.run_in_pieces(self.device, segment, work, complete)?;
        }
        self.records = records;
        if team.is_shared() {
            self.optimizer.share(&self.params, &self.results.slice(2..3), update)?;
        }
        Ok(Losses { queries: total, sum: 0.0, correct: 0.0 })
    }

    fn end(&mut self, losses: Losses) -> Result<(Losses, f64)> {
        let x: Vec<f64> = self.results.to_vec();
        self.device.check()?;
        let [sum, correct] = self.optimizer.losses([x[0], x[1]])?;
        Ok((Losses { sum, correct, ..losses }, x[2]))
    }
}
