//! Activation of the feed-forward layers and of the pooler: `y = act(u)`, `du = dy · act'(u)`. The pre-activation `u` is what is saved.
//!
//! GELU: x·Φ(x) (Hendrycks & Gimpel, arXiv 1606.08415), its tanh form, and the other functions that `hidden_act` may name.

use super::{Count, linear};
use crate::device::{Device, Matrix, Tensor};

/// Which function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    /// x·Φ(x).
    Gelu,
    /// x/2·(1 + tanh(√(2/π)(x + 0.044715 x³))).
    GeluTanh,
    /// x·σ(1.702 x).
    QuickGelu,
    /// max(x, 0).
    Relu,
    /// x·σ(x).
    Silu,
    /// tanh(x), of the pooler; no `hidden_act`.
    Tanh,
}

/// `y = act(u)` for rows of `width` elements.
pub fn forward(device: Device, function: Function, u: &Tensor, y: &Tensor, (rows, width): (Count<'_>, usize)) {
    match device {
        Device::Cpu => super::on_cpu!(u, cpu::forward, function, u, y, rows.rows * width),
        Device::Gpu(gpu) => gpu::forward(gpu, function, u, y, rows, width),
    }
}

/// `dy ← dy · act'(u)` for rows of `width` elements, in place.
pub fn backward(device: Device, function: Function, u: &Tensor, dy: &Tensor, (rows, width): (Count<'_>, usize)) {
    match device {
        Device::Cpu => super::on_cpu!(u, cpu::backward, function, u, dy, rows.rows * width),
        Device::Gpu(gpu) => gpu::backward(gpu, function, u, dy, rows, width),
    }
}

/// [`backward`], and `db += Σ_rows dy · act'(u)`: the gradient of the bias in `u`, on a GPU without reading `dy` again.
pub fn backward_with_bias(
    device: Device,
    function: Function,
    u: &Tensor,
    dy: &Tensor,
    db_acc: &Tensor,
    (rows, width): (Count<'_>, usize),
) {
    match device {
        Device::Cpu => {
            backward(device, function, u, dy, (rows, width));
            linear::bias_gradient(device, (rows, width), &Matrix::new(dy, width), db_acc);
        }
        Device::Gpu(gpu) => gpu::backward_with_bias(gpu, function, u, dy, db_acc, (rows, width)),
    }
}

/// The reference: one vectorised loop a function, over blocks that stay in the first-level cache.
mod cpu {
    use super::Function;
    use crate::device::Tensor;
    use crate::device::cpu::{Real, vectorized};
    use rayon::prelude::*;

    const BLOCK: usize = 4096;
    const ALPHA: f64 = 0.797_884_560_802_865_4; // √(2/π)
    const BETA: f64 = 0.044715;

    #[inline(always)]
    fn sigmoid<F: Real>(x: F) -> F {
        F::ONE / (F::ONE + (-x).exp())
    }

    /// Φ(x).
    #[inline(always)]
    fn normal_cdf<F: Real>(x: F) -> F {
        F::of(0.5) * (F::ONE + (x * F::of(std::f64::consts::FRAC_1_SQRT_2)).erf())
    }

    #[inline(always)]
    fn gelu_derivative<F: Real>(x: F) -> F {
        normal_cdf(x) + x * F::of(0.398_942_280_401_432_7) * (F::of(-0.5) * x * x).exp()
    }

    #[inline(always)]
    fn gelu_tanh_derivative<F: Real>(x: F) -> F {
        let t = (F::of(ALPHA) * (x + F::of(BETA) * x * x * x)).tanh();
        let inner = F::of(ALPHA) * (F::ONE + F::of(3.0 * BETA) * x * x);
        F::of(0.5) * (F::ONE + t) + F::of(0.5) * x * (F::ONE - t * t) * inner
    }

    #[inline(always)]
    fn swish_derivative<F: Real>(x: F, slope: F) -> F {
        let s = sigmoid(slope * x);
        s + slope * x * s * (F::ONE - s)
    }

    fn map<F: Real>(u: &[F], y: &mut [F], f: impl Fn(F, F) -> F + Sync) {
        u.par_chunks(BLOCK).zip(y.par_chunks_mut(BLOCK)).for_each(|(u, y)| {
            vectorized(|| {
                for (u, y) in u.iter().zip(y) {
                    *y = f(*u, *y);
                }
            });
        });
    }

    pub fn forward<F: Real>(function: Function, u: &Tensor, y: &Tensor, count: usize) {
        let (u, mut y) = (u.read::<F>(), y.write::<F>());
        let (u, y) = (&u[..count], &mut y[..count]);
        match function {
            Function::Gelu => map(
                u,
                y,
                #[inline(always)]
                |x, _| x * normal_cdf(x),
            ),
            Function::GeluTanh => map(
                u,
                y,
                #[inline(always)]
                |x, _| F::of(0.5) * x * (F::ONE + (F::of(ALPHA) * (x + F::of(BETA) * x * x * x)).tanh()),
            ),
            Function::QuickGelu => map(
                u,
                y,
                #[inline(always)]
                |x, _| x * sigmoid(F::of(1.702) * x),
            ),
            Function::Relu => map(
                u,
                y,
                #[inline(always)]
                |x, _| x.max(F::ZERO),
            ),
            Function::Silu => map(
                u,
                y,
                #[inline(always)]
                |x, _| x * sigmoid(x),
            ),
            Function::Tanh => map(
                u,
                y,
                #[inline(always)]
                |x, _| x.tanh(),
            ),
        }
    }

    pub fn backward<F: Real>(function: Function, u: &Tensor, dy: &Tensor, count: usize) {
        let (u, mut dy) = (u.read::<F>(), dy.write::<F>());
        let (u, dy) = (&u[..count], &mut dy[..count]);
        match function {
            Function::Gelu => map(
                u,
                dy,
                #[inline(always)]
                |x, d| d * gelu_derivative(x),
            ),
            Function::GeluTanh => map(
                u,
                dy,
                #[inline(always)]
                |x, d| d * gelu_tanh_derivative(x),
            ),
            Function::QuickGelu => map(
                u,
                dy,
                #[inline(always)]
                |x, d| d * swish_derivative(x, F::of(1.702)),
            ),
            Function::Relu => map(
                u,
                dy,
                #[inline(always)]
                |x, d| if x > F::ZERO { d } else { F::ZERO },
            ),
            Function::Silu => map(
                u,
                dy,
                #[inline(always)]
                |x, d| d * swish_derivative(x, F::ONE),
            ),
            Function::Tanh => map(
                u,
                dy,
                #[inline(always)]
                |x, d| {
                    let t = x.tanh();
                    d * (F::ONE - t * t)
                },
            ),
        }
    }
}

/// The launches of `activation.cu`. Products add the bias.
mod gpu {
    use super::super::Count;
    use super::super::gpu::{blocks, launch_as};
    use super::super::linear::gpu::{add_column_partials, column_blocks};
    use super::Function;
    use crate::device::Tensor;
    use crate::device::gpu::Gpu;
    use crate::device::launch::{ConstPtr, Shape};

    fn grid(rows: Count<'_>, width: usize) -> Shape {
        Shape::linear(blocks(rows.rows * width, 2048), 256)
    }

    /// The kernels' number of the function.
    fn number(function: Function) -> i32 {
        match function {
            Function::Gelu => 0,
            Function::GeluTanh => 1,
            Function::QuickGelu => 2,
            Function::Relu => 3,
            Function::Silu => 4,
            Function::Tanh => 5,
        }
    }

    pub fn forward(gpu: &Gpu, function: Function, u: &Tensor, y: &Tensor, rows: Count<'_>, width: usize) {
        launch_as!(
            gpu,
            u,
            grid(rows, width),
            ActivationForwardF32
                | ActivationForwardBf16 {
                    y: y.get_mut(),
                    u: u.get(),
                    bias: ConstPtr::null(),
                    rows: rows.get(),
                    N: width as i32,
                    function: number(function),
                }
        );
    }

    pub fn backward(gpu: &Gpu, function: Function, u: &Tensor, dy: &Tensor, rows: Count<'_>, width: usize) {
        launch_as!(
            gpu,
            u,
            grid(rows, width),
            ActivationBackwardF32
                | ActivationBackwardBf16 {
                    dy: dy.get_mut(),
                    u: u.get(),
                    bias: ConstPtr::null(),
                    rows: rows.get(),
                    N: width as i32,
                    function: number(function),
                }
        );
    }

    pub fn backward_with_bias(
        gpu: &Gpu,
        function: Function,
        u: &Tensor,
        dy: &Tensor,
        db_acc: &Tensor,
        (rows, width): (Count<'_>, usize),
    ) {
        let (grid, partials) = column_blocks(gpu, rows, width);
        launch_as!(
            gpu,
            u,
            grid,
            ActivationBackwardSumsF32
                | ActivationBackwardSumsBf16 {
                    dy: dy.get_mut(),
                    partials,
                    u: u.get(),
                    rows: rows.get(),
                    N: width as i32,
                    function: number(function),
                }
        );
        add_column_partials(gpu, rows, width, (grid, partials), db_acc);
    }
}
