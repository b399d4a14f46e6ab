//! One training step of a bi-encoder, top to bottom.
//!
//! Every text of a batch becomes a row of one matrix of embeddings, chunk by chunk; the loss is computed on that matrix, every passage a
//! candidate of every query; and its gradient goes back through the encoder, chunk by chunk. A batch that is one chunk keeps its
//! activations for the backward; of several chunks each is embedded again, with the same dropout, so that memory holds the activations of
//! one chunk only (gradient caching, arXiv 2101.06983) and loss and gradients are those of the undivided batch.

use std::ops::Range;

use crate::data::pairs::batch::{ContrastiveBatch, TextBatch};
use crate::device::{ALIGNMENT, Arena, DType, Device, Tensor};
use crate::error::{Error, Result};
use crate::graph::activations::{Activations, Plan, Slot};
use crate::graph::biencoder::{self, Tower, TowerInputs};
use crate::graph::extent::{Bounds, Extent};
use crate::graph::params::{Params, Table, to_f32};
use crate::graph::{Capacity, Pass, StepDropout, check_gpu};
use crate::model::config::BertConfig;
use crate::ops::cross_entropy::{self, Scale};
use crate::ops::optimizer::AdamW;
use crate::ops::{contrastive, gather};
use crate::rng::Dropout;
use crate::train::records::Records;
use crate::train::step::Footprint;
use crate::train::updates::Optimizer;

/// What is trained, and how it is judged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// How hidden states become embeddings.
    pub shape: biencoder::Shape,
    /// Whether queries and passages have an encoder each.
    pub untied: bool,
    /// τ: scores are divided by it.
    pub temperature: f32,
}

/// The largest batch, and how it is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Queries of a batch.
    pub queries: usize,
    /// Passages of a batch.
    pub passages: usize,
    /// Tokens of a query and of a passage, at most.
    pub lengths: [usize; 2],
    /// Texts whose activations exist at a time; none: all.
    pub chunk: Option<usize>,
}

impl Room {
    /// Row of the first passage among all embeddings: a multiple of what parts of an arena are aligned to, whatever their width.
    fn first_passage(&self) -> usize {
        self.queries.next_multiple_of(ALIGNMENT)
    }

    /// Texts of a chunk of queries, of passages, or of both where they share an encoder.
    fn capacity(&self, texts: usize, length: usize) -> Capacity {
        let sequences = self.chunk.map_or(texts, |chunk| chunk.min(texts));
        Capacity { tokens: sequences * length, sequences, length, encoder_labels: 0 }
    }
}

/// Sums over the queries of one or more batches.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Losses {
    /// Queries.
    pub queries: usize,
    /// Sum of their contrastive losses.
    pub contrastive: f64,
    /// Queries whose own passage scores highest of all.
    pub correct: f64,
}

impl Losses {
    /// Mean loss.
    pub fn total(&self) -> f64 {
        self.contrastive / self.queries.max(1) as f64
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Sums over the step's queries.
    pub losses: Losses,
    /// ‖g‖ before clipping.
    pub grad_norm: f64,
    /// The norm was not finite and nothing was changed.
    pub skipped: bool,
}

/// Part of a batch that goes through a tower at once.
struct Chunk {
    tower: usize,
    texts: TextBatch,
    /// Where their embeddings go.
    places: Vec<u32>,
}

/// What makes pieces of work equal.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Piece {
    Zero { gradients: bool },
    Forward { tower: usize, bounds: Bounds, dropout: [u32; 2] },
    Backward { tower: usize, bounds: Bounds, dropout: [u32; 2], again: bool },
    Loss { gradients: bool, hidden: bool },
    Update,
}

/// The loss's inputs and buffers.
struct Head {
    width: usize,
    temperature: f32,
    room: Room,
    queries: Extent,
    passages: Extent,
    targets: Tensor,
    hidden: Tensor,
    correct: Tensor,
    /// `[1]` f32: what the loss of a query is weighted with, and the same here.
    scale: Tensor,
    scale_here: f64,
    /// `[Q', W]` embeddings of queries and `[P, W]` of passages behind them, and their gradients; Q' is Q rounded up.
    all: Arena,
    d_all: Arena,
    loss: Slot,
    lse: Slot,
}

impl Head {
    fn new((device, storage): (Device, DType), plan: &mut Plan, width: usize, temperature: f32, room: Room) -> Self {
        let u32s = |len| device.zeros(DType::U32, len);
        let q = room.queries;
        let sides = [room.first_passage(), room.passages].map(|rows| rows * width);
        Head {
            width,
            temperature,
            room,
            queries: Extent::new(device),
            passages: Extent::new(device),
            targets: u32s(q),
            hidden: u32s(q * room.passages.div_ceil(32)),
            correct: u32s(q),
            scale: device.zeros(DType::F32, 1),
            scale_here: 0.0,
            all: Arena::zeros(device, storage, sides),
            d_all: Arena::zeros(device, storage, sides),
            loss: plan.add_wide("loss", q, 1),
            lse: plan.add_wide("lse", q, 3),
        }
    }

    /// Uploads what the loss of a batch needs besides the embeddings.
    fn set(&mut self, batch: &ContrastiveBatch) {
        let (q, p) = (batch.queries.samples.len(), batch.passages.samples.len());
        self.queries.set(q, self.room.queries);
        self.passages.set(p, self.room.passages);
        self.targets.upload(&batch.targets);
        if let Some(bits) = &batch.hidden {
            // Rows of bits are as long as the work is laid out for.
            let (own, laid_out) = (p.div_ceil(32), self.passages.get().rows.div_ceil(32));
            let mut rows = vec![0u32; q * laid_out];
            for (to, from) in rows.chunks_exact_mut(laid_out).zip(bits.chunks_exact(own)) {
                to[..own].copy_from_slice(from);
            }
            self.hidden.upload(&rows);
        }
    }

    /// Adds the losses to `sums_acc`, and leaves the gradients of all embeddings.
    fn run(&self, p: &Pass<'_>, hidden: bool, gradients: bool, sums_acc: &Tensor) {
        let (q, passages) = (self.all.tensor(0), self.all.tensor(1));
        let shape = contrastive::Shape {
            queries: self.queries.get(),
            passages: self.passages.get(),
            width: self.width,
            temperature: self.temperature,
            targets: &self.targets,
            hidden: hidden.then_some(&self.hidden),
        };
        let (loss, lse, correct) = (p.b(self.loss), p.b(self.lse), &self.correct);
        contrastive::forward(p.device, &contrastive::Forward { shape, q, p: passages, loss, lse, correct });
        cross_entropy::sums(p.device, self.queries.get(), loss, correct, sums_acc);
        if gradients {
            let (dq, dp) = (self.d_all.tensor(0), self.d_all.tensor(1));
            let scale = Scale { value: self.scale_here, on_device: Some(&self.scale) };
            let backward = contrastive::Backward { shape, scale, q, p: passages, lse, dq, dp };
            contrastive::backward(p.device, &backward);
        }
    }
}

/// A bi-encoder in training: parameters, buffers, optimizer.
pub struct BiEncoder {
    device: Device,
    config: BertConfig,
    options: Options,
    params: Params,
    buffers: Activations,
    towers: Vec<Tower>,
    inputs: Vec<TowerInputs>,
    head: Head,
    optimizer: Optimizer,
    /// `[2]` f64: losses and correct queries; `[1]` ‖g‖².
    results: Tensor,
    records: Records<Piece>,
}

/// The parts of the graph, before allocation.
struct Parts {
    table: Table,
    plan: Plan,
    towers: Vec<Tower>,
    capacities: Vec<Capacity>,
}

impl Parts {
    fn new(config: &BertConfig, options: &Options, room: Room) -> Self {
        let (mut table, mut plan) = (Table::default(), Plan::default());
        let [q, p] = room.lengths.map(|length| length.min(config.max_position_embeddings));
        let sides = if options.untied {
            vec![
                ("query_model.", "linear_q", room.capacity(room.queries, q)),
                ("passage_model.", "linear_p", room.capacity(room.passages, p)),
            ]
        } else {
            let mut capacity = room.capacity(room.queries + room.passages, q.max(p));
            if room.chunk.is_none() {
                capacity.tokens = room.queries * q + room.passages * p;
            }
            vec![("", "linear", capacity)]
        };
        let mut towers = Vec::new();
        for &(prefix, linear, capacity) in &sides {
            towers.push(Tower::new(&mut table, &mut plan, config, capacity, options.shape, (prefix, linear)));
        }
        Parts { table, plan, towers, capacities: sides.iter().map(|side| side.2).collect() }
    }
}

impl BiEncoder {
    /// Memory that [`Self::new`] would take with `storage`.
    pub fn footprint(config: &BertConfig, options: &Options, room: Room, storage: DType) -> Footprint {
        let mut parts = Parts::new(config, options, room);
        let width = options.shape.width(config);
        for name in ["embeddings", "d_embeddings"] {
            parts.plan.add(name, room.first_passage() + room.passages, width);
        }
        Footprint::of(&parts.table, &parts.plan, storage)
    }

    /// Allocates everything; weights are zero until [`Params::load`].
    ///
    /// # Errors
    /// Not enough memory, or a model whose sizes the kernels do not have.
    pub fn new(device: Device, config: &BertConfig, options: Options, room: Room, storage: DType) -> Result<Self> {
        let width = options.shape.width(config);
        if device.is_gpu() {
            check_gpu(config)?;
        }
        if device.is_gpu() && width % 8 != 0 {
            return Err(Error::refused(format!("embeddings are {width} wide; the GPU's kernels need a multiple of 8"))
                .remedy("choose another --projection, or --device cpu"));
        }
        let mut parts = Parts::new(config, &options, room);
        let head = Head::new((device, storage), &mut parts.plan, width, options.temperature, room);
        let params = parts.table.allocate(device, storage);
        let inputs = parts.capacities.iter();
        let model = BiEncoder {
            device,
            config: config.clone(),
            options,
            buffers: parts.plan.allocate(device, storage),
            towers: parts.towers,
            inputs: inputs.map(|&c| TowerInputs::new(device, config, c, options.shape.pooling)).collect(),
            head,
            optimizer: Optimizer::new(device, &params),
            results: device.zeros(DType::F64, 3),
            records: Records::default(),
            params,
        };
        device.check().map(|()| model)
    }

    /// Where it is trained.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Weights and gradients.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The flat first and second moments.
    pub fn moments(&self) -> (&Tensor, &Tensor) {
        self.optimizer.moments()
    }

    /// What is trained.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The embeddings of the last batch: queries `[B, W]`, passages `[P, W]`, in f32.
    pub fn embeddings(&self, batch: &ContrastiveBatch) -> [Vec<f32>; 2] {
        let counts = [&batch.queries, &batch.passages].map(|texts| texts.samples.len() * self.head.width);
        [0, 1].map(|i| to_f32(&self.head.all.tensor(i).slice(0..counts[i])))
    }

    /// One optimizer step: gradients of all micro-batches, clipping, AdamW number `t` (from 1) at learning rate `lr`. Dropout is that
    /// of (`seed`, `t`).
    ///
    /// # Errors
    /// A failure of the GPU. The step is then lost.
    pub fn step(
        &mut self,
        micro: &[ContrastiveBatch],
        adamw: &AdamW,
        lr: f64,
        t: u64,
        seed: u64,
    ) -> Result<StepOutcome> {
        let dropout = StepDropout {
            hidden: Dropout::new(seed, t, self.config.hidden_dropout_prob),
            attention: Dropout::new(seed, t, self.config.attention_probs_dropout_prob),
        };
        if self.optimizer.prepare(adamw, lr, t) {
            self.records.clear();
        }
        let (losses, squared_norm) = self.run(micro, dropout, true, true)?;
        let grad_norm = squared_norm.sqrt();
        Ok(StepOutcome { losses, grad_norm, skipped: !grad_norm.is_finite() })
    }

    /// Gradients of the mean loss over all queries of `micro`, in the gradient arena.
    ///
    /// # Errors
    /// A failure of the GPU.
    pub fn gradients(&mut self, micro: &[ContrastiveBatch], dropout: StepDropout) -> Result<Losses> {
        Ok(self.run(micro, dropout, true, false)?.0)
    }

    /// Losses without dropout and without gradients.
    ///
    /// # Errors
    /// A failure of the GPU.
    pub fn evaluate(&mut self, batch: &ContrastiveBatch) -> Result<Losses> {
        Ok(self.run(std::slice::from_ref(batch), StepDropout::OFF, false, false)?.0)
    }

    fn run(
        &mut self,
        micro: &[ContrastiveBatch],
        dropout: StepDropout,
        gradients: bool,
        update: bool,
    ) -> Result<(Losses, f64)> {
        let queries: usize = micro.iter().map(|batch| batch.queries.samples.len()).sum();
        self.head.scale_here = 1.0 / queries.max(1) as f64;
        self.head.scale.upload(&[self.head.scale_here as f32]);
        if let Device::Gpu(gpu) = self.device {
            gpu.set_dropout_key(dropout.hidden.key);
        }
        let mut records = std::mem::take(&mut self.records);
        records.run(self.device, Piece::Zero { gradients }, || self.zero(gradients));
        for batch in micro {
            self.batch(&mut records, batch, dropout, gradients);
        }
        if update {
            records.run(self.device, Piece::Update, || {
                self.optimizer.update(&self.params, &self.results.slice(2..3));
            });
        }
        self.records = records;
        let x: Vec<f64> = self.results.to_vec();
        self.device.check()?;
        Ok((Losses { queries, contrastive: x[0], correct: x[1] }, x[2]))
    }

    fn zero(&self, gradients: bool) {
        gather::zero(self.device, &self.results, self.results.len());
        if gradients {
            gather::zero(self.device, self.params.gradients(), self.params.gradients().len());
        }
    }

    /// Losses and gradients of one batch.
    fn batch(&mut self, records: &mut Records<Piece>, batch: &ContrastiveBatch, dropout: StepDropout, gradients: bool) {
        let (device, thresholds) = (self.device, [dropout.hidden.threshold, dropout.attention.threshold]);
        let chunks = self.chunks(batch);
        // Activations of the forward are still there for the backward when each tower sees one chunk.
        let again = chunks.len() > self.towers.len();
        let mut bounds = Vec::new();
        for Chunk { tower, texts, places } in &chunks {
            let (tower, laid_out) = (*tower, self.inputs[*tower].set(texts, places, gradients && !again));
            bounds.push(laid_out);
            records.run(device, Piece::Forward { tower, bounds: laid_out, dropout: thresholds }, || {
                let p = self.pass(dropout);
                self.towers[tower].forward(&p, &self.inputs[tower], self.head.all.whole());
            });
        }
        self.head.set(batch);
        let hidden = batch.hidden.is_some();
        records.run(device, Piece::Loss { gradients, hidden }, || {
            self.head.run(&self.pass(dropout), hidden, gradients, &self.results.slice(0..2));
        });
        if !gradients {
            return;
        }
        for (Chunk { tower, texts, places }, laid_out) in chunks.iter().zip(bounds) {
            let tower = *tower;
            if again {
                self.inputs[tower].set(texts, places, true);
            }
            let piece = Piece::Backward { tower, bounds: laid_out, dropout: thresholds, again };
            records.run(device, piece, || {
                let p = self.pass(dropout);
                if again {
                    self.towers[tower].forward(&p, &self.inputs[tower], self.head.all.whole());
                }
                self.towers[tower].backward(&p, &self.inputs[tower], self.head.d_all.whole());
            });
        }
    }

    fn pass(&self, dropout: StepDropout) -> Pass<'_> {
        Pass { device: self.device, params: &self.params, buffers: &self.buffers, dropout }
    }

    /// The batch in pieces that fit the towers.
    fn chunks(&self, batch: &ContrastiveBatch) -> Vec<Chunk> {
        let (q, p) = (batch.queries.samples.len(), batch.passages.samples.len());
        let limit = |texts: usize| self.head.room.chunk.unwrap_or(texts).max(1);
        let first_passage = self.head.room.first_passage();
        let mut chunks = Vec::new();
        let mut cut = |tower: usize, texts: &TextBatch, places: &dyn Fn(usize) -> u32, limit: usize| {
            let n = texts.samples.len();
            for start in (0..n).step_by(limit) {
                let range = start..(start + limit).min(n);
                let places = range.clone().map(places).collect();
                chunks.push(Chunk { tower, texts: part(texts, range), places });
            }
        };
        let of_passage = |i: usize| (first_passage + i) as u32;
        if self.options.untied {
            cut(0, &batch.queries, &|i| i as u32, limit(q));
            cut(1, &batch.passages, &of_passage, limit(p));
        } else {
            let both = joined(&batch.queries, &batch.passages);
            cut(0, &both, &|i| if i < q { i as u32 } else { of_passage(i - q) }, limit(q + p));
        }
        chunks
    }
}

/// Some of the texts.
fn part(texts: &TextBatch, range: Range<usize>) -> TextBatch {
    let (first, last) = (texts.cu_seqlens[range.start], texts.cu_seqlens[range.end]);
    let tokens = first as usize..last as usize;
    TextBatch {
        cu_seqlens: texts.cu_seqlens[range.start..=range.end].iter().map(|at| at - first).collect(),
        samples: texts.samples[range].to_vec(),
        ids: texts.ids[tokens.clone()].to_vec(),
        types: texts.types[tokens].to_vec(),
    }
}

/// All texts of both.
fn joined(a: &TextBatch, b: &TextBatch) -> TextBatch {
    let first = a.ids.len() as u32;
    let ends = b.cu_seqlens[1..].iter().map(|at| at + first);
    TextBatch {
        cu_seqlens: a.cu_seqlens.iter().copied().chain(ends).collect(),
        samples: [&a.samples[..], &b.samples].concat(),
        ids: [&a.ids[..], &b.ids].concat(),
        types: [&a.types[..], &b.types].concat(),
    }
}
