//! Queued work as a list: how the emulator captures, and how the driver's backend does when every piece of work is to be waited for.

use std::ffi::c_void;

use super::gpu::GpuProduct;
use super::kernels::KERNELS;
use super::launch::{Kernel, Shape};
use crate::error::{Error, Result};

/// One queued piece of work.
pub(super) enum Work {
    /// A kernel with its parameters.
    Launch { kernel: &'static Kernel, shape: Shape, params: Params },
    /// Bytes to be set.
    Fill { at: u64, bytes: usize, byte: u8 },
    /// A matrix product.
    Product(GpuProduct),
}

/// Values of a kernel's parameters.
pub(super) struct Params(Vec<Vec<u64>>);

impl Params {
    /// Pointers to the values, as a launch takes them.
    pub(super) fn pointers(&self) -> Vec<*const c_void> {
        self.0.iter().map(|value| value.as_ptr().cast()).collect()
    }
}

impl Work {
    /// A launch with a copy of its parameters.
    ///
    /// # Safety
    /// As for [`super::launch::Launcher::launch`].
    pub(super) unsafe fn launch(kernel: &Kernel, shape: Shape, params: &[*const c_void]) -> Result<Work> {
        let Some(kernel) = KERNELS.iter().find(|k| std::ptr::eq(*k, kernel)) else {
            return Err(Error::device(format!("kernel {} cannot be captured", kernel.name)).remedy("launch it at once"));
        };
        let values = params.iter().zip(kernel.param_sizes).map(|(&from, &size)| {
            let mut value = vec![0u64; (size as usize).div_ceil(8)];
            // SAFETY: the caller vouches for parameters of the kernel's sizes; `value` has room for one.
            unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), value.as_mut_ptr().cast(), size as usize) };
            value
        });
        Ok(Work::Launch { kernel, shape, params: Params(values.collect()) })
    }
}
