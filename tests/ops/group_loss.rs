//! Losses of groups of scores, with and without a teacher.

use retromae_engine::device::{DType, Tensor};
use retromae_engine::ops::group_loss::{Gradient, GroupLoss, Kind, Shape, run};

use super::common::{CPU, Lab, Op, check, equal_bits, normal};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Which {
    CrossEntropy,
    Kl,
    MarginMse,
}
use Which::{CrossEntropy, Kl, MarginMse};

const ALL: [Which; 3] = [CrossEntropy, Kl, MarginMse];

#[derive(Clone, Copy)]
struct Case {
    which: Which,
    queries: usize,
    group: usize,
    stride: usize,
    temperature: f32,
}

const PLAIN: Case = Case { which: CrossEntropy, queries: 5, group: 4, stride: 1, temperature: 0.5 };

/// Loss of each query, whether it is correct, their sums, and the gradient of every element.
struct Done {
    loss: Vec<f64>,
    correct: Vec<u32>,
    sums: Vec<f64>,
    ds: Option<Vec<f64>>,
}

impl Case {
    fn teacher(&self) -> Vec<f64> {
        normal(self.queries * self.group, 2, 2.0)
    }

    fn run(&self, lab: &Lab, scores: &[f64], teacher: &[f64], scale: Option<f64>) -> Done {
        let Case { which, queries, group, stride, temperature } = *self;
        let (scores, teacher) = (lab.tensor(scores), lab.tensor(teacher));
        let (loss, ds) = (lab.set(queries), lab.set(queries * group * stride));
        let (correct, sums) = (Tensor::from_slice(&vec![7u32; queries + 1]), Tensor::from_slice(&[0.0f64; 2]));
        run(
            CPU,
            &GroupLoss {
                shape: Shape { queries: queries.into(), group, stride, temperature },
                kind: match which {
                    CrossEntropy => Kind::CrossEntropy,
                    Kl => Kind::Kl { teacher: &teacher },
                    MarginMse => Kind::MarginMse { teacher: &teacher },
                },
                scores: &scores,
                loss: &loss.tensor,
                correct: &correct,
                sums_acc: &sums,
                gradient: scale.map(|scale| Gradient { scale: scale.into(), ds: &ds.tensor }),
            },
        );
        let mut correct = correct.to_vec::<u32>();
        assert_eq!(correct.pop(), Some(7));
        Done { loss: loss.take(), correct, sums: sums.to_vec(), ds: scale.map(|_| ds.take()) }
    }

    /// Loss and correctness of each query as the definition says.
    fn naive(&self, scores: &[f64], teacher: &[f64]) -> Vec<(f64, u32)> {
        let softmax = |x: &[f64]| {
            let sum: f64 = x.iter().map(|x| x.exp()).sum();
            x.iter().map(|x| x.exp() / sum).collect::<Vec<_>>()
        };
        let scores: Vec<f64> = scores.iter().step_by(self.stride).map(|x| x / f64::from(self.temperature)).collect();
        let groups = scores.chunks(self.group).zip(teacher.chunks(self.group));
        groups
            .map(|(s, t)| {
                let (p, q) = (softmax(s), softmax(t));
                let loss = match self.which {
                    CrossEntropy => -p[0].ln(),
                    Kl => p.iter().zip(&q).map(|(p, q)| q * (q.ln() - p.ln())).sum(),
                    MarginMse => s.iter().zip(t).map(|(x, y)| ((s[0] - x) - (t[0] - y)).powi(2)).sum(),
                };
                (loss, u32::from(s.iter().all(|&x| x <= s[0])))
            })
            .collect()
    }
}

impl Op for Case {
    /// Columns beside the scores are numbers too, which have no gradient.
    fn inputs(&self) -> Vec<(&'static str, Vec<f64>)> {
        vec![("s", normal(self.queries * self.group * self.stride, 1, 1.0))]
    }

    fn forward(&self, lab: &Lab, x: &[Vec<f64>]) -> Vec<f64> {
        vec![self.run(lab, &x[0], &self.teacher(), None).sums[0]]
    }

    /// The weight of the losses is the scale of their gradient.
    fn backward(&self, lab: &Lab, x: &[Vec<f64>], dy: &[f64]) -> Vec<Vec<f64>> {
        vec![self.run(lab, &x[0], &self.teacher(), Some(dy[0])).ds.unwrap()]
    }

    /// An exponential turns the error of scores of size 1/τ into a relative one; differences cancel; a sum over the group follows.
    fn growth(&self) -> f64 {
        (16.0 + 2.0 * (self.group as f64).sqrt()) / f64::from(self.temperature).min(1.0)
    }
}

#[test]
fn every_loss_in_groups_of_every_size() {
    for which in ALL {
        check(&Case { which, ..PLAIN });
        check(&Case { which, queries: 1, group: 2, ..PLAIN });
        // More scores than a vector holds, with a remainder.
        check(&Case { which, queries: 2, group: 100, temperature: 1.0, ..PLAIN });
    }
}

#[test]
fn scores_in_the_first_column_of_a_matrix() {
    for which in ALL {
        let case = Case { which, stride: 8, ..PLAIN };
        check(&case);
        let s = &case.inputs()[0].1;
        let dense: Vec<f64> = s.iter().copied().step_by(8).collect();
        let lab = Lab { dtype: DType::F64, start: 0.0 };
        let wide = case.run(&lab, s, &case.teacher(), Some(0.1)).ds.unwrap();
        let narrow = Case { stride: 1, ..case }.run(&lab, &dense, &case.teacher(), Some(0.1)).ds.unwrap();
        assert!(equal_bits(&wide.iter().copied().step_by(8).collect::<Vec<_>>(), &narrow));
        assert!(wide.chunks(8).flat_map(|row| &row[1..]).all(|&g| g == 0.0));
    }
}

/// Nothing to tell apart: loss and gradient are 0, and the positive is the best.
#[test]
fn a_group_of_one() {
    for which in ALL {
        let case = Case { which, group: 1, ..PLAIN };
        let done = case.run(&Lab { dtype: DType::F64, start: 0.0 }, &case.inputs()[0].1, &case.teacher(), Some(1.0));
        assert!(done.loss.iter().chain(&done.ds.unwrap()).all(|&x| x == 0.0), "{which:?}");
        assert_eq!(done.sums, [0.0, 5.0]);
    }
}

#[test]
fn losses_are_those_of_the_definition_with_and_without_a_gradient() {
    for which in ALL {
        for case in [Case { which, ..PLAIN }, Case { which, queries: 40, group: 3, stride: 2, ..PLAIN }] {
            let (s, t, lab) = (&case.inputs()[0].1, case.teacher(), Lab { dtype: DType::F64, start: 0.0 });
            let (plain, with) = (case.run(&lab, s, &t, None), case.run(&lab, s, &t, Some(0.1)));
            assert!(equal_bits(&plain.loss, &with.loss) && equal_bits(&plain.sums, &with.sums));
            let naive = case.naive(s, &t);
            for (b, (loss, correct)) in naive.iter().enumerate() {
                assert!((plain.loss[b] - loss).abs() < 1e-13 * loss.max(1.0), "{which:?}: {} {loss}", plain.loss[b]);
                assert_eq!(plain.correct[b], *correct);
            }
            let total: f64 = plain.loss.iter().sum();
            assert!((plain.sums[0] - total).abs() <= 1e-14 * total);
            assert_eq!(plain.sums[1], naive.iter().map(|x| f64::from(x.1)).sum::<f64>());
        }
    }
}

const TWO: Case = Case { which: Kl, queries: 1, group: 2, stride: 1, temperature: 1.0 };

/// Worked out on paper: the student halves, the teacher gives 3/4 and 1/4.
#[test]
fn the_divergence_of_two_known_distributions() {
    let lab = Lab { dtype: DType::F64, start: 0.0 };
    let done = TWO.run(&lab, &[5.0, 5.0], &[3.0f64.ln(), 0.0], Some(0.5));
    let expected = 0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln();
    assert!((done.loss[0] - expected).abs() < 1e-15, "{}", done.loss[0]);
    let ds = done.ds.unwrap();
    assert!((ds[0] + 0.125).abs() < 1e-15 && (ds[1] - 0.125).abs() < 1e-15, "{ds:?}");
    // The positive shares the largest score.
    assert_eq!(done.correct, [1]);
}

#[test]
fn the_margins_of_known_scores() {
    let case = Case { which: MarginMse, group: 3, ..TWO };
    let done = case.run(&Lab { dtype: DType::F64, start: 0.0 }, &[1.0, 3.0, 0.0], &[2.0, 1.0, 1.0], Some(0.5));
    // Margins −2 and 1, the teacher's both 1.
    assert_eq!((done.loss, done.ds.unwrap(), done.correct), (vec![9.0], vec![-3.0, 3.0, 0.0], vec![0]));
}

/// A passage that the teacher rules out, and which the student may rule out too.
#[test]
fn a_score_of_minus_infinity_has_no_weight() {
    for dtype in [DType::F32, DType::F64] {
        let (lab, none) = (Lab { dtype, start: 0.0 }, f64::NEG_INFINITY);
        let two = TWO.run(&lab, &[1.0, 2.0], &[0.5, 0.25], Some(1.0));
        for which in [CrossEntropy, Kl] {
            let case = Case { which, group: 3, ..TWO };
            let done = case.run(&lab, &[1.0, 2.0, none], &[0.5, 0.25, none], Some(1.0));
            let ds = done.ds.unwrap();
            assert!(done.loss[0].is_finite() && ds[2] == 0.0);
            assert!(
                which != Kl || (equal_bits(&done.loss, &two.loss) && equal_bits(&ds[..2], two.ds.as_ref().unwrap()))
            );
        }
        let student = Case { group: 3, ..TWO }.run(&lab, &[1.0, 2.0, 0.0], &[0.5, 0.25, none], Some(1.0));
        assert!(student.loss[0].is_finite() && student.ds.unwrap()[2] > 0.0);
    }
}

/// Scores far beyond the range of the exponential; and a broken step must show.
#[test]
fn large_scores_stay_finite_and_nan_stays() {
    let lab = Lab { dtype: DType::F32, start: 0.0 };
    for which in ALL {
        let case = Case { which, ..PLAIN };
        let mut s: Vec<f64> = case.inputs()[0].1.iter().map(|x| x * 1e4).collect();
        let teacher: Vec<f64> = case.teacher().iter().map(|x| x * 1e4).collect();
        let done = case.run(&lab, &s, &teacher, Some(0.1));
        assert!(done.loss.iter().chain(&done.ds.unwrap()).all(|x| x.is_finite()), "{which:?}");
        s[2] = f64::NAN;
        let done = case.run(&lab, &s, &teacher, Some(0.1));
        assert!(done.loss[0].is_nan() && done.sums[0].is_nan(), "{which:?}");
        assert!(done.loss[1..].iter().all(|x| x.is_finite()), "{which:?}");
    }
}
