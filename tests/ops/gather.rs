//! Gather, scatter and sums of groups of rows.

use retromae_engine::device::{DType, Tensor};
use retromae_engine::ops::gather::{add_rows, gather, group_sums, scatter, scatter_add, zero, zero_rows};

use super::common::{CPU, Lab, Op, below, check, equal_bits, normal, on_threads};
use super::embed::OwnGroups;

/// `count` rows out of `rows`, with repetitions.
struct Case {
    rows: usize,
    count: usize,
    width: usize,
}

impl Case {
    fn chosen(&self) -> Vec<u32> {
        below(self.count, self.rows as u32, 1)
    }
}

impl Op for Case {
    fn inputs(&self) -> Vec<(&'static str, Vec<f64>)> {
        vec![("from", normal(self.rows * self.width, 1, 1.0))]
    }

    fn forward(&self, lab: &Lab, x: &[Vec<f64>]) -> Vec<f64> {
        let to = lab.set(self.count * self.width);
        gather(CPU, &lab.tensor(&x[0]), &Tensor::from_slice(&self.chosen()), self.count.into(), self.width, &to.tensor);
        to.take()
    }

    fn backward(&self, lab: &Lab, x: &[Vec<f64>], dy: &[f64]) -> Vec<Vec<f64>> {
        let (groups, to) = (OwnGroups::new(&self.chosen()), lab.acc(x[0].len()));
        group_sums(CPU, &lab.tensor(dy), groups.groups(), self.width, &to.tensor);
        vec![to.take()]
    }

    /// A random walk over the rows of the largest group, at most all.
    fn growth(&self) -> f64 {
        2.0 + (self.count as f64).sqrt()
    }
}

#[test]
fn a_gather_and_its_sums() {
    check(&Case { rows: 1, count: 1, width: 1 });
    check(&Case { rows: 7, count: 5, width: 13 });
    // All rows fall into one group.
    check(&Case { rows: 1, count: 40, width: 3 });
    // Rows before, at and after the borders of the blocks of 64 that threads share.
    check(&Case { rows: 129, count: 200, width: 3 });
    check(&Case { rows: 64, count: 64, width: 2 });
}

/// Row numbers around the borders of blocks of 64, and the last row.
const ROWS: [u32; 7] = [0, 1, 63, 64, 65, 128, 139];

/// Runs an op of distinct ascending rows on `to` (140 rows of 3 and a rest) and returns what it left.
fn apply(chosen: &[u32], to: &[f64], f: impl Fn(&Tensor, &Tensor, &Tensor) + Sync) -> Vec<f64> {
    let from = normal(chosen.len() * 3, 1, 1.0);
    let run = |threads| {
        let lab = Lab { dtype: DType::F32, start: 0.0 };
        let to = lab.in_place(to);
        on_threads(threads, || f(&lab.tensor(&from), &Tensor::from_slice(chosen), &to.tensor));
        to.take()
    };
    let (one, two) = (run(1), run(2));
    assert!(equal_bits(&one, &two));
    one
}

/// `apply` on `to` of these values against `expected(row, column, old, from)`, which gets `from` only for chosen rows.
fn scattered(initial: f64, f: impl Fn(&Tensor, &Tensor, &Tensor) + Sync, expected: impl Fn(f64, Option<f64>) -> f64) {
    for chosen in [&ROWS[..], &ROWS[3..4], &[]] {
        let from = normal(chosen.len() * 3, 1, 1.0);
        let result = apply(chosen, &[initial; 140 * 3], &f);
        for (at, &x) in result.iter().enumerate() {
            let source = chosen.iter().position(|&row| row as usize == at / 3).map(|i| from[i * 3 + at % 3]);
            let wanted = expected(initial, source);
            assert!(
                f64::from(wanted as f32).to_bits() == x.to_bits() || (wanted.is_nan() && x.is_nan()),
                "element {at}"
            );
        }
    }
}

#[test]
fn scatter_overwrites_the_chosen_rows_alone() {
    let run = |from: &Tensor, rows: &Tensor, to: &Tensor| scatter(CPU, from, rows, rows.len().into(), 3, to);
    scattered(f64::NAN, run, |old, from| from.unwrap_or(old));
}

#[test]
fn scatter_add_adds_to_the_chosen_rows_alone() {
    let run = |from: &Tensor, rows: &Tensor, to: &Tensor| scatter_add(CPU, from, rows, rows.len().into(), 3, to);
    scattered(1.0, run, |old, from| old + from.unwrap_or(0.0));
}

#[test]
fn zero_rows_clears_the_chosen_rows_alone() {
    let run = |_: &Tensor, rows: &Tensor, to: &Tensor| zero_rows(CPU, rows, rows.len().into(), 3, to);
    scattered(f64::NAN, run, |old, from| from.map_or(old, |_| 0.0));
}

#[test]
fn zero_clears_the_first_elements_alone() {
    // More than one block of the parallel loop, and a rest.
    for count in [0, 1, 65_536, 65_539] {
        let to = Lab { dtype: DType::F32, start: 0.0 }.set(65_540);
        zero(CPU, &to.tensor, count);
        let x = to.take();
        assert!(x[..count].iter().all(|&x| x == 0.0) && x[count..].iter().all(|x| x.is_nan()));
    }
}

#[test]
fn rows_are_sums_of_chosen_rows() {
    let (a_rows, b_rows, c) = ([2u32, 0, 1, 2], [0u32, 2, 2, 2], 5);
    let lab = Lab { dtype: DType::F32, start: 0.0 };
    let (a, b, to) = (normal(3 * c, 1, 1.0), normal(3 * c, 2, 1.0), lab.set(4 * c));
    let (a_tensor, b_tensor) = (lab.tensor(&a), lab.tensor(&b));
    let (chosen_a, chosen_b) = (Tensor::from_slice(&a_rows), Tensor::from_slice(&b_rows));
    add_rows(CPU, (&a_tensor, &chosen_a), (&b_tensor, &chosen_b), 4.into(), c, &to.tensor);
    let pairs = a_rows.iter().zip(&b_rows);
    let expected: Vec<f64> = pairs
        .flat_map(|(&p, &s)| (0..c).map(move |e| (p as usize * c + e, s as usize * c + e)))
        .map(|(p, s)| f64::from(a[p] as f32 + b[s] as f32))
        .collect();
    assert_eq!(to.take(), expected);
}
