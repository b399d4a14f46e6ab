//! Matrix products by cuBLASLt.
//!
//! Which algorithm computes a product is found once for each kind of product and GPU (`tuning`) and remembered on disk
//! (`algorithms`), so that the same command gives the same bits in every process.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::algorithms::Algorithms;
use super::descriptors::check;
use super::driver;
use super::operation::{Algorithm, Key, Library, Operation, Told};
use super::queue::Queue;
use super::tuning::Tuner;
use crate::device::Product;
use crate::device::gpu::{Facts, GpuProduct};
use crate::error::{Error, Result};

/// Bytes of zeros for products whose sums are empty.
const ZEROS: usize = 1 << 20;

/// Length of the sums over [`ZEROS`] that stand for empty ones: rows of it are aligned to 16 bytes.
const EMPTY: usize = 8;

/// Products on one GPU.
pub struct Products {
    queue: Arc<Queue>,
    library: Library,
    zeros: u64,
    plans: Mutex<Plans>,
}

/// The kinds of product met so far.
struct Plans {
    all: HashMap<Key, Plan>,
    tuner: Tuner,
}

struct Plan {
    operation: Operation,
    algorithm: Algorithm,
}

impl Products {
    /// Opens the library, with its memory.
    pub fn new(
        queue: Arc<Queue>,
        facts: &Facts,
        algorithms: Algorithms,
        alloc: impl Fn(usize) -> Result<u64>,
    ) -> Result<Self> {
        let library = Library::new(queue.clone(), facts, &alloc)?;
        let zeros = alloc(ZEROS)?;
        // SAFETY: just allocated.
        unsafe { queue.fill(zeros, ZEROS, 0) }?;
        let plans = Mutex::new(Plans { all: HashMap::new(), tuner: Tuner::new(queue.clone(), algorithms) });
        Ok(Products { queue, library, zeros, plans })
    }

    fn plans(&self) -> MutexGuard<'_, Plans> {
        self.plans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes durable which algorithms were found. Results may leave the GPU only behind this: whoever repeats the work then gets their
    /// bits, also after a crash.
    pub fn settle(&self) {
        self.plans().tuner.settle();
    }

    /// Queues a product.
    ///
    /// # Safety
    /// As for [`crate::device::gpu::Backend::product`].
    pub unsafe fn queue(&self, p: &GpuProduct) -> Result<()> {
        if p.k > 0 {
            // SAFETY: passed on.
            return unsafe { self.multiply(p) };
        }
        if p.bias.is_none() {
            // SAFETY: passed on.
            return if p.add { Ok(()) } else { unsafe { self.clear(p) } };
        }
        let mut p = *p;
        let elements = ZEROS / p.a.dtype.size() / EMPTY;
        if p.m.max(p.n) > elements {
            let cause = format!("an empty sum of more than {elements} rows or columns: {}", Told(&p));
            return Err(Error::device(cause).remedy("report this as a defect"));
        }
        p.product = Product::NT;
        p.k = EMPTY;
        for operand in [&mut p.a, &mut p.b] {
            (operand.address, operand.stride) = (self.zeros, EMPTY);
        }
        // SAFETY: the zeros are long enough, as just checked; the rest is passed on.
        unsafe { self.multiply(&p) }
    }

    /// Queues zeros in place of a product.
    ///
    /// # Safety
    /// The output lies inside one allocation.
    unsafe fn clear(&self, p: &GpuProduct) -> Result<()> {
        use cudarc::driver::sys;
        let stream = self.queue.enter()?;
        let size = p.c.dtype.size();
        // SAFETY: passed on.
        let code = unsafe { sys::cuMemsetD2D8Async(p.c.address, p.c.stride * size, 0, p.n * size, p.m, stream) };
        driver::check(code, &"filling a matrix")?;
        self.queue.queued(&"filling a matrix")
    }

    /// # Safety
    /// As for [`Self::queue`].
    unsafe fn multiply(&self, p: &GpuProduct) -> Result<()> {
        let mut plans = self.plans();
        let Plans { all, tuner } = &mut *plans;
        let plan = match all.entry(Key::of(p)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => {
                let operation = Operation::of(p)?;
                // SAFETY: passed on.
                let algorithm = unsafe { tuner.choose(&self.library, &operation, p) }?;
                free.insert(Plan { operation, algorithm })
            }
        };
        // SAFETY: passed on.
        let status = unsafe { plan.operation.start(&self.library, p, p.c.address, &plan.algorithm) }?;
        check(status, &Told(p))?;
        self.queue.queued(&Told(p))
    }
}
