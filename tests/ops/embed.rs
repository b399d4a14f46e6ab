//! The embedding layer: table sums, LayerNorm, dropout.

use std::collections::BTreeMap;

use retromae_engine::device::Tensor;
use retromae_engine::ops::Groups;
use retromae_engine::ops::embed::{Backward, Forward, Tables, Tokens, backward, forward};
use retromae_engine::ops::layernorm::Shape;

use super::common::{CPU, Lab, Names, Op, Out, below, check, dropout, normal};

struct Case<'a> {
    lengths: &'a [usize],
    width: usize,
    words: u32,
    types: u32,
    p: f32,
}

const PLAIN: Case = Case { lengths: &[4, 1, 6], width: 13, words: 5, types: 2, p: 0.0 };

/// Owned index groups, made the plain way.
pub struct OwnGroups {
    count: usize,
    keys: Tensor,
    offsets: Tensor,
    rows: Tensor,
}

impl OwnGroups {
    /// Rows `0..keys.len()` by key.
    pub fn new(keys: &[u32]) -> Self {
        let mut groups = BTreeMap::<u32, Vec<u32>>::new();
        keys.iter().enumerate().for_each(|(row, &key)| groups.entry(key).or_default().push(row as u32));
        let mut offsets = vec![0];
        groups.values().for_each(|rows| offsets.push(offsets[offsets.len() - 1] + rows.len() as u32));
        OwnGroups {
            count: groups.len(),
            keys: Tensor::from_slice(&groups.keys().copied().collect::<Vec<_>>()),
            offsets: Tensor::from_slice(&offsets),
            rows: Tensor::from_slice(&groups.into_values().flatten().collect::<Vec<_>>()),
        }
    }

    pub fn groups(&self) -> Groups<'_> {
        let (count, entries) = (self.count.into(), self.rows.len());
        Groups { count, entries, keys: &self.keys, offsets: &self.offsets, rows: &self.rows }
    }
}

struct Problem {
    shape: Shape<'static>,
    ids: Vec<u32>,
    types: Vec<u32>,
    names: Names,
}

impl Case<'_> {
    fn problem(&self) -> Problem {
        let rows: usize = self.lengths.iter().sum();
        Problem {
            shape: Shape { rows: rows.into(), width: self.width, eps: 1e-12 },
            ids: below(rows, self.words, 1),
            types: below(rows, self.types, 2),
            names: Names::all(self.lengths),
        }
    }

    fn run(&self, lab: &Lab, x: &[Vec<f64>]) -> [Out; 3] {
        let p = self.problem();
        let x: Vec<Tensor> = x.iter().map(|x| lab.tensor(x)).collect();
        let rows = p.ids.len();
        let [y, mean, rstd] = [rows * self.width, rows, rows].map(|len| lab.set(len));
        forward(
            CPU,
            &Forward {
                shape: p.shape,
                tokens: Tokens {
                    ids: &Tensor::from_slice(&p.ids),
                    types: &Tensor::from_slice(&p.types),
                    names: p.names.rows(),
                },
                tables: tables(|i| &x[i]),
                dropout: dropout(self.p, 9),
                y: &y.tensor,
                mean: &mean.tensor,
                rstd: &rstd.tensor,
            },
        );
        [y, mean, rstd]
    }
}

fn tables<'a>(of: impl Fn(usize) -> &'a Tensor) -> Tables<'a> {
    Tables { word: of(0), position: of(1), token_type: of(2), gamma: of(3), beta: of(4) }
}

impl Op for Case<'_> {
    fn inputs(&self) -> Vec<(&'static str, Vec<f64>)> {
        let (c, longest) = (self.width, self.lengths.iter().max().copied().unwrap_or(0));
        vec![
            ("word", normal(self.words as usize * c, 1, 1.0)),
            // One position more than any row uses: its gradient stays zero.
            ("position", normal((longest + 1) * c, 2, 1.0)),
            ("type", normal(self.types as usize * c, 3, 1.0)),
            ("gamma", normal(c, 4, 0.5).into_iter().map(|x| x + 1.0).collect()),
            ("beta", normal(c, 5, 0.5)),
        ]
    }

    fn forward(&self, lab: &Lab, x: &[Vec<f64>]) -> Vec<f64> {
        self.run(lab, x)[0].take()
    }

    fn backward(&self, lab: &Lab, x: &[Vec<f64>], dy: &[f64]) -> Vec<Vec<f64>> {
        let (p, [_, mean, rstd]) = (self.problem(), self.run(lab, x));
        let gradients: Vec<Out> = x.iter().map(|x| lab.acc(x.len())).collect();
        let groups = [&p.ids, &p.names.position.to_vec(), &p.types].map(|keys| OwnGroups::new(keys));
        let x: Vec<Tensor> = x.iter().map(|x| lab.tensor(x)).collect();
        let dy = lab.in_place(dy);
        backward(
            CPU,
            &Backward {
                shape: p.shape,
                tokens: Tokens {
                    ids: &Tensor::from_slice(&p.ids),
                    types: &Tensor::from_slice(&p.types),
                    names: p.names.rows(),
                },
                tables: tables(|i| &x[i]),
                dropout: dropout(self.p, 9),
                mean: &mean.tensor,
                rstd: &rstd.tensor,
                dy: &dy.tensor,
                groups: [groups[0].groups(), groups[1].groups(), groups[2].groups()],
                grad_acc: tables(|i| &gradients[i].tensor),
            },
        );
        gradients.iter().map(Out::take).collect()
    }

    /// As LayerNorm, and sums of all rows of one word.
    fn growth(&self) -> f64 {
        16.0 + 2.0 * (self.width.max(self.lengths.iter().sum()) as f64).sqrt()
    }
}

#[test]
fn one_token() {
    check(&Case { lengths: &[1], ..PLAIN });
}

#[test]
fn repeated_ids() {
    check(&PLAIN);
}

#[test]
fn every_token_is_the_same_word() {
    check(&Case { words: 1, types: 1, ..PLAIN });
}

#[test]
fn with_dropout() {
    check(&Case { p: 0.1, ..PLAIN });
    check(&Case { p: 0.5, lengths: &[1, 2, 33], width: 16, ..PLAIN });
}

/// Table rows on both sides of the blocks of 64 that threads share, and rows over several blocks of partial sums.
#[test]
fn a_vocabulary_over_several_blocks() {
    check(&Case { lengths: &[33, 40, 66], words: 131, width: 3, p: 0.1, types: 1 });
}
