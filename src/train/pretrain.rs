//! [`Engine`] of the pre-training objectives: [`Pretrainer`] with the optimizer's constants and the seed of dropout.

use crate::data::batch::PretrainBatch;
use crate::device::Tensor;
use crate::error::{Error, Result};
use crate::ops::optimizer::AdamW;
use crate::train::settings::{Objective, Settings};
use crate::train::step::{self, Losses, Pretrainer};
use crate::train::updates::Trainable;
use crate::train::{Arena, Engine, EvalPart, EvalReport, ParamInfo, StepReport};

/// A model in pre-training.
pub struct PretrainEngine {
    model: Pretrainer,
    adamw: AdamW,
    seed: u64,
}

impl From<Objective> for step::Objective {
    fn from(objective: Objective) -> Self {
        match objective {
            Objective::Retromae => step::Objective::RetroMae,
            Objective::Mlm => step::Objective::Mlm,
        }
    }
}

impl PretrainEngine {
    /// `model`, its weights loaded, under `settings`.
    pub fn new(model: Pretrainer, settings: &Settings) -> Self {
        let adamw = AdamW {
            beta1: settings.beta1,
            beta2: settings.beta2,
            eps: settings.epsilon,
            weight_decay: settings.weight_decay,
            max_norm: if settings.clip > 0.0 { settings.clip } else { f64::INFINITY },
        };
        PretrainEngine { model, adamw, seed: settings.seed }
    }

    fn arena(&self, which: Arena) -> &Tensor {
        match which {
            Arena::Weights => self.model.params().weights(),
            Arena::Moment1 => self.model.moments().0,
            Arena::Moment2 => self.model.moments().1,
        }
    }

    fn with_decoder(&self) -> bool {
        self.model.objective() == step::Objective::RetroMae
    }
}

impl Engine for PretrainEngine {
    fn step(&mut self, micro: &[PretrainBatch], step: u64, lr: f32) -> Result<StepReport> {
        let done = self.model.step(micro, &self.adamw, f64::from(lr), step + 1, self.seed)?;
        let losses: Losses = done.losses;
        let accuracy = |correct: u64, labels: usize| correct as f64 / labels.max(1) as f64;
        let mut parts = vec![("encoder", losses.encoder_loss())];
        let mut right = vec![("encoder", accuracy(losses.encoder.correct as u64, losses.encoder_labels))];
        if self.with_decoder() {
            parts.push(("decoder", losses.decoder_loss()));
            right.push(("decoder", accuracy(losses.decoder.correct as u64, losses.decoder_labels)));
        }
        Ok(StepReport {
            loss: losses.total(),
            parts,
            accuracy: right,
            grad_norm: done.grad_norm,
            skipped: done.skipped,
            tokens: micro.iter().map(|b| b.tokens() as u64).sum(),
            sequences: micro.iter().map(|b| b.sequences() as u64).sum(),
            labels: (losses.encoder_labels + losses.decoder_labels) as u64,
        })
    }

    fn evaluate(&mut self, batch: &PretrainBatch) -> Result<EvalReport> {
        let l = self.model.evaluate(batch)?;
        let part = |name, loss_sum, correct, labels: usize| EvalPart { name, loss_sum, correct, labels: labels as u64 };
        let mut parts = vec![part("encoder", l.encoder.loss, l.encoder.correct as u64, l.encoder_labels)];
        if self.with_decoder() {
            parts.push(part("decoder", l.decoder.loss, l.decoder.correct as u64, l.decoder_labels));
        }
        Ok(EvalReport { parts })
    }

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
