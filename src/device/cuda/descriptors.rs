//! cuBLASLt's descriptors of a product, each made, set and destroyed, and its failures in words.

use std::fmt::Display;

use cudarc::cublaslt::sys::{
    self, cublasComputeType_t as Compute, cublasLtMatmulDescAttributes_t as Attribute,
    cublasLtMatmulPreferenceAttributes_t as Preferred, cublasStatus_t as Status, cudaDataType_t as Type,
};

use super::driver;
use crate::error::{Error, Result};

/// The result of a function of cuBLASLt as ours; `what` says what was being done.
pub fn check(status: Status, what: &dyn Display) -> Result<()> {
    if status == Status::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    // It keeps to itself which work has failed before it.
    Err(Error::device(format!("{what}: {status:?}")).remedy(driver::SYNCHRONISE))
}

/// What is computed.
pub struct Description(pub sys::cublasLtMatmulDesc_t);
/// How a matrix lies in memory.
pub struct Layout(pub sys::cublasLtMatrixLayout_t);
/// What an algorithm may use.
pub struct Preference(pub sys::cublasLtMatmulPreference_t);

// SAFETY: descriptors are plain memory of the library, which any thread may use, one at a time: they stay behind the lock of the plans.
unsafe impl Send for Description {}
// SAFETY: as above.
unsafe impl Send for Layout {}

impl Description {
    /// Sums in f32, without rounding the operands to TF32 first.
    pub fn new() -> Result<Self> {
        let mut made = std::ptr::null_mut();
        // SAFETY: writes the handle.
        let status =
            unsafe { sys::cublasLtMatmulDescCreate(&raw mut made, Compute::CUBLAS_COMPUTE_32F, Type::CUDA_R_32F) };
        check(status, &"describing a product").map(|()| Description(made))
    }

    pub fn set<T>(&self, attribute: Attribute, value: &T) -> Result<()> {
        // SAFETY: the description is alive; copies the value, and refuses one of the wrong size.
        let status = unsafe {
            sys::cublasLtMatmulDescSetAttribute(self.0, attribute, (&raw const *value).cast(), size_of::<T>())
        };
        check(status, &"describing a product")
    }
}

impl Layout {
    pub fn new(dtype: Type, (rows, columns): (usize, usize), stride: usize) -> Result<Self> {
        let mut made = std::ptr::null_mut();
        // A single column has no next one, and callers any stride for it.
        let stride = stride.max(rows) as i64;
        // SAFETY: writes the handle.
        let status =
            unsafe { sys::cublasLtMatrixLayoutCreate(&raw mut made, dtype, rows as u64, columns as u64, stride) };
        check(status, &"describing a matrix").map(|()| Layout(made))
    }
}

impl Preference {
    pub fn new() -> Result<Self> {
        let mut made = std::ptr::null_mut();
        // SAFETY: writes the handle.
        check(unsafe { sys::cublasLtMatmulPreferenceCreate(&raw mut made) }, &"choosing an algorithm")?;
        Ok(Preference(made))
    }

    pub fn set<T>(&self, attribute: Preferred, value: &T) -> Result<()> {
        // SAFETY: the preference is alive; copies the value, and refuses one of the wrong size.
        let status = unsafe {
            sys::cublasLtMatmulPreferenceSetAttribute(self.0, attribute, (&raw const *value).cast(), size_of::<T>())
        };
        check(status, &"choosing an algorithm")
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { sys::cublasLtMatmulDescDestroy(self.0) };
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { sys::cublasLtMatrixLayoutDestroy(self.0) };
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}
