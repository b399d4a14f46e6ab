//! Multi-head self-attention over packed sequences.
//!
//! Per sequence and head: `P = softmax(Q Kᵀ / √D)`, `out = dropout(P) V`. The queries may be some of the sequence's rows only (last
//! layer). Saved: `out` and `lse`, the log-sum-exp of each row's scores, from which the backward recomputes P:
//! `dV = dropout(P)ᵀ dO`, `dS = P ∘ (dropout(dO Vᵀ) − rowsum(dO ∘ out))`, `dQ = dS K / √D`, `dK = dSᵀ Q / √D`.

pub(super) mod cpu;
pub(super) mod gpu;
pub mod hopper;

use super::{Count, RowNames, SiteDropout};
use crate::device::{Device, Matrix, Tensor};

/// One of the kernels' tables of work, see [`tiles`].
#[derive(Clone, Copy)]
pub struct Tiles<'a> {
    /// `[count, 2]` u32.
    pub table: &'a Tensor,
    /// Tiles.
    pub count: Count<'a>,
}

/// The kernels' tables of work: where queries own a block, and where keys do.
#[derive(Clone, Copy)]
pub struct Work<'a> {
    /// Tiles of queries.
    pub queries: Tiles<'a>,
    /// Tiles of keys.
    pub keys: Tiles<'a>,
    /// Sequences with keys, whole ones, as one tile each.
    pub sequences: Tiles<'a>,
    /// Keys of the longest sequence that work is laid out for.
    pub longest: usize,
}

/// Sizes and sequence borders.
#[derive(Clone, Copy)]
pub struct Shape<'a> {
    /// S.
    pub sequences: usize,
    /// H.
    pub heads: usize,
    /// D.
    pub head_size: usize,
    /// `[S + 1]` u32: first query row of each sequence.
    pub cu_rows: &'a Tensor,
    /// `[S + 1]` u32: first key of each sequence.
    pub cu_seqlens: &'a Tensor,
    /// What the GPU needs besides.
    pub work: Option<Work<'a>>,
}

/// Arguments of [`forward`].
pub struct Forward<'a> {
    /// Sizes.
    pub shape: Shape<'a>,
    /// `[R, H·D]`.
    pub q: Matrix<'a>,
    /// `[T, H·D]`.
    pub k: Matrix<'a>,
    /// `[T, H·D]`.
    pub v: Matrix<'a>,
    /// Names of the query rows.
    pub names: RowNames<'a>,
    /// Dropout of the probabilities.
    pub dropout: SiteDropout,
    /// `[R, H·D]`, written.
    pub out: &'a Tensor,
    /// `[R, H]`, on the GPU f32, written.
    pub lse: &'a Tensor,
}

/// `out = dropout(softmax(Q Kᵀ / √D)) V`.
pub fn forward(device: Device, a: &Forward<'_>) {
    match device {
        Device::Cpu => super::on_cpu!(a.out, cpu::forward, a),
        Device::Gpu(gpu) => gpu::forward(gpu, a),
    }
}

/// Where the gradients of queries, keys and values go.
#[derive(Clone, Copy)]
pub enum Gradient<'a> {
    /// `[T, 3·H·D]`: dQ, dK, dV side by side, for queries of all rows.
    Fused(&'a Tensor),
    /// dQ `[R, H·D]`, and dK, dV side by side `[T, 2·H·D]`.
    Split(&'a Tensor, &'a Tensor),
}

/// Arguments of [`backward`].
pub struct Backward<'a> {
    /// The forward's arguments; `out` and `lse` are read here.
    pub forward: Forward<'a>,
    /// `[R, H·D]`.
    pub dout: &'a Tensor,
    /// Written.
    pub gradient: Gradient<'a>,
}

/// Gradients of queries, keys and values.
pub fn backward(device: Device, a: &Backward<'_>) {
    match device {
        Device::Cpu => super::on_cpu!(a.dout, cpu::backward, a),
        Device::Gpu(gpu) => gpu::backward(gpu, a),
    }
}

/// Rows of the tiles into which the kernels cut queries and keys.
pub const TILE: usize = 64;

/// The kernels' table of work: sequence and tile of every tile of [`TILE`] rows between the borders `cu`. The rows of a sequence meet
/// all its rows between the borders `others`; sequences where those are many come first, so that no long block starts last. At most
/// `rows / TILE + sequences` entries.
pub fn tiles(cu: &[u32], others: &[u32]) -> Vec<[u32; 2]> {
    let length = |cu: &[u32], s: usize| cu[s + 1] - cu[s];
    let mut order: Vec<usize> = (0..cu.len() - 1).collect();
    order.sort_by_key(|&s| std::cmp::Reverse(length(others, s)));
    let of = |s: usize| (0..length(cu, s).div_ceil(TILE as u32)).map(move |tile| [s as u32, tile]);
    order.into_iter().flat_map(of).collect()
}

/// The table of the sequences with keys, those with most of them first.
pub fn whole_sequences(cu_seqlens: &[u32]) -> Vec<[u32; 2]> {
    tiles(cu_seqlens, cu_seqlens).into_iter().filter(|[_, tile]| *tile == 0).collect()
}

/// The kernels of one attention, in the order in which they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// `out` and `lse`; its tiles are of queries.
    Forward,
    /// dQ, and the row sums that [`Pass::Keys`] reads; its tiles are of queries.
    Queries,
    /// dK and dV; its tiles are of keys.
    Keys,
    /// dQ, dK and dV at once, in the place of the two; a block takes a whole sequence.
    Whole,
}

impl Pass {
    /// Dynamic shared memory of its kernel for elements of `element` bytes: 2 (two stages of streamed tiles) or 4 (one). [`Pass::Whole`]
    /// has [`hopper::Whole::shared_bytes`].
    pub fn shared_bytes(self, head_size: usize, element: usize) -> u32 {
        let stages = if element == 2 { 2 } else { 1 };
        let own = if self == Pass::Forward { 1 } else { 2 };
        let random = 2048;
        let product = if element == 2 { 0 } else { 9216 };
        let columns = if self == Pass::Keys { stages * TILE * 20 } else { 0 };
        ((own + 2 * stages) * TILE * head_size * element + random + product + columns) as u32
    }
}
