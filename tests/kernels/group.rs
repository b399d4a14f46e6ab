//! Scores of queries with their own groups of passages, and losses of groups of scores.

use crate::harness::*;
use half::bf16;
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::kernels::*;
use retromae_engine::device::launch::{ConstPtr, MutPtr, Shape};
use retromae_engine::device::{DType, Device, Tensor};
use retromae_engine::error::Result;
use retromae_engine::ops::group_loss::{self, Kind};
use retromae_engine::ops::group_scores;

/// Queries of the capacity that are not in use.
const SPARE: usize = 3;

const TEMPERATURE: f32 = 0.5;

/// A size of groups, and which of the kernels' edges it is at.
#[derive(Clone, Copy)]
struct Scores {
    queries: usize,
    group: usize,
    width: usize,
}

/// Buffers of one run.
struct On<'a, T> {
    q: &'a Buffer<T>,
    p: &'a Buffer<T>,
    s: &'a Buffer<f32>,
    ds: &'a Buffer<f32>,
    dq: &'a Buffer<T>,
    dp: &'a Buffer<T>,
    queries: &'a Buffer<i32>,
}

/// Entry points of one storage type.
trait Kernels: Storage {
    fn forward(device: &'static Gpu, case: &Scores, on: &On<Self>) -> Result<()>;
    fn backward(device: &'static Gpu, case: &Scores, on: &On<Self>) -> Result<()>;
}

macro_rules! kernels {
    ($t:ty, $forward:ident, $backward:ident) => {
        impl Kernels for $t {
            fn forward(device: &'static Gpu, case: &Scores, on: &On<Self>) -> Result<()> {
                $forward {
                    s: on.s.get_mut(),
                    q: on.q.get(),
                    p: on.p.get(),
                    queries: on.queries.get(),
                    g: case.group as i32,
                    C: case.width as i32,
                    inverse_temperature: 1.0 / TEMPERATURE,
                }
                .launch(device, Shape::linear(((case.queries + SPARE) * case.group).div_ceil(8) as u32, 256))
            }

            fn backward(device: &'static Gpu, case: &Scores, on: &On<Self>) -> Result<()> {
                let grid = [(case.queries + SPARE) as u32, case.width.div_ceil(256) as u32, 1];
                $backward {
                    dq_acc: on.dq.get_mut(),
                    dp_acc: on.dp.get_mut(),
                    ds: on.ds.get(),
                    q: on.q.get(),
                    p: on.p.get(),
                    queries: on.queries.get(),
                    g: case.group as i32,
                    C: case.width as i32,
                    inverse_temperature: 1.0 / TEMPERATURE,
                }
                .launch(device, Shape { grid, ..Shape::linear(1, 256) })
            }
        }
    };
}
kernels!(f32, GroupScoresForwardF32, GroupScoresBackwardF32);
kernels!(bf16, GroupScoresForwardBf16, GroupScoresBackwardBf16);

fn check_scores<T: Kernels>(case: Scores) {
    let Scores { queries, group, width } = case;
    let rows = queries * group;
    let values = |rows: usize, name| rounded::<T>(&normal(rows * width, name));
    let (q, p, ds) = (values(queries, 1), values(rows, 2), normal(rows, 3));
    // What another loss left.
    let (dq_start, dp_start) = (values(queries, 4), values(rows, 5));
    let got = in_every_order(|device| {
        let of = |x: &[f32], rows: usize| stored::<T>(device, x, rows * width);
        let room = SPARE * group;
        let on = On {
            q: &of(&q, SPARE),
            p: &of(&p, room),
            s: &Buffer::poisoned(device, rows + room),
            ds: &Buffer::with_room(device, &ds, rows + room),
            dq: &of(&dq_start, SPARE),
            dp: &of(&dp_start, room),
            queries: &Buffer::of(device, &[queries as i32]),
        };
        T::forward(device, &case, &on).expect("a correct kernel raises nothing");
        T::backward(device, &case, &on).expect("a correct kernel raises nothing");
        vec![on.s.take(rows), widened(on.dq.take(queries * width)), widened(on.dp.take(rows * width))]
    });
    let tensor = |x: &[f32]| Tensor::from_slice(&f64s(x));
    let shape = group_scores::Shape { queries: queries.into(), group, width, temperature: TEMPERATURE };
    let s = Tensor::zeros(DType::F64, rows);
    let (q, p) = (&tensor(&q), &tensor(&p));
    group_scores::forward(Device::Cpu, &group_scores::Forward { shape, q, p, s: &s });
    judge::<f32>("s", &got[0], &s.to_vec::<f64>(), &[]);
    // A plain implementation rounds what it adds and the sum.
    let (dq_acc, dp_acc) = (&tensor(&vec![0.0; queries * width]), &tensor(&vec![0.0; rows * width]));
    let backward = group_scores::Backward { shape, q, p, ds: &tensor(&ds), dq_acc, dp_acc };
    group_scores::backward(Device::Cpu, &backward);
    for (what, got, added, start) in [("dq", &got[1], dq_acc, &dq_start), ("dp", &got[2], dp_acc, &dp_start)] {
        let added = added.to_vec::<f64>();
        let exact: Vec<f64> = added.iter().zip(start).map(|(a, &s)| a + f64::from(s)).collect();
        let plain: Vec<f32> = added.iter().zip(start).map(|(&a, s)| round::<T>(round::<T>(a as f32) + s)).collect();
        judge::<T>(what, got, &exact, &plain);
    }
}

#[test]
fn scores_as_the_cpu_does() {
    for (queries, group, width) in [
        // One lane of one warp; blocks of eight passages that end inside a group, of queries that are not in use too.
        (1, 1, 8),
        (9, 1, 48),
        (3, 31, 48),
        // A warp's share of passages is even, and one more.
        (2, 32, 8),
        (2, 33, 48),
        // BERT's width in three full blocks of columns; one with two lanes in a fifth; the widest.
        (2, 8, 768),
        (2, 100, 1040),
        (1, 3, 4096),
    ] {
        let case = Scores { queries, group, width };
        check_scores::<f32>(case);
        check_scores::<bf16>(case);
    }
}

const SCALE: f32 = 0.25;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Which {
    CrossEntropy,
    Kl,
    MarginMse,
}
use Which::{CrossEntropy, Kl, MarginMse};

#[derive(Clone, Copy, Debug)]
struct Losses {
    which: Which,
    queries: usize,
    group: usize,
    stride: usize,
}

/// Scores `[B, g, stride]`, with numbers beside them, and a teacher's `[B, g]`.
struct Inputs {
    scores: Vec<f32>,
    teacher: Vec<f32>,
}

impl Losses {
    fn inputs(&self) -> Inputs {
        let n = self.queries * self.group;
        Inputs { scores: normal(n * self.stride, 1), teacher: normal(n, 2).iter().map(|x| 2.0 * x).collect() }
    }

    /// Losses, correct queries, and with `training` the gradient.
    fn run(&self, device: &'static Gpu, i: &Inputs, training: bool) -> Vec<Vec<f32>> {
        let Losses { which, queries, group, stride } = *self;
        let rows = |queries: usize| queries * group;
        let capacity = queries + SPARE;
        let (scores, teacher) = (
            Buffer::with_room(device, &i.scores, rows(capacity) * stride),
            Buffer::with_room(device, &i.teacher, rows(capacity)),
        );
        let (loss, correct) = (Buffer::<f32>::poisoned(device, capacity), Buffer::<u32>::poisoned(device, capacity));
        let (ds, scale) = (Buffer::<f32>::poisoned(device, rows(capacity) * stride), Buffer::of(device, &[SCALE]));
        let count = Buffer::of(device, &[queries as i32]);
        GroupLoss {
            loss: loss.get_mut(),
            correct: correct.get_mut(),
            ds: if training { ds.get_mut() } else { MutPtr::null() },
            scores: scores.get(),
            teacher: if which == CrossEntropy { ConstPtr::null() } else { teacher.get() },
            queries: count.get(),
            scale: if training { scale.get() } else { ConstPtr::null() },
            kind: which as i32,
            g: group as i32,
            stride: stride as i32,
            inverse_temperature: 1.0 / TEMPERATURE,
        }
        .launch(device, Shape::linear(capacity.div_ceil(8) as u32, 256))
        .expect("a correct kernel raises nothing");
        let ds = ds.take(if training { rows(queries) * stride } else { 0 });
        vec![loss.take(queries), correct.take(queries).iter().map(|&c| c as f32).collect(), ds]
    }

    /// The same of the CPU in f64.
    fn exact(&self, i: &Inputs) -> [Vec<f64>; 3] {
        let Losses { which, queries, group, stride } = *self;
        let zeros = |len: usize| Tensor::zeros(DType::F64, len);
        let (teacher, loss, ds) = (Tensor::from_slice(&f64s(&i.teacher)), zeros(queries), zeros(i.scores.len()));
        let correct = Tensor::zeros(DType::U32, queries);
        let run = group_loss::GroupLoss {
            shape: group_loss::Shape { queries: queries.into(), group, stride, temperature: TEMPERATURE },
            kind: match which {
                CrossEntropy => Kind::CrossEntropy,
                Kl => Kind::Kl { teacher: &teacher },
                MarginMse => Kind::MarginMse { teacher: &teacher },
            },
            scores: &Tensor::from_slice(&f64s(&i.scores)),
            loss: &loss,
            correct: &correct,
            sums_acc: &zeros(2),
            gradient: Some(group_loss::Gradient { scale: f64::from(SCALE).into(), ds: &ds }),
        };
        group_loss::run(Device::Cpu, &run);
        let correct = correct.to_vec::<u32>().iter().map(|&c| f64::from(c)).collect();
        [loss.to_vec(), correct, ds.to_vec()]
    }

    fn check(&self, i: &Inputs) {
        let got = in_every_order(|device| self.run(device, i, true));
        let [loss, correct, ds] = self.exact(i);
        judge::<f32>(&format!("loss of {self:?}"), &got[0], &loss, &[]);
        assert_eq!(f64s(&got[1]), correct, "{self:?}");
        judge::<f32>(&format!("ds of {self:?}"), &got[2], &ds, &[]);
        let beside = |x: &[f32]| x.chunks(self.stride).flat_map(|x| x[1..].to_vec()).collect::<Vec<_>>();
        assert!(beside(&got[2]).iter().all(|g| g.to_bits() == 0), "columns beside the scores have no gradient");
        assert!(in_every_order(|device| self.run(device, i, false))[..2] == got[..2], "with and without a gradient");
    }
}

#[test]
fn losses_as_the_cpu_does() {
    for which in [CrossEntropy, Kl, MarginMse] {
        for (queries, group, stride) in [
            // A score alone; most lanes without one; one lane without one; a second block, of one query.
            (1, 1, 1),
            (4, 2, 1),
            (9, 31, 1),
            // A score a lane, and a second for one of them, in the cross-encoder's matrix.
            (3, 32, 8),
            (8, 33, 8),
            // Several a lane; hundreds a lane.
            (11, 100, 8),
            (2, 5000, 1),
        ] {
            let case = Losses { which, queries, group, stride };
            case.check(&case.inputs());
        }
    }
}

/// Passages that the teacher, or the student too, rules out.
#[test]
fn scores_of_minus_infinity_have_no_weight() {
    for which in [CrossEntropy, Kl] {
        let case = Losses { which, queries: 2, group: 40, stride: 1 };
        let mut i = case.inputs();
        i.teacher[3] = f32::NEG_INFINITY;
        i.teacher[70..].fill(f32::NEG_INFINITY);
        i.scores[72..].fill(f32::NEG_INFINITY);
        case.check(&i);
    }
}

#[test]
fn large_scores_stay_finite_and_nan_stays() {
    for which in [CrossEntropy, Kl, MarginMse] {
        let case = Losses { which, queries: 2, group: 40, stride: 1 };
        let mut i = case.inputs();
        i.scores.iter_mut().chain(&mut i.teacher).for_each(|x| *x *= 1e4);
        case.check(&i);
        i.scores[50] = f32::NAN;
        let got = in_every_order(|device| case.run(device, &i, true));
        assert!(got[0][0].is_finite() && got[0][1].is_nan(), "{which:?}: {:?}", got[0]);
        assert!(got[2][..40].iter().all(|x| x.is_finite()) && got[2][50].is_nan(), "{which:?}");
    }
}
