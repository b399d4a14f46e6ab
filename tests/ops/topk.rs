//! Exact top-k search, the reference.

use retromae_engine::device::Tensor;
use retromae_engine::ops::topk::{Shape, TopK};

use super::common::{CPU, normal};

struct Case {
    queries: usize,
    rows: usize,
    width: usize,
    k: usize,
}

const PLAIN: Case = Case { queries: 4, rows: 60, width: 13, k: 7 };

impl Case {
    fn x(&self) -> [Vec<f64>; 2] {
        [normal(self.queries * self.width, 1, 1.0), normal(self.rows * self.width, 2, 1.0)]
    }

    /// Results for these queries and rows, in blocks of `block` rows; numbers begin at 5.
    fn run(&self, [q, x]: &[Vec<f64>; 2], block: usize) -> (Vec<f32>, Vec<u32>) {
        let Case { queries, width, k, .. } = *self;
        // Room for more queries than come.
        let mut search = TopK::new(CPU, Shape { queries: queries + 2, width, k }).unwrap();
        search.start(&Tensor::from_slice(q), queries);
        for (i, x) in x.chunks(block * width).enumerate() {
            search.add(&Tensor::from_slice(x), x.len() / width, (5 + i * block) as u32);
        }
        search.results()
    }

    fn naive(&self, [q, x]: &[Vec<f64>; 2]) -> (Vec<f32>, Vec<u32>) {
        let mut best = Vec::new();
        for q in q.chunks(self.width) {
            let score = |x: &[f64]| q.iter().zip(x).map(|(q, x)| q * x).sum::<f64>() as f32;
            let mut all: Vec<(f32, u32)> = x.chunks(self.width).map(score).zip(5..).collect();
            all.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap().then(a.1.cmp(&b.1)));
            all.resize(all.len().max(self.k), (f32::NEG_INFINITY, u32::MAX));
            best.extend_from_slice(&all[..self.k]);
        }
        best.into_iter().unzip()
    }
}

#[test]
fn the_best_are_those_of_a_sort() {
    for case in [
        PLAIN,
        Case { queries: 1, rows: 1, width: 1, k: 1 },
        // Fewer rows than are asked for.
        Case { rows: 5, k: 20, ..PLAIN },
        Case { rows: 60, k: 60, ..PLAIN },
    ] {
        let x = case.x();
        let (scores, rows) = case.naive(&x);
        let got = case.run(&x, 1000);
        // Sums in another order, rounded to f32.
        assert!(got.0.iter().zip(&scores).all(|(a, b)| a == b || (a - b).abs() <= 1e-6 * b.abs().max(1.0)));
        assert_eq!(got.1, rows);
    }
}

#[test]
fn blocks_change_nothing() {
    let x = PLAIN.x();
    let whole = PLAIN.run(&x, 60);
    for block in [1, 7, 59] {
        assert!(PLAIN.run(&x, block) == whole);
    }
}

#[test]
fn equal_scores_are_in_the_order_of_rows() {
    // Products of zeros of both signs are all equal.
    let [q, x] = PLAIN.x();
    let zeros = [q, x.iter().map(|x| 0.0 * x).collect()];
    for block in [60, 9] {
        let (scores, rows) = PLAIN.run(&zeros, block);
        assert!(scores.iter().all(|x| x.to_bits() == 0));
        assert!(rows.chunks(PLAIN.k).all(|rows| rows.iter().copied().eq(5..12)));
    }
}

#[test]
fn a_search_begins_anew() {
    let [q, x] = PLAIN.x().map(|x| Tensor::from_slice(&x));
    let Case { queries, rows, width, k } = PLAIN;
    let mut search = TopK::new(CPU, Shape { queries, width, k }).unwrap();
    search.start(&q, queries);
    search.add(&x, rows, 0);
    let first = search.results();
    search.start(&q, 1);
    assert_eq!(search.results(), (vec![f32::NEG_INFINITY; k], vec![u32::MAX; k]));
    search.add(&x, rows, 0);
    assert_eq!(search.results(), (first.0[..k].to_vec(), first.1[..k].to_vec()));
    assert_eq!(search.bytes(), queries * k * 8);
}
