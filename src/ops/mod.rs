//! The ops: one file each, with the formulas, the forward, the backward above `mod cpu`, the reference implementation, and `mod gpu`,
//! the launches of its kernels.
//!
//! Layouts: matrices are row-major; a row is one token's hidden state. Gradients named `…_acc` are added to, all other outputs are
//! overwritten. Every op of the CPU runs in `f32`, or in `f64` for gradient checks, as its tensors say. On the GPU matrices of hidden
//! states and the weights of products are f32 or bf16; statistics, losses, γ, β and gradients of parameters are f32.

pub mod activation;
pub mod attention;
pub mod bag_of_words;
pub mod contrastive;
pub mod cross_entropy;
pub mod dropout;
pub mod embed;
pub mod enhanced_decoding;
pub mod gather;
mod gpu;
pub mod group_loss;
pub mod group_scores;
pub mod joined;
pub mod layernorm;
pub mod lexical;
pub mod linear;
pub mod optimizer;
pub mod pool;
pub mod topk;

use crate::device::Tensor;

/// Calls a generic CPU function for the element type of a tensor.
macro_rules! on_cpu {
    ($tensor:expr, $m:ident::$f:ident, $($arg:expr),*) => {{
        $crate::device::trace::op(module_path!(), stringify!($f));
        match $tensor.dtype() {
            $crate::device::DType::F32 => $m::$f::<f32>($($arg),*),
            $crate::device::DType::F64 => $m::$f::<f64>($($arg),*),
            other => panic!("{} in {other:?} on the CPU", stringify!($f)),
        }
    }};
}
pub(crate) use on_cpu;

/// How many rows of a matrix are in use.
///
/// On a GPU, work is laid out for `rows` rows, so that the same recorded work serves batches of other sizes, and kernels read the true
/// number, at most that, from device memory. Rows past it hold anything, but no op reads them except to multiply them by zero.
#[derive(Clone, Copy)]
pub struct Count<'a> {
    /// The number; with a true one on the device, an upper bound of it.
    pub rows: usize,
    exact: Option<&'a Tensor>,
}

impl<'a> Count<'a> {
    /// At most `rows`, exactly what `[1]` u32 `exact` holds on the device.
    pub fn on_device(rows: usize, exact: &'a Tensor) -> Self {
        Count { rows, exact: Some(exact) }
    }
}

impl From<usize> for Count<'_> {
    fn from(rows: usize) -> Self {
        Count { rows, exact: None }
    }
}

/// Which text and position each row of a matrix belongs to: the names under which its dropout is drawn.
#[derive(Clone, Copy)]
pub struct RowNames<'a> {
    /// `[S]` u64: number of each sequence's sample in the run.
    pub samples: &'a Tensor,
    /// `[rows]` u32: sequence of the row.
    pub sequence: &'a Tensor,
    /// `[rows]` u32: position of the row in its text.
    pub position: &'a Tensor,
}

/// The dropout of one place of the graph.
#[derive(Clone, Copy)]
pub struct SiteDropout {
    /// Key and threshold of the step.
    pub mask: crate::rng::Dropout,
    /// Which place.
    pub site: u32,
}

/// Rows that belong together, for sums in a fixed order: group `g` holds `rows[offsets[g]..offsets[g + 1]]` and adds to `keys[g]`.
#[derive(Clone, Copy)]
pub struct Groups<'a> {
    /// Number of groups.
    pub count: Count<'a>,
    /// Number of rows in all groups.
    pub entries: usize,
    /// `[count]` u32: row of the output, distinct.
    pub keys: &'a Tensor,
    /// `[count + 1]` u32.
    pub offsets: &'a Tensor,
    /// u32: rows of the input, ascending inside a group.
    pub rows: &'a Tensor,
}
