//! Each primitive of `common.cuh`, `mma.cuh` and `hopper.cuh` against a plain definition, through `kernels/conformance*.cu`.

use crate::libraries;
use crate::support::*;
use half::bf16;
use retromae_engine::device::emulator::{Emulator, Options};
use retromae_engine::device::kernels::*;
use retromae_engine::device::launch::{MutPtr, Shape, TensorLayout};
use retromae_engine::error::Result;
use retromae_engine::rng;

/// Runs `case` on the plain build in every order, and on the checker, which must raise nothing. All outputs must agree bit for bit.
fn everywhere<T: PartialEq + std::fmt::Debug>(case: impl Fn(&Emulator) -> Result<T>) -> T {
    let plain = Emulator::new(Options::default()).expect("the emulator is linked in");
    let first = case(&plain).expect("a correct kernel raises nothing");
    for options in every_order() {
        let again = case(&plain.with(options)).expect("a correct kernel raises nothing");
        assert!(first == again, "{options:?} changes the result");
    }
    let check = Emulator::from_library(libraries::check(), Options::default()).expect("it loads");
    assert!(first == case(&check).expect("no false alarm"), "the checker changes the result");
    first
}

#[test]
fn ldmatrix_moves_rows_and_columns_where_the_manual_says() {
    let tile: Vec<u16> = (0..256).collect();
    let out = everywhere(|device| {
        let (out, tile) = (Buffer::<u32>::new(device, 6 * 4 * 32), Buffer::from(device, &tile));
        ConformanceLdmatrix { out: out.get_mut(), tile: tile.get() }.launch(device, Shape::linear(1, 32))?;
        Ok(out.read())
    });
    let element = |matrix: usize, row: usize, column: usize| u32::from(tile[(matrix * 8 + row) * 8 + column]);
    for (form, matrices) in [1, 2, 4, 1, 2, 4].into_iter().enumerate() {
        for matrix in 0..matrices {
            for lane in 0..32 {
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
    let d = everywhere(|device| {
        let (a, b, c) = (Buffer::from(device, &a), Buffer::from(device, &b), Buffer::from(device, &c));
        let d = Buffer::<f32>::new(device, 128);
        ConformanceMmaBf16 { d: d.get_mut(), a: a.get(), b: b.get(), c: c.get() }
            .launch(device, Shape::linear(1, 32))?;
        Ok(d.read())
    });
    assert_close("d", &d, &product(&widen(&a), &widen(&b), &c, (16, 8, 16)), 1e-6);
}

/// f32 with ten bits of mantissa, to nearest, ties away from zero.
fn tf32(x: f32) -> f32 {
    f32::from_bits(x.to_bits().wrapping_add(0x1000) & 0xffff_e000)
}

#[test]
fn mma_tf32_multiplies_rounded_inputs() {
    let (a, b, c) = (normal(1, 128), normal(2, 64), normal(3, 128));
    let d = everywhere(|device| {
        let (a, b, c) = (Buffer::from(device, &a), Buffer::from(device, &b), Buffer::from(device, &c));
        let d = Buffer::<f32>::new(device, 128);
        ConformanceMmaTf32 { d: d.get_mut(), a: a.get(), b: b.get(), c: c.get() }
            .launch(device, Shape::linear(1, 32))?;
        Ok(d.read())
    });
    let round = |v: &[f32]| v.iter().map(|&x| tf32(x)).collect::<Vec<_>>();
    assert_close("d", &d, &product(&round(&a), &round(&b), &c, (16, 8, 8)), 1e-6);
    assert!(relative_error(&d, &product(&a, &b, &c, (16, 8, 8))) > 1e-6, "the inputs were not rounded");
}

#[test]
fn cp_async_fills_with_zeros_what_it_does_not_read() {
    let x: Vec<u32> = (1..=128).collect();
    let valid: Vec<i32> = (0..32).map(|lane| lane % 5 * 4).collect();
    let out = everywhere(|device| {
        let (out, x, valid) = (Buffer::<u32>::new(device, 160), Buffer::from(device, &x), Buffer::from(device, &valid));
        ConformanceCpAsync { out: out.get_mut(), x: x.get(), valid: valid.get() }
            .launch(device, Shape::linear(1, 32))?;
        Ok(out.read())
    });
    for lane in 0..32 {
        let words = valid[lane] as usize / 4;
        let want = |word: usize| if word < words { x[lane * 4 + word] } else { 0 };
        assert_eq!(out[lane * 5..lane * 5 + 5], [want(0), want(1), want(2), want(3), want(0)], "lane {lane}");
    }
}

#[test]
fn conversions_round_as_on_the_device() {
    let mut x = normal(1, 1000);
    // Two ties between neighbouring bf16 values: one rounds down to even, one up.
    let ties = [1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8)];
    x.extend([0.0, -0.0, 1.0, f32::INFINITY, f32::NEG_INFINITY, -127.5, ties[0], ties[1]]);
    let n = x.len();
    let (out, narrow) = everywhere(|device| {
        let (out, narrow, x) =
            (Buffer::<u32>::new(device, 4 * n), Buffer::<u16>::new(device, n), Buffer::from(device, &x));
        let narrow_pointer = MutPtr::new(narrow.get_mut().address());
        ConformanceConversions { out: out.get_mut(), narrow: narrow_pointer, x: x.get(), n: n as i32 }
            .launch(device, Shape::linear(n.div_ceil(8 * 32) as u32, 32))?;
        Ok((out.read(), narrow.read()))
    });
    for (i, &v) in x.iter().enumerate() {
        let power = f32::from_bits(out[i]);
        let exact = f64::from(v).exp2();
        let flushed = if exact < f64::from(f32::MIN_POSITIVE) { 0.0 } else { exact };
        assert!(
            (f64::from(power) - flushed).abs() <= 1e-6 * flushed || f64::from(power) == flushed,
            "ex2({v}) = {power}"
        );
        let rounded = if v.is_finite() { tf32(v) } else { v };
        assert_eq!(out[n + i], rounded.to_bits(), "tf32 of {v}");
        let half = bf16::from_f32(v);
        assert_eq!(out[2 * n + i], u32::from(half.to_bits()), "bf16 of {v}");
        assert_eq!((narrow[i], out[3 * n + i]), (half.to_bits(), half.to_f32().to_bits()), "8 at a time, {v}");
    }
}

#[test]
fn reductions_and_shuffles_reach_the_lanes_they_name() {
    for threads in [32usize, 96, 1024] {
        let x = normal(1, threads);
        let out = everywhere(|device| {
            let (out, x) = (Buffer::<f32>::new(device, 8 * threads), Buffer::from(device, &x));
            ConformanceReductions { out: out.get_mut(), x: x.get() }
                .launch(device, Shape::linear(1, threads as u32))?;
            Ok(out.read().iter().map(|v| v.to_bits()).collect::<Vec<_>>())
        });
        let row = |i: usize| out[i * threads..(i + 1) * threads].iter().map(|&b| f32::from_bits(b)).collect::<Vec<_>>();
        let max = |v: &[f32]| v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let of_warps = |f: &dyn Fn(&[f32]) -> f32| x.chunks(32).flat_map(|w| vec![f(w); 32]).collect::<Vec<_>>();
        let sum = |v: &[f32]| v.iter().map(|&x| f64::from(x)).sum::<f64>() as f32;
        assert_close("warp sum", &row(0), &of_warps(&sum), 1e-6);
        assert_eq!(row(1), of_warps(&max));
        assert_close("block sum", &row(2), &vec![sum(&x); threads], 1e-5);
        assert_eq!(row(3), vec![max(&x); threads]);
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
    let drop = rng::Dropout::new(42, 7, 0.1);
    // A sample number above 32 bits, and the largest position and site of their fields.
    for (site, sample, position) in [(1, 5, 0), (3, 0x1_2345_6789, 511), (0xffff, 9, 0xffff)] {
        let groups = 100;
        let (bits, kept) = everywhere(|device| {
            let (out, kept) = (Buffer::<u16>::new(device, groups * 8), Buffer::<f32>::new(device, groups * 8));
            let key = Buffer::from(device, &drop.key);
            let d = Dropout { key: key.get(), threshold: drop.threshold, scale: drop.scale() as f32 };
            let (out_pointer, kept_pointer) = (out.get_mut(), kept.get_mut());
            ConformanceDropout {
                out: out_pointer,
                kept: kept_pointer,
                d,
                site,
                sample,
                position,
                groups: groups as i32,
            }
            .launch(device, Shape::linear(2, 64))?;
            Ok((out.read(), kept.read()))
        });
        let want: Vec<u16> = (0..groups as u32).flat_map(|group| drop.bits(site, sample, position, group)).collect();
        assert_eq!(bits, want);
        let scale = drop.scale() as f32;
        let masked: Vec<f32> = want.iter().map(|&b| if u32::from(b) < drop.threshold { 0.0 } else { scale }).collect();
        assert_eq!(kept, masked);
    }
}

/// c [m, n] = a [m, k] b, by TMA and wgmma. `transposed`: b is [k, n], else [n, k].
fn wgmma(device: &Emulator, form: Form, a: &[bf16], b: &[bf16], (m, n, k): (usize, usize, usize)) -> Result<Vec<f32>> {
    let (a, b, c) = (Buffer::from(device, a), Buffer::from(device, b), Buffer::<f32>::new(device, m * n));
    let map = |base: u64, width: usize, height: usize| {
        let (width, height, row_bytes) = (width as u64, height as u64, width as u64 * 2);
        device.tensor_map(&TensorLayout {
            base,
            width,
            height,
            row_bytes,
            box_width: 64,
            box_height: 64,
            element_bytes: 2,
            swizzle_128b: true,
        })
    };
    let b_map = if form.transposed { map(b.address(), n, k)? } else { map(b.address(), k, n)? };
    let a_map = map(a.address(), k, m)?;
    let stage = 8192 + 128 * form.tile as u32;
    let shape =
        Shape { grid: [(n / form.tile) as u32, (m / 64) as u32, 1], block: [160, 1, 1], shared_bytes: 2 * stage + 32 };
    let (c_pointer, n, k) = (c.get_mut(), n as i32, k as i32);
    match (form.tile, form.transposed, form.registers) {
        (64, false, false) => {
            ConformanceWgmma64Nk { c: c_pointer, a: a_map, b: b_map, N: n, K: k }.launch(device, shape)?
        }
        (64, true, false) => {
            ConformanceWgmma64Kn { c: c_pointer, a: a_map, b: b_map, N: n, K: k }.launch(device, shape)?
        }
        (64, false, true) => {
            ConformanceWgmma64NkRegisters { c: c_pointer, a: a_map, b: b_map, N: n, K: k }.launch(device, shape)?
        }
        (64, true, true) => {
            ConformanceWgmma64KnRegisters { c: c_pointer, a: a_map, b: b_map, N: n, K: k }.launch(device, shape)?
        }
        (_, false, _) => {
            ConformanceWgmma128Nk { c: c_pointer, a: a_map, b: b_map, N: n, K: k }.launch(device, shape)?
        }
        (_, true, _) => ConformanceWgmma128Kn { c: c_pointer, a: a_map, b: b_map, N: n, K: k }.launch(device, shape)?,
    }
    Ok(c.read())
}

#[derive(Clone, Copy, Debug)]
struct Form {
    tile: usize,
    transposed: bool,
    registers: bool,
}

#[test]
fn wgmma_multiplies_what_tma_brings() {
    // Three steps of K: the ring of two stages wraps.
    let (m, n, k) = (128, 128, 192);
    let (a, b) = (to_bf16(&normal(1, m * k)), to_bf16(&normal(2, k * n)));
    let b_transposed: Vec<bf16> = (0..n * k).map(|i| b[i % k * n + i / k]).collect();
    let want = product(&widen(&a), &widen(&b), &vec![0.0; m * n], (m, n, k));
    for (tile, registers) in [(64, false), (64, true), (128, false)] {
        for transposed in [false, true] {
            let form = Form { tile, transposed, registers };
            let operand = if transposed { &b } else { &b_transposed };
            let c = everywhere(|device| wgmma(device, form, &a, operand, (m, n, k)));
            assert_close(&format!("{form:?}"), &c, &want, 1e-6);
        }
    }
}

#[test]
fn tensor_maps_that_the_driver_refuses_are_refused() {
    let device = Emulator::new(Options::default()).expect("the emulator is linked in");
    let good = TensorLayout {
        base: 0x1000,
        width: 128,
        height: 64,
        row_bytes: 256,
        box_width: 64,
        box_height: 64,
        element_bytes: 2,
        swizzle_128b: true,
    };
    assert!(device.tensor_map(&good).is_ok());
    let bad = [
        TensorLayout { base: 0x1008, ..good },
        TensorLayout { row_bytes: 264, ..good },
        TensorLayout { row_bytes: 128, ..good },
        TensorLayout { box_width: 128, ..good },
        TensorLayout { box_width: 0, ..good },
        TensorLayout { box_height: 257, ..good },
        TensorLayout { element_bytes: 3, ..good },
        TensorLayout { height: 0, ..good },
    ];
    for layout in bad {
        assert!(device.tensor_map(&layout).is_err(), "{layout:?}");
    }
}
