//! Activations, with and without a bias.

use crate::harness::*;
use half::bf16;
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::kernels::*;
use retromae_engine::device::launch::{ConstPtr, Shape};
use retromae_engine::device::{Device, Element, Tensor};
use retromae_engine::ops::activation::{self, Function};

/// In the order of the kernel's numbers.
const FUNCTIONS: [Function; 6] =
    [Function::Gelu, Function::GeluTanh, Function::QuickGelu, Function::Relu, Function::Silu, Function::Tanh];

struct Case {
    function: usize,
    rows: usize,
    width: usize,
    bias: bool,
}

/// Values as the storage holds them.
struct Inputs {
    u: Vec<f32>,
    bias: Option<Vec<f32>>,
    dy: Vec<f32>,
}

macro_rules! runner {
    ($name:ident, $t:ty, $forward:ident, $backward:ident) => {
        /// y and dx.
        fn $name(on: &'static Gpu, case: &Case, i: &Inputs) -> Vec<Vec<f32>> {
            let n = case.rows * case.width;
            let spare = 2 * case.width;
            let shape = Shape::linear((n + spare).div_ceil(2048) as u32, 256);
            let (u, dy) = (stored::<$t>(on, &i.u, spare), stored::<$t>(on, &i.dy, spare));
            let y = Buffer::<$t>::poisoned(on, n + spare);
            let (bias, rows) = (i.bias.as_ref().map(|b| Buffer::of(on, b)), Buffer::of(on, &[case.rows as i32]));
            let bias = bias.as_ref().map_or(ConstPtr::null(), Buffer::get);
            let (width, function) = (case.width as i32, case.function as i32);
            $forward { y: y.get_mut(), u: u.get(), bias, rows: rows.get(), N: width, function }
                .launch(on, shape)
                .expect("a correct kernel raises nothing");
            $backward { dy: dy.get_mut(), u: u.get(), bias, rows: rows.get(), N: width, function }
                .launch(on, shape)
                .expect("a correct kernel raises nothing");
            vec![widened(y.take(n)), widened(dy.take(n))]
        }
    };
}
runner!(run_f32, f32, ActivationForwardF32, ActivationBackwardF32);
runner!(run_bf16, bf16, ActivationForwardBf16, ActivationBackwardBf16);

macro_rules! sums_runner {
    ($name:ident, $t:ty, $sums:ident) => {
        /// dx and the sums of the blocks, each with `down` blocks below each other.
        fn $name(on: &'static Gpu, case: &Case, down: u32, i: &Inputs) -> Vec<Vec<f32>> {
            let (n, spare, across) = (case.rows * case.width, 2 * case.width, case.width.div_ceil(256) as u32);
            let (u, dy) = (stored::<$t>(on, &i.u, spare), stored::<$t>(on, &i.dy, spare));
            let (rows, used) = (Buffer::of(on, &[case.rows as i32]), (down as usize).min(case.rows.div_ceil(8)));
            let partials = Buffer::<f32>::poisoned(on, down as usize * case.width);
            let (width, function) = (case.width as i32, case.function as i32);
            let (dy_out, partials_out) = (dy.get_mut(), partials.get_mut());
            $sums { dy: dy_out, partials: partials_out, u: u.get(), rows: rows.get(), N: width, function }
                .launch(on, Shape { grid: [across, down, 1], ..Shape::linear(1, 256) })
                .expect("a correct kernel raises nothing");
            vec![widened(dy.take(n)), partials.take(used * case.width)]
        }
    };
}
sums_runner!(sums_f32, f32, ActivationBackwardSumsF32);
sums_runner!(sums_bf16, bf16, ActivationBackwardSumsBf16);

/// y and dx of the op, x = u + bias rounded by `sum`.
fn on_cpu<F: Element>(case: &Case, i: &Inputs, of: impl Fn(f32) -> F, sum: impl Fn(f32, f32) -> F) -> Vec<Vec<F>> {
    let (n, rows) = (i.u.len(), (case.rows.into(), case.width));
    let bias = |e: usize| i.bias.as_ref().map_or(0.0, |b| b[e % case.width]);
    let x: Vec<F> = i.u.iter().enumerate().map(|(e, &u)| sum(u, bias(e))).collect();
    let (x, y) = (Tensor::from_slice(&x), Tensor::zeros(F::DTYPE, n));
    let dy = Tensor::from_slice(&i.dy.iter().map(|&d| of(d)).collect::<Vec<_>>());
    activation::forward(Device::Cpu, FUNCTIONS[case.function], &x, &y, rows);
    activation::backward(Device::Cpu, FUNCTIONS[case.function], &x, &dy, rows);
    vec![y.to_vec(), dy.to_vec()]
}

fn judged<T: Storage>(case: &Case, run: fn(&'static Gpu, &Case, &Inputs) -> Vec<Vec<f32>>) {
    let n = case.rows * case.width;
    let i = Inputs {
        u: rounded::<T>(&normal(n, 1).iter().map(|x| 2.0 * x).collect::<Vec<_>>()),
        bias: case.bias.then(|| normal(case.width, 2)),
        dy: rounded::<T>(&normal(n, 3)),
    };
    let got = in_every_order(|on| run(on, case, &i));
    let exact = on_cpu(case, &i, f64::from, |u, b| f64::from(u) + f64::from(b));
    let plain = on_cpu(case, &i, |x| x, |u, b| round::<bf16>(u + b));
    for (k, name) in ["y", "dx"].iter().enumerate() {
        let what = format!("{name} of {:?}", FUNCTIONS[case.function]);
        judge::<T>(&what, &got[k], &exact[k], &rounded::<bf16>(&plain[k]));
    }
}

#[test]
fn every_function_with_and_without_bias() {
    for function in 0..FUNCTIONS.len() {
        // One vector; rows that end inside a block; a bias that repeats at another place in every block.
        for (rows, width) in [(1, 16), (5, 48), (3, 3072)] {
            for bias in [false, true] {
                let case = Case { function, rows, width, bias };
                judged::<f32>(&case, run_f32);
                judged::<bf16>(&case, run_bf16);
            }
        }
    }
}

/// dx is that of the kernel without sums, to the bit, and the sums are those of dx as it is stored.
#[test]
fn sums_over_rows_are_those_of_what_is_stored() {
    for (function, name) in FUNCTIONS.iter().enumerate() {
        // One row; a block of columns that is not full and blocks without rows; rows that are left when several are loaded at once.
        for (rows, width, down) in [(1, 16, 1), (9, 272, 3), (75, 48, 2)] {
            let n = rows * width;
            let case = Case { function, rows, width, bias: false };
            let random = |name, scale: f32| normal(n, name).iter().map(|x| scale * x).collect::<Vec<f32>>();
            let values =
                Inputs { u: rounded::<bf16>(&random(1, 2.0)), bias: None, dy: rounded::<bf16>(&random(3, 1.0)) };
            for (plain, sums) in [
                (
                    run_f32 as fn(&'static Gpu, &Case, &Inputs) -> _,
                    sums_f32 as fn(&'static Gpu, &Case, u32, &Inputs) -> _,
                ),
                (run_bf16, sums_bf16),
            ] {
                let got = in_every_order(|on| sums(on, &case, down, &values));
                let dx = &in_every_order(|on| plain(on, &case, &values))[1];
                assert!(got[0] == *dx, "{name:?} of {rows} x {width}");
                for column in 0..width {
                    let of = |x: &[f32]| x.iter().skip(column).step_by(width).map(|&x| f64::from(x)).sum::<f64>();
                    let size: f64 = dx.iter().skip(column).step_by(width).map(|&x| f64::from(x).abs()).sum();
                    let error = (of(&got[1]) - of(dx)).abs();
                    assert!(error <= 1e-6 * size, "column {column} of {rows} x {width}: off by {error}");
                }
            }
        }
    }
}

/// The formulas' error, point by point from tail to tail: what activation.cu states.
#[test]
fn errors_stay_below_the_stated_bound() {
    let u: Vec<f32> = (-8000..8000).map(|i| i as f32 / 500.0).collect();
    for (function, name) in FUNCTIONS.iter().enumerate() {
        let case = Case { function, rows: 1, width: u.len(), bias: false };
        let i = Inputs { u: u.clone(), bias: None, dy: vec![1.0; u.len()] };
        let got = in_every_order(|on| run_f32(on, &case, &i));
        let exact = on_cpu(&case, &i, f64::from, |u, _| f64::from(u));
        for k in 0..2 {
            for ((x, got), exact) in u.iter().zip(&got[k]).zip(&exact[k]) {
                let error = (f64::from(*got) - exact).abs() / f64::from(x.abs().max(1.0));
                assert!(error <= 5e-7, "{name:?} at {x}: {got} instead of {exact}");
            }
        }
    }
}

/// Arguments of exponentials that overflow or vanish.
#[test]
fn large_arguments_give_the_limits_and_nan_stays() {
    let u = vec![1e4, -1e4, 3e38, -3e38, 89.0, -89.0, f32::NAN, 0.0];
    let u = [u.clone(), u].concat();
    for (function, name) in FUNCTIONS.iter().enumerate() {
        let case = Case { function, rows: 1, width: 16, bias: false };
        let i = Inputs { u: u.clone(), bias: None, dy: vec![1.0; 16] };
        let got = in_every_order(|on| run_f32(on, &case, &i));
        for (e, (&x, (&y, &dx))) in u.iter().zip(got[0].iter().zip(&got[1])).enumerate() {
            let what = format!("{name:?} at {x}: {y}, slope {dx}");
            if x.is_nan() {
                assert!(y.is_nan(), "{what}");
            } else {
                let bounded = *name == Function::Tanh;
                let limit = if bounded { x.clamp(-1.0, 1.0) } else { x.max(0.0) };
                assert!((y - limit).abs() <= 1e-6 * limit.max(1.0), "element {e}: {what}");
                let slope = if x == 0.0 { dx } else { f32::from(u8::from(x > 0.0 && !bounded)) };
                assert!((dx - slope).abs() <= 1e-6, "element {e}: {what}");
            }
        }
    }
}
