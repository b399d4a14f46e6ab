//! Multi-head self-attention over packed sequences, for queries of all rows and of some.

use retromae_engine::device::{DType, Matrix, Tensor};
use retromae_engine::ops::attention::{Backward, Forward, Gradient, Shape, backward, forward};

use super::common::{CPU, Lab, Names, Op, Out, borders, check, dropout, equal_bits, normal, relative};

/// `queries`: positions of each sequence that ask, or all of them.
struct Case<'a> {
    heads: usize,
    head_size: usize,
    lengths: &'a [usize],
    queries: Option<&'a [&'a [u32]]>,
    p: f32,
}

const PLAIN: Case = Case { heads: 3, head_size: 5, lengths: &[1, 2, 33], queries: None, p: 0.0 };

/// One row, the last, none, and all of a short one.
const SOME: &[&[u32]] = &[&[0], &[1], &[], &[0, 1, 2]];
const SOME_LENGTHS: &[usize] = &[1, 2, 33, 3];

struct Problem {
    cu_rows: Tensor,
    cu_seqlens: Tensor,
    names: Names,
    rows: usize,
    tokens: usize,
}

impl Case<'_> {
    fn positions(&self) -> Vec<Vec<u32>> {
        match self.queries {
            Some(queries) => queries.iter().map(|q| q.to_vec()).collect(),
            None => self.lengths.iter().map(|&n| (0..n as u32).collect()).collect(),
        }
    }

    fn problem(&self) -> Problem {
        let positions = self.positions();
        let counts: Vec<usize> = positions.iter().map(Vec::len).collect();
        Problem {
            cu_rows: Tensor::from_slice(&borders(&counts)),
            cu_seqlens: Tensor::from_slice(&borders(self.lengths)),
            names: Names::of(&positions),
            rows: counts.iter().sum(),
            tokens: self.lengths.iter().sum(),
        }
    }

    fn width(&self) -> usize {
        self.heads * self.head_size
    }

    fn shape<'a>(&self, p: &'a Problem) -> Shape<'a> {
        let (cu_rows, cu_seqlens) = (&p.cu_rows, &p.cu_seqlens);
        let sequences = self.lengths.len();
        Shape { sequences, heads: self.heads, head_size: self.head_size, cu_rows, cu_seqlens, work: None }
    }

    /// Queries, keys, values as the graph lays them out: `[T, 3C]` for queries of all rows, else `[R, C]` and `[T, 2C]`.
    fn operands(&self, lab: &Lab, x: &[Vec<f64>]) -> Vec<Tensor> {
        let rows = |x: &[&Vec<f64>]| {
            let count = x[0].len() / self.width();
            let row = |i: usize| x.iter().flat_map(move |x| &x[i * self.width()..(i + 1) * self.width()]);
            lab.tensor(&(0..count).flat_map(row).copied().collect::<Vec<_>>())
        };
        match self.queries {
            None => vec![rows(&[&x[0], &x[1], &x[2]])],
            Some(_) => vec![lab.tensor(&x[0]), rows(&[&x[1], &x[2]])],
        }
    }

    fn matrices<'a>(&self, t: &'a [Tensor]) -> [Matrix<'a>; 3] {
        let c = self.width();
        match t {
            [wide] => [0, c, 2 * c].map(|offset| Matrix::columns(wide, offset, 3 * c)),
            _ => [Matrix::new(&t[0], c), Matrix::columns(&t[1], 0, 2 * c), Matrix::columns(&t[1], c, 2 * c)],
        }
    }

    fn run(&self, lab: &Lab, x: &[Vec<f64>]) -> [Out; 2] {
        let (p, operands) = (self.problem(), self.operands(lab, x));
        let [q, k, v] = self.matrices(&operands);
        let (out, lse) = (lab.set(p.rows * self.width()), lab.set(p.rows * self.heads));
        forward(
            CPU,
            &Forward {
                shape: self.shape(&p),
                q,
                k,
                v,
                names: p.names.rows(),
                dropout: dropout(self.p, 6),
                out: &out.tensor,
                lse: &lse.tensor,
            },
        );
        [out, lse]
    }
}

/// Columns `part` of `parts` side by side.
fn columns(x: &[f64], c: usize, part: usize, parts: usize) -> Vec<f64> {
    x.chunks(parts * c).flat_map(|row| row[part * c..(part + 1) * c].to_vec()).collect()
}

impl Op for Case<'_> {
    fn inputs(&self) -> Vec<(&'static str, Vec<f64>)> {
        let (p, c) = (self.problem(), self.width());
        vec![
            ("q", normal(p.rows * c, 1, 1.0)),
            ("k", normal(p.tokens * c, 2, 1.0)),
            ("v", normal(p.tokens * c, 3, 1.0)),
        ]
    }

    fn forward(&self, lab: &Lab, x: &[Vec<f64>]) -> Vec<f64> {
        let [out, lse] = self.run(lab, x);
        assert!(lse.take().iter().all(|x| x.is_finite()), "lse is written");
        out.take()
    }

    fn backward(&self, lab: &Lab, x: &[Vec<f64>], dy: &[f64]) -> Vec<Vec<f64>> {
        let (p, c, operands) = (self.problem(), self.width(), self.operands(lab, x));
        let ([out, lse], [q, k, v]) = (self.run(lab, x), self.matrices(&operands));
        let parts = if self.queries.is_none() { 3 } else { 2 };
        let (dq, wide, dout) = (lab.set(p.rows * c), lab.set(p.tokens * parts * c), lab.tensor(dy));
        backward(
            CPU,
            &Backward {
                forward: Forward {
                    shape: self.shape(&p),
                    q,
                    k,
                    v,
                    names: p.names.rows(),
                    dropout: dropout(self.p, 6),
                    out: &out.tensor,
                    lse: &lse.tensor,
                },
                dout: &dout,
                gradient: match self.queries {
                    None => Gradient::Fused(&wide.tensor),
                    Some(_) => Gradient::Split(&dq.tensor, &wide.tensor),
                },
            },
        );
        let wide = wide.take();
        let dq = if parts == 3 { columns(&wide, c, 0, 3) } else { dq.take() };
        vec![dq, columns(&wide, c, parts - 2, parts), columns(&wide, c, parts - 1, parts)]
    }

    /// A score (a random walk over D, of size up to about 4) is off by √D roundings of its size, its exponential by 4 times that; the
    /// backward takes differences of such numbers, and sums over D and L keys follow.
    fn growth(&self) -> f64 {
        let longest = self.lengths.iter().max().copied().unwrap_or(1);
        16.0 + 4.0 * (self.head_size as f64).sqrt() + 2.0 * (longest as f64).sqrt()
    }
}

#[test]
fn one_token() {
    check(&Case { lengths: &[1], ..PLAIN });
}

#[test]
fn sequences_of_1_2_and_33() {
    check(&PLAIN);
}

/// Keys over a vector and a rest, over a word of 32 and one more.
#[test]
fn lengths_around_the_vector_width() {
    check(&Case { lengths: &[15, 16, 17, 32, 65], ..PLAIN });
}

#[test]
fn head_sizes() {
    for head_size in [1, 32, 64, 128] {
        check(&Case { heads: 2, head_size, ..PLAIN });
    }
    check(&Case { heads: 1, head_size: 8, ..PLAIN });
}

#[test]
fn with_dropout() {
    check(&Case { p: 0.1, ..PLAIN });
    check(&Case { p: 0.5, head_size: 32, ..PLAIN });
}

#[test]
fn queries_of_some_rows() {
    check(&Case { lengths: SOME_LENGTHS, queries: Some(SOME), ..PLAIN });
    check(&Case { lengths: SOME_LENGTHS, queries: Some(SOME), p: 0.3, ..PLAIN });
}

#[test]
fn no_query_in_the_first_and_the_last_sequence() {
    check(&Case { lengths: &[4, 3, 5], queries: Some(&[&[], &[2], &[]]), ..PLAIN });
}

/// Scores far beyond the range of the exponential: the largest is subtracted first.
#[test]
fn large_scores_stay_finite() {
    let x: Vec<Vec<f64>> = PLAIN.inputs().into_iter().map(|i| i.1.into_iter().map(|x| 60.0 * x).collect()).collect();
    for dtype in [DType::F32, DType::F64] {
        let lab = Lab { dtype, start: 0.0 };
        let y = PLAIN.forward(&lab, &x);
        let gradients = PLAIN.backward(&lab, &x, &normal(y.len(), 4, 1.0));
        assert!(gradients.iter().flatten().chain(&y).all(|x| x.is_finite()));
    }
}

/// Pruning the last layer: a row's result, dropout included, does not depend on which other rows ask.
#[test]
fn some_rows_equal_the_same_rows_of_all() {
    let all = Case { lengths: SOME_LENGTHS, p: 0.3, ..PLAIN };
    let some = Case { queries: Some(SOME), ..all };
    let (c, starts) = (all.width(), borders(SOME_LENGTHS));
    let mut x: Vec<Vec<f64>> = all.inputs().into_iter().map(|i| i.1).collect();
    let rows: Vec<usize> =
        SOME.iter().zip(&starts).flat_map(|(q, s)| q.iter().map(move |p| (s + p) as usize)).collect();
    let pick = |m: &[f64]| rows.iter().flat_map(|r| m[r * c..(r + 1) * c].to_vec()).collect::<Vec<_>>();
    let lab = Lab { dtype: DType::F64, start: 0.0 };
    let full = pick(&all.forward(&lab, &x));
    x[0] = pick(&x[0]);
    let pruned = some.forward(&lab, &x);
    // The products may add up in another order, by rounding; a differing mask would show at 1e-1.
    assert!(relative(&pruned, &full) < 1e-14);
}

/// A sequence's result has the same bits with any neighbours.
#[test]
fn neighbours_do_not_matter() {
    let (alone, among) = (Case { lengths: &[33], p: 0.1, ..PLAIN }, Case { lengths: &[33, 5, 40], p: 0.1, ..PLAIN });
    let x: Vec<Vec<f64>> = among.inputs().into_iter().map(|i| i.1).collect();
    let own: Vec<Vec<f64>> = x.iter().map(|x| x[..33 * alone.width()].to_vec()).collect();
    let lab = Lab { dtype: DType::F32, start: 0.0 };
    assert!(equal_bits(&alone.forward(&lab, &own), &among.forward(&lab, &x)[..33 * alone.width()]));
}
