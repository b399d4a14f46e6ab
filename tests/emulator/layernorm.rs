//! The whole path on one kernel: `.cu`, generated stub, launch on the emulator, comparison with plain Rust.

use crate::support::*;
use half::bf16;
use retromae_engine::device::emulator::{Emulator, Options};
use retromae_engine::device::kernels::{Dropout, LayernormForwardBf16, LayernormForwardF32, RowNames};
use retromae_engine::device::launch::{ConstPtr, Launcher, Shape};

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

macro_rules! on_device {
    ($name:ident, $t:ty, $kernel:ident) => {
        fn $name(device: &Emulator, x: &[$t], gamma: &[f32], beta: &[f32]) -> Output {
            let (rows, width) = (x.len() / gamma.len(), gamma.len());
            let (x, gamma, beta) = (Buffer::from(device, x), Buffer::from(device, gamma), Buffer::from(device, beta));
            let (y, mean, rstd) =
                (Buffer::<$t>::new(device, rows * width), Buffer::new(device, rows), Buffer::new(device, rows));
            let count = Buffer::from(device, &[rows as i32]);
            let nothing = ConstPtr::null();
            $kernel {
                y: y.get_mut(),
                x: x.get_mut(),
                mean: mean.get_mut(),
                rstd: rstd.get_mut(),
                residual: ConstPtr::null(),
                gamma: gamma.get(),
                beta: beta.get(),
                names: RowNames { samples: ConstPtr::null(), sequence: nothing, position: nothing },
                dropout: Dropout { key: nothing, threshold: 0, scale: 1.0 },
                site: 0,
                rows: count.get(),
                C: width as i32,
                eps: EPS,
            }
            .launch(device, Shape::linear(rows as u32, 128))
            .expect("a correct kernel raises nothing");
            let y = y.read().into_iter().map(f32::from).collect();
            Output { y, mean: mean.read(), rstd: rstd.read() }
        }
    };
}
on_device!(f32_on, f32, LayernormForwardF32);
on_device!(bf16_on, bf16, LayernormForwardBf16);

/// Rows and width: several rows a block, and one.
const SHAPES: [(usize, usize); 3] = [(1, 16), (5, 768), (2, 4096)];

#[test]
fn f32_agrees_with_plain_rust() {
    let device = Emulator::new(Options::default()).expect("the emulator is linked in");
    for (rows, width) in SHAPES {
        let (x, gamma, beta) = (normal(1, rows * width), normal(2, width), normal(3, width));
        let (got, want) = (f32_on(&device, &x, &gamma, &beta), reference(&x, &gamma, &beta));
        assert_close("y", &got.y, &want.y, 1e-6);
        assert_close("rstd", &got.rstd, &want.rstd, 1e-6);
        let offset = got.mean.iter().zip(&want.mean).map(|(a, b)| f64::from(a - b).abs()).fold(0.0, f64::max);
        assert!(offset <= 1e-6, "mean is off by {offset:e} at {rows} x {width}");
    }
}

#[test]
fn bf16_agrees_within_its_rounding() {
    let device = Emulator::new(Options::default()).expect("the emulator is linked in");
    for (rows, width) in SHAPES {
        let (x, gamma, beta) = (to_bf16(&normal(1, rows * width)), normal(2, width), normal(3, width));
        let rounded: Vec<f32> = x.iter().map(|v| v.to_f32()).collect();
        let (got, want) = (bf16_on(&device, &x, &gamma, &beta), reference(&rounded, &gamma, &beta));
        // Statistics are f32; y is rounded once to 8 bits of mantissa.
        assert_close("rstd", &got.rstd, &want.rstd, 1e-6);
        assert_close("y", &got.y, &want.y, 2f64.powi(-9));
    }
}

#[test]
fn every_order_gives_the_same_bits() {
    let device = Emulator::new(Options::default()).expect("the emulator is linked in");
    let (x, gamma, beta) = (normal(1, 7 * 1008), normal(2, 1008), normal(3, 1008));
    let first = f32_on(&device, &x, &gamma, &beta).bits();
    let first_bf16 = bf16_on(&device, &to_bf16(&x), &gamma, &beta).bits();
    for options in every_order() {
        let device = device.with(options);
        assert_eq!(first, f32_on(&device, &x, &gamma, &beta).bits(), "{options:?}");
        assert_eq!(first_bf16, bf16_on(&device, &to_bf16(&x), &gamma, &beta).bits(), "{options:?}");
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
    let params = [(&raw const value).cast(); 13];
    assert!(refused(Shape::linear(1, 64), &params[..7]).contains("7 parameters"));
    assert!(refused(Shape::linear(1, 160), &params).contains("160 threads"));
    assert!(refused(Shape::linear(0, 64), &params).contains("invalid grid (0, 1, 1)"));
    assert!(refused(Shape { grid: [1, 65536, 1], ..Shape::linear(1, 32) }, &params).contains("invalid grid"));
    assert!(refused(Shape { block: [1, 1, 65], ..Shape::linear(1, 1) }, &params).contains("invalid block"));
    assert!(refused(Shape::linear(1, 64).shared(227 * 1024 + 1), &params).contains("dynamic shared memory"));
}
