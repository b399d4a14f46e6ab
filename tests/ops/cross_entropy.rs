//! LM head and cross entropy, chunk by chunk.

use retromae_engine::device::{DType, Tensor};
use retromae_engine::ops::cross_entropy::{CrossEntropy, Gradients, Shape, run};

use super::common::{CPU, Lab, Op, Out, below, check, equal_bits, normal};

struct Case {
    rows: usize,
    width: usize,
    vocabulary: usize,
    chunk: usize,
}

const PLAIN: Case = Case { rows: 5, width: 13, vocabulary: 19, chunk: 16 };

/// `Σ loss` and the number of correct rows, and with a scale the gradients of h, w, b.
struct Done {
    sums: Vec<f64>,
    gradients: Option<Vec<Vec<f64>>>,
}

impl Case {
    fn labels(&self) -> Vec<u32> {
        // Repeated labels, and both ends of the vocabulary.
        let mut labels = below(self.rows, self.vocabulary as u32, 1);
        labels[0] = self.vocabulary as u32 - 1;
        if self.rows > 2 {
            labels[1] = 0;
            labels[2] = 0;
        }
        labels
    }

    fn run(&self, lab: &Lab, x: &[Vec<f64>], scale: Option<f64>) -> Done {
        let Case { rows, width, vocabulary, chunk } = *self;
        let [h, w, b] = [0, 1, 2].map(|i| lab.tensor(&x[i]));
        let (logits, row_loss) = (lab.set(chunk * vocabulary), lab.set(rows));
        let (row_correct, sums) = (Tensor::from_slice(&vec![7u32; rows]), Tensor::from_slice(&[0.0f64; 2]));
        let outs: [Out; 3] = [lab.set(x[0].len()), lab.acc(x[1].len()), lab.acc(x[2].len())];
        let [dh, dw_acc, db_acc] = outs.each_ref().map(|o| &o.tensor);
        run(
            CPU,
            &CrossEntropy {
                shape: Shape { rows: rows.into(), width, vocabulary, chunk },
                h: &h,
                w: &w,
                b: &b,
                labels: &Tensor::from_slice(&self.labels()),
                logits: &logits.tensor,
                row_loss: &row_loss.tensor,
                row_correct: &row_correct,
                sums_acc: &sums,
                gradients: scale.map(|scale| Gradients { scale: scale.into(), dh, dw_acc, db_acc }),
            },
        );
        // For what lies past their ends.
        logits.take();
        row_loss.take();
        let gradients = scale.map(|_| outs.iter().map(Out::take).collect());
        Done { sums: sums.to_vec(), gradients }
    }

    /// Loss and correct rows in plain f64.
    fn naive(&self, x: &[Vec<f64>]) -> [f64; 2] {
        let mut sums = [0.0; 2];
        for (h, label) in x[0].chunks(self.width).zip(self.labels()) {
            let logit = |(w, b): (&[f64], &f64)| w.iter().zip(h).map(|(w, h)| w * h).sum::<f64>() + b;
            let logits: Vec<f64> = x[1].chunks(self.width).zip(&x[2]).map(logit).collect();
            let own = logits[label as usize];
            sums[0] += logits.iter().map(|x| x.exp()).sum::<f64>().ln() - own;
            sums[1] += f64::from(u8::from(logits.iter().all(|&x| x <= own)));
        }
        sums
    }
}

impl Op for Case {
    fn inputs(&self) -> Vec<(&'static str, Vec<f64>)> {
        let (r, c, v) = (self.rows, self.width, self.vocabulary);
        // Logits of size 1 or so whatever the width.
        let deviation = 1.0 / (c as f32).sqrt();
        vec![("h", normal(r * c, 1, 1.0)), ("w", normal(v * c, 2, deviation)), ("b", normal(v, 3, 0.5))]
    }

    fn forward(&self, lab: &Lab, x: &[Vec<f64>]) -> Vec<f64> {
        vec![self.run(lab, x, None).sums[0]]
    }

    /// The weight of the loss is the scale of its gradients.
    fn backward(&self, lab: &Lab, x: &[Vec<f64>], dy: &[f64]) -> Vec<Vec<f64>> {
        self.run(lab, x, Some(dy[0])).gradients.unwrap()
    }

    /// Logits are random walks over C, the exponentials' error a few roundings; sums over V or over rows follow.
    fn growth(&self) -> f64 {
        16.0 + 2.0 * (self.width.max(self.vocabulary).max(self.rows) as f64).sqrt()
    }
}

#[test]
fn one_row() {
    check(&Case { rows: 1, ..PLAIN });
}

#[test]
fn one_chunk_not_filled() {
    check(&PLAIN);
}

#[test]
fn several_chunks_with_a_remainder() {
    check(&Case { rows: 11, chunk: 4, ..PLAIN });
}

#[test]
fn chunks_without_a_remainder_and_of_one_row() {
    check(&Case { rows: 8, chunk: 4, ..PLAIN });
    check(&Case { rows: 3, chunk: 1, ..PLAIN });
}

/// The bias gradient is summed by blocks of 512 columns.
#[test]
fn a_vocabulary_over_two_blocks() {
    check(&Case { rows: 6, width: 3, vocabulary: 517, chunk: 4 });
}

#[test]
fn a_vocabulary_of_two_and_a_width_of_one() {
    check(&Case { rows: 3, width: 1, vocabulary: 2, chunk: 16 });
}

#[test]
fn sums_are_those_of_the_definition_with_and_without_gradients() {
    for case in [PLAIN, Case { rows: 40, vocabulary: 3, chunk: 16, ..PLAIN }] {
        let x: Vec<Vec<f64>> = case.inputs().into_iter().map(|i| i.1).collect();
        let lab = Lab { dtype: DType::F64, start: 0.0 };
        let (plain, with) = (case.run(&lab, &x, None), case.run(&lab, &x, Some(0.1)));
        assert!(equal_bits(&plain.sums, &with.sums), "evaluation and training agree");
        let expected = case.naive(&x);
        assert!((plain.sums[0] / expected[0] - 1.0).abs() < 1e-14, "{} instead of {}", plain.sums[0], expected[0]);
        assert_eq!(plain.sums[1], expected[1]);
    }
}

/// Logits far beyond the range of the exponential.
#[test]
fn large_logits_stay_finite() {
    let mut x: Vec<Vec<f64>> = PLAIN.inputs().into_iter().map(|i| i.1).collect();
    x[0].iter_mut().for_each(|x| *x *= 1000.0);
    let done = PLAIN.run(&Lab { dtype: DType::F32, start: 0.0 }, &x, Some(0.1));
    assert!(done.gradients.unwrap().iter().flatten().chain(&done.sums).all(|x| x.is_finite()));
}
