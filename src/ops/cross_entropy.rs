//! LM head and cross entropy in one op: `logits = h Wᵀ + b`, loss of row i `= lse(logits_i) − logits_i[label_i]`.
//!
//! Rows go through in chunks, so the logits of a batch never exist: a chunk's logits are turned into their gradient
//! `(softmax − onehot) · scale` in place and used at once for `dh = g W`, `dW += gᵀ h`, `db += Σ g`.

use super::gpu::Rows;
use super::{Count, linear};
use crate::device::{DType, Device, Matmul, Matrix, Output, Product, Tensor};

/// Sizes.
#[derive(Clone, Copy)]
pub struct Shape<'a> {
    /// Rows with a label.
    pub rows: Count<'a>,
    /// C.
    pub width: usize,
    /// V, padding included; its bias is −∞.
    pub vocabulary: usize,
    /// Rows of the logits buffer.
    pub chunk: usize,
}

/// What every row's loss is weighted with: 1 / labels of the whole optimizer step.
#[derive(Clone, Copy)]
pub struct Scale<'a> {
    /// On the CPU.
    pub value: f64,
    /// `[1]` f32 on the GPU, where recorded work serves steps with other numbers of labels.
    pub on_device: Option<&'a Tensor>,
}

impl From<f64> for Scale<'_> {
    fn from(value: f64) -> Self {
        Scale { value, on_device: None }
    }
}

/// Gradients that the op also computes.
pub struct Gradients<'a> {
    /// Weight of a row's loss.
    pub scale: Scale<'a>,
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
    pub shape: Shape<'a>,
    /// `[rows, C]`. On the GPU rows past the true number become zero where gradients are asked for.
    pub h: &'a Tensor,
    /// `[V, C]`.
    pub w: &'a Tensor,
    /// `[V]`, on the GPU f32.
    pub b: &'a Tensor,
    /// `[rows]` u32.
    pub labels: &'a Tensor,
    /// `[chunk, V]` scratch.
    pub logits: &'a Tensor,
    /// `[rows]` scratch, on the GPU f32: loss of each row.
    pub row_loss: &'a Tensor,
    /// `[rows]` u32 scratch: 1 where the label has the largest logit.
    pub row_correct: &'a Tensor,
    /// `[2]` f64, added to: sum of the losses, number of correct rows.
    pub sums_acc: &'a Tensor,
    /// Nothing: loss only.
    pub gradients: Option<Gradients<'a>>,
}

/// Loss, accuracy and, if asked for, all gradients.
pub fn run(device: Device, a: &CrossEntropy<'_>) {
    let Shape { rows, width, vocabulary, chunk } = a.shape;
    debug_assert_eq!(a.sums_acc.dtype(), DType::F64);
    if let (Device::Gpu(gpu), Some(_)) = (device, &a.gradients) {
        rows.zero_tails(gpu, &Rows::dense(a.h, width), None);
    }
    for first in (0..rows.rows).step_by(chunk) {
        let count = chunk.min(rows.rows - first);
        let x = Matrix::columns(a.h, first * width, width);
        let logits = Matrix::new(a.logits, vocabulary);
        linear::forward(
            device,
            // On the GPU the bias is added where the logits are read.
            &linear::Forward {
                rows: count.into(),
                inputs: width,
                outputs: vocabulary,
                x,
                w: a.w,
                b: (!device.is_gpu()).then_some(a.b),
                y: logits,
            },
        );
        match device {
            Device::Cpu => super::on_cpu!(a.h, cpu::softmax, a, first, count),
            Device::Gpu(gpu) => gpu::softmax(gpu, a, first, count),
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
            bias: None,
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
            bias: None,
        });
    }
    sums(device, rows, a.row_loss, a.row_correct, a.sums_acc);
}

/// Adds the sum of the rows' losses and the number of correct rows (u32, 1 or 0) to `sums_acc` `[2]` f64.
pub fn sums(device: Device, rows: Count<'_>, row_loss: &Tensor, row_correct: &Tensor, sums_acc: &Tensor) {
    match device {
        Device::Cpu => super::on_cpu!(row_loss, cpu::sums, rows.rows, row_loss, row_correct, sums_acc),
        Device::Gpu(gpu) => gpu::sums(gpu, rows, row_loss, row_correct, sums_acc),
    }
}

pub(super) use gpu::add_columns;

/// The reference: rows in parallel, losses summed in row order in f64; bias gradient by blocks of columns.
mod cpu {
    use super::CrossEntropy;
    use crate::device::Tensor;
    use crate::device::cpu::{Real, max, sum1, vectorized};
    use rayon::prelude::*;

    pub fn softmax<F: Real>(a: &CrossEntropy<'_>, first: usize, count: usize) {
        let v = a.shape.vocabulary;
        let mut logits = a.logits.write::<F>();
        let labels = a.labels.read::<u32>();
        let (mut loss, mut correct) = (a.row_loss.write::<F>(), a.row_correct.write::<u32>());
        let scale = a.gradients.as_ref().map(|g| F::of(g.scale.value));
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

    pub fn sums<F: Real>(rows: usize, row_loss: &Tensor, row_correct: &Tensor, sums_acc: &Tensor) {
        let (loss, correct) = (row_loss.read::<F>(), row_correct.read::<u32>());
        let mut sums = sums_acc.write::<f64>();
        sums[0] += loss[..rows].iter().map(|x| x.f64()).sum::<f64>();
        sums[1] += correct[..rows].iter().map(|&c| f64::from(c)).sum::<f64>();
    }
}

/// The launches of `cross_entropy.cu`.
mod gpu {
    use super::super::gpu::{blocks, launch, launch_as};
    use super::{Count, CrossEntropy};
    use crate::device::Tensor;
    use crate::device::gpu::Gpu;
    use crate::device::launch::{MutPtr, Shape};

    /// Rows of a block, and rows whose gradients are summed together for that of the bias.
    const ROWS: usize = 4;
    const SLAB: usize = 64;

    /// Losses of a chunk, and gradients in place of its logits where they are asked for.
    pub fn softmax(gpu: &Gpu, a: &CrossEntropy<'_>, first: usize, count: usize) {
        let (v, rows) = (a.shape.vocabulary, a.shape.rows.get());
        let (first, chunk) = (first as i32, count as i32);
        let grid = Shape::linear(blocks(count, ROWS), 512);
        let Some(g) = &a.gradients else {
            launch_as!(
                gpu,
                a.logits,
                grid,
                CrossEntropyLossF32
                    | CrossEntropyLossBf16 {
                        row_loss: a.row_loss.get_mut(),
                        row_correct: a.row_correct.get_mut(),
                        logits: a.logits.get(),
                        bias: a.b.get(),
                        labels: a.labels.get(),
                        rows,
                        first,
                        chunk,
                        V: v as i32,
                    }
            );
            return;
        };
        let scale = g.scale.on_device.map(|scale| scale.get());
        launch_as!(
            gpu,
            a.logits,
            grid,
            CrossEntropyGradientF32
                | CrossEntropyGradientBf16 {
                    row_loss: a.row_loss.get_mut(),
                    row_correct: a.row_correct.get_mut(),
                    logits: a.logits.get_mut(),
                    bias: a.b.get(),
                    labels: a.labels.get(),
                    rows,
                    scale: scale.unwrap_or_else(|| panic!("cross entropy needs its scale in device memory")),
                    first,
                    chunk,
                    V: v as i32,
                }
        );
        add_columns(gpu, a.logits, a.shape.rows, (first as usize, count), v, g.db_acc);
    }

    /// Adds the column sums of the rows in use of a chunk to `db_acc`.
    pub fn add_columns(
        gpu: &Gpu,
        g: &Tensor,
        rows: Count<'_>,
        (first, count): (usize, usize),
        v: usize,
        db_acc: &Tensor,
    ) {
        let (rows, first, chunk) = (rows.get(), first as i32, count as i32);
        let partial: MutPtr<f32> = gpu.scratch(count.div_ceil(SLAB) * v);
        let grid = Shape { grid: [blocks(v, 1024), blocks(count, SLAB), 1], ..Shape::linear(1, 128) };
        launch_as!(
            gpu,
            g,
            grid,
            CrossEntropyBiasSumsF32 | CrossEntropyBiasSumsBf16 { partial, g: g.get(), rows, first, chunk, V: v as i32 }
        );
        let (db_acc, partial) = (db_acc.get_mut(), partial.into());
        launch!(
            gpu,
            Shape::linear(blocks(v, 256), 256),
            CrossEntropyBiasAdd { db_acc, partial, rows, first, chunk, V: v as i32 }
        );
    }

    pub fn sums(gpu: &Gpu, rows: Count<'_>, row_loss: &Tensor, row_correct: &Tensor, sums_acc: &Tensor) {
        let (sums_acc, row_loss, row_correct) = (sums_acc.get_mut(), row_loss.get(), row_correct.get());
        let rows = rows.get();
        launch!(gpu, Shape::linear(1, 512), CrossEntropySums { sums_acc, row_loss, row_correct, rows });
    }
}
