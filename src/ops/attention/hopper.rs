//! The kernels of Hopper's warpgroup products (`flash_hopper.cuh`): bf16, heads of 64; the backward in one pass for sequences whose
//! sums of dQ fit the shared memory.

use super::super::gpu::launch;
use super::gpu::{batch, elements};
use super::{Backward, Gradient, Pass, Shape, TILE};
use crate::device::gpu::{Facts, Gpu};
use crate::device::launch::Shape as Launch;
use crate::device::{DType, Tensor};

/// Bytes of a tile in bf16.
const TILE_BYTES: usize = TILE * 128;

/// Whether the forward of this storage and shape runs here.
pub(in crate::ops) fn runs(gpu: &Gpu, storage: &Tensor, shape: &Shape<'_>) -> bool {
    has_kernels(gpu.facts(), storage.dtype(), shape.head_size)
}

/// Whether there are kernels for this GPU, storage and size of heads.
pub fn has_kernels(facts: &Facts, storage: DType, head_size: usize) -> bool {
    facts.warpgroups && storage == DType::BF16 && head_size == 64
}

/// How the backward is cut there for sequences of up to `longest` keys; nothing where it takes two kernels.
pub fn cut(facts: &Facts, storage: DType, head_size: usize, longest: usize) -> Option<Whole> {
    let whole = Whole::of(longest).filter(|_| has_kernels(facts, storage, head_size))?;
    (whole.shared_bytes(longest) <= facts.shared_bytes).then_some(whole)
}

/// Grid, block and shared memory of the forward: blocks of two warpgroups.
pub(in crate::ops) fn forward_grid(shape: &Shape<'_>) -> Launch {
    let tiles = super::gpu::tiles(shape, Pass::Forward).count.rows;
    Launch { grid: [tiles as u32, shape.heads as u32, 1], block: [256, 1, 1], shared_bytes: FORWARD_BYTES }
}

/// Shared memory of the forward: a tile of queries a warpgroup, two stages of keys and values, random bits.
pub const FORWARD_BYTES: u32 = (6 * TILE_BYTES + 4096) as u32;

/// How the backward in one pass cuts its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whole {
    /// Blocks of one warpgroup and 64 keys at a time, several on a multiprocessor.
    Short,
    /// Of two, and 128 keys.
    Long,
}

impl Whole {
    /// For sequences of up to `longest` keys: short where two blocks fit a multiprocessor, nothing where dQ does not fit.
    pub fn of(longest: usize) -> Option<Whole> {
        match longest {
            0..=192 => Some(Whole::Short),
            193..=512 => Some(Whole::Long),
            _ => None,
        }
    }

    fn groups(self) -> usize {
        if self == Whole::Short { 1 } else { 2 }
    }

    /// Bytes of `BackwardLayout`.
    pub fn shared_bytes(self, longest: usize) -> u32 {
        let (groups, tiles) = (self.groups(), longest.div_ceil(TILE));
        let sums = if longest > TILE * groups { tiles * TILE * 64 * 4 } else { 0 };
        let queries = tiles * TILE * (12 + 8 * groups);
        ((3 * groups + 4) * TILE_BYTES + 2048 * groups + queries + sums) as u32
    }

    /// Grid, block and shared memory.
    pub(in crate::ops) fn grid(self, shape: &Shape<'_>) -> (Launch, i32) {
        let work = super::gpu::work(shape);
        let grid = [work.sequences.count.rows as u32, shape.heads as u32, 1];
        let block = [128 * self.groups() as u32, 1, 1];
        (Launch { grid, block, shared_bytes: self.shared_bytes(work.longest) }, work.longest.div_ceil(TILE) as i32)
    }
}

/// How the backward of this storage and shape runs here, if it does.
pub(in crate::ops) fn whole(gpu: &Gpu, storage: &Tensor, shape: &Shape<'_>) -> Option<Whole> {
    cut(gpu.facts(), storage.dtype(), shape.head_size, super::gpu::work(shape).longest)
}

/// dQ, dK and dV.
pub fn backward(gpu: &Gpu, a: &Backward<'_>, whole: Whole) {
    let f = &a.forward;
    let (heads, site, c) = (f.shape.heads as i32, f.dropout.site, f.shape.heads * f.shape.head_size);
    let (dropout, batch) = (gpu.dropout(&f.dropout.mask), batch(&f.shape, &f.names, Pass::Whole));
    let ((dq, dq_stride), (dkv, dk_at, dkv_stride)) = match a.gradient {
        Gradient::Fused(wide) => ((wide, 3 * c), (wide, c, 3 * c)),
        Gradient::Split(dq, wide) => ((dq, c), (wide, 0, 2 * c)),
    };
    let (grid, tiles) = whole.grid(&f.shape);
    macro_rules! launch_kind {
        ($($kind:pat => $kernel:ident),*) => {
            match whole {
                $($kind => launch!(gpu, grid, $kernel {
                    dq: dq.get_mut(),
                    dq_stride: dq_stride as i32,
                    dk: dkv.get_mut().offset(dk_at),
                    dv: dkv.get_mut().offset(dk_at + c),
                    dkv_stride: dkv_stride as i32,
                    q: elements(&f.q),
                    q_stride: f.q.stride as i32,
                    k: elements(&f.k),
                    k_stride: f.k.stride as i32,
                    v: elements(&f.v),
                    v_stride: f.v.stride as i32,
                    out: f.out.get(),
                    lse: f.lse.get(),
                    dout: a.dout.get(),
                    batch,
                    dropout,
                    site,
                    heads,
                    tiles,
                }),)*
            }
        };
    }
    launch_kind!(Whole::Short => AttentionBackwardShortD64Bf16, Whole::Long => AttentionBackwardLongD64Bf16);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fit_a_multiprocessor() {
        // Of an H100: 227 KiB a block, 228 KiB a multiprocessor of which each block takes 1 KiB more than it asks for.
        let bytes = |longest| Whole::of(longest).map(|whole| (whole, whole.shared_bytes(longest)));
        assert_eq!(bytes(64), Some((Whole::Short, 9 * 8192 - 16384 + 2048 + 64 * 20)));
        for longest in 1..=192 {
            assert!(
                bytes(longest).is_some_and(|(whole, bytes)| whole == Whole::Short && 2 * (bytes + 1024) <= 228 << 10)
            );
        }
        assert!(bytes(512).is_some_and(|(whole, bytes)| whole == Whole::Long && bytes <= 227 << 10));
        assert_eq!(bytes(513), None);
    }
}
