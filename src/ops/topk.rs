//! Exact top-k search by inner product: for each query the k best of all rows seen so far, over any number of blocks of rows.
//!
//! `s[b, i] = q[b] · x[i]`; a row comes before another when its score is higher, or equal and its number lower. That is a strict order and
//! a score depends on nothing but its two rows, so results are the same bits whatever blocks the rows came in. Scores of −0 count as 0;
//! no input may be NaN. A number must not come twice.
//!
//! On a GPU, N rows of width W against Q queries cost `2 Q N W` FLOP. Memory moves `N W + Q W` elements and `16 Q k` bytes of lists: scores
//! stay in registers, except those that come before the k-th best of their query as it was known then. These go to a bounded list, 8 bytes
//! each, about k ln(N / k) a query when rows come in no order, all N when each is better than the one before. Windows of rows are no larger
//! than the room in it, so it cannot overflow, and a second kernel merges it into the k best. Memory is [`TopK::bytes`], whatever N.

use crate::device::{DType, Device, Tensor};
use crate::error::{Error, Result};

/// Largest k: a query's best and as many candidates are sorted in shared memory.
pub const MAX_K: usize = 4096;

/// Keys of candidates on a GPU, 512 MiB of them, when the queries are not too many for it.
const BUDGET: usize = 1 << 26;

/// Rows that a launch goes over, at most and at least.
const WINDOWS: [usize; 2] = [1 << 20, 256];

/// Sizes of a search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Q, the most queries at a time.
    pub queries: usize,
    /// W; on a GPU a multiple of 8.
    pub width: usize,
    /// Best rows to keep, at most [`MAX_K`].
    pub k: usize,
}

impl Shape {
    /// Whether a search of this shape is possible on the device. Refused: k of 0 or above [`MAX_K`], and on a GPU a width that is no
    /// multiple of 8.
    pub fn check(&self, device: Device) -> Result<()> {
        let Shape { width, k, .. } = *self;
        if k == 0 || k > MAX_K {
            return Err(Error::usage(format!("the {k} best rows{}", if device.is_gpu() { " on a GPU" } else { "" }))
                .remedy(format!(
                    "ask for 1 to {MAX_K}{}",
                    if device.is_gpu() { ", or use --device cpu" } else { "" }
                )));
        }
        if device.is_gpu() && (width == 0 || !width.is_multiple_of(8)) {
            return Err(Error::usage(format!("embeddings of width {width} on a GPU"))
                .remedy("use a multiple of 8, or --device cpu"));
        }
        Ok(())
    }
}

/// A search in progress.
pub struct TopK {
    device: Device,
    shape: Shape,
    /// The queries and their number.
    queries: Option<(Tensor, usize)>,
    /// `[Q, k]` f32, descending; −∞ where fewer rows were seen.
    scores: Tensor,
    /// `[Q, k]` u32; `u32::MAX` where fewer rows were seen.
    rows: Tensor,
    /// What may join the best, on a GPU.
    candidates: Option<Candidates>,
}

/// Rows that came before the k-th best when they were seen.
struct Candidates {
    /// `[Q, window + reserve]` u64.
    keys: Tensor,
    /// `[Q]` u32.
    counts: Tensor,
    /// Most rows that a launch goes over.
    window: usize,
    /// Candidates that a query may have before a window: no more are left unmerged.
    reserve: usize,
    /// Rows since the start.
    seen: usize,
}

impl TopK {
    /// Memory for a search. Refused: what [`Shape::check`] refuses.
    pub fn new(device: Device, shape: Shape) -> Result<TopK> {
        let room = (BUDGET / shape.queries.max(1)).saturating_sub(reserve(shape.k)) / WINDOWS[1] * WINDOWS[1];
        TopK::with_window(device, shape, room.clamp(WINDOWS[1], WINDOWS[0]))
    }

    /// The same with at most `window` rows a launch on a GPU, for which there is room in the lists of candidates.
    pub fn with_window(device: Device, shape: Shape, window: usize) -> Result<TopK> {
        shape.check(device)?;
        let Shape { queries, k, .. } = shape;
        let (reserve, window) = (reserve(k), window.max(1));
        let candidates = device.is_gpu().then(|| Candidates {
            keys: device.zeros(DType::U64, queries * (window + reserve)),
            counts: device.zeros(DType::U32, queries),
            window,
            reserve,
            seen: 0,
        });
        let (scores, rows) = (device.zeros(DType::F32, queries * k), device.zeros(DType::U32, queries * k));
        device.check()?;
        Ok(TopK { device, shape, queries: None, scores, rows, candidates })
    }

    /// Bytes of memory of a search on its device, besides queries and rows: `O(Q (k + window))`.
    pub fn bytes(&self) -> usize {
        let lists = self.candidates.as_ref().map_or(0, |c| 8 * c.keys.len() + 4 * c.counts.len());
        4 * (self.scores.len() + self.rows.len()) + lists
    }

    /// Begins anew with the first `count` rows of `q`, `[count, W]`, which is read by every [`Self::add`] that follows.
    pub fn start(&mut self, q: &Tensor, count: usize) {
        let Shape { queries, width, .. } = self.shape;
        assert!(count <= queries && count * width <= q.len(), "{count} queries, room for {queries}");
        self.queries = Some((q.clone(), count));
        match self.device {
            Device::Cpu => cpu::clear(self),
            Device::Gpu(gpu) => gpu::clear(gpu, self, count),
        }
    }

    /// Goes over `n` rows of the queries' type, `[n, W]`; the first is number `first_row`, the others follow.
    pub fn add(&mut self, x: &Tensor, n: usize, first_row: u32) {
        let Some((q, count)) = self.queries.clone() else { panic!("rows before the queries") };
        assert!(n * self.shape.width <= x.len() && q.dtype() == x.dtype(), "{n} rows of a search");
        assert!(n as u64 + u64::from(first_row) <= u64::from(u32::MAX), "row numbers beyond 32 bits");
        match self.device {
            Device::Cpu => super::on_cpu!(q, cpu::add, self, &q, count, x, n, first_row),
            Device::Gpu(gpu) => gpu::add(gpu, self, (&q, count), x, n, first_row),
        }
    }

    /// Scores and numbers of the best rows so far, `[count, k]`, best first; −∞ and `u32::MAX` where fewer were seen. Rows may follow.
    pub fn results(&mut self) -> (Vec<f32>, Vec<u32>) {
        let count = self.queries.as_ref().map_or(0, |(_, count)| *count);
        if let Device::Gpu(gpu) = self.device {
            gpu::merge(gpu, self, count, 0);
        }
        let used = 0..count * self.shape.k;
        (self.scores.slice(used.clone()).to_vec(), self.rows.slice(used).to_vec())
    }
}

/// Keys that are sorted at a time.
fn size(k: usize) -> usize {
    k.next_power_of_two().max(256)
}

/// Candidates of a query that need not be merged yet.
fn reserve(k: usize) -> usize {
    2 * size(k)
}

/// The reference: all scores of a query with a block, sorted with what was best before.
mod cpu {
    use super::TopK;
    use crate::device::Tensor;
    use crate::device::cpu::{Real, sum2, vectorized};
    use rayon::prelude::*;

    pub fn clear(t: &TopK) {
        t.scores.write::<f32>().fill(f32::NEG_INFINITY);
        t.rows.write::<u32>().fill(u32::MAX);
    }

    pub fn add<F: Real>(t: &TopK, q: &Tensor, count: usize, x: &Tensor, n: usize, first_row: u32) {
        let (width, k) = (t.shape.width, t.shape.k);
        let (q, x) = (q.read::<F>(), x.read::<F>());
        let (mut scores, mut rows) = (t.scores.write::<f32>(), t.rows.write::<u32>());
        let best = scores.par_chunks_exact_mut(k).zip(rows.par_chunks_exact_mut(k));
        best.zip(q[..count * width].par_chunks_exact(width)).for_each(|((scores, rows), q)| {
            let mut all: Vec<(f32, u32)> = scores.iter().copied().zip(rows.iter().copied()).collect();
            vectorized(|| {
                let block = x[..n * width].chunks_exact(width).zip(first_row..);
                // Adding 0 leaves no −0, which `total_cmp` puts below 0.
                all.extend(block.map(|(x, row)| (sum2(q, x, |q, x| q * x).f64() as f32 + 0.0, row)));
            });
            all.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            for ((score, row), best) in scores.iter_mut().zip(rows.iter_mut()).zip(&all) {
                (*score, *row) = *best;
            }
        });
    }
}

/// The launches of `topk.cu`.
mod gpu {
    use super::super::gpu::{blocks, launch, launch_as};
    use super::{Candidates, TopK, size};
    use crate::device::gpu::Gpu;
    use crate::device::kernels::TopKState;
    use crate::device::launch::Shape;
    use crate::device::{DType, Tensor};

    /// Windows after which the lists are as good as final, so that merging can wait until they fill up.
    const EARLY: usize = 8;

    fn state(t: &TopK, c: &Candidates) -> TopKState {
        TopKState {
            scores: t.scores.get_mut(),
            rows: t.rows.get_mut(),
            candidates: c.keys.get_mut(),
            counts: c.counts.get_mut(),
            k: t.shape.k as i32,
            capacity: (c.window + c.reserve) as i32,
        }
    }

    pub fn clear(gpu: &Gpu, t: &mut TopK, count: usize) {
        if let Some(candidates) = &mut t.candidates {
            candidates.seen = 0;
        }
        let Some(candidates) = &t.candidates else { return };
        let grid = Shape::linear(blocks(count * t.shape.k, 256), 256);
        launch!(gpu, grid, TopkClear { state: state(t, candidates), Q: count as i32 });
    }

    /// Merges the candidates of queries that have more than `trigger`.
    pub fn merge(gpu: &Gpu, t: &TopK, count: usize, trigger: usize) {
        let Some(candidates) = &t.candidates else { return };
        let (size, state) = (size(t.shape.k), state(t, candidates));
        let shape = Shape::linear(count as u32, 512).shared(16 * size as u32);
        launch!(gpu, shape, TopkMerge { state, size: size as i32, trigger: trigger as u32 });
    }

    /// Queries and rows of a tile, and blocks of a multiprocessor.
    fn tile(dtype: DType) -> (usize, usize, u32) {
        if dtype == DType::F16 { (128, 256, 1) } else { (64, 64, 3) }
    }

    /// Chunks of `bytes` that a block keeps, of which one is worked on: three, where the resident blocks' fit a multiprocessor. That holds
    /// little more than one block may ask for: 227 KB on sm_90, 163 on sm_80, 99 on sm_86 and sm_89.
    fn stages(gpu: &Gpu, resident: u32, bytes: u32) -> u32 {
        if resident * 3 * bytes <= gpu.facts().shared_bytes { 3 } else { 2 }
    }

    pub fn add(gpu: &Gpu, t: &mut TopK, (q, count): (&Tensor, usize), x: &Tensor, n: usize, first_row: u32) {
        let (width, (queries, columns, resident)) = (t.shape.width, tile(q.dtype()));
        let chunk = 128 * (queries + columns) as u32;
        let stages = stages(gpu, resident, chunk);
        let mut done = 0;
        while done < n {
            let Some(c) = &t.candidates else { return };
            // The first windows double: only what was seen tells which rows matter.
            let window = c.window.min(c.seen.max(c.reserve).next_multiple_of(columns)).min(n - done);
            let tiles = blocks(count, queries) as usize * window.div_ceil(columns);
            let grid = (gpu.facts().multiprocessors * resident).min(tiles as u32);
            launch_as!(
                gpu,
                q,
                Shape::linear(grid, 256).shared(stages * chunk),
                F32: TopkScanF32 | F16: TopkScanF16 {
                    state: state(t, c),
                    q: q.get(),
                    x: x.get().offset(done * width),
                    Q: count as i32,
                    N: window as i32,
                    W: width as i32,
                    first_row: first_row + done as u32,
                    stages: stages as i32,
                }
            );
            merge(gpu, t, count, if c.seen < EARLY * c.window { 0 } else { c.reserve });
            done += window;
            if let Some(c) = &mut t.candidates {
                c.seen += window;
            }
        }
    }
}
