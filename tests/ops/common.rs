//! The one checker of differentiable ops, and what its cases are made of.
//!
//! An op is a function from named inputs to one output `y`; the checker differentiates `Σ weight · y`. Output buffers are longer
//! than needed and begin as NaN (`=`) or as a known value (`+=`), so an element that is missed, read too early, or written past the
//! end shows up.

use retromae_engine::device::{DType, Device, Tensor};
use retromae_engine::ops::{RowNames, SiteDropout};
use retromae_engine::rng::{Dropout, Site, Stream};

pub const CPU: Device = Device::Cpu;

/// Elements past the end of every buffer, which no op may touch. The graph's buffers are made for the largest batch.
const GUARD: usize = 7;

/// Largest relative error of a gradient against central differences (RELIABILITY: 1e-6).
const GRADIENT: f64 = 1e-6;

/// Elements of an input that are differentiated one by one; a random direction covers the rest.
const PROBES: usize = 24;

/// A differentiable op on one problem.
pub trait Op: Sync {
    /// Names and values of the inputs that have a gradient.
    fn inputs(&self) -> Vec<(&'static str, Vec<f64>)>;

    /// `y` from the inputs.
    fn forward(&self, lab: &Lab, x: &[Vec<f64>]) -> Vec<f64>;

    /// Gradients of `Σ dy · y`, one for each input. Runs the forward where it needs what that saves.
    fn backward(&self, lab: &Lab, x: &[Vec<f64>], dy: &[f64]) -> Vec<Vec<f64>>;

    /// Bound of ‖f32 − f64‖ / ‖f64‖ of the output and every gradient, in units of the f32 rounding error 2⁻²⁴.
    fn growth(&self) -> f64;
}

/// How buffers are made in one run of an op.
pub struct Lab {
    pub dtype: DType,
    /// What outputs that are added to begin with.
    pub start: f64,
}

/// A buffer that an op writes (`=`) or adds to (`+=`).
pub struct Out {
    pub tensor: Tensor,
    len: usize,
    initial: f64,
}

impl Lab {
    /// A tensor of these values, followed by NaN that must not be read.
    pub fn tensor(&self, values: &[f64]) -> Tensor {
        filled(self.dtype, values, f64::NAN)
    }

    /// A buffer for an `=` output.
    pub fn set(&self, len: usize) -> Out {
        Out { tensor: filled(self.dtype, &vec![f64::NAN; len], f64::NAN), len, initial: f64::NAN }
    }

    /// A buffer for a `+=` output.
    pub fn acc(&self, len: usize) -> Out {
        Out { tensor: filled(self.dtype, &vec![self.start; len], self.start), len, initial: self.start }
    }

    /// A buffer that is input and `=` output in one.
    pub fn in_place(&self, values: &[f64]) -> Out {
        Out { tensor: self.tensor(values), len: values.len(), initial: f64::NAN }
    }
}

impl Out {
    /// What the op left (less what a `+=` output began with).
    pub fn take(&self) -> Vec<f64> {
        let mut all = values(&self.tensor);
        let same = |x: &f64| x.to_bits() == self.initial.to_bits() || (x.is_nan() && self.initial.is_nan());
        assert!(all[self.len..].iter().all(same), "written past the end: {:?}", &all[self.len..]);
        all.truncate(self.len);
        if !self.initial.is_nan() {
            all.iter_mut().for_each(|x| *x -= self.initial);
        }
        all
    }
}

fn filled(dtype: DType, values: &[f64], guard: f64) -> Tensor {
    let all: Vec<f64> = values.iter().copied().chain([guard; GUARD]).collect();
    match dtype {
        DType::F64 => Tensor::from_slice(&all),
        _ => Tensor::from_slice(&all.iter().map(|&x| x as f32).collect::<Vec<_>>()),
    }
}

/// The elements of a floating-point tensor.
pub fn values(t: &Tensor) -> Vec<f64> {
    match t.dtype() {
        DType::F64 => t.to_vec(),
        _ => t.to_vec::<f32>().into_iter().map(f64::from).collect(),
    }
}

/// Runs every check on an op.
pub fn check(op: &impl Op) {
    let inputs = op.inputs();
    let x: Vec<Vec<f64>> = inputs.iter().map(|i| i.1.clone()).collect();
    let wide = Lab { dtype: DType::F64, start: 0.0 };
    let y = op.forward(&wide, &x);
    assert!(y.iter().all(|y| y.is_finite()), "output is not finite or not written");
    // f32 values, so that the f32 run gets the same numbers.
    let dy = normal(y.len(), 77, 1.0);
    let gradients = op.backward(&wide, &x, &dy);
    assert_eq!(gradients.len(), x.len());
    for (i, (name, _)) in inputs.iter().enumerate() {
        assert_eq!(gradients[i].len(), x[i].len(), "{name}");
        differences(op, &wide, (name, i), &x, &dy, &gradients[i]);
    }
    adds(op, &x, &dy, &gradients);
    narrow(op, &x, &y, &dy, &gradients);
}

/// Central differences of one input: single elements, and one direction that moves all.
fn differences(op: &impl Op, lab: &Lab, (name, i): (&str, usize), x: &[Vec<f64>], dy: &[f64], gradient: &[f64]) {
    // Error of a difference: h² f‴/6 ≈ 1e-11 and rounding ε Σ|w y| / h, the floor below.
    let h = 1e-5;
    let mut moved = x.to_vec();
    let mut slope = |direction: &dyn Fn(usize) -> f64| {
        let mut at = |sign: f64| {
            moved[i].iter_mut().enumerate().for_each(|(e, m)| *m = x[i][e] + sign * h * direction(e));
            let y = op.forward(lab, &moved);
            (dot(&y, dy), y.iter().zip(dy).map(|(a, b)| (a * b).abs()).sum::<f64>())
        };
        let ((plus, size), (minus, _)) = (at(1.0), at(-1.0));
        ((plus - minus) / (2.0 * h), 16.0 * f64::EPSILON * size / h)
    };
    let step = x[i].len().div_ceil(PROBES).max(1);
    let (mut error, mut norm, mut floor) = (0.0, 0.0, 0.0f64);
    for e in (0..x[i].len()).step_by(step) {
        let (numeric, rounding) = slope(&|j| f64::from(j == e));
        error += (numeric - gradient[e]).powi(2);
        norm += gradient[e].powi(2);
        floor = floor.max(rounding);
    }
    let (error, norm) = (f64::sqrt(error), f64::sqrt(norm));
    assert!(error <= GRADIENT * norm + floor, "d{name}: differs by {error:.2e} at norm {norm:.2e}");
    let signs = normal(x[i].len(), 5, 1.0);
    let (numeric, floor) = slope(&|j| signs[j].signum());
    let exact: f64 = gradient.iter().zip(&signs).map(|(g, s)| g * s.signum()).sum();
    let norm = dot(gradient, gradient).sqrt();
    assert!((numeric - exact).abs() <= GRADIENT * norm + floor, "d{name}: slope {numeric} instead of {exact}");
}

/// Outputs that are added to keep what was there.
fn adds(op: &impl Op, x: &[Vec<f64>], dy: &[f64], expected: &[Vec<f64>]) {
    let ones = op.backward(&Lab { dtype: DType::F64, start: 1.0 }, x, dy);
    for (ones, expected) in ones.iter().zip(expected) {
        let largest = expected.iter().fold(1.0f64, |a, x| a.max(x.abs()));
        // One rounding an addend: the number of addends is far below 1000.
        let ok = ones.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 1000.0 * f64::EPSILON * largest);
        assert!(ok, "added to ones: {ones:?} instead of {expected:?}");
    }
}

/// f32 against f64, and equal bits of one and two threads and of a second call.
fn narrow(op: &impl Op, x: &[Vec<f64>], y: &[f64], dy: &[f64], gradients: &[Vec<f64>]) {
    let lab = Lab { dtype: DType::F32, start: 0.0 };
    let run = |threads: usize| on_threads(threads, || (op.forward(&lab, x), op.backward(&lab, x, dy)));
    let (narrow_y, narrow_gradients) = run(1);
    for threads in [1, 2] {
        let (again_y, again) = run(threads);
        assert!(equal_bits(&again_y, &narrow_y), "output differs with {threads} threads");
        for (again, first) in again.iter().zip(&narrow_gradients) {
            assert!(equal_bits(again, first), "gradient differs with {threads} threads");
        }
    }
    let limit = op.growth() * f64::from(f32::EPSILON) / 2.0;
    let error = relative(&narrow_y, y);
    assert!(error <= limit, "f32 output: error {error:.2e} over {limit:.2e}");
    for (i, (name, _)) in op.inputs().iter().enumerate() {
        let error = relative(&narrow_gradients[i], &gradients[i]);
        assert!(error <= limit, "f32 d{name}: error {error:.2e} over {limit:.2e}");
    }
}

/// Runs `f` in a pool of so many threads.
pub fn on_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}

pub fn equal_bits(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// ‖x − reference‖ / ‖reference‖; plain ‖x‖ where the reference is zero.
pub fn relative(x: &[f64], reference: &[f64]) -> f64 {
    assert_eq!(x.len(), reference.len());
    let difference: f64 = x.iter().zip(reference).map(|(a, b)| (a - b).powi(2)).sum();
    let norm = dot(reference, reference);
    if norm > 0.0 { (difference / norm).sqrt() } else { difference.sqrt() }
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Normal numbers of f32, named by `name`.
pub fn normal(len: usize, name: u64, deviation: f32) -> Vec<f64> {
    let mut stream = Stream::new(3, 0, Site::Init, name);
    (0..len).map(|_| f64::from(stream.normal() * deviation)).collect()
}

/// Numbers below `n`, named by `name`.
pub fn below(len: usize, n: u32, name: u64) -> Vec<u32> {
    let mut stream = Stream::new(4, 0, Site::Init, name);
    (0..len).map(|_| stream.below(n)).collect()
}

/// First element of each of some sequences, and the end.
pub fn borders(lengths: &[usize]) -> Vec<u32> {
    std::iter::once(0)
        .chain(lengths.iter().scan(0, |end, &n| {
            *end += n as u32;
            Some(*end)
        }))
        .collect()
}

/// Owned row names.
pub struct Names {
    samples: Tensor,
    sequence: Tensor,
    pub position: Tensor,
}

impl Names {
    /// All rows of sequences of these lengths.
    pub fn all(lengths: &[usize]) -> Self {
        Self::of(&lengths.iter().map(|&n| (0..n as u32).collect()).collect::<Vec<_>>())
    }

    /// Rows at these positions of each sequence. Sample numbers need both words of a counter.
    pub fn of(positions: &[Vec<u32>]) -> Self {
        let samples: Vec<u64> = (0..positions.len() as u64).map(|s| (1 << 40) + 3 * s).collect();
        let sequence: Vec<u32> = positions.iter().enumerate().flat_map(|(s, p)| vec![s as u32; p.len()]).collect();
        let position = Tensor::from_slice(&positions.concat());
        Names { samples: Tensor::from_slice(&samples), sequence: Tensor::from_slice(&sequence), position }
    }

    pub fn rows(&self) -> RowNames<'_> {
        RowNames { samples: &self.samples, sequence: &self.sequence, position: &self.position }
    }
}

/// Dropout with probability `p` at a site.
pub fn dropout(p: f32, site: u32) -> SiteDropout {
    SiteDropout { mask: if p == 0.0 { Dropout::OFF } else { Dropout::new(11, 5, p) }, site }
}
