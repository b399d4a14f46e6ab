//! Pooling over packed sequences and L2 normalisation.

use crate::harness::*;
use half::bf16;
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::kernels::*;
use retromae_engine::device::launch::{ConstPtr, MutPtr, Shape};
use retromae_engine::device::{DType, Device, Tensor};
use retromae_engine::error::Result;
use retromae_engine::ops::pool::{self, Pooling};

/// Sequences of the capacity that are not in use.
const SPARE: usize = 3;

/// Entry points of one storage type. `true`: mean.
trait Kernels: Storage {
    fn pool(on: &'static Gpu, grid: Shape, y: MutPtr<Self>, x: ConstPtr<Self>, s: &Sequences, c: i32) -> Result<()>;
    fn pool_back(
        on: &'static Gpu,
        grid: Shape,
        dx: MutPtr<Self>,
        dy: ConstPtr<Self>,
        s: &Sequences,
        c: i32,
    ) -> Result<()>;
    fn normalize(
        on: &'static Gpu,
        y: MutPtr<Self>,
        norm: &Buffer<f32>,
        x: ConstPtr<Self>,
        rows: usize,
        c: i32,
    ) -> Result<()>;
    fn normalize_back(
        on: &'static Gpu,
        dx: MutPtr<Self>,
        dy: ConstPtr<Self>,
        y: ConstPtr<Self>,
        norm: &Buffer<f32>,
        rows: usize,
        c: i32,
    ) -> Result<()>;
}

/// Borders of sequences and their number, on a device.
struct Sequences {
    borders: Buffer<u32>,
    count: Buffer<i32>,
    mean: i32,
}

/// A launch over `rows` rows and some that are not in use.
fn rows_shape(rows: usize) -> Shape {
    Shape::linear((rows + SPARE).div_ceil(8) as u32, 256)
}

macro_rules! kernels {
    ($t:ty, $pool:ident, $pool_back:ident, $normalize:ident, $normalize_back:ident) => {
        impl Kernels for $t {
            fn pool(on: &'static Gpu, at: Shape, y: MutPtr<$t>, x: ConstPtr<$t>, s: &Sequences, c: i32) -> Result<()> {
                let (cu_seqlens, sequences, mean) = (s.borders.get(), s.count.get(), s.mean);
                $pool { y, x, cu_seqlens, sequences, C: c, mean }.launch(on, at)
            }

            fn pool_back(
                on: &'static Gpu,
                at: Shape,
                dx: MutPtr<$t>,
                dy: ConstPtr<$t>,
                s: &Sequences,
                c: i32,
            ) -> Result<()> {
                let (cu_seqlens, sequences, mean) = (s.borders.get(), s.count.get(), s.mean);
                $pool_back { dx, dy, cu_seqlens, sequences, C: c, mean }.launch(on, at)
            }

            fn normalize(
                on: &'static Gpu,
                y: MutPtr<$t>,
                norm: &Buffer<f32>,
                x: ConstPtr<$t>,
                rows: usize,
                c: i32,
            ) -> Result<()> {
                let (count, norm) = (Buffer::of(on, &[rows as i32]), norm.get_mut());
                $normalize { y, norm, x, sequences: count.get(), C: c }.launch(on, rows_shape(rows))
            }

            fn normalize_back(
                on: &'static Gpu,
                dx: MutPtr<$t>,
                dy: ConstPtr<$t>,
                y: ConstPtr<$t>,
                norm: &Buffer<f32>,
                rows: usize,
                c: i32,
            ) -> Result<()> {
                let (count, norm) = (Buffer::of(on, &[rows as i32]), norm.get());
                $normalize_back { dx, dy, y, norm, sequences: count.get(), C: c }.launch(on, rows_shape(rows))
            }
        }
    };
}
kernels!(f32, PoolForwardF32, PoolBackwardF32, NormalizeForwardF32, NormalizeBackwardF32);
kernels!(bf16, PoolForwardBf16, PoolBackwardBf16, NormalizeForwardBf16, NormalizeBackwardBf16);

fn check_pool<T: Kernels>(lengths: &[usize], width: usize, pooling: Pooling) {
    let (sequences, tokens) = (lengths.len(), lengths.iter().sum::<usize>());
    let (x, dy) = (rounded::<T>(&normal(tokens * width, 1)), rounded::<T>(&normal(sequences * width, 2)));
    let borders: Vec<u32> = (0..=sequences).map(|s| lengths[..s].iter().sum::<usize>() as u32).collect();
    let got = in_every_order(|on| {
        let s = Sequences {
            borders: Buffer::of(on, &borders),
            count: Buffer::of(on, &[sequences as i32]),
            mean: i32::from(pooling == Pooling::Mean),
        };
        let grid = [(sequences + SPARE) as u32, width.div_ceil(256) as u32, 1];
        let (shape, c) = (Shape { grid, ..Shape::linear(1, 256) }, width as i32);
        let (dx, y) =
            (Buffer::poisoned(on, (tokens + SPARE) * width), Buffer::poisoned(on, (sequences + SPARE) * width));
        T::pool(on, shape, y.get_mut(), stored::<T>(on, &x, 0).get(), &s, c).expect("a correct kernel raises nothing");
        T::pool_back(on, shape, dx.get_mut(), stored::<T>(on, &dy, 0).get(), &s, c)
            .expect("a correct kernel raises nothing");
        vec![widened::<T>(y.take(sequences * width)), widened::<T>(dx.take(tokens * width))]
    });
    let cu_seqlens = Tensor::from_slice(&borders);
    let shape = pool::Shape { sequences: sequences.into(), width, cu_seqlens: &cu_seqlens, pooling };
    let (y, dx) = (Tensor::zeros(DType::F64, sequences * width), Tensor::zeros(DType::F64, tokens * width));
    pool::forward(Device::Cpu, shape, &Tensor::from_slice(&f64s(&x)), &y);
    pool::backward(Device::Cpu, shape, &Tensor::from_slice(&f64s(&dy)), &dx);
    let (y, dx) = (y.to_vec::<f64>(), dx.to_vec::<f64>());
    let narrow = |v: &[f64]| rounded::<T>(&v.iter().map(|&v| v as f32).collect::<Vec<_>>());
    judge::<T>("y", &got[0], &y, &narrow(&y));
    judge::<T>("dx", &got[1], &dx, &narrow(&dx));
}

#[test]
fn pools_as_the_cpu_does() {
    for pooling in [Pooling::Cls, Pooling::Mean] {
        // One lane of one warp; one row more than warps; several unrolled loops of rows; one lane in a second block of columns; BERT's
        // width in three full blocks.
        for (lengths, width) in [(&[1][..], 8), (&[9, 1, 3], 16), (&[130, 1, 64], 32), (&[2, 7], 264), (&[5, 12], 768)]
        {
            check_pool::<f32>(lengths, width, pooling);
            check_pool::<bf16>(lengths, width, pooling);
        }
    }
}

/// y, norm and dx on the emulator, in place where `in_place`.
fn normalized<T: Kernels>(x: &[f32], dy: &[f32], width: usize, in_place: bool) -> Vec<Vec<f32>> {
    let rows = x.len() / width;
    in_every_order(|on| {
        let room = SPARE * width;
        let (x, dy, norm) =
            (stored::<T>(on, x, room), stored::<T>(on, dy, room), Buffer::<f32>::poisoned(on, rows + SPARE));
        let apart = [Buffer::poisoned(on, (rows + SPARE) * width), Buffer::poisoned(on, (rows + SPARE) * width)];
        let [y, dx] = if in_place { [&x, &dy] } else { apart.each_ref() };
        let c = width as i32;
        T::normalize(on, y.get_mut(), &norm, x.get(), rows, c).expect("a correct kernel raises nothing");
        T::normalize_back(on, dx.get_mut(), dy.get(), y.get(), &norm, rows, c)
            .expect("a correct kernel raises nothing");
        vec![widened::<T>(y.take(rows * width)), norm.take(rows), widened::<T>(dx.take(rows * width))]
    })
}

/// y, norm and dx of the CPU in f64; with `y` given, dx from that.
fn exact(x: &[f32], dy: &[f32], width: usize, y: Option<&[f32]>) -> [Vec<f64>; 3] {
    let rows = x.len() / width;
    let zeros = |len: usize| Tensor::zeros(DType::F64, len);
    let (y_out, norm, dx) = (zeros(x.len()), zeros(rows), zeros(x.len()));
    pool::normalize(Device::Cpu, (rows.into(), width), &Tensor::from_slice(&f64s(x)), &y_out, &norm);
    let saved = y.map_or(y_out.clone(), |y| Tensor::from_slice(&f64s(y)));
    pool::normalize_backward(Device::Cpu, (rows.into(), width), &saved, &norm, &Tensor::from_slice(&f64s(dy)), &dx);
    [y_out.to_vec(), norm.to_vec(), dx.to_vec()]
}

fn check_normalize<T: Kernels>(rows: usize, width: usize, deviation: f32) {
    let x = rounded::<T>(&normal(rows * width, 1).iter().map(|x| x * deviation).collect::<Vec<_>>());
    let dy = rounded::<T>(&normal(rows * width, 2));
    let got = normalized::<T>(&x, &dy, width, false);
    let [y, norm, dx] = exact(&x, &dy, width, None);
    // A plain implementation rounds y, and its gradient once more.
    let narrow = |v: &[f64]| rounded::<T>(&v.iter().map(|&v| v as f32).collect::<Vec<_>>());
    let plain_y = narrow(&y);
    let plain_dx = narrow(&exact(&x, &dy, width, Some(&plain_y))[2]);
    judge::<T>("y", &got[0], &y, &plain_y);
    judge::<f32>("norm", &got[1], &norm, &[]);
    judge::<T>("dx", &got[2], &dx, &plain_dx);
    assert!(normalized::<T>(&x, &dy, width, true) == got, "in place");
}

#[test]
fn normalizes_as_the_cpu_does() {
    // One lane; more rows than warps; a width over one pass of a warp; BERT's; rows shorter than the divisor's least value.
    for (rows, width, deviation) in [(1, 8, 1.0), (9, 48, 1.0), (3, 264, 30.0), (4, 768, 1.0), (3, 16, 1e-14)] {
        check_normalize::<f32>(rows, width, deviation);
        check_normalize::<bf16>(rows, width, deviation);
    }
}

#[test]
fn a_row_of_zeros_stays_one() {
    let (x, dy) = (vec![0.0; 16], rounded::<bf16>(&normal(16, 2)));
    let got = normalized::<bf16>(&x, &dy, 16, false);
    assert_eq!((&got[0], &got[1]), (&x, &vec![0.0]));
    judge::<f32>("dx", &normalized::<f32>(&x, &dy, 16, false)[2], &exact(&x, &dy, 16, None)[2], &[]);
}
