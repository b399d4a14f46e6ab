//! The CPU: matrix products (crate `gemm`), vectorised loops, per-thread scratch.

pub mod bf16;

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{DType, Element, Matmul, Output, Product};

/// Floating-point types of the CPU ops: `f32` for work, `f64` for gradient checks.
pub trait Real:
    Element
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + std::ops::MulAssign
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// −∞.
    const NEG_INFINITY: Self;
    /// Rounded from `x`.
    fn of(x: f64) -> Self;
    /// Widened.
    fn f64(self) -> f64;
    /// eˣ.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// Error function.
    fn erf(self) -> Self;
    /// The larger.
    fn max(self, other: Self) -> Self;
}

impl Real for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    const NEG_INFINITY: f64 = f64::NEG_INFINITY;
    fn of(x: f64) -> f64 {
        x
    }
    fn f64(self) -> f64 {
        self
    }
    fn exp(self) -> f64 {
        f64::exp(self)
    }
    fn ln(self) -> f64 {
        f64::ln(self)
    }
    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }
    fn tanh(self) -> f64 {
        f64::tanh(self)
    }
    fn erf(self) -> f64 {
        libm::erf(self)
    }
    fn max(self, other: f64) -> f64 {
        f64::max(self, other)
    }
}

impl Real for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
    const NEG_INFINITY: f32 = f32::NEG_INFINITY;
    #[inline(always)]
    fn of(x: f64) -> f32 {
        x as f32
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        f64::from(self)
    }
    /// Two-step range reduction and a degree-6 polynomial, at most 2 ulp off; branch-free, so that loops over it vectorise.
    #[inline(always)]
    fn exp(self) -> f32 {
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to an integer
        let x = if self < -87.3 { -87.3 } else { self };
        let x = if x > 88.3 { 88.3 } else { x };
        let n = x * std::f32::consts::LOG2_E + ROUND;
        let power = f32::from_bits(n.to_bits().wrapping_shl(23).wrapping_add(0x3F80_0000));
        let n = n - ROUND;
        let r = (x - n * LN2_HIGH) - n * LN2_LOW;
        let p = 1.388_887_4e-3 * r + 8.333_333e-3;
        let p = p * r + 4.166_666_6e-2;
        let p = p * r + 1.666_666_7e-1;
        let p = (p * r + 0.5) * (r * r) + r + 1.0;
        if self < -87.3 {
            0.0
        } else if self.is_nan() {
            self
        } else {
            p * power
        }
    }
    #[inline(always)]
    fn ln(self) -> f32 {
        f32::ln(self)
    }
    #[inline(always)]
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn tanh(self) -> f32 {
        // 1 − 2 / (e²ˣ + 1), off by at most 2·10⁻⁷ of 1 (GELU takes 1 + tanh); near 0 the polynomial keeps the relative error small.
        let x2 = self * self;
        let small = self * (1.0 - x2 * (1.0 / 3.0) * (1.0 - 0.4 * x2));
        let large = 1.0 - 2.0 / (Real::exp(2.0 * self) + 1.0);
        if x2 < 2.5e-3 { small } else { large }
    }
    /// Rational minimax approximation on [−4, 4] (the one Eigen and XLA use), never beyond ±1. Absolute error at most 5.2·10⁻⁷,
    /// measured over every f32 in [2⁻¹⁰, 6]; it is rounding, largest near 3.94. Forms with an exponential reach 10⁻⁷ in 2.6 times the time.
    #[inline(always)]
    fn erf(self) -> f32 {
        let x = if self < -4.0 { -4.0 } else { self };
        let x = if x > 4.0 { 4.0 } else { x };
        let z = x * x;
        let p = -2.726_142_3e-10 * z + 2.770_681_4e-8;
        let p = p * z - 2.101_024e-6;
        let p = p * z - 5.692_506_4e-5;
        let p = p * z - 7.349_906_3e-4;
        let p = p * z - 2.954_6e-3;
        let p = p * z - 1.609_603_3e-2;
        let q = -1.456_607_2e-5 * z - 2.133_740_6e-4;
        let q = q * z - 1.682_827e-3;
        let q = q * z - 7.373_329e-3;
        let q = q * z - 1.426_473_9e-2;
        let y = x * p / q;
        let y = if y < -1.0 { -1.0 } else { y };
        if y > 1.0 { 1.0 } else { y }
    }
    #[inline(always)]
    fn max(self, other: f32) -> f32 {
        if other > self { other } else { self }
    }
}

/// Runs `f` compiled for the widest vector instructions of this processor.
#[inline(always)]
pub fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Independent partial sums of a reduction, so that it vectorises; the order of the sum is fixed.
const LANES: usize = 16;

/// Σ f(xᵢ, yᵢ) in a fixed order. Call inside [`vectorized`].
#[inline(always)]
pub fn sum2<F: Real>(x: &[F], y: &[F], f: impl Fn(F, F) -> F) -> F {
    let mut acc = [F::ZERO; LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let tail: F = xs.remainder().iter().zip(ys.remainder()).fold(F::ZERO, |a, (&x, &y)| a + f(x, y));
    for (x, y) in xs.zip(ys) {
        for i in 0..LANES {
            acc[i] += f(x[i], y[i]);
        }
    }
    acc.iter().fold(tail, |a, &b| a + b)
}

/// Σ f(xᵢ) in a fixed order. Call inside [`vectorized`].
#[inline(always)]
pub fn sum1<F: Real>(x: &[F], f: impl Fn(F) -> F) -> F {
    sum2(x, x, |x, _| f(x))
}

/// The largest element (−∞ of none). Call inside [`vectorized`].
#[inline(always)]
pub fn max<F: Real>(x: &[F]) -> F {
    let mut acc = [F::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder().iter().fold(F::NEG_INFINITY, |a, &b| a.max(b));
    for c in chunks {
        for i in 0..LANES {
            acc[i] = acc[i].max(c[i]);
        }
    }
    acc.iter().fold(tail, |a, &b| a.max(b))
}

/// A strided matrix of host elements: element (i, j) is `data[i · row + j · column]`.
#[derive(Clone, Copy)]
pub struct View<'a, F> {
    /// The elements.
    pub data: &'a [F],
    /// Elements from row to row.
    pub row: usize,
    /// Elements from column to column.
    pub column: usize,
}

impl<'a, F> View<'a, F> {
    /// Row-major rows of `row` elements.
    pub fn rows(data: &'a [F], row: usize) -> Self {
        View { data, row, column: 1 }
    }

    /// The transposed matrix.
    pub fn t(self) -> Self {
        View { row: self.column, column: self.row, ..self }
    }

    fn holds(&self, m: usize, n: usize) -> bool {
        m == 0 || n == 0 || (m - 1) * self.row + (n - 1) * self.column < self.data.len()
    }
}

/// How many threads a host product may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The calling one: inside a parallel loop.
    One,
    /// All of rayon's.
    All,
}

/// `c[m, n] = alpha · a · b`, or `c += alpha · a · b`; rows of `c` are `stride` apart.
#[allow(clippy::too_many_arguments)] // a BLAS call has these arguments
pub fn gemm<F: Real>(
    (m, n, k): (usize, usize, usize),
    alpha: F,
    a: View<'_, F>,
    b: View<'_, F>,
    c: &mut [F],
    stride: usize,
    output: Output,
    threads: Threads,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(a.holds(m, k) && b.holds(k, n) && stride >= n && (m - 1) * stride + n <= c.len(), "product out of bounds");
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(0),
    };
    // SAFETY: the assertion above keeps every access inside the slices; `c` is borrowed mutably, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            stride as isize,
            output == Output::Add,
            a.data.as_ptr(),
            a.column as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.column as isize,
            b.row as isize,
            F::ONE,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Whether f32 products round their operands to bf16: one choice for the process, as `--precision` is.
static BF16_PRODUCTS: AtomicBool = AtomicBool::new(false);

/// Rounds the operands of all further products of f32 tensors on the CPU to bf16, or not ([`bf16`]).
pub fn use_bf16_products(on: bool) {
    BF16_PRODUCTS.store(on, Ordering::Relaxed);
}

/// Whether they do.
pub fn bf16_products() -> bool {
    BF16_PRODUCTS.load(Ordering::Relaxed)
}

/// [`super::Device::matmul`] on the host.
pub(super) fn matmul(p: &Matmul<'_>) {
    match p.c.tensor.dtype() {
        DType::F32 if bf16_products() => bf16_matmul(p),
        DType::F32 => matmul_as::<f32>(p),
        DType::F64 => matmul_as::<f64>(p),
        other => panic!("matrix product of {other:?} on the CPU"),
    }
}

/// The operands as they are multiplied.
fn operands<'a, F: Real>(p: &Matmul<'_>, a: &'a [F], b: &'a [F]) -> (View<'a, F>, View<'a, F>) {
    let a = View::rows(&a[p.a.offset..], p.a.stride);
    let b = View::rows(&b[p.b.offset..], p.b.stride);
    match p.product {
        Product::NT => (a, b.t()),
        Product::NN => (a, b),
        Product::TN => (a.t(), b),
    }
}

fn bf16_matmul(p: &Matmul<'_>) {
    let (a, b, mut c) = (p.a.tensor.read::<f32>(), p.b.tensor.read::<f32>(), p.c.tensor.write::<f32>());
    let (a, b) = operands(p, &a, &b);
    bf16::product((p.m, p.n, p.k), a, b, &mut c[p.c.offset..], p.c.stride, p.output);
}

fn matmul_as<F: Real>(p: &Matmul<'_>) {
    let (a, b, mut c) = (p.a.tensor.read::<F>(), p.b.tensor.read::<F>(), p.c.tensor.write::<F>());
    let (a, b) = operands(p, &a, &b);
    let c = &mut c[p.c.offset..];
    if p.product == Product::NT && (1..general_rows(p.n, p.k)).contains(&p.m) {
        return few_rows(p, a, b, c);
    }
    gemm((p.m, p.n, p.k), F::ONE, a, b, c, p.c.stride, p.output, Threads::All);
}

/// Rows from which on the `gemm` crate takes its general path. For fewer it has others (matrix times vector; dot products for up to
/// 256 outputs), and for up to 64 rows and columns it divides a long sum elsewhere. All of these add up in another order, so that a text's
/// embedding would change with the number of texts beside it.
fn general_rows(columns: usize, summands: usize) -> usize {
    let least = if columns <= 64 && summands > 512 { 65 } else { 2 };
    (256 / columns.max(1) + 1).max(least)
}

/// A product of few rows on the general path: zero rows are added.
fn few_rows<F: Real>(p: &Matmul<'_>, a: View<'_, F>, b: View<'_, F>, c: &mut [F]) {
    let (m, n, k, rows) = (p.m, p.n, p.k, general_rows(p.n, p.k));
    scratch(rows * (k + n), |buffer| {
        buffer.fill(F::ZERO);
        let (wide, out) = buffer.split_at_mut(rows * k);
        for i in 0..m {
            wide[i * k..(i + 1) * k].copy_from_slice(&a.data[i * a.row..][..k]);
            if p.output == Output::Add {
                out[i * n..(i + 1) * n].copy_from_slice(&c[i * p.c.stride..][..n]);
            }
        }
        gemm((rows, n, k), F::ONE, View::rows(&*wide, k), b, out, n, p.output, Threads::All);
        for i in 0..m {
            c[i * p.c.stride..][..n].copy_from_slice(&out[i * n..(i + 1) * n]);
        }
    });
}

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<u64>>> = const { RefCell::new(Vec::new()) };
}

/// Lends `f` this thread's scratch of `len` elements with unspecified content. Calls nest.
pub fn scratch<F: Real, R>(len: usize, f: impl FnOnce(&mut [F]) -> R) -> R {
    let mut buffer = SCRATCH.with(|s| s.borrow_mut().pop()).unwrap_or_default();
    let words = (len * size_of::<F>()).div_ceil(8);
    if buffer.len() < words {
        buffer.resize(words, 0);
    }
    let result = f(&mut bytemuck::cast_slice_mut(&mut buffer)[..len]);
    SCRATCH.with(|s| s.borrow_mut().push(buffer));
    result
}

/// The processor's name, as it gives it; the architecture where it gives none.
pub fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_string(), |(_, name)| name.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f32_functions_are_close_to_f64() {
        let mut x = -30.0f32;
        while x < 30.0 {
            let wide = f64::from(x);
            assert!((f64::from(Real::exp(x)) / wide.exp() - 1.0).abs() < 3e-7, "exp({x})");
            assert!((f64::from(Real::tanh(x)) - wide.tanh()).abs() < 2e-7, "tanh({x})");
            assert!(
                (f64::from(Real::erf(x)) - libm::erf(wide)).abs() < 5.2e-7 && Real::erf(x).abs() <= 1.0,
                "erf({x})"
            );
            x += 0.001_7;
        }
        assert_eq!(Real::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp(0.0f32), 1.0);
        assert!(Real::exp(f32::NAN).is_nan());
        assert_eq!(Real::exp(-200.0f32), 0.0);
        assert!(Real::erf(f32::INFINITY) > 0.999_999_4 && Real::erf(0.0f32) == 0.0);
        // The largest error, where the approximation was measured.
        assert!((f64::from(Real::erf(3.938_897_1f32)) - libm::erf(f64::from(3.938_897_1f32))).abs() < 5.2e-7);
        assert!(Real::erf(f32::NAN).is_nan());
    }

    #[test]
    fn sums_take_every_element_once() {
        for n in [0usize, 1, 15, 16, 17, 33, 100] {
            let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
            assert_eq!(sum1(&x, |x| x), (n * n.saturating_sub(1) / 2) as f32);
            assert_eq!(max(&x), if n == 0 { f32::NEG_INFINITY } else { n as f32 - 1.0 });
        }
    }
}
