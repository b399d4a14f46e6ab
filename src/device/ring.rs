//! GPUs of several processes that work together on tensors, where the device can connect them.

use super::gpu::Gpu;
use super::{DType, Tensor};
use crate::error::{Error, Result};

/// What GPUs of several processes do together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Together {
    /// Everywhere the sum of all.
    AllReduce,
    /// Everywhere the parts of all.
    AllGather,
    /// The sum of each part at its rank.
    ReduceScatter,
    /// Everywhere what rank 0 has.
    Broadcast,
}

impl Together {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Together::AllReduce => "a sum over ranks",
            Together::AllGather => "a gathering of ranks",
            Together::ReduceScatter => "a scattered sum over ranks",
            Together::Broadcast => "a copy to all ranks",
        }
    }
}

/// What a backend has of GPUs of several processes: the side of one.
pub trait Side: Send + Sync {
    /// Queues work on `elements` elements from `at` on, in place; where every rank has a part, they follow each other.
    ///
    /// # Safety
    /// The elements belong to one allocation.
    unsafe fn run(&self, what: Together, at: u64, elements: usize, dtype: DType) -> Result<()>;

    /// Begins a sum over ranks behind the work queued so far; work queued later runs beside it.
    ///
    /// # Safety
    /// The elements belong to one allocation, and no work touches them that is queued between this and [`Self::finish`].
    unsafe fn begin_sum(&self, at: u64, elements: usize, dtype: DType) -> Result<()>;

    /// Puts work queued from now on behind all sums that were begun.
    fn finish(&self) -> Result<()>;
}

/// The GPUs of all ranks, from this one's side. Work is queued like any other.
pub struct Ring {
    gpu: &'static Gpu,
    inner: Box<dyn Side>,
    size: usize,
}

impl Ring {
    /// Whether GPUs can be connected here.
    ///
    /// # Errors
    /// Why not.
    pub fn is_possible(gpu: &Gpu) -> Result<()> {
        gpu.backend().can_ring()
    }

    /// What rank 0 must give to all ranks.
    ///
    /// # Errors
    /// A failure of the library.
    pub fn id(gpu: &Gpu) -> Result<Vec<u8>> {
        gpu.backend().ring_id()
    }

    /// Connects rank `rank` of `size`; returns when all have come.
    ///
    /// # Errors
    /// A failure of the library.
    pub fn new(gpu: &'static Gpu, id: &[u8], rank: usize, size: usize) -> Result<Ring> {
        Ok(Ring { gpu, inner: gpu.backend().ring(id, rank, size)?, size })
    }

    /// Does `what` on `all` in place: sums everything, gathers every rank's part, sums every part at its rank, or copies rank 0's.
    ///
    /// # Errors
    /// A failure of the GPU or of the library.
    pub fn run(&self, what: Together, all: &Tensor) -> Result<()> {
        self.takes(what, all)?;
        // SAFETY: the range is that of the tensor, which lies in one allocation.
        unsafe { self.inner.run(what, all.address(), all.len(), all.dtype()) }
    }

    fn takes(&self, what: Together, all: &Tensor) -> Result<()> {
        let parts = matches!(what, Together::AllGather | Together::ReduceScatter);
        if !all.device().is_gpu() || (parts && !all.len().is_multiple_of(self.size)) || all.dtype() == DType::U16 {
            return Err(Error::device(format!("{} of such a tensor", what.name())).remedy("report this as a defect"));
        }
        self.gpu.check()
    }

    /// Begins to sum `all` over all ranks, in place, behind the work queued so far. Work queued later runs beside the sum, and must leave
    /// `all` alone until [`Self::finish`].
    ///
    /// # Errors
    /// A failure of the GPU or of the library.
    pub fn begin_sum(&self, all: &Tensor) -> Result<()> {
        self.takes(Together::AllReduce, all)?;
        // SAFETY: the range is that of the tensor, which lies in one allocation; a tensor of a GPU is reached by queued work alone, and
        // who queues work between the two was told to leave this one out.
        unsafe { self.inner.begin_sum(all.address(), all.len(), all.dtype()) }
    }

    /// Puts work queued from now on behind all sums that were begun.
    ///
    /// # Errors
    /// A failure of the GPU.
    pub fn finish(&self) -> Result<()> {
        self.inner.finish()
    }
}
