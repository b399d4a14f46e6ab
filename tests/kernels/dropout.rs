//! Dropout of rows, in place: what the CPU keeps is kept, and rows past the true number are left alone.

use crate::harness::*;
use half::bf16;
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::kernels::*;
use retromae_engine::device::launch::Shape;
use retromae_engine::device::{Device, Tensor};
use retromae_engine::ops::dropout as op;

const SITE: u32 = 6;
/// Rows of the capacity that are not in use.
const SPARE: usize = 9;

macro_rules! runner {
    ($name:ident, $t:ty, $kernel:ident) => {
        /// The kernel on `x`, all rows of the capacity.
        fn $name(on: &'static Gpu, lengths: &[usize], width: usize, p: f32, x: &[f32]) -> Vec<f32> {
            let rows: usize = lengths.iter().sum();
            let (all, key) = (stored::<$t>(on, x, 0), Buffer::of(on, &dropout(p, SITE).mask.key));
            let (count, names) = (Buffer::of(on, &[rows as i32]), Names::new(lengths).on(on));
            $kernel {
                x: all.get_mut(),
                names: names.get(),
                dropout: device_dropout(dropout(p, SITE), &key),
                site: SITE,
                rows: count.get(),
                C: width as i32,
            }
            .launch(on, Shape::linear((rows + SPARE).div_ceil(8) as u32, 256))
            .expect("a correct kernel raises nothing");
            widened(all.take(x.len()))
        }
    };
}
runner!(run_f32, f32, DropoutRowsF32);
runner!(run_bf16, bf16, DropoutRowsBf16);

type Run = fn(&'static Gpu, &[usize], usize, f32, &[f32]) -> Vec<f32>;

fn judged<T: Storage>(run: Run, lengths: &[usize], width: usize, p: f32) {
    let rows: usize = lengths.iter().sum();
    let x = rounded::<T>(&normal((rows + SPARE) * width, 1));
    let got = &in_every_order(|on| vec![run(on, lengths, width, p, &x)])[0];
    let (names, exact) = (Names::new(lengths), Tensor::from_slice(&f64s(&x[..rows * width])));
    op::apply(Device::Cpu, dropout(p, SITE), names.rows(), (rows.into(), width), &exact);
    let (exact, plain) = (exact.to_vec::<f64>(), rounded::<T>(&names.dropped(&x[..rows * width], dropout(p, SITE))));
    let what = format!("{lengths:?} x {width} at p = {p}");
    judge::<T>(&what, &got[..rows * width], &exact, &plain);
    assert!(got.iter().zip(&exact).all(|(g, e)| (*g == 0.0) == (*e == 0.0)), "{what}: other elements are dropped");
    assert_eq!(got[rows * width..], x[rows * width..], "{what}: rows that are not there were touched");
}

fn check(lengths: &[usize], width: usize, p: f32) {
    judged::<f32>(run_f32, lengths, width, p);
    judged::<bf16>(run_bf16, lengths, width, p);
}

#[test]
fn rows_of_every_width() {
    // Less than a warp's vectors, exactly a warp's, more; a last block that is not full; and none dropped.
    check(&[3, 4], 16, 0.1);
    check(&[1, 15], 256, 0.5);
    check(&[5, 1, 6], 264, 0.1);
    check(&[9], 768, 0.9);
    check(&[2, 2], 48, 0.0);
}
