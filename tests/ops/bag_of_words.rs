//! LM head with cross entropy and the bag-of-words loss, chunk by chunk of whole sequences.

use retromae_engine::data::batch::{Bags, PretrainBatch};
use retromae_engine::device::{DType, Tensor};
use retromae_engine::graph::Capacity;
use retromae_engine::graph::head_chunks::HeadChunks;
use retromae_engine::ops::bag_of_words::{BagOfWords, Gradients, run};
use retromae_engine::ops::{cross_entropy, gather};

use super::common::{CPU, Lab, Op, Out, below, borders, check, equal_bits, normal};

struct Case<'a> {
    lengths: &'a [usize],
    width: usize,
    vocabulary: usize,
    /// Rows of a chunk.
    chunk: usize,
    /// Words of the bag of a sequence of so many rows.
    words: fn(usize) -> usize,
}

const PLAIN: Case = Case { lengths: &[5, 3, 9, 2], width: 7, vocabulary: 19, chunk: 16, words: |n| n.min(6) };

/// Sums and, with scales, the gradients of h, w, b.
struct Done {
    labels: Vec<f64>,
    bags: Vec<f64>,
    gradients: Option<Vec<Vec<f64>>>,
}

impl Case<'_> {
    fn rows(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Every third row has a label, the first one of a sequence now and then.
    fn batch(&self) -> PretrainBatch {
        let mut bags = Bags::new();
        for (s, &n) in self.lengths.iter().enumerate() {
            let mut words = below((self.words)(n), self.vocabulary as u32, 40 + s as u64);
            words.sort_unstable();
            words.dedup();
            bags.push(&words, if words.is_empty() { 0.0 } else { 1.0 / (1 + n) as f32 });
        }
        let rows: Vec<u32> = (0..self.rows() as u32).step_by(3).collect();
        PretrainBatch {
            cu_seqlens: borders(self.lengths),
            samples: (0..self.lengths.len() as u64).collect(),
            encoder_ids: vec![0; self.rows()],
            encoder_label_ids: below(rows.len(), self.vocabulary as u32, 3),
            encoder_label_rows: rows,
            decoder: None,
            bags: Some(bags),
        }
    }

    fn run(&self, lab: &Lab, x: &[Vec<f64>], scales: Option<[f64; 2]>) -> Done {
        let (batch, c, v) = (self.batch(), self.width, self.vocabulary);
        let (rows, texts, labels) = (self.rows(), self.lengths.len(), batch.encoder_label_ids.len());
        let capacity = Capacity { tokens: rows, sequences: texts, length: self.chunk, encoder_labels: labels };
        let mut chunks = HeadChunks::new(CPU, capacity, self.chunk);
        chunks.set(&batch);
        let [y, w, b] = [0, 1, 2].map(|i| lab.tensor(&x[i]));
        let (h, dh, logits) = (lab.set(self.chunk * c), lab.set(self.chunk * c), lab.set(self.chunk * v));
        let (row_loss, bag_loss) = (lab.set(labels), lab.set(texts));
        let row_correct = Tensor::from_slice(&vec![7u32; labels]);
        let outs: [Out; 3] = [lab.set(x[0].len()), lab.acc(x[1].len()), lab.acc(x[2].len())];
        let [dy, dw_acc, db_acc] = outs.each_ref().map(|o| &o.tensor);
        for (stream, chunk) in chunks.chunks() {
            gather::gather(CPU, &y, stream, chunk.rows, c, &h.tensor);
            run(
                CPU,
                &BagOfWords {
                    shape: chunks.shape(c, v),
                    chunk,
                    h: &h.tensor,
                    w: &w,
                    b: &b,
                    logits: &logits.tensor,
                    row_loss: &row_loss.tensor,
                    row_correct: &row_correct,
                    bag_loss: &bag_loss.tensor,
                    gradients: scales.map(|[label, bag]| Gradients {
                        label_scale: label.into(),
                        bag_scale: bag.into(),
                        dh: &dh.tensor,
                        dw_acc,
                        db_acc,
                    }),
                },
            );
            if scales.is_some() {
                gather::scatter(CPU, &dh.tensor, stream, chunk.rows, c, dy);
            }
        }
        let sums = Tensor::from_slice(&[0.0f64; 2]);
        cross_entropy::sums(CPU, labels.into(), &row_loss.tensor, &row_correct, &sums);
        // For what lies past their ends.
        [&h, &dh, &logits, &row_loss].iter().for_each(|out| drop(out.take()));
        let gradients = scales.map(|_| outs.iter().map(Out::take).collect());
        Done { labels: sums.to_vec(), bags: bag_loss.take(), gradients }
    }

    /// Loss and correct rows of the labels, and the bags' losses, from all logits in plain f64.
    fn naive(&self, x: &[Vec<f64>]) -> ([f64; 2], Vec<f64>) {
        let (batch, c) = (self.batch(), self.width);
        let logits = |row: usize| -> Vec<f64> {
            let h = &x[0][row * c..][..c];
            x[1].chunks(c).zip(&x[2]).map(|(w, b)| w.iter().zip(h).map(|(w, h)| w * h).sum::<f64>() + b).collect()
        };
        let lse = |x: &[f64]| x.iter().map(|x| x.exp()).sum::<f64>().ln();
        let mut sums = [0.0; 2];
        for (&row, &label) in batch.encoder_label_rows.iter().zip(&batch.encoder_label_ids) {
            let x = logits(row as usize);
            sums[0] += lse(&x) - x[label as usize];
            sums[1] += f64::from(u8::from(x.iter().all(|&x1| x1 <= x[label as usize])));
        }
        let bags = batch.bags.unwrap();
        let loss = |s: usize| {
            let words = &bags.ids[bags.offsets[s] as usize..bags.offsets[s + 1] as usize];
            let mut rows = batch.cu_seqlens[s] as usize + 1..batch.cu_seqlens[s + 1] as usize;
            let Some(first) = rows.next().filter(|_| !words.is_empty()) else { return 0.0 };
            let mut u = logits(first);
            for row in rows {
                u.iter_mut().zip(logits(row)).for_each(|(u, x)| *u = u.max(x));
            }
            words.iter().map(|&word| f64::from(bags.weights[s]) * (lse(&u) - u[word as usize])).sum()
        };
        (sums, (0..self.lengths.len()).map(loss).collect())
    }

    fn values(&self) -> Vec<Vec<f64>> {
        self.inputs().into_iter().map(|i| i.1).collect()
    }
}

impl Op for Case<'_> {
    fn inputs(&self) -> Vec<(&'static str, Vec<f64>)> {
        let (r, c, v) = (self.rows(), self.width, self.vocabulary);
        // Logits of size 1 or so whatever the width.
        let deviation = 1.0 / (c as f32).sqrt();
        vec![("h", normal(r * c, 1, 1.0)), ("w", normal(v * c, 2, deviation)), ("b", normal(v, 3, 0.5))]
    }

    fn forward(&self, lab: &Lab, x: &[Vec<f64>]) -> Vec<f64> {
        let done = self.run(lab, x, None);
        vec![done.labels[0], done.bags.iter().sum()]
    }

    /// The weights of the losses are the scales of their gradients.
    fn backward(&self, lab: &Lab, x: &[Vec<f64>], dy: &[f64]) -> Vec<Vec<f64>> {
        self.run(lab, x, Some([dy[0], dy[1]])).gradients.unwrap()
    }

    /// As cross entropy; the weights of words are f32 on both sides.
    fn growth(&self) -> f64 {
        16.0 + 2.0 * (self.width.max(self.vocabulary).max(self.rows()) as f64).sqrt()
    }
}

#[test]
fn sequences_that_share_a_chunk() {
    check(&PLAIN);
}

#[test]
fn a_chunk_a_sequence_and_chunks_of_many() {
    check(&Case { lengths: &[16, 9, 16, 8, 8, 1, 1, 1, 14], ..PLAIN });
    check(&Case { lengths: &[3; 21], chunk: 64, ..PLAIN });
}

/// Sequences of one row, and bags without a word, have no loss; whole chunks of them neither.
#[test]
fn one_row_and_empty_bags() {
    check(&Case { lengths: &[1, 5, 1, 4], words: |n| if n == 4 { 0 } else { 3 }, ..PLAIN });
    let none = Case { lengths: &[1, 6, 1], words: |n| if n == 1 { 3 } else { 0 }, ..PLAIN };
    check(&none);
    let done = none.run(&Lab { dtype: DType::F64, start: 0.0 }, &none.values(), Some([0.0, 1.0]));
    assert_eq!(done.bags, [0.0; 3]);
    assert!(done.gradients.unwrap().iter().flatten().all(|&g| g == 0.0));
}

/// Longer than the slabs of the kernels, and a vocabulary over two blocks of columns of the bias gradient.
#[test]
fn long_sequences_and_a_wide_vocabulary() {
    check(&Case { lengths: &[130, 64, 65], width: 5, vocabulary: 40, chunk: 140, words: |n| n / 5 });
    check(&Case { lengths: &[4, 11], width: 3, vocabulary: 517, ..PLAIN });
}

#[test]
fn losses_are_those_of_the_definition_with_and_without_gradients() {
    for case in [PLAIN, Case { lengths: &[1, 16, 2, 7, 40], chunk: 40, vocabulary: 5, ..PLAIN }] {
        let (x, lab) = (case.values(), Lab { dtype: DType::F64, start: 0.0 });
        let (plain, with) = (case.run(&lab, &x, None), case.run(&lab, &x, Some([0.1, 0.3])));
        assert!(equal_bits(&plain.labels, &with.labels) && equal_bits(&plain.bags, &with.bags));
        let (sums, bags) = case.naive(&x);
        assert!((plain.labels[0] / sums[0] - 1.0).abs() < 1e-13, "{} instead of {}", plain.labels[0], sums[0]);
        assert_eq!(plain.labels[1], sums[1]);
        for (loss, expected) in plain.bags.iter().zip(bags) {
            assert!((loss - expected).abs() <= 1e-13 * expected.max(1.0), "{loss} instead of {expected}");
        }
    }
}

/// The gradient of a maximum that several rows share is the lowest one's; the first row of a sequence takes no part.
#[test]
fn ties_go_to_the_lowest_row() {
    let case = Case { lengths: &[4, 3], ..PLAIN };
    let (mut x, c) = (case.values(), case.width);
    let row = x[0][c..2 * c].to_vec();
    for same in [0, 2, 3, 4, 5, 6] {
        x[0][same * c..][..c].copy_from_slice(&row);
    }
    for dtype in [DType::F64, DType::F32] {
        let done = case.run(&Lab { dtype, start: 0.0 }, &x, Some([0.0, 1.0]));
        let gradients = done.gradients.unwrap();
        let used: Vec<bool> = gradients[0].chunks(c).map(|g| g.iter().any(|&g| g != 0.0)).collect();
        assert_eq!(used, [false, true, false, false, false, true, false]);
    }
}

/// Logits far beyond the range of the exponential, and words whose bias is −∞ as that of the padding.
#[test]
fn large_logits_and_padding_stay_finite() {
    let mut x = PLAIN.values();
    x[0].iter_mut().for_each(|x| *x *= 1000.0);
    let used: Vec<u32> = PLAIN.batch().bags.unwrap().ids.into_iter().chain(PLAIN.batch().encoder_label_ids).collect();
    let padding: Vec<usize> = (0..PLAIN.vocabulary).filter(|&v| !used.contains(&(v as u32))).collect();
    assert!(!padding.is_empty());
    padding.iter().for_each(|&v| x[2][v] = f64::NEG_INFINITY);
    let done = PLAIN.run(&Lab { dtype: DType::F32, start: 0.0 }, &x, Some([0.1, 0.2]));
    let gradients = done.gradients.unwrap();
    assert!(gradients.iter().flatten().chain(&done.bags).chain(&done.labels).all(|x| x.is_finite()));
    assert!(padding.iter().all(|&v| gradients[2][v] == 0.0), "padding has no gradient");
}
