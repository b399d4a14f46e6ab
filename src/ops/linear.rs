//! Linear layer: `y [R, N] = x [R, K] · w [N, K]ᵀ + b [N]`.
//!
//! Backward: `dx = dy · w`, `dw += dyᵀ · x`, `db += Σ_rows dy`. Nothing is saved but the input.

use crate::device::{Device, Matmul, Matrix, Output, Product, Tensor};

/// Arguments of [`forward`].
pub struct Forward<'a> {
    /// R.
    pub rows: usize,
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
    if let Some(b) = a.b {
        match device {
            Device::Cpu => super::on_cpu!(b, cpu::broadcast, a, b),
        }
    }
    let output = if a.b.is_some() { Output::Add } else { Output::Set };
    let (m, n, k) = (a.rows, a.outputs, a.inputs);
    device.matmul(&Matmul { product: Product::NT, m, n, k, a: a.x, b: Matrix::new(a.w, k), c: a.y, output });
}

/// Arguments of [`backward`].
pub struct Backward<'a> {
    /// R.
    pub rows: usize,
    /// K.
    pub inputs: usize,
    /// N.
    pub outputs: usize,
    /// `[R, K]`, as in the forward.
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
    let (rows, n, k) = (a.rows, a.outputs, a.inputs);
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
        });
    }
    let c = Matrix::new(a.dw_acc, k);
    device.matmul(&Matmul { product: Product::TN, m: n, n: k, k: rows, a: a.dy, b: a.x, c, output: Output::Add });
    if let Some(db) = a.db_acc {
        match device {
            Device::Cpu => super::on_cpu!(db, cpu::column_sums, a, db),
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
        y[a.y.offset..].par_chunks_mut(a.y.stride).take(a.rows).for_each(|row| row[..a.outputs].copy_from_slice(b));
    }

    /// `db += Σ_rows dy`, each column summed from the first row to the last.
    pub fn column_sums<F: Real>(a: &Backward<'_>, db: &Tensor) {
        let (dy, mut db) = (a.dy.tensor.read::<F>(), db.write::<F>());
        let (dy, stride) = (&dy[a.dy.offset..], a.dy.stride);
        const BLOCK: usize = 256;
        db[..a.outputs].par_chunks_mut(BLOCK).enumerate().for_each(|(i, out)| {
            vectorized(|| {
                for row in 0..a.rows {
                    let start = row * stride + i * BLOCK;
                    for (out, &x) in out.iter_mut().zip(&dy[start..]) {
                        *out += x;
                    }
                }
            });
        });
    }
}
