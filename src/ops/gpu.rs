//! What the GPU sides of the ops share: launches by storage type, and arguments in the kernels' form.

use super::{Count, RowNames, SiteDropout};
use crate::device::gpu::Gpu;
use crate::device::kernels;
use crate::device::launch::{ConstPtr, MutPtr, Shape};
use crate::device::{DType, Element, Tensor};
use crate::rng;

/// Queues a kernel unless the grid is empty.
macro_rules! launch {
    ($gpu:expr, $shape:expr, $kernel:ident { $($field:tt)* }) => {{
        let shape: $crate::device::launch::Shape = $shape;
        if !shape.grid.contains(&0) {
            $gpu.keep(|| $crate::device::kernels::$kernel { $($field)* }.launch($gpu, shape));
        }
    }};
}
pub(crate) use launch;

/// [`launch!`] of the first kernel for f32 storage, of the second for bf16 or the type that is named.
macro_rules! launch_as {
    ($gpu:expr, $storage:expr, $shape:expr, $f32:ident | $bf16:ident $fields:tt) => {
        $crate::ops::gpu::launch_as!($gpu, $storage, $shape, F32: $f32 | BF16: $bf16 $fields)
    };
    ($gpu:expr, $storage:expr, $shape:expr, F32: $f32:ident | $narrow:ident: $kernel:ident $fields:tt) => {
        match $storage.dtype() {
            $crate::device::DType::F32 => $crate::ops::gpu::launch!($gpu, $shape, $f32 $fields),
            $crate::device::DType::$narrow => $crate::ops::gpu::launch!($gpu, $shape, $kernel $fields),
            other => panic!("{} for {other:?}", stringify!($f32)),
        }
    };
}
pub(crate) use launch_as;

impl Count<'_> {
    /// The true number, for a kernel.
    pub(super) fn get(&self) -> ConstPtr<i32> {
        match self.exact {
            Some(exact) => ConstPtr::new(exact.get::<u32>().address()),
            None => panic!("a kernel needs the number of rows in device memory"),
        }
    }

    /// Zeroes the rows past the true number of two matrices (start, width, rows apart, all in elements) whose rows are summed over.
    pub(super) fn zero_tails(&self, gpu: &Gpu, a: &Rows<'_>, b: Option<&Rows<'_>>) {
        if self.exact.is_none() {
            return;
        }
        let shape = Shape::linear(gpu.facts().multiprocessors.min(self.rows as u32), 256);
        let (count, bound) = (self.get(), self.rows as i32);
        match a.tensor.dtype() {
            DType::BF16 => {
                let null = (MutPtr::null(), 0, 0);
                let ((a, a_width, a_stride), (b, b_width, b_stride)) = (a.get(), b.map_or(null, Rows::get));
                launch!(gpu, shape, ZeroTailsBf16 { a, a_width, a_stride, b, b_width, b_stride, count, bound });
            }
            _ => {
                let null = (MutPtr::null(), 0, 0);
                let ((a, a_width, a_stride), (b, b_width, b_stride)) = (a.get(), b.map_or(null, Rows::get));
                launch!(gpu, shape, ZeroTailsF32 { a, a_width, a_stride, b, b_width, b_stride, count, bound });
            }
        }
    }
}

/// Rows of a matrix that a kernel writes.
pub(super) struct Rows<'a> {
    pub tensor: &'a Tensor,
    pub offset: usize,
    pub width: usize,
    pub stride: usize,
}

impl<'a> Rows<'a> {
    /// All of a dense matrix.
    pub fn dense(tensor: &'a Tensor, width: usize) -> Self {
        Rows { tensor, offset: 0, width, stride: width }
    }

    fn get<T: Element>(&self) -> (MutPtr<T>, i32, i32) {
        (self.tensor.get_mut::<T>().offset(self.offset), self.width as i32, self.stride as i32)
    }
}

/// The names of rows, for a kernel.
pub(super) fn names(n: &RowNames<'_>) -> kernels::RowNames {
    kernels::RowNames { samples: n.samples.get(), sequence: n.sequence.get(), position: n.position.get() }
}

/// Dropout, its site and the names it is drawn under; nothing is read where there is none.
pub(super) fn dropout(
    gpu: &Gpu,
    dropout: Option<(SiteDropout, RowNames<'_>)>,
) -> (kernels::Dropout, u32, kernels::RowNames) {
    match dropout {
        Some((site, rows)) => (gpu.dropout(&site.mask), site.site, names(&rows)),
        None => {
            let (samples, sequence, position) = (ConstPtr::null(), ConstPtr::null(), ConstPtr::null());
            (gpu.dropout(&rng::Dropout::OFF), 0, kernels::RowNames { samples, sequence, position })
        }
    }
}

/// Blocks for `n` pieces of work of which a block takes `each`.
pub(super) fn blocks(n: usize, each: usize) -> u32 {
    n.div_ceil(each) as u32
}

/// Rows that a block of the row kernels works on at a time (`rows_of_block` in `rows.cuh`).
pub(super) fn rows_of_block(width: usize) -> usize {
    if width <= 1024 { 4 } else { 1 }
}

/// Blocks that work through `rows` rows, as many as are resident at once with `each` on a multiprocessor.
pub(super) fn resident_blocks(gpu: &Gpu, rows: usize, width: usize, each: u32) -> u32 {
    blocks(rows, rows_of_block(width)).min(each * gpu.facts().multiprocessors)
}
