//! Matrix products by cuBLASLt.
//!
//! It thinks in columns: a row-major matrix is to it the transposed one, so `c = a · b` is asked for as `cᵀ = bᵀ · aᵀ`, with the operands
//! swapped and nothing copied. Which algorithm computes a product is the library's first proposal, remembered for each kind of product.
//! It is never measured: the same command gives the same bits in every process.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::sys::{
    self, cublasComputeType_t as Compute, cublasLtEpilogue_t as Epilogue, cublasLtMatmulDescAttributes_t as Attribute,
    cublasLtMatmulPreferenceAttributes_t as Preferred, cublasStatus_t as Status, cudaDataType_t as Type,
};

use super::driver;
use super::queue::{Handle, Queue};
use crate::device::gpu::{Facts, GpuProduct};
use crate::device::{DType, Product};
use crate::error::{Error, Result};

/// Bytes of zeros for products whose sums are empty.
const ZEROS: usize = 1 << 20;

/// Length of the sums over [`ZEROS`] that stand for empty ones: rows of it are aligned to 16 bytes.
const EMPTY: usize = 8;

/// `CUBLAS_OP_N` and `CUBLAS_OP_T`, which the bindings leave out.
const PLAIN: i32 = 0;
const TRANSPOSED: i32 = 1;

/// cuBLASLt on one GPU.
pub struct Products {
    queue: Arc<Queue>,
    library: Handle<sys::cublasLtHandle_t>,
    /// Address of the memory that algorithms may use; one is enough, products run one after another.
    workspace: u64,
    workspace_bytes: usize,
    zeros: u64,
    plans: Mutex<HashMap<Key, Plan>>,
}

/// What the choice of an algorithm may depend on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    product: Product,
    sizes: [usize; 3],
    strides: [usize; 3],
    dtypes: [DType; 2],
    add: bool,
    bias: bool,
    /// Of the addresses of a, b, c and the bias.
    alignments: [u32; 4],
}

impl Key {
    fn of(p: &GpuProduct) -> Key {
        let alignment = |address: u64| 1 << address.trailing_zeros().min(8);
        Key {
            product: p.product,
            sizes: [p.m, p.n, p.k],
            strides: [p.a.stride, p.b.stride, p.c.stride],
            dtypes: [p.a.dtype, p.c.dtype],
            add: p.add,
            bias: p.bias.is_some(),
            alignments: [p.a.address, p.b.address, p.c.address, p.bias.unwrap_or(0)].map(alignment),
        }
    }
}

/// A product in words, put together only when it is told.
struct Told<'a>(&'a GpuProduct);

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let p = self.0;
        let (m, n, k) = (p.m, p.n, p.k);
        let sets = if p.add { "+=" } else { "=" };
        let (a, b) = match p.product {
            Product::NT => (format!("a [{m}, {k}]"), format!("b [{n}, {k}]ᵀ")),
            Product::NN => (format!("a [{m}, {k}]"), format!("b [{k}, {n}]")),
            Product::TN => (format!("a [{k}, {m}]ᵀ"), format!("b [{k}, {n}]")),
        };
        let (x, c) = (p.a.dtype, p.c.dtype);
        write!(f, "product c [{m}, {n}] {c:?} {sets} {a} {x:?} · {b} {:?}", p.b.dtype)?;
        if p.bias.is_some() {
            f.write_str(" + bias")?;
        }
        write!(f, ", strides {}, {}, {}", p.a.stride, p.b.stride, p.c.stride)
    }
}

/// What cuBLASLt needs to run one kind of product. Its first operand is our right one.
struct Plan {
    description: Description,
    first: Layout,
    second: Layout,
    output: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Products {
    /// Opens the library, with its memory.
    pub fn new(queue: Arc<Queue>, facts: &Facts, alloc: impl Fn(usize) -> Result<u64>) -> Result<Self> {
        queue.enter()?;
        let mut library = std::ptr::null_mut();
        // SAFETY: the context is current; writes the handle.
        check(unsafe { sys::cublasLtCreate(&raw mut library) }, &"opening cuBLASLt")
            .map_err(|e| e.remedy("free memory of the GPU, or install a cuBLASLt that goes with the driver"))?;
        // What NVIDIA recommends for Hopper is 32 MiB; its kernels that split long sums profit from more.
        let workspace_bytes = if facts.capability >= (9, 0) { 64 << 20 } else { 32 << 20 };
        let (workspace, zeros) = (alloc(workspace_bytes)?, alloc(ZEROS)?);
        // SAFETY: just allocated.
        unsafe { queue.fill(zeros, ZEROS, 0) }?;
        Ok(Products { queue, library: Handle(library), workspace, workspace_bytes, zeros, plans: Mutex::default() })
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
        let stream = self.queue.enter()?;
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry(Key::of(p)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => free.insert(self.plan(p)?),
        };
        if let Some(bias) = p.bias {
            plan.description.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        let (one, beta) = (1f32, if p.add { 1f32 } else { 0f32 });
        let at = |address: u64| std::ptr::with_exposed_provenance_mut::<c_void>(address as usize);
        // SAFETY: the plan's descriptors are alive and describe these operands, which the caller vouches for; both factors are f32 on
        // the host, as the description says; the workspace is used by this queue alone.
        let status = unsafe {
            sys::cublasLtMatmul(
                self.library.0,
                plan.description.0,
                (&raw const one).cast(),
                at(p.b.address),
                plan.first.0,
                at(p.a.address),
                plan.second.0,
                (&raw const beta).cast(),
                at(p.c.address),
                plan.output.0,
                at(p.c.address),
                plan.output.0,
                &raw const plan.algorithm,
                at(self.workspace),
                self.workspace_bytes,
                stream.cast(),
            )
        };
        check(status, &Told(p))?;
        self.queue.queued(&Told(p))
    }

    /// Describes a kind of product and asks for its algorithm.
    fn plan(&self, p: &GpuProduct) -> Result<Plan> {
        let input = data_type(p.a.dtype).filter(|_| p.a.dtype == p.b.dtype);
        let (Some(input), Some(output)) = (input, data_type(p.c.dtype)) else { return Err(no_algorithm(p)) };
        // Rows in memory of each operand are its columns here.
        let (m, n, k) = (p.m, p.n, p.k);
        let ((first, b_shape), (second, a_shape)) = match p.product {
            Product::NT => ((TRANSPOSED, (k, n)), (PLAIN, (k, m))),
            Product::NN => ((PLAIN, (n, k)), (PLAIN, (k, m))),
            Product::TN => ((PLAIN, (n, k)), (TRANSPOSED, (m, k))),
        };
        let description = Description::new()?;
        description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &first)?;
        description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &second)?;
        if let Some(bias) = p.bias {
            // A column of this view, a row of ours, gets one element of the bias in each place.
            description.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &Epilogue::CUBLASLT_EPILOGUE_BIAS)?;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &output)?;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        let first = Layout::new(input, b_shape, p.b.stride)?;
        let second = Layout::new(input, a_shape, p.a.stride)?;
        let output = Layout::new(output, (n, m), p.c.stride)?;
        let preference = Preference::new()?;
        preference.set(Preferred::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(self.workspace_bytes as u64))?;
        // Parts of a split sum are added in f32 and in a fixed order; the other schemes round them to the output's type.
        let scheme = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
        preference.set(Preferred::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &scheme)?;
        let [a, b, c, _] = Key::of(p).alignments;
        preference.set(Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &b)?;
        preference.set(Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &a)?;
        preference.set(Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &c)?;
        preference.set(Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &c)?;
        let algorithm = {
            let mut proposal = sys::cublasLtMatmulHeuristicResult_t {
                algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
                workspaceSize: 0,
                state: Status::CUBLAS_STATUS_NOT_SUPPORTED,
                wavesCount: 0.0,
                reserved: [0; 4],
            };
            let mut count = 0;
            // SAFETY: all descriptors are alive; writes at most one proposal, and their number.
            let status = unsafe {
                sys::cublasLtMatmulAlgoGetHeuristic(
                    self.library.0,
                    description.0,
                    first.0,
                    second.0,
                    output.0,
                    output.0,
                    preference.0,
                    1,
                    &raw mut proposal,
                    &raw mut count,
                )
            };
            match status {
                Status::CUBLAS_STATUS_NOT_SUPPORTED => return Err(no_algorithm(p)),
                status => check(status, &Told(p))?,
            }
            if count < 1 || proposal.state != Status::CUBLAS_STATUS_SUCCESS {
                return Err(no_algorithm(p));
            }
            proposal.algo
        };
        Ok(Plan { description, first, second, output, algorithm })
    }
}

fn data_type(dtype: DType) -> Option<Type> {
    match dtype {
        DType::F32 => Some(Type::CUDA_R_32F),
        DType::BF16 => Some(Type::CUDA_R_16BF),
        _ => None,
    }
}

fn no_algorithm(p: &GpuProduct) -> Error {
    Error::device(format!("cuBLASLt has no algorithm for the {}", Told(p)))
        .remedy("install a newer cuBLASLt (pip install -U nvidia-cublas), or use another --precision")
}

/// The result of a function of cuBLASLt as ours; `what` says what was being done.
fn check(status: Status, what: &dyn fmt::Display) -> Result<()> {
    if status == Status::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    // It keeps to itself which work has failed before it.
    Err(Error::device(format!("{what}: {status:?}")).remedy(driver::SYNCHRONISE))
}

/// What is computed.
struct Description(sys::cublasLtMatmulDesc_t);
/// How a matrix lies in memory.
struct Layout(sys::cublasLtMatrixLayout_t);
/// What an algorithm may use.
struct Preference(sys::cublasLtMatmulPreference_t);

// SAFETY: descriptors are plain memory of the library, which any thread may use, one at a time: they stay behind the lock of the plans.
unsafe impl Send for Description {}
// SAFETY: as above.
unsafe impl Send for Layout {}

impl Description {
    /// Sums in f32, without rounding the operands to TF32 first.
    fn new() -> Result<Self> {
        let mut made = std::ptr::null_mut();
        // SAFETY: writes the handle.
        let status =
            unsafe { sys::cublasLtMatmulDescCreate(&raw mut made, Compute::CUBLAS_COMPUTE_32F, Type::CUDA_R_32F) };
        check(status, &"describing a product").map(|()| Description(made))
    }

    fn set<T>(&self, attribute: Attribute, value: &T) -> Result<()> {
        // SAFETY: the description is alive; copies the value, and refuses one of the wrong size.
        let status = unsafe {
            sys::cublasLtMatmulDescSetAttribute(self.0, attribute, (&raw const *value).cast(), size_of::<T>())
        };
        check(status, &"describing a product")
    }
}

impl Layout {
    fn new(dtype: Type, (rows, columns): (usize, usize), stride: usize) -> Result<Self> {
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
    fn new() -> Result<Self> {
        let mut made = std::ptr::null_mut();
        // SAFETY: writes the handle.
        check(unsafe { sys::cublasLtMatmulPreferenceCreate(&raw mut made) }, &"choosing an algorithm")?;
        Ok(Preference(made))
    }

    fn set<T>(&self, attribute: Preferred, value: &T) -> Result<()> {
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
