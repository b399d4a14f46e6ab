//! Whether one run is better than another: the paired randomisation test.
//!
//! Under the null hypothesis a query's two figures could as well be exchanged. The test exchanges them at random, again and again, and
//! counts how often the difference of the means is as large as the one observed, in either direction: `p = (1 + c) / (1 + N)` for c of N
//! (Smucker, Allan and Carterette, CIKM 2007).

use rayon::prelude::*;

use super::metrics::{Evaluation, Metric};
use crate::rng::{Site, Stream};

/// How two runs compare by one metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// By which.
    pub metric: Metric,
    /// Mean of the first run over the pairs.
    pub first: f64,
    /// Mean of the second.
    pub second: f64,
    /// Two-sided p-value.
    pub p: f64,
    /// Queries on which the first is better, equal, worse.
    pub wins: [usize; 3],
    /// Queries.
    pub pairs: usize,
    /// Random exchanges.
    pub samples: u32,
}

/// Compares two evaluations of the same metrics against the same judgements. A query that only one of them has counts 0 in the other.
pub fn compare(first: &Evaluation, second: &Evaluation, samples: u32, seed: u64) -> Vec<Comparison> {
    let metrics = first.metrics.iter().enumerate().filter(|(_, metric)| second.metrics.contains(metric));
    metrics
        .map(|(i, &metric)| {
            let j = second.metrics.iter().position(|m| *m == metric).unwrap_or(i);
            of_pairs(metric, &pairs(first, second, i, j), samples, seed)
        })
        .collect()
}

/// The figures of each query in both; both lists are sorted by query.
fn pairs(first: &Evaluation, second: &Evaluation, i: usize, j: usize) -> Vec<[f64; 2]> {
    let (mut a, mut b) = (first.per_query.iter().peekable(), second.per_query.iter().peekable());
    let mut pairs = Vec::with_capacity(a.len());
    loop {
        let order = match (a.peek(), b.peek()) {
            (None, None) => return pairs,
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (Some(x), Some(y)) => x.0.cmp(&y.0),
        };
        let x = if order.is_le() { a.next().map_or(0.0, |query| query.1[i]) } else { 0.0 };
        let y = if order.is_ge() { b.next().map_or(0.0, |query| query.1[j]) } else { 0.0 };
        pairs.push([x, y]);
    }
}

fn of_pairs(metric: Metric, pairs: &[[f64; 2]], samples: u32, seed: u64) -> Comparison {
    let count = pairs.len().max(1) as f64;
    let mean = |side: usize| pairs.iter().map(|pair| pair[side]).sum::<f64>() / count;
    // Equal figures stay equal however they are exchanged.
    let differences: Vec<f64> = pairs.iter().map(|[a, b]| a - b).filter(|d| *d != 0.0).collect();
    let observed = differences.iter().sum::<f64>().abs();
    // A sum in another order may differ in its last bits and is as large all the same.
    let least = observed * (1.0 - 1e-12);
    let as_large = |sample: u32| {
        let mut stream = Stream::new(seed, u64::from(sample), Site::Compare, 0);
        let sum: f64 = differences.chunks(32).fold(0.0, |sum, differences| {
            let signs = stream.next_u32();
            let signed = differences.iter().enumerate().map(|(i, d)| if signs >> i & 1 == 1 { -d } else { *d });
            sum + signed.sum::<f64>()
        });
        sum.abs() >= least
    };
    let extreme = (0..samples).into_par_iter().filter(|&sample| as_large(sample)).count();
    let better = differences.iter().filter(|d| **d > 0.0).count();
    let worse = differences.len() - better;
    Comparison {
        metric,
        first: mean(0),
        second: mean(1),
        p: (1 + extreme) as f64 / (1.0 + f64::from(samples)),
        wins: [better, pairs.len() - better - worse, worse],
        pairs: pairs.len(),
        samples,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p_is_that_of_all_exchanges() {
        // 10 pairs of distinct differences: the exact p-value counts all 1,024 exchanges.
        let pairs: Vec<[f64; 2]> =
            (0..10).map(|i| [0.5 + 0.07 * f64::from(i), 0.6 + 0.02 * f64::from(i * i % 7)]).collect();
        let differences: Vec<f64> = pairs.iter().map(|[a, b]| a - b).collect();
        let observed = differences.iter().sum::<f64>().abs();
        let exact = (0..1024u32).filter(|signs| {
            let signed = differences.iter().enumerate().map(|(i, d)| if signs >> i & 1 == 1 { -d } else { *d });
            signed.sum::<f64>().abs() >= observed - 1e-12
        });
        let exact = exact.count() as f64 / 1024.0;
        let found = of_pairs(Metric::Map, &pairs, 100_000, 1);
        assert!((found.p - exact).abs() < 0.006, "{} and not {exact}", found.p);
        assert_eq!(found, of_pairs(Metric::Map, &pairs, 100_000, 1));
        let [better, same, worse] = found.wins;
        assert_eq!(better + same + worse, 10);
    }

    #[test]
    fn a_run_is_not_better_than_itself_and_a_large_difference_is_none_of_chance() {
        let same: Vec<[f64; 2]> = (0..50).map(|i| [f64::from(i), f64::from(i)]).collect();
        assert_eq!(of_pairs(Metric::Map, &same, 1000, 7).p, 1.0);
        let better: Vec<[f64; 2]> = (0..50).map(|i| [0.5 + f64::from(i % 3) * 0.1, 0.3]).collect();
        assert_eq!(of_pairs(Metric::Map, &better, 999, 7).p, 0.001);
    }
}
