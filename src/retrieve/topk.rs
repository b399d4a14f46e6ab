//! The best rows of each query by inner product, exactly, on the CPU.
//!
//! Rows come in blocks. The scores of some thousand rows exist at a time, tile by tile; every query keeps up to 2 k candidates and
//! throws the worse half away when they are full. Scores descend, equal ones are ordered by row ascending.
//!
//! A score's bits depend on the two vectors alone, not on blocks, tiles, threads, nor on what else is searched for. The `gemm` crate adds
//! up each element in order of the columns where it takes its general path (more than 256 elements, several rows on both sides) and
//! where it does not divide the columns; so tiles are never smaller than that, and the columns are divided here.

use std::cmp::Ordering;

use rayon::prelude::*;

use crate::device::Output;
use crate::device::cpu::{Threads, View, gemm, scratch, vectorized};

/// Rows of a tile.
pub(super) const TILE: usize = 512;
/// Rows of the smallest tile: with two queries beside it the product takes the general path.
const LEAST_TILE: usize = 130;
/// Queries whose scores exist at a time.
pub(super) const GROUP: usize = 512;
/// Columns that are added up at once; the crate divides more.
const COLUMNS: usize = 512;
/// Columns of the narrowest product: for fewer the crate has another path.
const LEAST_WIDTH: usize = 4;

/// A row and its score.
type Hit = (u32, f32);

/// Better ones first. Scores are numbers.
fn order(a: &Hit, b: &Hit) -> Ordering {
    b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0))
}

/// The candidates of one query.
#[derive(Clone, Debug, Default)]
pub(super) struct Best {
    hits: Vec<Hit>,
    /// The worst of the best k, once there are k.
    last: Option<Hit>,
}

impl Best {
    /// Takes the scores of the rows from `first` on.
    pub(super) fn take(&mut self, k: usize, first: u32, scores: &[f32]) {
        const LANES: usize = 32;
        for (chunk, scores) in scores.chunks(LANES).enumerate() {
            let bar = self.last.map_or(f32::NEG_INFINITY, |hit| hit.1);
            // Most chunks hold nothing: asked without branches, so that it vectorises.
            if scores.iter().fold(0u32, |any, &score| any | u32::from(score >= bar)) == 0 {
                continue;
            }
            for (i, &score) in scores.iter().enumerate() {
                let hit = (first + (chunk * LANES + i) as u32, score);
                if score >= bar && self.last.is_none_or(|last| order(&hit, &last) == Ordering::Less) {
                    self.hits.push(hit);
                }
            }
            if self.hits.len() >= 2 * k + LANES {
                self.shrink(k);
            }
        }
    }

    /// The best k, in order.
    pub(super) fn sorted(mut self, k: usize) -> Vec<Hit> {
        self.shrink(k.max(1));
        self.hits.sort_unstable_by(order);
        self.hits
    }

    /// Leaves the best k, in no order.
    fn shrink(&mut self, k: usize) {
        if self.hits.len() >= k {
            self.last = Some(*self.hits.select_nth_unstable_by(k - 1, order).1);
            self.hits.truncate(k);
        }
    }
}

/// A search for the `k` best rows of each of some queries.
pub struct TopK {
    /// `[Q', width]`: the queries, with zero rows behind them where they are too few for a product, and zero columns too.
    queries: Vec<f32>,
    count: usize,
    given: usize,
    width: usize,
    k: usize,
    best: Vec<Best>,
    scores: Vec<f32>,
}

impl TopK {
    /// For `queries` `[Q, W]` of `width` W ≥ 1. All numbers are finite; the caller sees to that.
    pub fn new(queries: &[f32], width: usize, k: usize) -> TopK {
        let (given, count) = (width, queries.len() / width.max(1));
        let (queries, width) = padded(queries, width);
        TopK { queries, count, given, width, k, best: vec![Best::default(); count], scores: Vec::new() }
    }

    /// Searches `rows` `[N, W]`, which are numbered from `first_row` on. No row comes twice; all numbers are finite.
    pub fn add(&mut self, first_row: u32, rows: &[f32]) {
        if self.k == 0 || self.count == 0 {
            return;
        }
        let block = TILE * (4 * rayon::current_num_threads()).clamp(8, 64);
        for (i, rows) in rows.chunks(block * self.given).enumerate() {
            self.block(first_row + (i * block) as u32, rows);
        }
    }

    /// Rows whose scores exist at the same time.
    fn block(&mut self, first_row: u32, rows: &[f32]) {
        let (k, given, width) = (self.k, self.given, self.width);
        let tiles = (rows.len() / given).div_ceil(TILE);
        let mut scores = std::mem::take(&mut self.scores);
        for (best, queries) in self.best.chunks_mut(GROUP).zip(self.queries.chunks(GROUP * width)) {
            let count = queries.len() / width;
            scores.resize(scores.len().max(tiles * count * TILE), 0.0);
            let scores = &mut scores[..tiles * count * TILE];
            scores.par_chunks_exact_mut(count * TILE).zip(rows.par_chunks(TILE * given)).for_each(|(to, rows)| {
                tile(queries, (given, width), rows, to);
            });
            best.par_iter_mut().enumerate().for_each(|(q, best)| {
                vectorized(|| {
                    for (t, rows) in rows.chunks(TILE * given).enumerate() {
                        let scores = &scores[(t * count + q) * TILE..][..rows.len() / given];
                        best.take(k, first_row + (t * TILE) as u32, scores);
                    }
                });
            });
        }
        self.scores = scores;
    }

    /// Row and score of the best `k` of each query, or of all rows if they are fewer.
    pub fn finish(self) -> Vec<Vec<(u32, f32)>> {
        let k = self.k;
        self.best.into_par_iter().map(|best| best.sorted(k)).collect()
    }
}

/// `queries` of `given` columns with rows and columns of zeros behind them where they are too few for a product, and its width.
pub(super) fn padded(queries: &[f32], given: usize) -> (Vec<f32>, usize) {
    let count = queries.len() / given.max(1);
    let (width, rows) = (given.max(LEAST_WIDTH), count.next_multiple_of(2));
    let mut padded = vec![0.0; rows * width];
    if count > 0 {
        padded.chunks_exact_mut(width).zip(queries.chunks_exact(given)).for_each(|(to, from)| {
            to[..given].copy_from_slice(from);
        });
    }
    (padded, width)
}

/// The inner products `scores [Q, TILE]` of `queries [Q, width]` and up to [`TILE`] rows of `given` columns.
pub(super) fn tile(queries: &[f32], (given, width): (usize, usize), rows: &[f32], scores: &mut [f32]) {
    let count = rows.len() / given;
    if given == width && count >= LEAST_TILE {
        return product(queries, width, rows, scores);
    }
    scratch(count.max(LEAST_TILE) * width, |padded: &mut [f32]| {
        padded.fill(0.0);
        padded.chunks_exact_mut(width).zip(rows.chunks_exact(given)).for_each(|(to, from)| {
            to[..given].copy_from_slice(from);
        });
        product(queries, width, padded, scores);
    });
}

fn product(queries: &[f32], width: usize, rows: &[f32], scores: &mut [f32]) {
    let (m, n) = (queries.len() / width, rows.len() / width);
    let step = width.div_ceil(width.div_ceil(COLUMNS));
    for start in (0..width).step_by(step) {
        let columns = step.min(width - start);
        let (a, b) = (View::rows(&queries[start..], width), View::rows(&rows[start..], width).t());
        let output = if start == 0 { Output::Set } else { Output::Add };
        gemm((m, n, columns), 1.0, a, b, scores, TILE, output, Threads::One);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Site, Stream};

    fn vectors(seed: u64, rows: usize, width: usize) -> Vec<f32> {
        let mut stream = Stream::new(seed, 0, Site::Init, 0);
        (0..rows * width).map(|_| stream.normal()).collect()
    }

    fn search(queries: &[f32], rows: &[f32], width: usize, k: usize, block: usize) -> Vec<Vec<Hit>> {
        let mut topk = TopK::new(queries, width, k);
        for (i, rows) in rows.chunks(block * width).enumerate() {
            topk.add((i * block) as u32, rows);
        }
        topk.finish()
    }

    /// In f64, with the rule for ties.
    fn brute(query: &[f32], rows: &[f32]) -> Vec<(u32, f64)> {
        let score = |row: &[f32]| row.iter().zip(query).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        let mut all: Vec<(u32, f64)> = rows.chunks(query.len()).map(score).zip(0..).map(|(s, r)| (r, s)).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        all
    }

    #[test]
    fn lists_are_those_of_a_brute_force_in_f64() {
        // One query; widths that are not padded, padded, divided; fewer rows than k; rows at the borders of tiles and blocks.
        let cases =
            [(1, 300, 64, 10), (3, 1, 7, 5), (5, 40, 1, 100), (2, 700, 2, 9), (33, 1537, 770, 50), (513, 514, 8, 514)];
        for (q, n, width, k) in cases {
            let (queries, rows) = (vectors(1, q, width), vectors(2, n, width));
            // What f32 rounds: sums of this test are of the order √width.
            let eps = 5e-6 * (width as f64 + 3.0).sqrt();
            let found = search(&queries, &rows, width, k, 512);
            assert_eq!(found.len(), q);
            for (query, hits) in queries.chunks(width).zip(&found) {
                let expected = brute(query, &rows);
                assert_eq!(hits.len(), k.min(n));
                for (i, (hit, best)) in hits.iter().zip(&expected).enumerate() {
                    // Rows whose scores differ by less than f32 rounds may change places.
                    let own = expected.iter().find(|e| e.0 == hit.0).map_or(f64::NAN, |e| e.1);
                    assert!(
                        (own - f64::from(hit.1)).abs() <= eps && (own - best.1).abs() <= eps,
                        "{i}: {hit:?} {best:?}"
                    );
                    assert!(i == 0 || order(&hits[i - 1], hit) == Ordering::Less);
                }
            }
        }
    }

    #[test]
    fn integers_give_the_exact_lists_whatever_ties() {
        // Every sum is exact in f32: the order, ties included, must be that of f64.
        let small = |seed, rows| vectors(seed, rows, 16).iter().map(|x| (x * 1.5).round()).collect::<Vec<f32>>();
        let (queries, mut rows) = (small(3, 7), small(4, 2500));
        rows[16 * 5..16 * 9].fill(0.0);
        rows.copy_within(0..16 * 64, 16 * 1000);
        for (k, block) in [(1, 2500), (10, 100), (1000, 513), (3000, 2500), (0, 9)] {
            let found = search(&queries, &rows, 16, k, block);
            for (query, hits) in queries.chunks(16).zip(found) {
                let expected: Vec<Hit> = brute(query, &rows).into_iter().take(k).map(|(r, s)| (r, s as f32)).collect();
                assert_eq!(hits, expected, "k {k}, blocks of {block}");
            }
        }
    }

    #[test]
    fn bits_depend_on_nothing_but_the_two_vectors() {
        for width in [2, 31, 384, 768, 1025] {
            let (queries, rows) = (vectors(5, 70, width), vectors(6, 1200, width));
            let all = search(&queries, &rows, width, 1200, 1200);
            for block in [1, 77, 129, 131, 512, 600] {
                assert!(search(&queries, &rows, width, 1200, block) == all, "width {width}, blocks of {block}");
            }
            for q in [0, 1, 13, 69] {
                let one = search(&queries[q * width..(q + 1) * width], &rows, width, 1200, 1200);
                assert!(one[0] == all[q], "width {width}, query {q} alone");
            }
            let three = search(&queries[width..4 * width], &rows, width, 1200, 250);
            assert!(three[..] == all[1..4], "width {width}, three queries");
            let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
            assert!(pool.install(|| search(&queries, &rows, width, 1200, 1200)) == all, "width {width}, one thread");
        }
    }

    #[test]
    fn blocks_may_come_in_any_order() {
        let (queries, rows) = (vectors(7, 4, 8), vectors(8, 1000, 8).iter().map(|x| x.round()).collect::<Vec<f32>>());
        let mut topk = TopK::new(&queries, 8, 100);
        for block in [3usize, 1, 0, 2] {
            topk.add(block as u32 * 250, &rows[block * 2000..(block + 1) * 2000]);
        }
        assert_eq!(topk.finish(), search(&queries, &rows, 8, 100, 1000));
    }
}
