//! Each primitive of `common.cuh`, `mma.cuh` and `hopper.cuh` against a plain definition, through `kernels/conformance*.cu`.
//!
//! So that no misreading of the PTX manual stays hidden in an emulated body, these also run on a GPU, as `RETROMAE_DEVICE` says, and
//! `RETROMAE_RECORD=<folder>` keeps what each kernel wrote. What a GPU wrote is judged from then on as the emulator's results are.

use crate::device::*;
use crate::support::{assert_close, normal, relative_error, to_bf16};
use half::{bf16, f16};
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::kernels::*;
use retromae_engine::device::launch::{Kernel, Shape, TensorLayout, TensorMap};
use retromae_engine::error::Result;
use retromae_engine::rng;
use std::path::Path;

/// `<kernel>.bin`: what it wrote on a GPU, all its outputs one after the other.
const RECORDED: &str = "tests/golden/conformance";

/// Outputs of one kernel, bit for bit.
type Outputs = Vec<Vec<f32>>;

/// Runs `case` in every order and returns what the kernel wrote, and what it wrote on a GPU where that was recorded.
fn everywhere(kernel: &Kernel, case: impl Fn(&'static Gpu) -> Result<Outputs>) -> Vec<Outputs> {
    let own = in_every_order(|gpu| case(gpu).expect("a correct kernel raises nothing"));
    let file = format!("{}.bin", kernel.name);
    if let Some(folder) = std::env::var_os("RETROMAE_RECORD") {
        let facts = gpu().facts();
        std::fs::create_dir_all(&folder).expect("the folder can be made");
        std::fs::write(Path::new(&folder).join("device.txt"), format!("{}, {}\n", facts.name, facts.software))
            .and_then(|()| std::fs::write(Path::new(&folder).join(&file), bytemuck::cast_slice(&own.concat())))
            .expect("the folder takes files");
    }
    let Ok(bytes) = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(RECORDED).join(&file)) else {
        println!("left out: {RECORDED}/{file} was not recorded on a GPU yet");
        return vec![own];
    };
    let mut all: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
    let recorded = own.iter().map(|part| all.drain(..part.len()).collect()).collect();
    assert!(all.is_empty(), "{file} has another size");
    vec![own, recorded]
}

/// All elements of a buffer as they are.
fn raw<T: bytemuck::Pod>(buffer: &Buffer<T>, len: usize) -> Vec<f32> {
    bytemuck::pod_collect_to_vec(&buffer.take(len))
}

fn bits<T: bytemuck::Pod>(output: &[f32]) -> Vec<T> {
    bytemuck::pod_collect_to_vec(output)
}

#[test]
fn ldmatrix_moves_rows_and_columns_where_the_manual_says() {
    let tile: Vec<u16> = (0..256).collect();
    let outputs = everywhere(ConformanceLdmatrix::kernel(), |gpu| {
        let (out, tile) = (Buffer::<u32>::poisoned(gpu, 6 * 4 * 32), Buffer::of(gpu, &tile));
        ConformanceLdmatrix { out: out.get_mut(), tile: tile.get() }.launch(gpu, Shape::linear(1, 32))?;
        Ok(vec![raw(&out, 6 * 4 * 32)])
    });
    let element = |matrix: usize, row: usize, column: usize| u32::from(tile[(matrix * 8 + row) * 8 + column]);
    for out in outputs.iter().map(|out| bits::<u32>(&out[0])) {
        for (form, matrices) in [1, 2, 4, 1, 2, 4].into_iter().enumerate() {
            for (matrix, lane) in (0..matrices).flat_map(|matrix| (0..32).map(move |lane| (matrix, lane))) {
                let (row, column) = (lane / 4, lane % 4 * 2);
                let want = match form < 3 {
                    true => element(matrix, row, column) | element(matrix, row, column + 1) << 16,
                    false => element(matrix, column, row) | element(matrix, column + 1, row) << 16,
                };
                assert_eq!(out[(form * 4 + matrix) * 32 + lane], want, "form {form}, matrix {matrix}, lane {lane}");
            }
        }
    }
}

/// a [m, k] times b [k, n] plus c, in f64.
fn product(a: &[f32], b: &[f32], c: &[f32], (m, n, k): (usize, usize, usize)) -> Vec<f32> {
    let cell = |i: usize| {
        let (row, column) = (i / n, i % n);
        let sum: f64 = (0..k).map(|x| f64::from(a[row * k + x]) * f64::from(b[x * n + column])).sum();
        (sum + f64::from(c[i])) as f32
    };
    (0..m * n).map(cell).collect()
}

fn widen(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|v| v.to_f32()).collect()
}

#[test]
fn mma_bf16_multiplies() {
    let (a, b, c) = (to_bf16(&normal(1, 256)), to_bf16(&normal(2, 128)), normal(3, 128));
    let outputs = everywhere(ConformanceMmaBf16::kernel(), |gpu| {
        let (a, b, c, d) = (Buffer::of(gpu, &a), Buffer::of(gpu, &b), Buffer::of(gpu, &c), Buffer::poisoned(gpu, 128));
        ConformanceMmaBf16 { d: d.get_mut(), a: a.get(), b: b.get(), c: c.get() }.launch(gpu, Shape::linear(1, 32))?;
        Ok(vec![raw(&d, 128)])
    });
    for d in outputs {
        assert_close("d", &d[0], &product(&widen(&a), &widen(&b), &c, (16, 8, 16)), 1e-6);
    }
}

#[test]
fn mma_f16_multiplies() {
    let half = |values: Vec<f32>| values.into_iter().map(f16::from_f32).collect::<Vec<_>>();
    let (mut a, b, c) = (half(normal(1, 256)), half(normal(2, 128)), normal(3, 128));
    // A row of denormals, whose products count beside a zero, and one near the largest number, whose products only f32 holds.
    a[..16].iter_mut().zip(1..).for_each(|(x, i)| *x = f16::from_bits(i));
    a[16..32].fill(f16::MAX);
    let mut c = c;
    c[..8].fill(0.0);
    let outputs = everywhere(ConformanceMmaF16::kernel(), |gpu| {
        let (a, b, c, d) = (Buffer::of(gpu, &a), Buffer::of(gpu, &b), Buffer::of(gpu, &c), Buffer::poisoned(gpu, 128));
        ConformanceMmaF16 { d: d.get_mut(), a: a.get(), b: b.get(), c: c.get() }.launch(gpu, Shape::linear(1, 32))?;
        Ok(vec![raw(&d, 128)])
    });
    let widen = |values: &[f16]| values.iter().map(|v| v.to_f32()).collect::<Vec<_>>();
    let exact = product(&widen(&a), &widen(&b), &c, (16, 8, 16));
    for d in outputs {
        for (d, exact) in [0..8, 8..16, 16..128].map(|part| (&d[0][part.clone()], &exact[part])) {
            assert_close("d", d, exact, 1e-6);
        }
    }
}

#[test]
fn f16_rounds_as_on_the_device() {
    let all = (0..=u16::MAX).map(f16::from_bits).filter(|half| !half.is_nan());
    // Every number of f16, and half way to its neighbours: ties go to the even one.
    let mut x: Vec<f32> = all.clone().map(f16::to_f32).collect();
    let next = |half: f16| f16::from_bits(half.to_bits() + 1).to_f32();
    x.extend(
        all.filter(|half| half.is_finite() && next(*half).is_finite()).map(|half| (half.to_f32() + next(half)) / 2.0),
    );
    x.extend(normal(1, 1000));
    // The last that rounds down to 65504, and the first that does not.
    x.extend([
        65519.99,
        65520.0,
        1e9,
        -65520.0,
        2f32.powi(-25),
        2f32.powi(-25) * 1.001,
        f32::MIN_POSITIVE,
        1e-45,
        f32::NAN,
    ]);
    // Records are whole words.
    x.resize(x.len().next_multiple_of(2), 0.1);
    let n = x.len();
    let outputs = everywhere(ConformanceF16::kernel(), |gpu| {
        let (half, back) = (Buffer::<f16>::poisoned(gpu, n), Buffer::<f32>::poisoned(gpu, n));
        let x = Buffer::of(gpu, &x);
        ConformanceF16 { half: half.get_mut(), back: back.get_mut(), x: x.get(), n: n as i32 }
            .launch(gpu, Shape::linear(n.div_ceil(32) as u32, 32))?;
        Ok(vec![raw(&half, n), raw(&back, n)])
    });
    for (half, back) in outputs.iter().map(|out| (bits::<f16>(&out[0]), &out[1])) {
        for ((&x, &half), &back) in x.iter().zip(&half).zip(back) {
            if x.is_nan() {
                assert!(half.is_nan() && back.is_nan(), "{half} and {back} of a NaN");
                continue;
            }
            let want = f16::from_f32(x);
            assert_eq!((half.to_bits(), back.to_bits()), (want.to_bits(), want.to_f32().to_bits()), "{x}");
        }
    }
}

/// f32 with ten bits of mantissa, to nearest, ties away from zero.
fn tf32(x: f32) -> f32 {
    f32::from_bits(x.to_bits().wrapping_add(0x1000) & 0xffff_e000)
}

#[test]
fn mma_tf32_multiplies_rounded_inputs() {
    let (a, b, c) = (normal(1, 128), normal(2, 64), normal(3, 128));
    let outputs = everywhere(ConformanceMmaTf32::kernel(), |gpu| {
        let (a, b, c, d) = (Buffer::of(gpu, &a), Buffer::of(gpu, &b), Buffer::of(gpu, &c), Buffer::poisoned(gpu, 128));
        ConformanceMmaTf32 { d: d.get_mut(), a: a.get(), b: b.get(), c: c.get() }.launch(gpu, Shape::linear(1, 32))?;
        Ok(vec![raw(&d, 128)])
    });
    let round = |v: &[f32]| v.iter().map(|&x| tf32(x)).collect::<Vec<_>>();
    for d in outputs {
        assert_close("d", &d[0], &product(&round(&a), &round(&b), &c, (16, 8, 8)), 1e-6);
        assert!(relative_error(&d[0], &product(&a, &b, &c, (16, 8, 8))) > 1e-6, "the inputs were not rounded");
    }
}

#[test]
fn cp_async_fills_with_zeros_what_it_does_not_read() {
    let x: Vec<u32> = (1..=128).collect();
    let valid: Vec<i32> = (0..32).map(|lane| lane % 5 * 4).collect();
    let outputs = everywhere(ConformanceCpAsync::kernel(), |gpu| {
        let (out, x, valid) = (Buffer::<u32>::poisoned(gpu, 160), Buffer::of(gpu, &x), Buffer::of(gpu, &valid));
        ConformanceCpAsync { out: out.get_mut(), x: x.get(), valid: valid.get() }.launch(gpu, Shape::linear(1, 32))?;
        Ok(vec![raw(&out, 160)])
    });
    for out in outputs.iter().map(|out| bits::<u32>(&out[0])) {
        for lane in 0..32 {
            let words = valid[lane] as usize / 4;
            let want = |word: usize| if word < words { x[lane * 4 + word] } else { 0 };
            assert_eq!(out[lane * 5..lane * 5 + 5], [want(0), want(1), want(2), want(3), want(0)], "lane {lane}");
        }
    }
}

#[test]
fn conversions_round_as_on_the_device() {
    let mut x = normal(1, 1000);
    // Two ties between neighbouring bf16 values: one rounds down to even, one up.
    let ties = [1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8)];
    x.extend([0.0, -0.0, 1.0, f32::INFINITY, f32::NEG_INFINITY, -127.5, ties[0], ties[1]]);
    let n = x.len();
    let outputs = everywhere(ConformanceConversions::kernel(), |gpu| {
        let (out, narrow) = (Buffer::<u32>::poisoned(gpu, 4 * n), Buffer::<bf16>::poisoned(gpu, n));
        let x = Buffer::of(gpu, &x);
        ConformanceConversions { out: out.get_mut(), narrow: narrow.get_mut(), x: x.get(), n: n as i32 }
            .launch(gpu, Shape::linear(n.div_ceil(8 * 32) as u32, 32))?;
        Ok(vec![raw(&out, 4 * n), raw(&narrow, n)])
    });
    for (out, narrow) in outputs.iter().map(|out| (bits::<u32>(&out[0]), bits::<u16>(&out[1]))) {
        for (i, &v) in x.iter().enumerate() {
            let power = f64::from(f32::from_bits(out[i]));
            let exact = f64::from(v).exp2();
            let flushed = if exact < f64::from(f32::MIN_POSITIVE) { 0.0 } else { exact };
            assert!((power - flushed).abs() <= 1e-6 * flushed || power == flushed, "ex2({v}) = {power}");
            let rounded = if v.is_finite() { tf32(v) } else { v };
            assert_eq!(out[n + i], rounded.to_bits(), "tf32 of {v}");
            let half = bf16::from_f32(v);
            assert_eq!(out[2 * n + i], u32::from(half.to_bits()), "bf16 of {v}");
            assert_eq!((narrow[i], out[3 * n + i]), (half.to_bits(), half.to_f32().to_bits()), "8 at a time, {v}");
        }
    }
}

#[test]
fn reductions_and_shuffles_reach_the_lanes_they_name() {
    let x = [32, 96, 1024].map(|threads| normal(1, threads));
    let outputs = everywhere(ConformanceReductions::kernel(), |gpu| {
        let run = |x: &Vec<f32>| {
            let (out, on_gpu) = (Buffer::poisoned(gpu, 8 * x.len()), Buffer::of(gpu, x));
            ConformanceReductions { out: out.get_mut(), x: on_gpu.get() }
                .launch(gpu, Shape::linear(1, x.len() as u32))?;
            Ok(out.take(8 * x.len()))
        };
        x.iter().map(run).collect()
    });
    for (out, x) in outputs.iter().flat_map(|out| out.iter().zip(&x)) {
        let threads = x.len();
        let row = |i: usize| out[i * threads..(i + 1) * threads].to_vec();
        let max = |v: &[f32]| v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let of_warps = |f: &dyn Fn(&[f32]) -> f32| x.chunks(32).flat_map(|w| vec![f(w); 32]).collect::<Vec<_>>();
        let sum = |v: &[f32]| v.iter().map(|&x| f64::from(x)).sum::<f64>() as f32;
        assert_close("warp sum", &row(0), &of_warps(&sum), 1e-6);
        assert_eq!(row(1), of_warps(&max));
        assert_close("block sum", &row(2), &vec![sum(x); threads], 1e-5);
        assert_eq!(row(3), vec![max(x); threads]);
        let lanes =
            |source: &dyn Fn(usize) -> usize| (0..threads).map(|t| x[t / 32 * 32 + source(t % 32)]).collect::<Vec<_>>();
        assert_eq!(row(4), lanes(&|l| l ^ 5));
        assert_eq!(row(5), lanes(&|l| l / 8 * 8 + 3));
        assert_eq!(row(6), lanes(&|l| if l + 7 < 32 { l + 7 } else { l }));
        assert_eq!(row(7), lanes(&|l| if l % 8 >= 2 { l - 2 } else { l }));
    }
}

#[test]
fn dropout_draws_the_same_bits_as_the_cpu() {
    const GROUPS: usize = 100;
    let drop = rng::Dropout::new(42, 7, 0.1);
    // A sample number above 32 bits, and the largest position and site of their fields.
    let names = [(1, 5, 0), (3, 0x1_2345_6789, 511), (0xffff, 9, 0xffff)];
    let outputs = everywhere(ConformanceDropout::kernel(), |gpu| {
        let key = Buffer::of(gpu, &drop.key);
        let d = Dropout { key: key.get(), threshold: drop.threshold, scale: drop.scale() as f32 };
        let mut all = Vec::new();
        for (site, sample, position) in names {
            let (out, ones) = (Buffer::<u16>::poisoned(gpu, GROUPS * 8), Buffer::poisoned(gpu, GROUPS * 8));
            let (out_pointer, kept, groups) = (out.get_mut(), ones.get_mut(), GROUPS as i32);
            ConformanceDropout { out: out_pointer, kept, d, site, sample, position, groups }
                .launch(gpu, Shape::linear(2, 64))?;
            all.extend([raw(&out, GROUPS * 8), ones.take(GROUPS * 8)]);
        }
        Ok(all)
    });
    for (out, (site, sample, position)) in outputs.iter().flat_map(|out| out.chunks_exact(2).zip(names)) {
        let want: Vec<u16> = (0..GROUPS as u32).flat_map(|group| drop.bits(site, sample, position, group)).collect();
        assert_eq!(bits::<u16>(&out[0]), want);
        let scale = drop.scale() as f32;
        let masked: Vec<f32> = want.iter().map(|&b| if u32::from(b) < drop.threshold { 0.0 } else { scale }).collect();
        assert_eq!(out[1], masked);
    }
}

/// M, N and K of the products. Three steps of K: the ring of two stages wraps.
const SIZES: (usize, usize, usize) = (128, 128, 192);

/// c [m, n] = a b, by TMA and wgmma: grid for tiles of `tile` columns, and the operands' maps. By columns, a is [k, m] and b [k, n]; else
/// they are [m, k] and [n, k].
fn wgmma(
    kernel: &Kernel,
    (tile, a_by_columns, b_by_columns): (usize, bool, bool),
    launch: impl Fn(&'static Gpu, Shape, &Buffer<f32>, [TensorMap; 2]) -> Result<()>,
) {
    let (m, n, k) = SIZES;
    let (a, b) = (to_bf16(&normal(1, m * k)), to_bf16(&normal(2, k * n)));
    let left = if a_by_columns { (0..m * k).map(|i| a[i % m * k + i / m]).collect() } else { a.clone() };
    let right = if b_by_columns { b.clone() } else { (0..n * k).map(|i| b[i % k * n + i / k]).collect() };
    let outputs = everywhere(kernel, |gpu| {
        let (a, b, c) = (Buffer::of(gpu, &left), Buffer::of(gpu, &right), Buffer::poisoned(gpu, m * n));
        let map = |x: &Buffer<bf16>, width: usize, height: usize| {
            gpu.tensor_map(&TensorLayout {
                base: x.get().address(),
                width: width as u64,
                height: height as u64,
                row_bytes: width as u64 * 2,
                ..LAYOUT
            })
        };
        let left = if a_by_columns { map(&a, m, k)? } else { map(&a, k, m)? };
        let maps = [left, if b_by_columns { map(&b, n, k)? } else { map(&b, k, n)? }];
        let stage = 8192 + 128 * tile as u32;
        let grid = [(n / tile) as u32, (m / 64) as u32, 1];
        launch(gpu, Shape { grid, block: [160, 1, 1], shared_bytes: 2 * stage + 32 }, &c, maps)?;
        Ok(vec![c.take(m * n)])
    });
    for c in outputs {
        assert_close(kernel.name, &c[0], &product(&widen(&a), &widen(&b), &vec![0.0; m * n], SIZES), 1e-6);
    }
}

#[test]
fn wgmma_multiplies_what_tma_brings() {
    let (major, minor) = gpu().facts().capability;
    if major != 9 {
        println!("left out: TMA and wgmma on a GPU of compute capability {major}.{minor}; they are those of 9.0");
        return;
    }
    macro_rules! each {
        ($($tile:literal $a:literal $b:literal $kernel:ident)*) => {
            $(wgmma($kernel::kernel(), ($tile, $a, $b), |gpu, shape, c, [a, b]| {
                $kernel { c: c.get_mut(), a, b, N: SIZES.1 as i32, K: SIZES.2 as i32 }.launch(gpu, shape)
            });)*
        };
    }
    each!(64 false false ConformanceWgmma64Nk 64 false true ConformanceWgmma64Kn
        64 false false ConformanceWgmma64NkRegisters 64 false true ConformanceWgmma64KnRegisters
        128 false false ConformanceWgmma128Nk 128 false true ConformanceWgmma128Kn
        64 true true ConformanceWgmma32KmKn);
}

/// Boxes of 64 x 64 bf16.
const LAYOUT: TensorLayout = TensorLayout {
    base: 0x1000,
    width: 128,
    height: 64,
    row_bytes: 256,
    box_width: 64,
    box_height: 64,
    element_bytes: 2,
    swizzle_128b: true,
};

#[test]
fn tensor_maps_that_the_driver_refuses_are_refused() {
    if !emulated("a device that takes any address") {
        return;
    }
    assert!(gpu().tensor_map(&LAYOUT).is_ok());
    let bad = [
        TensorLayout { base: 0x1008, ..LAYOUT },
        TensorLayout { row_bytes: 264, ..LAYOUT },
        TensorLayout { row_bytes: 128, ..LAYOUT },
        TensorLayout { box_width: 128, ..LAYOUT },
        TensorLayout { box_width: 0, ..LAYOUT },
        TensorLayout { box_height: 257, ..LAYOUT },
        TensorLayout { element_bytes: 3, ..LAYOUT },
        TensorLayout { height: 0, ..LAYOUT },
    ];
    for layout in bad {
        assert!(gpu().tensor_map(&layout).is_err(), "{layout:?}");
    }
}
