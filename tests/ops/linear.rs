//! `y = x wᵀ + b` and its gradients.

use retromae_engine::device::{DType, Matrix, Output, Tensor};
use retromae_engine::ops::linear::{Backward, Forward, backward, forward};

use super::common::{CPU, Lab, Op, check, equal_bits, normal};

/// Sizes, whether there is a bias, columns that x, y and their gradients are narrower than the buffers they lie in, and whether dx is
/// added to.
struct Case {
    rows: usize,
    inputs: usize,
    outputs: usize,
    bias: bool,
    gap: usize,
    dx: Output,
}

const PLAIN: Case = Case { rows: 1, inputs: 1, outputs: 1, bias: true, gap: 0, dx: Output::Set };

/// Puts dense rows into a wider matrix, after `gap` columns of NaN.
fn spread(x: &[f64], columns: usize, gap: usize) -> Vec<f64> {
    x.chunks(columns).flat_map(|row| [&vec![f64::NAN; gap][..], row].concat()).collect()
}

/// The inverse of [`spread`]; the gap must still be as it was.
fn gather(x: &[f64], columns: usize, gap: usize, untouched: impl Fn(f64) -> bool) -> Vec<f64> {
    let rows = x.chunks(columns + gap);
    rows.flat_map(|row| {
        assert!(row[..gap].iter().all(|&x| untouched(x)), "columns of a neighbour were written");
        row[gap..].to_vec()
    })
    .collect()
}

impl Case {
    fn matrix<'a>(&self, tensor: &'a Tensor, columns: usize) -> Matrix<'a> {
        Matrix::columns(tensor, self.gap, columns + self.gap)
    }
}

impl Op for Case {
    fn inputs(&self) -> Vec<(&'static str, Vec<f64>)> {
        let (r, k, n) = (self.rows, self.inputs, self.outputs);
        let mut all = vec![("x", normal(r * k, 1, 1.0)), ("w", normal(n * k, 2, 1.0))];
        all.extend(self.bias.then(|| ("b", normal(n, 3, 1.0))));
        all
    }

    fn forward(&self, lab: &Lab, x: &[Vec<f64>]) -> Vec<f64> {
        let (rows, inputs, outputs, gap) = (self.rows, self.inputs, self.outputs, self.gap);
        let (input, w) = (lab.tensor(&spread(&x[0], inputs, gap)), lab.tensor(&x[1]));
        let b = x.get(2).map(|b| lab.tensor(b));
        let y = lab.set(rows * (outputs + gap));
        let (x, to) = (self.matrix(&input, inputs), self.matrix(&y.tensor, outputs));
        forward(CPU, &Forward { rows: rows.into(), inputs, outputs, x, w: &w, b: b.as_ref(), y: to });
        gather(&y.take(), outputs, gap, f64::is_nan)
    }

    fn backward(&self, lab: &Lab, x: &[Vec<f64>], dy: &[f64]) -> Vec<Vec<f64>> {
        let (rows, inputs, outputs, gap) = (self.rows, self.inputs, self.outputs, self.gap);
        let (input, w) = (lab.tensor(&spread(&x[0], inputs, gap)), lab.tensor(&x[1]));
        let dy = lab.tensor(&spread(dy, outputs, gap));
        let len = rows * (inputs + gap);
        let dx = if self.dx == Output::Set { lab.set(len) } else { lab.acc(len) };
        let (dw, db) = (lab.acc(outputs * inputs), lab.acc(outputs));
        backward(
            CPU,
            &Backward {
                rows: rows.into(),
                inputs,
                outputs,
                x: self.matrix(&input, inputs),
                w: &w,
                dy: self.matrix(&dy, outputs),
                dx: Some((self.matrix(&dx.tensor, inputs), self.dx)),
                dw_acc: &dw.tensor,
                db_acc: self.bias.then_some(&db.tensor),
            },
        );
        let untouched = |x: f64| if self.dx == Output::Set { x.is_nan() } else { x == 0.0 };
        let mut all = vec![gather(&dx.take(), inputs, gap, untouched), dw.take()];
        all.extend(self.bias.then(|| db.take()));
        all
    }

    /// A sum of n products of independent signs is off by √n roundings of its own size (random walk); the longest is over K, N or R.
    fn growth(&self) -> f64 {
        4.0 + 2.0 * (self.inputs.max(self.outputs).max(self.rows) as f64).sqrt()
    }
}

#[test]
fn one_element() {
    check(&PLAIN);
}

#[test]
fn one_row_takes_a_matrix_vector_path() {
    check(&Case { inputs: 33, outputs: 7, ..PLAIN });
}

#[test]
fn one_output_and_one_input() {
    check(&Case { rows: 9, inputs: 33, ..PLAIN });
    check(&Case { rows: 9, outputs: 33, ..PLAIN });
}

#[test]
fn no_size_is_a_multiple_of_the_vector_width() {
    check(&Case { rows: 5, inputs: 13, outputs: 19, ..PLAIN });
}

#[test]
fn without_bias() {
    check(&Case { rows: 5, inputs: 13, outputs: 19, bias: false, ..PLAIN });
}

#[test]
fn the_input_gradient_is_added_to() {
    check(&Case { rows: 5, inputs: 13, outputs: 19, dx: Output::Add, ..PLAIN });
}

#[test]
fn inside_a_wider_matrix() {
    check(&Case { rows: 5, inputs: 13, outputs: 19, gap: 3, ..PLAIN });
    check(&Case { rows: 5, inputs: 13, outputs: 19, gap: 3, bias: false, dx: Output::Add });
}

#[test]
fn bias_gradient_over_two_blocks_of_columns() {
    check(&Case { rows: 3, inputs: 2, outputs: 259, ..PLAIN });
}

#[test]
fn large_enough_that_threads_share_the_product() {
    check(&Case { rows: 131, inputs: 97, outputs: 103, ..PLAIN });
}

#[test]
fn no_row_leaves_gradients_as_they_were() {
    let case = Case { rows: 0, inputs: 13, outputs: 19, ..PLAIN };
    let x: Vec<Vec<f64>> = case.inputs().into_iter().map(|i| i.1).collect();
    let lab = Lab { dtype: DType::F32, start: 1.0 };
    assert!(case.forward(&lab, &x).is_empty());
    let gradients = case.backward(&lab, &x, &[]);
    assert!(gradients.iter().flatten().all(|&g| g == 0.0));
}

/// A row's result has the same bits among any number of rows: a text's embedding does not depend on the batch.
#[test]
fn a_row_does_not_depend_on_how_many_there_are() {
    for (inputs, outputs) in [(64, 192), (37, 64), (64, 37), (300, 1)] {
        let all = Case { rows: 300, inputs, outputs, ..PLAIN };
        let x: Vec<Vec<f64>> = all.inputs().into_iter().map(|i| i.1).collect();
        let lab = Lab { dtype: DType::F32, start: 0.0 };
        let full = all.forward(&lab, &x);
        for rows in [1, 2, 3, 4, 5, 8, 17, 64, 65, 256, 257] {
            let x = [x[0][..rows * inputs].to_vec(), x[1].clone(), x[2].clone()];
            let y = Case { rows, ..all }.forward(&lab, &x);
            assert!(equal_bits(&y, &full[..rows * outputs]), "{rows} rows, {inputs} to {outputs}");
        }
    }
}
