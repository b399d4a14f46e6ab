//! What the tests of kernels share: values in either storage type, names and dropout of rows, and the judgement of errors.

pub use crate::device::*;
use half::{bf16, f16};
use retromae_engine::device::Tensor;
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::kernels;
use retromae_engine::ops::{RowNames, SiteDropout};
use retromae_engine::rng::{Dropout, Site, Stream};

/// Largest relative error of results that are f32.
const F32_ERROR: f64 = 1e-5;

/// Element type of a kernel's storage.
pub trait Storage: bytemuck::Pod + Send + Sync {
    /// Whether storing rounds.
    const ROUNDS: bool;
    fn of(x: f32) -> Self;
    fn f32(self) -> f32;
}

impl Storage for f32 {
    const ROUNDS: bool = false;
    fn of(x: f32) -> Self {
        x
    }
    fn f32(self) -> f32 {
        self
    }
}

impl Storage for bf16 {
    const ROUNDS: bool = true;
    fn of(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn f32(self) -> f32 {
        self.to_f32()
    }
}

impl Storage for f16 {
    const ROUNDS: bool = true;
    fn of(x: f32) -> Self {
        f16::from_f32(x)
    }
    fn f32(self) -> f32 {
        self.to_f32()
    }
}

/// What storing leaves of a value.
pub fn round<T: Storage>(x: f32) -> f32 {
    T::of(x).f32()
}

pub fn rounded<T: Storage>(x: &[f32]) -> Vec<f32> {
    x.iter().map(|&x| round::<T>(x)).collect()
}

/// Standard normal values, named by `name`.
pub fn normal(len: usize, name: u64) -> Vec<f32> {
    let mut stream = Stream::new(7, 0, Site::Init, name);
    (0..len).map(|_| stream.normal()).collect()
}

/// Numbers below `n`, named by `name`.
pub fn below(len: usize, n: u32, name: u64) -> Vec<u32> {
    let mut stream = Stream::new(8, 0, Site::Init, name);
    (0..len).map(|_| stream.below(n)).collect()
}

/// Values in the kernel's storage, with room for more.
pub fn stored<T: Storage>(device: &'static Gpu, x: &[f32], room: usize) -> Buffer<T> {
    Buffer::with_room(device, &x.iter().map(|&x| T::of(x)).collect::<Vec<_>>(), x.len() + room)
}

pub fn widened<T: Storage>(x: Vec<T>) -> Vec<f32> {
    x.into_iter().map(T::f32).collect()
}

/// ‖x − exact‖ / ‖exact‖, plain ‖x‖ where `exact` is zero; NaN when either holds a NaN.
pub fn relative(x: &[f32], exact: &[f64]) -> f64 {
    assert_eq!(x.len(), exact.len());
    let difference: f64 = x.iter().zip(exact).map(|(&x, e)| (f64::from(x) - e).powi(2)).sum();
    let norm: f64 = exact.iter().map(|e| e * e).sum();
    if norm > 0.0 { (difference / norm).sqrt() } else { difference.sqrt() }
}

/// Judges a result of a kernel with storage `T`: f32 against the bound, bf16 against twice the error of `plain`, a bf16 computation that
/// rounds where PyTorch's would. What is f32 by nature (statistics, sums) may be as far off as f32.
#[track_caller]
pub fn judge<T: Storage>(what: &str, got: &[f32], exact: &[f64], plain: &[f32]) {
    let error = relative(got, exact);
    let allowed = if T::ROUNDS { F32_ERROR.max(2.0 * relative(plain, exact)) } else { F32_ERROR };
    assert!(error <= allowed, "{what}: relative error {error:e}, allowed {allowed:e}");
}

pub fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// The rows of sequences of these lengths, by name.
pub struct Names {
    samples: Vec<u64>,
    sequence: Vec<u32>,
    pub position: Vec<u32>,
    tensors: [Tensor; 3],
}

/// [`Names`] on a device.
pub struct DeviceNames {
    samples: Buffer<u64>,
    sequence: Buffer<u32>,
    position: Buffer<u32>,
}

impl Names {
    pub fn new(lengths: &[usize]) -> Self {
        // Sample numbers need both words of a counter.
        let samples: Vec<u64> = (0..lengths.len() as u64).map(|s| (1 << 40) + 3 * s).collect();
        let sequence: Vec<u32> = lengths.iter().enumerate().flat_map(|(s, &n)| vec![s as u32; n]).collect();
        let position: Vec<u32> = lengths.iter().flat_map(|&n| 0..n as u32).collect();
        let tensors = [Tensor::from_slice(&samples), Tensor::from_slice(&sequence), Tensor::from_slice(&position)];
        Names { samples, sequence, position, tensors }
    }

    pub fn rows(&self) -> RowNames<'_> {
        let [samples, sequence, position] = &self.tensors;
        RowNames { samples, sequence, position }
    }

    pub fn on(&self, device: &'static Gpu) -> DeviceNames {
        DeviceNames {
            samples: Buffer::of(device, &self.samples),
            sequence: Buffer::of(device, &self.sequence),
            position: Buffer::of(device, &self.position),
        }
    }

    /// Rows of `x` after dropout.
    pub fn dropped(&self, x: &[f32], dropout: SiteDropout) -> Vec<f32> {
        let (mut out, width) = (x.to_vec(), x.len() / self.sequence.len().max(1));
        if dropout.mask.is_on() {
            for (row, x) in out.chunks_mut(width).enumerate() {
                let sample = self.samples[self.sequence[row] as usize];
                dropout.mask.each(dropout.site, sample, self.position[row], 0, width, |e, keep| {
                    x[e] = if keep { x[e] * dropout.mask.scale() as f32 } else { 0.0 };
                });
            }
        }
        out
    }
}

impl DeviceNames {
    pub fn get(&self) -> kernels::RowNames {
        kernels::RowNames { samples: self.samples.get(), sequence: self.sequence.get(), position: self.position.get() }
    }
}

/// Dropout with probability `p` at a site.
pub fn dropout(p: f32, site: u32) -> SiteDropout {
    SiteDropout { mask: if p == 0.0 { Dropout::OFF } else { Dropout::new(11, 5, p) }, site }
}

/// The kernels' form of a dropout; `key` holds the two words that it points to.
pub fn device_dropout(dropout: SiteDropout, key: &Buffer<u32>) -> kernels::Dropout {
    let mask = dropout.mask;
    kernels::Dropout { key: key.get(), threshold: mask.threshold, scale: mask.scale() as f32 }
}
