//! Scores of queries with their own groups of passages.

use retromae_engine::device::DType;
use retromae_engine::ops::group_scores::{Backward, Forward, Shape, backward, forward};

use super::common::{CPU, Lab, Op, check, normal, relative};

struct Case {
    queries: usize,
    group: usize,
    width: usize,
    temperature: f32,
}

const PLAIN: Case = Case { queries: 5, group: 4, width: 13, temperature: 0.5 };

impl Case {
    fn shape(&self) -> Shape<'static> {
        let Case { queries, group, width, temperature } = *self;
        Shape { queries: queries.into(), group, width, temperature }
    }
}

impl Op for Case {
    fn inputs(&self) -> Vec<(&'static str, Vec<f64>)> {
        let passages = self.queries * self.group;
        vec![("q", normal(self.queries * self.width, 1, 1.0)), ("p", normal(passages * self.width, 2, 1.0))]
    }

    fn forward(&self, lab: &Lab, x: &[Vec<f64>]) -> Vec<f64> {
        let (q, p, s) = (lab.tensor(&x[0]), lab.tensor(&x[1]), lab.set(self.queries * self.group));
        forward(CPU, &Forward { shape: self.shape(), q: &q, p: &p, s: &s.tensor });
        s.take()
    }

    fn backward(&self, lab: &Lab, x: &[Vec<f64>], dy: &[f64]) -> Vec<Vec<f64>> {
        let (q, p, ds) = (lab.tensor(&x[0]), lab.tensor(&x[1]), lab.tensor(dy));
        let (dq, dp) = (lab.acc(x[0].len()), lab.acc(x[1].len()));
        let (dq_acc, dp_acc) = (&dq.tensor, &dp.tensor);
        backward(CPU, &Backward { shape: self.shape(), q: &q, p: &p, ds: &ds, dq_acc, dp_acc });
        vec![dq.take(), dp.take()]
    }

    /// Sums over the width or the group, and the division.
    fn growth(&self) -> f64 {
        4.0 + (self.width.max(self.group) as f64).sqrt()
    }
}

#[test]
fn groups_of_every_size() {
    check(&PLAIN);
    check(&Case { group: 1, ..PLAIN });
    check(&Case { queries: 1, group: 100, ..PLAIN });
    check(&Case { queries: 1, group: 1, width: 1, temperature: 1.0 });
}

#[test]
fn a_wide_row_and_a_low_temperature() {
    check(&Case { width: 300, temperature: 0.01, ..PLAIN });
}

#[test]
fn scores_are_those_of_the_definition() {
    let x: Vec<Vec<f64>> = PLAIN.inputs().into_iter().map(|i| i.1).collect();
    let s = PLAIN.forward(&Lab { dtype: DType::F64, start: 0.0 }, &x);
    let Case { queries, group, width, temperature } = PLAIN;
    let score = |b: usize, j: usize| {
        let (q, p) = (&x[0][b * width..], &x[1][(b * group + j) * width..]);
        (0..width).map(|c| q[c] * p[c]).sum::<f64>() / f64::from(temperature)
    };
    let naive: Vec<f64> = (0..queries).flat_map(|b| (0..group).map(move |j| score(b, j))).collect();
    assert!(relative(&s, &naive) < 1e-14);
}
