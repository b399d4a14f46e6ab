//! The learning rate as a pure function of the step.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Decay {
    /// In a straight line to 0 at the last step.
    #[default]
    Linear,
    /// Along half a cosine to 0 at the last step.
    Cosine,
    /// Not at all.
    Constant,
}

impl Decay {
    /// For a sentence about the learning rate.
    pub fn words(self) -> &'static str {
        match self {
            Decay::Linear => "falling in a straight line to 0",
            Decay::Cosine => "falling along a cosine to 0",
            Decay::Constant => "constant from there on",
        }
    }
}

/// Linear warm-up from 0 to `peak`, then [`Decay`]. Equal to the schedules of the `transformers` library at every step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Highest learning rate.
    pub peak: f64,
    /// Steps of warm-up; the first step runs at learning rate 0 when there is any.
    pub warmup: u64,
    /// Steps of the whole run.
    pub total: u64,
    /// What follows the warm-up.
    pub decay: Decay,
}

impl Schedule {
    /// Learning rate of step `step`, counted from 0.
    pub fn lr(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step as f64 / self.warmup as f64);
        }
        let rest = self.total.saturating_sub(self.warmup).max(1) as f64;
        match self.decay {
            Decay::Linear => self.peak * (self.total.saturating_sub(step) as f64 / rest),
            Decay::Cosine => {
                let progress = ((step - self.warmup) as f64 / rest).min(1.0);
                self.peak * (0.5 * (1.0 + (std::f64::consts::PI * progress).cos()))
            }
            Decay::Constant => self.peak,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Schedule = Schedule { peak: 3e-4, warmup: 5, total: 25, decay: Decay::Linear };

    #[test]
    fn ends_and_turning_points() {
        assert_eq!(BASE.lr(0), 0.0);
        assert_eq!(BASE.lr(5), 3e-4);
        assert_eq!(BASE.lr(25), 0.0);
        assert_eq!(BASE.lr(30), 0.0);
        let cosine = Schedule { decay: Decay::Cosine, ..BASE };
        assert!((cosine.lr(15) - 1.5e-4).abs() < 1e-18 && cosine.lr(25) < 1e-18);
        let constant = Schedule { decay: Decay::Constant, ..BASE };
        assert_eq!((constant.lr(4), constant.lr(1000)), (3e-4 * 0.8, 3e-4));
    }

    #[test]
    fn degenerate_runs_have_finite_rates() {
        for decay in [Decay::Linear, Decay::Cosine, Decay::Constant] {
            for (warmup, total) in [(0, 0), (0, 1), (1, 1), (5, 3)] {
                let schedule = Schedule { peak: 1.0, warmup, total, decay };
                for step in 0..7 {
                    let lr = schedule.lr(step);
                    assert!((0.0..=1.0).contains(&lr), "{decay:?} {warmup} {total} {step}: {lr}");
                }
            }
        }
        assert_eq!(Schedule { peak: 1.0, warmup: 0, total: 10, decay: Decay::Linear }.lr(0), 1.0);
    }
}
