//! [`Backend`] over the NVIDIA driver and cuBLASLt. The only user of cudarc, of whose levels it takes the lowest: functions of C.
//!
//! | file | what |
//! | --- | --- |
//! | `driver` | is there a driver, which GPU, failures in words |
//! | `library` | where cuBLASLt is |
//! | `queue` | context, stream, events, captures |
//! | `staging` | copies through locked pages |
//! | `modules` | kernels: PTX to functions, launches |
//! | `products` | matrix products |
//! | `operation`, `descriptors` | what cuBLASLt is told and asked of them |
//! | `tuning`, `algorithms` | which of its algorithms is fastest, and the file that remembers it |
//! | `nccl` | GPUs of several processes |
//! | `tensor_map` | what TMA must know of a matrix |
//!
//! cudarc loads both libraries when they are first used and panics when something is missing. So everything is looked for before: a
//! missing driver, library or function, or one that is too old, is one line with what to do.

mod algorithms;
mod descriptors;
mod driver;
mod library;
mod modules;
mod nccl;
mod operation;
mod products;
mod queue;
mod staging;
mod tensor_map;
mod tuning;

use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{self, CUresult};

use super::gpu::{Backend, Captured, Event, Facts, GpuProduct};
use super::kernels::{MODULES, NVCC_MISSING};
use super::launch::{Kernel, Shape, TensorLayout, TensorMap};
use super::recorded::Work;
use super::{Finding, gpu};
use crate::error::{Error, Result};
use algorithms::{Algorithms, Owner};
use modules::Modules;
use products::Products;
use queue::Queue;
use staging::Staging;

/// Whether there is an NVIDIA driver.
pub(super) fn has_driver() -> bool {
    driver::is_present()
}

/// The error of a build without PTX.
fn no_kernels() -> Error {
    let told = NVCC_MISSING.unwrap_or("this build has no kernels for the GPU; build again with nvcc");
    let (cause, remedy) = told.split_once("; ").unwrap_or((told, ""));
    Error::device(cause).remedy(remedy)
}

/// A GPU behind the NVIDIA driver.
pub(super) struct CudaBackend {
    inner: Arc<Inner>,
    recording: Mutex<Recording>,
    warning: Option<String>,
}

struct Inner {
    facts: Facts,
    queue: Arc<Queue>,
    modules: Modules,
    products: Products,
    staging: Mutex<Staging>,
}

/// Whether a capture is open, and who records.
enum Recording {
    No,
    /// The driver. Memory that was given back meanwhile waits for the end.
    Driver {
        freed: Vec<u64>,
    },
    /// A list, so that a replay, too, can wait for every piece of work and name the one that fails.
    List {
        work: Vec<Work>,
        freed: Vec<u64>,
    },
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CudaBackend {
    /// The GPU of this number among those that are visible.
    pub(super) fn new(ordinal: usize) -> Result<Self> {
        driver::guarded(|| Self::open(ordinal))
    }

    fn open(ordinal: usize) -> Result<Self> {
        if MODULES.iter().any(|module| module.ptx_sm80.is_none()) {
            return Err(no_kernels());
        }
        let version = driver::load()?;
        // A launcher may let each process see its own GPU only.
        let narrowed = std::env::var_os("CUDA_VISIBLE_DEVICES").is_some() && driver::count()? == 1;
        let (device, mut facts) = driver::gpu(if narrowed { 0 } else { ordinal }, version)?;
        let library = library::load(version)?;
        facts.software = format!("{}, cuBLASLt {}", facts.software, library::in_words(library));
        let (algorithms, warning) = Algorithms::open(Owner::new(&facts, library), &|name| std::env::var_os(name))?;
        let queue = Arc::new(Queue::new(device)?);
        let products = Products::new(queue.clone(), &facts, algorithms, |bytes| alloc(&queue, bytes, &facts))?;
        let staging = Mutex::new(Staging::new(queue.clone()));
        let inner = Inner { modules: Modules::new(&facts), facts, queue, products, staging };
        Ok(CudaBackend { inner: Arc::new(inner), recording: Mutex::new(Recording::No), warning })
    }

    /// Refuses what would wait for work that is being recorded, or slip past the record.
    fn not_recording(&self, what: &str) -> Result<()> {
        match *locked(&self.recording) {
            Recording::No => Ok(()),
            _ => Err(Error::device(format!("{what} while a capture is open")).remedy("report this as a defect")),
        }
    }

    /// Puts work on the list that is being recorded, or does it.
    fn queue(&self, work: Work) -> Result<()> {
        match &mut *locked(&self.recording) {
            Recording::List { work: list, .. } => list.push(work),
            _ => return self.inner.perform(&work),
        }
        Ok(())
    }
}

/// Plain `cuMemAlloc`: memory is taken in few large pieces that stay for the whole run, and an allocation or a release that waits for
/// the device costs nothing then. The driver's pools would keep released memory from other processes.
fn alloc(queue: &Queue, bytes: usize, facts: &Facts) -> Result<u64> {
    queue.enter()?;
    let mut address = 0;
    // SAFETY: the context is current; writes the address.
    let code = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) };
    if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        let (mut free, mut all) = (0, 0);
        // SAFETY: writes both numbers; when it fails they stay 0.
        let _ = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut all) };
        return Err(gpu::out_of_memory(bytes, free as u64, facts));
    }
    driver::check(code, &format_args!("allocating {bytes} bytes")).map(|()| address)
}

impl Inner {
    /// Queues work.
    fn perform(&self, work: &Work) -> Result<()> {
        match work {
            Work::Launch { kernel, shape, params } => {
                // SAFETY: the values were copied from a launch that its caller vouched for.
                unsafe { self.launch(kernel, *shape, &params.pointers()) }
            }
            Work::Fill { at, bytes, byte } => {
                // SAFETY: the caller of `fill` vouched for the range.
                unsafe { self.queue.fill(*at, *bytes, *byte) }
            }
            Work::Product(p) => {
                // SAFETY: the caller of `product` vouched for the operands.
                unsafe { self.products.queue(p) }
            }
        }
    }

    /// # Safety
    /// As for [`Backend::launch`].
    unsafe fn launch(&self, kernel: &Kernel, shape: Shape, params: &[*const c_void]) -> Result<()> {
        // SAFETY: passed on.
        unsafe { self.modules.launch(&self.queue, kernel, shape, params) }
    }

    /// # Safety
    /// As for [`Backend::free`].
    unsafe fn free(&self, address: u64) {
        // Work that uses the memory may still be queued. If the queue has failed nothing runs any more.
        let _ = self.queue.wait(&"giving memory back");
        // SAFETY: passed on.
        let _ = unsafe { sys::cuMemFree_v2(address) };
    }
}

impl Backend for CudaBackend {
    fn facts(&self) -> &Facts {
        &self.inner.facts
    }

    fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.not_recording("an allocation")?;
        alloc(&self.inner.queue, bytes, &self.inner.facts)
    }

    // SAFETY: what callers owe is written at the trait.
    unsafe fn free(&self, address: u64) {
        match &mut *locked(&self.recording) {
            // SAFETY: passed on.
            Recording::No => unsafe { self.inner.free(address) },
            Recording::Driver { freed } | Recording::List { freed, .. } => freed.push(address),
        }
    }

    // SAFETY: what callers owe is written at the trait.
    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<()> {
        self.not_recording("a copy")?;
        // SAFETY: passed on.
        unsafe { locked(&self.inner.staging).upload(to, from) }
    }

    // SAFETY: what callers owe is written at the trait.
    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.not_recording("a copy")?;
        self.inner.products.settle();
        // SAFETY: passed on.
        unsafe { locked(&self.inner.staging).download(from, to) }
    }

    // SAFETY: what callers owe is written at the trait.
    unsafe fn begin_download(&self, from: u64, bytes: usize) -> Result<()> {
        self.not_recording("a copy")?;
        // SAFETY: passed on.
        unsafe { locked(&self.inner.staging).begin_download(from, bytes) }
    }

    // SAFETY: what callers owe is written at the trait.
    unsafe fn end_download(&self, _from: u64, to: &mut [u8]) -> Result<()> {
        self.inner.products.settle();
        locked(&self.inner.staging).end_download(to)
    }

    // SAFETY: what callers owe is written at the trait.
    unsafe fn fill(&self, at: u64, bytes: usize, byte: u8) -> Result<()> {
        self.queue(Work::Fill { at, bytes, byte })
    }

    // SAFETY: what callers owe is written at the trait.
    unsafe fn launch(&self, kernel: &Kernel, shape: Shape, params: &[*const c_void]) -> Result<()> {
        if !matches!(*locked(&self.recording), Recording::List { .. }) {
            // SAFETY: passed on.
            return unsafe { self.inner.launch(kernel, shape, params) };
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
        *locked(&self.recording) = if self.inner.queue.synchronous {
            Recording::List { work: Vec::new(), freed: Vec::new() }
        } else {
            queue::begin_capture(&self.inner.queue)?;
            Recording::Driver { freed: Vec::new() }
        };
        Ok(())
    }

    fn end_capture(&self) -> Result<Box<dyn Captured>> {
        let recording = std::mem::replace(&mut *locked(&self.recording), Recording::No);
        let (captured, freed): (Result<Box<dyn Captured>>, _) = match recording {
            Recording::No => {
                let cause = "the end of a capture that was not begun";
                (Err(Error::device(cause).remedy("report this as a defect")), Vec::new())
            }
            Recording::Driver { freed } => {
                (queue::end_capture(&self.inner.queue).map(|graph| Box::new(graph) as Box<dyn Captured>), freed)
            }
            Recording::List { work, freed } => (Ok(Box::new(List { inner: self.inner.clone(), work })), freed),
        };
        for address in freed {
            // SAFETY: given back once by who had it, and kept back until now.
            unsafe { self.inner.free(address) };
        }
        captured
    }

    fn tensor_map(&self, layout: &TensorLayout) -> Result<TensorMap> {
        self.inner.queue.enter()?;
        tensor_map::encode(layout)
    }

    fn event(&self) -> Result<Box<dyn Event>> {
        self.not_recording("an event")?;
        let event = self.inner.queue.event()?;
        event.record()?;
        Ok(Box::new(event))
    }

    fn synchronize(&self) -> Result<()> {
        self.not_recording("a wait")?;
        self.inner.products.settle();
        self.inner.queue.wait(&"waiting for the GPU")
    }

    fn can_ring(&self) -> Result<()> {
        nccl::is_possible()
    }

    fn ring_id(&self) -> Result<Vec<u8>> {
        nccl::id()
    }

    fn ring(&self, id: &[u8], rank: usize, size: usize) -> Result<Box<dyn super::ring::Side>> {
        self.not_recording("connecting GPUs")?;
        Ok(Box::new(nccl::Ranks::new(&self.inner.queue, id, rank, size)?))
    }
}

/// A record that is a list.
struct List {
    inner: Arc<Inner>,
    work: Vec<Work>,
}

impl Captured for List {
    fn replay(&self) -> Result<()> {
        self.work.iter().try_for_each(|work| self.inner.perform(work))
    }
}

/// What `--device cuda` needs, and what of it is there.
pub(super) fn findings() -> Vec<Finding> {
    let missing = |what, e: &Error| Finding { what, good: false, found: e.cause().into(), meaning: e.advice().into() };
    let found = |what, found: String, meaning: &str| Finding { what, good: true, found, meaning: meaning.into() };
    let driver = driver::guarded(driver::load);
    let version = driver.as_ref().ok().copied();
    let mut gpu_found = None;
    let mut list = vec![match driver {
        Ok(version) => {
            let told = format!("CUDA {}", driver::cuda_version(version));
            found("CUDA driver", told, "--device cuda finds the GPU through it")
        }
        Err(e) => missing("CUDA driver", &e),
    }];
    if let Some(version) = version {
        let gpu = driver::guarded(|| Ok((driver::gpu(0, version)?.1, driver::count()?)));
        list.push(match gpu {
            Ok((facts, count)) => {
                let ((major, minor), gib) = (facts.capability, facts.memory as f64 / f64::from(1 << 30));
                let (name, units) = (&facts.name, facts.multiprocessors);
                let others = if count > 1 { format!(", the first of {count}") } else { String::new() };
                let told = format!(
                    "{name}, compute capability {major}.{minor}, {units} multiprocessors, {gib:.1} GiB{others}"
                );
                gpu_found = Some(facts);
                found("GPU", told, "what --device cuda uses; CUDA_VISIBLE_DEVICES chooses among several")
            }
            Err(e) => missing("GPU", &e),
        });
    }
    // Without a driver there is none to suit; the newest is what one would install.
    let library = driver::guarded(|| library::load(version.unwrap_or(u32::MAX)));
    list.push(match &library {
        Ok(version) => found("cuBLASLt", library::in_words(*version), "matrix products on the GPU"),
        Err(e) => missing("cuBLASLt", e),
    });
    if let (Some(facts), Ok(library)) = (gpu_found, library) {
        list.push(algorithms_found(&Owner::new(&facts, library)));
    }
    list.push(match nccl::is_possible() {
        Ok(()) => found("NCCL", "libnccl.so.2".into(), "connects the GPUs of train --gpus"),
        Err(e) => missing("NCCL", &e),
    });
    list.push(match NVCC_MISSING {
        None => found(
            "GPU kernels",
            "for compute capability 8.0 to 8.9 and 9.0, and as PTX for newer ones".into(),
            "PTX is compiled by the driver for its GPU when it is first used, and the result is kept",
        ),
        Some(_) => missing("GPU kernels", &no_kernels()),
    });
    list
}

/// The file of algorithms, and what is in it.
fn algorithms_found(owner: &Owner) -> Finding {
    let variable = |name: &str| std::env::var_os(name);
    let meaning = format!(
        "the fastest algorithms of cuBLASLt found so far; {} moves them, {}=never does without",
        algorithms::FOLDER,
        algorithms::MODE
    );
    let (good, found) = match algorithms::look(owner, &variable) {
        Some((path, Ok(count))) => (true, format!("{count} kinds of product in {}", path.display())),
        Some((_, Err(e))) => (false, e.to_string()),
        None => (false, "no folder to remember them in".into()),
    };
    Finding { what: "algorithms", good, found, meaning }
}
