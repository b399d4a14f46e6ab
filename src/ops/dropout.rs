//! Dropout of rows where no other op includes it: `x ← keep ? x / (1 − p) : 0` in place. It is its own backward.

use super::{Count, RowNames, SiteDropout};
use crate::device::{Device, Tensor};

/// Drops elements of `x [rows, width]`; nothing changes where dropout is off.
pub fn apply(device: Device, dropout: SiteDropout, names: RowNames<'_>, (rows, width): (Count<'_>, usize), x: &Tensor) {
    match device {
        Device::Cpu => super::on_cpu!(x, cpu::apply, dropout, names, rows.rows, width, x),
        Device::Gpu(gpu) => gpu::apply(gpu, dropout, names, rows, width, x),
    }
}

/// The reference: rows in parallel.
mod cpu {
    use super::super::layernorm::cpu::Drop;
    use super::{RowNames, SiteDropout};
    use crate::device::Tensor;
    use crate::device::cpu::{Real, vectorized};
    use rayon::prelude::*;

    pub fn apply<F: Real>(dropout: SiteDropout, names: RowNames<'_>, rows: usize, width: usize, x: &Tensor) {
        let (mut x, drop) = (x.write::<F>(), Drop::new(dropout, &names));
        let Some(drop) = &drop else { return };
        let all = x[..rows * width].par_chunks_exact_mut(width).enumerate();
        all.for_each(|(row, x)| vectorized(|| drop.row_in_place(row, x)));
    }
}

/// The launch of `dropout.cu`.
mod gpu {
    use super::super::gpu::{blocks, launch_as, names as names_of};
    use super::super::{Count, RowNames, SiteDropout};
    use crate::device::Tensor;
    use crate::device::gpu::Gpu;
    use crate::device::launch::Shape;

    pub fn apply(gpu: &Gpu, dropout: SiteDropout, names: RowNames<'_>, rows: Count<'_>, width: usize, x: &Tensor) {
        launch_as!(
            gpu,
            x,
            Shape::linear(blocks(rows.rows, 8), 256),
            DropoutRowsF32
                | DropoutRowsBf16 {
                    x: x.get_mut(),
                    names: names_of(&names),
                    dropout: gpu.dropout(&dropout.mask),
                    site: dropout.site,
                    rows: rows.get(),
                    C: width as i32,
                }
        );
    }
}
