//! What every objective's step does around its forward and backward: dropout of the step, sums over ranks, clipping, AdamW over the
//! flat arenas. When ranks sum which gradients is written in [`super::buckets`].

use std::cell::RefCell;
use std::ops::Range;

use crate::device::{Arena, DType, Device, Tensor, trace};
use crate::error::Result;
use crate::graph::params::{Entries, Params};
use crate::graph::{StepDropout, stages};
use crate::model::config::BertConfig;
use crate::ops::cross_entropy::Scale;
use crate::ops::gather;
use crate::ops::optimizer::{self, AdamW};
use crate::rng::Dropout;
use crate::train::EvalPart;
use crate::train::buckets::Buckets;
use crate::train::collective::Team;

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome<L> {
    /// Sums over the step's micro-batches.
    pub losses: L,
    /// ‖g‖ before clipping.
    pub grad_norm: f64,
    /// The norm was not finite and nothing was changed.
    pub skipped: bool,
}

/// A model in training.
pub trait Trainable {
    /// A micro-batch.
    type Batch;
    /// Sums over micro-batches.
    type Losses;

    /// The encoder's configuration.
    fn config(&self) -> &BertConfig;

    /// Where it is trained.
    fn device(&self) -> Device;

    /// Weights and gradients.
    fn params(&self) -> &Params;

    /// AdamW and its state.
    fn optimizer(&self) -> &Optimizer;

    /// The same, to change.
    fn optimizer_mut(&mut self) -> &mut Optimizer;

    /// Sequences and tokens of a micro-batch.
    fn size(batch: &Self::Batch) -> (usize, usize);

    /// The losses part by part.
    fn parts(&self, losses: &Self::Losses) -> Vec<EvalPart>;

    /// Makes ready update number `t` (from 1) at learning rate `lr`.
    fn prepare(&mut self, adamw: &AdamW, lr: f64, t: u64);

    /// Queues the work of all micro-batches together, with gradients of their mean and the prepared update if asked for. Gives the
    /// losses without their sums. With gradients the mean is that over all ranks that share the step; every rank must call this, perhaps
    /// without a micro-batch.
    ///
    /// # Errors
    /// Batches that do not fit, or a failure of the GPU or of a rank.
    fn begin(
        &mut self,
        micro: &[Self::Batch],
        dropout: StepDropout,
        gradients: bool,
        update: bool,
    ) -> Result<Self::Losses>;

    /// Waits for what was begun: its losses, and ‖g‖², of all ranks that share the step.
    ///
    /// # Errors
    /// A failure of the GPU.
    fn end(&mut self, losses: Self::Losses) -> Result<(Self::Losses, f64)>;

    /// Prepares and uploads what is probably the first micro-batch of the next step while a GPU computes.
    fn make_ready(&mut self, _next: &Self::Batch) {}

    /// [`Self::begin`] and [`Self::end`].
    ///
    /// # Errors
    /// As for both.
    fn compute(
        &mut self,
        micro: &[Self::Batch],
        dropout: StepDropout,
        gradients: bool,
        update: bool,
    ) -> Result<(Self::Losses, f64)> {
        let losses = self.begin(micro, dropout, gradients, update)?;
        self.end(losses)
    }

    /// One optimizer step: gradients of all micro-batches, clipping, AdamW number `t` (from 1) at learning rate `lr`. Dropout is that
    /// of (`seed`, `t`).
    ///
    /// # Errors
    /// A failure of the GPU, or of a rank. The step is then lost.
    fn step(
        &mut self,
        micro: &[Self::Batch],
        adamw: &AdamW,
        lr: f64,
        t: u64,
        seed: u64,
    ) -> Result<StepOutcome<Self::Losses>> {
        self.step_before(micro, None, adamw, lr, (t, seed))
    }

    /// [`Self::step`] before one whose first micro-batch will be `next`, if that is known: it is made ready meanwhile.
    ///
    /// # Errors
    /// As for [`Self::step`].
    fn step_before(
        &mut self,
        micro: &[Self::Batch],
        next: Option<&Self::Batch>,
        adamw: &AdamW,
        lr: f64,
        (t, seed): (u64, u64),
    ) -> Result<StepOutcome<Self::Losses>> {
        let config = self.config();
        let dropout = StepDropout {
            hidden: Dropout::new(seed, t, config.hidden_dropout_prob),
            attention: Dropout::new(seed, t, config.attention_probs_dropout_prob),
        };
        self.prepare(adamw, lr, t);
        let losses = self.begin(micro, dropout, true, true)?;
        if let Some(next) = next {
            self.make_ready(next);
        }
        let (losses, squared_norm) = self.end(losses)?;
        let grad_norm = squared_norm.sqrt();
        Ok(StepOutcome { losses, grad_norm, skipped: !grad_norm.is_finite() })
    }

    /// Gradients of the mean loss of `micro`, in the gradient arena.
    ///
    /// # Errors
    /// A failure of the GPU.
    fn gradients(&mut self, micro: &[Self::Batch], dropout: StepDropout) -> Result<Self::Losses> {
        Ok(self.compute(micro, dropout, true, false)?.0)
    }

    /// Losses without dropout and without gradients.
    ///
    /// # Errors
    /// A failure of the GPU.
    fn evaluate(&mut self, batch: &Self::Batch) -> Result<Self::Losses> {
        Ok(self.compute(std::slice::from_ref(batch), StepDropout::OFF, false, false)?.0)
    }
}

/// What a term of each of `N` losses is weighted with, here and on the device.
pub struct Scales<const N: usize> {
    values: [f64; N],
    all: Tensor,
    /// `[1]` f32 each.
    parts: [Tensor; N],
}

impl<const N: usize> Scales<N> {
    /// Zero yet.
    pub fn new(device: Device) -> Self {
        let all = device.zeros(DType::F32, N);
        Scales { values: [0.0; N], parts: std::array::from_fn(|i| all.slice(i..i + 1)), all }
    }

    /// For the coming work.
    pub fn set(&mut self, values: [f64; N]) {
        self.values = values;
        self.all.upload(&values.map(|x| x as f32));
    }

    /// Of one loss.
    pub fn get(&self, part: usize) -> Scale<'_> {
        Scale { value: self.values[part], on_device: Some(&self.parts[part]) }
    }
}

/// The weight of a term in a mean of `n`; 1 where there is none.
pub fn one_of(n: usize) -> f64 {
    1.0 / n.max(1) as f64
}

/// The start of a step: results and, if asked for, gradients are zero.
pub fn zero(device: Device, results: &Tensor, params: &Params, gradients: bool) {
    let _names = (trace::phase(stages::UPDATE), trace::stage(stages::OPTIMIZER));
    gather::zero(device, results, results.len());
    if gradients {
        gather::zero(device, params.gradients(), params.gradients().len());
    }
}

/// AdamW and its state.
pub struct Optimizer {
    device: Device,
    team: Team,
    /// The work that was begun last is shared.
    shared: bool,
    buckets: RefCell<Buckets>,
    /// ‖g‖² of this rank's own gradients of each bucket.
    own_norms: Tensor,
    /// Ranks whose own losses or gradients were not finite in the last step.
    culprits: Vec<usize>,
    first: Arena,
    second: Arena,
    /// `[3]`, see [`AdamW::schedule`].
    schedule: Tensor,
    /// The constants, and rate and number of the coming update.
    adamw: AdamW,
    lr: f64,
    t: u64,
}

impl Optimizer {
    /// For the parameters `params`, whose gradients the backward completes in the order `completed`.
    pub fn new(device: Device, params: &Params, completed: &[Entries]) -> Self {
        let weights = params.weights();
        let buckets = Buckets::new(params, completed);
        let arena = || Arena::zeros(device, weights.dtype(), [weights.len()]);
        let schedule = device.zeros(DType::F32, 3);
        Optimizer {
            device,
            team: Team::default(),
            shared: false,
            own_norms: device.zeros(DType::F64, buckets.len()),
            buckets: RefCell::new(buckets),
            culprits: Vec::new(),
            first: arena(),
            second: arena(),
            schedule,
            adamw: AdamW::default(),
            lr: 0.0,
            t: 0,
        }
    }

    /// Steps are shared with the ranks of `team` from here on.
    pub fn join(&mut self, team: Team) {
        self.team = team;
    }

    /// The ranks that share work with gradients; without, every rank is alone.
    pub fn team(&self, gradients: bool) -> Team {
        if gradients { self.team.clone() } else { Team::default() }
    }

    /// Cuts the gradients into buckets of at least `bytes` and not [`super::buckets::BYTES`], to test with small models and to measure.
    pub fn cut(&mut self, bytes: usize) {
        let buckets = self.buckets.get_mut();
        buckets.cut(bytes);
        self.own_norms = self.device.zeros(DType::F64, buckets.len());
    }

    /// What ranks sum together, in this order: ranges of the flat gradients.
    pub fn buckets(&self) -> Vec<Range<usize>> {
        self.buckets.borrow().ranges()
    }

    /// Whether the last backward of a step is to say which gradients are complete, by [`Self::complete`].
    pub fn overlaps(&self, gradients: bool) -> bool {
        gradients && self.team.is_shared() && self.team.overlaps()
    }

    /// The step adds nothing more to the gradients of these entries: begins the sums over ranks of the buckets that are complete now.
    ///
    /// # Errors
    /// A failure of the GPU, or of a rank.
    pub fn complete(&self, params: &Params, entries: &Entries) -> Result<()> {
        let mut buckets = self.buckets.borrow_mut();
        buckets.complete(entries);
        while let Some((i, range)) = buckets.next_complete() {
            let gradients = params.gradients().slice(range);
            optimizer::squared_norm(self.device, &gradients, &self.own_norms.slice(i..i + 1));
            self.team.begin_all_reduce(&gradients)?;
        }
        Ok(())
    }

    /// The end of a step that ranks share: all gradients become the sums over all ranks; then the update, if asked for, as in
    /// [`Self::update`].
    ///
    /// # Errors
    /// A failure of the GPU, or of a rank.
    pub fn share(&mut self, params: &Params, norm: &Tensor, update: bool) -> Result<()> {
        self.complete(params, &(0..params.entries()))?;
        self.team.finish()?;
        self.buckets.get_mut().restart();
        self.shared = true;
        if update {
            self.update(params, norm);
        }
        Ok(())
    }

    /// The sums over all ranks of a step's losses; of work that was not shared, its own. Ranks whose own, or whose own gradients, are not
    /// finite are kept.
    ///
    /// # Errors
    /// A failure of the GPU, or of a rank.
    pub fn losses<const N: usize>(&mut self, own: [f64; N]) -> Result<[f64; N]> {
        if !std::mem::take(&mut self.shared) {
            return Ok(own);
        }
        let norm = self.own_norms.to_vec::<f64>().iter().sum();
        self.device.check()?;
        let (sums, culprits) = self.team.sums(own, norm)?;
        self.culprits = culprits;
        Ok(sums)
    }

    /// Ranks whose own losses or gradients were not finite in the last shared step.
    pub fn culprits(&self) -> &[usize] {
        &self.culprits
    }

    /// The flat first and second moments.
    pub fn moments(&self) -> (&Tensor, &Tensor) {
        (self.first.whole(), self.second.whole())
    }

    /// Makes ready update number `t` (from 1) at rate `lr`. Says whether the constants are others than before: work recorded with them
    /// is then out of date.
    pub fn prepare(&mut self, adamw: &AdamW, lr: f64, t: u64) -> bool {
        let _names = (trace::phase(stages::INPUTS), trace::stage(stages::UPLOADS));
        let changed = self.adamw != *adamw;
        (self.adamw, self.lr, self.t) = (*adamw, lr, t);
        self.schedule.upload(&adamw.schedule(lr, t));
        changed
    }

    /// `norm[0] = ‖g‖²`, and the update, unless that is not finite.
    pub fn update(&self, params: &Params, norm: &Tensor) {
        let _names = (trace::phase(stages::UPDATE), trace::stage(stages::OPTIMIZER));
        let g = params.gradients();
        optimizer::squared_norm(self.device, g, norm);
        let update = optimizer::Update {
            adamw: self.adamw,
            lr: self.lr,
            t: self.t,
            schedule: Some(&self.schedule),
            w: params.weights(),
            copy: params.copies(),
            g,
            m: self.first.whole(),
            v: self.second.whole(),
            decayed: params.decayed,
            squared_norm: norm,
        };
        optimizer::update(self.device, &update);
    }
}
