//! Dropout + residual + LayerNorm (Ba et al., arXiv 1607.06450), the block after every sub-layer of BERT.
//!
//! Forward, per row of width C: `z = dropout(x) + r`, `y = γ ∘ (z − μ)·ρ + β` with `ρ = 1/√(σ² + ε)`.
//! `z` replaces `x`; `z`, `μ` and `ρ` are what is saved. Statistics are computed in two passes.
//!
//! Backward: with `g = dy ∘ γ`, `x̂ = (z − μ)ρ`: `dz = ρ (g − mean(g) − x̂ mean(g ∘ x̂))`, `dr = dz`, `dx = dropout(dz)`,
//! `dγ += Σ dy ∘ x̂`, `dβ += Σ dy`.

use super::{Count, RowNames, SiteDropout};
use crate::device::{Device, Tensor};

/// Sizes and ε.
#[derive(Clone, Copy)]
pub struct Shape<'a> {
    /// Rows.
    pub rows: Count<'a>,
    /// C.
    pub width: usize,
    /// ε.
    pub eps: f32,
}

/// Arguments of [`forward`].
pub struct Forward<'a> {
    /// Sizes.
    pub shape: Shape<'a>,
    /// `[rows, C]`: x in, z out.
    pub x: &'a Tensor,
    /// `[rows, C]`, or nothing (the MLM head has no residual).
    pub residual: Option<&'a Tensor>,
    /// Dropout of x and the names of the rows, or nothing.
    pub dropout: Option<(SiteDropout, RowNames<'a>)>,
    /// `[C]`.
    pub gamma: &'a Tensor,
    /// `[C]`.
    pub beta: &'a Tensor,
    /// `[rows, C]`, written.
    pub y: &'a Tensor,
    /// `[rows]` μ, written.
    pub mean: &'a Tensor,
    /// `[rows]` ρ, written.
    pub rstd: &'a Tensor,
}

/// `y = LN(dropout(x) + residual)`; leaves the sum in `x`.
pub fn forward(device: Device, a: &Forward<'_>) {
    match device {
        Device::Cpu => super::on_cpu!(a.x, cpu::forward, a),
        Device::Gpu(gpu) => gpu::forward(gpu, a),
    }
}

/// Arguments of [`backward`].
pub struct Backward<'a> {
    /// Sizes.
    pub shape: Shape<'a>,
    /// `[rows, C]` saved sum.
    pub z: &'a Tensor,
    /// `[rows]` saved μ.
    pub mean: &'a Tensor,
    /// `[rows]` saved ρ.
    pub rstd: &'a Tensor,
    /// `[C]`.
    pub gamma: &'a Tensor,
    /// `[rows, C]`: dy in, dz out, which is also the gradient of the residual.
    pub dy: &'a Tensor,
    /// Dropout of the forward, and `[rows, C]` for dx, written; nothing when dx = dz suffices.
    pub dropout: Option<(SiteDropout, RowNames<'a>, &'a Tensor)>,
    /// `[C]`, added to.
    pub dgamma_acc: &'a Tensor,
    /// `[C]`, added to.
    pub dbeta_acc: &'a Tensor,
}

/// Gradients; `dz` replaces `dy`.
pub fn backward(device: Device, a: &Backward<'_>) {
    match device {
        Device::Cpu => super::on_cpu!(a.z, cpu::backward, a),
        Device::Gpu(gpu) => gpu::backward(gpu, a),
    }
}

/// The reference: rows in parallel; parameter gradients from partial sums of fixed blocks of rows, added in order.
pub(super) mod cpu {
    use super::{Backward, Forward, RowNames, SiteDropout};
    use crate::device::Read;
    use crate::device::cpu::{Real, sum1, sum2, vectorized};
    use rayon::prelude::*;

    /// Rows whose parameter gradients are summed before they are added to those of other blocks.
    pub const BLOCK: usize = 64;

    /// Borrowed row names, and the dropout they are for.
    pub struct Drop<'a> {
        site: SiteDropout,
        samples: Read<'a, u64>,
        sequence: Read<'a, u32>,
        position: Read<'a, u32>,
    }

    impl<'a> Drop<'a> {
        pub fn new(site: SiteDropout, names: &RowNames<'a>) -> Option<Self> {
            let (samples, sequence) = (names.samples.read::<u64>(), names.sequence.read::<u32>());
            site.mask.is_on().then(|| Drop { site, samples, sequence, position: names.position.read::<u32>() })
        }

        /// `to[e] = f(from[e] · scale if kept else 0, to[e])` for row number `row`.
        #[inline(always)]
        pub fn row<F: Real>(&self, row: usize, from: &[F], to: &mut [F], f: impl Fn(F, F) -> F) {
            let sample = self.samples[self.sequence[row] as usize];
            let scale = F::of(self.site.mask.scale());
            let n = to.len();
            let from = &from[..n];
            self.site.mask.each(self.site.site, sample, self.position[row], 0, n, |e, keep| {
                to[e] = f(if keep { from[e] * scale } else { F::ZERO }, to[e]);
            });
        }

        /// [`Self::row`] in place.
        #[inline(always)]
        pub fn row_in_place<F: Real>(&self, row: usize, x: &mut [F]) {
            let sample = self.samples[self.sequence[row] as usize];
            let scale = F::of(self.site.mask.scale());
            self.site.mask.each(self.site.site, sample, self.position[row], 0, x.len(), |e, keep| {
                x[e] = if keep { x[e] * scale } else { F::ZERO };
            });
        }
    }

    /// Mean and reciprocal standard deviation of a row.
    #[inline(always)]
    pub fn statistics<F: Real>(z: &[F], eps: f32) -> (F, F) {
        let n = F::of(z.len() as f64);
        let mean = sum1(z, |z| z) / n;
        let variance = sum1(z, |z| (z - mean) * (z - mean)) / n;
        (mean, F::ONE / (variance + F::of(f64::from(eps))).sqrt())
    }

    /// `y = γ x̂ + β`.
    #[inline(always)]
    pub fn normalize<F: Real>(z: &[F], mean: F, rstd: F, gamma: &[F], beta: &[F], y: &mut [F]) {
        for i in 0..y.len() {
            y[i] = (z[i] - mean) * rstd * gamma[i] + beta[i];
        }
    }

    pub fn forward<F: Real>(a: &Forward<'_>) {
        let (rows, c) = (a.shape.rows.rows, a.shape.width);
        let (mut x, mut y) = (a.x.write::<F>(), a.y.write::<F>());
        let (mut mean, mut rstd) = (a.mean.write::<F>(), a.rstd.write::<F>());
        let (gamma, beta) = (a.gamma.read::<F>(), a.beta.read::<F>());
        let residual = a.residual.map(|r| r.read::<F>());
        let drop = a.dropout.as_ref().and_then(|(site, names)| Drop::new(*site, names));
        let (residual, drop) = (residual.as_deref(), drop.as_ref());
        let (gamma, beta) = (&gamma[..c], &beta[..c]);
        x[..rows * c]
            .par_chunks_mut(BLOCK * c)
            .zip(y[..rows * c].par_chunks_mut(BLOCK * c))
            .zip(mean[..rows].par_chunks_mut(BLOCK).zip(rstd[..rows].par_chunks_mut(BLOCK)))
            .enumerate()
            .for_each(|(block, ((x, y), (mean, rstd)))| {
                vectorized(|| {
                    for i in 0..mean.len() {
                        let row = block * BLOCK + i;
                        let x = &mut x[i * c..(i + 1) * c];
                        if let Some(drop) = drop {
                            drop.row_in_place(row, x);
                        }
                        if let Some(r) = residual {
                            for (x, &r) in x.iter_mut().zip(&r[row * c..(row + 1) * c]) {
                                *x += r;
                            }
                        }
                        (mean[i], rstd[i]) = statistics(x, a.shape.eps);
                        normalize(x, mean[i], rstd[i], gamma, beta, &mut y[i * c..(i + 1) * c]);
                    }
                });
            });
    }

    /// One row: `dy` becomes `dz`; adds to the partial sums of dγ and dβ.
    #[inline(always)]
    pub fn backward_row<F: Real>(
        z: &[F],
        mean: F,
        rstd: F,
        gamma: &[F],
        dy: &mut [F],
        dgamma: &mut [F],
        dbeta: &mut [F],
    ) {
        let c = dy.len();
        let (z, gamma, dgamma, dbeta) = (&z[..c], &gamma[..c], &mut dgamma[..c], &mut dbeta[..c]);
        for i in 0..c {
            dgamma[i] += dy[i] * (z[i] - mean) * rstd;
            dbeta[i] += dy[i];
            dy[i] *= gamma[i];
        }
        let n = F::of(c as f64);
        let mean_g = sum1(dy, |g| g) / n;
        let mean_gx = sum2(dy, z, |g, z| g * (z - mean)) * rstd / n;
        for i in 0..c {
            dy[i] = rstd * (dy[i] - mean_g - (z[i] - mean) * rstd * mean_gx);
        }
    }

    /// Adds `[blocks, 2, C]` partial sums to dγ and dβ, first block first.
    pub fn add_partials<F: Real>(partials: &[F], dgamma: &mut [F], dbeta: &mut [F]) {
        let c = dgamma.len();
        for p in partials.chunks_exact(2 * c) {
            for i in 0..c {
                dgamma[i] += p[i];
                dbeta[i] += p[c + i];
            }
        }
    }

    pub fn backward<F: Real>(a: &Backward<'_>) {
        let (rows, c) = (a.shape.rows.rows, a.shape.width);
        let (z, mean, rstd, gamma) = (a.z.read::<F>(), a.mean.read::<F>(), a.rstd.read::<F>(), a.gamma.read::<F>());
        let mut dy = a.dy.write::<F>();
        let mut dx = a.dropout.as_ref().map(|(_, _, dx)| dx.write::<F>());
        let drop = a.dropout.as_ref().and_then(|(site, names, _)| Drop::new(*site, names));
        let mut partials = vec![F::ZERO; rows.div_ceil(BLOCK) * 2 * c];
        let block = |block: usize, dy: &mut [F], mut dx: Option<&mut [F]>, partial: &mut [F]| {
            let (dgamma, dbeta) = partial.split_at_mut(c);
            vectorized(|| {
                for (i, dy) in dy.chunks_exact_mut(c).enumerate() {
                    let row = block * BLOCK + i;
                    backward_row(&z[row * c..(row + 1) * c], mean[row], rstd[row], &gamma, dy, dgamma, dbeta);
                    if let Some(dx) = &mut dx {
                        let dx = &mut dx[i * c..(i + 1) * c];
                        match &drop {
                            Some(drop) => drop.row(row, dy, dx, |new, _| new),
                            None => dx.copy_from_slice(dy),
                        }
                    }
                }
            });
        };
        let parts = dy[..rows * c].par_chunks_mut(BLOCK * c).zip(partials.par_chunks_mut(2 * c)).enumerate();
        match &mut dx {
            Some(dx) => parts
                .zip(dx[..rows * c].par_chunks_mut(BLOCK * c))
                .for_each(|((b, (dy, partial)), dx)| block(b, dy, Some(dx), partial)),
            None => parts.for_each(|(b, (dy, partial))| block(b, dy, None, partial)),
        }
        add_partials(&partials, &mut a.dgamma_acc.write::<F>()[..c], &mut a.dbeta_acc.write::<F>()[..c]);
    }
}

/// The launches of `layernorm.cu`.
pub(super) mod gpu {
    use super::super::gpu::{blocks, dropout, launch, launch_as, resident_blocks, rows_of_block};
    use super::{Backward, Forward, Shape};
    use crate::device::gpu::Gpu;
    use crate::device::launch::{ConstPtr, MutPtr, Shape as Launch};
    use crate::device::{DType, Tensor};

    pub fn forward(gpu: &Gpu, a: &Forward<'_>) {
        let Shape { rows, width, eps } = a.shape;
        let (dropout, site, names) = dropout(gpu, a.dropout);
        let grid = Launch::linear(blocks(rows.rows, rows_of_block(width)), 128);
        launch_as!(
            gpu,
            a.x,
            grid,
            LayernormForwardF32
                | LayernormForwardBf16 {
                    y: a.y.get_mut(),
                    x: a.x.get_mut(),
                    mean: a.mean.get_mut(),
                    rstd: a.rstd.get_mut(),
                    residual: a.residual.map_or(ConstPtr::null(), |r| r.get()),
                    gamma: a.gamma.get(),
                    beta: a.beta.get(),
                    names,
                    dropout,
                    site,
                    rows: rows.get(),
                    C: width as i32,
                    eps,
                }
        );
    }

    /// Blocks of the backward that are resident on a multiprocessor (`LAYERNORM` in the kernel's file).
    fn resident(storage: &Tensor) -> u32 {
        if storage.dtype() == DType::BF16 { 3 } else { 2 }
    }

    pub fn backward(gpu: &Gpu, a: &Backward<'_>) {
        let Shape { rows, width, .. } = a.shape;
        let (dropout, site, names) = dropout(gpu, a.dropout.map(|(site, names, _)| (site, names)));
        let blocks = resident_blocks(gpu, rows.rows, width, resident(a.dy));
        let partials = gpu.scratch(blocks as usize * 2 * width);
        launch_as!(
            gpu,
            a.dy,
            Launch::linear(blocks, 128),
            LayernormBackwardF32
                | LayernormBackwardBf16 {
                    dy: a.dy.get_mut(),
                    dx: a.dropout.map_or(MutPtr::null(), |(_, _, dx)| dx.get_mut()),
                    partials,
                    z: a.z.get(),
                    mean: a.mean.get(),
                    rstd: a.rstd.get(),
                    gamma: a.gamma.get(),
                    names,
                    dropout,
                    site,
                    rows: rows.get(),
                    C: width as i32,
                }
        );
        add_partials(gpu, a.shape, blocks, partials, a.dgamma_acc, a.dbeta_acc);
    }

    /// Adds what `blocks` blocks have summed to dγ and dβ.
    pub fn add_partials(
        gpu: &Gpu,
        shape: Shape<'_>,
        blocks: u32,
        partials: MutPtr<f32>,
        dgamma_acc: &Tensor,
        dbeta_acc: &Tensor,
    ) {
        if blocks == 0 {
            return;
        }
        let width = shape.width;
        launch!(
            gpu,
            Launch::linear((2 * width).div_ceil(32) as u32, 1024),
            LayernormBackwardSums {
                dgamma_acc: dgamma_acc.get_mut(),
                dbeta_acc: dbeta_acc.get_mut(),
                partials: partials.into(),
                rows: shape.rows.get(),
                blocks: blocks as i32,
                C: width as i32,
            }
        );
    }
}
