//! Devices, memory and matrix products. The only part of the engine, besides the shard map, that contains `unsafe`.
//!
//! [`Device`] says where tensors live and kernels run; [`Tensor`] is a handle to a range of device memory whose accesses are checked
//! at run time; [`Arena`] is one allocation cut into tensors by a table.

pub mod cpu;
pub mod emulator;
pub mod kernels;
pub mod launch;
mod memory;

pub use memory::{Arena, Element, Read, Tensor, Write};

/// Where tensors live and ops run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The host: every op's `mod cpu`, in parallel over rayon's threads.
    Cpu,
}

/// Element type of a [`Tensor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 64-bit float: the CPU's gradient checks.
    F64,
    /// 16-bit unsigned integer.
    U16,
    /// 32-bit unsigned integer.
    U32,
    /// 64-bit unsigned integer.
    U64,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::U16 => 2,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
}

impl Device {
    /// Runs a matrix product.
    pub fn matmul(self, p: &Matmul<'_>) {
        match self {
            Device::Cpu => cpu::matmul(p),
        }
    }
}
