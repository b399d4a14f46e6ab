//! In-batch-negative contrastive loss.

use retromae_engine::device::{DType, Tensor};
use retromae_engine::ops::contrastive::{Backward, Forward, Shape, backward, forward};

use super::common::{CPU, Lab, Op, below, check, normal, relative};

struct Case {
    queries: usize,
    passages: usize,
    width: usize,
    temperature: f32,
    /// Whether some pairs are no candidates.
    hides: bool,
}

const PLAIN: Case = Case { queries: 5, passages: 10, width: 13, temperature: 0.5, hides: false };

impl Case {
    /// Groups of passages, the first of a group being the query's own: `targets` of the published training.
    fn targets(&self) -> Vec<u32> {
        let group = (self.passages / self.queries).max(1);
        (0..self.queries).map(|b| (b * group % self.passages) as u32).collect()
    }

    /// Random bits, also on targets, where they must have no effect, and past the last passage.
    fn hidden(&self) -> Vec<u32> {
        let (a, b) = (below(self.queries * self.passages.div_ceil(32), u32::MAX, 8), below(64, u32::MAX, 9));
        a.iter().zip(b.iter().cycle()).map(|(a, b)| a & b).collect()
    }

    fn is_hidden(&self, query: usize, passage: usize) -> bool {
        let bits = self.hidden();
        let own = self.targets()[query] as usize == passage;
        self.hides && !own && bits[query * self.passages.div_ceil(32) + passage / 32] >> (passage % 32) & 1 == 1
    }

    fn with<R>(&self, f: impl FnOnce(Shape<'_>) -> R) -> R {
        let (targets, hidden) = (Tensor::from_slice(&self.targets()), Tensor::from_slice(&self.hidden()));
        let Case { queries, passages, width, temperature, hides } = *self;
        let (queries, passages) = (queries.into(), passages.into());
        f(Shape { queries, passages, width, temperature, targets: &targets, hidden: hides.then_some(&hidden) })
    }

    /// Losses and lse.
    fn losses(&self, lab: &Lab, x: &[Vec<f64>]) -> (Vec<f64>, Vec<f64>) {
        let (loss, lse) = (lab.set(self.queries), lab.set(self.queries));
        let (q, p) = (lab.tensor(&x[0]), lab.tensor(&x[1]));
        self.with(|shape| forward(CPU, &Forward { shape, q: &q, p: &p, loss: &loss.tensor, lse: &lse.tensor }));
        (loss.take(), lse.take())
    }

    /// Losses as the definition says.
    fn naive(&self, x: &[Vec<f64>]) -> Vec<f64> {
        let score = |q: usize, p: usize| {
            let (q, p) = (&x[0][q * self.width..][..self.width], &x[1][p * self.width..][..self.width]);
            q.iter().zip(p).map(|(q, p)| q * p).sum::<f64>() / f64::from(self.temperature)
        };
        let targets = self.targets();
        (0..self.queries)
            .map(|b| {
                let seen = (0..self.passages).filter(|&p| !self.is_hidden(b, p));
                seen.map(|p| score(b, p).exp()).sum::<f64>().ln() - score(b, targets[b] as usize)
            })
            .collect()
    }
}

impl Op for Case {
    fn inputs(&self) -> Vec<(&'static str, Vec<f64>)> {
        // Scores of size 1 or so, before the temperature.
        let deviation = 1.0 / (self.width as f32).sqrt();
        vec![("q", normal(self.queries * self.width, 1, 1.0)), ("p", normal(self.passages * self.width, 2, deviation))]
    }

    fn forward(&self, lab: &Lab, x: &[Vec<f64>]) -> Vec<f64> {
        vec![self.losses(lab, x).0.iter().sum()]
    }

    /// The weight of the losses is the scale of their gradients.
    fn backward(&self, lab: &Lab, x: &[Vec<f64>], dy: &[f64]) -> Vec<Vec<f64>> {
        let (q, p, lse) = (lab.tensor(&x[0]), lab.tensor(&x[1]), lab.tensor(&self.losses(lab, x).1));
        let (dq, dp) = (lab.set(x[0].len()), lab.set(x[1].len()));
        self.with(|shape| {
            let (dq, dp) = (&dq.tensor, &dp.tensor);
            backward(CPU, &Backward { shape, scale: dy[0].into(), q: &q, p: &p, lse: &lse, dq, dp })
        });
        vec![dq.take(), dp.take()]
    }

    /// Scores are random walks over C, larger by 1/τ, and an exponential turns their error into a relative one; sums over P or B follow.
    fn growth(&self) -> f64 {
        let longest = self.width.max(self.passages).max(self.queries) as f64;
        (16.0 + 2.0 * longest.sqrt()) / f64::from(self.temperature).min(1.0)
    }
}

#[test]
fn a_group_of_passages_a_query() {
    check(&PLAIN);
}

#[test]
fn one_query_and_its_passage_alone() {
    // The loss is 0 and so is every gradient.
    let case = Case { queries: 1, passages: 1, ..PLAIN };
    let (lab, x) = (Lab { dtype: DType::F64, start: 0.0 }, case.inputs().into_iter().map(|i| i.1).collect::<Vec<_>>());
    assert!(case.losses(&lab, &x).0[0].abs() < 1e-14);
    assert!(case.backward(&lab, &x, &[1.0]).iter().flatten().all(|g| g.abs() < 1e-14));
    check(&Case { queries: 1, passages: 7, ..PLAIN });
}

/// Several queries share a passage, and their gradients meet there.
#[test]
fn fewer_passages_than_queries() {
    check(&Case { queries: 9, passages: 4, ..PLAIN });
}

#[test]
fn hidden_pairs() {
    // More than one word of bits, the last not full.
    check(&Case { passages: 70, hides: true, ..PLAIN });
    check(&Case { passages: 64, hides: true, ..PLAIN });
}

#[test]
fn a_low_temperature_and_a_width_of_one() {
    check(&Case { temperature: 0.1, ..PLAIN });
    check(&Case { width: 1, ..PLAIN });
}

/// Queries go through in blocks of 256; the passages' gradients are added up over them.
#[test]
fn more_than_one_block_of_queries() {
    check(&Case { queries: 259, passages: 33, width: 3, ..PLAIN });
}

#[test]
fn losses_are_those_of_the_definition() {
    for case in [PLAIN, Case { passages: 70, hides: true, ..PLAIN }, Case { queries: 300, passages: 40, ..PLAIN }] {
        let x: Vec<Vec<f64>> = case.inputs().into_iter().map(|i| i.1).collect();
        let (loss, lse) = case.losses(&Lab { dtype: DType::F64, start: 0.0 }, &x);
        assert!(relative(&loss, &case.naive(&x)) < 1e-13);
        assert!(lse.iter().all(|x| x.is_finite()));
    }
}

/// Scores far beyond the range of the exponential.
#[test]
fn large_scores_stay_finite() {
    let mut x: Vec<Vec<f64>> = PLAIN.inputs().into_iter().map(|i| i.1).collect();
    x[0].iter_mut().for_each(|x| *x *= 1000.0);
    let lab = Lab { dtype: DType::F32, start: 0.0 };
    let gradients = PLAIN.backward(&lab, &x, &[1.0]);
    assert!(gradients.iter().flatten().chain(&PLAIN.losses(&lab, &x).0).all(|x| x.is_finite()));
}
