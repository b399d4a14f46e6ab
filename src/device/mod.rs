//! Devices, memory and matrix products. The only part of the engine, besides the shard map, that contains `unsafe`.
//!
//! [`Device`] says where tensors live and kernels run; [`Tensor`] is a handle to a range of device memory whose accesses are checked
//! at run time; [`Arena`] is one allocation cut into tensors by a table.

pub mod cpu;
mod cuda;
pub mod emulator;
mod emulator_backend;
pub mod gpu;
pub mod kernels;
pub mod launch;
mod memory;
mod recorded;
pub mod ring;
pub mod trace;

use std::sync::OnceLock;

use gpu::{Gpu, GpuProduct, Operand};
pub use memory::{ALIGNMENT, Arena, Element, Read, Tensor, Write, on_exhausted};

use crate::error::{Error, Result};

/// Where tensors live and ops run.
#[derive(Clone, Copy)]
pub enum Device {
    /// The host: every op's `mod cpu`, in parallel over rayon's threads.
    Cpu,
    /// An NVIDIA GPU or the emulated one: every op's `mod gpu`.
    Gpu(&'static Gpu),
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => f.write_str("Cpu"),
            Device::Gpu(gpu) => write!(f, "Gpu({})", gpu.facts().name),
        }
    }
}

/// The GPU of this process among those of its machine.
static CHOSEN: OnceLock<usize> = OnceLock::new();

/// Element type of a [`Tensor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 64-bit float: the CPU's gradient checks.
    F64,
    /// 16-bit float with the range of f32: storage on the GPU.
    BF16,
    /// 16-bit float with 11 bits of digits, up to 65504: embeddings of a search on the GPU.
    F16,
    /// 16-bit unsigned integer.
    U16,
    /// 32-bit unsigned integer.
    U32,
    /// 64-bit unsigned integer.
    U64,
}

impl DType {
    /// The type of statistics, sums and master weights where this is the storage type.
    pub fn wide(self) -> DType {
        if matches!(self, DType::BF16 | DType::F16) { DType::F32 } else { self }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::BF16 | DType::F16 | DType::U16 => 2,
            DType::F32 | DType::U32 => 4,
            DType::F64 | DType::U64 => 8,
        }
    }
}

/// A matrix operand: rows × columns with a leading dimension inside a tensor.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    /// Where the elements are.
    pub tensor: &'a Tensor,
    /// First element.
    pub offset: usize,
    /// Elements from one row to the next.
    pub stride: usize,
}

impl<'a> Matrix<'a> {
    /// A dense row-major matrix of `columns` columns that begins at the tensor's first element.
    pub fn new(tensor: &'a Tensor, columns: usize) -> Self {
        Matrix { tensor, offset: 0, stride: columns }
    }

    /// Columns from `offset` of a row-major matrix that is `stride` wide.
    pub fn columns(tensor: &'a Tensor, offset: usize, stride: usize) -> Self {
        Matrix { tensor, offset, stride }
    }
}

/// What a product does with the former content of its output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// `=`: the old content is not read.
    Set,
    /// `+=`.
    Add,
}

/// The three products of a linear layer with weight `w [n, k]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Product {
    /// `c [m, n] = a [m, k] · b [n, k]ᵀ`: forward.
    NT,
    /// `c [m, n] = a [m, k] · b [k, n]`: gradient of the input.
    NN,
    /// `c [m, n] = a [k, m]ᵀ · b [k, n]`: gradient of the weight.
    TN,
}

/// A matrix product with its sizes. `m`, `n` are those of the output, `k` is summed over.
pub struct Matmul<'a> {
    /// Which operands are transposed.
    pub product: Product,
    /// Rows of the output.
    pub m: usize,
    /// Columns of the output.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// Left operand.
    pub a: Matrix<'a>,
    /// Right operand.
    pub b: Matrix<'a>,
    /// Output; must overlap neither operand.
    pub c: Matrix<'a>,
    /// `=` or `+=`.
    pub output: Output,
    /// `[n]`, added to every row of the output; on the GPU of the output's type.
    pub bias: Option<&'a Tensor>,
}

impl Device {
    /// The emulated GPU.
    pub fn emulator(options: emulator::Options) -> Result<Device> {
        Gpu::new(Box::new(emulator_backend::EmulatorBackend::new(options)?)).map(Device::Gpu)
    }

    /// Makes [`Device::cuda`] open the GPU that is a process' own on its machine: that of this number, unless the launcher lets each
    /// process see one only. Without effect once a GPU is open.
    pub fn choose_cuda(local_rank: usize) {
        let _ = CHOSEN.set(local_rank);
    }

    /// The first NVIDIA GPU that is visible (`CUDA_VISIBLE_DEVICES`), or the one that was chosen. It is opened once; later calls give the
    /// same one, or the same error.
    pub fn cuda() -> Result<Device> {
        static OPENED: OnceLock<Result<&'static Gpu>> = OnceLock::new();
        let open = || Gpu::new(Box::new(cuda::CudaBackend::new(CHOSEN.get().copied().unwrap_or(0))?));
        OPENED.get_or_init(open).clone().map(Device::Gpu)
    }

    /// The device that a name stands for: `cpu`, `cuda`, `emulator`, or `auto`, a GPU where everything it needs is there. The text is a
    /// line worth telling: why `auto` left out the GPU of a machine that has a driver, or what is wrong with one that works.
    pub fn open(name: &str) -> Result<(Device, Option<String>)> {
        match name {
            "auto" if cuda::has_driver() => {
                let left_out = |e: Error| Ok((Device::Cpu, Some(format!("running on the CPU: {e}"))));
                Device::cuda().map_or_else(left_out, |device| Ok((device, device.warning())))
            }
            "auto" | "cpu" => Ok((Device::Cpu, None)),
            "cuda" => Device::cuda().map(|device| (device, device.warning())),
            "emulator" => Ok((Device::emulator(emulator::Options::default())?, None)),
            other => {
                Err(Error::usage(format!("there is no device {other}")).remedy("auto, cpu, cuda and emulator are"))
            }
        }
    }

    fn warning(self) -> Option<String> {
        match self {
            Device::Cpu => None,
            Device::Gpu(gpu) => gpu.warning().map(str::to_string),
        }
    }

    /// The first failure of what was queued so far; on the CPU there is none.
    pub fn check(self) -> Result<()> {
        match self {
            Device::Cpu => Ok(()),
            Device::Gpu(gpu) => gpu.check(),
        }
    }

    /// Whether it is a GPU, emulated or not.
    pub fn is_gpu(self) -> bool {
        matches!(self, Device::Gpu(_))
    }

    /// What it is called by its maker: a GPU's name, or a processor's.
    pub fn name(self) -> String {
        match self {
            Device::Cpu => cpu::processor(),
            Device::Gpu(gpu) => gpu.facts().name.clone(),
        }
    }

    /// A zeroed tensor here.
    pub fn zeros(self, dtype: DType, len: usize) -> Tensor {
        Tensor::zeros_on(self, dtype, len)
    }

    /// A tensor here that holds a copy of `data`.
    pub fn tensor<T: Element>(self, data: &[T]) -> Tensor {
        let tensor = self.zeros(T::DTYPE, data.len());
        tensor.upload(data);
        tensor
    }

    /// Runs a matrix product.
    pub fn matmul(self, p: &Matmul<'_>) {
        match self {
            Device::Cpu => {
                trace::piece(|| trace::Piece::Product(p.product, [p.m, p.n, p.k]));
                cpu::matmul(p);
            }
            Device::Gpu(gpu) => gpu.matmul(p),
        }
    }
}

/// One thing that a GPU needs, as `doctor` tells it.
pub struct Finding {
    /// Its name.
    pub what: &'static str,
    /// Whether it is there and will do.
    pub good: bool,
    /// What was found.
    pub found: String,
    /// What that means for a run, or what to do about it.
    pub meaning: String,
}

/// What `--device cuda` needs, and what of it is there. Never fails: whatever is missing is a finding.
pub fn findings() -> Vec<Finding> {
    cuda::findings()
}

impl Gpu {
    fn matmul(&self, p: &Matmul<'_>) {
        let operand = |m: &Matrix<'_>, rows: usize, columns: usize| {
            let dtype = m.tensor.dtype();
            assert!(
                rows == 0 || columns == 0 || m.offset + (rows - 1) * m.stride + columns <= m.tensor.len(),
                "product out of bounds"
            );
            Operand { address: m.tensor.address() + (m.offset * dtype.size()) as u64, dtype, stride: m.stride }
        };
        let (m, n, k) = (p.m, p.n, p.k);
        let ((a_rows, a_columns), (b_rows, b_columns)) = match p.product {
            Product::NT => ((m, k), (n, k)),
            Product::NN => ((m, k), (k, n)),
            Product::TN => ((k, m), (k, n)),
        };
        let bias = p.bias.map(|b| {
            assert!(b.len() >= n && b.dtype() == p.c.tensor.dtype(), "bias of a product");
            b.address()
        });
        let product = GpuProduct {
            product: p.product,
            m,
            n,
            k,
            a: operand(&p.a, a_rows, a_columns),
            b: operand(&p.b, b_rows, b_columns),
            c: operand(&p.c, m, n),
            add: p.output == Output::Add,
            bias,
        };
        // SAFETY: the operands lie inside their tensors, as just checked; that the output overlaps none is what `Matmul` asks for.
        unsafe { self.product(&product) };
    }
}
