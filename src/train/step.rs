//! One training step, top to bottom. Read this first.
//!
//! [`Pretrainer::step`]: every micro-batch goes through `forward_backward` (upload → encoder → losses and head → decoder → backward),
//! gradients add up in the flat arena; then the gradient norm, AdamW, the report. Losses are means over the labels of the whole
//! step, so that a step of several micro-batches equals one of a single large batch.
//!
//! On a GPU nothing in this is waited for but the reading of the losses at the end, and before that the next step's batch is prepared
//! and uploaded. The work of a micro-batch, and that of the optimizer behind the last one, is queued as it comes the first time,
//! recorded the second time, and replayed from then on.
//!
//! Ranks that share a step begin to sum gradients while the last backward still computes others: [`super::buckets`].

use crate::data::batch::PretrainBatch;
use crate::device::{DType, Device, Tensor, trace};
use crate::error::Result;
use crate::graph::activations::{Activations, Plan};
use crate::graph::dupmae::{self, BagHead};
use crate::graph::encoder::Encoder;
use crate::graph::extent::Bounds;
use crate::graph::inputs::Inputs;
use crate::graph::mlm::{LossSums, MlmHead};
use crate::graph::params::{Entries, Params, Table};
use crate::graph::records::Records;
use crate::graph::retromae::EnhancedDecoder;
use crate::graph::{Capacity, Dims, Pass, StepDropout, check_gpu, stages};
use crate::model::config::BertConfig;
use crate::ops::gather;
use crate::ops::optimizer::AdamW;
use crate::train::EvalPart;
use crate::train::collective::Team;
use crate::train::updates::{self, Optimizer, Scales, Trainable, one_of};

/// What is pre-trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objective {
    /// Encoder MLM and enhanced decoding (arXiv 2205.12035).
    RetroMae,
    /// The same with a normalised decoder query, and a bag-of-words loss (arXiv 2211.08769).
    DupMae,
    /// Encoder MLM alone: the baseline.
    Mlm,
}

impl Objective {
    /// Whether there is an enhanced decoder.
    pub fn has_decoder(self) -> bool {
        self != Objective::Mlm
    }
}

/// Weight of DupMAE's bag-of-words loss beside the others, as published.
pub const BOW_LOSS_WEIGHT: f64 = 0.1;

/// Sums over labels of one or more batches.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Losses {
    /// Of the encoder's masked tokens.
    pub encoder: LossSums,
    /// Encoder labels.
    pub encoder_labels: usize,
    /// Of the decoder's tokens.
    pub decoder: LossSums,
    /// Decoder labels.
    pub decoder_labels: usize,
    /// Sum of the texts' bag-of-words losses.
    pub bow: f64,
    /// Texts with such a loss: all of DupMAE's.
    pub bow_texts: usize,
    /// Weight of their mean.
    pub bow_weight: f64,
}

impl Losses {
    /// Mean encoder loss (0 without labels).
    pub fn encoder_loss(&self) -> f64 {
        self.encoder.loss / self.encoder_labels.max(1) as f64
    }

    /// Mean decoder loss (0 without labels).
    pub fn decoder_loss(&self) -> f64 {
        self.decoder.loss / self.decoder_labels.max(1) as f64
    }

    /// Mean bag-of-words loss (0 without texts).
    pub fn bow_loss(&self) -> f64 {
        self.bow / self.bow_texts.max(1) as f64
    }

    /// Their weighted sum.
    pub fn total(&self) -> f64 {
        self.encoder_loss() + self.decoder_loss() + self.bow_weight * self.bow_loss()
    }

    /// With the labels and texts of all ranks.
    fn of_all(self, team: &Team) -> Result<Self> {
        let [encoder_labels, decoder_labels, bow_texts] =
            team.totals([self.encoder_labels, self.decoder_labels, self.bow_texts])?;
        Ok(Losses { encoder_labels, decoder_labels, bow_texts, ..self })
    }

    /// The labels and texts of `micro` under an objective, no losses yet.
    fn labels(micro: &[PretrainBatch], objective: Objective, bow_weight: f64) -> Self {
        let decoder = |b: &PretrainBatch| b.decoder.as_ref().map_or(0, |d| d.label_ids.len());
        let decoder_labels = if objective.has_decoder() { micro.iter().map(decoder).sum() } else { 0 };
        let encoder_labels = micro.iter().map(|b| b.encoder_label_ids.len()).sum();
        let (bow_texts, bow_weight) = match objective {
            Objective::DupMae => (micro.iter().map(PretrainBatch::sequences).sum(), bow_weight),
            Objective::RetroMae | Objective::Mlm => (0, 0.0),
        };
        Losses { encoder_labels, decoder_labels, bow_texts, bow_weight, ..Losses::default() }
    }
}

/// What a step finds out, in f64.
struct Results {
    all: Tensor,
    /// `[2]` each: losses and correct rows of the encoder's and of the decoder's labels.
    encoder: Tensor,
    decoder: Tensor,
    /// `[2]`: losses of the bags of words, and nothing.
    bags: Tensor,
    /// `[1]` ‖g‖².
    norm: Tensor,
}

impl Results {
    fn new(device: Device) -> Self {
        let all = device.zeros(DType::F64, 7);
        let [encoder, decoder, bags] = [0, 2, 4].map(|at| all.slice(at..at + 2));
        Results { encoder, decoder, bags, norm: all.slice(6..7), all }
    }

    /// Waits for them.
    fn read(&self, device: Device) -> Result<[f64; 7]> {
        let x: Vec<f64> = self.all.end_read();
        device.check()?;
        Ok(std::array::from_fn(|i| x[i]))
    }
}

/// What makes the work of a micro-batch equal to that of another.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Segment {
    bounds: Bounds,
    /// The first of its step: gradients and losses start from zero.
    first: bool,
    /// Gradients are asked for.
    gradients: bool,
    /// The last of its step: the optimizer follows.
    update: bool,
    /// The last of a step whose gradients ranks begin to sum as soon as they are complete.
    sums: bool,
    /// Thresholds of both dropouts.
    dropout: [u32; 2],
}

/// A model in pre-training: parameters, buffers, optimizer.
pub struct Pretrainer {
    device: Device,
    config: BertConfig,
    objective: Objective,
    params: Params,
    buffers: Activations,
    encoder: Encoder,
    head: MlmHead,
    bags: Option<BagHead>,
    decoder: Option<EnhancedDecoder>,
    /// What is not the encoder's.
    others: Entries,
    inputs: Inputs,
    optimizer: Optimizer,
    /// Of the encoder's labels, of the decoder's and of the texts' bags of words.
    scales: Scales<3>,
    bow_loss_weight: f64,
    results: Results,
    records: Records<Segment>,
}

/// The sizes of a run before anything is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Parameters.
    pub parameters: usize,
    /// Bytes of weights, gradients and moments.
    pub parameter_bytes: usize,
    /// Bytes of activations and gradient buffers.
    pub activation_bytes: usize,
}

impl Footprint {
    /// Of a graph with these tables.
    pub fn of(table: &Table, plan: &Plan, storage: DType) -> Self {
        let parameters = table.parameters();
        // Weights, gradients and two moments, and the rounded copy of the weights.
        let copy = if storage == storage.wide() { 0 } else { storage.size() };
        let each = 4 * storage.wide().size() + copy;
        Footprint { parameters, parameter_bytes: parameters * each, activation_bytes: plan.bytes(storage) }
    }
}

/// The parts of the graph, before allocation.
struct Parts {
    table: Table,
    plan: Plan,
    encoder: Encoder,
    head: MlmHead,
    bags: Option<BagHead>,
    decoder: Option<EnhancedDecoder>,
    others: Entries,
}

impl Parts {
    fn new((device, storage): (Device, DType), config: &BertConfig, objective: Objective, capacity: Capacity) -> Self {
        let (mut table, mut plan) = (Table::default(), Plan::default());
        let dims = Dims::new(config);
        let needed = match objective {
            Objective::DupMae => capacity.tokens,
            Objective::RetroMae | Objective::Mlm => capacity.encoder_labels + capacity.sequences,
        };
        let encoder = Encoder::new(&mut table, &mut plan, config, capacity, needed);
        let (word, on) = (encoder.embeddings.word, (device, storage));
        let (tokens, t, p) = (capacity.tokens, &mut table, &mut plan);
        let (head, bags, decoder) = match objective {
            Objective::Mlm => (MlmHead::new(on, t, p, config, word, capacity.encoder_labels), None, None),
            Objective::RetroMae => {
                let head = MlmHead::new(on, t, p, config, word, tokens);
                (head, None, Some(EnhancedDecoder::new(t, p, &encoder, dims, capacity)))
            }
            Objective::DupMae => {
                let head = MlmHead::of_sequences(on, t, p, config, word, (tokens, capacity.length));
                let bags = BagHead::new(device, p, dims, capacity, head.chunk());
                (head, Some(bags), Some(EnhancedDecoder::of_embedded_queries(t, p, &encoder, dims, capacity)))
            }
        };
        Parts { others: table.since(encoder.end()), table, plan, encoder, head, bags, decoder }
    }
}

impl Pretrainer {
    /// Memory that [`Self::new`] would take on `device` with `storage`.
    pub fn footprint(
        device: Device,
        config: &BertConfig,
        objective: Objective,
        capacity: Capacity,
        storage: DType,
    ) -> Footprint {
        let parts = Parts::new((device, storage), config, objective, capacity);
        Footprint::of(&parts.table, &parts.plan, storage)
    }

    /// Allocates everything for batches up to `capacity`; weights are zero until [`Params::load`]. `storage` is F32 or F64 on the CPU,
    /// F32 or BF16 on a GPU.
    ///
    /// # Errors
    /// Not enough memory, or a model whose sizes the kernels do not have.
    pub fn new(
        device: Device,
        config: &BertConfig,
        objective: Objective,
        capacity: Capacity,
        storage: DType,
    ) -> Result<Self> {
        if device.is_gpu() {
            check_gpu(config)?;
        }
        let capacity = Capacity { length: capacity.length.min(config.max_position_embeddings), ..capacity };
        let parts = Parts::new((device, storage), config, objective, capacity);
        let params = parts.table.allocate(device, storage);
        let (types, decoder) = (config.type_vocab_size, objective.has_decoder());
        let inputs = Inputs::new(device, capacity, config.vocab_size, types, decoder);
        let completed = [vec![parts.others.clone()], parts.encoder.completed()].concat();
        let model = Pretrainer {
            device,
            config: config.clone(),
            objective,
            buffers: parts.plan.allocate(device, storage),
            encoder: parts.encoder,
            inputs: match parts.bags {
                Some(_) => inputs.of_whole_sequences(parts.head.chunk()),
                None => inputs,
            },
            head: parts.head,
            bags: parts.bags,
            decoder: parts.decoder,
            others: parts.others,
            optimizer: Optimizer::new(device, &params, &completed),
            scales: Scales::new(device),
            bow_loss_weight: BOW_LOSS_WEIGHT,
            results: Results::new(device),
            records: Records::default(),
            params,
        };
        device.check().map(|()| model)
    }

    /// The same with another weight of the bag-of-words loss than [`BOW_LOSS_WEIGHT`].
    pub fn with_bow_loss_weight(self, bow_loss_weight: f64) -> Self {
        Pretrainer { bow_loss_weight, ..self }
    }

    /// All work between the upload of a micro-batch and that of the next.
    fn segment(&self, segment: Segment, dropout: StepDropout, complete: &dyn Fn(&Entries)) {
        if segment.first {
            updates::zero(self.device, &self.results.all, &self.params, segment.gradients);
        }
        self.forward_backward(dropout, segment.gradients, segment.sums.then_some(complete));
        if segment.update {
            self.optimizer.update(&self.params, &self.results.norm);
        }
    }

    /// Losses of the batch in `inputs` and, if asked for, its gradients.
    fn forward_backward(&self, dropout: StepDropout, with_gradients: bool, complete: Option<&dyn Fn(&Entries)>) {
        let inputs = &self.inputs;
        let p = Pass { device: self.device, params: &self.params, buffers: &self.buffers, dropout, complete };
        let c = self.config.hidden_size;
        let gradients = self.encoder.gradients;
        let (d_rows, d_hidden, d_wide) = (p.b(gradients.rows), p.b(gradients.hidden), p.b(gradients.wide));

        let forward = trace::phase(stages::FORWARD);
        self.encoder.forward(&p, &inputs.tokens, &inputs.needed);
        drop(forward);
        let rows = p.b(self.encoder.output());

        // Encoder losses, and their gradient of the rows.
        let loss = (trace::phase(stages::LOSS), trace::stage(stages::MLM_HEAD));
        match (&self.bags, &inputs.head_chunks) {
            (Some(bags), Some(chunks)) => {
                let sums = dupmae::Sums { labels: &self.results.encoder, bags: &self.results.bags };
                let gradient = with_gradients.then(|| dupmae::Gradient {
                    label_scale: self.scales.get(0),
                    bag_scale: self.scales.get(2),
                    dx: d_rows,
                });
                bags.loss(&p, &self.head, (inputs, chunks), rows, &sums, gradient.as_ref());
            }
            _ => self.encoder_loss(&p, rows, d_rows, with_gradients),
        }
        drop(loss);

        // Decoder loss and backward, which gives the gradient of the [CLS] rows.
        if let (Some(graph), Some(decoder_inputs)) = (&self.decoder, &inputs.decoder) {
            let rows_decoded = decoder_inputs.rows.count.get();
            let forward = trace::phase(stages::FORWARD);
            graph.forward(&p, inputs, decoder_inputs, rows);
            drop(forward);
            let loss = (trace::phase(stages::LOSS), trace::stage(stages::LM_HEAD));
            let gradient = with_gradients.then(|| (self.scales.get(1), p.b(graph.output_gradient())));
            let (h, labels, sums) = (p.b(graph.output()), &decoder_inputs.labels, &self.results.decoder);
            self.head.loss(&p, rows_decoded, h, labels, sums, gradient);
            drop(loss);
            if with_gradients && rows_decoded.rows > 0 {
                let _names = (trace::phase(stages::BACKWARD), trace::stage(stages::ROWS));
                graph.backward(&p, inputs, decoder_inputs, (d_hidden, d_wide), gradients.block);
                let sequences = inputs.tokens.sequences.get();
                let dc = graph.sentence_gradient(&p, sequences);
                gather::scatter_add(p.device, dc, &inputs.cls_rows, sequences, c, d_rows);
            }
        }

        if with_gradients {
            let _backward = trace::phase(stages::BACKWARD);
            p.complete(&self.others);
            self.encoder.backward(&p, &inputs.tokens, &inputs.needed);
        }
    }

    /// Loss of the labelled rows among `rows`, and its gradient in `d_rows`.
    fn encoder_loss(&self, p: &Pass<'_>, rows: &Tensor, d_rows: &Tensor, with_gradients: bool) {
        let (inputs, scratch, c) = (&self.inputs, self.encoder.gradients.block, self.config.hidden_size);
        let (labels, needed) = (inputs.label_count.get(), inputs.needed.count.get());
        // The labelled rows are gathered into a gradient buffer that is free until the backward.
        let labelled = p.b(scratch.dropped);
        gather::gather(p.device, rows, &inputs.label_rows, labels, c, labelled);
        let d_labelled = p.b(scratch.context);
        let gradient = with_gradients.then(|| (self.scales.get(0), d_labelled));
        self.head.loss(p, labels, labelled, &inputs.labels, &self.results.encoder, gradient);
        if with_gradients {
            gather::zero(p.device, d_rows, needed.rows * c);
            gather::scatter_add(p.device, d_labelled, &inputs.label_rows, labels, c, d_rows);
        }
    }

    /// What is trained.
    pub fn objective(&self) -> Objective {
        self.objective
    }
}

impl Trainable for Pretrainer {
    type Batch = PretrainBatch;
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

    fn size(batch: &PretrainBatch) -> (usize, usize) {
        (batch.sequences(), batch.tokens())
    }

    fn parts(&self, l: &Losses) -> Vec<EvalPart> {
        let part = |name, sums: &LossSums, labels: usize| EvalPart {
            name,
            loss_sum: sums.loss,
            correct: Some(sums.correct as u64),
            labels: labels as u64,
            weight: 1.0,
        };
        let mut parts = vec![part("encoder", &l.encoder, l.encoder_labels)];
        if self.objective.has_decoder() {
            parts.push(part("decoder", &l.decoder, l.decoder_labels));
        }
        if self.objective == Objective::DupMae {
            let (loss_sum, labels, weight) = (l.bow, l.bow_texts as u64, l.bow_weight);
            parts.push(EvalPart { name: "bow", loss_sum, correct: None, labels, weight });
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
        micro: &[PretrainBatch],
        dropout: StepDropout,
        gradients: bool,
        update: bool,
    ) -> Result<Losses> {
        let _names = (trace::phase(stages::INPUTS), trace::stage(stages::UPLOADS));
        let team = self.optimizer.team(gradients);
        let labels = Losses::labels(micro, self.objective, self.bow_loss_weight).of_all(&team)?;
        let [encoder, decoder, bow] = [labels.encoder_labels, labels.decoder_labels, labels.bow_texts].map(one_of);
        self.scales.set([encoder, decoder, labels.bow_weight * bow]);
        dropout.announce(self.device);
        if micro.is_empty() {
            // The last step's texts were too few for every rank.
            updates::zero(self.device, &self.results.all, &self.params, gradients);
        }
        let mut records = std::mem::take(&mut self.records);
        for (i, batch) in micro.iter().enumerate() {
            let last = i + 1 == micro.len();
            let segment = Segment {
                bounds: self.inputs.set(batch),
                first: i == 0,
                gradients,
                update: update && last && !team.is_shared(),
                sums: last && self.optimizer.overlaps(gradients),
                dropout: dropout.thresholds(),
            };
            let work = |complete: &dyn Fn(&Entries)| self.segment(segment, dropout, complete);
            let complete = |entries: &Entries| self.optimizer.complete(&self.params, entries);
            records.run_in_pieces(self.device, segment, work, complete)?;
        }
        self.records = records;
        if team.is_shared() {
            self.optimizer.share(&self.params, &self.results.norm, update)?;
        }
        self.results.all.begin_read();
        Ok(labels)
    }

    fn end(&mut self, labels: Losses) -> Result<(Losses, f64)> {
        let [e, ec, d, dc, bow, _, norm] = self.results.read(self.device)?;
        let [e, ec, d, dc, bow] = self.optimizer.losses([e, ec, d, dc, bow])?;
        let sums = |loss, correct| LossSums { loss, correct };
        Ok((Losses { encoder: sums(e, ec), decoder: sums(d, dc), bow, ..labels }, norm))
    }

    fn make_ready(&mut self, next: &PretrainBatch) {
        self.inputs.make_ready(next);
    }
}
