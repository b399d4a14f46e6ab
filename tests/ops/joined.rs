//! Joined embeddings: columns of words behind dense ones, and the way back through the rows in which words are largest.

use retromae_engine::device::{DType, Tensor};
use retromae_engine::ops::joined::{Backward, Shape, Words, backward, put, take};
use retromae_engine::ops::lexical::{self, Lexical};

use super::common::{CPU, Lab, Names, Op, borders, check, normal, on_threads};

#[derive(Clone, Copy)]
struct Case {
    lengths: &'static [usize],
    /// Row of each text.
    places: &'static [u32],
    width: usize,
    dense: usize,
    vocabulary: usize,
    k: usize,
    chunk: usize,
}

const PLAIN: Case =
    Case { lengths: &[5, 2, 9], places: &[3, 0, 1], width: 7, dense: 6, vocabulary: 20, k: 4, chunk: 100 };

/// What a forward leaves for the way back.
struct Found {
    ids: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    places: Tensor,
}

impl Case {
    fn rows(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Rows of `all`: one more than texts, which no text has.
    fn all(&self) -> usize {
        (self.lengths.len() + 1) * (self.dense + self.vocabulary)
    }

    fn shape<'a>(&self, found: &'a Found) -> Shape<'a> {
        Shape {
            texts: self.lengths.len().into(),
            cu_seqlens: &found.cu_seqlens,
            dense: self.dense,
            vocabulary: self.vocabulary,
            k: self.k,
        }
    }

    /// The words of all texts: which are the largest is `lexical`'s matter.
    fn words(&self, lab: &Lab, x: &[Vec<f64>]) -> Found {
        let names = Names::all(self.lengths);
        let texts = self.lengths.len();
        let found = Found {
            ids: Tensor::from_slice(&vec![0u32; texts * self.k]),
            weights: lab.set(texts * self.k).tensor,
            cu_seqlens: Tensor::from_slice(&borders(self.lengths)),
            places: Tensor::from_slice(self.places),
        };
        let [logits, maxima] = [0; 2].map(|_| lab.set(self.chunk * self.vocabulary).tensor);
        let shape = lexical::Shape {
            rows: self.rows().into(),
            cu_seqlens: &found.cu_seqlens,
            sequence: names.rows().sequence,
            width: self.width,
            vocabulary: self.vocabulary,
            chunk: self.chunk,
            k: self.k,
        };
        let (h, w, b) = (lab.tensor(&x[0]), lab.tensor(&x[1]), lab.tensor(&x[2]));
        let (ids, weights) = (&found.ids, &found.weights);
        lexical::run(CPU, &Lexical { shape, h: &h, w: &w, b: &b, logits: &logits, maxima: &maxima, ids, weights });
        found
    }
}

impl Op for Case {
    fn inputs(&self) -> Vec<(&'static str, Vec<f64>)> {
        vec![
            ("h", normal(self.rows() * self.width, 1, 1.0)),
            ("w", normal(self.vocabulary * self.width, 2, 0.5)),
            ("b", normal(self.vocabulary, 3, 0.5)),
            ("dense", normal(self.lengths.len() * self.dense, 4, 1.0)),
        ]
    }

    fn forward(&self, lab: &Lab, x: &[Vec<f64>]) -> Vec<f64> {
        let found = self.words(lab, x);
        // The row that no text has stays as it is.
        let all = lab.in_place(&vec![0.0; self.all()]);
        let words = Words { ids: &found.ids, weights: &found.weights };
        put(CPU, self.shape(&found), &lab.tensor(&x[3]), words, &found.places, &all.tensor);
        all.take()
    }

    fn backward(&self, lab: &Lab, x: &[Vec<f64>], dy: &[f64]) -> Vec<Vec<f64>> {
        let (found, texts) = (self.words(lab, x), self.lengths.len());
        let (d_dense, d_weights) = (lab.set(x[3].len()), lab.set(texts * self.k));
        let d_words = Words { ids: &found.ids, weights: &d_weights.tensor };
        take(CPU, self.shape(&found), &d_dense.tensor, d_words, &found.places, &lab.tensor(dy));
        let (dh, dw, db) = (lab.set(x[0].len()), lab.acc(x[1].len()), lab.acc(x[2].len()));
        backward(
            CPU,
            &Backward {
                shape: self.shape(&found),
                rows: self.rows().into(),
                width: self.width,
                chunk: self.chunk,
                h: &lab.tensor(&x[0]),
                w: &lab.tensor(&x[1]),
                d_words,
                winners: &Tensor::from_slice(&vec![7u32; texts * self.k]),
                g: &lab.set(self.chunk * self.vocabulary).tensor,
                dh: &dh.tensor,
                dw_acc: &dw.tensor,
                db_acc: &db.tensor,
            },
        );
        vec![dh.take(), dw.take(), db.take(), d_dense.take()]
    }

    /// Sums over the width, the vocabulary or the rows.
    fn growth(&self) -> f64 {
        8.0 + (self.width.max(self.vocabulary).max(self.rows()) as f64).sqrt()
    }
}

#[test]
fn gradients_go_through_the_largest_rows() {
    check(&PLAIN);
    // A text of one row, which has no words, first and last; all words; a single one; the same word of several texts.
    check(&Case { lengths: &[1, 6, 2, 1], places: &[0, 4, 2, 1], ..PLAIN });
    check(&Case { k: 20, ..PLAIN });
    check(&Case { k: 1, width: 1, dense: 1, ..PLAIN });
    check(&Case { lengths: &[3; 12], places: &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12], vocabulary: 5, ..PLAIN });
}

#[test]
fn chunks_and_threads_change_nothing() {
    let lab = Lab { dtype: DType::F64, start: 0.5 };
    let x: Vec<Vec<f64>> = PLAIN.inputs().into_iter().map(|input| input.1).collect();
    let dy = normal(PLAIN.all(), 9, 1.0);
    let whole = PLAIN.backward(&lab, &x, &dy);
    for chunk in [1, 3, 9, 16] {
        for threads in [1, 2] {
            let parts = on_threads(threads, || Case { chunk, ..PLAIN }.backward(&lab, &x, &dy));
            for (part, whole) in parts.iter().zip(&whole) {
                assert!(part.iter().zip(whole).all(|(a, b)| (a - b).abs() < 1e-13), "chunks of {chunk}");
            }
        }
    }
}

/// Of rows that are equally large the first counts.
#[test]
fn ties_go_to_the_first_row() {
    let lab = Lab { dtype: DType::F64, start: 0.0 };
    let case = Case { lengths: &[4], places: &[0], width: 1, dense: 1, vocabulary: 2, k: 2, chunk: 3 };
    // The rows after the first have the logits 2, 2 and 1 of word 0.
    let x = [vec![9.0, 2.0, 2.0, 1.0], vec![1.0, 0.0], vec![0.0, 0.0], vec![5.0]];
    let dy = [0.0, 3.0, 4.0, 0.0, 0.0, 0.0];
    let [dh, dw, db, d_dense] = case.backward(&lab, &x, &dy).try_into().unwrap();
    // Word 1 is 0 everywhere, so its row is the first after [CLS], too.
    assert_eq!(dh, [0.0, 3.0, 0.0, 0.0]);
    assert_eq!(dw, [6.0, 8.0]);
    assert_eq!((db, d_dense), (vec![3.0, 4.0], vec![0.0]));
}
