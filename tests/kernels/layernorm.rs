//! Dropout + residual + LayerNorm: forward, backward, and the sums of the affine parameters' gradients.

use crate::harness::*;
use half::bf16;
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::kernels::*;
use retromae_engine::device::launch::{ConstPtr, MutPtr, Shape};
use retromae_engine::device::{Device, Element, Tensor};
use retromae_engine::ops::{SiteDropout, layernorm};

/// Rows of the capacity that are not in use.
const SPARE: usize = 5;

#[derive(Clone, Copy)]
struct Case<'a> {
    lengths: &'a [usize],
    width: usize,
    residual: bool,
    /// Probability of dropout; without it there is no dx either.
    p: Option<f32>,
    eps: f32,
    /// Added to x.
    offset: f32,
    /// Blocks of the backward.
    blocks: usize,
}

const PLAIN: Case =
    Case { lengths: &[3, 4], width: 48, residual: true, p: Some(0.1), eps: 1e-12, offset: 0.0, blocks: 2 };

/// Values as the storage holds them.
struct Inputs {
    x: Vec<f32>,
    residual: Option<Vec<f32>>,
    gamma: Vec<f32>,
    beta: Vec<f32>,
    dy: Vec<f32>,
    /// What dgamma and dbeta are added to.
    start: [Vec<f32>; 2],
}

/// What is compared, in this order.
const RESULTS: [&str; 8] = ["z", "y", "mean", "rstd", "dz", "dx", "dgamma", "dbeta"];

impl Case<'_> {
    fn rows(&self) -> usize {
        self.lengths.iter().sum()
    }

    fn shape(&self) -> layernorm::Shape<'static> {
        layernorm::Shape { rows: self.rows().into(), width: self.width, eps: self.eps }
    }

    fn dropout(&self) -> SiteDropout {
        dropout(self.p.unwrap_or(0.0), 4)
    }

    fn inputs<T: Storage>(&self) -> Inputs {
        let n = self.rows() * self.width;
        let values = |name, len| rounded::<T>(&normal(len, name));
        Inputs {
            x: rounded::<T>(&normal(n, 1).iter().map(|x| x + self.offset).collect::<Vec<_>>()),
            residual: self.residual.then(|| values(2, n)),
            gamma: normal(self.width, 3).iter().map(|x| 1.0 + 0.5 * x).collect(),
            beta: normal(self.width, 4),
            dy: values(5, n),
            start: [normal(self.width, 6), normal(self.width, 7)],
        }
    }

    /// Blocks of the forward for this capacity.
    fn forward_blocks(&self) -> usize {
        let rows = self.rows() + SPARE;
        if self.width <= 1024 { rows.div_ceil(4) } else { rows }
    }
}

macro_rules! runner {
    ($name:ident, $t:ty, $forward:ident, $backward:ident) => {
        /// The three kernels.
        fn $name(on: &'static Gpu, case: &Case, i: &Inputs) -> Vec<Vec<f32>> {
            let (rows, c) = (case.rows(), case.width);
            let (x, dy) = (stored::<$t>(on, &i.x, SPARE * c), stored::<$t>(on, &i.dy, SPARE * c));
            let residual = i.residual.as_ref().map(|r| stored::<$t>(on, r, SPARE * c));
            let (gamma, beta) = (Buffer::of(on, &i.gamma), Buffer::of(on, &i.beta));
            let y = Buffer::<$t>::poisoned(on, (rows + SPARE) * c);
            let dx = case.p.map(|_| Buffer::<$t>::poisoned(on, (rows + SPARE) * c));
            let [mean, rstd] = [(); 2].map(|()| Buffer::<f32>::poisoned(on, rows + SPARE));
            let partials = Buffer::<f32>::poisoned(on, case.blocks * 2 * c);
            let [dgamma, dbeta] = [0, 1].map(|k| Buffer::of(on, &i.start[k]));
            let (count, key) = (Buffer::of(on, &[rows as i32]), Buffer::of(on, &case.dropout().mask.key));
            let names = Names::new(case.lengths).on(on);
            let dropout = device_dropout(case.dropout(), &key);
            let done = "a correct kernel raises nothing";
            $forward {
                y: y.get_mut(),
                x: x.get_mut(),
                mean: mean.get_mut(),
                rstd: rstd.get_mut(),
                residual: residual.as_ref().map_or(ConstPtr::null(), Buffer::get),
                gamma: gamma.get(),
                beta: beta.get(),
                names: names.get(),
                dropout,
                site: 4,
                rows: count.get(),
                C: c as i32,
                eps: case.eps,
            }
            .launch(on, Shape::linear(case.forward_blocks() as u32, 128))
            .expect(done);
            $backward {
                dy: dy.get_mut(),
                dx: dx.as_ref().map_or(MutPtr::null(), Buffer::get_mut),
                partials: partials.get_mut(),
                z: x.get(),
                mean: mean.get(),
                rstd: rstd.get(),
                gamma: gamma.get(),
                names: names.get(),
                dropout,
                site: 4,
                rows: count.get(),
                C: c as i32,
            }
            .launch(on, Shape::linear(case.blocks as u32, 128))
            .expect(done);
            LayernormBackwardSums {
                dgamma_acc: dgamma.get_mut(),
                dbeta_acc: dbeta.get_mut(),
                partials: partials.get(),
                rows: count.get(),
                blocks: case.blocks as i32,
                C: c as i32,
            }
            .launch(on, Shape::linear((2 * c / 32) as u32, 1024))
            .expect(done);
            let (z, y, dz) = (widened(x.take(rows * c)), widened(y.take(rows * c)), widened(dy.take(rows * c)));
            let dx = dx.map_or(dz.clone(), |dx| widened(dx.take(rows * c)));
            vec![z, y, mean.take(rows), rstd.take(rows), dz, dx, dgamma.take(c), dbeta.take(c)]
        }
    };
}
runner!(run_f32, f32, LayernormForwardF32, LayernormBackwardF32);
runner!(run_bf16, bf16, LayernormForwardBf16, LayernormBackwardBf16);

/// The op in `F`, exactly these inputs.
fn on_cpu<F: Element>(case: &Case, i: &Inputs, of: impl Fn(f32) -> F) -> Vec<Vec<F>> {
    let (rows, c) = (case.rows(), case.width);
    let tensor = |x: &[f32]| Tensor::from_slice(&x.iter().map(|&x| of(x)).collect::<Vec<_>>());
    let zeros = |len| Tensor::zeros(F::DTYPE, len);
    let (x, dy, gamma, beta) = (tensor(&i.x), tensor(&i.dy), tensor(&i.gamma), tensor(&i.beta));
    let residual = i.residual.as_deref().map(tensor);
    let (y, mean, rstd, dx) = (zeros(rows * c), zeros(rows), zeros(rows), zeros(rows * c));
    let (dgamma, dbeta) = (tensor(&i.start[0]), tensor(&i.start[1]));
    let (names, shape) = (Names::new(case.lengths), case.shape());
    let forward = layernorm::Forward {
        shape,
        x: &x,
        residual: residual.as_ref(),
        dropout: case.p.map(|_| (case.dropout(), names.rows())),
        gamma: &gamma,
        beta: &beta,
        y: &y,
        mean: &mean,
        rstd: &rstd,
    };
    layernorm::forward(Device::Cpu, &forward);
    let backward = layernorm::Backward {
        shape,
        z: &x,
        mean: &mean,
        rstd: &rstd,
        gamma: &gamma,
        dy: &dy,
        dropout: Some((case.dropout(), names.rows(), &dx)),
        dgamma_acc: &dgamma,
        dbeta_acc: &dbeta,
    };
    layernorm::backward(Device::Cpu, &backward);
    [x, y, mean, rstd, dy, dx, dgamma, dbeta].iter().map(Tensor::to_vec).collect()
}

/// Rounds where a bf16 implementation in PyTorch does: after dropout, after the residual, y, dz, dx.
fn plainly(case: &Case, i: &Inputs) -> Vec<Vec<f32>> {
    let names = Names::new(case.lengths);
    let mut z = rounded::<bf16>(&names.dropped(&i.x, case.dropout()));
    if let Some(r) = &i.residual {
        z = rounded::<bf16>(&z.iter().zip(r).map(|(z, r)| z + r).collect::<Vec<_>>());
    }
    let alone = Inputs {
        x: z,
        residual: None,
        gamma: i.gamma.clone(),
        beta: i.beta.clone(),
        dy: i.dy.clone(),
        start: i.start.clone(),
    };
    let mut out = on_cpu(&Case { residual: false, p: None, ..*case }, &alone, |x| x);
    for k in [1, 4] {
        out[k] = rounded::<bf16>(&out[k]);
    }
    out[5] = rounded::<bf16>(&names.dropped(&out[4], case.dropout()));
    out
}

/// In bf16 the saved statistics must be, to f32 accuracy, those of the sums the kernel stored: a few rows are too few to compare their
/// rounding with that of another implementation.
fn statistics_of_stored_rows(case: &Case, z: &[f32], saved: &[f32], k: usize, what: &str) {
    for (z, &saved) in z.chunks_exact(case.width).zip(saved) {
        let n = z.len() as f64;
        let mean = z.iter().map(|&z| f64::from(z)).sum::<f64>() / n;
        let variance = z.iter().map(|&z| (f64::from(z) - mean).powi(2)).sum::<f64>() / n;
        let rstd = 1.0 / (variance + f64::from(case.shape().eps)).sqrt();
        let error = if k == 2 { (f64::from(saved) - mean).abs() * rstd } else { (f64::from(saved) / rstd - 1.0).abs() };
        assert!(error <= 1e-5, "{what}: error {error:e}");
    }
}

fn judged<T: Storage>(case: &Case, run: fn(&'static Gpu, &Case, &Inputs) -> Vec<Vec<f32>>) {
    let i = case.inputs::<T>();
    let got = in_every_order(|on| run(on, case, &i));
    let (exact, plain) = (on_cpu(case, &i, f64::from), plainly(case, &i));
    for (k, name) in RESULTS.iter().enumerate() {
        let what = format!("{name} of {:?} x {}", case.lengths, case.width);
        if T::ROUNDS && (k == 2 || k == 3) {
            statistics_of_stored_rows(case, &got[0], &got[k], k, &what);
            continue;
        }
        judge::<T>(&what, &got[k], &exact[k], &plain[k]);
    }
}

fn check(case: Case) {
    judged::<f32>(&case, run_f32);
    judged::<bf16>(&case, run_bf16);
}

#[test]
fn widths_of_one_warp_a_row() {
    check(PLAIN);
    // Two vectors: 30 idle lanes.
    check(Case { width: 16, ..PLAIN });
    // Half of the second vector of each lane.
    check(Case { width: 384, ..PLAIN });
    // The last width of two vectors a lane, and the first of three.
    check(Case { width: 512, ..PLAIN });
    check(Case { width: 528, ..PLAIN });
    check(Case { width: 768, ..PLAIN });
    // The first width of four vectors, and the last of one warp.
    check(Case { width: 784, ..PLAIN });
    check(Case { width: 1024, ..PLAIN });
}

#[test]
fn widths_of_four_warps_a_row() {
    check(Case { width: 1040, ..PLAIN });
    check(Case { width: 4096, lengths: &[2, 1], ..PLAIN });
}

#[test]
fn rows_and_blocks() {
    // A single row: three idle warps, and a block without rows.
    check(Case { lengths: &[1], ..PLAIN });
    // More blocks than rows, of either layout.
    check(Case { blocks: 9, ..PLAIN });
    check(Case { blocks: 9, width: 1040, ..PLAIN });
    // Several rows a warp, the last round incomplete; more partials than slices of the second pass.
    check(Case { lengths: &[30, 1, 18], blocks: 3, ..PLAIN });
    check(Case { lengths: &[140], blocks: 40, width: 16, ..PLAIN });
}

#[test]
fn without_residual_as_in_the_head() {
    check(Case { residual: false, ..PLAIN });
    check(Case { residual: false, p: None, ..PLAIN });
}

/// Evaluation passes a dropout that is off; the backward then copies.
#[test]
fn with_dropout_off_or_strong() {
    check(Case { p: Some(0.0), ..PLAIN });
    check(Case { p: Some(0.5), ..PLAIN });
}

/// That of other models, and one as large as the variance.
#[test]
fn epsilons() {
    check(Case { eps: 1.0, ..PLAIN });
    check(Case { eps: 1e-5, ..PLAIN });
}

/// In one pass the variance would lose all digits.
#[test]
fn a_large_common_offset_costs_no_digits() {
    let case = Case { offset: 1000.0, residual: false, p: None, ..PLAIN };
    let i = case.inputs::<f32>();
    let (got, exact) = (in_every_order(|on| run_f32(on, &case, &i)), on_cpu(&case, &i, f64::from));
    // μ is f32: off by 2^-15 of a deviation, and with it every x̂.
    assert!(relative(&got[1], &exact[1]) <= 1e-4);
}

/// A captured graph may meet a batch without a labelled row.
#[test]
fn without_rows_nothing_changes() {
    let case = Case { lengths: &[0], ..PLAIN };
    let i = case.inputs::<bf16>();
    for out in [run_f32, run_bf16].map(|run| in_every_order(|on| run(on, &case, &i))) {
        assert!(out[..6].iter().all(Vec::is_empty));
        assert_eq!(out[6..], i.start[..]);
    }
}

/// One row that is not finite leaves the others alone.
#[test]
fn a_broken_row_stays_alone() {
    let case = Case { p: None, residual: false, ..PLAIN };
    let mut i = case.inputs::<f32>();
    let whole = in_every_order(|on| run_f32(on, &case, &i));
    i.x[case.width] = f32::NAN;
    let broken = in_every_order(|on| run_f32(on, &case, &i));
    for k in [1, 4] {
        for (row, (a, b)) in whole[k].chunks(case.width).zip(broken[k].chunks(case.width)).enumerate() {
            assert!(if row == 1 { b.iter().all(|b| b.is_nan()) } else { a == b }, "{} row {row}", RESULTS[k]);
        }
    }
}
