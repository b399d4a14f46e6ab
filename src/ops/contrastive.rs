//! In-batch-negative contrastive loss (InfoNCE; DPR, arXiv 2004.04906): every passage of the batch is a candidate of every query.
//!
//! `s = q pᵀ / τ`, `lse_b = ln Σ exp s_b`, loss of query b `= lse_b − s_b,target(b)`. Saved: `lse`. Backward of `scale · Σ loss`,
//! from scores computed again: `g = (exp(s − lse) − onehot(target)) · scale / τ`, `dq = g p`, `dp = gᵀ q`.
//!
//! Passages can be hidden from single queries, as duplicates of their own passage must be; the target itself never is.

use crate::device::{Device, Tensor};

/// Sizes, and which passages each query is compared with.
#[derive(Clone, Copy)]
pub struct Shape<'a> {
    /// B.
    pub queries: usize,
    /// P.
    pub passages: usize,
    /// C.
    pub width: usize,
    /// τ.
    pub temperature: f32,
    /// `[B]` u32: each query's own passage.
    pub targets: &'a Tensor,
    /// `[B, ⌈P / 32⌉]` u32, or nothing: bit p of row b is set when passage p is no candidate of query b.
    pub hidden: Option<&'a Tensor>,
}

/// Arguments of [`forward`].
pub struct Forward<'a> {
    /// Sizes and candidates.
    pub shape: Shape<'a>,
    /// `[B, C]`.
    pub q: &'a Tensor,
    /// `[P, C]`.
    pub p: &'a Tensor,
    /// `[B]`, written: loss of each query.
    pub loss: &'a Tensor,
    /// `[B]`, written.
    pub lse: &'a Tensor,
}

/// Loss and log-sum-exp of each query.
pub fn forward(device: Device, a: &Forward<'_>) {
    match device {
        Device::Cpu => super::on_cpu!(a.q, cpu::forward, a),
    }
}

/// Arguments of [`backward`].
pub struct Backward<'a> {
    /// As in the forward.
    pub shape: Shape<'a>,
    /// What every query's loss is weighted with: 1 / queries of the whole optimizer step.
    pub scale: f64,
    /// As in the forward.
    pub q: &'a Tensor,
    /// As in the forward.
    pub p: &'a Tensor,
    /// Saved log-sum-exp.
    pub lse: &'a Tensor,
    /// `[B, C]`, written.
    pub dq: &'a Tensor,
    /// `[P, C]`, written.
    pub dp: &'a Tensor,
}

/// Gradients of queries and passages.
pub fn backward(device: Device, a: &Backward<'_>) {
    match device {
        Device::Cpu => super::on_cpu!(a.q, cpu::backward, a),
    }
}

/// The reference: some queries at a time with all their scores; rows in parallel, no tiling, no online softmax.
mod cpu {
    use super::{Backward, Forward, Shape};
    use crate::device::Output;
    use crate::device::cpu::{Real, Threads, View, gemm, max, scratch, sum1, vectorized};
    use rayon::prelude::*;

    /// Queries whose scores exist at a time.
    const BLOCK: usize = 256;

    impl Shape<'_> {
        /// Scores of the queries from `first` on, hidden ones −∞.
        fn scores<F: Real>(&self, first: usize, q: &[F], p: &[F], s: &mut [F]) {
            let (c, passages) = (self.width, self.passages);
            let (rows, inverse) = (s.len() / passages, F::of(1.0 / f64::from(self.temperature)));
            let (q, p) = (View::rows(&q[first * c..], c), View::rows(p, c).t());
            gemm((rows, passages, c), inverse, q, p, s, passages, Output::Set, Threads::All);
            let Some(hidden) = self.hidden else { return };
            let (hidden, targets, words) = (hidden.read::<u32>(), self.targets.read::<u32>(), passages.div_ceil(32));
            s.par_chunks_exact_mut(passages).enumerate().for_each(|(row, s)| {
                let own = s[targets[first + row] as usize];
                for (s, &bits) in s.chunks_mut(32).zip(&hidden[(first + row) * words..]) {
                    for (bit, s) in s.iter_mut().enumerate() {
                        *s = if bits >> bit & 1 == 1 { F::NEG_INFINITY } else { *s };
                    }
                }
                s[targets[first + row] as usize] = own;
            });
        }

        /// Calls `f(first query, scores)` for every block of queries.
        fn blocks<F: Real>(&self, q: &[F], p: &[F], mut f: impl FnMut(usize, &mut [F])) {
            let block = BLOCK.min(self.queries);
            scratch(block * self.passages, |s: &mut [F]| {
                for first in (0..self.queries).step_by(BLOCK) {
                    let s = &mut s[..block.min(self.queries - first) * self.passages];
                    self.scores(first, q, p, s);
                    f(first, s);
                }
            });
        }
    }

    pub fn forward<F: Real>(a: &Forward<'_>) {
        let (q, p, targets) = (a.q.read::<F>(), a.p.read::<F>(), a.shape.targets.read::<u32>());
        let (mut loss, mut lse) = (a.loss.write::<F>(), a.lse.write::<F>());
        a.shape.blocks(&q, &p, |first, s| {
            let rows = s.par_chunks_exact(a.shape.passages).zip(&targets[first..]);
            rows.zip(loss[first..].par_iter_mut().zip(&mut lse[first..])).for_each(|((s, &own), (loss, lse))| {
                vectorized(|| {
                    let top = max(s);
                    let sum = sum1(
                        s,
                        #[inline(always)]
                        |x| (x - top).exp(),
                    );
                    *lse = top + sum.ln();
                    *loss = (top - s[own as usize]) + sum.ln();
                });
            });
        });
    }

    pub fn backward<F: Real>(a: &Backward<'_>) {
        let Shape { passages, width: c, targets, .. } = a.shape;
        let (q, p, lse, targets) = (a.q.read::<F>(), a.p.read::<F>(), a.lse.read::<F>(), targets.read::<u32>());
        let (mut dq, mut dp) = (a.dq.write::<F>(), a.dp.write::<F>());
        let weight = F::of(a.scale / f64::from(a.shape.temperature));
        a.shape.blocks(&q, &p, |first, g| {
            let rows = g.par_chunks_exact_mut(passages).zip(lse[first..].par_iter().zip(&targets[first..]));
            rows.for_each(|(g, (&lse, &own))| {
                vectorized(|| {
                    for g in g.iter_mut() {
                        *g = (*g - lse).exp();
                    }
                    g[own as usize] = g[own as usize] - F::ONE;
                });
            });
            let rows = g.len() / passages;
            let (g, x, y) = (View::rows(&*g, passages), View::rows(&q[first * c..], c), View::rows(&p, c));
            gemm((rows, c, passages), weight, g, y, &mut dq[first * c..], c, Output::Set, Threads::All);
            let output = if first == 0 { Output::Set } else { Output::Add };
            gemm((passages, c, rows), weight, g.t(), x, &mut dp, c, output, Threads::All);
        });
    }
}
