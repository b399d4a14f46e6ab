//! Gradient norm and AdamW over the flat arena.

use crate::harness::*;
use half::bf16;
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::kernels::*;
use retromae_engine::device::launch::{MutPtr, Shape};
use retromae_engine::device::{DType, Device, Tensor};
use retromae_engine::ops::optimizer::{self, AdamW, Update};

const DONE: &str = "a correct kernel raises nothing";
const STEPS: u64 = 4;

struct Case {
    n: usize,
    decayed: usize,
    max_norm: f64,
}

impl Case {
    fn adamw(&self) -> AdamW {
        AdamW { beta1: 0.9, beta2: 0.98, eps: 1e-6, weight_decay: 0.1, max_norm: self.max_norm }
    }

    /// Small, so that a change of 1e-2 shows its digits.
    fn weights(&self) -> Vec<f32> {
        normal(self.n, 1).iter().map(|w| 0.02 * w).collect()
    }

    fn gradient(&self, t: u64) -> Vec<f32> {
        // Above and below a norm of 1, and a spread of sizes.
        let scale = if t.is_multiple_of(2) { 2.0 } else { 1e-5 };
        normal(self.n, 10 + t).iter().zip(normal(self.n, 20)).map(|(g, s)| scale * g * (2.0 * s).exp()).collect()
    }
}

fn rate(t: u64) -> f64 {
    1e-2 / t as f64
}

/// Squared norm of `g` on the device.
fn norm_on(on: &'static Gpu, g: &Buffer<f32>, n: usize) -> Buffer<f64> {
    let blocks = n.div_ceil(16384);
    let (partials, norm) = (Buffer::<f64>::poisoned(on, blocks), Buffer::<f64>::poisoned(on, 1));
    SquaredNormPartials { partials: partials.get_mut(), g: g.get(), n: n as i64 }
        .launch(on, Shape::linear(blocks as u32, 256))
        .expect(DONE);
    SquaredNorm { norm: norm.get_mut(), partials: partials.get(), blocks: blocks as i32 }
        .launch(on, Shape::linear(1, 1024))
        .expect(DONE);
    norm
}

/// Weights, moments and gradient on the device, and one update of them.
struct State {
    w: Buffer<f32>,
    m: Buffer<f32>,
    v: Buffer<f32>,
}

impl State {
    fn new(on: &'static Gpu, case: &Case) -> Self {
        let zeros = vec![0f32; case.n];
        State { w: Buffer::of(on, &case.weights()), m: Buffer::of(on, &zeros), v: Buffer::of(on, &zeros) }
    }

    /// Update number `t` with gradient `g`; returns the squared norm. `copy` may be null.
    fn update(&self, on: &'static Gpu, case: &Case, g: &[f32], t: u64, copy: Target) -> f64 {
        let AdamW { beta1, beta2, eps, weight_decay, max_norm } = case.adamw();
        let g = Buffer::of(on, g);
        let norm = norm_on(on, &g, case.n);
        let powers = [1.0 - beta1.powi(t as i32), 1.0 - beta2.powi(t as i32)];
        let schedule = [rate(t) / powers[0], 1.0 / powers[1].sqrt(), rate(t) * weight_decay].map(|x| x as f32);
        let schedule = Buffer::of(on, &schedule);
        let constants = AdamWConstants {
            beta1: beta1 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            eps: eps as f32,
            max_norm,
        };
        let (master, m, v) = (self.w.get_mut(), self.m.get_mut(), self.v.get_mut());
        let (decayed, n) = (case.decayed as i64, case.n as i64);
        let shape = Shape::linear(case.n.div_ceil(2048) as u32, 256);
        let (g, schedule, squared) = (g.get(), schedule.get(), norm.get());
        match copy {
            Target::None => {
                let copy = MutPtr::null();
                AdamwF32 { master, copy, m, v, g, norm: squared, schedule, constants, decayed, n }
                    .launch(on, shape)
                    .expect(DONE);
            }
            Target::F32(copy) => {
                AdamwF32 { master, copy, m, v, g, norm: squared, schedule, constants, decayed, n }
                    .launch(on, shape)
                    .expect(DONE);
            }
            Target::Bf16(copy) => {
                AdamwBf16 { master, copy, m, v, g, norm: squared, schedule, constants, decayed, n }
                    .launch(on, shape)
                    .expect(DONE);
            }
        }
        norm.take(1)[0]
    }
}

/// Where the storage copy of the weights goes.
#[derive(Clone, Copy)]
enum Target {
    None,
    F32(MutPtr<f32>),
    Bf16(MutPtr<bf16>),
}

/// What is left after [`STEPS`] updates in f64: the change of w, m, v.
fn exactly(case: &Case) -> [Vec<f64>; 3] {
    let w = Tensor::from_slice(&f64s(&case.weights()));
    let (m, v) = (Tensor::zeros(DType::F64, case.n), Tensor::zeros(DType::F64, case.n));
    for t in 1..=STEPS {
        let (g, norm) = (Tensor::from_slice(&f64s(&case.gradient(t))), Tensor::from_slice(&[f64::NAN]));
        optimizer::squared_norm(Device::Cpu, &g, &norm);
        let (adamw, lr, decayed) = (case.adamw(), rate(t), case.decayed);
        let (schedule, copy) = (None, None);
        let a = Update { adamw, lr, t, schedule, w: &w, copy, g: &g, m: &m, v: &v, decayed, squared_norm: &norm };
        optimizer::update(Device::Cpu, &a);
    }
    let change = w.to_vec::<f64>().iter().zip(case.weights()).map(|(w, start)| w - f64::from(start)).collect();
    [change, m.to_vec(), v.to_vec()]
}

fn check(case: Case) {
    let exact = exactly(&case);
    let run = |on: &'static Gpu, target: &dyn Fn() -> Target| {
        let state = State::new(on, &case);
        for t in 1..=STEPS {
            state.update(on, &case, &case.gradient(t), t, target());
        }
        [&state.w, &state.m, &state.v].map(|b| b.take(case.n)).to_vec()
    };
    let alone = in_every_order(|on| run(on, &|| Target::None));
    let f32s = in_every_order(|on| {
        let copy = Buffer::<f32>::poisoned(on, case.n + 8);
        let mut out = run(on, &|| Target::F32(copy.get_mut()));
        out.push(copy.take(case.n));
        out
    });
    let bf16s = in_every_order(|on| {
        let copy = Buffer::<bf16>::poisoned(on, case.n + 8);
        let mut out = run(on, &|| Target::Bf16(copy.get_mut()));
        out.push(widened(copy.take(case.n)));
        out
    });
    assert!(alone[..] == f32s[..3] && alone[..] == bf16s[..3], "the storage type changes the master weights");
    assert_eq!(f32s[3], alone[0]);
    assert_eq!(bf16s[3], rounded::<bf16>(&alone[0]));
    let change: Vec<f32> = alone[0].iter().zip(case.weights()).map(|(w, start)| w - start).collect();
    for (name, got, exact) in [("w", &change, &exact[0]), ("m", &alone[1], &exact[1]), ("v", &alone[2], &exact[2])] {
        judge::<f32>(&format!("{name} of {} parameters", case.n), got, exact, &[]);
    }
}

#[test]
fn updates_follow_the_reference() {
    // Clipped in every second step, and not at all; all decay, none, and a border inside a thread's eight.
    check(Case { n: 8, decayed: 8, max_norm: 1.0 });
    check(Case { n: 4096, decayed: 0, max_norm: f64::INFINITY });
    check(Case { n: 2056, decayed: 1027, max_norm: 1.0 });
    // Several blocks of the norm, the last one not full.
    check(Case { n: 40_008, decayed: 20_000, max_norm: 0.5 });
}

#[test]
fn the_norm_is_exact_and_never_overflows() {
    // Inside a block, a block exactly, one vector more, more blocks than the second pass has warps.
    for n in [8, 16_384, 16_392, 600_000] {
        for scale in [1.0, 1e25, 1e-30] {
            let g: Vec<f32> = normal(n, 3).iter().map(|g| g * scale).collect();
            let exact: f64 = g.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
            let got = std::cell::Cell::new(f64::NAN);
            in_every_order(|on| {
                got.set(norm_on(on, &Buffer::of(on, &g), n).take(1)[0]);
                let bits = got.get().to_bits();
                vec![vec![f32::from_bits(bits as u32), f32::from_bits((bits >> 32) as u32)]]
            });
            assert!((got.get() - exact).abs() <= 1e-12 * exact, "{} instead of {exact}", got.get());
        }
    }
}

/// A norm that f32 could not hold is clipped like any other.
#[test]
fn a_huge_gradient_is_clipped() {
    let case = Case { n: 64, decayed: 0, max_norm: 1.0 };
    let g: Vec<f32> = normal(64, 3).iter().map(|g| g * 1e30).collect();
    let got = in_every_order(|on| {
        let state = State::new(on, &case);
        state.update(on, &case, &g, 1, Target::None);
        vec![state.m.take(64)]
    });
    let norm = g.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
    let exact: Vec<f64> = g.iter().map(|&g| 0.1 * f64::from(g) / norm).collect();
    judge::<f32>("m", &got[0], &exact, &[]);
}

#[test]
fn a_norm_that_is_not_finite_changes_nothing() {
    let case = Case { n: 2056, decayed: 1000, max_norm: 1.0 };
    for (at, bad) in [(0, f32::NAN), (2055, f32::INFINITY), (700, f32::NEG_INFINITY)] {
        let mut g = case.gradient(2);
        g[at] = bad;
        in_every_order(|on| {
            let state = State::new(on, &case);
            state.update(on, &case, &case.gradient(1), 1, Target::None);
            let before = [&state.w, &state.m, &state.v].map(|b| b.take(case.n));
            let copy = Buffer::<bf16>::poisoned(on, case.n);
            let norm = state.update(on, &case, &g, 2, Target::Bf16(copy.get_mut()));
            assert!(!norm.is_finite());
            assert!(copy.take(0).is_empty(), "the copy stays as it was");
            assert!(before == [&state.w, &state.m, &state.v].map(|b| b.take(case.n)));
            before.to_vec()
        });
    }
}
