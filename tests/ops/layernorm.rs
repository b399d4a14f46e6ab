//! Dropout + residual + LayerNorm.

use retromae_engine::ops::layernorm::{Backward, Forward, Shape, backward, forward};

use super::common::{CPU, Lab, Names, Op, Out, check, dropout, normal};

/// `lengths`: rows of each sequence, for the names of the dropout; `p`: probability, or no dropout argument at all.
struct Case<'a> {
    lengths: &'a [usize],
    width: usize,
    residual: bool,
    p: Option<f32>,
    eps: f32,
}

const PLAIN: Case = Case { lengths: &[3, 2], width: 17, residual: true, p: None, eps: 1e-12 };

struct Saved {
    z: Out,
    y: Out,
    mean: Out,
    rstd: Out,
}

impl Case<'_> {
    fn rows(&self) -> usize {
        self.lengths.iter().sum()
    }

    fn shape(&self) -> Shape<'static> {
        Shape { rows: self.rows().into(), width: self.width, eps: self.eps }
    }

    /// x, γ, β and perhaps the residual.
    fn run(&self, lab: &Lab, x: &[Vec<f64>]) -> Saved {
        let (shape, names) = (self.shape(), Names::all(self.lengths));
        let rows = self.rows();
        let (gamma, beta, residual) = (lab.tensor(&x[1]), lab.tensor(&x[2]), x.get(3).map(|r| lab.tensor(r)));
        let s =
            Saved { z: lab.in_place(&x[0]), y: lab.set(rows * self.width), mean: lab.set(rows), rstd: lab.set(rows) };
        forward(
            CPU,
            &Forward {
                shape,
                x: &s.z.tensor,
                residual: residual.as_ref(),
                dropout: self.p.map(|p| (dropout(p, 4), names.rows())),
                gamma: &gamma,
                beta: &beta,
                y: &s.y.tensor,
                mean: &s.mean.tensor,
                rstd: &s.rstd.tensor,
            },
        );
        s
    }
}

impl Op for Case<'_> {
    fn inputs(&self) -> Vec<(&'static str, Vec<f64>)> {
        let (rows, width) = (self.rows(), self.width);
        let gamma = normal(width, 2, 0.5).into_iter().map(|x| x + 1.0).collect();
        // A mean that is not zero: statistics in one pass would lose digits here.
        let x = normal(rows * width, 1, 1.0).into_iter().map(|x| x + 3.0).collect();
        let mut all = vec![("x", x), ("gamma", gamma), ("beta", normal(width, 3, 0.5))];
        all.extend(self.residual.then(|| ("residual", normal(rows * width, 4, 1.0))));
        all
    }

    fn forward(&self, lab: &Lab, x: &[Vec<f64>]) -> Vec<f64> {
        let s = self.run(lab, x);
        assert!(s.mean.take().iter().chain(&s.rstd.take()).all(|x| x.is_finite()), "statistics are written");
        s.y.take()
    }

    fn backward(&self, lab: &Lab, x: &[Vec<f64>], dy: &[f64]) -> Vec<Vec<f64>> {
        let (s, shape, names) = (self.run(lab, x), self.shape(), Names::all(self.lengths));
        let gamma = lab.tensor(&x[1]);
        let (dy, dx) = (lab.in_place(dy), lab.set(dy.len()));
        let (dgamma, dbeta) = (lab.acc(self.width), lab.acc(self.width));
        backward(
            CPU,
            &Backward {
                shape,
                z: &s.z.tensor,
                mean: &s.mean.tensor,
                rstd: &s.rstd.tensor,
                gamma: &gamma,
                dy: &dy.tensor,
                dropout: self.p.map(|p| (dropout(p, 4), names.rows(), &dx.tensor)),
                dgamma_acc: &dgamma.tensor,
                dbeta_acc: &dbeta.tensor,
            },
        );
        let dz = dy.take();
        let dx = if self.p.is_some() { dx.take() } else { dz.clone() };
        let mut all = vec![dx, dgamma.take(), dbeta.take()];
        all.extend(self.residual.then_some(dz));
        all
    }

    /// z − μ cancels |μ|/σ ≈ 3 of its digits' worth; sums over C or over rows are random walks; the four products of the backward
    /// add a rounding each.
    fn growth(&self) -> f64 {
        16.0 + 2.0 * (self.width.max(self.rows()) as f64).sqrt()
    }
}

#[test]
fn one_row() {
    check(&Case { lengths: &[1], ..PLAIN });
}

#[test]
fn widths_around_the_vector_width() {
    for width in [3, 15, 16, 33] {
        check(&Case { width, ..PLAIN });
    }
}

#[test]
fn without_residual_as_in_the_head() {
    check(&Case { residual: false, ..PLAIN });
}

#[test]
fn with_dropout() {
    check(&Case { p: Some(0.1), ..PLAIN });
    check(&Case { p: Some(0.5), residual: false, width: 33, ..PLAIN });
}

/// The encoder passes a dropout that is off in evaluation; the backward then copies.
#[test]
fn with_a_dropout_that_is_off() {
    check(&Case { p: Some(0.0), ..PLAIN });
}

#[test]
fn rows_over_several_blocks_of_partial_sums() {
    check(&Case { lengths: &[60, 1, 72], width: 5, p: Some(0.2), ..PLAIN });
}

#[test]
fn an_epsilon_as_large_as_the_variance() {
    check(&Case { eps: 1.0, ..PLAIN });
}

/// A row without variance: the output is β and the gradient of the input is zero.
#[test]
fn width_one() {
    check(&Case { width: 1, residual: false, ..PLAIN });
}
