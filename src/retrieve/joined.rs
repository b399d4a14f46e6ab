//! The best rows of each query by the joined score, exactly, on the CPU: the inner product of the dense embeddings plus that of the lexical
//! ones, or of the lexical ones alone.
//!
//! As in [`super::topk`] rows come in blocks, and the scores of some thousand rows exist at a time, tile by tile. The tokens of some
//! hundred queries are inverted: for every token of a row there are the queries that have it, so that work goes with the tokens in common
//! and not with the vocabulary. A lexical product is added up in the order of the row's tokens and then added to the dense one: a score's
//! bits depend on the two embeddings alone.

use rayon::prelude::*;

use super::representation::Embedded;
use super::topk::{Best, GROUP, TILE, padded, tile};
use crate::device::cpu::vectorized;

/// What the embeddings of a search are like.
#[derive(Clone, Copy, Debug)]
pub struct Widths {
    /// Numbers of the dense embeddings; 0 without.
    pub dim: usize,
    /// Tokens of a query, and of a row.
    pub tokens: [usize; 2],
    /// Tokens there are.
    pub vocabulary: usize,
}

/// The tokens of some queries, inverted.
struct Postings {
    /// `[V + 1]`: where the entries of each token begin.
    starts: Vec<u32>,
    /// Query and weight.
    entries: Vec<(u32, f32)>,
}

impl Postings {
    fn new(ids: &[u32], weights: &[f32], each: usize, vocabulary: usize) -> Postings {
        let mut starts = vec![0u32; vocabulary + 1];
        ids.iter().for_each(|&id| starts[id as usize + 1] += 1);
        for token in 0..vocabulary {
            starts[token + 1] += starts[token];
        }
        let (mut next, mut entries) = (starts.clone(), vec![(0, 0.0); ids.len()]);
        for (i, (&id, &weight)) in ids.iter().zip(weights).enumerate() {
            let at = &mut next[id as usize];
            entries[*at as usize] = ((i / each) as u32, weight);
            *at += 1;
        }
        Postings { starts, entries }
    }

    fn of(&self, token: u32) -> &[(u32, f32)] {
        &self.entries[self.starts[token as usize] as usize..self.starts[token as usize + 1] as usize]
    }
}

/// A search for the `k` best rows of each of some queries.
pub struct Joined {
    widths: Widths,
    k: usize,
    /// The dense queries as a product takes them, and their width there.
    dense: (Vec<f32>, usize),
    /// One for each [`GROUP`] of queries.
    postings: Vec<Postings>,
    best: Vec<Best>,
    scores: Vec<f32>,
}

impl Joined {
    /// For `queries`. All numbers are finite, and all tokens of the vocabulary; the caller sees to that.
    pub fn new(queries: &Embedded, widths: Widths, k: usize) -> Joined {
        let each = widths.tokens[0];
        let groups = queries.ids.chunks(GROUP * each).zip(queries.weights.chunks(GROUP * each));
        let postings = groups.map(|(ids, weights)| Postings::new(ids, weights, each, widths.vocabulary)).collect();
        let dense = if widths.dim > 0 { padded(&queries.dense, widths.dim) } else { (Vec::new(), 0) };
        let best = vec![Best::default(); queries.ids.len() / each];
        Joined { widths, k, dense, postings, best, scores: Vec::new() }
    }

    /// Searches `rows`, which are numbered from `first_row` on. No row comes twice; what [`Self::new`] says of queries holds.
    pub fn add(&mut self, first_row: u32, rows: &Embedded) {
        let count = rows.ids.len() / self.widths.tokens[1];
        let block = TILE * (4 * rayon::current_num_threads()).clamp(8, 64);
        for first in (0..count).step_by(block) {
            self.block(first_row, rows, first..count.min(first + block));
        }
    }

    /// Rows whose scores exist at the same time.
    fn block(&mut self, first_row: u32, rows: &Embedded, range: std::ops::Range<usize>) {
        let (k, Widths { dim, .. }) = (self.k, self.widths);
        let (dense, width) = (&self.dense.0, self.dense.1);
        let tiles: Vec<_> = range.clone().step_by(TILE).map(|at| at..range.end.min(at + TILE)).collect();
        let mut scores = std::mem::take(&mut self.scores);
        for (group, (best, postings)) in self.best.chunks_mut(GROUP).zip(&self.postings).enumerate() {
            let queries = &dense[group * GROUP * width..dense.len().min((group + 1) * GROUP * width)];
            // The product may have rows that no query has.
            let count = if dim > 0 { queries.len() / width } else { best.len() };
            scores.resize(scores.len().max(tiles.len() * count * TILE), 0.0);
            let scores = &mut scores[..tiles.len() * count * TILE];
            scores.par_chunks_exact_mut(count * TILE).zip(&tiles).for_each(|(to, of)| {
                match dim {
                    0 => to.fill(0.0),
                    _ => tile(queries, (dim, width), &rows.dense[of.start * dim..of.end * dim], to),
                }
                self::lexical(postings, rows, self.widths.tokens[1], of.clone(), best.len(), to);
            });
            best.par_iter_mut().enumerate().for_each(|(q, best)| {
                vectorized(|| {
                    for (t, of) in tiles.iter().enumerate() {
                        best.take(k, first_row + of.start as u32, &scores[(t * count + q) * TILE..][..of.len()]);
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

/// Adds the lexical products of the first `queries` queries and some rows to their scores `[_, TILE]`.
fn lexical(
    postings: &Postings,
    rows: &Embedded,
    each: usize,
    of: std::ops::Range<usize>,
    queries: usize,
    scores: &mut [f32],
) {
    let mut sums = vec![0.0f32; queries];
    for (at, row) in of.enumerate() {
        let words = row * each..(row + 1) * each;
        for (&token, &weight) in rows.ids[words.clone()].iter().zip(&rows.weights[words]) {
            for &(query, of_query) in postings.of(token) {
                sums[query as usize] += of_query * weight;
            }
        }
        for (score, sum) in scores[at..].iter_mut().step_by(TILE).zip(&mut sums) {
            *score += *sum;
            *sum = 0.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Site, Stream};

    const VOCABULARY: usize = 200;

    /// Rows of integers, whose sums are exact: tokens distinct in a row, weights of both signs.
    fn rows(seed: u64, n: usize, dim: usize, k: usize) -> Embedded {
        let mut stream = Stream::new(seed, 0, Site::Init, 0);
        let mut rows = Embedded::zeros(n, dim, k);
        rows.dense.fill_with(|| stream.below(5) as f32 - 2.0);
        rows.weights.fill_with(|| stream.below(9) as f32 - 2.0);
        for ids in rows.ids.chunks_mut(k) {
            let mut all: Vec<u32> = (0..VOCABULARY as u32).collect();
            for (i, id) in ids.iter_mut().enumerate() {
                all.swap(i, i + stream.below((VOCABULARY - i) as u32) as usize);
                *id = all[i];
            }
        }
        rows
    }

    fn brute(queries: &Embedded, rows: &Embedded, w: Widths, k: usize) -> Vec<Vec<(u32, f32)>> {
        let [kq, kr] = w.tokens;
        let list = |q: usize| {
            let score = |r: usize| {
                let dense = (0..w.dim).map(|i| f64::from(queries.dense[q * w.dim + i] * rows.dense[r * w.dim + i]));
                let own = (q * kq..(q + 1) * kq).map(|i| (queries.ids[i], queries.weights[i]));
                let theirs = || (r * kr..(r + 1) * kr).map(|i| (rows.ids[i], rows.weights[i]));
                let common =
                    own.flat_map(|(id, a)| theirs().filter(move |b| b.0 == id).map(move |b| f64::from(a * b.1)));
                dense.sum::<f64>() + common.sum::<f64>() + 0.0
            };
            let mut all: Vec<(u32, f64)> = (0..rows.ids.len() / kr).map(|r| (r as u32, score(r))).collect();
            all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            all.into_iter().take(k).map(|(row, score)| (row, score as f32)).collect()
        };
        (0..queries.ids.len() / kq).map(list).collect()
    }

    fn search(queries: &Embedded, rows: &Embedded, widths: Widths, k: usize, block: usize) -> Vec<Vec<(u32, f32)>> {
        let mut joined = Joined::new(queries, widths, k);
        let sizes = (widths.dim, widths.tokens[1]);
        let count = rows.ids.len() / sizes.1;
        for first in (0..count).step_by(block) {
            let mut piece = Embedded::default();
            piece.append(rows, first..count.min(first + block), sizes);
            joined.add(first as u32, &piece);
        }
        joined.finish()
    }

    #[test]
    fn lists_are_those_of_a_brute_force_whatever_ties() {
        // One query, an odd number, a group of queries and some; with and without dense embeddings, narrow ones too; other numbers of
        // tokens.
        for (q, n, dim, tokens, k) in
            [(1, 600, 8, [5, 7], 20), (3, 1500, 0, [9, 4], 1500), (515, 700, 2, [3, 12], 9), (2, 3, 16, [1, 1], 10)]
        {
            let widths = Widths { dim, tokens, vocabulary: VOCABULARY };
            let (queries, rows) = (rows(1, q, dim, tokens[0]), rows(2, n, dim, tokens[1]));
            let expected = brute(&queries, &rows, widths, k);
            let equal = expected.iter().flat_map(|list| list.windows(2)).any(|w| w[0].1 == w[1].1);
            assert!(n < 100 || equal, "no equal scores");
            for block in [n, 513, 100] {
                assert!(search(&queries, &rows, widths, k, block) == expected, "{q} {n} {dim}, blocks of {block}");
            }
        }
    }

    #[test]
    fn bits_depend_on_nothing_but_the_two_embeddings() {
        let widths = Widths { dim: 31, tokens: [20, 30], vocabulary: VOCABULARY };
        let mut stream = Stream::new(9, 0, Site::Init, 0);
        let mut normal = |mut rows: Embedded| {
            rows.dense.iter_mut().chain(&mut rows.weights).for_each(|x| *x = stream.normal());
            rows
        };
        let (queries, rows) = (normal(rows(3, 70, 31, 20)), normal(rows(4, 1200, 31, 30)));
        let all = search(&queries, &rows, widths, 1200, 1200);
        for block in [1, 77, 512] {
            assert!(search(&queries, &rows, widths, 1200, block) == all, "blocks of {block}");
        }
        for q in [0, 13, 69] {
            let mut one = Embedded::default();
            one.append(&queries, q..q + 1, (31, 20));
            assert!(search(&one, &rows, widths, 1200, 1200)[0] == all[q], "query {q} alone");
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert!(pool.install(|| search(&queries, &rows, widths, 1200, 1200)) == all, "one thread");
    }
}
