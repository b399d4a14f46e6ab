//! Matrix products of bf16-rounded operands with f32 sums, as tensor cores compute them: the CPU's `--precision bf16`.
//!
//! Processors with AVX512-BF16 multiply pairs of bf16 and add them to f32 in one instruction (`vdpbf16ps`), twice as many a second as
//! f32. Both operands are packed once: rounded, in groups of 16 rows (of `a`) or columns (of `b`), pairs of the sum side by side. A tile of
//! 8 rows and 48 columns then stays in registers. Other processors round the operands and multiply in f32: the same products, no faster.
//!
//! An element's sum is added up in blocks of `BLOCK`, whatever lies beside it.

use rayon::prelude::*;

use super::super::Output;
use super::{Threads, View, gemm, scratch};

/// Rows or columns of a packed group.
const GROUP: usize = 16;
/// Rows of a tile, half a group.
const ROWS: usize = 8;
/// Column groups of a tile.
const COLUMNS: usize = 3;
/// Pairs of the sum that a tile adds up before it is stored: 24 KiB of `b` stay in the first cache.
const BLOCK: usize = 128;
/// Groups of rows, and tiles of columns, of a task.
const TASK: (usize, usize) = (12, 8);

/// Whether the processor has the instruction.
pub fn is_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// `c[m, n] = a · b` or `c += a · b` with both operands rounded to bf16; rows of `c` are `stride` apart.
pub fn product(
    (m, n, k): (usize, usize, usize),
    a: View<'_, f32>,
    b: View<'_, f32>,
    c: &mut [f32],
    stride: usize,
    output: Output,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(a.holds(m, k) && b.holds(k, n) && stride >= n && (m - 1) * stride + n <= c.len(), "product out of bounds");
    #[cfg(target_arch = "x86_64")]
    if k > 0 && is_fast() {
        return fast::product((m, n, k), a, b, c, stride, output);
    }
    rounded_product((m, n, k), a, b, c, stride, output);
}

/// The same on any processor.
fn rounded_product(
    (m, n, k): (usize, usize, usize),
    a: View<'_, f32>,
    b: View<'_, f32>,
    c: &mut [f32],
    stride: usize,
    output: Output,
) {
    scratch(m * k + k * n, |buffer: &mut [f32]| {
        let (left, right) = buffer.split_at_mut(m * k);
        let round = |to: &mut [f32], from: View<'_, f32>, columns: usize| {
            to.par_chunks_mut(columns.max(1)).enumerate().for_each(|(i, row)| {
                let start = &from.data[i * from.row..];
                row.iter_mut()
                    .enumerate()
                    .for_each(|(j, x)| *x = half::bf16::from_f32(start[j * from.column]).to_f32());
            });
        };
        round(left, a, k);
        round(right, b, n);
        gemm((m, n, k), 1.0, View::rows(&*left, k), View::rows(&*right, n), c, stride, output, Threads::All);
    });
}

#[cfg(target_arch = "x86_64")]
mod fast {
    use super::*;
    use std::arch::x86_64::*;

    /// The output, which tasks write in parallel.
    #[derive(Clone, Copy)]
    struct Out {
        start: *mut f32,
        stride: usize,
        add: bool,
    }
    // SAFETY: every task writes its own rows and columns.
    unsafe impl Send for Out {}
    // SAFETY: as above.
    unsafe impl Sync for Out {}

    pub fn product(
        (m, n, k): (usize, usize, usize),
        a: View<'_, f32>,
        b: View<'_, f32>,
        c: &mut [f32],
        stride: usize,
        output: Output,
    ) {
        let pairs = k.div_ceil(2);
        let (row_groups, column_groups) = (m.div_ceil(GROUP), n.div_ceil(GROUP).next_multiple_of(COLUMNS));
        scratch((row_groups + column_groups) * GROUP * pairs, |buffer: &mut [f32]| {
            let buffer: &mut [u32] = bytemuck::cast_slice_mut(buffer);
            let (left, right) = buffer.split_at_mut(row_groups * GROUP * pairs);
            pack(left, a, (m, k));
            pack(right, b.t(), (n, k));
            let (left, right) = (&*left, &*right);
            let out = Out { start: c.as_mut_ptr(), stride, add: output == Output::Add };
            let (down, across) = (row_groups.div_ceil(TASK.0), (column_groups / COLUMNS).div_ceil(TASK.1));
            (0..down * across).into_par_iter().for_each(|task| {
                let (i, j) = (task % down * TASK.0, task / down * TASK.1);
                let rows = i..row_groups.min(i + TASK.0);
                let tiles = j..(column_groups / COLUMNS).min(j + TASK.1);
                // SAFETY: the instructions are there, as the caller has asked, and the caller has checked that c holds m rows and n
                // columns; tasks share none.
                unsafe { multiply(left, right, out, (m, n), pairs, rows, tiles) };
            });
        });
    }

    /// Groups of 16 rows of `x` `[rows, k]`: for each pair of the sum, the 16 rows' two elements. Rows and elements that are not there are
    /// zero.
    fn pack(to: &mut [u32], x: View<'_, f32>, (rows, k): (usize, usize)) {
        let pairs = k.div_ceil(2);
        to.par_chunks_mut(GROUP * pairs).enumerate().for_each(|(group, to)| {
            let count = rows.saturating_sub(group * GROUP).min(GROUP);
            if count == 0 {
                return to.fill(0);
            }
            let start = &x.data[group * GROUP * x.row..];
            let whole = count == GROUP;
            // SAFETY: the instructions are there, as the caller of `product` has asked; `start` holds `count` rows of `k` elements.
            unsafe {
                match (x.row, x.column) {
                    (row, 1) if whole => pack_rows(to, start, row, k),
                    (1, column) if whole => pack_columns(to, start, column, k),
                    (row, column) => pack_any(to, start, (row, column), count, k),
                }
            }
        });
    }

    fn pack_any(to: &mut [u32], x: &[f32], (row, column): (usize, usize), count: usize, k: usize) {
        for (p, to) in to.chunks_exact_mut(GROUP).enumerate() {
            for (i, to) in to.iter_mut().enumerate() {
                let at = |j: usize| {
                    if i < count && j < k {
                        u32::from(half::bf16::from_f32(x[i * row + j * column]).to_bits())
                    } else {
                        0
                    }
                };
                *to = at(2 * p) | at(2 * p + 1) << 16;
            }
        }
    }

    /// Elements of a row are neighbours: blocks of 16 rows and 16 pairs are transposed in registers.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn pack_rows(to: &mut [u32], x: &[f32], row: usize, k: usize) {
        let blocks = k / (2 * GROUP);
        for block in 0..blocks {
            let mut r = [_mm512_setzero_si512(); GROUP];
            for (i, r) in r.iter_mut().enumerate() {
                let from = &x[i * row + block * 2 * GROUP..][..2 * GROUP];
                // SAFETY: 32 elements, as just sliced; a vector of bf16 has the bits of one of integers.
                *r = unsafe {
                    let (low, high) = (_mm512_loadu_ps(from.as_ptr()), _mm512_loadu_ps(from.as_ptr().add(GROUP)));
                    std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
                };
            }
            transpose(&mut r);
            let to = &mut to[block * GROUP * GROUP..][..GROUP * GROUP];
            for (to, r) in to.chunks_exact_mut(GROUP).zip(r) {
                // SAFETY: 16 words.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), r) };
            }
        }
        let done = blocks * 2 * GROUP;
        if done < k {
            pack_any(&mut to[done / 2 * GROUP..], &x[done..], (row, 1), GROUP, k - done);
        }
    }

    /// Elements of a column are neighbours: pairs are two of them, one above the other.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn pack_columns(to: &mut [u32], x: &[f32], column: usize, k: usize) {
        let load = |j: usize| {
            if j >= k {
                return _mm512_setzero_si512();
            }
            let from = &x[j * column..][..GROUP];
            // SAFETY: 16 elements, as just sliced; a vector of bf16 has the bits of one of integers.
            let bits =
                unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(from.as_ptr()))) };
            _mm512_cvtepu16_epi32(bits)
        };
        for (p, to) in to.chunks_exact_mut(GROUP).enumerate() {
            let pair = _mm512_or_si512(load(2 * p), _mm512_slli_epi32::<16>(load(2 * p + 1)));
            // SAFETY: 16 words.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), pair) };
        }
    }

    /// Word j of vector i becomes word i of vector j.
    #[target_feature(enable = "avx512f")]
    fn transpose(r: &mut [__m512i; GROUP]) {
        let mut t = *r;
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..4 {
            r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
        // r[4 q + c] now holds words c, c + 4, c + 8, c + 12 of vectors 4 q .. 4 q + 4, one word of each 128 bits' four.
        for c in 0..4 {
            let (a, b) = (r[c], r[4 + c]);
            let (x, y) = (r[8 + c], r[12 + c]);
            let (low_ab, high_ab) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
            let (low_xy, high_xy) = (_mm512_shuffle_i32x4::<0x88>(x, y), _mm512_shuffle_i32x4::<0xdd>(x, y));
            t[c] = _mm512_shuffle_i32x4::<0x88>(low_ab, low_xy);
            t[4 + c] = _mm512_shuffle_i32x4::<0x88>(high_ab, high_xy);
            t[8 + c] = _mm512_shuffle_i32x4::<0xdd>(low_ab, low_xy);
            t[12 + c] = _mm512_shuffle_i32x4::<0xdd>(high_ab, high_xy);
        }
        *r = t;
    }

    /// Tiles of columns `tiles` of the groups of rows `rows`.
    ///
    /// # Safety
    /// c holds m rows and n columns; no other thread touches those of these tiles.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn multiply(
        left: &[u32],
        right: &[u32],
        out: Out,
        (m, n): (usize, usize),
        pairs: usize,
        rows: std::ops::Range<usize>,
        tiles: std::ops::Range<usize>,
    ) {
        let size = GROUP * pairs;
        for first in (0..pairs).step_by(BLOCK) {
            let last = pairs.min(first + BLOCK);
            let add = out.add || first > 0;
            for tile in tiles.clone() {
                let b: [&[u32]; COLUMNS] =
                    std::array::from_fn(|j| &right[(COLUMNS * tile + j) * size..][first * GROUP..last * GROUP]);
                for half in 2 * rows.start..2 * rows.end {
                    let (row, column) = (half * ROWS, tile * COLUMNS * GROUP);
                    if row >= m {
                        break;
                    }
                    let a = &left[half / 2 * size..][first * GROUP..last * GROUP];
                    // SAFETY: passed on; the tile's first element lies inside c.
                    unsafe {
                        let to = Out { start: out.start.add(row * out.stride + column), add, ..out };
                        tile_product(a, half % 2 * ROWS, b, to, (m - row).min(ROWS), n - column);
                    }
                }
            }
        }
    }

    /// `rows` rows and up to 48 of `columns` columns at `to`, summed over the pairs of `a` (from word `at` of each) and `b`.
    ///
    /// # Safety
    /// `to` is the first element of a tile that lies inside c as far as `rows` and `columns` say.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn tile_product(a: &[u32], at: usize, b: [&[u32]; COLUMNS], to: Out, rows: usize, columns: usize) {
        let mut sums = [[_mm512_setzero_ps(); COLUMNS]; ROWS];
        let pairs = a.chunks_exact(GROUP).zip(b[0].chunks_exact(GROUP)).zip(b[1].chunks_exact(GROUP));
        for (((a, b0), b1), b2) in pairs.zip(b[2].chunks_exact(GROUP)) {
            // SAFETY: 16 words each; a vector of bf16 has the bits of one of integers.
            let b = [b0, b1, b2]
                .map(|b| unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.as_ptr().cast())) });
            let a: &[u32; ROWS] = a[at..at + ROWS].try_into().unwrap_or(&[0; ROWS]);
            for (sums, &a) in sums.iter_mut().zip(a) {
                // SAFETY: as above.
                let a = unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(a.cast_signed())) };
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = _mm512_dpbf16_ps(*sum, a, b);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate().take(rows) {
            for (j, sum) in sums.iter().enumerate() {
                let left = columns.saturating_sub(j * GROUP).min(GROUP);
                if left == 0 {
                    break;
                }
                let mask = ((1u32 << left) - 1) as __mmask16;
                // SAFETY: row i and these columns lie inside c; masked elements are not touched.
                unsafe {
                    let place = to.start.add(i * to.stride + j * GROUP);
                    let before = if to.add { _mm512_maskz_loadu_ps(mask, place) } else { _mm512_setzero_ps() };
                    _mm512_mask_storeu_ps(place, mask, _mm512_add_ps(before, *sum));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Site, Stream};

    fn normal(len: usize, name: u64) -> Vec<f32> {
        let mut stream = Stream::new(3, 0, Site::Init, name);
        (0..len).map(|_| stream.normal()).collect()
    }

    /// Every layout, sizes around the groups of 16, the tiles of 8 x 48, and the blocks of 256 of the sum.
    #[test]
    fn products_are_those_of_rounded_operands() {
        let sizes = [(1, 1, 1), (7, 5, 3), (16, 48, 32), (17, 49, 33), (33, 96, 256), (40, 100, 300), (200, 400, 600)];
        for (m, n, k) in sizes {
            let (x, y, old) = (normal(m * k, 1), normal(n * k, 2), normal(m * (n + 3), 3));
            for (a, b) in [
                (View::rows(&x, k), View::rows(&y, k).t()),
                (View::rows(&x, k), View::rows(&y, n)),
                (View::rows(&x, m).t(), View::rows(&y, n)),
            ] {
                for output in [Output::Set, Output::Add] {
                    let (mut got, mut want) = (old.clone(), old.clone());
                    product((m, n, k), a, b, &mut got, n + 3, output);
                    rounded_product((m, n, k), a, b, &mut want, n + 3, output);
                    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                        let size = (k as f32).sqrt();
                        assert!((got - want).abs() <= 2e-6 * size, "{m} x {n} x {k}, element {i}: {got} for {want}");
                        assert!(i % (n + 3) < n || *got == old[i], "{m} x {n} x {k}: element {i} lies outside");
                    }
                }
            }
        }
    }

    /// A row's result has the same bits with any others beside it.
    #[test]
    fn neighbours_do_not_matter() {
        let (m, n, k) = (70, 64, 520);
        let (x, y) = (normal(m * k, 1), normal(n * k, 2));
        let (mut all, mut one) = (vec![0.0; m * n], vec![0.0; n]);
        product((m, n, k), View::rows(&x, k), View::rows(&y, k).t(), &mut all, n, Output::Set);
        for row in [0, 15, 16, 69] {
            product((1, n, k), View::rows(&x[row * k..], k), View::rows(&y, k).t(), &mut one, n, Output::Set);
            assert!(one.iter().zip(&all[row * n..]).all(|(a, b)| a.to_bits() == b.to_bits()) || !is_fast());
        }
    }

    #[test]
    fn an_empty_sum_is_zero() {
        let mut c = [1.0, 2.0];
        product((1, 2, 0), View::rows(&[], 0), View::rows(&[], 2), &mut c, 2, Output::Add);
        assert_eq!(c, [1.0, 2.0]);
        product((1, 2, 0), View::rows(&[], 0), View::rows(&[], 2), &mut c, 2, Output::Set);
        assert_eq!(c, [0.0, 0.0]);
    }
}
