//! LM head and cross entropy in one op: `logits = h Wᵀ + b`, loss of row i `= lse(logits_i) − logits_i[label_i]`.
//!
//! Rows go through in chunks, so the logits of a batch never exist: a chunk's logits are turned into their gradient
//! `(softmax − onehot) · scale` in place and used at once for `dh = g W`, `dW += gᵀ h`, `db += Σ g`.

use super::linear;
use crate::device::{DType, Device, Matmul, Matrix, Output, Product, Tensor};

/// Sizes.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows with a label.
    pub rows: usize,
    /// C.
    pub width: usize,
    /// V, padding included (padded rows have bias −∞ in effect: they are never read).
    pub vocabulary: usize,
    /// Rows of the logits buffer.
    pub chunk: usize,
}

/// Gradients that the op also computes.
pub struct Gradients<'a> {
    /// What every row's loss is weighted with: 1 / labels of the whole optimizer step.
    pub scale: f64,
    /// `[rows, C]`, written.
    pub dh: &'a Tensor,
    /// `[V, C]`, added to.
    pub dw_acc: &'a Tensor,
    /// `[V]`, added to.
    pub db_acc: &'a Tensor,
}

/// Arguments of [`run`].
pub struct CrossEntropy<'a> {
    /// Sizes.
    pub shape: Shape,
    /// `[rows, C]`.
    pub h: &'a Tensor,
    /// `[V, C]`.
    pub w: &'a Tensor,
    /// `[V]`.
    pub b: &'a Tensor,
    /// `[rows]` u32.
    pub labels: &'a Tensor,
    /// `[chunk, V]` scratch.
    pub logits: &'a Tensor,
    /// `[rows]` scratch: loss of each row.
    pub row_loss: &'a Tensor,
    /// `[rows]` u32 scratch: 1 where the label has the largest logit.
    pub row_correct: &'a Tensor,
    /// `[2]` f64, written: sum of the losses, number of correct rows.
    pub sums: &'a Tensor,
    /// Nothing: loss only.
    pub gradients: Option<Gradients<'a>>,
}

/// Loss, accuracy and, if asked for, all gradients.
pub fn run(device: Device, a: &CrossEntropy<'_>) {
    let Shape { rows, width, vocabulary, chunk } = a.shape;
    debug_assert_eq!(a.sums.dtype(), DType::F64);
    for first in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - first);
        let x = Matrix::columns(a.h, first * width, width);
        let logits = Matrix::new(a.logits, vocabulary);
        linear::forward(
            device,
            &linear::Forward { rows: count, inputs: width, outputs: vocabulary, x, w: a.w, b: Some(a.b), y: logits },
        );
        match device {
            Device::Cpu => super::on_cpu!(a.h, cpu::softmax, a, first, count),
        }
        let Some(g) = &a.gradients else { continue };
        let dh = Matrix::columns(g.dh, first * width, width);
        let (m, n, k) = (count, width, vocabulary);
        device.matmul(&Matmul {
            product: Product::NN,
            m,
            n,
            k,
            a: logits,
            b: Matrix::new(a.w, width),
            c: dh,
            output: Output::Set,
        });
        let dw = Matrix::new(g.dw_acc, width);
        device.matmul(&Matmul {
            product: Product::TN,
            m: vocabulary,
            n: width,
            k: count,
            a: logits,
            b: x,
            c: dw,
            output: Output::Add,
        });
    }
    match device {
        Device::Cpu => super::on_cpu!(a.h, cpu::sums, a),
    }
}

/// The reference: rows in parallel, losses summed in row order in f64; bias gradient by blocks of columns.
mod cpu {
    use super::CrossEntropy;
    use crate::device::cpu::{Real, max, sum1, vectorized};
    use rayon::prelude::*;

    pub fn softmax<F: Real>(a: &CrossEntropy<'_>, first: usize, count: usize) {
        let v = a.shape.vocabulary;
        let mut logits = a.logits.write::<F>();
        let labels = a.labels.read::<u32>();
        let (mut loss, mut correct) = (a.row_loss.write::<F>(), a.row_correct.write::<u32>());
        let scale = a.gradients.as_ref().map(|g| F::of(g.scale));
        logits[..count * v]
            .par_chunks_exact_mut(v)
            .zip(&labels[first..first + count])
            .zip(loss[first..first + count].par_iter_mut().zip(&mut correct[first..first + count]))
            .for_each(|((x, &label), (loss, correct))| {
                vectorized(|| {
                    let label = label as usize;
                    let (top, own) = (max(x), x[label]);
                    *correct = u32::from(own >= top);
                    let Some(scale) = scale else {
                        let sum = sum1(
                            x,
                            #[inline(always)]
                            |x| (x - top).exp(),
                        );
                        *loss = top + sum.ln() - own;
                        return;
                    };
                    for x in x.iter_mut() {
                        *x = (*x - top).exp();
                    }
                    let sum = sum1(
                        x,
                        #[inline(always)]
                        |x| x,
                    );
                    *loss = top + sum.ln() - own;
                    let factor = scale / sum;
                    for x in x.iter_mut() {
                        *x *= factor;
                    }
                    x[label] = x[label] - scale;
                });
            });
        if let Some(g) = &a.gradients {
            let mut db = g.db_acc.write::<F>();
            const BLOCK: usize = 512;
            db[..v].par_chunks_mut(BLOCK).enumerate().for_each(|(block, db)| {
                vectorized(|| {
                    for row in 0..count {
                        for (db, &x) in db.iter_mut().zip(&logits[row * v + block * BLOCK..]) {
                            *db += x;
                        }
                    }
                });
            });
        }
    }

    pub fn sums<F: Real>(a: &CrossEntropy<'_>) {
        let (loss, correct) = (a.row_loss.read::<F>(), a.row_correct.read::<u32>());
        let mut sums = a.sums.write::<f64>();
        sums[0] = loss[..a.shape.rows].iter().map(|x| x.f64()).sum();
        sums[1] = correct[..a.shape.rows].iter().map(|&c| f64::from(c)).sum();
    }
}
