//! Moving rows between matrices: gather, scatter, and sums of groups of rows (the backward of a gather).
//!
//! Sums go through [`Groups`], prepared with the batch, so that every output row is added up in a fixed order without atomics.

use super::Groups;
use crate::device::{Device, Tensor};

/// `to[i] = from[rows[i]]` for `i < count`; rows are `width` wide, `rows` is u32.
pub fn gather(device: Device, from: &Tensor, rows: &Tensor, count: usize, width: usize, to: &Tensor) {
    match device {
        Device::Cpu => super::on_cpu!(from, cpu::gather, from, rows, count, width, to),
    }
}

/// `to[rows[i]] = from[i]` for `i < count`; `rows` ascending and distinct.
pub fn scatter(device: Device, from: &Tensor, rows: &Tensor, count: usize, width: usize, to: &Tensor) {
    match device {
        Device::Cpu => super::on_cpu!(from, cpu::scatter, from, rows, count, width, to, |to, from| *to = from),
    }
}

/// `to[rows[i]] += from[i]` for `i < count`; `rows` ascending and distinct.
pub fn scatter_add(device: Device, from: &Tensor, rows: &Tensor, count: usize, width: usize, to_acc: &Tensor) {
    match device {
        Device::Cpu => super::on_cpu!(from, cpu::scatter, from, rows, count, width, to_acc, |to, from| *to += from),
    }
}

/// `to[keys[g]] += Σ from[rows of g]`; keys ascending.
pub fn group_sums(device: Device, from: &Tensor, groups: Groups<'_>, width: usize, to_acc: &Tensor) {
    match device {
        Device::Cpu => super::on_cpu!(from, cpu::group_sums, from, groups, width, to_acc),
    }
}

/// `to[rows[i]] = 0` for `i < count`; `rows` ascending and distinct.
pub fn zero_rows(device: Device, rows: &Tensor, count: usize, width: usize, to: &Tensor) {
    match device {
        Device::Cpu => super::on_cpu!(to, cpu::zero_rows, rows, count, width, to),
    }
}

/// `to[i] = 0` for the first `count` elements.
pub fn zero(device: Device, to: &Tensor, count: usize) {
    match device {
        Device::Cpu => super::on_cpu!(to, cpu::zero, to, count),
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

    pub fn group_sums<F: Real>(from: &Tensor, groups: Groups<'_>, width: usize, to: &Tensor) {
        let (from, mut to) = (from.read::<F>(), to.write::<F>());
        let (keys, offsets, rows) =
            (groups.keys.read::<u32>(), groups.offsets.read::<u32>(), groups.rows.read::<u32>());
        let (keys, offsets) = (&keys[..groups.count], &offsets[..groups.count + 1]);
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
