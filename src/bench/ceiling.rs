//! How fast the device is by itself, measured in the same process: what all other rates are relative to.

use std::cell::Cell;
use std::time::Instant;

use super::Times;
use crate::device::gpu::Gpu;
use crate::device::{DType, Device, Element, Matmul, Matrix, Output, Product, Tensor};
use crate::error::Result;
use crate::ops::{Count, gather};
use crate::rng::{Site, Stream};
use half::{bf16, f16};

/// Number of normal values that all random data is cut from.
const VALUES: usize = 1 << 22;

/// Standard normal values for tensors of any size: never zeros, on which a product runs faster than on real data.
pub struct Random {
    f32s: Vec<f32>,
    bf16s: Vec<bf16>,
    f16s: Vec<f16>,
    /// Where the next tensor begins, so that no two are equal.
    start: Cell<usize>,
}

impl Default for Random {
    fn default() -> Self {
        Self::new()
    }
}

impl Random {
    /// Draws them.
    pub fn new() -> Self {
        let mut stream = Stream::new(3, 0, Site::Init, 0);
        let f32s: Vec<f32> = (0..VALUES).map(|_| stream.normal()).collect();
        let bf16s = f32s.iter().map(|&x| bf16::from_f32(x)).collect();
        let f16s = f32s.iter().map(|&x| f16::from_f32(x)).collect();
        Random { f32s, bf16s, f16s, start: Cell::new(0) }
    }

    /// A tensor of them, each number `scale` times as large.
    pub fn tensor(&self, device: Device, dtype: DType, len: usize, scale: f32) -> Tensor {
        let start = self.start.replace((self.start.get() + 514_229) % VALUES);
        let tensor = device.zeros(dtype, len);
        match dtype {
            DType::BF16 => fill(&tensor, &self.bf16s, start, |x| bf16::from_f32(x.to_f32() * scale)),
            DType::F16 => fill(&tensor, &self.f16s, start, |x| f16::from_f32(x.to_f32() * scale)),
            _ => fill(&tensor, &self.f32s, start, |x| x * scale),
        }
        tensor
    }
}

/// Repeats `values` from number `start` on, each changed by `f`, until the tensor is full.
fn fill<T: Element>(tensor: &Tensor, values: &[T], start: usize, f: impl Fn(T) -> T) {
    let values: Vec<T> = values.iter().cycle().skip(start).take(tensor.len().min(VALUES)).map(|&x| f(x)).collect();
    for first in (0..tensor.len()).step_by(VALUES) {
        let count = values.len().min(tensor.len() - first);
        tensor.slice(first..first + count).upload(&values[..count]);
    }
}

/// Milliseconds of recorded work: the median of `repeats`, between events on the GPU's queue. `work` must have nothing to wait for and
/// nothing to allocate after its first run.
///
/// # Errors
/// A failure of the GPU.
pub fn milliseconds(gpu: &'static Gpu, repeats: usize, work: impl Fn()) -> Result<f64> {
    work();
    let record = gpu.capture(work);
    gpu.check()?;
    let Some(record) = record else { return Ok(f64::NAN) };
    for _ in 0..3 {
        gpu.replay(&*record);
    }
    let mut events = vec![gpu.event()?];
    for _ in 0..repeats {
        gpu.replay(&*record);
        events.push(gpu.event()?);
    }
    gpu.synchronize()?;
    let times = events.windows(2).map(|pair| pair[1].since(&*pair[0])).collect::<Result<Vec<_>>>()?;
    Ok(Times::new(times).median())
}

/// Milliseconds of work that is done when it returns: the fastest of `repeats`, since others may be at work on the processors.
fn milliseconds_here(repeats: usize, work: impl Fn()) -> f64 {
    work();
    let time = || {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64() * 1e3
    };
    (0..repeats).map(|_| time()).fold(f64::INFINITY, f64::min)
}

/// The measured ceilings of a device.
#[derive(Clone, Copy, Debug)]
pub struct Ceiling {
    /// Of a product of two square matrices in the storage type.
    pub tflops: f64,
    /// Of copying rows, read and written bytes counted.
    pub gb_per_s: f64,
}

impl Ceiling {
    /// Measures them: a product of `n × n` matrices, n being 8,192 on a GPU, 1,024 on the CPU and 64 to try the code, and a copy of
    /// rows with 8 (on the CPU 16) times as many elements as such a matrix has.
    ///
    /// # Errors
    /// A failure of the GPU.
    pub fn measure(device: Device, storage: DType, random: &Random, tiny: bool) -> Result<Ceiling> {
        let n = match (device, tiny) {
            (_, true) => 64,
            (Device::Gpu(_), false) => 8192,
            (Device::Cpu, false) => 1024,
        };
        let matrix = || random.tensor(device, storage, n * n, 1.0);
        let (a, b, c) = (matrix(), matrix(), device.zeros(storage, n * n));
        let product = || {
            device.matmul(&Matmul {
                product: Product::NT,
                m: n,
                n,
                k: n,
                a: Matrix::new(&a, n),
                b: Matrix::new(&b, n),
                c: Matrix::new(&c, n),
                output: Output::Set,
                bias: None,
            });
        };
        let (width, rows) = (1024, (16 * n * n).div_ceil(1024));
        let rows = if device.is_gpu() { rows / 2 } else { rows };
        let from = random.tensor(device, storage, rows * width, 1.0);
        let to = device.zeros(storage, rows * width);
        let order = device.tensor(&(0..rows as u32).collect::<Vec<_>>());
        let exact = device.tensor(&[rows as u32]);
        let count = if device.is_gpu() { Count::on_device(rows, &exact) } else { rows.into() };
        let copy = || gather::gather(device, &from, &order, count, width, &to);
        let [product, copy] = match device {
            Device::Gpu(gpu) => [milliseconds(gpu, 20, product)?, milliseconds(gpu, 20, copy)?],
            Device::Cpu => [milliseconds_here(9, product), milliseconds_here(9, copy)],
        };
        Ok(Ceiling {
            tflops: 2.0 * (n as f64).powi(3) / product / 1e9,
            gb_per_s: 2.0 * (rows * width * storage.size()) as f64 / copy / 1e6,
        })
    }
}
