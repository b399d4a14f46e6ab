//! Top-k search.

use super::*;
use retromae_engine::ops::topk::{MAX_K, Shape, TopK};

#[derive(Clone, Copy)]
struct Case {
    queries: usize,
    rows: usize,
    width: usize,
    k: usize,
    /// Integers, rows twice, some of zeros: products are exact and many scores equal.
    coarse: bool,
}

const PLAIN: Case = Case { queries: 9, rows: 1500, width: 40, k: 50, coarse: false };

impl Case {
    fn shape(&self) -> Shape {
        Shape { queries: self.queries + SPARE, width: self.width, k: self.k }
    }

    fn values(&self, rows: usize, name: u64) -> Vec<f32> {
        let values = normal(rows * self.width, name);
        if self.coarse { values.iter().map(|x| x.round()).collect() } else { values }
    }

    /// Scores and rows of the best by a sort of f64 sums over what f16 leaves of the values.
    fn sorted(&self) -> (Vec<f32>, Vec<u32>) {
        let (q, x, mut best) = (rounded::<f16>(&self.q()), rounded::<f16>(&self.x()), Vec::new());
        for q in q.chunks(self.width) {
            let score = |x: &[f32]| q.iter().zip(x).map(|(&q, &x)| f64::from(q) * f64::from(x)).sum::<f64>() + 0.0;
            let mut all: Vec<(f64, u32)> = x.chunks(self.width).map(score).zip(0..).collect();
            all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            all.resize(all.len().max(self.k), (f64::NEG_INFINITY, u32::MAX));
            best.extend(all[..self.k].iter().map(|&(score, row)| (score as f32, row)));
        }
        best.into_iter().unzip()
    }

    fn q(&self) -> Vec<f32> {
        self.values(self.queries, 1)
    }

    fn x(&self) -> Vec<f32> {
        let mut x = self.values(self.rows, 2);
        if self.coarse {
            let half = self.rows / 2 * self.width;
            x[..self.width].fill(0.0);
            x.copy_within(..half, half);
        }
        x
    }

    /// The results after these blocks of rows, in the order given.
    fn run(&self, place: Place, search: &mut TopK, blocks: &[std::ops::Range<usize>]) -> (Vec<f32>, Vec<u32>) {
        let (width, x) = (self.width, self.x());
        let matrix = |x: &[f32]| match place.gpu {
            Some(_) => place.matrix(x, SPARE * width),
            None => Tensor::from_slice(&match place.storage {
                DType::F16 => rounded::<f16>(x),
                _ => x.to_vec(),
            }),
        };
        let q = matrix(&self.q());
        search.start(&q, self.queries);
        for block in blocks {
            let x = matrix(&x[block.start * width..block.end * width]);
            search.add(&x, block.len(), block.start as u32);
        }
        let results = search.results();
        place.device().check().expect("correct ops raise nothing");
        results
    }

    /// Scores agree with the CPU's, place by place; rows are in order, distinct, and score what is said of them.
    fn check(&self) {
        for storage in [DType::F32, DType::F16] {
            let (cpu, here) = (Place { gpu: None, storage }, Place { gpu: Some(fresh()), storage });
            let all = 0..self.rows;
            let all = std::slice::from_ref(&all);
            let mut search = TopK::new(Device::Cpu, self.shape()).unwrap();
            let (exact, _) = self.run(cpu, &mut search, all);
            let mut search = TopK::new(here.device(), self.shape()).unwrap();
            let (scores, rows) = self.run(here, &mut search, all);
            // Every product counts with its own rounding.
            let allowed = 1e-6 * self.width as f32;
            assert!(scores.iter().zip(&exact).all(|(a, b)| a == b || (a - b).abs() <= allowed));
            let (q, x) = match storage {
                DType::F16 => (rounded::<f16>(&self.q()), rounded::<f16>(&self.x())),
                _ => (self.q(), self.x()),
            };
            for ((scores, rows), q) in scores.chunks(self.k).zip(rows.chunks(self.k)).zip(q.chunks(self.width)) {
                let found = self.k.min(self.rows);
                let pairs: Vec<_> = scores.iter().zip(rows).collect();
                assert!(pairs[..found].windows(2).all(|w| w[0].0 > w[1].0 || (w[0].0 == w[1].0 && w[0].1 < w[1].1)));
                assert!(pairs[found..].iter().all(|&(&s, &row)| s == f32::NEG_INFINITY && row == u32::MAX));
                for &(&score, &row) in &pairs[..found] {
                    let x = &x[row as usize * self.width..][..self.width];
                    let exact: f64 = q.iter().zip(x).map(|(&q, &x)| f64::from(q) * f64::from(x)).sum();
                    assert!((f64::from(score) - exact).abs() <= f64::from(allowed), "row {row}: {score}, {exact}");
                }
            }
        }
    }
}

#[test]
fn searches_agree() {
    PLAIN.check();
    // More blocks of queries than one; more to keep than there is.
    Case { queries: 130, rows: 300, ..PLAIN }.check();
    Case { queries: 1, rows: 30, width: 768, k: 1000, coarse: false }.check();
}

/// However rows are cut into blocks and these into launches, in whatever order blocks come, and when a search is used again.
#[test]
fn results_do_not_depend_on_blocks() {
    let coarse = Case { width: 8, coarse: true, ..PLAIN };
    for (case, storage) in [(PLAIN, DType::F32), (PLAIN, DType::F16), (coarse, DType::F32), (coarse, DType::F16)] {
        let place = Place { gpu: Some(fresh()), storage };
        let mut search = TopK::new(place.device(), case.shape()).unwrap();
        let all = 0..case.rows;
        let all = std::slice::from_ref(&all);
        let whole = case.run(place, &mut search, all);
        let bits = |(scores, rows): &(Vec<f32>, Vec<u32>)| {
            (scores.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), rows.clone())
        };
        if case.coarse {
            let mut exact = TopK::new(Device::Cpu, case.shape()).unwrap();
            assert!(bits(&case.run(Place { gpu: None, storage }, &mut exact, all)) == bits(&whole));
            assert!(whole.0.chunks(case.k).all(|scores| scores.windows(2).any(|w| w[0] == w[1])), "no equal scores");
        }
        let cuts = [vec![0..1, 1..100, 100..100, 100..1500], vec![700..1500, 300..700, 0..300]];
        for blocks in &cuts {
            assert!(bits(&case.run(place, &mut search, blocks)) == bits(&whole), "{blocks:?} in {storage:?}");
            // After eight windows merging waits for long lists.
            let mut small = TopK::with_window(place.device(), case.shape(), 60).unwrap();
            assert!(bits(&case.run(place, &mut small, blocks)) == bits(&whole), "{blocks:?} in windows");
        }
    }
}

/// Where f32 holds every sum, the order is that of f64, ties included: rows and queries at the borders of tiles, fewer rows than k, a
/// query of zeros, and values with more digits than f16 has.
#[test]
fn searches_in_f16_are_exact() {
    let case = |queries, rows, k| Case { queries, rows, width: 16, k, coarse: true };
    for case in [case(128, 256, 20), case(129, 257, 300), case(3, 511, 511), case(2, 5, 40)] {
        for shared_bytes in [227 << 10, 99 << 10] {
            if real().is_some() && shared_bytes != 227 << 10 {
                continue;
            }
            let gpu = match real() {
                Some(_) => gpu(),
                None => opened(Device::emulator(Options { shared_bytes, ..Options::default() })),
            };
            let place = Place { gpu: Some(gpu), storage: DType::F16 };
            let mut search = TopK::new(place.device(), case.shape()).unwrap();
            let all = 0..case.rows;
            let (scores, rows) = case.run(place, &mut search, std::slice::from_ref(&all));
            let (exact, order) = case.sorted();
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(bits(&scores) == bits(&exact) && rows == order, "{} rows, {shared_bytes} bytes", case.rows);
        }
    }
}

/// A GPU of 99 KB a block holds two chunks of a scan where others hold three; no result changes.
#[test]
fn searches_fit_less_shared_memory() {
    if !emulated("less shared memory") {
        return;
    }
    for storage in [DType::F32, DType::F16] {
        let run = |shared_bytes| {
            let gpu = opened(Device::emulator(Options { shared_bytes, ..Options::default() }));
            let place = Place { gpu: Some(gpu), storage };
            let mut search = TopK::new(place.device(), PLAIN.shape()).unwrap();
            PLAIN.run(place, &mut search, &[0..700, 700..1500])
        };
        assert!(run(99 << 10) == run(227 << 10), "{storage:?}");
    }
    // The largest k, too: what it sorts in shared memory.
    let gpu = opened(Device::emulator(Options { shared_bytes: 99 << 10, ..Options::default() }));
    let case = Case { queries: 1, rows: 5000, width: 8, k: MAX_K, coarse: true };
    let place = Place { gpu: Some(gpu), storage: DType::F16 };
    let all = 0..case.rows;
    let found = case.run(place, &mut TopK::new(place.device(), case.shape()).unwrap(), std::slice::from_ref(&all));
    assert!(found == case.sorted());
    // The limit is one.
    let gpu = opened(Device::emulator(Options { shared_bytes: 95 << 10, ..Options::default() }));
    let place = Place { gpu: Some(gpu), storage: DType::F16 };
    let mut search = TopK::new(place.device(), PLAIN.shape()).unwrap();
    let q = place.matrix(&PLAIN.q(), SPARE * PLAIN.width);
    search.start(&q, PLAIN.queries);
    search.add(&place.matrix(&PLAIN.x(), 0), PLAIN.rows, 0);
    let refused = place.device().check().unwrap_err().to_string();
    assert!(refused.contains("topk_scan_f16: 98304 bytes of dynamic shared memory"), "{refused}");
}

/// 6 MiB of memory, where the scores alone would be 16 MiB and the search has 4.
#[test]
fn memory_is_bounded() {
    if !emulated("a limit of memory") {
        return;
    }
    let case = Case { queries: 256, rows: 16_384, width: 16, k: 100, coarse: false };
    let limited = || opened(Device::emulator(Options { memory: 6 << 20, ..Options::default() }));
    let (gpu, plain) = (limited(), fresh());
    let blocks: Vec<_> = (0..case.rows).step_by(4096).map(|first| first..first + 4096).collect();
    let search = |gpu: &'static Gpu| {
        let place = Place { gpu: Some(gpu), storage: DType::F16 };
        let mut search = TopK::with_window(place.device(), case.shape(), 1280).unwrap();
        assert!(search.bytes() < 4 << 20 && search.bytes() > 3 << 20, "{}", search.bytes());
        case.run(place, &mut search, &blocks)
    };
    assert!(search(gpu) == search(plain));
    // The limit is one: a search with room for a window of everything does not fit.
    let refused = TopK::with_window(Device::Gpu(limited()), case.shape(), case.rows).err().unwrap();
    assert!(refused.to_string().contains("out of memory"), "{refused}");
}

#[test]
fn what_cannot_be_searched_is_refused_in_one_line() {
    let device = Device::Gpu(fresh());
    let of = |width, k| TopK::new(device, Shape { queries: 1, width, k }).err().map(|e| e.to_string());
    for (width, k, cause) in [(12, 1, "width 12"), (0, 1, "width 0"), (8, 0, "0 best"), (8, MAX_K + 1, "4097 best")] {
        let line = of(width, k).unwrap();
        assert!(line.contains(cause) && line.lines().count() == 1, "{line}");
    }
    assert!(of(8, MAX_K).is_none() && TopK::new(Device::Cpu, Shape { queries: 1, width: 3, k: 1 }).is_ok());
}
