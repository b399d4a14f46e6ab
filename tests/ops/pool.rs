//! Pooling over packed sequences, and L2 normalisation.

use retromae_engine::device::{DType, Tensor};
use retromae_engine::ops::pool::{LEAST_NORM, Pooling, Shape, backward, forward, normalize, normalize_backward};

use super::common::{CPU, Lab, Op, borders, check, normal};

struct Pool {
    lengths: &'static [usize],
    width: usize,
    pooling: Pooling,
}

impl Pool {
    fn with<R>(&self, f: impl FnOnce(Shape<'_>) -> R) -> R {
        let cu_seqlens = Tensor::from_slice(&borders(self.lengths));
        let (sequences, width, pooling) = (self.lengths.len(), self.width, self.pooling);
        f(Shape { sequences: sequences.into(), width, cu_seqlens: &cu_seqlens, pooling })
    }
}

impl Op for Pool {
    fn inputs(&self) -> Vec<(&'static str, Vec<f64>)> {
        vec![("x", normal(self.lengths.iter().sum::<usize>() * self.width, 1, 1.0))]
    }

    fn forward(&self, lab: &Lab, x: &[Vec<f64>]) -> Vec<f64> {
        let y = lab.set(self.lengths.len() * self.width);
        self.with(|shape| forward(CPU, shape, &lab.tensor(&x[0]), &y.tensor));
        y.take()
    }

    fn backward(&self, lab: &Lab, x: &[Vec<f64>], dy: &[f64]) -> Vec<Vec<f64>> {
        let dx = lab.set(x[0].len());
        self.with(|shape| backward(CPU, shape, &lab.tensor(dy), &dx.tensor));
        vec![dx.take()]
    }

    /// A sum in order over the longest sequence, and a division.
    fn growth(&self) -> f64 {
        2.0 + (*self.lengths.iter().max().unwrap() as f64).sqrt()
    }
}

#[test]
fn pools_sequences_of_every_length() {
    for pooling in [Pooling::Cls, Pooling::Mean] {
        check(&Pool { lengths: &[1], width: 1, pooling });
        check(&Pool { lengths: &[1, 5, 2, 1], width: 13, pooling });
        check(&Pool { lengths: &[130, 1], width: 3, pooling });
    }
}

#[test]
fn pooling_is_what_it_says() {
    let x = [1.0, 2.0, 3.0, 6.0, 100.0, 200.0];
    let lab = Lab { dtype: DType::F64, start: 0.0 };
    let run = |pooling| Pool { lengths: &[2, 1], width: 2, pooling }.forward(&lab, &[x.to_vec()]);
    assert_eq!(run(Pooling::Cls), [1.0, 2.0, 100.0, 200.0]);
    assert_eq!(run(Pooling::Mean), [2.0, 4.0, 100.0, 200.0]);
}

struct Normalize {
    rows: usize,
    width: usize,
    deviation: f32,
}

impl Op for Normalize {
    fn inputs(&self) -> Vec<(&'static str, Vec<f64>)> {
        vec![("x", normal(self.rows * self.width, 1, self.deviation))]
    }

    fn forward(&self, lab: &Lab, x: &[Vec<f64>]) -> Vec<f64> {
        let (y, norm) = (lab.set(x[0].len()), lab.set(self.rows));
        normalize(CPU, (self.rows.into(), self.width), &lab.tensor(&x[0]), &y.tensor, &norm.tensor);
        norm.take();
        y.take()
    }

    fn backward(&self, lab: &Lab, x: &[Vec<f64>], dy: &[f64]) -> Vec<Vec<f64>> {
        let (y, norm, dx) = (lab.set(x[0].len()), lab.set(self.rows), lab.set(x[0].len()));
        let size = (self.rows.into(), self.width);
        normalize(CPU, size, &lab.tensor(&x[0]), &y.tensor, &norm.tensor);
        normalize_backward(CPU, size, &y.tensor, &norm.tensor, &lab.tensor(dy), &dx.tensor);
        vec![dx.take()]
    }

    /// Two sums over the width.
    fn growth(&self) -> f64 {
        8.0 + (self.width as f64).sqrt()
    }
}

#[test]
fn normalizes_rows() {
    check(&Normalize { rows: 1, width: 2, deviation: 1.0 });
    check(&Normalize { rows: 5, width: 13, deviation: 1.0 });
    check(&Normalize { rows: 3, width: 300, deviation: 50.0 });
}

/// A row of zeros stays one, and below ε rows are only scaled, so that their gradient has no projection.
#[test]
fn rows_without_length_are_scaled_by_a_constant() {
    let lab = Lab { dtype: DType::F64, start: 0.0 };
    let case = Normalize { rows: 2, width: 2, deviation: 1.0 };
    let x = [vec![0.0, 0.0, 3e-14, 4e-14]];
    let expected: Vec<f64> = x[0].iter().map(|x| x / LEAST_NORM).collect();
    assert_eq!(case.forward(&lab, &x), expected);
    let dy = [1.0, -2.0, 3.0, 4.0];
    assert_eq!(case.backward(&lab, &x, &dy)[0], dy.map(|g| g / LEAST_NORM));
}
