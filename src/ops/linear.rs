//! Linear layer: `y [R, N] = x [R, K] · w [N, K]ᵀ + b [N]`.
//!
//! Backward: `dx = dy · w`, `dw += dyᵀ · x`, `db += Σ_rows dy`. Nothing is saved but the input.

use super::Count;
use crate::device::{Device, Matmul, Matrix, Output, Product, Tensor};

/// Arguments of [`forward`].
pub struct Forward<'a> {
    /// R.
    pub rows: Count<'a>,
    /// K.
    pub inputs: usize,
    /// N.
    pub outputs: usize,
    /// `[R, K]`.
    pub x: Matrix<'a>,
    /// `[N, K]`.
    pub w: &'a Tensor,
    /// `[N]`, or nothing.
    pub b: Option<&'a Tensor>,
    /// `[R, N]`, written.
    pub y: Matrix<'a>,
}

/// `y = x wᵀ + b`.
pub fn forward(device: Device, a: &Forward<'_>) {
    let (m, n, k) = (a.rows.rows, a.outputs, a.inputs);
    let (mut output, mut bias) = (Output::Set, a.b);
    if let (Device::Cpu, Some(b)) = (device, a.b) {
        super::on_cpu!(b, cpu::broadcast, a, b);
        (output, bias) = (Output::Add, None);
    }
    device.matmul(&Matmul { product: Product::NT, m, n, k, a: a.x, b: Matrix::new(a.w, k), c: a.y, output, bias });
}

/// Arguments of [`backward`].
pub struct Backward<'a> {
    /// R.
    pub rows: Count<'a>,
    /// K.
    pub inputs: usize,
    /// N.
    pub outputs: usize,
    /// `[R, K]`, as in the forward. On the GPU rows past the true number become zero, here and in `dy`.
    pub x: Matrix<'a>,
    /// `[N, K]`.
    pub w: &'a Tensor,
    /// `[R, N]`.
    pub dy: Matrix<'a>,
    /// `[R, K]`, set or added to; nothing when the input needs no gradient.
    pub dx: Option<(Matrix<'a>, Output)>,
    /// `[N, K]`, added to.
    pub dw_acc: &'a Tensor,
    /// `[N]`, added to.
    pub db_acc: Option<&'a Tensor>,
}

/// Gradients of input, weight and bias.
pub fn backward(device: Device, a: &Backward<'_>) {
    let (rows, n, k) = (a.rows.rows, a.outputs, a.inputs);
    if let Device::Gpu(gpu) = device {
        gpu::zero_tails(gpu, a);
    }
    if let Some((dx, output)) = a.dx {
        device.matmul(&Matmul {
            product: Product::NN,
            m: rows,
            n: k,
            k: n,
            a: a.dy,
            b: Matrix::new(a.w, k),
            c: dx,
            output,
            bias: None,
        });
    }
    let c = Matrix::new(a.dw_acc, k);
    let (output, bias) = (Output::Add, None);
    device.matmul(&Matmul { product: Product::TN, m: n, n: k, k: rows, a: a.dy, b: a.x, c, output, bias });
    if let Some(db) = a.db_acc {
        match device {
            Device::Cpu => super::on_cpu!(db, cpu::column_sums, a, db),
            Device::Gpu(gpu) => gpu::column_sums(gpu, a, db),
        }
    }
}

/// The reference: rayon over rows; column sums by blocks of columns.
mod cpu {
    use super::{Backward, Forward};
    use crate::device::Tensor;
    use crate::device::cpu::{Real, vectorized};
    use rayon::prelude::*;

    /// Every row of `y` becomes the bias.
    pub fn broadcast<F: Real>(a: &Forward<'_>, b: &Tensor) {
        let (b, mut y) = (b.read::<F>(), a.y.tensor.write::<F>());
        let b = &b[..a.outputs];
        y[a.y.offset..]
            .par_chunks_mut(a.y.stride)
            .take(a.rows.rows)
            .for_each(|row| row[..a.outputs].copy_from_slice(b));
    }

    /// `db += Σ_rows dy`, each column summed from the first row to the last.
    pub fn column_sums<F: Real>(a: &Backward<'_>, db: &Tensor) {
        let (dy, mut db) = (a.dy.tensor.read::<F>(), db.write::<F>());
        let (dy, stride) = (&dy[a.dy.offset..], a.dy.stride);
        const BLOCK: usize = 256;
        db[..a.outputs].par_chunks_mut(BLOCK).enumerate().for_each(|(i, out)| {
            vectorized(|| {
                for row in 0..a.rows.rows {
                    let start = row * stride + i * BLOCK;
                    for (out, &x) in out.iter_mut().zip(&dy[start..]) {
                        *out += x;
                    }
                }
            });
        });
    }
}

/// What is not a product: rows that are not in use, and bias gradients, by `gather.cu`.
mod gpu {
    use super::super::gpu::{Rows, blocks, launch, launch_as};
    use super::Backward;
    use crate::device::gpu::Gpu;
    use crate::device::launch::{MutPtr, Shape};
    use crate::device::{Matrix, Tensor};

    pub fn zero_tails<'a>(gpu: &Gpu, a: &Backward<'a>) {
        let rows = |m: &Matrix<'a>, width| Rows { tensor: m.tensor, offset: m.offset, width, stride: m.stride };
        a.rows.zero_tails(gpu, &rows(&a.x, a.inputs), Some(&rows(&a.dy, a.outputs)));
    }

    pub fn column_sums(gpu: &Gpu, a: &Backward<'_>, db_acc: &Tensor) {
        const COLUMNS: usize = 256;
        const WARPS: usize = 8;
        let n = a.outputs;
        let across = blocks(n, COLUMNS);
        // Four blocks a multiprocessor, as long as each has some rows to add up.
        let down = (4 * gpu.facts().multiprocessors / across.max(1)).clamp(1, blocks(a.rows.rows, 4 * WARPS).max(1));
        let partials: MutPtr<f32> = gpu.scratch(down as usize * n);
        let rows = a.rows.get();
        let grid = Shape { grid: [across, down, 1], ..Shape::linear(1, 256) };
        launch_as!(
            gpu,
            a.dy.tensor,
            grid,
            ColumnSumsF32
                | ColumnSumsBf16 {
                    partials,
                    x: a.dy.tensor.get().offset(a.dy.offset),
                    rows,
                    N: n as i32,
                    stride: a.dy.stride as i32,
                }
        );
        launch!(
            gpu,
            Shape::linear(blocks(n, 32), 1024),
            ColumnSumsAdd {
                sums_acc: db_acc.get_mut(),
                partials: partials.into(),
                rows,
                blocks: down as i32,
                N: n as i32,
            }
        );
    }
}
