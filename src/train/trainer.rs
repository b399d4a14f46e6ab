//! [`Engine`] around a [`Trainable`] model: the optimizer's constants, the seed of dropout, and a dev set.

use crate::device::{Device, Tensor};
use crate::error::{Error, Result};
use crate::eval::metrics::Metric;
use crate::ops::optimizer::AdamW;
use crate::train::collective::Team;
use crate::train::settings::Settings;
use crate::train::updates::Trainable;
use crate::train::{Arena, Arenas, Engine, EvalPart, EvalReport, ParamInfo, StepReport};

/// Judges a model on a dev set.
pub trait Judge<M> {
    /// The figures of the model as it is; none when `go_on` said no on the way.
    ///
    /// # Errors
    /// Data that cannot be read, or a failure of the GPU.
    fn judge(&mut self, model: &mut M, go_on: &dyn Fn() -> bool) -> Result<Vec<(Metric, f64)>>;
}

/// A model in training.
pub struct Trainer<M> {
    model: M,
    adamw: AdamW,
    seed: u64,
    judge: Option<Box<dyn Judge<M>>>,
}

impl<M: Trainable> Trainer<M> {
    /// `model`, its weights loaded, under `settings`.
    pub fn new(model: M, settings: &Settings, judge: Option<Box<dyn Judge<M>>>) -> Self {
        let adamw = AdamW {
            beta1: settings.beta1,
            beta2: settings.beta2,
            eps: settings.epsilon,
            weight_decay: settings.weight_decay,
            max_norm: if settings.clip > 0.0 { settings.clip } else { f64::INFINITY },
        };
        Trainer { model, adamw, seed: settings.seed, judge }
    }

    fn arena(&self, which: Arena) -> &Tensor {
        match which {
            Arena::Weights => self.model.params().weights(),
            Arena::Moment1 => self.model.optimizer().moments().0,
            Arena::Moment2 => self.model.optimizer().moments().1,
        }
    }

    /// Where it is trained.
    pub fn device(&self) -> Device {
        self.model.device()
    }

    /// Shares its steps with the ranks of `team` from here on.
    pub fn join(&mut self, team: Team) {
        self.model.optimizer_mut().join(team);
    }
}

impl<M: Trainable> Engine for Trainer<M> {
    type Batch = M::Batch;

    fn step(&mut self, micro: &[M::Batch], step: u64, lr: f32) -> Result<StepReport> {
        self.step_before(micro, None, step, lr)
    }

    fn step_before(&mut self, micro: &[M::Batch], next: Option<&M::Batch>, step: u64, lr: f32) -> Result<StepReport> {
        let done = self.model.step_before(micro, next, &self.adamw, f64::from(lr), (step + 1, self.seed))?;
        let parts = self.model.parts(&done.losses);
        let sizes = micro.iter().map(M::size).fold([0; 2], |sum, (texts, tokens)| [sum[0] + texts, sum[1] + tokens]);
        let [sequences, tokens] = self.model.optimizer().team(true).totals(sizes)?;
        Ok(StepReport {
            loss: parts.iter().map(|part| part.weight * part.loss()).sum(),
            accuracy: parts.iter().filter_map(|part| Some((part.name, part.accuracy()?))).collect(),
            labels: parts.iter().map(|part| part.labels).sum(),
            parts: parts.iter().map(|part| (part.name, part.loss())).collect(),
            grad_norm: done.grad_norm,
            skipped: done.skipped,
            culprits: if done.skipped { self.model.optimizer().culprits().to_vec() } else { Vec::new() },
            tokens: tokens as u64,
            sequences: sequences as u64,
        })
    }

    fn evaluate(&mut self, batch: &M::Batch) -> Result<EvalReport> {
        let losses = self.model.evaluate(batch)?;
        let parts: Vec<EvalPart> = self.model.parts(&losses);
        Ok(EvalReport { parts })
    }

    fn device_name(&self) -> String {
        self.model.device().name()
    }

    fn judge(&mut self, go_on: &dyn Fn() -> bool) -> Result<Vec<(Metric, f64)>> {
        match &mut self.judge {
            Some(judge) => judge.judge(&mut self.model, go_on),
            None => Ok(Vec::new()),
        }
    }
}

impl<M: Trainable> Arenas for Trainer<M> {
    fn parameters(&self) -> Vec<ParamInfo> {
        let parts = self.model.params().parts().iter();
        parts
            .map(|p| ParamInfo { name: p.name.clone(), shape: p.shape.clone(), offset: p.offset, decay: p.decay })
            .collect()
    }

    fn read_arena(&self, which: Arena, out: &mut Vec<f32>) -> Result<()> {
        *out = self.arena(which).to_vec();
        self.model.device().check()
    }

    fn write_arena(&mut self, which: Arena, data: &[f32]) -> Result<()> {
        let arena = self.arena(which);
        if arena.len() != data.len() {
            let cause = format!("{} elements for an arena of {}", data.len(), arena.len());
            return Err(Error::refused(cause).remedy("report this as a defect"));
        }
        arena.upload(data);
        if which == Arena::Weights {
            self.model.params().refresh();
        }
        self.model.device().check()
    }
}
