//! The launches of `attention.cu`, and what `enhanced_decoding.cu` shares with them.

use super::super::RowNames;
use super::{Backward, Forward, Gradient, Pass, Shape, Tiles, Work, hopper};
use crate::device::gpu::Gpu;
use crate::device::kernels::AttentionBatch;
use crate::device::launch::{ConstPtr, Kernel, MutPtr, Shape as Launch};
use crate::device::{Element, Matrix, Tensor};

/// Queues the kernel for the storage type and head size among those listed, f32 first, sizes 32, 64 and 128.
///
/// `hopper($grid, $kernel)` names the kernel of warpgroups that takes the same parameters, where those run.
macro_rules! by_head {
    ($gpu:expr, $storage:expr, $shape:expr, $pass:expr, hopper($grid:expr, $kernel:ident), $kernels:tt $fields:tt) => {
        if $crate::ops::attention::hopper::runs($gpu, $storage, &$shape) {
            $crate::ops::gpu::launch!($gpu, $grid, $kernel $fields)
        } else {
            $crate::ops::attention::gpu::by_head!($gpu, $storage, $shape, $pass, $kernels $fields)
        }
    };
    (
        $gpu:expr, $storage:expr, $shape:expr, $pass:expr,
        [$f32_32:ident $f32_64:ident $f32_128:ident | $bf16_32:ident $bf16_64:ident $bf16_128:ident] $fields:tt
    ) => {
        $crate::ops::attention::gpu::by_head!(@ $gpu, $storage, $shape, $pass, $fields,
            F32 32 $f32_32, F32 64 $f32_64, F32 128 $f32_128, BF16 32 $bf16_32, BF16 64 $bf16_64, BF16 128 $bf16_128)
    };
    (@ $gpu:expr, $storage:expr, $shape:expr, $pass:expr, $fields:tt, $($dtype:ident $size:literal $kernel:ident),*) => {
        match ($storage.dtype(), $shape.head_size) {
            $(($crate::device::DType::$dtype, $size) => {
                let grid = $crate::ops::attention::gpu::grid(
                    &$shape, $pass, $crate::device::kernels::$kernel::kernel(), $storage);
                $crate::ops::gpu::launch!($gpu, grid, $kernel $fields)
            })*
            other => panic!("no attention kernel for {other:?}"),
        }
    };
}
pub(in crate::ops) use by_head;

/// The tables of work.
pub(in crate::ops) fn work<'a>(shape: &Shape<'a>) -> Work<'a> {
    let Some(work) = shape.work else { panic!("attention on the GPU needs its tables of work") };
    work
}

/// The table of work of a pass.
pub(in crate::ops) fn tiles<'a>(shape: &Shape<'a>, pass: Pass) -> Tiles<'a> {
    match pass {
        Pass::Forward | Pass::Queries => work(shape).queries,
        Pass::Keys => work(shape).keys,
        Pass::Whole => work(shape).sequences,
    }
}

/// Grid, block and shared memory of a pass.
pub(in crate::ops) fn grid(shape: &Shape<'_>, pass: Pass, kernel: &Kernel, storage: &Tensor) -> Launch {
    Launch {
        grid: [tiles(shape, pass).count.rows as u32, shape.heads as u32, 1],
        block: [kernel.max_threads, 1, 1],
        shared_bytes: pass.shared_bytes(shape.head_size, storage.dtype().size()),
    }
}

/// The packed batch, for the kernel of a pass.
pub(in crate::ops) fn batch(shape: &Shape<'_>, names: &RowNames<'_>, pass: Pass) -> AttentionBatch {
    let tiles = tiles(shape, pass);
    AttentionBatch {
        cu_rows: shape.cu_rows.get(),
        cu_seqlens: shape.cu_seqlens.get(),
        position: names.position.get(),
        sample: names.samples.get(),
        tiles: tiles.table.get(),
        tile_count: tiles.count.get(),
    }
}

/// A matrix's elements, to be read.
pub(in crate::ops) fn elements<T: Element>(m: &Matrix<'_>) -> ConstPtr<T> {
    m.tensor.get().offset(m.offset)
}

pub fn forward(gpu: &Gpu, a: &Forward<'_>) {
    let (heads, site) = (a.shape.heads as i32, a.dropout.site);
    let (dropout, batch) = (gpu.dropout(&a.dropout.mask), batch(&a.shape, &a.names, Pass::Forward));
    let hopper_grid = hopper::forward_grid(&a.shape);
    by_head!(gpu, a.out, a.shape, Pass::Forward, hopper(hopper_grid, AttentionForwardHopperD64Bf16), [
        AttentionForwardD32F32 AttentionForwardD64F32 AttentionForwardD128F32
        | AttentionForwardD32Bf16 AttentionForwardD64Bf16 AttentionForwardD128Bf16
    ] {
        out: a.out.get_mut(),
        lse: a.lse.get_mut(),
        q: elements(&a.q),
        q_stride: a.q.stride as i32,
        k: elements(&a.k),
        k_stride: a.k.stride as i32,
        v: elements(&a.v),
        v_stride: a.v.stride as i32,
        batch,
        dropout,
        site,
        heads,
    });
}

pub fn backward(gpu: &Gpu, a: &Backward<'_>) {
    let f = &a.forward;
    if let Some(whole) = hopper::whole(gpu, a.dout, &f.shape) {
        return hopper::backward(gpu, a, whole);
    }
    let (heads, site, c) = (f.shape.heads as i32, f.dropout.site, f.shape.heads * f.shape.head_size);
    let dropout = gpu.dropout(&f.dropout.mask);
    // Where dQ, dK and dV begin, and how far apart their rows are.
    let ((dq, dq_stride), (dkv, dk_at, dkv_stride)) = match a.gradient {
        Gradient::Fused(wide) => ((wide, 3 * c), (wide, c, 3 * c)),
        Gradient::Split(dq, wide) => ((dq, c), (wide, 0, 2 * c)),
    };
    let delta: MutPtr<f32> = gpu.scratch(f.lse.len());
    let queries = batch(&f.shape, &f.names, Pass::Queries);
    by_head!(gpu, a.dout, f.shape, Pass::Queries, [
        AttentionBackwardDqD32F32 AttentionBackwardDqD64F32 AttentionBackwardDqD128F32
        | AttentionBackwardDqD32Bf16 AttentionBackwardDqD64Bf16 AttentionBackwardDqD128Bf16
    ] {
        dq: dq.get_mut(),
        dq_stride: dq_stride as i32,
        delta,
        q: elements(&f.q),
        q_stride: f.q.stride as i32,
        k: elements(&f.k),
        k_stride: f.k.stride as i32,
        v: elements(&f.v),
        v_stride: f.v.stride as i32,
        out: f.out.get(),
        lse: f.lse.get(),
        dout: a.dout.get(),
        batch: queries,
        dropout,
        site,
        heads,
    });
    let keys = batch(&f.shape, &f.names, Pass::Keys);
    by_head!(gpu, a.dout, f.shape, Pass::Keys, [
        AttentionBackwardDkvD32F32 AttentionBackwardDkvD64F32 AttentionBackwardDkvD128F32
        | AttentionBackwardDkvD32Bf16 AttentionBackwardDkvD64Bf16 AttentionBackwardDkvD128Bf16
    ] {
        dk: dkv.get_mut().offset(dk_at),
        dv: dkv.get_mut().offset(dk_at + c),
        dkv_stride: dkv_stride as i32,
        q: elements(&f.q),
        q_stride: f.q.stride as i32,
        k: elements(&f.k),
        k_stride: f.k.stride as i32,
        v: elements(&f.v),
        v_stride: f.v.stride as i32,
        lse: f.lse.get(),
        delta: delta.into(),
        dout: a.dout.get(),
        batch: keys,
        dropout,
        site,
        heads,
    });
}
