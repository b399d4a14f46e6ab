//! Losses of groups of scores: each query has g of them, the first its positive's, and perhaps as many of a teacher.
//!
//! With scores s (divided by τ) and a teacher's t of one query, S = softmax(s) and T = softmax(t), both over the group:
//!
//! - cross entropy with target 0, of a cross-encoder (RocketQA, arXiv 2010.08191): `lse(s) − s_0`, slope `S_j − [j = 0]`;
//! - Kullback-Leibler divergence from a teacher: `Σ_j T_j (ln T_j − ln S_j)`, 0 where `T_j = 0`, slope `S_j − T_j`;
//! - MarginMSE (arXiv 2010.02666): `Σ_j m_j²` with `m_j = (s_0 − s_j) − (t_0 − t_j)`, slope `−2 m_j`, of the first `2 Σ_j m_j`.
//!
//! Gradient: `ds = slope · scale / τ`. Means are left to the scale: over B g scores for the divergence, B (g − 1) for MarginMSE.

use super::Count;
use super::cross_entropy::Scale;
use crate::device::{DType, Device, Tensor};

/// Sizes, and where scores lie.
#[derive(Clone, Copy)]
pub struct Shape<'a> {
    /// B.
    pub queries: Count<'a>,
    /// g: scores of a query, at least one.
    pub group: usize,
    /// Elements from score to score: 1, or the width of a matrix whose first column they are.
    pub stride: usize,
    /// τ.
    pub temperature: f32,
}

/// Which loss. A teacher's scores are `[B, g]`, on the GPU f32.
#[derive(Clone, Copy)]
pub enum Kind<'a> {
    /// `lse(s) − s_0`.
    CrossEntropy,
    /// `Σ_j T_j (ln T_j − ln S_j)`.
    Kl {
        /// A score of −∞ is a passage of no weight.
        teacher: &'a Tensor,
    },
    /// `Σ_j ((s_0 − s_j) − (t_0 − t_j))²`.
    MarginMse {
        /// All finite.
        teacher: &'a Tensor,
    },
}

/// Gradient that the op also computes.
pub struct Gradient<'a> {
    /// Weight of a query's loss.
    pub scale: Scale<'a>,
    /// `[B, g, stride]`, on the GPU f32, written: 0 beside the scores.
    pub ds: &'a Tensor,
}

/// Arguments of [`run`].
pub struct GroupLoss<'a> {
    /// Sizes.
    pub shape: Shape<'a>,
    /// Which loss.
    pub kind: Kind<'a>,
    /// `[B, g, stride]`, on the GPU f32; those with index 0 in the last are the scores.
    pub scores: &'a Tensor,
    /// `[B]`, on the GPU f32, written: loss of each query.
    pub loss: &'a Tensor,
    /// `[B]` u32, written: 1 where the first score is the largest.
    pub correct: &'a Tensor,
    /// `[2]` f64, added to: sum of the losses, number of correct queries.
    pub sums_acc: &'a Tensor,
    /// Nothing: losses only.
    pub gradient: Option<Gradient<'a>>,
}

/// Losses, accuracy and, if asked for, the gradient.
pub fn run(device: Device, a: &GroupLoss<'_>) {
    debug_assert_eq!(a.sums_acc.dtype(), DType::F64);
    match device {
        Device::Cpu => super::on_cpu!(a.scores, cpu::run, a),
        Device::Gpu(gpu) => gpu::run(gpu, a),
    }
}

/// The reference: one query after the other, since a score is little work beside the passage that it is of.
mod cpu {
    use super::{GroupLoss, Kind, Shape};
    use crate::device::cpu::{Real, max, scratch, sum1, sum2, vectorized};

    /// `x` becomes ln softmax(x).
    #[inline(always)]
    fn log_softmax<F: Real>(x: &mut [F]) {
        let top = max(x);
        let sum = sum1(
            x,
            #[inline(always)]
            |x| (x - top).exp(),
        );
        let log = sum.ln();
        for x in x {
            *x = (*x - top) - log;
        }
    }

    /// Loss of one query; its scores, and its teacher's, become slopes, and anything.
    #[inline(always)]
    fn query<F: Real>(kind: Kind<'_>, s: &mut [F], t: &mut [F]) -> F {
        match kind {
            Kind::CrossEntropy => {
                log_softmax(s);
                let loss = -s[0];
                for s in s.iter_mut() {
                    *s = s.exp();
                }
                s[0] = s[0] - F::ONE;
                loss
            }
            Kind::Kl { .. } => {
                log_softmax(s);
                log_softmax(t);
                let loss = sum2(
                    s,
                    t,
                    #[inline(always)]
                    |s, t| {
                        let weight = t.exp();
                        if weight == F::ZERO { F::ZERO } else { weight * (t - s) }
                    },
                );
                for (s, &mut t) in s.iter_mut().zip(t) {
                    *s = s.exp() - t.exp();
                }
                loss
            }
            Kind::MarginMse { .. } => {
                let (s0, t0) = (s[0], t[0]);
                for (s, &mut t) in s.iter_mut().zip(t) {
                    *s = (s0 - *s) - (t0 - t);
                }
                let loss = sum1(s, |m| m * m);
                let sum = sum1(s, |m| m);
                for s in s.iter_mut() {
                    *s *= F::of(-2.0);
                }
                s[0] = F::of(2.0) * sum;
                loss
            }
        }
    }

    pub fn run<F: Real>(a: &GroupLoss<'_>) {
        let Shape { queries, group, stride, temperature } = a.shape;
        let inverse = F::of(1.0 / f64::from(temperature));
        let (scores, mut sums) = (a.scores.read::<F>(), a.sums_acc.write::<f64>());
        let (mut losses, mut correct) = (a.loss.write::<F>(), a.correct.write::<u32>());
        let teacher = match a.kind {
            Kind::CrossEntropy => None,
            Kind::Kl { teacher } | Kind::MarginMse { teacher } => Some(teacher.read::<F>()),
        };
        let mut gradient =
            a.gradient.as_ref().map(|g| (g.ds.write::<F>(), F::of(g.scale.value / f64::from(temperature))));
        scratch(2 * group, |buffer: &mut [F]| {
            let (s, t) = buffer.split_at_mut(group);
            for b in 0..queries.rows {
                let all = b * group * stride..(b + 1) * group * stride;
                for (s, x) in s.iter_mut().zip(scores[all.clone()].chunks_exact(stride)) {
                    *s = x[0] * inverse;
                }
                if let Some(teacher) = &teacher {
                    t.copy_from_slice(&teacher[b * group..(b + 1) * group]);
                }
                let own = s[0];
                correct[b] = u32::from(own >= max(s));
                let loss = vectorized(|| query(a.kind, s, t));
                losses[b] = loss;
                sums[0] += loss.f64();
                sums[1] += f64::from(correct[b]);
                let Some((ds, weight)) = &mut gradient else { continue };
                for (ds, &slope) in ds[all].chunks_exact_mut(stride).zip(&*s) {
                    ds.fill(F::ZERO);
                    ds[0] = slope * *weight;
                }
            }
        });
    }
}

/// The launches of `group.cu` for losses; their sums are those of `cross_entropy.cu`.
mod gpu {
    use super::super::gpu::{blocks, launch};
    use super::{GroupLoss, Kind};
    use crate::device::gpu::Gpu;
    use crate::device::launch::{ConstPtr, MutPtr, Shape};

    pub fn run(gpu: &Gpu, a: &GroupLoss<'_>) {
        let queries = a.shape.queries.get();
        let (kind, teacher) = match a.kind {
            Kind::CrossEntropy => (0, ConstPtr::null()),
            Kind::Kl { teacher } => (1, teacher.get()),
            Kind::MarginMse { teacher } => (2, teacher.get()),
        };
        let (ds, scale) = a.gradient.as_ref().map_or((MutPtr::null(), ConstPtr::null()), |g| {
            let scale = g.scale.on_device.map(|scale| scale.get());
            (g.ds.get_mut(), scale.unwrap_or_else(|| panic!("the loss of groups needs its scale in device memory")))
        });
        launch!(
            gpu,
            Shape::linear(blocks(a.shape.queries.rows, 8), 256),
            GroupLoss {
                loss: a.loss.get_mut(),
                correct: a.correct.get_mut(),
                ds,
                scores: a.scores.get(),
                teacher,
                queries,
                scale,
                kind,
                g: a.shape.group as i32,
                stride: a.shape.stride as i32,
                inverse_temperature: 1.0 / a.shape.temperature,
            }
        );
        let (sums_acc, row_loss, row_correct) = (a.sums_acc.get_mut(), a.loss.get(), a.correct.get());
        launch!(gpu, Shape::linear(1, 512), CrossEntropySums { sums_acc, row_loss, row_correct, rows: queries });
    }
}
