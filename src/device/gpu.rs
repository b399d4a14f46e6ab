//! The GPU as the ops see it: memory, launches, matrix products, capture and replay. Whether the NVIDIA driver or the emulator carries
//! them out is known to [`Backend`]s alone.
//!
//! All work goes to one queue, in order, and is not waited for. As on any GPU, a failure may come out long after its cause: the first one
//! is kept, work that follows it is left out, and [`Gpu::check`] tells it. So ops have nothing to return.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::launch::{ConstPtr, Kernel, Launcher, MutPtr, Shape, TensorLayout, TensorMap};
use super::ring::Side;
use super::trace::{self, Piece};
use super::{DType, Product};
use crate::error::{Error, Result};
use crate::rng::Dropout;

/// What a GPU is.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// Its name.
    pub name: String,
    /// Compute capability, as in 9.0.
    pub capability: (u32, u32),
    /// Whether the kernels of Hopper's warpgroup products run: on compute capability 9.0, unless `RETROMAE_HOPPER` is 0.
    pub warpgroups: bool,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that a block may ask for, in bytes.
    pub shared_bytes: u32,
    /// Memory in bytes.
    pub memory: u64,
    /// Driver and libraries in words.
    pub software: String,
}

impl Facts {
    /// [`Self::warpgroups`] of a capability. The kernels of 8.0, which run on both, are there to compare.
    pub(super) fn has_warpgroups(capability: (u32, u32)) -> bool {
        capability == (9, 0) && std::env::var_os("RETROMAE_HOPPER").is_none_or(|v| v != "0")
    }
}

/// A matrix in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    /// Address of its first element.
    pub address: u64,
    /// F32 or BF16.
    pub dtype: DType,
    /// Elements from one row to the next.
    pub stride: usize,
}

/// A matrix product of row-major operands, as [`super::Matmul`] with addresses in place of tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GpuProduct {
    /// Which operands are transposed.
    pub product: Product,
    /// Rows of the output.
    pub m: usize,
    /// Columns of the output.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// Left operand.
    pub a: Operand,
    /// Right operand, of the type of the left one.
    pub b: Operand,
    /// Output: of that type, or f32.
    pub c: Operand,
    /// Whether the product is added to the output's old content.
    pub add: bool,
    /// Address of `[n]` elements of the output's type that are added to every row, or nothing.
    pub bias: Option<u64>,
}

/// Recorded work that can be queued again at once.
pub trait Captured: Send + Sync {
    /// Queues it.
    fn replay(&self) -> Result<()>;
}

/// A point in the queue, for timing.
pub trait Event: Send + Sync {
    /// Milliseconds from `earlier`, of the same backend, to this one. Waits for it.
    fn since(&self, earlier: &dyn Event) -> Result<f64>;
    /// For backends to find their own events.
    fn as_any(&self) -> &dyn std::any::Any;
}

/// Who carries out the work of a [`Gpu`]. Between `begin_capture` and `end_capture` launches, fills and products are recorded and not run;
/// nothing else may be called then.
pub trait Backend: Send + Sync {
    /// What it is.
    fn facts(&self) -> &Facts;

    /// A line worth telling about it, although it works.
    fn warning(&self) -> Option<&str> {
        None
    }

    /// Device memory, aligned to 256 bytes where the device is real, with any content.
    fn alloc(&self, bytes: usize) -> Result<u64>;

    /// Gives memory back when queued work has finished with it.
    ///
    /// # Safety
    /// `address` came from `alloc` and is given back once.
    unsafe fn free(&self, address: u64);

    /// Queues a copy to the device; `from` is free again when this returns.
    ///
    /// # Safety
    /// The bytes from `to` on belong to one allocation.
    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<()>;

    /// Waits for all work and copies from the device.
    ///
    /// # Safety
    /// The bytes from `from` on belong to one allocation.
    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<()>;

    /// Queues a copy from the device of a few bytes that [`Self::end_download`] will ask for: work that is queued between the two is
    /// then not waited for. One such copy at a time.
    ///
    /// # Safety
    /// The bytes from `from` on belong to one allocation.
    unsafe fn begin_download(&self, _from: u64, _bytes: usize) -> Result<()> {
        Ok(())
    }

    /// Waits for the copy that was begun, and for the work before it.
    ///
    /// # Safety
    /// [`Self::begin_download`] was called with `from` and as many bytes, and they still belong to one allocation.
    unsafe fn end_download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        // SAFETY: passed on.
        unsafe { self.download(from, to) }
    }

    /// Queues setting bytes to `byte`.
    ///
    /// # Safety
    /// The bytes from `at` on belong to one allocation.
    unsafe fn fill(&self, at: u64, bytes: usize, byte: u8) -> Result<()>;

    /// Queues a kernel.
    ///
    /// # Safety
    /// As for [`Launcher::launch`].
    unsafe fn launch(&self, kernel: &Kernel, shape: Shape, params: &[*const c_void]) -> Result<()>;

    /// Queues a matrix product.
    ///
    /// # Safety
    /// The operands lie inside allocations, and the output overlaps neither of the others.
    unsafe fn product(&self, p: &GpuProduct) -> Result<()>;

    /// Begins to record.
    fn begin_capture(&self) -> Result<()>;

    /// Ends recording, also after a failure.
    fn end_capture(&self) -> Result<Box<dyn Captured>>;

    /// Encodes a tensor map, refusing what the driver refuses.
    fn tensor_map(&self, layout: &TensorLayout) -> Result<TensorMap>;

    /// Marks this point of the queue.
    fn event(&self) -> Result<Box<dyn Event>>;

    /// Waits for all work.
    fn synchronize(&self) -> Result<()>;

    /// Whether it can be connected with those of other processes; else why not.
    fn can_ring(&self) -> Result<()> {
        Err(no_ring())
    }

    /// What all processes must have to be connected, made by one of them.
    fn ring_id(&self) -> Result<Vec<u8>> {
        Err(no_ring())
    }

    /// Connects this one, number `rank` of `size`; returns when all have come.
    fn ring(&self, _id: &[u8], _rank: usize, _size: usize) -> Result<Box<dyn Side>> {
        Err(no_ring())
    }
}

/// The error of a device whose processes cannot be connected.
fn no_ring() -> Error {
    Error::device("this device cannot be connected with those of other processes").remedy("use --device cuda")
}

/// The error of an allocation that does not fit.
pub(super) fn out_of_memory(bytes: usize, free: u64, facts: &Facts) -> Error {
    let gib = |bytes: f64| bytes / f64::from(1 << 30);
    let (wanted, free, all) = (gib(bytes as f64), gib(free as f64), gib(facts.memory as f64));
    Error::device(format!("out of memory: {wanted:.2} GiB wanted, {free:.2} of {all:.2} GiB free on {}", facts.name))
        .remedy("use a smaller batch and accumulate, or a smaller model; train --dry-run tells what a run needs")
}

/// Temporary memory that kernels of one op hand to each other. It only grows, and outgrown pieces stay: captured work may use them.
#[derive(Default)]
struct Scratch {
    pieces: Vec<u64>,
    bytes: usize,
}

/// A GPU, or the emulated one. Lives as long as the process.
pub struct Gpu {
    backend: Box<dyn Backend>,
    failure: Mutex<Option<Error>>,
    scratch: Mutex<Scratch>,
    /// `[2]` u32 on the device: key of the step's dropout.
    key: OnceLock<Memory>,
    /// The same here, to notice an op that draws from another step.
    key_here: Mutex<[u32; 2]>,
    /// Bytes ever taken from the backend.
    allocated: AtomicU64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// The GPU behind `backend`.
    pub fn new(backend: Box<dyn Backend>) -> Result<&'static Gpu> {
        let gpu: &'static Gpu = Box::leak(Box::new(Gpu {
            backend,
            failure: Mutex::default(),
            scratch: Mutex::default(),
            key: OnceLock::new(),
            key_here: Mutex::new([0; 2]),
            allocated: AtomicU64::new(0),
        }));
        gpu.key.get_or_init(|| gpu.memory(8, 0));
        gpu.check().map(|()| gpu)
    }

    /// What it is.
    pub fn facts(&self) -> &Facts {
        self.backend.facts()
    }

    /// A line worth telling about it, although it works.
    pub fn warning(&self) -> Option<&str> {
        self.backend.warning()
    }

    /// What is behind it.
    pub(super) fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// The first failure of the work queued so far that is known by now.
    pub fn check(&self) -> Result<()> {
        locked(&self.failure).clone().map_or(Ok(()), Err)
    }

    /// Waits for all work, then [`Self::check`].
    pub fn synchronize(&self) -> Result<()> {
        self.keep(|| self.backend.synchronize());
        self.check()
    }

    /// Does `work` unless something failed before; keeps its failure.
    pub fn keep<R>(&self, work: impl FnOnce() -> Result<R>) -> Option<R> {
        let mut failure = locked(&self.failure);
        if failure.is_some() {
            return None;
        }
        match work() {
            Ok(done) => Some(done),
            Err(e) => {
                *failure = Some(e);
                None
            }
        }
    }

    /// `bytes` of memory, each `byte`. Of no size after a failure.
    pub fn memory(&'static self, bytes: usize, byte: u8) -> Memory {
        let memory = self.uninitialised(bytes);
        memory.fill(0, memory.bytes, byte);
        memory
    }

    /// `bytes` of memory with any content. The emulator sets all bits, and its checker reports kernels that read them.
    pub fn uninitialised(&'static self, bytes: usize) -> Memory {
        let address = self.keep(|| self.alloc(bytes.max(1)));
        Memory { gpu: self, address: address.unwrap_or(0), bytes: address.map_or(0, |_| bytes) }
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.allocated.fetch_add(bytes as u64, Ordering::Relaxed);
        self.backend.alloc(bytes)
    }

    /// Bytes that were ever allocated, temporary memory included: what two calls differ by is what the work between them took.
    pub fn allocated(&self) -> u64 {
        self.allocated.load(Ordering::Relaxed)
    }

    /// Encodes a tensor map for this GPU.
    pub fn tensor_map(&self, layout: &TensorLayout) -> Result<TensorMap> {
        self.backend.tensor_map(layout)
    }

    /// # Safety
    /// As for [`Backend::product`].
    pub(super) unsafe fn product(&self, p: &GpuProduct) {
        if p.m > 0 && p.n > 0 {
            trace::piece(|| Piece::Product(p.product, [p.m, p.n, p.k]));
            // SAFETY: passed on.
            self.keep(|| unsafe { self.backend.product(p) });
        }
    }

    /// Temporary memory for `len` elements, with any content, until the next op asks for some.
    pub fn scratch<T>(&self, len: usize) -> MutPtr<T> {
        let bytes = (len * size_of::<T>()).next_multiple_of(256);
        let mut scratch = locked(&self.scratch);
        if scratch.bytes < bytes {
            // Twice the size, so that few pieces are ever outgrown.
            let grown = bytes.max(2 * scratch.bytes);
            if let Some(address) = self.keep(|| self.alloc(grown)) {
                scratch.pieces.push(address);
                scratch.bytes = grown;
            }
        }
        MutPtr::new(scratch.pieces.last().copied().unwrap_or(0))
    }

    /// Makes `key` that of the dropout of the work queued from now on.
    pub fn set_dropout_key(&self, key: [u32; 2]) {
        *locked(&self.key_here) = key;
        if let Some(memory) = self.key.get() {
            memory.write(0, bytemuck::cast_slice(&key));
        }
    }

    /// What kernels need of a dropout. Its key must be the one that was set.
    pub fn dropout(&self, mask: &Dropout) -> super::kernels::Dropout {
        assert!(
            !mask.is_on() || *locked(&self.key_here) == mask.key,
            "dropout of another step than the one that was set"
        );
        super::kernels::Dropout {
            key: ConstPtr::new(self.key.get().map_or(0, Memory::address)),
            threshold: mask.threshold,
            scale: mask.scale() as f32,
        }
    }

    /// Runs `work` while recording what it queues, and gives the record; nothing of it has run then. None after a failure.
    pub fn capture(&self, work: impl FnOnce()) -> Option<Box<dyn Captured>> {
        self.keep(|| self.backend.begin_capture())?;
        work();
        let captured = self.backend.end_capture();
        self.keep(|| captured)
    }

    /// Ends one record and begins the next, inside [`Self::capture`]: the record of the work so far. None after a failure.
    pub fn cut(&self) -> Option<Box<dyn Captured>> {
        self.keep(|| {
            let captured = self.backend.end_capture();
            self.backend.begin_capture()?;
            captured
        })
    }

    /// Queues recorded work.
    pub fn replay(&self, captured: &dyn Captured) {
        trace::piece(|| Piece::Replay);
        self.keep(|| captured.replay());
    }

    /// Marks this point of the queue.
    pub fn event(&self) -> Result<Box<dyn Event>> {
        self.backend.event()
    }
}

impl Launcher for Gpu {
    // SAFETY: what callers owe is written at the trait.
    unsafe fn launch(&self, kernel: &Kernel, shape: Shape, params: &[*const c_void]) -> Result<()> {
        trace::piece(|| Piece::Kernel(kernel.name));
        // SAFETY: passed on.
        unsafe { self.backend.launch(kernel, shape, params) }
    }
}

/// Device memory, given back when dropped.
pub struct Memory {
    gpu: &'static Gpu,
    address: u64,
    bytes: usize,
}

impl Memory {
    /// Whose it is.
    pub fn gpu(&self) -> &'static Gpu {
        self.gpu
    }

    /// Where it begins on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Queues a copy of `from` to the bytes at `offset`.
    pub fn write(&self, offset: usize, from: &[u8]) {
        if self.holds(offset, from.len()) {
            trace::piece(|| Piece::Upload(from.len()));
            // SAFETY: inside this allocation, as just checked.
            self.gpu.keep(|| unsafe { self.gpu.backend.upload(self.address + offset as u64, from) });
        }
    }

    /// Waits for all work and copies the bytes at `offset` out; zeros after a failure.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        let count = to.len();
        trace::piece(|| Piece::Download(count));
        // SAFETY: called only for bytes inside this allocation.
        let mut read = || unsafe { self.gpu.backend.download(self.address + offset as u64, to) };
        if !self.holds(offset, count) || self.gpu.keep(&mut read).is_none() {
            to.fill(0);
        }
    }

    /// Queues a copy of a few bytes at `offset` for [`Self::end_read`].
    pub fn begin_read(&self, offset: usize, count: usize) {
        if self.holds(offset, count) {
            trace::piece(|| Piece::Download(count));
            // SAFETY: inside this allocation, as just checked.
            self.gpu.keep(|| unsafe { self.gpu.backend.begin_download(self.address + offset as u64, count) });
        }
    }

    /// Copies out what [`Self::begin_read`] was called for with the same bytes, after the work that was queued before that; zeros after
    /// a failure.
    pub fn end_read(&self, offset: usize, to: &mut [u8]) {
        let count = to.len();
        // SAFETY: called only for bytes inside this allocation.
        let mut read = || unsafe { self.gpu.backend.end_download(self.address + offset as u64, to) };
        if !self.holds(offset, count) || self.gpu.keep(&mut read).is_none() {
            to.fill(0);
        }
    }

    /// Queues setting `count` bytes at `offset` to `byte`.
    pub fn fill(&self, offset: usize, count: usize, byte: u8) {
        if self.holds(offset, count) {
            trace::piece(|| Piece::Fill(count));
            // SAFETY: inside this allocation, as just checked.
            self.gpu.keep(|| unsafe { self.gpu.backend.fill(self.address + offset as u64, count, byte) });
        }
    }

    /// Whether there is something to do at these bytes. Beyond the end is a bug, unless a failure left no memory at all.
    fn holds(&self, offset: usize, count: usize) -> bool {
        assert!(
            self.address == 0 || offset + count <= self.bytes,
            "{count} bytes at {offset} of a buffer of {} bytes",
            self.bytes
        );
        self.address != 0 && count > 0
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.address != 0 {
            // SAFETY: allocated by this backend, and given back here alone.
            unsafe { self.gpu.backend.free(self.address) };
        }
    }
}
