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
        bias_gradient(device, (a.rows, n), &a.dy, db);
    }
}

/// `db += Σ_rows dy` alone.
pub fn bias_gradient(device: Device, (rows, outputs): (Count<'_>, usize), dy: &Matrix<'_>, db_acc: &Tensor) {
    match device {
        Device::Cpu => super::on_cpu!(db_acc, cpu::column_sums, rows.rows, outputs, dy, db_acc),
        Device::Gpu(gpu) => gpu::column_sums(gpu, rows, outputs, dy, db_acc),
    }
}

/// The reference: rayon over rows; column sums by blocks of columns.
mod cpu {
    use super::Forward;
    use crate::device::cpu::{Real, vectorized};
    use crate::device::{Matrix, Tensor};
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
    pub fn column_sums<F: Real>(rows: usize, outputs: usize, dy: &Matrix<'_>, db: &Tensor) {
        let (values, mut db) = (dy.tensor.read::<F>(), db.write::<F>());
        let (dy, stride) = (&values[dy.offset..], dy.stride);
        const BLOCK: usize = 256;
        db[..outputs].par_chunks_mut(BLOCK).enumerate().for_each(|(i, out)| {
            vectorized(|| {
                for row in 0..rows {
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
pub(super) mod gpu {
    use super::super::Count;
    use super::super::gpu::{Rows, blocks, launch, launch_as};
    use super::Backward;
    use crate::device::gpu::Gpu;
    use crate::device::launch::{MutPtr, Shape};
    use crate::device::{Matrix, Tensor};

    pub fn zero_tails<'a>(gpu: &Gpu, a: &Backward<'a>) {
        let rows = |m: &Matrix<'a>, width| Rows { tensor: m.tensor, offset: m.offset, width, stride: m.stride };
        a.rows.zero_tails(gpu, &rows(&a.x, a.inputs), Some(&rows(&a.dy, a.outputs)));
    }

    pub fn column_sums(gpu: &Gpu, rows: Count<'_>, n: usize, dy: &Matrix<'_>, db_acc: &Tensor) {
        let (grid, partials) = column_blocks(gpu, rows, n);
        launch_as!(
            gpu,
            dy.tensor,
            grid,
            ColumnSumsF32
                | ColumnSumsBf16 {
                    partials,
                    x: dy.tensor.get().offset(dy.offset),
                    rows: rows.get(),
                    N: n as i32,
                    stride: dy.stride as i32,
                }
        );
        add_column_partials(gpu, rows, n, (grid, partials), db_acc);
    }

    /// The grid of a kernel that sums over rows in `n` columns, and the memory for its partial sums.
    pub fn column_blocks(gpu: &Gpu, rows: Count<'_>, n: usize) -> (Shape, MutPtr<f32>) {
        const COLUMNS: usize = 256;
        const WARPS: usize = 8;
        let across = blocks(n, COLUMNS);
        // Four blocks a multiprocessor, as long as each has some rows to add up.
        let down = (4 * gpu.facts().multiprocessors / across.max(1)).clamp(1, blocks(rows.rows, 4 * WARPS).max(1));
        (Shape { grid: [across, down, 1], ..Shape::linear(1, 256) }, gpu.scratch(down as usize * n))
    }

    /// Adds what that kernel has summed.
    pub fn add_column_partials(
        gpu: &Gpu,
        rows: Count<'_>,
        n: usize,
        (grid, partials): (Shape, MutPtr<f32>),
        sums_acc: &Tensor,
    ) {
        launch!(
            gpu,
            Shape::linear(blocks(n, 32), 1024),
            ColumnSumsAdd {
                sums_acc: sums_acc.get_mut(),
                partials: partials.into(),
                rows: rows.get(),
                blocks: grid.grid[1] as i32,
                N: n as i32,
            }
        );
    }
}
