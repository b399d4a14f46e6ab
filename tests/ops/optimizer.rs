//! Gradient norm and AdamW against a scalar re-computation.

use retromae_engine::device::{DType, Tensor};
use retromae_engine::ops::optimizer::{AdamW, Update, squared_norm, update};

use super::common::{CPU, Lab, equal_bits, normal, on_threads, relative, values};

struct Case {
    n: usize,
    decayed: usize,
    adamw: AdamW,
}

const ADAMW: AdamW = AdamW { beta1: 0.9, beta2: 0.98, eps: 1e-6, weight_decay: 0.1, max_norm: f64::INFINITY };
const PLAIN: Case = Case { n: 37, decayed: 20, adamw: ADAMW };
const STEPS: u64 = 6;
const LR: f64 = 1e-2;

/// Weights, first and second moments.
struct State([Tensor; 3]);

fn tensor(dtype: DType, x: &[f64]) -> Tensor {
    let t = Lab { dtype, start: 0.0 }.tensor(x);
    t.slice(0..x.len())
}

impl State {
    fn new(dtype: DType, n: usize) -> Self {
        State([tensor(dtype, &normal(n, 1, 1.0)), Tensor::zeros(dtype, n), Tensor::zeros(dtype, n)])
    }

    fn step(&self, case: &Case, g: &Tensor, t: u64) -> f64 {
        let norm = Tensor::from_slice(&[f64::NAN]);
        squared_norm(CPU, g, &norm);
        let [w, m, v] = &self.0;
        let lr = LR / t as f64;
        let (adamw, decayed) = (case.adamw, case.decayed);
        let update_of = Update { adamw, lr, t, schedule: None, w, copy: None, g, m, v, decayed, squared_norm: &norm };
        update(CPU, &update_of);
        norm.to_vec::<f64>()[0]
    }

    fn all(&self) -> Vec<f64> {
        self.0.iter().flat_map(values).collect()
    }
}

fn gradient(n: usize, t: u64) -> Vec<f64> {
    normal(n, 10 + t, if t.is_multiple_of(2) { 2.0 } else { 1e-3 })
}

/// `torch.optim.AdamW` after `clip_grad_norm_`, one scalar at a time.
fn reference(case: &Case) -> Vec<f64> {
    let AdamW { beta1, beta2, eps, weight_decay, max_norm } = case.adamw;
    let mut w = normal(case.n, 1, 1.0);
    let (mut m, mut v) = (vec![0.0; case.n], vec![0.0; case.n]);
    for t in 1..=STEPS {
        let g = gradient(case.n, t);
        // In two levels: one long sum would be further off than what it is to judge.
        let norm = g.chunks(200).map(|g| g.iter().map(|g| g * g).sum::<f64>()).sum::<f64>().sqrt();
        let clip = f64::min(1.0, max_norm / (norm + 1e-6));
        let lr = LR / t as f64;
        for i in 0..case.n {
            let g = g[i] * clip;
            if i < case.decayed {
                w[i] *= 1.0 - lr * weight_decay;
            }
            m[i] = beta1 * m[i] + (1.0 - beta1) * g;
            v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
            let (first, second) = (m[i] / (1.0 - beta1.powf(t as f64)), v[i] / (1.0 - beta2.powf(t as f64)));
            w[i] -= lr * first / (second.sqrt() + eps);
        }
    }
    [w, m, v].concat()
}

fn check(case: &Case) {
    let run = |dtype, threads| {
        on_threads(threads, || {
            let state = State::new(dtype, case.n);
            for t in 1..=STEPS {
                state.step(case, &tensor(dtype, &gradient(case.n, t)), t);
            }
            state.all()
        })
    };
    let expected = reference(case);
    // A handful of roundings a step, STEPS steps; moments are sums of products of one sign or nearly so.
    for (dtype, eps) in [(DType::F64, f64::EPSILON), (DType::F32, f64::from(f32::EPSILON))] {
        let one = run(dtype, 1);
        assert!(equal_bits(&one, &run(dtype, 2)), "bits differ with two threads");
        for (name, (x, expected)) in ["w", "m", "v"].iter().zip(one.chunks(case.n).zip(expected.chunks(case.n))) {
            let error = relative(x, expected);
            assert!(error <= 4.0 * STEPS as f64 * eps, "{name} in {dtype:?}: error {error:.2e}");
        }
    }
}

#[test]
fn without_clipping() {
    check(&PLAIN);
}

#[test]
fn with_clipping_of_every_second_step() {
    check(&Case { adamw: AdamW { max_norm: 1.0, ..ADAMW }, ..PLAIN });
}

#[test]
fn decay_of_all_of_none_and_of_one_element() {
    for decayed in [0, 1, 37] {
        check(&Case { decayed, ..PLAIN });
    }
}

#[test]
fn one_element() {
    check(&Case { n: 1, decayed: 1, ..PLAIN });
}

/// More than a block of 16384 on each side of the boundary.
#[test]
fn several_blocks() {
    check(&Case { n: 40_003, decayed: 17_001, adamw: AdamW { max_norm: 3.0, ..ADAMW } });
}

#[test]
fn the_squared_norm_is_that_of_the_definition() {
    // Around eight accumulators and the block of 16384.
    for n in [1, 7, 8, 9, 16_384, 16_391, 50_001] {
        let g = normal(n, 2, 1.0);
        let expected: f64 = g.iter().map(|g| g * g).sum();
        for dtype in [DType::F32, DType::F64] {
            let norm = |threads| {
                let to = Tensor::from_slice(&[f64::NAN]);
                on_threads(threads, || squared_norm(CPU, &tensor(dtype, &g), &to));
                to.to_vec::<f64>()[0]
            };
            assert!((norm(1) / expected - 1.0).abs() < 1e-13);
            assert_eq!(norm(1).to_bits(), norm(2).to_bits());
        }
    }
    // Squares beyond f32.
    let norm = Tensor::zeros(DType::F64, 1);
    squared_norm(CPU, &Tensor::from_slice(&[1e30f32; 3]), &norm);
    assert!((norm.to_vec::<f64>()[0] / 3e60 - 1.0).abs() < 1e-6);
}

#[test]
fn a_gradient_that_is_not_finite_changes_no_bit() {
    for dtype in [DType::F32, DType::F64] {
        for max_norm in [1.0, f64::INFINITY] {
            let case = Case { adamw: AdamW { max_norm, ..ADAMW }, ..PLAIN };
            let state = State::new(dtype, case.n);
            state.step(&case, &tensor(dtype, &gradient(case.n, 1)), 1);
            let before = state.all();
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                // First and last element, and both sides of the decay boundary.
                for at in [0, case.decayed - 1, case.decayed, case.n - 1] {
                    let mut g = gradient(case.n, 2);
                    g[at] = bad;
                    let norm = state.step(&case, &tensor(dtype, &g), 2);
                    assert!(!norm.is_finite() && equal_bits(&state.all(), &before), "{bad} at {at}");
                }
            }
            state.step(&case, &tensor(dtype, &gradient(case.n, 2)), 2);
            assert!(!equal_bits(&state.all(), &before), "a finite gradient does change them");
        }
    }
}
