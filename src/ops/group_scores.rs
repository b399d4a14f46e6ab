//! Scores of each query with its own group of passages, as distillation compares them with a teacher's.
//!
//! `s[b, j] = q_b · p_{b g + j} / τ`. Nothing is saved. Backward, added to what the contrastive loss left there:
//! `dq_b += Σ_j ds[b, j] p_{b g + j} / τ`, `dp_{b g + j} += ds[b, j] q_b / τ`.

use super::Count;
use crate::device::{Device, Tensor};

/// Sizes.
#[derive(Clone, Copy)]
pub struct Shape<'a> {
    /// B.
    pub queries: Count<'a>,
    /// g: passages of a query, at least one.
    pub group: usize,
    /// C.
    pub width: usize,
    /// τ.
    pub temperature: f32,
}

/// Arguments of [`forward`].
pub struct Forward<'a> {
    /// Sizes.
    pub shape: Shape<'a>,
    /// `[B, C]`.
    pub q: &'a Tensor,
    /// `[B g, C]`.
    pub p: &'a Tensor,
    /// `[B, g]`, on the GPU f32, written.
    pub s: &'a Tensor,
}

/// Scores of each query with its passages.
pub fn forward(device: Device, a: &Forward<'_>) {
    match device {
        Device::Cpu => super::on_cpu!(a.q, cpu::forward, a),
        Device::Gpu(gpu) => gpu::forward(gpu, a),
    }
}

/// Arguments of [`backward`].
pub struct Backward<'a> {
    /// As in the forward.
    pub shape: Shape<'a>,
    /// As in the forward.
    pub q: &'a Tensor,
    /// As in the forward.
    pub p: &'a Tensor,
    /// `[B, g]`, on the GPU f32.
    pub ds: &'a Tensor,
    /// `[B, C]`, added to.
    pub dq_acc: &'a Tensor,
    /// `[B g, C]`, added to.
    pub dp_acc: &'a Tensor,
}

/// Gradients of queries and passages.
pub fn backward(device: Device, a: &Backward<'_>) {
    match device {
        Device::Cpu => super::on_cpu!(a.q, cpu::backward, a),
        Device::Gpu(gpu) => gpu::backward(gpu, a),
    }
}

/// The reference: queries in parallel, passages of a query in order.
mod cpu {
    use super::{Backward, Forward, Shape};
    use crate::device::cpu::{Real, sum2, vectorized};
    use rayon::prelude::*;

    impl Shape<'_> {
        fn inverse_temperature<F: Real>(&self) -> F {
            F::of(1.0 / f64::from(self.temperature))
        }
    }

    pub fn forward<F: Real>(a: &Forward<'_>) {
        let Shape { queries, group, width, .. } = a.shape;
        let (q, p, mut s) = (a.q.read::<F>(), a.p.read::<F>(), a.s.write::<F>());
        let inverse = a.shape.inverse_temperature::<F>();
        let passages = p.par_chunks_exact(group * width);
        let queries = q[..queries.rows * width].par_chunks_exact(width);
        s.par_chunks_exact_mut(group).zip(queries.zip(passages)).for_each(|(s, (q, p))| {
            vectorized(|| {
                for (s, p) in s.iter_mut().zip(p.chunks_exact(width)) {
                    *s = sum2(q, p, |q, p| q * p) * inverse;
                }
            });
        });
    }

    pub fn backward<F: Real>(a: &Backward<'_>) {
        let Shape { queries, group, width, .. } = a.shape;
        let (q, p, ds) = (a.q.read::<F>(), a.p.read::<F>(), a.ds.read::<F>());
        let (mut dq, mut dp) = (a.dq_acc.write::<F>(), a.dp_acc.write::<F>());
        let inverse = a.shape.inverse_temperature::<F>();
        let of_queries = dq[..queries.rows * width].par_chunks_exact_mut(width).zip(q.par_chunks_exact(width));
        let of_passages = dp.par_chunks_exact_mut(group * width).zip(p.par_chunks_exact(group * width));
        of_queries.zip(of_passages).zip(ds.par_chunks_exact(group)).for_each(|(((dq, q), (dp, p)), ds)| {
            vectorized(|| {
                for (j, &ds) in ds.iter().enumerate() {
                    let (dp, p) = (&mut dp[j * width..][..width], &p[j * width..][..width]);
                    let weight = ds * inverse;
                    for i in 0..width {
                        dq[i] += weight * p[i];
                        dp[i] += weight * q[i];
                    }
                }
            });
        });
    }
}

/// The launches of `group.cu` for scores.
mod gpu {
    use super::super::gpu::{blocks, launch_as};
    use super::{Backward, Forward};
    use crate::device::gpu::Gpu;
    use crate::device::launch::Shape as Launch;

    pub fn forward(gpu: &Gpu, a: &Forward<'_>) {
        let shape = &a.shape;
        launch_as!(
            gpu,
            a.q,
            Launch::linear(blocks(shape.queries.rows * shape.group, 8), 256),
            GroupScoresForwardF32
                | GroupScoresForwardBf16 {
                    s: a.s.get_mut(),
                    q: a.q.get(),
                    p: a.p.get(),
                    queries: shape.queries.get(),
                    g: shape.group as i32,
                    C: shape.width as i32,
                    inverse_temperature: 1.0 / shape.temperature,
                }
        );
    }

    pub fn backward(gpu: &Gpu, a: &Backward<'_>) {
        let shape = &a.shape;
        let grid = [shape.queries.rows as u32, blocks(shape.width, 256), 1];
        launch_as!(
            gpu,
            a.q,
            Launch { grid, ..Launch::linear(1, 256) },
            GroupScoresBackwardF32
                | GroupScoresBackwardBf16 {
                    dq_acc: a.dq_acc.get_mut(),
                    dp_acc: a.dp_acc.get_mut(),
                    ds: a.ds.get(),
                    q: a.q.get(),
                    p: a.p.get(),
                    queries: shape.queries.get(),
                    g: shape.group as i32,
                    C: shape.width as i32,
                    inverse_temperature: 1.0 / shape.temperature,
                }
        );
    }
}
