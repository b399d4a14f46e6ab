//! The whole path on one kernel: `.cu`, generated stub, launch on the emulator, comparison with plain Rust.

use crate::support::*;
use half::bf16;
use retromae_engine::device::emulator::{Emulator, Options};
use retromae_engine::device::kernels::{LayernormForwardBf16, LayernormForwardF32};
use retromae_engine::device::launch::{Launcher, Shape};

struct Output {
    y: Vec<f32>,
    mean: Vec<f32>,
    rstd: Vec<f32>,
}

impl Output {
    fn bits(&self) -> Vec<u32> {
        [&self.y, &self.mean, &self.rstd].into_iter().flatten().map(|v| v.to_bits()).collect()
    }
}

const EPS: f32 = 1e-12;

fn reference(x: &[f32], gamma: &[f32], beta: &[f32]) -> Output {
    let width = gamma.len();
    let mut out = Output { y: Vec::new(), mean: Vec::new(), rstd: Vec::new() };
    for row in x.chunks(width) {
        let n = width as f64;
        let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
        let rstd = 1.0 / (variance + f64::from(EPS)).sqrt();
        out.mean.push(mean as f32);
        out.rstd.push(rstd as f32);
        let scaled = row.iter().zip(gamma).zip(beta);
        out.y.extend(scaled.map(|((&v, &g), &b)| ((f64::from(v) - mean) * rstd * f64::from(g) + f64::from(b)) as f32));
    }
    out
}

fn f32_on(device: &Emulator, x: &[f32], gamma: &[f32], beta: &[f32], threads: u32) -> Output {
    let (rows, width) = (x.len() / gamma.len(), gamma.len());
    let (x, gamma, beta) = (Buffer::from(device, x), Buffer::from(device, gamma), Buffer::from(device, beta));
    let (y, mean, rstd) = (Buffer::new(device, rows * width), Buffer::new(device, rows), Buffer::new(device, rows));
    LayernormForwardF32 {
        y: y.get_mut(),
        mean: mean.get_mut(),
        rstd: rstd.get_mut(),
        x: x.get(),
        gamma: gamma.get(),
        beta: beta.get(),
        C: width as i32,
        eps: EPS,
    }
    .launch(device, Shape::linear(rows as u32, threads))
    .expect("a correct kernel raises nothing");
    Output { y: y.read(), mean: mean.read(), rstd: rstd.read() }
}

fn bf16_on(device: &Emulator, x: &[bf16], gamma: &[f32], beta: &[f32], threads: u32) -> Output {
    let (rows, width) = (x.len() / gamma.len(), gamma.len());
    let (x, gamma, beta) = (Buffer::from(device, x), Buffer::from(device, gamma), Buffer::from(device, beta));
    let (y, mean, rstd) =
        (Buffer::<bf16>::new(device, rows * width), Buffer::new(device, rows), Buffer::new(device, rows));
    LayernormForwardBf16 {
        y: y.get_mut(),
        mean: mean.get_mut(),
        rstd: rstd.get_mut(),
        x: x.get(),
        gamma: gamma.get(),
        beta: beta.get(),
        C: width as i32,
        eps: EPS,
    }
    .launch(device, Shape::linear(rows as u32, threads))
    .expect("a correct kernel raises nothing");
    Output { y: y.read().iter().map(|v| v.to_f32()).collect(), mean: mean.read(), rstd: rstd.read() }
}

/// Rows, width, threads of a block.
const SHAPES: [(usize, usize, u32); 5] = [
    (1, 8, 32),      // one vector: 31 idle lanes
    (3, 384, 64),    // fewer vectors than threads
    (5, 768, 96),    // BERT base, as many vectors as threads
    (2, 1000, 64),   // a width that is no multiple of the block's stride
    (2, 8192, 1024), // the largest block
];

#[test]
fn f32_agrees_with_plain_rust() {
    let device = Emulator::new(Options::default()).expect("the emulator is linked in");
    for (rows, width, threads) in SHAPES {
        let (x, gamma, beta) = (normal(1, rows * width), normal(2, width), normal(3, width));
        let (got, want) = (f32_on(&device, &x, &gamma, &beta, threads), reference(&x, &gamma, &beta));
        assert_close("y", &got.y, &want.y, 1e-6);
        assert_close("rstd", &got.rstd, &want.rstd, 1e-6);
        let offset = got.mean.iter().zip(&want.mean).map(|(a, b)| f64::from(a - b).abs()).fold(0.0, f64::max);
        assert!(offset <= 1e-6, "mean is off by {offset:e} at {rows} x {width}");
    }
}

#[test]
fn a_large_common_offset_costs_no_digits() {
    let device = Emulator::new(Options::default()).expect("the emulator is linked in");
    let x: Vec<f32> = normal(4, 768).iter().map(|v| v + 1000.0).collect();
    let (gamma, beta) = (vec![1.0; 768], vec![0.0; 768]);
    let (got, want) = (f32_on(&device, &x, &gamma, &beta, 96), reference(&x, &gamma, &beta));
    assert_close("y", &got.y, &want.y, 1e-4);
}

#[test]
fn bf16_agrees_within_its_rounding() {
    let device = Emulator::new(Options::default()).expect("the emulator is linked in");
    for (rows, width, threads) in SHAPES {
        let (x, gamma, beta) = (to_bf16(&normal(1, rows * width)), normal(2, width), normal(3, width));
        let rounded: Vec<f32> = x.iter().map(|v| v.to_f32()).collect();
        let (got, want) = (bf16_on(&device, &x, &gamma, &beta, threads), reference(&rounded, &gamma, &beta));
        // Statistics are f32; y is rounded once to 8 bits of mantissa.
        assert_close("rstd", &got.rstd, &want.rstd, 1e-6);
        assert_close("y", &got.y, &want.y, 2f64.powi(-9));
    }
}

#[test]
fn every_order_gives_the_same_bits() {
    let device = Emulator::new(Options::default()).expect("the emulator is linked in");
    let (x, gamma, beta) = (normal(1, 7 * 1000), normal(2, 1000), normal(3, 1000));
    let first = f32_on(&device, &x, &gamma, &beta, 96).bits();
    let first_bf16 = bf16_on(&device, &to_bf16(&x), &gamma, &beta, 96).bits();
    for options in every_order() {
        let device = device.with(options);
        assert_eq!(first, f32_on(&device, &x, &gamma, &beta, 96).bits(), "{options:?}");
        assert_eq!(first_bf16, bf16_on(&device, &to_bf16(&x), &gamma, &beta, 96).bits(), "{options:?}");
    }
}

#[test]
fn wrong_launches_are_refused_in_one_line() {
    let device = Emulator::new(Options::default()).expect("the emulator is linked in");
    let kernel = LayernormForwardF32::kernel();
    let refused = |shape: Shape, params: &[*const std::ffi::c_void]| {
        // SAFETY: these launches are refused before any parameter is read.
        let error = unsafe { device.launch(kernel, shape, params) }.expect_err("it must be refused").to_string();
        assert!(error.starts_with("kernel layernorm_forward_f32: ") && !error.contains('\n'), "{error}");
        error
    };
    let value = 0u64;
    let eight = [(&raw const value).cast(); 8];
    assert!(refused(Shape::linear(1, 64), &eight[..7]).contains("7 parameters"));
    assert!(refused(Shape::linear(1, 1056), &eight).contains("1056 threads"));
    assert!(refused(Shape::linear(0, 64), &eight).contains("invalid grid (0, 1, 1)"));
    assert!(refused(Shape { grid: [1, 65536, 1], ..Shape::linear(1, 32) }, &eight).contains("invalid grid"));
    assert!(refused(Shape { block: [1, 1, 65], ..Shape::linear(1, 1) }, &eight).contains("invalid block"));
    assert!(refused(Shape::linear(1, 64).shared(227 * 1024 + 1), &eight).contains("dynamic shared memory"));
}
