//! One training step, top to bottom. Read this first.
//!
//! [`Pretrainer::step`]: every micro-batch goes through `forward_backward` (upload → encoder → losses and head → decoder → backward),
//! gradients add up in the flat arena; then the gradient norm, AdamW, the report. Losses are means over the labels of the whole
//! step, so that a step of several micro-batches equals one of a single large batch.

use crate::data::batch::PretrainBatch;
use crate::device::{Arena, DType, Device, Tensor};
use crate::graph::activations::{Activations, Plan};
use crate::graph::encoder::Encoder;
use crate::graph::inputs::Inputs;
use crate::graph::mlm::{LossSums, MlmHead};
use crate::graph::params::{Params, Table};
use crate::graph::retromae::EnhancedDecoder;
use crate::graph::{Capacity, Dims, Pass, StepDropout};
use crate::model::config::BertConfig;
use crate::ops::gather;
use crate::ops::optimizer::{self, AdamW};
use crate::rng::Dropout;

/// What is pre-trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objective {
    /// Encoder MLM and enhanced decoding (arXiv 2205.12035).
    RetroMae,
    /// Encoder MLM alone: the baseline.
    Mlm,
}

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

    /// Their sum.
    pub fn total(&self) -> f64 {
        self.encoder_loss() + self.decoder_loss()
    }

    fn add(&mut self, other: &Losses) {
        self.encoder.loss += other.encoder.loss;
        self.encoder.correct += other.encoder.correct;
        self.encoder_labels += other.encoder_labels;
        self.decoder.loss += other.decoder.loss;
        self.decoder.correct += other.decoder.correct;
        self.decoder_labels += other.decoder_labels;
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Sums over the step's labels.
    pub losses: Losses,
    /// ‖g‖ before clipping.
    pub grad_norm: f64,
    /// The norm was not finite and nothing was changed.
    pub skipped: bool,
}

/// What the loss of a label is weighted with: 1 / labels of the optimizer step.
#[derive(Clone, Copy, Debug)]
struct Scales {
    encoder: f64,
    decoder: f64,
}

impl Scales {
    fn of(micro: &[PretrainBatch]) -> Self {
        let decoder = |b: &PretrainBatch| b.decoder.as_ref().map_or(0, |d| d.label_ids.len());
        let inverse = |n: usize| 1.0 / n.max(1) as f64;
        Scales {
            encoder: inverse(micro.iter().map(|b| b.encoder_label_ids.len()).sum()),
            decoder: inverse(micro.iter().map(decoder).sum()),
        }
    }
}

/// Optimizer state.
struct Moments {
    first: Arena,
    second: Arena,
    norm: Tensor,
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
    decoder: Option<EnhancedDecoder>,
    inputs: Inputs,
    moments: Moments,
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

/// The parts of the graph, before allocation.
struct Parts {
    table: Table,
    plan: Plan,
    encoder: Encoder,
    head: MlmHead,
    decoder: Option<EnhancedDecoder>,
}

impl Parts {
    fn new(config: &BertConfig, objective: Objective, capacity: Capacity) -> Self {
        let (mut table, mut plan) = (Table::default(), Plan::default());
        let with_decoder = objective == Objective::RetroMae;
        let needed = capacity.encoder_labels + capacity.sequences;
        let encoder = Encoder::new(&mut table, &mut plan, config, capacity, needed);
        let rows = if with_decoder { capacity.tokens } else { capacity.encoder_labels };
        let head = MlmHead::new(&mut table, &mut plan, config, encoder.embeddings.word, rows);
        let decoder =
            with_decoder.then(|| EnhancedDecoder::new(&mut table, &mut plan, &encoder, Dims::new(config), capacity));
        Parts { table, plan, encoder, head, decoder }
    }
}

impl Pretrainer {
    /// Memory that [`Self::new`] would take, for f32.
    pub fn footprint(config: &BertConfig, objective: Objective, capacity: Capacity) -> Footprint {
        let parts = Parts::new(config, objective, capacity);
        let parameters = parts.table.parameters();
        Footprint { parameters, parameter_bytes: parameters * 16, activation_bytes: parts.plan.elements() * 4 }
    }

    /// Allocates everything for batches up to `capacity`; weights are zero until [`Params::load`].
    pub fn new(device: Device, config: &BertConfig, objective: Objective, capacity: Capacity, dtype: DType) -> Self {
        let parts = Parts::new(config, objective, capacity);
        let params = parts.table.allocate(dtype);
        let arena = || Arena::zeros(dtype, [params.weights().len()]);
        Pretrainer {
            device,
            config: config.clone(),
            objective,
            buffers: parts.plan.allocate(dtype),
            encoder: parts.encoder,
            head: parts.head,
            decoder: parts.decoder,
            inputs: Inputs::new(capacity, config.vocab_size, config.type_vocab_size, objective == Objective::RetroMae),
            moments: Moments { first: arena(), second: arena(), norm: Tensor::zeros(DType::F64, 1) },
            params,
        }
    }

    /// Weights and gradients.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The model's configuration.
    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// The flat first and second moments.
    pub fn moments(&self) -> (&Tensor, &Tensor) {
        (self.moments.first.whole(), self.moments.second.whole())
    }

    /// One optimizer step: gradients of all micro-batches, clipping, AdamW number `t` (from 1) at learning rate `lr`. Dropout is that
    /// of (`seed`, `t`).
    pub fn step(&mut self, micro: &[PretrainBatch], adamw: &AdamW, lr: f64, t: u64, seed: u64) -> StepOutcome {
        let dropout = StepDropout {
            hidden: Dropout::new(seed, t, self.config.hidden_dropout_prob),
            attention: Dropout::new(seed, t, self.config.attention_probs_dropout_prob),
        };
        let losses = self.gradients(micro, dropout);
        let (w, g, norm) = (self.params.weights(), self.params.gradients(), &self.moments.norm);
        optimizer::squared_norm(self.device, g, norm);
        let (m, v) = (self.moments.first.whole(), self.moments.second.whole());
        let decayed = self.params.decayed;
        let update = optimizer::Update { adamw: *adamw, lr, t, w, g, m, v, decayed, squared_norm: norm };
        optimizer::update(self.device, &update);
        let grad_norm = norm.read::<f64>()[0].sqrt();
        StepOutcome { losses, grad_norm, skipped: !grad_norm.is_finite() }
    }

    /// Gradients of the mean loss over all labels of `micro`, in the gradient arena.
    pub fn gradients(&mut self, micro: &[PretrainBatch], dropout: StepDropout) -> Losses {
        gather::zero(self.device, self.params.gradients(), self.params.gradients().len());
        let scales = Scales::of(micro);
        let mut losses = Losses::default();
        for batch in micro {
            losses.add(&self.forward_backward(batch, dropout, Some(scales)));
        }
        losses
    }

    /// Losses without dropout and without gradients.
    pub fn evaluate(&mut self, batch: &PretrainBatch) -> Losses {
        self.forward_backward(batch, StepDropout::OFF, None)
    }

    fn forward_backward(&mut self, batch: &PretrainBatch, dropout: StepDropout, scales: Option<Scales>) -> Losses {
        self.inputs.set(batch);
        let inputs = &self.inputs;
        let p = Pass { device: self.device, params: &self.params, buffers: &self.buffers, dropout };
        let c = self.config.hidden_size;
        let gradients = self.encoder.gradients;
        let (d_rows, d_hidden, d_wide) = (p.b(gradients.rows), p.b(gradients.hidden), p.b(gradients.wide));

        self.encoder.forward(&p, &inputs.tokens, &inputs.needed);
        let rows = p.b(self.encoder.output());

        // Encoder loss. The labelled rows are gathered into a gradient buffer that is free until the backward.
        let labelled = p.b(gradients.block.dropped);
        gather::gather(p.device, rows, &inputs.label_rows, inputs.labels_count, c, labelled);
        let d_labelled = p.b(gradients.block.context);
        let gradient = scales.map(|s| (s.encoder, d_labelled));
        let encoder = self.head.loss(&p, inputs.labels_count, labelled, &inputs.labels, gradient);
        if scales.is_some() {
            gather::zero(p.device, d_rows, inputs.needed.count * c);
            gather::scatter_add(p.device, d_labelled, &inputs.label_rows, inputs.labels_count, c, d_rows);
        }

        // Decoder loss and backward, which gives the gradient of the [CLS] rows.
        let mut decoder = LossSums::default();
        let mut decoder_labels = 0;
        if let (Some(graph), Some(decoder_inputs)) = (&self.decoder, &inputs.decoder) {
            decoder_labels = decoder_inputs.rows.count;
            graph.forward(&p, inputs, decoder_inputs, rows);
            let gradient = scales.map(|s| (s.decoder, p.b(graph.output_gradient())));
            decoder = self.head.loss(&p, decoder_labels, p.b(graph.output()), &decoder_inputs.labels, gradient);
            if scales.is_some() && decoder_labels > 0 {
                graph.backward(&p, inputs, decoder_inputs, (d_hidden, d_wide), gradients.block);
                let (dc, sequences) = (p.b(graph.sentence_gradient()), inputs.tokens.sequences);
                gather::scatter_add(p.device, dc, &inputs.cls_rows, sequences, c, d_rows);
            }
        }

        if scales.is_some() {
            self.encoder.backward(&p, &inputs.tokens, &inputs.needed);
        }
        Losses { encoder, encoder_labels: inputs.labels_count, decoder, decoder_labels }
    }

    /// What is trained.
    pub fn objective(&self) -> Objective {
        self.objective
    }
}
