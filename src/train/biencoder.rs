//! One training step of a bi-encoder, top to bottom.
//!
//! Every text of a batch becomes a row of one matrix of embeddings, chunk by chunk; the loss is computed on that matrix, every passage a
//! candidate of every query; and its gradient goes back through the encoder, chunk by chunk. A batch that is one chunk keeps its
//! activations for the backward; of several chunks each is embedded again, with the same dropout, so that memory holds the activations of
//! one chunk only (gradient caching, arXiv 2101.06983) and loss and gradients are those of the undivided batch.

mod embed;

use crate::data::order::Share;
use crate::data::pairs::batch::ContrastiveBatch;
use crate::data::pairs::texts::TextBatch;
use crate::device::{ALIGNMENT, DType, Device, Tensor, trace};
use crate::error::{Error, Result};
use crate::graph::activations::{Activations, Plan};
use crate::graph::biencoder::{self, Needed, Tower, TowerInputs};
use crate::graph::extent::Bounds;
use crate::graph::params::{Entries, Params, Table, to_f32};
use crate::graph::records::Records;
use crate::graph::{Capacity, Dims, Pass, StepDropout, check_gpu, stages};
use crate::model::config::BertConfig;
use crate::ops::optimizer::AdamW;
use crate::train::EvalPart;
use crate::train::biencoder_loss::Head;
pub use crate::train::biencoder_loss::{DistillLoss, Distillation, Losses};
use crate::train::step::Footprint;
use crate::train::updates::{self, Optimizer, Trainable};

/// What is trained, and how it is judged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// How hidden states become embeddings.
    pub shape: biencoder::Shape,
    /// Words that a text keeps of the lexical representation, where embeddings are joined ones.
    pub lexical: Option<usize>,
    /// Whether queries and passages have an encoder each.
    pub untied: bool,
    /// τ: scores are divided by it.
    pub temperature: f32,
    /// What a teacher's scores are for, where batches have them.
    pub distillation: Option<Distillation>,
}

impl Options {
    /// Width of the embeddings: of joined ones with a column for every word.
    pub fn width(&self, config: &BertConfig) -> usize {
        self.shape.width(config) + self.lexical.map_or(0, |_| Dims::new(config).vocabulary)
    }

    /// What the towers need of their last layer.
    fn needed(&self) -> Needed {
        if self.lexical.is_some() { Needed::All } else { Needed::by(self.shape.pooling) }
    }
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
    pub(super) fn first_passage(&self) -> usize {
        self.queries.next_multiple_of(ALIGNMENT)
    }

    /// Texts of a chunk of queries, of passages, or of both where they share an encoder.
    fn capacity(&self, texts: usize, length: usize) -> Capacity {
        let sequences = self.chunk.map_or(texts, |chunk| chunk.min(texts));
        Capacity { tokens: sequences * length, sequences, length, encoder_labels: 0 }
    }
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
    Zero {
        gradients: bool,
    },
    Forward {
        tower: usize,
        bounds: Bounds,
        dropout: [u32; 2],
    },
    /// `sums`: ranks begin to sum gradients as soon as they are complete.
    Backward {
        tower: usize,
        bounds: Bounds,
        dropout: [u32; 2],
        again: bool,
        sums: bool,
    },
    Loss {
        gradients: bool,
        hidden: bool,
    },
    Distill {
        gradients: bool,
        group: usize,
        loss: DistillLoss,
        across: bool,
    },
    Update,
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
    /// Of each tower's chunks.
    capacities: Vec<Capacity>,
    head: Head,
    optimizer: Optimizer,
    /// f64: `[2]` contrastive losses and correct queries, `[2]` the same of distillation, `[1]` ‖g‖².
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
    fn new(on: (Device, DType), config: &BertConfig, options: &Options, room: Room) -> Self {
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
            let (tables, names) = ((&mut table, &mut plan), (prefix, linear));
            towers.push(match options.lexical {
                None => Tower::new(tables.0, tables.1, config, capacity, options.shape, names),
                Some(k) => Tower::joined(on, tables, config, capacity, (options.shape, k), names),
            });
        }
        Parts { table, plan, towers, capacities: sides.iter().map(|side| side.2).collect() }
    }
}

impl BiEncoder {
    /// Memory that [`Self::new`] would take with `storage`.
    pub fn footprint(on: (Device, DType), config: &BertConfig, options: &Options, room: Room) -> Footprint {
        Self::footprint_among(on, config, options, (room, Share::default()))
    }

    /// Memory that [`Self::among`] would take with `storage`.
    pub fn footprint_among(
        (device, storage): (Device, DType),
        config: &BertConfig,
        options: &Options,
        (room, share): (Room, Share),
    ) -> Footprint {
        let mut parts = Parts::new((device, storage), config, options, room);
        let width = options.width(config);
        for name in ["embeddings", "d_embeddings"] {
            parts.plan.add(name, room.first_passage() + room.passages * share.ranks as usize, width);
        }
        Footprint::of(&parts.table, &parts.plan, storage)
    }

    /// Allocates everything; weights are zero until [`Params::load`].
    ///
    /// # Errors
    /// Not enough memory, or a model whose sizes the kernels do not have.
    pub fn new(device: Device, config: &BertConfig, options: Options, room: Room, storage: DType) -> Result<Self> {
        Self::among(device, config, options, (room, Share::default()), storage)
    }

    /// The same with room for the passages of all ranks that share a run, where they are candidates.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn among(
        device: Device,
        config: &BertConfig,
        options: Options,
        (room, share): (Room, Share),
        storage: DType,
    ) -> Result<Self> {
        let width = options.width(config);
        if device.is_gpu() {
            check_gpu(config)?;
        }
        if device.is_gpu() && !width.is_multiple_of(8) {
            let width = options.shape.width(config);
            return Err(Error::refused(format!("embeddings are {width} wide; the GPU's kernels need a multiple of 8"))
                .remedy("choose another --projection, or --device cpu"));
        }
        let mut parts = Parts::new((device, storage), config, &options, room);
        let head = Head::new((device, storage), &mut parts.plan, width, options.temperature, (room, share));
        let params = parts.table.allocate(device, storage);
        let completed: Vec<Entries> = parts.towers.iter().flat_map(Tower::completed).collect();
        let inputs = parts.capacities.iter();
        let model = BiEncoder {
            device,
            config: config.clone(),
            options,
            buffers: parts.plan.allocate(device, storage),
            towers: parts.towers,
            inputs: inputs.map(|&c| TowerInputs::with(device, config, c, options.needed())).collect(),
            capacities: parts.capacities,
            head,
            optimizer: Optimizer::new(device, &params, &completed),
            results: device.zeros(DType::F64, 5),
            records: Records::default(),
            params,
        };
        device.check().map(|()| model)
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

    /// How many terms the losses of `micro` have.
    fn terms(&self, micro: &[ContrastiveBatch]) -> Result<Losses> {
        let queries = |batch: &ContrastiveBatch| batch.queries.samples.len();
        let mut losses =
            Losses { queries: micro.iter().map(queries).sum(), contrastive_weight: 1.0, ..Losses::default() };
        if let Some(Distillation { loss, contrastive_weight }) = self.options.distillation {
            if micro.iter().any(|batch| batch.teacher.is_none()) {
                return Err(Error::refused("a batch has no scores of a teacher").remedy("report this as a defect"));
            }
            let terms = |batch: &ContrastiveBatch| match loss {
                DistillLoss::Kl => batch.group,
                DistillLoss::MarginMse => batch.group - 1,
            };
            losses.contrastive_weight = contrastive_weight;
            losses.distill_terms = micro.iter().map(|batch| queries(batch) * terms(batch)).sum();
        }
        Ok(losses)
    }

    /// Losses and gradients of one batch; with `sums`, those of ranks are summed as soon as they are complete.
    ///
    /// # Errors
    /// The failure of a rank.
    fn batch(
        &mut self,
        records: &mut Records<Piece>,
        batch: &ContrastiveBatch,
        dropout: StepDropout,
        (gradients, sums): (bool, bool),
    ) -> Result<()> {
        let (device, thresholds) = (self.device, dropout.thresholds());
        let chunks = self.chunks(batch);
        // Activations of the forward are still there for the backward when each tower sees one chunk.
        let again = chunks.len() > self.towers.len();
        let mut bounds = Vec::new();
        for Chunk { tower, texts, places } in &chunks {
            let (tower, laid_out) = (*tower, self.inputs[*tower].set(texts, places, gradients && !again));
            bounds.push(laid_out);
            records.run(device, Piece::Forward { tower, bounds: laid_out, dropout: thresholds }, || {
                let _forward = trace::phase(stages::FORWARD);
                let p = self.pass(dropout);
                self.towers[tower].forward(&p, &self.inputs[tower], self.head.all.whole());
            });
        }
        self.head.set(batch, self.buffers.tensor(self.head.teacher));
        let (hidden, group) = (batch.hidden.is_some(), batch.group);
        let distill = self.options.distillation.map(|d| d.loss);
        let names = || (trace::phase(stages::LOSS), trace::stage(stages::CONTRASTIVE));
        let team = self.optimizer.team(batch.across.is_some());
        if team.is_shared() {
            team.all_gather(self.head.all.tensor(1))?;
        }
        if batch.rows.is_empty() {
            self.head.nothing();
        } else {
            records.run(device, Piece::Loss { gradients, hidden }, || {
                let _names = names();
                self.head.contrast(&self.pass(dropout), hidden, gradients, &self.results.slice(0..2));
            });
        }
        if team.is_shared() && gradients {
            team.reduce_scatter(self.head.d_all.tensor(1))?;
        }
        if let (Some(loss), false) = (distill, batch.rows.is_empty()) {
            let across = batch.across.is_some();
            records.run(device, Piece::Distill { gradients, group, loss, across }, || {
                let _names = names();
                self.head.distill(&self.pass(dropout), loss, group, gradients, across, &self.results.slice(2..4));
            });
        }
        if !gradients {
            return Ok(());
        }
        for (i, (Chunk { tower, texts, places }, laid_out)) in chunks.iter().zip(bounds).enumerate() {
            let tower = *tower;
            let sums = sums && chunks[i + 1..].iter().all(|chunk| chunk.tower != tower);
            if again {
                self.inputs[tower].set(texts, places, true);
            }
            let piece = Piece::Backward { tower, bounds: laid_out, dropout: thresholds, again, sums };
            let complete = |entries: &Entries| self.optimizer.complete(&self.params, entries);
            let work = |complete: &dyn Fn(&Entries)| {
                let _backward = trace::phase(stages::BACKWARD);
                let p = Pass { complete: sums.then_some(complete), ..self.pass(dropout) };
                if again {
                    self.towers[tower].forward(&p, &self.inputs[tower], self.head.all.whole());
                }
                self.towers[tower].backward(&p, &self.inputs[tower], self.head.d_all.whole());
            };
            records.run_in_pieces(device, piece, work, complete)?;
            if sums {
                self.towers[tower].completed().iter().try_for_each(complete)?;
            }
        }
        Ok(())
    }

    fn pass(&self, dropout: StepDropout) -> Pass<'_> {
        Pass { device: self.device, params: &self.params, buffers: &self.buffers, dropout, complete: None }
    }

    /// The batch in pieces that fit the towers.
    fn chunks(&self, batch: &ContrastiveBatch) -> Vec<Chunk> {
        let (q, p) = (batch.queries.samples.len(), batch.passages.samples.len());
        let limit = |texts: usize| self.head.room.chunk.unwrap_or(texts).max(1);
        let first_passage = self.head.room.first_passage() + self.head.own_block(batch.across.is_some());
        let mut chunks = Vec::new();
        let mut cut = |tower: usize, texts: &TextBatch, places: &dyn Fn(usize) -> u32, limit: usize| {
            let n = texts.samples.len();
            for start in (0..n).step_by(limit) {
                let range = start..(start + limit).min(n);
                let places = range.clone().map(places).collect();
                chunks.push(Chunk { tower, texts: texts.part(range), places });
            }
        };
        let of_passage = |i: usize| (first_passage + i) as u32;
        if self.options.untied {
            cut(0, &batch.queries, &|i| i as u32, limit(q));
            cut(1, &batch.passages, &of_passage, limit(p));
        } else {
            let both = batch.queries.joined(&batch.passages);
            cut(0, &both, &|i| if i < q { i as u32 } else { of_passage(i - q) }, limit(q + p));
        }
        chunks
    }
}

impl Trainable for BiEncoder {
    type Batch = ContrastiveBatch;
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

    fn size(batch: &ContrastiveBatch) -> (usize, usize) {
        let sides = [&batch.queries, &batch.passages];
        (sides.map(|texts| texts.sequences()).iter().sum(), sides.map(|texts| texts.tokens()).iter().sum())
    }

    fn parts(&self, l: &Losses) -> Vec<EvalPart> {
        let mut parts = vec![EvalPart {
            name: "contrastive",
            loss_sum: l.contrastive,
            correct: Some(l.correct as u64),
            labels: l.queries as u64,
            weight: l.contrastive_weight,
        }];
        if l.distill_terms > 0 {
            let (loss_sum, labels) = (l.distill, l.distill_terms as u64);
            parts.push(EvalPart { name: "distill", loss_sum, correct: None, labels, weight: 1.0 });
        }
        parts
    }

    fn prepare(&mut self, adamw: &AdamW, lr: f64, t: u64) {
        if self.optimizer.prepare(adamw, lr, t) {
            self.records.clear();
        }
    }

    fn begin(
        &mut self,
        micro: &[ContrastiveBatch],
        dropout: StepDropout,
        gradients: bool,
        update: bool,
    ) -> Result<Losses> {
        let _names = (trace::phase(stages::INPUTS), trace::stage(stages::UPLOADS));
        let team = self.optimizer.team(gradients);
        let mut losses = self.terms(micro)?;
        [losses.queries, losses.distill_terms] = team.totals([losses.queries, losses.distill_terms])?;
        self.head.weigh(&losses);
        dropout.announce(self.device);
        let mut records = std::mem::take(&mut self.records);
        records.run(self.device, Piece::Zero { gradients }, || {
            updates::zero(self.device, &self.results, &self.params, gradients);
        });
        for (i, batch) in micro.iter().enumerate() {
            let sums = i + 1 == micro.len() && self.optimizer.overlaps(gradients);
            self.batch(&mut records, batch, dropout, (gradients, sums))?;
        }
        if team.is_shared() {
            self.optimizer.share(&self.params, &self.results.slice(4..5), update)?;
        } else if update {
            records.run(self.device, Piece::Update, || {
                self.optimizer.update(&self.params, &self.results.slice(4..5));
            });
        }
        self.records = records;
        Ok(losses)
    }

    fn end(&mut self, mut losses: Losses) -> Result<(Losses, f64)> {
        let x: Vec<f64> = self.results.to_vec();
        self.device.check()?;
        [losses.contrastive, losses.correct, losses.distill] = self.optimizer.losses([x[0], x[1], x[2]])?;
        Ok((losses, x[4]))
    }
}
