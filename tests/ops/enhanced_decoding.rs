//! Attention of the enhanced decoder: queries in two parts or whole, a visibility mask for every position.

use retromae_engine::device::{DType, Matrix, Tensor};
use retromae_engine::ops::attention::Shape;
use retromae_engine::ops::enhanced_decoding::{Backward, Forward, Queries, Visible, backward, forward};

use super::common::{CPU, Lab, Names, Op, Out, below, borders, check, dropout, normal, values};

/// `queries`: positions of each sequence that ask. `mask` says whether pool row `r` of a sequence shows key `j`.
struct Case<'a> {
    heads: usize,
    head_size: usize,
    lengths: &'a [usize],
    queries: &'a [&'a [u32]],
    mask: fn(usize, usize) -> bool,
    p: f32,
    whole: bool,
}

const PLAIN: Case = Case {
    heads: 3,
    head_size: 5,
    lengths: &[3, 33, 40],
    queries: &[&[1], &[1, 2, 7, 31], &[1, 31, 32, 33, 38, 39]],
    mask: half,
    p: 0.0,
    whole: false,
};

/// Every second key or so.
fn half(row: usize, key: usize) -> bool {
    below(1, 2, (row * 1000 + key) as u64)[0] == 0
}

/// Bit rows of a sequence's pool; less than a row a position, as in a long text.
const POOL: usize = 4;

struct Problem {
    cu_rows: Tensor,
    cu_seqlens: Tensor,
    names: Names,
    rows: usize,
    tokens: usize,
    offsets: Tensor,
    words: Tensor,
    row: Tensor,
}

impl Case<'_> {
    fn problem(&self) -> Problem {
        let positions: Vec<Vec<u32>> = self.queries.iter().map(|q| q.to_vec()).collect();
        let counts: Vec<usize> = positions.iter().map(Vec::len).collect();
        let (mut offsets, mut words) = (vec![0], Vec::new());
        for &n in self.lengths {
            for row in 0..POOL {
                let bit = |j: usize| u32::from((self.mask)(row, j)) << (j % 32);
                words.extend((0..n).step_by(32).map(|w| (w..n.min(w + 32)).map(bit).sum::<u32>()));
            }
            offsets.push(words.len() as u32);
        }
        let tokens = self.lengths.iter().sum();
        let row: Vec<u16> = self.lengths.iter().flat_map(|&n| (0..n).map(|i| (i % POOL) as u16)).collect();
        Problem {
            cu_rows: Tensor::from_slice(&borders(&counts)),
            cu_seqlens: Tensor::from_slice(&borders(self.lengths)),
            names: Names::of(&positions),
            rows: counts.iter().sum(),
            tokens,
            offsets: Tensor::from_slice(&offsets),
            words: Tensor::from_slice(&words),
            row: Tensor::from_slice(&row),
        }
    }

    fn width(&self) -> usize {
        self.heads * self.head_size
    }

    fn longest(&self) -> usize {
        self.lengths.iter().max().copied().unwrap_or(0)
    }

    /// Runs `f` on the forward's arguments; keys and values lie side by side.
    fn with<R>(&self, lab: &Lab, x: &[Vec<f64>], f: impl FnOnce(Forward<'_>, &Problem) -> R) -> R {
        let (p, c) = (self.problem(), self.width());
        let kv: Vec<f64> = x[2].chunks(c).zip(x[3].chunks(c)).flat_map(|(k, v)| [k, v].concat()).collect();
        let (position, sentence, kv) = (lab.tensor(&x[0]), lab.tensor(&x[1]), lab.tensor(&kv));
        let of_row = |s: usize, at: u32| (0..c).map(move |e| x[0][at as usize * c + e] + x[1][s * c + e]);
        let whole = self.queries.iter().enumerate().flat_map(|(s, q)| q.iter().flat_map(move |&at| of_row(s, at)));
        let whole = lab.tensor(&whole.collect::<Vec<_>>());
        let (cu_rows, cu_seqlens) = (&p.cu_rows, &p.cu_seqlens);
        let (out, lse) = (lab.set(p.rows * c), lab.set(p.rows * self.heads));
        let a = Forward {
            shape: Shape {
                sequences: self.lengths.len(),
                heads: self.heads,
                head_size: self.head_size,
                cu_rows,
                cu_seqlens,
                work: None,
            },
            queries: match self.whole {
                true => Queries::Whole(&whole),
                false => Queries::Parts { position: &position, sentence: &sentence },
            },
            k: Matrix::columns(&kv, 0, 2 * c),
            v: Matrix::columns(&kv, c, 2 * c),
            visible: Visible { offsets: &p.offsets, words: &p.words, row: &p.row },
            names: p.names.rows(),
            dropout: dropout(self.p, 12),
            out: &out.tensor,
            lse: &lse.tensor,
        };
        forward(CPU, &a);
        assert!(lse.take().iter().all(|x| !x.is_nan()), "lse is written");
        let done = f(a, &p);
        out.take();
        done
    }
}

impl Op for Case<'_> {
    fn inputs(&self) -> Vec<(&'static str, Vec<f64>)> {
        let (c, tokens) = (self.width(), self.lengths.iter().sum::<usize>());
        vec![
            ("position", normal(self.longest() * c, 1, 1.0)),
            ("sentence", normal(self.lengths.len() * c, 2, 1.0)),
            ("k", normal(tokens * c, 3, 1.0)),
            ("v", normal(tokens * c, 4, 1.0)),
        ]
    }

    fn forward(&self, lab: &Lab, x: &[Vec<f64>]) -> Vec<f64> {
        self.with(lab, x, |a, p| values(a.out)[..p.rows * self.width()].to_vec())
    }

    fn backward(&self, lab: &Lab, x: &[Vec<f64>], dy: &[f64]) -> Vec<Vec<f64>> {
        let c = self.width();
        self.with(lab, x, |forward, p| {
            let (dout, dq, dkv): (_, Out, Out) = (lab.tensor(dy), lab.set(p.rows * c), lab.set(p.tokens * 2 * c));
            backward(CPU, &Backward { forward, dout: &dout, dq: &dq.tensor, dkv: &dkv.tensor });
            let (dq, dkv) = (dq.take(), dkv.take());
            let (mut dp, mut ds) = (vec![0.0; x[0].len()], vec![0.0; x[1].len()]);
            let names = self.queries.iter().enumerate().flat_map(|(s, q)| q.iter().map(move |&p| (s, p as usize)));
            for ((s, position), dq) in names.zip(dq.chunks(c)) {
                for (e, dq) in dq.iter().enumerate() {
                    dp[position * c + e] += dq;
                    ds[s * c + e] += dq;
                }
            }
            let part = |from: usize| dkv.chunks(2 * c).flat_map(|row| row[from..from + c].to_vec()).collect();
            vec![dp, ds, part(0), part(c)]
        })
    }

    /// As attention, with scores twice as large, their queries being sums.
    fn growth(&self) -> f64 {
        32.0 + 8.0 * (self.head_size as f64).sqrt() + 2.0 * (self.longest() as f64).sqrt()
    }
}

#[test]
fn pools_of_random_masks() {
    check(&PLAIN);
    check(&Case { p: 0.1, ..PLAIN });
    check(&Case { p: 0.1, whole: true, ..PLAIN });
}

#[test]
fn head_sizes() {
    for head_size in [1, 32, 64, 128] {
        check(&Case { heads: 2, head_size, p: 0.2, ..PLAIN });
    }
}

/// [CLS] word [SEP] is the shortest text with a label; [CLS] [SEP] has none.
#[test]
fn sequences_without_a_query() {
    check(&Case { lengths: &[2, 3, 33], queries: &[&[], &[1], &[]], ..PLAIN });
    check(&Case { lengths: &[1, 2], queries: &[&[0], &[0, 1]], mask: |_, _| true, ..PLAIN });
}

/// Rows of the pool: 0 nothing, 1 the first key alone, 2 everything, 3 the second key alone, which is the asking position itself once.
#[test]
fn rows_that_see_nothing_or_one_key() {
    fn mask(row: usize, key: usize) -> bool {
        [false, key == 0, true, key == 3][row]
    }
    let queries: &[&[u32]] = &[&[0], &[0, 1, 2, 3], &[3, 4, 32]];
    check(&Case { mask, queries, ..PLAIN });
    check(&Case { mask, queries, p: 0.3, ..PLAIN });
    let x: Vec<Vec<f64>> = PLAIN.inputs().into_iter().map(|i| i.1).collect();
    let y = Case { mask, queries, ..PLAIN }.forward(&Lab { dtype: DType::F64, start: 0.0 }, &x);
    let rows: Vec<&[f64]> = y.chunks(PLAIN.width()).collect();
    let values = |token: usize| &x[3][token * PLAIN.width()..][..PLAIN.width()];
    assert!(rows[0].iter().chain(rows[1]).all(|&x| x == 0.0), "row 0 of the pool shows nothing");
    assert!(rows[4].iter().all(|&x| x == 0.0), "position 3 does not see itself");
    assert_eq!(rows[2], values(3), "the first key alone");
}

/// No position sees itself, whatever its bit says.
#[test]
fn the_own_key_is_hidden() {
    let case = Case { lengths: &[4], queries: &[&[2]], mask: |_, key| key == 2 || key == 3, ..PLAIN };
    let x: Vec<Vec<f64>> = case.inputs().into_iter().map(|i| i.1).collect();
    let y = case.forward(&Lab { dtype: DType::F64, start: 0.0 }, &x);
    assert_eq!(y, x[3][3 * case.width()..]);
}
