//! The activation functions and their derivatives.

use retromae_engine::device::{DType, Tensor};
use retromae_engine::ops::activation::{Function, backward, forward};

use super::common::{CPU, Lab, Op, check, normal, values};

const ALL: [Function; 6] =
    [Function::Gelu, Function::GeluTanh, Function::QuickGelu, Function::Relu, Function::Silu, Function::Tanh];

struct Case {
    function: Function,
    count: usize,
}

impl Op for Case {
    fn inputs(&self) -> Vec<(&'static str, Vec<f64>)> {
        vec![("u", normal(self.count, 1, 2.0))]
    }

    fn forward(&self, lab: &Lab, x: &[Vec<f64>]) -> Vec<f64> {
        let (u, y) = (lab.tensor(&x[0]), lab.set(self.count));
        forward(CPU, self.function, &u, &y.tensor, (self.count.into(), 1));
        y.take()
    }

    fn backward(&self, lab: &Lab, x: &[Vec<f64>], dy: &[f64]) -> Vec<Vec<f64>> {
        let (u, dy) = (lab.tensor(&x[0]), lab.in_place(dy));
        backward(CPU, self.function, &u, &dy.tensor, (self.count.into(), 1));
        vec![dy.take()]
    }

    /// erf is off by up to 4.5·10⁻⁷ = 7.5 roundings of 1 near ±4 and by 3 elsewhere, exp and tanh by less; products follow.
    fn growth(&self) -> f64 {
        8.0
    }
}

#[test]
fn every_function() {
    for function in ALL {
        check(&Case { function, count: 1 });
        // Not a multiple of any vector width.
        check(&Case { function, count: 1003 });
    }
}

#[test]
fn over_two_blocks_of_the_parallel_loop() {
    check(&Case { function: Function::Gelu, count: 4096 + 5 });
}

/// In f32, far from zero and next to it, where polynomials and range reductions fail first.
#[test]
fn extreme_inputs() {
    let u: Vec<f32> = [0.0, 1e-30, 1e-6, 0.05, 4.0, 5.5, 9.0, 13.0, 88.0, 104.0, 1e4, 1e9]
        .into_iter()
        .flat_map(|x: f32| [x, -x])
        .collect();
    for function in ALL {
        let run = |u: &Tensor, dtype| {
            let (y, ones) = (Tensor::zeros(dtype, u.len()), vec![1.0f64; u.len()]);
            let d = match dtype {
                DType::F64 => Tensor::from_slice(&ones),
                _ => Tensor::from_slice(&vec![1.0f32; u.len()]),
            };
            forward(CPU, function, u, &y, (u.len().into(), 1));
            backward(CPU, function, u, &d, (u.len().into(), 1));
            (values(&y), values(&d))
        };
        let wide: Vec<f64> = u.iter().map(|&x| f64::from(x)).collect();
        let (y, d) = run(&Tensor::from_slice(&u), DType::F32);
        let (wide_y, wide_d) = run(&Tensor::from_slice(&wide), DType::F64);
        for i in 0..u.len() {
            // As in `growth`, relative to |u|, of which every function is a share between 0 and 1 (the derivative: of 1).
            let tolerance = 8.0 * f64::from(f32::EPSILON);
            assert!((y[i] - wide_y[i]).abs() <= tolerance * wide[i].abs(), "{function:?}({}) = {}", u[i], y[i]);
            // Near the shoulders x·φ(x) multiplies the error of exp by |x|, at most 5 before it underflows.
            assert!((d[i] - wide_d[i]).abs() <= 5.0 * tolerance, "{function:?}'({}) = {}", u[i], d[i]);
        }
    }
}
