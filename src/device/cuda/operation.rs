//! One kind of product as cuBLASLt knows it, and what the library is asked about it.
//!
//! It thinks in columns: a row-major matrix is to it the transposed one, so `c = a · b` is asked for as `cᵀ = bᵀ · aᵀ`, with the operands
//! swapped and nothing copied.

use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

use cudarc::cublaslt::sys::{
    self, cublasLtEpilogue_t as Epilogue, cublasLtMatmulDescAttributes_t as Attribute,
    cublasLtMatmulPreferenceAttributes_t as Preferred, cublasStatus_t as Status, cudaDataType_t as Type,
};

use super::descriptors::{Description, Layout, Preference, check};
use super::queue::{Handle, Queue};
use crate::device::gpu::{Facts, GpuProduct};
use crate::device::{DType, Product};
use crate::error::{Error, Result};

/// `CUBLAS_OP_N` and `CUBLAS_OP_T`, which the bindings leave out.
const PLAIN: i32 = 0;
const TRANSPOSED: i32 = 1;

/// How a product is computed: a value that only the library understands. It may be stored, and used again with the same version of the
/// library on the same kind of GPU.
pub type Algorithm = [u64; 8];

/// What the choice of an algorithm may depend on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
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
    pub fn of(p: &GpuProduct) -> Key {
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

/// All of it: the name under which an algorithm is remembered.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([m, n, k], [a, b, c], [input, output]) = (self.sizes, self.strides, self.dtypes);
        let (sets, bias) = (if self.add { "+=" } else { "=" }, if self.bias { " + bias" } else { "" });
        let [at_a, at_b, at_c, at_bias] = self.alignments;
        write!(f, "{:?} {m} x {n} x {k}, {output:?} {sets} {input:?}{bias}, strides {a} {b} {c}", self.product)?;
        write!(f, ", alignments {at_a} {at_b} {at_c} {at_bias}")
    }
}

/// A product in words, put together only when it is told.
pub struct Told<'a>(pub &'a GpuProduct);

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

/// The library on one GPU, with the memory that its algorithms may use; one is enough, products run one after another.
pub struct Library {
    queue: Arc<Queue>,
    handle: Handle<sys::cublasLtHandle_t>,
    workspace: u64,
    workspace_bytes: usize,
}

impl Library {
    /// What NVIDIA recommends for Hopper is 32 MiB; its kernels that split long sums profit from more.
    pub fn workspace_bytes(facts: &Facts) -> usize {
        if facts.capability >= (9, 0) { 64 << 20 } else { 32 << 20 }
    }

    /// Opens it.
    pub fn new(queue: Arc<Queue>, facts: &Facts, alloc: impl Fn(usize) -> Result<u64>) -> Result<Self> {
        queue.enter()?;
        let mut library = std::ptr::null_mut();
        // SAFETY: the context is current; writes the handle.
        check(unsafe { sys::cublasLtCreate(&raw mut library) }, &"opening cuBLASLt")
            .map_err(|e| e.remedy("free memory of the GPU, or install a cuBLASLt that goes with the driver"))?;
        let workspace_bytes = Self::workspace_bytes(facts);
        let workspace = alloc(workspace_bytes)?;
        Ok(Library { queue, handle: Handle(library), workspace, workspace_bytes })
    }
}

/// What cuBLASLt needs to know of one kind of product. Its first operand is our right one.
pub struct Operation {
    description: Description,
    first: Layout,
    second: Layout,
    output: Layout,
}

fn no_proposal() -> sys::cublasLtMatmulHeuristicResult_t {
    sys::cublasLtMatmulHeuristicResult_t {
        algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        workspaceSize: 0,
        state: Status::CUBLAS_STATUS_NOT_SUPPORTED,
        wavesCount: 0.0,
        reserved: [0; 4],
    }
}

impl Operation {
    /// Describes the kind of product that `p` is.
    pub fn of(p: &GpuProduct) -> Result<Self> {
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
        Ok(Operation {
            description,
            first: Layout::new(input, b_shape, p.b.stride)?,
            second: Layout::new(input, a_shape, p.a.stride)?,
            output: Layout::new(output, (n, m), p.c.stride)?,
        })
    }

    /// The library's proposals, the best first by its own estimate: at least one, at most `most`.
    pub fn propose(&self, library: &Library, p: &GpuProduct, most: usize) -> Result<Vec<Algorithm>> {
        let preference = Preference::new()?;
        preference.set(Preferred::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(library.workspace_bytes as u64))?;
        // Parts of a split sum are added in f32 and in a fixed order; the other schemes round them to the output's type.
        let scheme = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
        preference.set(Preferred::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &scheme)?;
        let [a, b, c, _] = Key::of(p).alignments;
        preference.set(Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &b)?;
        preference.set(Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &a)?;
        preference.set(Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &c)?;
        preference.set(Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &c)?;
        let (mut proposals, mut count) = (vec![no_proposal(); most], 0);
        // SAFETY: all descriptors are alive; writes at most `most` proposals, and their number.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                library.handle.0,
                self.description.0,
                self.first.0,
                self.second.0,
                self.output.0,
                self.output.0,
                preference.0,
                most as i32,
                proposals.as_mut_ptr(),
                &raw mut count,
            )
        };
        match status {
            Status::CUBLAS_STATUS_NOT_SUPPORTED => return Err(no_algorithm(p)),
            status => check(status, &Told(p))?,
        }
        let proposals = proposals.into_iter().take(count.max(0) as usize);
        let good = proposals.filter(|proposal| proposal.state == Status::CUBLAS_STATUS_SUCCESS);
        let algorithms: Vec<Algorithm> = good.map(|proposal| proposal.algo.data).collect();
        if algorithms.is_empty() { Err(no_algorithm(p)) } else { Ok(algorithms) }
    }

    /// Whether the library would run this algorithm, which may come from a file.
    pub fn accepts(&self, library: &Library, algorithm: &Algorithm) -> bool {
        let (algorithm, mut result) = (sys::cublasLtMatmulAlgo_t { data: *algorithm }, no_proposal());
        // SAFETY: all descriptors are alive; reads the algorithm and writes the result.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                library.handle.0,
                self.description.0,
                self.first.0,
                self.second.0,
                self.output.0,
                self.output.0,
                &raw const algorithm,
                &raw mut result,
            )
        };
        status == Status::CUBLAS_STATUS_SUCCESS
            && result.state == Status::CUBLAS_STATUS_SUCCESS
            && result.workspaceSize <= library.workspace_bytes
    }

    /// Queues `p`, which is of this kind, with an output at `c` in place of its own.
    ///
    /// # Safety
    /// As for [`crate::device::gpu::Backend::product`].
    pub unsafe fn start(&self, library: &Library, p: &GpuProduct, c: u64, algorithm: &Algorithm) -> Result<Status> {
        let stream = library.queue.enter()?;
        if let Some(bias) = p.bias {
            self.description.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        let (one, beta) = (1f32, if p.add { 1f32 } else { 0f32 });
        let at = |address: u64| std::ptr::with_exposed_provenance_mut::<c_void>(address as usize);
        let algorithm = sys::cublasLtMatmulAlgo_t { data: *algorithm };
        // SAFETY: the descriptors are alive and describe these operands, which the caller vouches for; both factors are f32 on the
        // host, as the description says; the workspace is used by this queue alone.
        Ok(unsafe {
            sys::cublasLtMatmul(
                library.handle.0,
                self.description.0,
                (&raw const one).cast(),
                at(p.b.address),
                self.first.0,
                at(p.a.address),
                self.second.0,
                (&raw const beta).cast(),
                at(c),
                self.output.0,
                at(c),
                self.output.0,
                &raw const algorithm,
                at(library.workspace),
                library.workspace_bytes,
                stream.cast(),
            )
        })
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
