//! Exact top-k search by tiles, with values whose products are exact: results must equal a sort bit for bit, ties included.

use crate::harness::*;
use half::f16;
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::kernels::*;
use retromae_engine::device::launch::Shape;
use retromae_engine::error::Result;

/// Queries and rows that are not in use.
const SPARE: usize = 3;

/// Number of the first row.
const FIRST: u32 = 1_000_000;

/// What the rows are like.
#[derive(Clone, Copy)]
enum Values {
    /// Integers of -2 to 2 in all places: many equal scores.
    Small,
    /// Nothing but zeros.
    Zero,
    /// Every row is better than all before it: everything is a candidate, the first rows never remain.
    Rising,
    /// Every row is worse than all before it: nothing is a candidate once there are k.
    Falling,
    /// Eleven digits, with which f16 is full, and numbers that it only has as denormals; the rows in two copies, a row of zeros in each.
    Half,
}

#[derive(Clone, Copy)]
struct Case {
    queries: usize,
    rows: usize,
    width: usize,
    k: usize,
    /// Rows of a scan.
    window: usize,
    /// Candidates that a query may keep.
    trigger: usize,
    /// Blocks of a scan.
    blocks: u32,
    /// Chunks in a scan's ring, 2 or 3.
    stages: u32,
    values: Values,
}

const PLAIN: Case = Case {
    queries: 3,
    rows: 10,
    width: 16,
    k: 4,
    window: 2000,
    trigger: 0,
    blocks: 2,
    stages: 3,
    values: Values::Small,
};

/// One scan.
struct Scan<'a, T> {
    state: TopKState,
    q: &'a Buffer<T>,
    x: &'a Buffer<T>,
    from: usize,
    rows: usize,
}

/// Entry points of one storage type.
trait Kernels: Storage {
    /// Queries and rows of a tile together.
    const TILE: usize;
    fn scan(device: &'static Gpu, case: &Case, scan: &Scan<Self>) -> Result<()>;
}

macro_rules! kernels {
    ($t:ty, $tile:expr, $scan:ident) => {
        impl Kernels for $t {
            const TILE: usize = $tile;
            fn scan(device: &'static Gpu, case: &Case, scan: &Scan<Self>) -> Result<()> {
                $scan {
                    state: scan.state,
                    q: scan.q.get(),
                    x: scan.x.get().offset(scan.from * case.width),
                    Q: case.queries as i32,
                    N: scan.rows as i32,
                    W: case.width as i32,
                    first_row: FIRST + scan.from as u32,
                    stages: case.stages as i32,
                }
                .launch(device, Shape::linear(case.blocks, 256).shared(case.stages * 128 * Self::TILE as u32))
            }
        }
    };
}
kernels!(f32, 128, TopkScanF32);
kernels!(f16, 384, TopkScanF16);

impl Case {
    fn q(&self) -> Vec<f32> {
        match self.values {
            Values::Small => below(self.queries * self.width, 5, 1).iter().map(|&x| x as f32 - 2.0).collect(),
            Values::Half => below(self.queries * self.width, 3, 1).iter().map(|&x| x as f32 - 1.0).collect(),
            _ => vec![1.0; self.queries * self.width],
        }
    }

    fn x(&self) -> Vec<f32> {
        // Two parts of a number, each with few enough digits.
        let number = |n: f32| {
            let mut row = vec![0.0; self.width];
            (row[0], row[self.width - 1]) = (n % 128.0, n - n % 128.0);
            row
        };
        match self.values {
            Values::Small => below(self.rows * self.width, 5, 2).iter().map(|&x| x as f32 - 2.0).collect(),
            Values::Zero => vec![0.0; self.rows * self.width],
            Values::Half => {
                // Multiples of the least denormal, all below 2^-13: sums of 16 are exact in f32.
                let least = 2f32.powi(-24);
                let values = below(self.rows * self.width, 4095, 2);
                let mut x: Vec<f32> = values.iter().map(|&x| (x as f32 - 2047.0) * least).collect();
                let half = self.rows / 2 * self.width;
                x[..self.width].fill(0.0);
                x.copy_within(..half, half);
                x
            }
            Values::Rising => (0..self.rows).flat_map(|i| number(i as f32)).collect(),
            Values::Falling => (0..self.rows).flat_map(|i| number(-(i as f32))).collect(),
        }
    }

    /// Scores and numbers of the best, by sorting.
    fn sorted(&self) -> (Vec<f32>, Vec<u32>) {
        let (q, x, mut best) = (self.q(), self.x(), Vec::new());
        for q in q.chunks(self.width) {
            let score = |x: &[f32]| q.iter().zip(x).map(|(q, x)| q * x).sum::<f32>() + 0.0;
            let mut all: Vec<(f32, u32)> = x.chunks(self.width).map(score).zip(FIRST..).collect();
            all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            all.resize(all.len().max(self.k), (f32::NEG_INFINITY, u32::MAX));
            best.extend_from_slice(&all[..self.k]);
        }
        best.into_iter().unzip()
    }

    fn run<T: Kernels>(&self, device: &'static Gpu) -> (Vec<f32>, Vec<u32>) {
        let Case { queries, rows, width, k, window, trigger, .. } = *self;
        let capacity = window + trigger;
        let (q, x) = (stored::<T>(device, &self.q(), SPARE * width), stored::<T>(device, &self.x(), SPARE * width));
        let scores = Buffer::<f32>::poisoned(device, (queries + SPARE) * k);
        let numbers = Buffer::<u32>::poisoned(device, (queries + SPARE) * k);
        let candidates = Buffer::<u64>::poisoned(device, queries * capacity);
        let counts = Buffer::<u32>::poisoned(device, queries + SPARE);
        let state = TopKState {
            scores: scores.get_mut(),
            rows: numbers.get_mut(),
            candidates: candidates.get_mut(),
            counts: counts.get_mut(),
            k: k as i32,
            capacity: capacity as i32,
        };
        let size = k.next_power_of_two().max(32);
        let merge = |trigger| {
            let shape = Shape::linear(queries as u32, 512).shared(16 * size as u32);
            TopkMerge { state, size: size as i32, trigger: trigger as u32 }.launch(device, shape)
        };
        TopkClear { state, Q: queries as i32 }
            .launch(device, Shape::linear((queries * k).div_ceil(256) as u32, 256))
            .expect("a correct kernel raises nothing");
        for from in (0..rows).step_by(window) {
            let scan = Scan { state, q: &q, x: &x, from, rows: window.min(rows - from) };
            T::scan(device, self, &scan).expect("a correct kernel raises nothing");
            merge(trigger).expect("a correct kernel raises nothing");
            assert!(counts.take(queries).iter().all(|&count| count as usize <= trigger));
        }
        merge(0).expect("a correct kernel raises nothing");
        assert!(counts.take(queries).iter().all(|&count| count == 0));
        (scores.take(queries * k), numbers.take(queries * k))
    }

    fn check<T: Kernels>(&self) {
        let (scores, numbers) = self.sorted();
        let got = in_every_order(|device| {
            let (scores, numbers) = self.run::<T>(device);
            vec![scores, numbers.into_iter().map(f32::from_bits).collect()]
        });
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(bits(&got[0]) == bits(&scores), "scores in storage of {} bytes", size_of::<T>());
        assert!(bits(&got[1]) == numbers, "rows in storage of {} bytes", size_of::<T>());
    }

    fn check_both(&self) {
        self.check::<f32>();
        self.check::<f16>();
    }
}

#[test]
fn less_than_a_tile() {
    PLAIN.check_both();
    Case { queries: 1, rows: 1, width: 8, k: 1, ..PLAIN }.check_both();
}

#[test]
fn fewer_rows_than_k() {
    Case { rows: 7, k: 40, ..PLAIN }.check_both();
}

/// One row and one column past the tiles' borders (128 by 256, 64 by 64), W past a chunk's (64, 32) by less than a chunk.
#[test]
fn one_past_every_border() {
    Case { queries: 129, rows: 257, width: 72, k: 5, ..PLAIN }.check::<f16>();
    Case { queries: 65, rows: 65, width: 40, k: 5, ..PLAIN }.check::<f32>();
}

#[test]
fn whole_tiles_and_more_chunks_than_stages() {
    for stages in [2, 3] {
        Case { queries: 64, rows: 256, width: 384, stages, ..PLAIN }.check_both();
    }
}

/// Windows that end inside a tile; every one is merged, or only those of long lists.
#[test]
fn windows() {
    Case { rows: 620, window: 100, k: 33, ..PLAIN }.check_both();
    Case { rows: 620, window: 100, k: 33, trigger: 150, ..PLAIN }.check_both();
    Case { rows: 301, window: 100, k: 3, trigger: 1, ..PLAIN }.check_both();
}

/// Copies run on from one tile into the next; one block has all tiles, or some have none.
#[test]
fn fewer_and_more_blocks_than_tiles() {
    for stages in [2, 3] {
        Case { queries: 70, rows: 300, blocks: 1, stages, ..PLAIN }.check_both();
        Case { queries: 70, rows: 300, blocks: 3, stages, ..PLAIN }.check_both();
    }
    Case { rows: 20, blocks: 5, ..PLAIN }.check_both();
}

/// Rows with equal scores stay in the order of their numbers, also across windows.
#[test]
fn equal_scores() {
    Case { rows: 500, window: 300, k: 260, values: Values::Zero, ..PLAIN }.check_both();
}

/// What only f16 has of 16-bit types, and equal rows a tile apart.
#[test]
fn all_digits_of_f16() {
    Case { queries: 5, rows: 600, window: 500, k: 400, values: Values::Half, ..PLAIN }.check::<f16>();
}

#[test]
fn rows_in_the_worst_and_the_best_order() {
    for values in [Values::Rising, Values::Falling] {
        Case { rows: 900, window: 200, k: 70, trigger: 100, values, ..PLAIN }.check_both();
    }
}

/// As many as are usually asked for, and a power of two with no room in the sorted lists.
#[test]
fn a_thousand_and_more_best_rows() {
    Case { queries: 2, rows: 2500, width: 8, k: 1000, window: 1100, ..PLAIN }.check_both();
    Case { queries: 1, rows: 2500, width: 8, k: 2048, window: 700, trigger: 900, ..PLAIN }.check::<f16>();
}
