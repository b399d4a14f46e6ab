//! In-batch-negative contrastive loss by tiles.

use crate::harness::*;
use half::bf16;
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::kernels::*;
use retromae_engine::device::launch::{ConstPtr, MutPtr, Shape};
use retromae_engine::device::{DType, Device, Tensor};
use retromae_engine::error::Result;
use retromae_engine::ops::contrastive;

/// Rows of the capacity that are not in use.
const SPARE: usize = 70;

const SCALE: f32 = 0.125;

#[derive(Clone, Copy)]
struct Case {
    queries: usize,
    passages: usize,
    width: usize,
    temperature: f32,
    /// Whether some pairs are no candidates.
    hides: bool,
    /// Shares of the other side's rows.
    splits: usize,
    /// Windows of 384 columns in bf16.
    narrow: bool,
}

const PLAIN: Case =
    Case { queries: 3, passages: 6, width: 16, temperature: 0.5, hides: false, splits: 1, narrow: false };

/// Buffers of the kernels.
struct On<'a, T> {
    shared: Contrastive,
    q: ConstPtr<T>,
    p: ConstPtr<T>,
    lse: &'a Buffer<f32>,
    parts: &'a Buffer<f32>,
    scale: &'a Buffer<f32>,
}

/// Rows of one side on a device.
struct Side {
    capacity: usize,
    count: Buffer<i32>,
}

/// Entry points of one storage type.
trait Kernels: Storage {
    /// Rows of a block, columns of a chunk and of a window.
    const TILE: [usize; 3];
    fn forward(device: &'static Gpu, at: Shape, on: &On<Self>, parts: [MutPtr<f32>; 3], capacity: i32) -> Result<()>;
    fn backward(
        device: &'static Gpu,
        at: Shape,
        kind: Kind,
        on: &On<Self>,
        to: (MutPtr<Self>, MutPtr<f32>),
        capacity: i32,
    ) -> Result<()>;
    fn gradient(
        device: &'static Gpu,
        to: MutPtr<Self>,
        partial: &Buffer<f32>,
        side: &Side,
        sizes: (usize, usize),
    ) -> Result<()>;
}

/// Which backward.
#[derive(Clone, Copy, Debug)]
struct Kind {
    by_query: bool,
    narrow: bool,
}

macro_rules! kernels {
    ($t:ty, $tile:expr, $forward:ident, $queries:ident, $passages:ident, $few_queries:ident, $few_passages:ident, $gradient:ident) => {
        impl Kernels for $t {
            const TILE: [usize; 3] = $tile;

            fn forward(
                device: &'static Gpu,
                at: Shape,
                on: &On<$t>,
                parts: [MutPtr<f32>; 3],
                capacity: i32,
            ) -> Result<()> {
                let ([part_max, part_sum, target_score], a, q, p) = (parts, on.shared, on.q, on.p);
                $forward { part_max, part_sum, target_score, q, p, a, capacity }.launch(device, at)
            }

            fn backward(
                device: &'static Gpu,
                at: Shape,
                kind: Kind,
                on: &On<$t>,
                (dx, partial): (MutPtr<$t>, MutPtr<f32>),
                capacity: i32,
            ) -> Result<()> {
                let lse = if <$t>::ROUNDS { on.lse.get() } else { on.parts.get() };
                let (a, q, p, scale) = (on.shared, on.q, on.p, on.scale.get());
                match (kind.by_query, kind.narrow) {
                    (true, false) => $queries { dx, partial, q, p, lse, scale, a, capacity }.launch(device, at),
                    (false, false) => $passages { dx, partial, q, p, lse, scale, a, capacity }.launch(device, at),
                    (true, true) => $few_queries { dx, partial, q, p, lse, scale, a, capacity }.launch(device, at),
                    (false, true) => $few_passages { dx, partial, q, p, lse, scale, a, capacity }.launch(device, at),
                }
            }

            fn gradient(
                device: &'static Gpu,
                dx: MutPtr<$t>,
                partial: &Buffer<f32>,
                side: &Side,
                (width, splits): (usize, usize),
            ) -> Result<()> {
                let (rows, c, capacity) = (side.count.get(), width as i32, side.capacity as i32);
                $gradient { dx, partial: partial.get(), rows, C: c, capacity, splits: splits as i32 }
                    .launch(device, Shape::linear((side.capacity * width).div_ceil(2048) as u32, 256))
            }
        }
    };
}
kernels!(
    f32,
    [32, 32, 768],
    ContrastiveForwardF32,
    ContrastiveBackwardQueriesF32,
    ContrastiveBackwardPassagesF32,
    ContrastiveBackwardQueriesF32,
    ContrastiveBackwardPassagesF32,
    ContrastiveGradientF32
);
kernels!(
    bf16,
    [64, 64, 768],
    ContrastiveForwardBf16,
    ContrastiveBackwardQueriesBf16,
    ContrastiveBackwardPassagesBf16,
    ContrastiveBackwardQueriesNarrowBf16,
    ContrastiveBackwardPassagesNarrowBf16,
    ContrastiveGradientBf16
);

/// The log-sum-exp out of its two parts, whose sum it must be.
fn natural(parts: &[f32], lse: &[f32]) -> Vec<f32> {
    assert!(parts.chunks(2).zip(lse).all(|(x, lse)| x[0] + x[1] == *lse));
    parts.chunks(2).map(|x| ((f64::from(x[0]) + f64::from(x[1])) * std::f64::consts::LN_2) as f32).collect()
}

impl Case {
    fn q<T: Storage>(&self) -> Vec<f32> {
        rounded::<T>(&normal(self.queries * self.width, 1))
    }

    fn p<T: Storage>(&self) -> Vec<f32> {
        // Scores of size 1 or so, before the temperature.
        let deviation = 1.0 / (self.width as f32).sqrt();
        rounded::<T>(&normal(self.passages * self.width, 2).iter().map(|x| x * deviation).collect::<Vec<_>>())
    }

    fn targets(&self) -> Vec<u32> {
        let group = (self.passages / self.queries).max(1);
        (0..self.queries).map(|b| (b * group % self.passages) as u32).collect()
    }

    /// A quarter of all bits, also of targets and past the last passage.
    fn hidden(&self) -> Vec<u32> {
        let words = below(2 * self.queries * self.passages.div_ceil(32), u32::MAX, 8);
        words.chunks(2).map(|w| w[0] & w[1]).collect()
    }

    /// Losses, lse, dq, dp on the emulator.
    fn run<T: Kernels>(&self, device: &'static Gpu) -> Vec<Vec<f32>> {
        let Case { queries, passages, width, splits, .. } = *self;
        let side = |rows: usize| Side { capacity: rows + SPARE, count: Buffer::of(device, &[rows as i32]) };
        let (sides, room) = ([side(queries), side(passages)], SPARE * width);
        let (q, p) = (stored::<T>(device, &self.q::<T>(), room), stored::<T>(device, &self.p::<T>(), room));
        let targets = Buffer::with_room(device, &self.targets(), queries + SPARE);
        let hidden = Buffer::of(device, &self.hidden());
        let [loss, lse, parts] = [1, 1, 2].map(|each| Buffer::poisoned(device, each * (queries + SPARE)));
        let shared = Contrastive {
            targets: targets.get(),
            hidden: if self.hides { hidden.get() } else { ConstPtr::null() },
            queries: sides[0].count.get(),
            passages: sides[1].count.get(),
            words: passages.div_ceil(32) as i32,
            C: width as i32,
            inverse_temperature: 1.0 / self.temperature,
        };
        let scale = Buffer::of(device, &[SCALE]);
        let on = On { shared, q: q.get(), p: p.get(), lse: &lse, parts: &parts, scale: &scale };
        self.forward(device, &on, &sides[0], &loss);
        let dq = self.backward(device, &on, true, &sides[0], queries);
        let dp = self.backward(device, &on, false, &sides[1], passages);
        assert!(splits > 0);
        vec![loss.take(queries), natural(&parts.take(2 * queries), &lse.take(queries)), dq, dp]
    }

    fn forward<T: Kernels>(&self, device: &'static Gpu, on: &On<T>, side: &Side, loss: &Buffer<f32>) {
        let (splits, capacity) = (self.splits, side.capacity);
        let parts = [splits * capacity, splits * capacity, capacity].map(|n| Buffer::<f32>::poisoned(device, n));
        let [part_max, part_sum, target_score] = parts.each_ref();
        let [rows, chunk, _] = T::TILE;
        let shape = Shape {
            grid: [capacity.div_ceil(rows) as u32, splits as u32, 1],
            ..Shape::linear(1, 256).shared((rows * 128 * self.width.div_ceil(chunk) + 65_536) as u32)
        };
        T::forward(device, shape, on, parts.each_ref().map(Buffer::get_mut), capacity as i32)
            .expect("a correct kernel raises nothing");
        let correct = Buffer::<u32>::poisoned(device, capacity);
        ContrastiveLoss {
            loss: loss.get_mut(),
            lse: on.lse.get_mut(),
            parts: on.parts.get_mut(),
            correct: correct.get_mut(),
            part_max: part_max.get(),
            part_sum: part_sum.get(),
            target_score: target_score.get(),
            queries: side.count.get(),
            capacity: capacity as i32,
            splits: splits as i32,
        }
        .launch(device, Shape::linear(capacity.div_ceil(256) as u32, 256))
        .expect("a correct kernel raises nothing");
        // A loss below ln 2 leaves no other candidate as much probability as the query's own passage.
        let (correct, loss) = (correct.take(self.queries), loss.take(self.queries));
        assert!(correct.iter().zip(&loss).all(|(&c, &loss)| c <= 1 && (c == 1 || loss >= 0.693)));
    }

    fn backward<T: Kernels>(
        &self,
        device: &'static Gpu,
        on: &On<T>,
        by_query: bool,
        side: &Side,
        used: usize,
    ) -> Vec<f32> {
        let (splits, capacity, width) = (self.splits, side.capacity, self.width);
        let [rows, chunk, window] = T::TILE;
        let narrow = self.narrow && T::ROUNDS;
        let window = if narrow { 384 } else { window };
        let shape = Shape {
            grid: [capacity.div_ceil(rows) as u32, splits as u32, width.div_ceil(window) as u32],
            ..Shape::linear(1, 256).shared((rows * 128 * width.div_ceil(chunk) + 40_960) as u32)
        };
        let dx = Buffer::<T>::poisoned(device, capacity * width);
        let partial = Buffer::<f32>::poisoned(device, if splits > 1 { splits * capacity * width } else { 0 });
        let to = (dx.get_mut(), if splits > 1 { partial.get_mut() } else { MutPtr::null() });
        T::backward(device, shape, Kind { by_query, narrow }, on, to, capacity as i32)
            .expect("a correct kernel raises nothing");
        if splits > 1 {
            T::gradient(device, dx.get_mut(), &partial, side, (width, splits))
                .expect("a correct kernel raises nothing");
        }
        widened(dx.take(used * width))
    }

    /// The CPU's op. f64: exact; f32 to compare large cases with.
    fn on_cpu<T: Storage>(&self, dtype: DType) -> [Vec<f64>; 4] {
        let Case { queries, passages, width, temperature, .. } = *self;
        let tensor = |x: Vec<f32>| match dtype {
            DType::F64 => Tensor::from_slice(&f64s(&x)),
            _ => Tensor::from_slice(&x),
        };
        let (q, p) = (tensor(self.q::<T>()), tensor(self.p::<T>()));
        let (targets, hidden) = (Tensor::from_slice(&self.targets()), Tensor::from_slice(&self.hidden()));
        let hidden = self.hides.then_some(&hidden);
        let (targets, q_rows, p_rows) = (&targets, queries.into(), passages.into());
        let shape = contrastive::Shape { queries: q_rows, passages: p_rows, width, temperature, targets, hidden };
        let [loss, lse, dq, dp] =
            [queries, 3 * queries, queries * width, passages * width].map(|n| Tensor::zeros(dtype, n));
        let correct = Tensor::from_slice(&vec![0u32; queries]);
        let (q, p) = (&q, &p);
        let forward = contrastive::Forward { shape, q, p, loss: &loss, lse: &lse, correct: &correct };
        contrastive::forward(Device::Cpu, &forward);
        let scale = f64::from(SCALE).into();
        let backward = contrastive::Backward { shape, scale, q, p, lse: &lse, dq: &dq, dp: &dp };
        contrastive::backward(Device::Cpu, &backward);
        let wide = |t: &Tensor| match dtype {
            DType::F64 => t.to_vec::<f64>(),
            _ => f64s(&t.to_vec::<f32>()),
        };
        let lse = wide(&lse)[..2 * queries].chunks(2).map(|x| (x[0] + x[1]) * std::f64::consts::LN_2).collect();
        [wide(&loss), lse, wide(&dq), wide(&dp)]
    }

    /// dq and dp of a plain bf16 implementation: it rounds the gradient of the scores before it multiplies, and its results.
    fn plain<T: Storage>(&self, lse: &[f64]) -> [Vec<f32>; 2] {
        let (q, p, targets, hidden) = (self.q::<T>(), self.p::<T>(), self.targets(), self.hidden());
        let (c, words) = (self.width, self.passages.div_ceil(32));
        let (mut dq, mut dp) = (vec![0f32; q.len()], vec![0f32; p.len()]);
        let weight = SCALE / self.temperature;
        for b in 0..self.queries {
            for i in 0..self.passages {
                let own = targets[b] as usize == i;
                if self.hides && !own && hidden[b * words + i / 32] >> (i % 32) & 1 == 1 {
                    continue;
                }
                let (q, p) = (&q[b * c..(b + 1) * c], &p[i * c..(i + 1) * c]);
                let score = q.iter().zip(p).map(|(q, p)| q * p).sum::<f32>() / self.temperature;
                let g = (score - lse[b] as f32).exp() - f32::from(u8::from(own));
                let g = round::<T>(g) * weight;
                for e in 0..c {
                    dq[b * c + e] += g * p[e];
                    dp[i * c + e] += g * q[e];
                }
            }
        }
        [rounded::<T>(&dq), rounded::<T>(&dp)]
    }

    fn check<T: Kernels>(&self) {
        let got = in_every_order(|device| self.run::<T>(device));
        let [loss, lse, dq, dp] = self.on_cpu::<T>(DType::F64);
        let [plain_dq, plain_dp] = self.plain::<T>(&lse);
        // Products of bf16 are exact in f32, so these are as good in bf16.
        judge::<f32>("loss", &got[0], &loss, &[]);
        judge::<f32>("lse", &got[1], &lse, &[]);
        judge::<T>("dq", &got[2], &dq, &plain_dq);
        judge::<T>("dp", &got[3], &dp, &plain_dp);
    }

    fn check_both(&self) {
        self.check::<f32>();
        self.check::<bf16>();
    }
}

#[test]
fn less_than_a_tile() {
    PLAIN.check_both();
}

/// No negatives: the loss and all gradients are 0.
#[test]
fn one_query_and_its_passage_alone() {
    Case { queries: 1, passages: 1, ..PLAIN }.check_both();
}

/// One row and one column past the tiles' borders (64 or 32 rows; 64 and 128 columns), C past a chunk's.
#[test]
fn one_past_every_border() {
    Case { queries: 65, passages: 129, width: 80, ..PLAIN }.check_both();
}

#[test]
fn whole_tiles_and_more_chunks_than_stages() {
    Case { queries: 64, passages: 128, width: 384, ..PLAIN }.check_both();
}

#[test]
fn fewer_passages_than_queries() {
    Case { queries: 40, passages: 7, ..PLAIN }.check_both();
}

/// The last word of bits is not full; a second tile of columns has its own bits.
#[test]
fn hidden_pairs() {
    Case { queries: 20, passages: 150, hides: true, ..PLAIN }.check_both();
}

/// Three tiles of columns in two splits, and more splits than tiles, so that some have nothing to add.
#[test]
fn splits() {
    Case { queries: 9, passages: 300, hides: true, splits: 2, ..PLAIN }.check_both();
    Case { queries: 70, passages: 10, splits: 3, ..PLAIN }.check_both();
}

/// Columns past a window: its gradient is computed by a second block from the same scores.
#[test]
fn widths_over_a_window() {
    Case { queries: 5, passages: 9, width: 784, ..PLAIN }.check_both();
    Case { queries: 5, passages: 9, width: 400, narrow: true, splits: 2, ..PLAIN }.check_both();
}

/// As in fine-tuning of normalised embeddings.
#[test]
fn a_low_temperature() {
    Case { queries: 16, passages: 64, width: 768, temperature: 0.1, ..PLAIN }.check_both();
}

/// A batch of a real size. In f32 the CPU's f32 is exact enough to compare with.
#[test]
fn a_large_batch() {
    let case = Case { queries: 512, passages: 4096, width: 64, ..PLAIN };
    let device = gpu();
    let got = case.run::<bf16>(device);
    let [loss, lse, dq, dp] = case.on_cpu::<bf16>(DType::F32);
    judge::<f32>("loss", &got[0], &loss, &[]);
    judge::<f32>("lse", &got[1], &lse, &[]);
    let [plain_dq, plain_dp] = case.plain::<bf16>(&lse);
    judge::<bf16>("dq", &got[2], &dq, &plain_dq);
    judge::<bf16>("dp", &got[3], &dp, &plain_dp);
    let got = case.run::<f32>(device);
    let want = case.on_cpu::<f32>(DType::F32);
    for (name, (got, want)) in ["loss", "lse", "dq", "dp"].into_iter().zip(got.iter().zip(&want)) {
        judge::<f32>(name, got, want, &[]);
    }
}
