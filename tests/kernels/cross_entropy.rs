//! Cross entropy of chunks of logits: losses, gradient in place, bias gradient, sums.

use crate::harness::*;
use half::bf16;
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::kernels::*;
use retromae_engine::device::launch::Shape;
use retromae_engine::device::{DType, Device, Tensor};
use retromae_engine::error::Result;
use retromae_engine::ops::cross_entropy;

#[derive(Clone, Copy)]
struct Case {
    rows: usize,
    /// Rows of the logits buffer.
    chunk: usize,
    /// True V.
    vocabulary: usize,
    /// V of the buffers.
    padded: usize,
    /// Bias of the padding.
    floor: f32,
}

const PLAIN: Case = Case { rows: 5, chunk: 8, vocabulary: 61, padded: 64, floor: f32::NEG_INFINITY };

const SCALE: f32 = 0.25;

/// What the bias gradient is added to.
const START: f32 = 0.5;

/// What the sums are added to: small enough that the loss keeps its digits.
const SUMS: [f64; 2] = [0.25, 3.0];

/// Buffers of one launch.
struct On<'a, T> {
    loss: &'a Buffer<f32>,
    correct: &'a Buffer<u32>,
    logits: &'a Buffer<T>,
    bias: &'a Buffer<f32>,
    labels: &'a Buffer<u32>,
    rows: &'a Buffer<i32>,
    scale: &'a Buffer<f32>,
    partial: &'a Buffer<f32>,
}

/// Entry points of one storage type.
trait Kernels: Storage {
    fn gradient(device: &'static Gpu, c: &Case, first: usize, on: &On<Self>) -> Result<()>;
    fn loss(device: &'static Gpu, c: &Case, first: usize, on: &On<Self>) -> Result<()>;
    fn bias_sums(device: &'static Gpu, c: &Case, first: usize, on: &On<Self>) -> Result<()>;
}

macro_rules! kernels {
    ($t:ty, $gradient:ident, $loss:ident, $bias_sums:ident) => {
        impl Kernels for $t {
            fn gradient(device: &'static Gpu, c: &Case, first: usize, on: &On<Self>) -> Result<()> {
                $gradient {
                    row_loss: on.loss.get_mut(),
                    row_correct: on.correct.get_mut(),
                    logits: on.logits.get_mut(),
                    bias: on.bias.get(),
                    labels: on.labels.get(),
                    rows: on.rows.get(),
                    scale: on.scale.get(),
                    first: first as i32,
                    chunk: c.chunk as i32,
                    V: c.padded as i32,
                }
                .launch(device, Shape::linear(c.chunk.div_ceil(4) as u32, 512))
            }

            fn loss(device: &'static Gpu, c: &Case, first: usize, on: &On<Self>) -> Result<()> {
                $loss {
                    row_loss: on.loss.get_mut(),
                    row_correct: on.correct.get_mut(),
                    logits: on.logits.get(),
                    bias: on.bias.get(),
                    labels: on.labels.get(),
                    rows: on.rows.get(),
                    first: first as i32,
                    chunk: c.chunk as i32,
                    V: c.padded as i32,
                }
                .launch(device, Shape::linear(c.chunk.div_ceil(4) as u32, 512))
            }

            fn bias_sums(device: &'static Gpu, c: &Case, first: usize, on: &On<Self>) -> Result<()> {
                let grid = [c.padded.div_ceil(1024) as u32, c.chunk.div_ceil(64) as u32, 1];
                $bias_sums {
                    partial: on.partial.get_mut(),
                    g: on.logits.get(),
                    rows: on.rows.get(),
                    first: first as i32,
                    chunk: c.chunk as i32,
                    V: c.padded as i32,
                }
                .launch(device, Shape { grid, ..Shape::linear(1, 128) })
            }
        }
    };
}
kernels!(f32, CrossEntropyGradientF32, CrossEntropyLossF32, CrossEntropyBiasSumsF32);
kernels!(bf16, CrossEntropyGradientBf16, CrossEntropyLossBf16, CrossEntropyBiasSumsBf16);

impl Case {
    /// `[rows, padded]` in storage `T`, numbers in the padding too.
    fn logits<T: Storage>(&self) -> Vec<f32> {
        rounded::<T>(&normal(self.rows * self.padded, 1).iter().map(|x| 3.0 * x).collect::<Vec<_>>())
    }

    fn bias(&self) -> Vec<f32> {
        let mut bias = normal(self.padded, 2);
        bias[self.vocabulary..].fill(self.floor);
        bias
    }

    /// Both ends of the vocabulary, the most likely token of one row, and others.
    fn labels<T: Storage>(&self) -> Vec<u32> {
        let mut labels = below(self.rows, self.vocabulary as u32, 3);
        labels[0] = self.vocabulary as u32 - 1;
        if self.rows > 2 {
            let (logits, bias) = (self.logits::<T>(), self.bias());
            let x = |v: &usize| logits[2 * self.padded + v] + bias[*v];
            labels[1] = 0;
            labels[2] = (0..self.vocabulary).max_by(|a, b| x(a).total_cmp(&x(b))).unwrap() as u32;
        }
        labels
    }

    /// Gradient, losses, correct rows, bias gradient, sums.
    fn run<T: Kernels>(&self, device: &'static Gpu, training: bool) -> Vec<Vec<f32>> {
        let Case { rows, chunk, padded, .. } = *self;
        let spare = 3;
        let (loss, correct) = (Buffer::poisoned(device, rows + spare), Buffer::poisoned(device, rows + spare));
        let labels = Buffer::with_room(device, &self.labels::<T>(), rows + spare);
        let (bias, scale) = (Buffer::of(device, &self.bias()), Buffer::of(device, &[SCALE]));
        let count = Buffer::of(device, &[rows as i32]);
        let db_acc = Buffer::of(device, &vec![START; padded]);
        let all = self.logits::<T>();
        let mut gradient = Vec::new();
        // As a captured graph would: launches for all chunks of the capacity, the last of which holds no row.
        for first in (0..rows + chunk).step_by(chunk) {
            let live = chunk.min(rows.saturating_sub(first));
            let values = &all[(first * padded).min(all.len())..][..live * padded];
            let logits = stored::<T>(device, values, (chunk - live) * padded);
            let slabs = chunk.div_ceil(64);
            let partial = Buffer::poisoned(device, slabs * padded);
            let on = On {
                loss: &loss,
                correct: &correct,
                logits: &logits,
                bias: &bias,
                labels: &labels,
                rows: &count,
                scale: &scale,
                partial: &partial,
            };
            if training {
                T::gradient(device, self, first, &on).expect("a correct kernel raises nothing");
                T::bias_sums(device, self, first, &on).expect("a correct kernel raises nothing");
                partial.take(live.div_ceil(64) * padded);
                let (rows, (first, chunk, v)) = (count.get(), (first as i32, chunk as i32, padded as i32));
                CrossEntropyBiasAdd { db_acc: db_acc.get_mut(), partial: partial.get(), rows, first, chunk, V: v }
                    .launch(device, Shape::linear(padded.div_ceil(256) as u32, 256))
                    .expect("a correct kernel raises nothing");
            } else {
                T::loss(device, self, first, &on).expect("a correct kernel raises nothing");
            }
            // A product sums over all of the chunk; evaluation has none, and leaves what follows the last label alone.
            let tail = if training { chunk - live } else { 0 };
            let mut written = widened(logits.take((live + tail) * padded));
            assert!(written.split_off(live * padded).iter().all(|g| g.to_bits() == 0), "rows without a label are 0");
            gradient.extend(written);
        }
        let sums = Buffer::<f64>::of(device, &SUMS);
        let (row_loss, row_correct) = (loss.get_mut().into(), correct.get_mut().into());
        CrossEntropySums { sums_acc: sums.get_mut(), row_loss, row_correct, rows: count.get() }
            .launch(device, Shape::linear(1, 512))
            .expect("a correct kernel raises nothing");
        let (loss, correct, sums) = (loss.take(rows), correct.take(rows), sums.take(2));
        let total: f64 = loss.iter().map(|&x| f64::from(x)).sum();
        let added = [sums[0] - SUMS[0], sums[1] - SUMS[1]];
        assert!((added[0] - total).abs() <= 1e-14 * total.abs() * rows as f64, "{} instead of {total}", added[0]);
        assert_eq!(added[1], correct.iter().map(|&c| f64::from(c)).sum::<f64>());
        vec![gradient, loss, correct.iter().map(|&c| c as f32).collect(), db_acc.take(padded)]
    }

    /// The CPU's op in f64: with the identity as hidden states and the logits as weights, its product leaves the logits as they are and
    /// its weight gradient is theirs.
    fn exact<T: Storage>(&self) -> [Vec<f64>; 4] {
        let Case { rows, vocabulary, padded, .. } = *self;
        let logits = self.logits::<T>();
        let h: Vec<f64> = (0..rows * rows).map(|i| f64::from(u8::from(i / rows == i % rows))).collect();
        let w: Vec<f64> = (0..vocabulary * rows).map(|i| f64::from(logits[i % rows * padded + i / rows])).collect();
        let zeros = |len: usize| Tensor::zeros(DType::F64, len);
        let (dh, dw_acc, db_acc) = (zeros(rows * rows), zeros(vocabulary * rows), zeros(vocabulary));
        let (row_loss, row_correct) = (zeros(rows), Tensor::zeros(DType::U32, rows));
        cross_entropy::run(
            Device::Cpu,
            &cross_entropy::CrossEntropy {
                shape: cross_entropy::Shape { rows: rows.into(), width: rows, vocabulary, chunk: rows },
                h: &Tensor::from_slice(&h),
                w: &Tensor::from_slice(&w),
                b: &Tensor::from_slice(&f64s(&self.bias()[..vocabulary])),
                labels: &Tensor::from_slice(&self.labels::<T>()),
                logits: &zeros(rows * vocabulary),
                row_loss: &row_loss,
                row_correct: &row_correct,
                sums_acc: &zeros(2),
                gradients: Some(cross_entropy::Gradients {
                    scale: f64::from(SCALE).into(),
                    dh: &dh,
                    dw_acc: &dw_acc,
                    db_acc: &db_acc,
                }),
            },
        );
        let (dw, db) = (dw_acc.to_vec::<f64>(), db_acc.to_vec::<f64>());
        let g = (0..rows * padded).map(|i| dw.get(i % padded * rows + i / padded).copied().unwrap_or(0.0)).collect();
        let db = (0..padded).map(|v| f64::from(START) + db.get(v).copied().unwrap_or(0.0)).collect();
        let correct = row_correct.to_vec::<u32>().iter().map(|&c| f64::from(c)).collect();
        [g, row_loss.to_vec(), correct, db]
    }

    fn check<T: Kernels>(&self) {
        let got = in_every_order(|device| self.run::<T>(device, true));
        let [g, loss, correct, db] = self.exact::<T>();
        // Any bf16 implementation rounds the gradient that it stores, and sums what it stored.
        let plain = rounded::<T>(&g.iter().map(|&g| g as f32).collect::<Vec<_>>());
        let plain_db: Vec<f32> =
            (0..self.padded).map(|v| START + plain.iter().skip(v).step_by(self.padded).sum::<f32>()).collect();
        judge::<T>("gradient", &got[0], &g, &plain);
        judge::<f32>("loss", &got[1], &loss, &[]);
        assert_eq!(f64s(&got[2]), correct);
        judge::<T>("db", &got[3], &db, &plain_db);
        for row in got[0].chunks(self.padded) {
            assert!(row[self.vocabulary..].iter().all(|&g| g == 0.0), "padding has no gradient");
        }
        let evaluated = in_every_order(|device| self.run::<T>(device, false));
        assert!(evaluated[0] == self.logits::<T>(), "evaluation leaves the logits");
        assert!(evaluated[1..3] == got[1..3], "evaluation and training agree");
    }

    fn check_both(&self) {
        self.check::<f32>();
        self.check::<bf16>();
    }
}

#[test]
fn one_row_and_more_threads_than_columns() {
    Case { rows: 1, ..PLAIN }.check_both();
}

#[test]
fn rows_that_fill_neither_block_nor_chunk() {
    PLAIN.check_both();
}

#[test]
fn several_chunks_with_and_without_a_remainder() {
    Case { rows: 11, chunk: 4, ..PLAIN }.check_both();
    Case { rows: 12, chunk: 6, ..PLAIN }.check_both();
}

/// 64 rows make one partial sum of the bias gradient.
#[test]
fn a_bias_gradient_over_several_slabs() {
    Case { rows: 131, chunk: 131, ..PLAIN }.check_both();
}

/// The thread with the last columns has padding only, and nothing but -inf to take a maximum of.
#[test]
fn whole_vectors_of_padding() {
    Case { vocabulary: 40, ..PLAIN }.check_both();
}

/// A bias so low that the exponential is zero does as well as -inf.
#[test]
fn padding_that_is_merely_very_low() {
    Case { floor: -1e30, ..PLAIN }.check_both();
}

/// BERT's: every thread has several vectors, the last ones fewer; the bias gradient takes 30 blocks.
#[test]
fn the_vocabulary_of_bert() {
    Case { rows: 5, chunk: 5, vocabulary: 30_522, padded: 30_528, ..PLAIN }.check_both();
}
