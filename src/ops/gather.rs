//! Moving rows between matrices: gather, scatter, and sums of groups of rows (the backward of a gather).
//!
//! Sums go through [`Groups`], prepared with the batch, so that every output row is added up in a fixed order without atomics.

use super::{Count, Groups};
use crate::device::{Device, Tensor};

/// `to[i] = from[rows[i]]` for `i < count`; rows are `width` wide, `rows` is u32.
pub fn gather(device: Device, from: &Tensor, rows: &Tensor, count: Count<'_>, width: usize, to: &Tensor) {
    match device {
        Device::Cpu => super::on_cpu!(from, cpu::gather, from, rows, count.rows, width, to),
        Device::Gpu(gpu) => gpu::gather(gpu, from, rows, count, width, to),
    }
}

/// `to[rows[i]] = from[i]` for `i < count`; `rows` ascending and distinct.
pub fn scatter(device: Device, from: &Tensor, rows: &Tensor, count: Count<'_>, width: usize, to: &Tensor) {
    match device {
        Device::Cpu => super::on_cpu!(from, cpu::scatter, from, rows, count.rows, width, to, |to, from| *to = from),
        Device::Gpu(gpu) => gpu::scatter(gpu, from, rows, count, width, to),
    }
}

/// `to[rows[i]] += from[i]` for `i < count`; `rows` ascending and distinct.
pub fn scatter_add(device: Device, from: &Tensor, rows: &Tensor, count: Count<'_>, width: usize, to_acc: &Tensor) {
    match device {
        Device::Cpu => {
            super::on_cpu!(from, cpu::scatter, from, rows, count.rows, width, to_acc, |to, from| *to += from)
        }
        Device::Gpu(gpu) => gpu::scatter_add(gpu, from, rows, count, width, to_acc),
    }
}

/// `to[keys[g]] += Σ from[rows of g]`; keys ascending. On the GPU `to_acc` is f32.
pub fn group_sums(device: Device, from: &Tensor, groups: Groups<'_>, width: usize, to_acc: &Tensor) {
    match device {
        Device::Cpu => super::on_cpu!(from, cpu::group_sums, from, groups, width, to_acc),
        Device::Gpu(gpu) => gpu::group_sums(gpu, from, groups, width, to_acc),
    }
}

/// `to[rows[i]] = 0` for `i < count`; `rows` ascending and distinct.
pub fn zero_rows(device: Device, rows: &Tensor, count: Count<'_>, width: usize, to: &Tensor) {
    match device {
        Device::Cpu => super::on_cpu!(to, cpu::zero_rows, rows, count.rows, width, to),
        Device::Gpu(gpu) => gpu::zero_rows(gpu, rows, count, width, to),
    }
}

/// `to[i] = a[a_rows[i]] + b[b_rows[i]]` for `i < count`.
pub fn add_rows(
    device: Device,
    (a, a_rows): (&Tensor, &Tensor),
    (b, b_rows): (&Tensor, &Tensor),
    count: Count<'_>,
    width: usize,
    to: &Tensor,
) {
    match device {
        Device::Cpu => super::on_cpu!(to, cpu::add_rows, (a, a_rows), (b, b_rows), count.rows, width, to),
        Device::Gpu(gpu) => gpu::add_rows(gpu, (a, a_rows), (b, b_rows), count, width, to),
    }
}

/// The first `count` rows of an f32 matrix in the storage type: `storage` after they were rounded to it, or `from` itself.
pub fn rounded<'a>(
    device: Device,
    from: &'a Tensor,
    count: Count<'_>,
    width: usize,
    storage: &'a Tensor,
) -> &'a Tensor {
    match device {
        Device::Gpu(gpu) if from.dtype() != storage.dtype() => {
            gpu::round_rows(gpu, from, count, width, storage);
            storage
        }
        _ => from,
    }
}

/// `to[i] = 0` for the first `count` elements.
pub fn zero(device: Device, to: &Tensor, count: usize) {
    match device {
        Device::Cpu => super::on_cpu!(to, cpu::zero, to, count),
        Device::Gpu(_) => to.clear(count),
    }
}

/// The reference: blocks of output rows in parallel, each finding its part of the ascending indices.
mod cpu {
    use super::Groups;
    use crate::device::Tensor;
    use crate::device::cpu::{Real, vectorized};
    use rayon::prelude::*;

    const BLOCK: usize = 64;

    pub fn gather<F: Real>(from: &Tensor, rows: &Tensor, count: usize, width: usize, to: &Tensor) {
        let (from, rows, mut to) = (from.read::<F>(), rows.read::<u32>(), to.write::<F>());
        to[..count * width].par_chunks_mut(BLOCK * width).zip(rows[..count].par_chunks(BLOCK)).for_each(
            |(to, rows)| {
                for (to, &row) in to.chunks_exact_mut(width).zip(rows) {
                    to.copy_from_slice(&from[row as usize * width..][..width]);
                }
            },
        );
    }

    pub fn zero<F: Real>(to: &Tensor, count: usize) {
        to.write::<F>()[..count].par_chunks_mut(1 << 16).for_each(|to| to.fill(F::ZERO));
    }

    pub fn zero_rows<F: Real>(rows: &Tensor, count: usize, width: usize, to: &Tensor) {
        let (rows, mut to) = (rows.read::<u32>(), to.write::<F>());
        for &row in &rows[..count] {
            to[row as usize * width..][..width].fill(F::ZERO);
        }
    }

    pub fn scatter<F: Real>(
        from: &Tensor,
        rows: &Tensor,
        count: usize,
        width: usize,
        to: &Tensor,
        put: impl Fn(&mut F, F) + Sync,
    ) {
        let (from, rows, mut to) = (from.read::<F>(), rows.read::<u32>(), to.write::<F>());
        let rows = &rows[..count];
        to.par_chunks_mut(BLOCK * width).enumerate().for_each(|(block, to)| {
            let first = block * BLOCK;
            let start = rows.partition_point(|&r| (r as usize) < first);
            for (i, &row) in rows[start..].iter().enumerate() {
                let Some(to) = to.get_mut((row as usize - first) * width..(row as usize - first + 1) * width) else {
                    break;
                };
                for (to, &from) in to.iter_mut().zip(&from[(start + i) * width..]) {
                    put(to, from);
                }
            }
        });
    }

    pub fn add_rows<F: Real>(
        (a, a_rows): (&Tensor, &Tensor),
        (b, b_rows): (&Tensor, &Tensor),
        count: usize,
        width: usize,
        to: &Tensor,
    ) {
        let (a, b, mut to) = (a.read::<F>(), b.read::<F>(), to.write::<F>());
        let (a_rows, b_rows) = (a_rows.read::<u32>(), b_rows.read::<u32>());
        to[..count * width].par_chunks_exact_mut(width).enumerate().for_each(|(i, to)| {
            let a = &a[a_rows[i] as usize * width..][..width];
            let b = &b[b_rows[i] as usize * width..][..width];
            vectorized(|| {
                for c in 0..width {
                    to[c] = a[c] + b[c];
                }
            });
        });
    }

    pub fn group_sums<F: Real>(from: &Tensor, groups: Groups<'_>, width: usize, to: &Tensor) {
        let (from, mut to) = (from.read::<F>(), to.write::<F>());
        let (keys, offsets, rows) =
            (groups.keys.read::<u32>(), groups.offsets.read::<u32>(), groups.rows.read::<u32>());
        let (keys, offsets) = (&keys[..groups.count.rows], &offsets[..groups.count.rows + 1]);
        to.par_chunks_mut(BLOCK * width).enumerate().for_each(|(block, to)| {
            let first = block * BLOCK;
            let start = keys.partition_point(|&k| (k as usize) < first);
            for g in start..keys.len() {
                let at = keys[g] as usize - first;
                let Some(to) = to.get_mut(at * width..(at + 1) * width) else { break };
                vectorized(|| {
                    for &row in &rows[offsets[g] as usize..offsets[g + 1] as usize] {
                        for (to, &x) in to.iter_mut().zip(&from[row as usize * width..]) {
                            *to += x;
                        }
                    }
                });
            }
        });
    }
}

/// The launches of `gather.cu`.
mod gpu {
    use super::super::gpu::{blocks, launch, launch_as};
    use super::{Count, Groups};
    use crate::device::Tensor;
    use crate::device::gpu::Gpu;
    use crate::device::launch::{MutPtr, Shape};

    /// Rows of a block of the kernels that move rows.
    const MOVE: usize = 8;
    /// Entries and columns of a warp of the sums, warps of a block, columns of a block of the second pass.
    const WINDOW: usize = 32;
    const COLUMNS: usize = 256;
    const WARPS: usize = 4;
    const SPAN_COLUMNS: usize = 128;

    fn grid(count: Count<'_>) -> Shape {
        Shape::linear(blocks(count.rows, MOVE), 256)
    }

    pub fn gather(gpu: &Gpu, from: &Tensor, rows: &Tensor, count: Count<'_>, width: usize, to: &Tensor) {
        launch_as!(
            gpu,
            from,
            grid(count),
            GatherF32
                | GatherBf16 {
                    to: to.get_mut(),
                    from: from.get(),
                    rows: rows.get(),
                    count: count.get(),
                    C: width as i32,
                }
        );
    }

    pub fn scatter(gpu: &Gpu, from: &Tensor, rows: &Tensor, count: Count<'_>, width: usize, to: &Tensor) {
        launch_as!(
            gpu,
            from,
            grid(count),
            ScatterF32
                | ScatterBf16 {
                    to: to.get_mut(),
                    from: from.get(),
                    rows: rows.get(),
                    count: count.get(),
                    C: width as i32,
                }
        );
    }

    pub fn scatter_add(gpu: &Gpu, from: &Tensor, rows: &Tensor, count: Count<'_>, width: usize, to_acc: &Tensor) {
        launch_as!(
            gpu,
            from,
            grid(count),
            ScatterAddF32
                | ScatterAddBf16 {
                    to_acc: to_acc.get_mut(),
                    from: from.get(),
                    rows: rows.get(),
                    count: count.get(),
                    C: width as i32,
                }
        );
    }

    pub fn zero_rows(gpu: &Gpu, rows: &Tensor, count: Count<'_>, width: usize, to: &Tensor) {
        launch_as!(
            gpu,
            to,
            grid(count),
            ZeroRowsF32 | ZeroRowsBf16 { to: to.get_mut(), rows: rows.get(), count: count.get(), C: width as i32 }
        );
    }

    pub fn add_rows(
        gpu: &Gpu,
        (a, a_rows): (&Tensor, &Tensor),
        (b, b_rows): (&Tensor, &Tensor),
        count: Count<'_>,
        width: usize,
        to: &Tensor,
    ) {
        launch_as!(
            gpu,
            to,
            grid(count),
            AddRowsF32
                | AddRowsBf16 {
                    to: to.get_mut(),
                    a: a.get(),
                    a_rows: a_rows.get(),
                    b: b.get(),
                    b_rows: b_rows.get(),
                    count: count.get(),
                    C: width as i32,
                }
        );
    }

    pub fn round_rows(gpu: &Gpu, from: &Tensor, count: Count<'_>, width: usize, to: &Tensor) {
        let (to, from) = (to.get_mut(), from.get());
        launch!(gpu, grid(count), RoundRowsBf16 { to, from, count: count.get(), C: width as i32 });
    }

    pub fn group_sums(gpu: &Gpu, from: &Tensor, groups: Groups<'_>, width: usize, to_acc: &Tensor) {
        let windows = groups.entries.div_ceil(WINDOW);
        let partials: MutPtr<f32> = gpu.scratch(windows * (2 * width + 2));
        let spans = MutPtr::<u32>::new(partials.offset(windows * 2 * width).address());
        let first = Shape::linear(blocks(windows * width.div_ceil(COLUMNS), WARPS), 32 * WARPS as u32);
        launch_as!(
            gpu,
            from,
            first,
            GroupSumsF32
                | GroupSumsBf16 {
                    to_acc: to_acc.get_mut(),
                    partials,
                    spans,
                    from: from.get(),
                    keys: groups.keys.get(),
                    offsets: groups.offsets.get(),
                    rows: groups.rows.get(),
                    count: groups.count.get(),
                    C: width as i32,
                }
        );
        let second = Shape { grid: [windows as u32, blocks(width, SPAN_COLUMNS), 1], ..Shape::linear(1, 256) };
        launch!(
            gpu,
            second,
            GroupSumsSpans {
                to_acc: to_acc.get_mut(),
                partials: partials.into(),
                spans: spans.into(),
                offsets: groups.offsets.get(),
                count: groups.count.get(),
                C: width as i32,
            }
        );
    }
}
