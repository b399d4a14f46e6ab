//! Gradient norm and AdamW (Loshchilov & Hutter, arXiv 1711.05101, as PyTorch's `AdamW` computes it) over the flat parameter arena.
//!
//! `m ← β₁ m + (1−β₁) g`, `v ← β₂ v + (1−β₂) g²`, `w ← w (1 − η λ) − η m̂ / (√v̂ + ε)` with `g` scaled by
//! `min(1, max_norm / (‖g‖ + 10⁻⁶))`. A non-finite norm changes nothing.

use crate::device::{Device, Tensor};

/// `norm[0] = Σ g²` in f64, in a fixed order.
pub fn squared_norm(device: Device, gradients: &Tensor, norm: &Tensor) {
    match device {
        Device::Cpu => super::on_cpu!(gradients, cpu::squared_norm, gradients, norm),
        Device::Gpu(gpu) => gpu::squared_norm(gpu, gradients, norm),
    }
}

/// The constants of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// β₁.
    pub beta1: f64,
    /// β₂.
    pub beta2: f64,
    /// ε.
    pub eps: f64,
    /// λ, for parameters that decay.
    pub weight_decay: f64,
    /// Largest gradient norm; infinity: no clipping.
    pub max_norm: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, max_norm: 1.0 }
    }
}

impl AdamW {
    /// What changes from update to update, for [`Update::schedule`]: η / (1 − β₁ᵗ), 1 / √(1 − β₂ᵗ), η λ.
    pub fn schedule(&self, lr: f64, t: u64) -> [f32; 3] {
        let t = i32::try_from(t).unwrap_or(i32::MAX);
        let (rate, root) = (lr / (1.0 - self.beta1.powi(t)), 1.0 / (1.0 - self.beta2.powi(t)).sqrt());
        [rate, root, lr * self.weight_decay].map(|x| x as f32)
    }
}

/// Arguments of [`update`]. The arenas have equal length.
pub struct Update<'a> {
    /// Constants.
    pub adamw: AdamW,
    /// η of this step.
    pub lr: f64,
    /// Number of this update, from 1: for the bias corrections.
    pub t: u64,
    /// `[3]` f32, [`AdamW::schedule`] of this step: what the GPU reads in place of `lr` and `t`.
    pub schedule: Option<&'a Tensor>,
    /// Weights.
    pub w: &'a Tensor,
    /// Their copy in the storage type of the GPU, written; nothing where that is f32.
    pub copy: Option<&'a Tensor>,
    /// Gradients.
    pub g: &'a Tensor,
    /// First moments.
    pub m: &'a Tensor,
    /// Second moments.
    pub v: &'a Tensor,
    /// Elements before this one decay, the rest do not.
    pub decayed: usize,
    /// From [`squared_norm`].
    pub squared_norm: &'a Tensor,
}

/// One AdamW update, or nothing at all if the norm is not finite.
pub fn update(device: Device, a: &Update<'_>) {
    match device {
        Device::Cpu => super::on_cpu!(a.w, cpu::update, a),
        Device::Gpu(gpu) => gpu::update(gpu, a),
    }
}

/// The reference: fixed blocks in parallel.
mod cpu {
    use super::Update;
    use crate::device::Tensor;
    use crate::device::cpu::{Real, vectorized};
    use rayon::prelude::*;

    const BLOCK: usize = 16384;

    pub fn squared_norm<F: Real>(gradients: &Tensor, norm: &Tensor) {
        let g = gradients.read::<F>();
        let sums: Vec<f64> = g
            .par_chunks(BLOCK)
            .map(|g| {
                vectorized(|| {
                    let mut acc = [0.0f64; 8];
                    let chunks = g.chunks_exact(8);
                    let tail: f64 = chunks.remainder().iter().map(|x| x.f64() * x.f64()).sum();
                    for c in chunks {
                        for i in 0..8 {
                            acc[i] += c[i].f64() * c[i].f64();
                        }
                    }
                    acc.iter().sum::<f64>() + tail
                })
            })
            .collect();
        norm.write::<f64>()[0] = sums.iter().sum();
    }

    pub fn update<F: Real>(a: &Update<'_>) {
        let norm = a.squared_norm.read::<f64>()[0].sqrt();
        if !norm.is_finite() {
            return;
        }
        let (c, t) = (&a.adamw, i32::try_from(a.t).unwrap_or(i32::MAX));
        let clip = F::of((c.max_norm / (norm + 1e-6)).min(1.0));
        let (b1, b2, eps) = (F::of(c.beta1), F::of(c.beta2), F::of(c.eps));
        let (one_b1, one_b2) = (F::of(1.0 - c.beta1), F::of(1.0 - c.beta2));
        let rate = F::of(a.lr / (1.0 - c.beta1.powi(t)));
        let root = F::of(1.0 / (1.0 - c.beta2.powi(t)).sqrt());
        let keep = F::of(1.0 - a.lr * c.weight_decay);
        let (mut w, g) = (a.w.write::<F>(), a.g.read::<F>());
        let (mut m, mut v) = (a.m.write::<F>(), a.v.write::<F>());
        let block = |keep: F, w: &mut [F], g: &[F], m: &mut [F], v: &mut [F]| {
            vectorized(|| {
                for i in 0..w.len().min(g.len()).min(m.len()).min(v.len()) {
                    let g = g[i] * clip;
                    m[i] = b1 * m[i] + one_b1 * g;
                    v[i] = b2 * v[i] + one_b2 * g * g;
                    w[i] = w[i] * keep - rate * m[i] / (v[i].sqrt() * root + eps);
                }
            });
        };
        let d = a.decayed;
        let part = |keep: F, w: &mut [F], g: &[F], m: &mut [F], v: &mut [F]| {
            w.par_chunks_mut(BLOCK)
                .zip(g.par_chunks(BLOCK))
                .zip(m.par_chunks_mut(BLOCK).zip(v.par_chunks_mut(BLOCK)))
                .for_each(|((w, g), (m, v))| block(keep, w, g, m, v));
        };
        let ((w0, w1), (m0, m1), (v0, v1)) = (w.split_at_mut(d), m.split_at_mut(d), v.split_at_mut(d));
        part(keep, w0, &g[..d], m0, v0);
        part(F::ONE, w1, &g[d..], m1, v1);
    }
}

/// The launches of `optimizer.cu`.
mod gpu {
    use super::super::gpu::{blocks, launch};
    use super::Update;
    use crate::device::Tensor;
    use crate::device::gpu::Gpu;
    use crate::device::kernels::AdamWConstants;
    use crate::device::launch::{ConstPtr, MutPtr, Shape};

    pub fn squared_norm(gpu: &Gpu, gradients: &Tensor, norm: &Tensor) {
        let parts = blocks(gradients.len(), 16384);
        let partials: MutPtr<f64> = gpu.scratch(parts as usize);
        let (g, n) = (gradients.get(), gradients.len() as i64);
        launch!(gpu, Shape::linear(parts, 256), SquaredNormPartials { partials, g, n });
        let (norm, partials) = (norm.get_mut(), partials.into());
        launch!(gpu, Shape::linear(1, 1024), SquaredNorm { norm, partials, blocks: parts as i32 });
    }

    pub fn update(gpu: &Gpu, a: &Update<'_>) {
        let c = &a.adamw;
        let constants = AdamWConstants {
            beta1: c.beta1 as f32,
            one_minus_beta1: (1.0 - c.beta1) as f32,
            beta2: c.beta2 as f32,
            one_minus_beta2: (1.0 - c.beta2) as f32,
            eps: c.eps as f32,
            max_norm: c.max_norm,
        };
        let (master, m, v) = (a.w.get_mut(), a.m.get_mut(), a.v.get_mut());
        let (g, norm, n) = (a.g.get(), a.squared_norm.get(), a.w.len() as i64);
        let schedule: Option<ConstPtr<f32>> = a.schedule.map(|s| s.get());
        let schedule = schedule.unwrap_or_else(|| panic!("AdamW needs its schedule in device memory"));
        let (decayed, grid) = (a.decayed as i64, Shape::linear(blocks(a.w.len(), 2048), 256));
        match a.copy {
            Some(copy) => {
                let copy = copy.get_mut();
                launch!(gpu, grid, AdamwBf16 { master, copy, m, v, g, norm, schedule, constants, decayed, n });
            }
            None => {
                let copy = MutPtr::null();
                launch!(gpu, grid, AdamwF32 { master, copy, m, v, g, norm, schedule, constants, decayed, n });
            }
        }
    }
}
