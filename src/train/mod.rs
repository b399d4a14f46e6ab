//! A training run around the step: what happens before the first step, between steps, and when something goes wrong.
//!
//! [`step`] is what one step computes; this module and its siblings decide when to take one, log it, evaluate, save and stop.
//! They know the model only through [`Engine`] and the data only through [`Batches`], so the reliability tests run the same loop
//! around a toy of a few numbers, thousands of times.
//!
//! - [`updates`]: what steps share: the trait, the optimizer's state
//! - [`step`], [`biencoder`], [`cross_encoder`]: the steps of pre-training and of fine-tuning
//! - [`plan`]: what a run will do; [`run`]: the loop; [`workspace`]: the output folder, the lock, and what to resume from
//! - [`target`]: where, and in which arithmetic; [`settings`]: every knob with its default; [`schedule`]: the learning rate
//! - [`batches`], [`pair_batches`]: [`Batches`] over a corpus, and over queries and their passages
//! - [`checkpoint`], [`store`]: one checkpoint, and the folder of them
//! - [`trainer`]: [`Engine`] around a step; [`parts`]: model and data of the settings, brought together; [`dev`]: the dev set
//! - [`origin`]: what a run keeps of its beginning; [`export`]: a checkpoint made a model that others load
//! - [`metrics`], [`tfevents`], [`progress`]: what a run tells, to a file, to TensorBoard, to a person
//! - [`room`]: whether a run fits into memory, and what would; `zero`: why a loss is exactly 0
//! - [`collective`]: many processes that share every step; [`buckets`]: which gradients they sum together, and when
//! - [`signals`]: orderly stops; the file operations below all of this are [`crate::files`]

use std::time::Duration;

use crate::error::Result;
use crate::eval::metrics::Metric;

pub mod batches;
pub mod biencoder;
mod biencoder_loss;
pub mod buckets;
pub mod checkpoint;
pub mod collective;
pub mod contract;
pub mod cross_encoder;
pub mod dev;
pub mod export;
mod manifest;
pub mod metrics;
pub mod origin;
pub mod pair_batches;
pub mod parts;
pub mod plan;
pub mod progress;
pub mod room;
pub mod run;
pub mod schedule;
pub mod settings;
pub mod signals;
pub mod step;
pub mod store;
pub mod target;
pub mod tfevents;
pub mod trainer;
pub mod updates;
pub mod workspace;
mod zero;

/// The whole state of a model in training, as checkpoints hold it.
pub trait Arenas {
    /// All parameters in the order of the arenas.
    fn parameters(&self) -> Vec<ParamInfo>;

    /// Replaces `out` by a copy of an arena.
    fn read_arena(&self, which: Arena, out: &mut Vec<f32>) -> Result<()>;

    /// Overwrites an arena; `data` is as long as [`Arenas::read_arena`] gives.
    fn write_arena(&mut self, which: Arena, data: &[f32]) -> Result<()>;
}

/// A model with its optimizer, as the run sees it.
pub trait Engine: Arenas {
    /// A micro-batch.
    type Batch;

    /// One optimizer step over all micro-batches, gradients normalised over the labels of the whole step. `step` counts from 0
    /// and keys dropout; the bias correction of AdamW is that of update `step + 1`, so the engine holds no counter of its own.
    /// Never changes any bit of state when the gradient is not finite.
    fn step(&mut self, micro: &[Self::Batch], step: u64, lr: f32) -> Result<StepReport>;

    /// [`Self::step`] before one whose first micro-batch will be `next`, if that is known: an engine may make it ready meanwhile. What
    /// comes out is the same, also when another step follows.
    fn step_before(
        &mut self,
        micro: &[Self::Batch],
        _next: Option<&Self::Batch>,
        step: u64,
        lr: f32,
    ) -> Result<StepReport> {
        self.step(micro, step, lr)
    }

    /// Sums of the loss without dropout and without update.
    fn evaluate(&mut self, batch: &Self::Batch) -> Result<EvalReport>;

    /// What computes, by the name its maker gave it; empty where that says nothing.
    fn device_name(&self) -> String {
        String::new()
    }

    /// Figures on the dev set; none without one, or when `go_on` said no on the way.
    fn judge(&mut self, _go_on: &dyn Fn() -> bool) -> Result<Vec<(Metric, f64)>> {
        Ok(Vec::new())
    }
}

/// Which of the engine's flat fp32 arrays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arena {
    /// Master weights.
    Weights,
    /// First moment of AdamW.
    Moment1,
    /// Second moment of AdamW.
    Moment2,
}

/// One parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamInfo {
    /// Canonical checkpoint name.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// First element in every arena.
    pub offset: usize,
    /// Whether weight decay applies.
    pub decay: bool,
}

impl ParamInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// What one step did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Loss that was differentiated.
    pub loss: f64,
    /// Its parts by name: `encoder`, `decoder`, `contrastive`, …
    pub parts: Vec<(&'static str, f64)>,
    /// Fraction of labels predicted, by the same names.
    pub accuracy: Vec<(&'static str, f64)>,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// The gradient was not finite and nothing was updated.
    pub skipped: bool,
    /// The ranks that it came from, where several share the step.
    pub culprits: Vec<usize>,
    /// Tokens of the step.
    pub tokens: u64,
    /// Texts of the step.
    pub sequences: u64,
    /// Labels of the step.
    pub labels: u64,
}

/// Sums over one batch of the held-out texts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EvalReport {
    /// One entry for each part of the loss.
    pub parts: Vec<EvalPart>,
}

/// Sums of one part of the loss.
#[derive(Clone, Debug, PartialEq)]
pub struct EvalPart {
    /// `encoder`, `decoder`, `contrastive`, …
    pub name: &'static str,
    /// Sum of the loss over the labels.
    pub loss_sum: f64,
    /// Labels predicted, where the part predicts something.
    pub correct: Option<u64>,
    /// Labels, or whatever the terms of the sum are.
    pub labels: u64,
    /// What the mean is weighted with in the loss.
    pub weight: f64,
}

impl EvalPart {
    /// Mean loss; 0 without labels.
    pub fn loss(&self) -> f64 {
        self.loss_sum / self.labels.max(1) as f64
    }

    /// Fraction of the labels predicted.
    pub fn accuracy(&self) -> Option<f64> {
        self.correct.map(|correct| correct as f64 / self.labels.max(1) as f64)
    }
}

/// The batches of a run, in their order, from any point.
pub trait Batches {
    /// A micro-batch.
    type Batch;

    /// The micro-batches of the next step.
    fn next(&mut self) -> Result<Vec<Self::Batch>>;

    /// The first micro-batch that [`Batches::next`] will give, if it is there already. Waits for nothing and changes no cursor.
    fn peek(&mut self) -> Option<&Self::Batch> {
        None
    }

    /// Samples of all steps handed out so far, counted over epochs: the whole state of the order.
    fn cursor(&self) -> u64;

    /// Goes to a cursor, in constant time.
    fn seek(&mut self, cursor: u64) -> Result<()>;

    /// Texts, or queries, of one epoch, held-out ones left out.
    fn texts(&self) -> u64;

    /// Steps that `epochs` epochs take.
    fn steps_of(&self, epochs: f64) -> Result<u64>;

    /// What is held out in batches, always the same in the same order.
    fn held_out(&self) -> Box<dyn Iterator<Item = Result<Self::Batch>> + '_>;

    /// How a person finds the texts of a batch: by their ids, or by their numbers in the data.
    fn names(&self, batch: &Self::Batch) -> Vec<String>;

    /// Time that [`Batches::next`] spent waiting for data, in all.
    fn waited(&self) -> Duration {
        Duration::ZERO
    }
}

/// What a run is made of, for the plan, the header and the check that a resumed run is the same one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct About {
    /// The model in words: layers, width, where the weights come from.
    pub model: String,
    /// Differs when configuration or initial weights differ, wherever they lie.
    pub model_fingerprint: String,
    /// Parameters that are trained.
    pub parameters: u64,
    /// The data in words.
    pub data: String,
    /// Differs when texts, order or tokenizer differ, wherever they lie.
    pub data_fingerprint: String,
    /// Texts that are trained on.
    pub texts: u64,
    /// Tokens of these texts.
    pub tokens: u64,
    /// Texts held out.
    pub held_out: u64,
    /// The device in words.
    pub device: String,
    /// Precision in words, after `auto` is resolved; part of what makes two runs the same.
    pub precision: String,
    /// Memory the run will need, in bytes.
    pub memory: u64,
}
