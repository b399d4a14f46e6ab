//! What the emulator's tests share: typed buffers, deterministic data, and the settings under which every kernel must agree.

use half::bf16;
use retromae_engine::device::emulator::{Asynchronous, Emulator, Memory, Options};
use retromae_engine::device::launch::{ConstPtr, MutPtr};
use retromae_engine::rng::{Site, Stream};

/// A device buffer of `T`.
pub struct Buffer<T> {
    memory: Memory,
    len: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: bytemuck::Pod> Buffer<T> {
    pub fn new(device: &Emulator, len: usize) -> Self {
        let memory = device.alloc(len * size_of::<T>()).expect("the emulator maps memory");
        Buffer { memory, len, element: std::marker::PhantomData }
    }

    pub fn from(device: &Emulator, values: &[T]) -> Self {
        let mut buffer = Self::new(device, values.len());
        buffer.memory.write(0, bytemuck::cast_slice(values)).expect("sizes agree");
        buffer
    }

    pub fn read(&self) -> Vec<T> {
        let mut values = vec![T::zeroed(); self.len];
        self.memory.read(0, bytemuck::cast_slice_mut(&mut values)).expect("sizes agree");
        values
    }

    pub fn get(&self) -> ConstPtr<T> {
        ConstPtr::new(self.memory.address())
    }

    pub fn get_mut(&self) -> MutPtr<T> {
        MutPtr::new(self.memory.address())
    }

    pub fn address(&self) -> u64 {
        self.memory.address()
    }
}

/// Standard normal values of the stream `number`.
pub fn normal(number: u64, len: usize) -> Vec<f32> {
    let mut stream = Stream::new(7, 0, Site::Init, number);
    (0..len).map(|_| stream.normal()).collect()
}

pub fn to_bf16(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&v| bf16::from_f32(v)).collect()
}

/// ‖a − b‖ / ‖b‖; NaN when either holds a NaN, so compare with `!(error <= tolerance)`.
pub fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2)).sum();
    let norm: f64 = b.iter().map(|&y| f64::from(y).powi(2)).sum();
    (difference / norm).sqrt()
}

#[track_caller]
pub fn assert_close(what: &str, a: &[f32], b: &[f32], tolerance: f64) {
    let error = relative_error(a, b);
    assert!(error <= tolerance, "{what}: relative error {error:e}, allowed {tolerance:e}");
}

/// Schedules, asynchronous modes and thread counts that must not change a bit.
pub fn every_order() -> Vec<Options> {
    let mut all = Vec::new();
    for asynchronous in [Asynchronous::Late, Asynchronous::AtIssue, Asynchronous::Random] {
        for seed in [0, 1, 2, 3] {
            all.push(Options { seed, asynchronous, threads: 1 + (seed as u32 & 1), ..Options::default() });
        }
    }
    all
}
