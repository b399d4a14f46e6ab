//! The ops: one file each, with the formulas, the forward, the backward above `mod cpu`, the reference implementation.
//!
//! Layouts: matrices are row-major; a row is one token's hidden state. Gradients named `…_acc` are added to, all other outputs are
//! overwritten. Every op of the CPU runs in `f32`, or in `f64` for gradient checks, as its tensors say.

pub mod activation;
pub mod attention;
pub mod contrastive;
pub mod cross_entropy;
pub mod embed;
pub mod enhanced_decoding;
pub mod gather;
pub mod layernorm;
pub mod linear;
pub mod optimizer;
pub mod pool;

use crate::device::Tensor;

/// Calls a generic CPU function for the element type of a tensor.
macro_rules! on_cpu {
    ($tensor:expr, $m:ident::$f:ident, $($arg:expr),*) => {
        match $tensor.dtype() {
            $crate::device::DType::F32 => $m::$f::<f32>($($arg),*),
            $crate::device::DType::F64 => $m::$f::<f64>($($arg),*),
            other => panic!("{} in {other:?} on the CPU", stringify!($f)),
        }
    };
}
pub(crate) use on_cpu;

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
    pub count: usize,
    /// `[count]` u32: row of the output, distinct.
    pub keys: &'a Tensor,
    /// `[count + 1]` u32.
    pub offsets: &'a Tensor,
    /// u32: rows of the input, ascending inside a group.
    pub rows: &'a Tensor,
}
