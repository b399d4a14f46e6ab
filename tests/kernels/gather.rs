//! Moving rows, sums of groups of rows, sums of columns.

use crate::harness::*;
use half::bf16;
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::kernels::*;
use retromae_engine::device::launch::{MutPtr, Shape};
use retromae_engine::device::{Device, Tensor};
use retromae_engine::ops::{Groups, gather};
use std::collections::BTreeMap;

const DONE: &str = "a correct kernel raises nothing";

/// Rows that belong together, as the batch prepares them.
pub struct OwnGroups {
    pub keys: Vec<u32>,
    pub offsets: Vec<u32>,
    pub rows: Vec<u32>,
}

impl OwnGroups {
    /// Rows `0..keys.len()` by key.
    pub fn new(keys: &[u32]) -> Self {
        let mut groups = BTreeMap::<u32, Vec<u32>>::new();
        keys.iter().enumerate().for_each(|(row, &key)| groups.entry(key).or_default().push(row as u32));
        let mut offsets = vec![0];
        groups.values().for_each(|rows| offsets.push(offsets[offsets.len() - 1] + rows.len() as u32));
        OwnGroups { keys: groups.keys().copied().collect(), offsets, rows: groups.into_values().flatten().collect() }
    }

    /// Keys, offsets and rows on the host.
    pub fn tensors(&self) -> [Tensor; 3] {
        [&self.keys, &self.offsets, &self.rows].map(|x| Tensor::from_slice(x))
    }

    /// `to += sums` in f64.
    pub fn exactly(&self, from: &[f64], width: usize, to: &mut [f64]) {
        let (own, acc) = (self.tensors(), Tensor::from_slice(to));
        gather::group_sums(Device::Cpu, &Tensor::from_slice(from), groups_of(&own), width, &acc);
        to.copy_from_slice(&acc.to_vec::<f64>());
    }
}

/// The op's form of [`OwnGroups::tensors`].
pub fn groups_of([keys, offsets, rows]: &[Tensor; 3]) -> Groups<'_> {
    Groups { count: keys.len().into(), entries: rows.len(), keys, offsets, rows }
}

/// Entry points by storage type.
pub trait Kernels: Storage {
    /// `to_acc += sums of groups of from`, for a capacity of `room` rows more than there are.
    fn group_sums(
        on: &'static Gpu,
        from: &Buffer<Self>,
        groups: &OwnGroups,
        c: usize,
        to_acc: &Buffer<f32>,
        room: usize,
    );
    fn gather(on: &'static Gpu, m: &Move<Self>);
    fn scatter(on: &'static Gpu, m: &Move<Self>);
    fn scatter_add(on: &'static Gpu, m: &Move<Self>);
    fn zero_rows(on: &'static Gpu, m: &Move<Self>);
    fn add_rows(on: &'static Gpu, m: &Sum<Self>);
    fn zero_tails(
        on: &'static Gpu,
        a: &Tail<Self>,
        b: Option<&Tail<Self>>,
        limits: (&Buffer<i32>, usize),
        blocks: usize,
    );
    fn column_sums(on: &'static Gpu, case: &Columns, x: &Buffer<Self>, partials: &Buffer<f32>, rows: &Buffer<i32>);
}

/// Arguments of a move.
pub struct Move<T> {
    to: Buffer<T>,
    from: Buffer<T>,
    rows: Buffer<u32>,
    count: Buffer<i32>,
    width: i32,
    shape: Shape,
}

/// Arguments of a sum of rows of two matrices.
pub struct Sum<T> {
    to: Buffer<T>,
    from: [Buffer<T>; 2],
    rows: [Buffer<u32>; 2],
    count: Buffer<i32>,
    width: i32,
    shape: Shape,
}

/// Columns of a matrix whose last rows are zeroed; `extra` more lie on each side of them.
pub struct Tail<T> {
    matrix: Buffer<T>,
    width: usize,
    extra: usize,
}

impl<T: Storage> Tail<T> {
    fn get(&self) -> (MutPtr<T>, i32, i32) {
        (self.matrix.get_mut().offset(self.extra), self.width as i32, (self.width + 2 * self.extra) as i32)
    }
}

/// Sums of the columns `offset..offset + columns` of a matrix that is `stride` wide.
pub struct Columns {
    rows: usize,
    columns: usize,
    stride: usize,
    offset: usize,
    blocks: usize,
}

macro_rules! kernels {
    ($t:ty, $sums:ident, $gather:ident, $scatter:ident, $add:ident, $zero:ident, $rows:ident, $tails:ident, $columns:ident) => {
        impl Kernels for $t {
            fn group_sums(
                on: &'static Gpu,
                from: &Buffer<$t>,
                groups: &OwnGroups,
                c: usize,
                to_acc: &Buffer<f32>,
                room: usize,
            ) {
                let windows = (groups.rows.len() + room).div_ceil(32);
                let partials = Buffer::<f32>::poisoned(on, windows * 2 * c);
                let spans = Buffer::<u32>::poisoned(on, windows * 2);
                let [keys, offsets, rows] =
                    [&groups.keys, &groups.offsets, &groups.rows].map(|x| Buffer::with_room(on, x, x.len() + room));
                let count = Buffer::of(on, &[groups.keys.len() as i32]);
                $sums {
                    to_acc: to_acc.get_mut(),
                    partials: partials.get_mut(),
                    spans: spans.get_mut(),
                    from: from.get(),
                    keys: keys.get(),
                    offsets: offsets.get(),
                    rows: rows.get(),
                    count: count.get(),
                    C: c as i32,
                }
                .launch(on, Shape::linear((windows * c.div_ceil(256)).div_ceil(4) as u32, 128))
                .expect(DONE);
                GroupSumsSpans {
                    to_acc: to_acc.get_mut(),
                    partials: partials.get(),
                    spans: spans.get(),
                    offsets: offsets.get(),
                    count: count.get(),
                    C: c as i32,
                }
                .launch(on, Shape { grid: [windows as u32, c.div_ceil(128) as u32, 1], ..Shape::linear(1, 256) })
                .expect(DONE);
            }

            fn gather(on: &'static Gpu, m: &Move<$t>) {
                let (to, from, rows, count) = (m.to.get_mut(), m.from.get(), m.rows.get(), m.count.get());
                $gather { to, from, rows, count, C: m.width }.launch(on, m.shape).expect(DONE);
            }

            fn scatter(on: &'static Gpu, m: &Move<$t>) {
                let (to, from, rows, count) = (m.to.get_mut(), m.from.get(), m.rows.get(), m.count.get());
                $scatter { to, from, rows, count, C: m.width }.launch(on, m.shape).expect(DONE);
            }

            fn scatter_add(on: &'static Gpu, m: &Move<$t>) {
                let (to_acc, from, rows, count) = (m.to.get_mut(), m.from.get(), m.rows.get(), m.count.get());
                $add { to_acc, from, rows, count, C: m.width }.launch(on, m.shape).expect(DONE);
            }

            fn zero_rows(on: &'static Gpu, m: &Move<$t>) {
                let (to, rows, count) = (m.to.get_mut(), m.rows.get(), m.count.get());
                $zero { to, rows, count, C: m.width }.launch(on, m.shape).expect(DONE);
            }

            fn add_rows(on: &'static Gpu, m: &Sum<$t>) {
                let ([a, b], [a_rows, b_rows]) =
                    (m.from.each_ref().map(Buffer::get), m.rows.each_ref().map(Buffer::get));
                $rows { to: m.to.get_mut(), a, a_rows, b, b_rows, count: m.count.get(), C: m.width }
                    .launch(on, m.shape)
                    .expect(DONE);
            }

            fn zero_tails(
                on: &'static Gpu,
                a: &Tail<$t>,
                b: Option<&Tail<$t>>,
                (count, bound): (&Buffer<i32>, usize),
                blocks: usize,
            ) {
                let (a, a_width, a_stride) = a.get();
                let (b, b_width, b_stride) = b.map_or((MutPtr::null(), 0, 0), Tail::get);
                let (count, bound) = (count.get(), bound as i32);
                $tails { a, a_width, a_stride, b, b_width, b_stride, count, bound }
                    .launch(on, Shape::linear(blocks as u32, 256))
                    .expect(DONE);
            }

            fn column_sums(
                on: &'static Gpu,
                case: &Columns,
                x: &Buffer<$t>,
                partials: &Buffer<f32>,
                rows: &Buffer<i32>,
            ) {
                $columns {
                    partials: partials.get_mut(),
                    x: x.get().offset(case.offset),
                    rows: rows.get(),
                    N: case.columns as i32,
                    stride: case.stride as i32,
                }
                .launch(
                    on,
                    Shape { grid: [case.columns.div_ceil(256) as u32, case.blocks as u32, 1], ..Shape::linear(1, 256) },
                )
                .expect(DONE);
            }
        }
    };
}
kernels!(f32, GroupSumsF32, GatherF32, ScatterF32, ScatterAddF32, ZeroRowsF32, AddRowsF32, ZeroTailsF32, ColumnSumsF32);
kernels!(
    bf16,
    GroupSumsBf16,
    GatherBf16,
    ScatterBf16,
    ScatterAddBf16,
    ZeroRowsBf16,
    AddRowsBf16,
    ZeroTailsBf16,
    ColumnSumsBf16
);

/// Rows of the large matrix of a move.
const LARGE: usize = 40;

/// Runs a move of `count` rows between a matrix of 40 rows, which is `to` or `from`, and one of `count` rows and some room: every element
/// that is moved becomes `put(old, from)`, all others stay.
fn moved<T: Kernels>(run: fn(&'static Gpu, &Move<T>), into_large: bool, put: fn(f32, f32) -> f32) {
    // Two vectors; more vectors than lanes; more than a warp's four loads in flight. No row; one; a last block that is not full; all.
    for (width, count) in [(16, 0), (16, 1), (48, 13), (768, 9), (1040, 2), (4096, 1), (16, LARGE)] {
        let rows: Vec<u32> = (0..count as u32).map(|i| (i * 7 + 3) % LARGE as u32).collect();
        let (large, small) = (rounded::<T>(&normal(LARGE * width, 1)), rounded::<T>(&normal(count * width, 2)));
        let got = in_every_order(|on| {
            let (large, small) = (stored::<T>(on, &large, 0), stored::<T>(on, &small, 3 * width));
            let (to, from) = if into_large { (large, small) } else { (small, large) };
            let m = Move {
                to,
                from,
                rows: Buffer::with_room(on, &rows, count + 3),
                count: Buffer::of(on, &[count as i32]),
                width: width as i32,
                shape: Shape::linear((count + 3).div_ceil(8) as u32, 256),
            };
            run(on, &m);
            vec![widened(m.to.take(if into_large { LARGE } else { count } * width))]
        });
        let (mut expected, from) = if into_large { (large, small) } else { (small, large) };
        for (i, &row) in rows.iter().enumerate() {
            for c in 0..width {
                let (a, b) = (i * width + c, row as usize * width + c);
                let (a, b) = if into_large { (b, a) } else { (a, b) };
                expected[a] = put(expected[a], from[b]);
            }
        }
        assert!(got[0] == expected, "{count} rows of {width}");
    }
}

#[test]
fn moves_touch_the_chosen_rows_alone() {
    moved(<f32 as Kernels>::gather, false, |_, from| from);
    moved(<bf16 as Kernels>::gather, false, |_, from| from);
    moved(<f32 as Kernels>::scatter, true, |_, from| from);
    moved(<bf16 as Kernels>::scatter, true, |_, from| from);
    moved(<f32 as Kernels>::scatter_add, true, |old, from| old + from);
    moved(<bf16 as Kernels>::scatter_add, true, |old, from| round::<bf16>(old + from));
    moved(<f32 as Kernels>::zero_rows, true, |_, _| 0.0);
    moved(<bf16 as Kernels>::zero_rows, true, |_, _| 0.0);
}

/// Rows are moved as bits: what is not a number arrives as it was.
#[test]
fn moves_keep_the_bits_of_nan() {
    let bits = [0x7FA1u16, 0xFFC3, 0x8000, 0x0001].map(bf16::from_bits);
    let row: Vec<bf16> = (0..16).map(|i| bits[i % 4]).collect();
    let got = in_every_order(|on| {
        let m = Move {
            to: Buffer::<bf16>::poisoned(on, 16),
            from: Buffer::of(on, &row),
            rows: Buffer::of(on, &[0]),
            count: Buffer::of(on, &[1]),
            width: 16,
            shape: Shape::linear(1, 256),
        };
        <bf16 as Kernels>::gather(on, &m);
        vec![m.to.take(16).iter().map(|x| f32::from_bits(u32::from(x.to_bits()))).collect()]
    });
    assert!(got[0].iter().zip(&row).all(|(a, b)| a.to_bits() == u32::from(b.to_bits())));
}

fn rows_added<T: Kernels>() {
    for (width, count) in [(16, 0), (16, 1), (48, 13), (1040, 9), (16, LARGE)] {
        // Some rows are used twice.
        let rows = [below(count, LARGE as u32, 1), below(count, LARGE as u32, 2)];
        let from = [1, 2].map(|name| rounded::<T>(&normal(LARGE * width, name)));
        let got = in_every_order(|on| {
            let sum = Sum {
                to: Buffer::poisoned(on, (count + 3) * width),
                from: from.each_ref().map(|x| stored::<T>(on, x, 0)),
                rows: rows.each_ref().map(|rows| Buffer::with_room(on, rows, count + 3)),
                count: Buffer::of(on, &[count as i32]),
                width: width as i32,
                shape: Shape::linear((count + 3).div_ceil(8) as u32, 256),
            };
            T::add_rows(on, &sum);
            vec![widened(sum.to.take(count * width))]
        });
        let part = |k: usize, e: usize| from[k][rows[k][e / width] as usize * width + e % width];
        let expected: Vec<f32> = (0..count * width).map(|e| round::<T>(part(0, e) + part(1, e))).collect();
        assert!(got[0] == expected, "{count} rows of {width}");
    }
}

#[test]
fn rows_of_two_matrices_are_added() {
    rows_added::<f32>();
    rows_added::<bf16>();
}

fn tails_zeroed<T: Kernels>(widths: &[usize], extra: usize, (count, bound): (usize, usize), blocks: usize) {
    let matrix = |width: usize| rounded::<T>(&normal(bound * (width + 2 * extra), width as u64));
    let got = in_every_order(|on| {
        let stored = |width: usize| stored::<T>(on, &matrix(width), 2 * (width + 2 * extra));
        let tails: Vec<_> = widths.iter().map(|&width| Tail { matrix: stored(width), width, extra }).collect();
        T::zero_tails(on, &tails[0], tails.get(1), (&Buffer::of(on, &[count as i32]), bound), blocks);
        tails.iter().map(|tail| widened(tail.matrix.take(bound * (tail.width + 2 * extra)))).collect()
    });
    for (got, &width) in got.into_iter().zip(widths) {
        let mut expected = matrix(width);
        for row in expected.chunks_mut(width + 2 * extra).skip(count) {
            row[extra..extra + width].fill(0.0);
        }
        assert!(got == expected, "{count} of {bound} rows of {width}");
    }
}

#[test]
fn rows_past_the_count_become_zero() {
    // None is in use, all are, one is not; more rows than warps; more vectors than lanes; columns of wider matrices; one matrix alone.
    for (widths, extra, limits, blocks) in [
        (&[16, 48][..], 0, (0, 5), 1),
        (&[16, 48], 8, (5, 5), 2),
        (&[48, 16], 8, (4, 5), 3),
        (&[272, 1040], 16, (3, 40), 2),
        (&[48], 8, (7, 21), 1),
        (&[16], 0, (0, 0), 1),
    ] {
        tails_zeroed::<f32>(widths, extra, limits, blocks);
        tails_zeroed::<bf16>(widths, extra, limits, blocks);
    }
}

#[test]
fn f32_rows_are_rounded_to_bf16() {
    let (count, width) = (11, 272);
    let x = normal(count * width, 1);
    let got = in_every_order(|on| {
        let (to, from) = (Buffer::<bf16>::poisoned(on, (count + 2) * width), Buffer::of(on, &x));
        let n = Buffer::of(on, &[count as i32]);
        RoundRowsBf16 { to: to.get_mut(), from: from.get(), count: n.get(), C: width as i32 }
            .launch(on, Shape::linear(2, 256))
            .expect(DONE);
        vec![widened(to.take(count * width))]
    });
    assert_eq!(got[0], rounded::<bf16>(&x));
}

fn summed<T: Kernels>(keys: &[u32], width: usize) {
    let groups = OwnGroups::new(keys);
    let outputs = keys.iter().max().map_or(1, |&k| k as usize + 2);
    let (from, start) = (rounded::<T>(&normal(keys.len() * width, 1)), normal(outputs * width, 2));
    let got = in_every_order(|on| {
        let (from, to) = (stored::<T>(on, &from, 0), Buffer::of(on, &start));
        T::group_sums(on, &from, &groups, width, &to, 70);
        vec![to.take(outputs * width)]
    });
    let mut exact = f64s(&start);
    groups.exactly(&f64s(&from), width, &mut exact);
    let what = format!("sums of {} rows of {width} in {} groups", keys.len(), groups.keys.len());
    judge::<f32>(&what, &got[0], &exact, &[]);
}

fn sums(keys: &[u32], width: usize) {
    summed::<f32>(keys, width);
    summed::<bf16>(keys, width);
}

#[test]
fn group_sums_of_every_size() {
    sums(&[], 16);
    sums(&[5], 16);
    // One window exactly, one entry more, several windows: all in one group, and each entry a group.
    for n in [31, 32, 33, 64, 100] {
        sums(&vec![2; n], 48);
        sums(&(0..n as u32).rev().collect::<Vec<_>>(), 16);
    }
    // Groups that end and begin at the borders of windows.
    sums(&[vec![0; 32], vec![1; 32], vec![2; 31], vec![3; 2], vec![4; 63]].concat(), 32);
    // A group inside a window between two that go beyond it.
    sums(&[vec![0; 40], vec![1; 5], vec![2; 60], vec![3]].concat(), 16);
    // More columns than a warp's; not a multiple of them; the widest.
    sums(&below(90, 7, 1), 272);
    sums(&below(50, 20, 2), 768);
    sums(&below(40, 3, 3), 4096);
    // More groups than the search tells apart in two rounds.
    sums(&below(2500, 4000, 4), 16);
}

/// [MASK] and token type 0 among words that occur once or twice.
#[test]
fn group_sums_of_very_unequal_groups() {
    let keys: Vec<u32> = below(6000, 300, 5).iter().map(|&k| if k < 200 { 103 } else { 10 * k }).collect();
    sums(&keys, 16);
    sums(&[0; 10_000], 16);
}

fn summed_columns<T: Kernels>(case: &Columns) {
    let (x, start) = (rounded::<T>(&normal(case.rows * case.stride, 1)), normal(case.columns, 2));
    let got = in_every_order(|on| {
        let (x, sums) = (stored::<T>(on, &x, case.stride), Buffer::of(on, &start));
        let partials = Buffer::<f32>::poisoned(on, case.blocks * case.columns);
        let rows = Buffer::of(on, &[case.rows as i32]);
        T::column_sums(on, case, &x, &partials, &rows);
        ColumnSumsAdd {
            sums_acc: sums.get_mut(),
            partials: partials.get(),
            rows: rows.get(),
            blocks: case.blocks as i32,
            N: case.columns as i32,
        }
        .launch(on, Shape::linear(case.columns.div_ceil(32) as u32, 1024))
        .expect(DONE);
        vec![sums.take(case.columns)]
    });
    let mut exact = f64s(&start);
    for row in x.chunks(case.stride) {
        for (sum, &x) in exact.iter_mut().zip(&row[case.offset..]) {
            *sum += f64::from(x);
        }
    }
    judge::<f32>(&format!("sums of {} rows of {}", case.rows, case.columns), &got[0], &exact, &[]);
}

#[test]
fn column_sums_of_matrices_and_of_parts_of_them() {
    // No row; one; more blocks than rows; a warp with five rows, one more than it loads ahead; the second third of a wider matrix; a
    // last block of columns that is not full, and a half of 32.
    for (rows, columns, stride, offset, blocks) in [
        (0, 32, 32, 0, 2),
        (1, 16, 16, 0, 1),
        (9, 48, 48, 0, 4),
        (77, 256, 256, 0, 2),
        (20, 256, 768, 256, 2),
        (33, 272, 288, 16, 40),
    ] {
        let case = Columns { rows, columns, stride, offset, blocks };
        summed_columns::<f32>(&case);
        summed_columns::<bf16>(&case);
    }
}
