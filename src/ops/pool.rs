//! Sentence embeddings out of hidden states: pooling over packed sequences, and L2 normalisation.
//!
//! Pooling of sequence s with rows `b .. e`: `y_s = x_b` (CLS), or `y_s = Σ x_i / (e − b)` (mean). Backward: `dx_b = dy_s` and 0 elsewhere,
//! or `dx_i = dy_s / (e − b)`.
//!
//! Normalisation of a row: `y = x / max(‖x‖, ε)` with ε = 10⁻¹². Saved: `y` and `‖x‖`. Backward: `dx = (dy − y (y · dy)) / ‖x‖`, and
//! `dx = dy / ε` where `‖x‖ < ε`, since the divisor is then constant.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::Count;
use crate::device::{Device, Tensor};

/// ε of the normalisation, that of `torch.nn.functional.normalize`.
pub const LEAST_NORM: f64 = 1e-12;

/// What a sentence embedding is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Pooling {
    /// The first row.
    #[default]
    Cls,
    /// The mean of all rows.
    Mean,
}

/// Sizes and sequence borders.
#[derive(Clone, Copy)]
pub struct Shape<'a> {
    /// S.
    pub sequences: Count<'a>,
    /// C.
    pub width: usize,
    /// `[S + 1]` u32: first row of each sequence; none is empty.
    pub cu_seqlens: &'a Tensor,
    /// Which rows count.
    pub pooling: Pooling,
}

/// `y [S, C]` (written) from `x [T, C]`.
pub fn forward(device: Device, shape: Shape<'_>, x: &Tensor, y: &Tensor) {
    match device {
        Device::Cpu => super::on_cpu!(x, cpu::forward, shape, x, y),
        Device::Gpu(gpu) => gpu::forward(gpu, shape, x, y),
    }
}

/// `dx [T, C]` (written, all rows of the sequences) from `dy [S, C]`.
pub fn backward(device: Device, shape: Shape<'_>, dy: &Tensor, dx: &Tensor) {
    match device {
        Device::Cpu => super::on_cpu!(dy, cpu::backward, shape, dy, dx),
        Device::Gpu(gpu) => gpu::backward(gpu, shape, dy, dx),
    }
}

/// Normalises `rows` rows of `width`: `y` and `norm [rows]` (both written) from `x`.
pub fn normalize(device: Device, (rows, width): (Count<'_>, usize), x: &Tensor, y: &Tensor, norm: &Tensor) {
    match device {
        Device::Cpu => super::on_cpu!(x, cpu::normalize, rows.rows, width, x, y, norm),
        Device::Gpu(gpu) => gpu::normalize(gpu, (rows, width), x, y, norm),
    }
}

/// `dx` (written) from `dy` and the saved `y` and `norm`.
pub fn normalize_backward(
    device: Device,
    (rows, width): (Count<'_>, usize),
    y: &Tensor,
    norm: &Tensor,
    dy: &Tensor,
    dx: &Tensor,
) {
    match device {
        Device::Cpu => super::on_cpu!(dy, cpu::normalize_backward, rows.rows, width, y, norm, dy, dx),
        Device::Gpu(gpu) => gpu::normalize_backward(gpu, (rows, width), (y, norm), dy, dx),
    }
}

/// The reference: sequences or rows in parallel, rows of a sequence added in order.
mod cpu {
    use super::{LEAST_NORM, Pooling, Shape};
    use crate::device::Tensor;
    use crate::device::cpu::{Real, sum1, sum2, vectorized};
    use crate::ops::attention::cpu::split;
    use rayon::prelude::*;

    pub fn forward<F: Real>(shape: Shape<'_>, x: &Tensor, y: &Tensor) {
        let (sequences, Shape { width, pooling, .. }) = (shape.sequences.rows, shape);
        let (x, mut y, cu) = (x.read::<F>(), y.write::<F>(), shape.cu_seqlens.read::<u32>());
        y[..sequences * width].par_chunks_exact_mut(width).zip(cu[..sequences + 1].par_windows(2)).for_each(
            |(y, w)| {
                let (begin, end) = (w[0] as usize, w[1] as usize);
                y.copy_from_slice(&x[begin * width..(begin + 1) * width]);
                if pooling == Pooling::Cls {
                    return;
                }
                vectorized(|| {
                    for x in x[(begin + 1) * width..end * width].chunks_exact(width) {
                        for (y, &x) in y.iter_mut().zip(x) {
                            *y += x;
                        }
                    }
                    let count = F::of((end - begin) as f64);
                    for y in y.iter_mut() {
                        *y = *y / count;
                    }
                });
            },
        );
    }

    pub fn backward<F: Real>(shape: Shape<'_>, dy: &Tensor, dx: &Tensor) {
        let (sequences, Shape { width, pooling, .. }) = (shape.sequences.rows, shape);
        let (dy, mut dx, cu) = (dy.read::<F>(), dx.write::<F>(), shape.cu_seqlens.read::<u32>());
        let parts = split(&mut dx, &cu[..sequences + 1], width);
        parts.into_par_iter().zip(dy[..sequences * width].par_chunks_exact(width)).for_each(|(dx, dy)| {
            let count = F::of((dx.len() / width) as f64);
            for (row, dx) in dx.chunks_exact_mut(width).enumerate() {
                for (dx, &dy) in dx.iter_mut().zip(dy) {
                    *dx = match pooling {
                        Pooling::Mean => dy / count,
                        Pooling::Cls if row == 0 => dy,
                        Pooling::Cls => F::ZERO,
                    };
                }
            }
        });
    }

    pub fn normalize<F: Real>(rows: usize, width: usize, x: &Tensor, y: &Tensor, norm: &Tensor) {
        let (x, mut y, mut norm) = (x.read::<F>(), y.write::<F>(), norm.write::<F>());
        y[..rows * width]
            .par_chunks_exact_mut(width)
            .zip(x[..rows * width].par_chunks_exact(width))
            .zip(&mut norm[..rows])
            .for_each(|((y, x), norm)| {
                vectorized(|| {
                    *norm = sum1(x, |x| x * x).sqrt();
                    let divisor = norm.max(F::of(LEAST_NORM));
                    for (y, &x) in y.iter_mut().zip(x) {
                        *y = x / divisor;
                    }
                });
            });
    }

    pub fn normalize_backward<F: Real>(rows: usize, width: usize, y: &Tensor, norm: &Tensor, dy: &Tensor, dx: &Tensor) {
        let (y, norm, dy, mut dx) = (y.read::<F>(), norm.read::<F>(), dy.read::<F>(), dx.write::<F>());
        dx[..rows * width]
            .par_chunks_exact_mut(width)
            .zip(dy[..rows * width].par_chunks_exact(width).zip(y[..rows * width].par_chunks_exact(width)))
            .zip(&norm[..rows])
            .for_each(|((dx, (dy, y)), &norm)| {
                vectorized(|| {
                    let least = F::of(LEAST_NORM);
                    let along = if norm < least { F::ZERO } else { sum2(y, dy, |y, dy| y * dy) };
                    let divisor = norm.max(least);
                    for i in 0..dx.len() {
                        dx[i] = (dy[i] - y[i] * along) / divisor;
                    }
                });
            });
    }
}

/// The launches of `pool.cu`.
mod gpu {
    use super::super::Count;
    use super::super::gpu::{blocks, launch_as};
    use super::{Pooling, Shape};
    use crate::device::Tensor;
    use crate::device::gpu::Gpu;
    use crate::device::launch::Shape as Launch;

    fn grid(shape: &Shape<'_>) -> Launch {
        Launch { grid: [shape.sequences.rows as u32, blocks(shape.width, 256), 1], ..Launch::linear(1, 256) }
    }

    pub fn forward(gpu: &Gpu, shape: Shape<'_>, x: &Tensor, y: &Tensor) {
        launch_as!(
            gpu,
            x,
            grid(&shape),
            PoolForwardF32
                | PoolForwardBf16 {
                    y: y.get_mut(),
                    x: x.get(),
                    cu_seqlens: shape.cu_seqlens.get(),
                    sequences: shape.sequences.get(),
                    C: shape.width as i32,
                    mean: i32::from(shape.pooling == Pooling::Mean),
                }
        );
    }

    pub fn backward(gpu: &Gpu, shape: Shape<'_>, dy: &Tensor, dx: &Tensor) {
        launch_as!(
            gpu,
            dy,
            grid(&shape),
            PoolBackwardF32
                | PoolBackwardBf16 {
                    dx: dx.get_mut(),
                    dy: dy.get(),
                    cu_seqlens: shape.cu_seqlens.get(),
                    sequences: shape.sequences.get(),
                    C: shape.width as i32,
                    mean: i32::from(shape.pooling == Pooling::Mean),
                }
        );
    }

    pub fn normalize(gpu: &Gpu, (rows, width): (Count<'_>, usize), x: &Tensor, y: &Tensor, norm: &Tensor) {
        launch_as!(
            gpu,
            x,
            Launch::linear(blocks(rows.rows, 8), 256),
            NormalizeForwardF32
                | NormalizeForwardBf16 {
                    y: y.get_mut(),
                    norm: norm.get_mut(),
                    x: x.get(),
                    sequences: rows.get(),
                    C: width as i32,
                }
        );
    }

    pub fn normalize_backward(
        gpu: &Gpu,
        (rows, width): (Count<'_>, usize),
        (y, norm): (&Tensor, &Tensor),
        dy: &Tensor,
        dx: &Tensor,
    ) {
        launch_as!(
            gpu,
            dy,
            Launch::linear(blocks(rows.rows, 8), 256),
            NormalizeBackwardF32
                | NormalizeBackwardBf16 {
                    dx: dx.get_mut(),
                    dy: dy.get(),
                    y: y.get(),
                    norm: norm.get(),
                    sequences: rows.get(),
                    C: width as i32,
                }
        );
    }
}
