//! The optimizer's side of a step: moments, norm and AdamW over the flat arenas of the parameters.

use crate::device::{Arena, DType, Device, Tensor};
use crate::graph::params::Params;
use crate::ops::optimizer::{self, AdamW};

/// AdamW and its state.
pub struct Optimizer {
    device: Device,
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
    /// For the parameters `params`.
    pub fn new(device: Device, params: &Params) -> Self {
        let weights = params.weights();
        let arena = || Arena::zeros(device, weights.dtype(), [weights.len()]);
        let schedule = device.zeros(DType::F32, 3);
        Optimizer { device, first: arena(), second: arena(), schedule, adamw: AdamW::default(), lr: 0.0, t: 0 }
    }

    /// The flat first and second moments.
    pub fn moments(&self) -> (&Tensor, &Tensor) {
        (self.first.whole(), self.second.whole())
    }

    /// Makes ready update number `t` (from 1) at rate `lr`. Says whether the constants are others than before: work recorded with them
    /// is then out of date.
    pub fn prepare(&mut self, adamw: &AdamW, lr: f64, t: u64) -> bool {
        let changed = self.adamw != *adamw;
        (self.adamw, self.lr, self.t) = (*adamw, lr, t);
        self.schedule.upload(&adamw.schedule(lr, t));
        changed
    }

    /// `norm[0] = ‖g‖²`, and the update, unless that is not finite.
    pub fn update(&self, params: &Params, norm: &Tensor) {
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
