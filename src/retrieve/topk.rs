//! The best rows of each query, by inner product.

use rayon::prelude::*;

/// The best rows seen so far.
pub struct TopK {
    queries: Vec<f32>,
    width: usize,
    k: usize,
    best: Vec<Vec<(u32, f32)>>,
}

impl TopK {
    /// Nothing seen yet of `queries` `[Q, W]`.
    pub fn new(queries: &[f32], width: usize, k: usize) -> Self {
        TopK { queries: queries.to_vec(), width, k, best: vec![Vec::new(); queries.len() / width] }
    }

    /// Looks at `rows` `[N, W]`, numbered from `first`.
    pub fn add(&mut self, first: u32, rows: &[f32]) {
        let (width, k) = (self.width, self.k);
        self.best.par_iter_mut().zip(self.queries.par_chunks_exact(width)).for_each(|(best, query)| {
            for (i, row) in rows.chunks_exact(width).enumerate() {
                let mut sums = [0f32; 16];
                for (q, r) in query.chunks(16).zip(row.chunks(16)) {
                    for (s, (q, r)) in sums.iter_mut().zip(q.iter().zip(r)) {
                        *s += q * r;
                    }
                }
                let score: f32 = sums.iter().sum();
                let at = best.partition_point(|&(_, other)| other >= score);
                if at < k {
                    best.insert(at, (first + i as u32, score));
                    best.truncate(k);
                }
            }
        });
    }

    /// Row and score of each query's best, best first; of equal ones the first row.
    pub fn finish(self) -> Vec<Vec<(u32, f32)>> {
        self.best
    }
}
