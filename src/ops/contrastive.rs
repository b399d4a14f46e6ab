//! In-batch-negative contrastive loss (InfoNCE; DPR, arXiv 2004.04906): every passage of the batch is a candidate of every query.
//!
//! `s = q pᵀ / τ`, `lse_b = ln Σ exp s_b`, loss of query b `= lse_b − s_b,target(b)`. Saved: `lse`. Backward of `scale · Σ loss`,
//! from scores computed again: `g = (exp(s − lse) − onehot(target)) · scale / τ`, `dq = g p`, `dp = gᵀ q`.
//!
//! Passages can be hidden from single queries, as duplicates of their own passage must be; the target itself never is.

use super::Count;
use super::cross_entropy::Scale;
use crate::device::{DType, Device, Tensor};

/// Sizes, and which passages each query is compared with.
#[derive(Clone, Copy)]
pub struct Shape<'a> {
    /// B.
    pub queries: Count<'a>,
    /// P.
    pub passages: Count<'a>,
    /// C.
    pub width: usize,
    /// τ.
    pub temperature: f32,
    /// `[B]` u32: each query's own passage.
    pub targets: &'a Tensor,
    /// `[B, ⌈P / 32⌉]` u32, or nothing: bit p of row b is set when passage p is no candidate of query b.
    pub hidden: Option<&'a Tensor>,
}

/// Arguments of [`forward`].
pub struct Forward<'a> {
    /// Sizes and candidates.
    pub shape: Shape<'a>,
    /// `[B, C]`.
    pub q: &'a Tensor,
    /// `[P, C]`.
    pub p: &'a Tensor,
    /// `[B]`, on the GPU f32, written: loss of each query.
    pub loss: &'a Tensor,
    /// `[3, B]`, on the GPU f32, written, in units of ln 2: `[B, 2]` parts of lse, the largest score and what the others add, then lse.
    pub lse: &'a Tensor,
    /// `[B]` u32, written: 1 where no candidate scores higher than the query's own passage.
    pub correct: &'a Tensor,
}

/// Loss, log-sum-exp and correctness of each query.
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
    /// What every query's loss is weighted with: 1 / queries of the whole optimizer step.
    pub scale: Scale<'a>,
    /// As in the forward.
    pub q: &'a Tensor,
    /// As in the forward.
    pub p: &'a Tensor,
    /// Saved log-sum-exp; the CPU finds it again.
    pub lse: &'a Tensor,
    /// `[B, C]`, written.
    pub dq: &'a Tensor,
    /// `[P, C]`, written.
    pub dp: &'a Tensor,
}

/// Gradients of queries and passages.
pub fn backward(device: Device, a: &Backward<'_>) {
    match device {
        Device::Cpu => super::on_cpu!(a.q, cpu::backward, a),
        Device::Gpu(gpu) => gpu::backward(gpu, a),
    }
}

/// The reference: some queries at a time with all their scores; rows in parallel, no tiling, no online softmax.
mod cpu {
    use super::{Backward, Forward, Shape};
    use crate::device::Output;
    use crate::device::cpu::{Real, Threads, View, gemm, max, scratch, sum1, vectorized};
    use rayon::prelude::*;

    /// Queries whose scores exist at a time.
    const BLOCK: usize = 256;

    impl Shape<'_> {
        /// Scores of the queries from `first` on, hidden ones −∞.
        fn scores<F: Real>(&self, first: usize, q: &[F], p: &[F], s: &mut [F]) {
            let (c, passages) = (self.width, self.passages.rows);
            let (rows, inverse) = (s.len() / passages, F::of(1.0 / f64::from(self.temperature)));
            let (q, p) = (View::rows(&q[first * c..], c), View::rows(p, c).t());
            gemm((rows, passages, c), inverse, q, p, s, passages, Output::Set, Threads::All);
            let Some(hidden) = self.hidden else { return };
            let (hidden, targets, words) = (hidden.read::<u32>(), self.targets.read::<u32>(), passages.div_ceil(32));
            s.par_chunks_exact_mut(passages).enumerate().for_each(|(row, s)| {
                let own = s[targets[first + row] as usize];
                for (s, &bits) in s.chunks_mut(32).zip(&hidden[(first + row) * words..]) {
                    for (bit, s) in s.iter_mut().enumerate() {
                        *s = if bits >> bit & 1 == 1 { F::NEG_INFINITY } else { *s };
                    }
                }
                s[targets[first + row] as usize] = own;
            });
        }

        /// Calls `f(first query, scores)` for every block of queries.
        fn blocks<F: Real>(&self, q: &[F], p: &[F], mut f: impl FnMut(usize, &mut [F])) {
            let (queries, passages) = (self.queries.rows, self.passages.rows);
            let block = BLOCK.min(queries);
            scratch(block * passages, |s: &mut [F]| {
                for first in (0..queries).step_by(BLOCK) {
                    let s = &mut s[..block.min(queries - first) * passages];
                    self.scores(first, q, p, s);
                    f(first, s);
                }
            });
        }
    }

    pub fn forward<F: Real>(a: &Forward<'_>) {
        let (q, p, targets) = (a.q.read::<F>(), a.p.read::<F>(), a.shape.targets.read::<u32>());
        let (mut loss, mut lse, mut correct) = (a.loss.write::<F>(), a.lse.write::<F>(), a.correct.write::<u32>());
        let (parts, lse) = lse.split_at_mut(2 * a.shape.queries.rows);
        a.shape.blocks(&q, &p, |first, s| {
            let rows = s.par_chunks_exact(a.shape.passages.rows).zip(&targets[first..]);
            let out = loss[first..].par_iter_mut().zip(&mut lse[first..]).zip(&mut correct[first..]);
            let out = out.zip(parts[2 * first..].par_chunks_exact_mut(2));
            rows.zip(out).for_each(|((s, &own), (((loss, lse), correct), parts))| {
                vectorized(|| {
                    let top = max(s);
                    let sum = sum1(
                        s,
                        #[inline(always)]
                        |x| (x - top).exp(),
                    );
                    let units = F::of(std::f64::consts::LOG2_E);
                    (parts[0], parts[1]) = (top * units, sum.ln() * units);
                    *lse = parts[0] + parts[1];
                    *loss = (top - s[own as usize]) + sum.ln();
                    *correct = u32::from(s[own as usize] >= top);
                });
            });
        });
    }

    pub fn backward<F: Real>(a: &Backward<'_>) {
        let (passages, Shape { width: c, targets, .. }) = (a.shape.passages.rows, a.shape);
        let (q, p, targets) = (a.q.read::<F>(), a.p.read::<F>(), targets.read::<u32>());
        let (mut dq, mut dp) = (a.dq.write::<F>(), a.dp.write::<F>());
        let weight = F::of(a.scale.value / f64::from(a.shape.temperature));
        a.shape.blocks(&q, &p, |first, g| {
            let rows = g.par_chunks_exact_mut(passages).zip(&targets[first..]);
            rows.for_each(|(g, &own)| {
                vectorized(|| {
                    // As a softmax, so that a query's probabilities sum to 1: gradients are differences of much larger terms.
                    let top = max(g);
                    for g in g.iter_mut() {
                        *g = (*g - top).exp();
                    }
                    let inverse = F::ONE / sum1(g, |g| g);
                    for g in g.iter_mut() {
                        *g *= inverse;
                    }
                    g[own as usize] = g[own as usize] - F::ONE;
                });
            });
            let rows = g.len() / passages;
            let (g, x, y) = (View::rows(&*g, passages), View::rows(&q[first * c..], c), View::rows(&p, c));
            gemm((rows, c, passages), weight, g, y, &mut dq[first * c..], c, Output::Set, Threads::All);
            let output = if first == 0 { Output::Set } else { Output::Add };
            gemm((passages, c, rows), weight, g.t(), x, &mut dp, c, output, Threads::All);
        });
    }
}

/// Rows of a block of the kernels, and columns of the gradient that it holds.
fn rows_of_block(storage: DType) -> usize {
    if storage == DType::BF16 { 64 } else { 32 }
}
const WINDOW: usize = 768;

/// In how many parts the rows of one side's gradient go over the other side on a GPU of so many multiprocessors; several are summed up by
/// a kernel of their own.
pub fn splits(multiprocessors: u32, storage: DType, width: usize, [own, other]: [usize; 2]) -> u32 {
    parts(multiprocessors, rows_of_block(storage), width.div_ceil(WINDOW), [own, other])
}

/// Splits of the other side where blocks of `rows` rows of one side are too few to fill the GPU.
fn parts(multiprocessors: u32, rows: usize, windows: usize, [own, other]: [usize; 2]) -> u32 {
    let fill = multiprocessors / (own.div_ceil(rows) * windows).max(1) as u32;
    fill.clamp(1, other.div_ceil(8 * rows).max(1) as u32)
}

/// The launches of `contrastive.cu`.
mod gpu {
    use super::super::Count;
    use super::super::gpu::{blocks, launch, launch_as};
    use super::{Backward, Forward, Shape};
    use crate::device::gpu::Gpu;
    use crate::device::kernels::Contrastive;
    use crate::device::launch::{ConstPtr, MutPtr, Shape as Launch};
    use crate::device::{DType, Tensor};

    /// How a kernel cuts its work.
    struct Cut {
        /// Rows of a block, and bytes of its tiles of them.
        rows: usize,
        tile_bytes: usize,
        /// Columns of the gradient that a block holds.
        window: usize,
    }

    impl Cut {
        fn new(storage: &Tensor, width: usize) -> Cut {
            let rows = super::rows_of_block(storage.dtype());
            Cut { rows, tile_bytes: rows * 128 * width.div_ceil(rows), window: super::WINDOW }
        }

        /// Blocks of rows of one side, and splits of the other side where these are too few to fill the GPU.
        fn grid(&self, gpu: &Gpu, own: Count<'_>, other: Count<'_>, windows: usize) -> [u32; 3] {
            let splits = super::parts(gpu.facts().multiprocessors, self.rows, windows, [own.rows, other.rows]);
            [blocks(own.rows, self.rows), splits, windows as u32]
        }
    }

    fn shared(shape: &Shape<'_>) -> Contrastive {
        Contrastive {
            targets: shape.targets.get(),
            hidden: shape.hidden.map_or(ConstPtr::null(), |h| h.get()),
            queries: shape.queries.get(),
            passages: shape.passages.get(),
            words: shape.passages.rows.div_ceil(32) as i32,
            C: shape.width as i32,
            inverse_temperature: 1.0 / shape.temperature,
        }
    }

    pub fn forward(gpu: &Gpu, a: &Forward<'_>) {
        let (shape, cut) = (&a.shape, Cut::new(a.q, a.shape.width));
        let grid = cut.grid(gpu, shape.queries, shape.passages, 1);
        let (capacity, splits) = (shape.queries.rows, grid[1] as usize);
        let part_max: MutPtr<f32> = gpu.scratch((2 * splits + 1) * capacity);
        let part_sum = part_max.offset(splits * capacity);
        let target_score = part_sum.offset(splits * capacity);
        let launch = Launch { grid, ..Launch::linear(1, 256).shared((cut.tile_bytes + 65536) as u32) };
        launch_as!(
            gpu,
            a.q,
            launch,
            ContrastiveForwardF32
                | ContrastiveForwardBf16 {
                    part_max,
                    part_sum,
                    target_score,
                    q: a.q.get(),
                    p: a.p.get(),
                    a: shared(shape),
                    capacity: capacity as i32,
                }
        );
        launch!(
            gpu,
            Launch::linear(blocks(capacity, 256), 256),
            ContrastiveLoss {
                loss: a.loss.get_mut(),
                lse: a.lse.get_mut().offset(2 * capacity),
                parts: a.lse.get_mut(),
                correct: a.correct.get_mut(),
                part_max: part_max.into(),
                part_sum: part_sum.into(),
                target_score: target_score.into(),
                queries: shape.queries.get(),
                capacity: capacity as i32,
                splits: splits as i32,
            }
        );
    }

    pub fn backward(gpu: &Gpu, a: &Backward<'_>) {
        let (shape, cut) = (&a.shape, Cut::new(a.q, a.shape.width));
        let scale: Option<ConstPtr<f32>> = a.scale.on_device.map(|s| s.get());
        let scale = scale.unwrap_or_else(|| panic!("the contrastive loss needs its scale in device memory"));
        let windows = shape.width.div_ceil(cut.window);
        // Behind the parts.
        let lse_at = if a.q.dtype() == DType::BF16 { 2 * shape.queries.rows } else { 0 };
        for (own, other, dx) in [(shape.queries, shape.passages, a.dq), (shape.passages, shape.queries, a.dp)] {
            let grid = cut.grid(gpu, own, other, windows);
            let (capacity, splits) = (own.rows, grid[1] as usize);
            let partial: MutPtr<f32> =
                if splits > 1 { gpu.scratch(splits * capacity * shape.width) } else { MutPtr::null() };
            let launch = Launch { grid, ..Launch::linear(1, 256).shared((cut.tile_bytes + 40960) as u32) };
            macro_rules! queue {
                ($f32:ident | $bf16:ident) => {
                    launch_as!(
                        gpu,
                        dx,
                        launch,
                        $f32 | $bf16 {
                            dx: dx.get_mut(),
                            partial,
                            q: a.q.get(),
                            p: a.p.get(),
                            lse: a.lse.get().offset(lse_at),
                            scale,
                            a: shared(shape),
                            capacity: capacity as i32,
                        }
                    )
                };
            }
            if std::ptr::eq(dx, a.dq) {
                queue!(ContrastiveBackwardQueriesF32 | ContrastiveBackwardQueriesBf16);
            } else {
                queue!(ContrastiveBackwardPassagesF32 | ContrastiveBackwardPassagesBf16);
            }
            if splits > 1 {
                let grid = Launch::linear(blocks(capacity * shape.width, 2048), 256);
                launch_as!(
                    gpu,
                    dx,
                    grid,
                    ContrastiveGradientF32
                        | ContrastiveGradientBf16 {
                            dx: dx.get_mut(),
                            partial: partial.into(),
                            rows: own.get(),
                            C: shape.width as i32,
                            capacity: capacity as i32,
                            splits: splits as i32,
                        }
                );
            }
        }
    }
}
