//! [`Backend`] over the kernel emulator: device memory is host memory, work has run when it is queued, a capture is a list, and matrix
//! products are those of the CPU.

use std::any::Any;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use half::bf16;

use super::cpu::{Threads, View, gemm, scratch};
use super::emulator::{Emulator, Options};
use super::gpu::{Backend, Captured, Event, Facts, GpuProduct, Operand};
use super::launch::{Kernel, Launcher, Shape, TensorLayout, TensorMap};
use super::recorded::Work;
use super::{DType, Output, Product};
use crate::error::{Error, Result};

/// The emulated GPU.
pub(super) struct EmulatorBackend {
    facts: Facts,
    inner: Arc<Inner>,
    /// Work recorded so far, while a capture is open.
    recording: Mutex<Option<Vec<Work>>>,
}

struct Inner {
    emulator: Emulator,
    /// Bytes in use, and how many there may be.
    used: Mutex<Vec<(u64, usize)>>,
    memory: usize,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EmulatorBackend {
    pub(super) fn new(options: Options) -> Result<Self> {
        let emulator = Emulator::new(options)?;
        let facts = Facts {
            name: "kernel emulator".into(),
            capability: (9, 0),
            warpgroups: Facts::has_warpgroups((9, 0)),
            // Few, so that small tests give every block more than one share of the work.
            multiprocessors: 2,
            shared_bytes: options.shared_bytes,
            memory: options.memory as u64,
            software: format!("{} build", emulator.variant()),
        };
        let inner = Inner { emulator, used: Mutex::default(), memory: options.memory };
        Ok(EmulatorBackend { facts, inner: Arc::new(inner), recording: Mutex::default() })
    }

    /// Records the work, or does it.
    fn queue(&self, work: Work) -> Result<()> {
        match &mut *locked(&self.recording) {
            Some(list) => list.push(work),
            None => return self.inner.perform(&work),
        }
        Ok(())
    }

    /// Refuses what a driver refuses while it records.
    fn not_recording(&self, what: &str) -> Result<()> {
        match *locked(&self.recording) {
            Some(_) => Err(Error::device(format!("{what} while a capture is open")).remedy("report this as a defect")),
            None => Ok(()),
        }
    }
}

impl Inner {
    fn perform(&self, work: &Work) -> Result<()> {
        match work {
            Work::Launch { kernel, shape, params } => {
                // SAFETY: the values were copied from a launch that its caller vouched for.
                unsafe { self.emulator.launch(kernel, *shape, &params.pointers()) }
            }
            Work::Fill { at, bytes, byte } => {
                // SAFETY: the caller of `fill` vouched for the range.
                unsafe { self.emulator.fill_at(*at, *byte, *bytes) };
                Ok(())
            }
            Work::Product(p) => {
                multiply(p);
                let bytes = ((p.m - 1) * p.c.stride + p.n) * p.c.dtype.size();
                // SAFETY: the caller of `product` vouched for the output.
                unsafe { self.emulator.written(p.c.address, bytes) };
                Ok(())
            }
        }
    }
}

impl Backend for EmulatorBackend {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.not_recording("an allocation")?;
        let mut used = locked(&self.inner.used);
        let total: usize = used.iter().map(|(_, bytes)| bytes).sum();
        if total + bytes > self.inner.memory {
            return Err(super::gpu::out_of_memory(bytes, (self.inner.memory - total) as u64, &self.facts));
        }
        let address = self.inner.emulator.alloc_at(bytes)?;
        used.push((address, bytes));
        Ok(address)
    }

    // SAFETY: what callers owe is written at the trait.
    unsafe fn free(&self, address: u64) {
        locked(&self.inner.used).retain(|(at, _)| *at != address);
        // SAFETY: passed on.
        unsafe { self.inner.emulator.free_at(address) };
    }

    // SAFETY: what callers owe is written at the trait.
    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<()> {
        self.not_recording("a copy")?;
        // SAFETY: passed on.
        unsafe { self.inner.emulator.write_at(to, from) };
        Ok(())
    }

    // SAFETY: what callers owe is written at the trait.
    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.not_recording("a copy")?;
        // SAFETY: passed on.
        unsafe { self.inner.emulator.read_at(from, to) };
        Ok(())
    }

    // SAFETY: what callers owe is written at the trait.
    unsafe fn fill(&self, at: u64, bytes: usize, byte: u8) -> Result<()> {
        self.queue(Work::Fill { at, bytes, byte })
    }

    // SAFETY: what callers owe is written at the trait.
    unsafe fn launch(&self, kernel: &Kernel, shape: Shape, params: &[*const c_void]) -> Result<()> {
        if locked(&self.recording).is_none() {
            // SAFETY: passed on.
            return unsafe { self.inner.emulator.launch(kernel, shape, params) };
        }
        // SAFETY: passed on.
        self.queue(unsafe { Work::launch(kernel, shape, params) }?)
    }

    // SAFETY: what callers owe is written at the trait.
    unsafe fn product(&self, p: &GpuProduct) -> Result<()> {
        self.queue(Work::Product(*p))
    }

    fn begin_capture(&self) -> Result<()> {
        self.not_recording("a capture")?;
        *locked(&self.recording) = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<Box<dyn Captured>> {
        let work = locked(&self.recording).take().unwrap_or_default();
        Ok(Box::new(Recording { inner: self.inner.clone(), work }))
    }

    fn tensor_map(&self, layout: &TensorLayout) -> Result<TensorMap> {
        self.inner.emulator.tensor_map(layout)
    }

    fn event(&self) -> Result<Box<dyn Event>> {
        Ok(Box::new(Moment(Instant::now())))
    }

    fn synchronize(&self) -> Result<()> {
        self.not_recording("a wait")
    }
}

struct Recording {
    inner: Arc<Inner>,
    work: Vec<Work>,
}

impl Captured for Recording {
    fn replay(&self) -> Result<()> {
        self.work.iter().try_for_each(|work| self.inner.perform(work))
    }
}

struct Moment(Instant);

impl Event for Moment {
    fn since(&self, earlier: &dyn Event) -> Result<f64> {
        let earlier = earlier.as_any().downcast_ref::<Moment>().map_or(self.0, |moment| moment.0);
        Ok(self.0.duration_since(earlier).as_secs_f64() * 1e3)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// `len` elements at an address of the emulated device.
///
/// # Safety
/// They lie inside one allocation, and nobody writes them meanwhile.
unsafe fn elements<'a, T>(address: u64, len: usize) -> &'a [T] {
    // SAFETY: passed on; device addresses are host addresses here.
    unsafe { std::slice::from_raw_parts(address as *const T, len) }
}

/// Lends `f` the operand as f32: itself, or a copy of its bf16.
fn with_f32<R>(o: &Operand, rows: usize, columns: usize, f: impl FnOnce(&[f32]) -> R) -> R {
    let len = if rows == 0 || columns == 0 { 0 } else { (rows - 1) * o.stride + columns };
    match o.dtype {
        DType::BF16 => scratch(len, |wide: &mut [f32]| {
            // SAFETY: the caller of `product` vouched for the operand.
            let narrow = unsafe { elements::<bf16>(o.address, len) };
            wide.iter_mut().zip(narrow).for_each(|(wide, narrow)| *wide = narrow.to_f32());
            f(wide)
        }),
        // SAFETY: as above.
        _ => f(unsafe { elements(o.address, len) }),
    }
}

/// The product on the CPU, with sums in f32, rounded once.
fn multiply(p: &GpuProduct) {
    let (m, n, k) = (p.m, p.n, p.k);
    let (a_shape, b_shape) = match p.product {
        Product::NT => ((m, k), (n, k)),
        Product::NN => ((m, k), (k, n)),
        Product::TN => ((k, m), (k, n)),
    };
    with_f32(&p.a, a_shape.0, a_shape.1, |a| {
        with_f32(&p.b, b_shape.0, b_shape.1, |b| {
            let (a, b) = (View::rows(a, p.a.stride), View::rows(b, p.b.stride));
            let (a, b) = match p.product {
                Product::NT => (a, b.t()),
                Product::NN => (a, b),
                Product::TN => (a.t(), b),
            };
            scratch(m * n, |c: &mut [f32]| {
                gemm((m, n, k), 1.0, a, b, c, n, Output::Set, Threads::All);
                match p.c.dtype {
                    DType::BF16 => store::<bf16>(p, c, bf16::to_f32, bf16::from_f32),
                    _ => store::<f32>(p, c, |x| x, |x| x),
                }
            });
        });
    });
}

/// Adds bias and old content to the product and stores it.
fn store<T: Copy>(p: &GpuProduct, product: &[f32], wide: fn(T) -> f32, narrow: fn(f32) -> T) {
    // SAFETY: the caller of `product` vouched for a bias of `n` elements.
    let bias = p.bias.map(|at| unsafe { elements::<T>(at, p.n) });
    // SAFETY: the caller of `product` vouched for the output and that nothing else is at work on it.
    let c = unsafe { std::slice::from_raw_parts_mut(p.c.address as *mut T, (p.m - 1) * p.c.stride + p.n) };
    for (c, product) in c.chunks_mut(p.c.stride).zip(product.chunks_exact(p.n)) {
        for (j, (c, &x)) in c.iter_mut().zip(product).enumerate() {
            let mut x = x;
            if let Some(bias) = bias {
                x += wide(bias[j]);
            }
            *c = narrow(if p.add { x + wide(*c) } else { x });
        }
    }
}
