//! Lexical representation of a text, as DupMAE (arXiv 2211.08769) uses it: the MLM head's logits, the largest of every word over the text's
//! positions but the first, `[CLS]`, and of these the K largest as (token id, weight).
//!
//! `m[s, v] = max_i h_i · W_v` over the rows i of text s but its first, `w[s, v] = m[s, v] + b_v`. Weights are these sums as they are: no
//! ReLU, logarithm or softmax, and nothing is left out, neither the position of `[SEP]` nor special tokens, as in the bag-of-words
//! objective that trains them. Larger weights come first, of equal ones the lower id. A text of one row has none: ids of all bits set,
//! weights of −∞.
//!
//! Rows go through in chunks, and so do the maxima: of a chunk's texts alone, and of the one that goes on in the next chunk. Memory is
//! `O(chunk V)` whatever the number of rows and texts; `[T, V]` never exists, nor does `[S, V]`. There is no backward.

use super::{Count, linear};
use crate::device::{Device, Matrix, Tensor};

/// Largest K: the largest of a text are sorted in shared memory.
pub const MAX_K: usize = 4096;

/// Most words: the kernels order them by 24 bits of their ids.
pub const MAX_VOCABULARY: usize = 1 << 24;

/// Sizes and borders of texts.
#[derive(Clone, Copy)]
pub struct Shape<'a> {
    /// T.
    pub rows: Count<'a>,
    /// `[S + 1]` u32: first row of each text; none is empty.
    pub cu_seqlens: &'a Tensor,
    /// `[T]` u32: text of each row.
    pub sequence: &'a Tensor,
    /// C.
    pub width: usize,
    /// V, padding included; its bias is −∞.
    pub vocabulary: usize,
    /// Rows of the buffers of logits and of maxima.
    pub chunk: usize,
    /// K, at most [`MAX_K`] and V without the padding.
    pub k: usize,
}

/// Arguments of [`run`].
pub struct Lexical<'a> {
    /// Sizes.
    pub shape: Shape<'a>,
    /// `[T, C]`: states after the head's transform.
    pub h: &'a Tensor,
    /// `[V, C]`.
    pub w: &'a Tensor,
    /// `[V]`, on the GPU f32.
    pub b: &'a Tensor,
    /// `[chunk, V]` scratch.
    pub logits: &'a Tensor,
    /// `[chunk, V]` scratch.
    pub maxima: &'a Tensor,
    /// `[S, K]` u32, written.
    pub ids: &'a Tensor,
    /// `[S, K]`, on the GPU f32, written.
    pub weights: &'a Tensor,
}

/// The K largest words of each text and their weights.
pub fn run(device: Device, a: &Lexical<'_>) {
    let Shape { rows, width, vocabulary, chunk, k, .. } = a.shape;
    assert!(k > 0 && k <= MAX_K && k <= vocabulary, "the {k} largest of {vocabulary} words");
    for first in (0..rows.rows).step_by(chunk) {
        let count = chunk.min(rows.rows - first);
        linear::forward(
            device,
            // The bias does not change which row is largest: it is added to the maxima.
            &linear::Forward {
                rows: count.into(),
                inputs: width,
                outputs: vocabulary,
                x: Matrix::columns(a.h, first * width, width),
                w: a.w,
                b: None,
                y: Matrix::new(a.logits, vocabulary),
            },
        );
        match device {
            Device::Cpu => super::on_cpu!(a.h, cpu::chunk, a, first),
            Device::Gpu(gpu) => gpu::chunk(gpu, a, first),
        }
    }
}

/// The reference: texts in parallel, row by row; the largest are found by a selection and then sorted.
mod cpu {
    use super::Lexical;
    use crate::device::cpu::{Real, vectorized};
    use rayon::prelude::*;

    /// A slot of maxima of one text.
    struct Part<'p, F> {
        text: usize,
        rows: std::ops::Range<usize>,
        begins: bool,
        maxima: &'p mut [F],
        /// Where the text's words go, if it ends here.
        out: Option<(&'p mut [u32], &'p mut [F])>,
    }

    pub fn chunk<F: Real>(a: &Lexical<'_>, first: usize) {
        let super::Shape { rows, vocabulary: v, chunk, k, .. } = a.shape;
        let end = rows.rows.min(first + chunk);
        let (cu, sequence) = (a.shape.cu_seqlens.read::<u32>(), a.shape.sequence.read::<u32>());
        let (logits, b) = (a.logits.read::<F>(), a.b.read::<F>());
        let (mut maxima, mut ids, mut weights) = (a.maxima.write::<F>(), a.ids.write::<u32>(), a.weights.write::<F>());
        let texts = sequence[first] as usize..sequence[end - 1] as usize + 1;
        let mut slots: Vec<Option<&mut [F]>> = maxima[..chunk * v].chunks_exact_mut(v).map(Some).collect();
        let out = ids[texts.start * k..texts.end * k].chunks_exact_mut(k);
        let out = out.zip(weights[texts.start * k..texts.end * k].chunks_exact_mut(k));
        let parts = texts.zip(out).map(|(text, out)| {
            let (start, stop) = (cu[text] as usize, cu[text + 1] as usize);
            let maxima = slots[text % chunk].take().unwrap_or_else(|| panic!("two texts of a chunk have one slot"));
            let rows = (start + 1).max(first)..stop.min(end);
            Part { text, rows, begins: start >= first, maxima, out: (stop <= end).then_some(out) }
        });
        parts.collect::<Vec<_>>().into_par_iter().for_each(|part| {
            debug_assert!(part.text < cu.len() - 1);
            if part.begins {
                part.maxima.fill(F::of(f64::NEG_INFINITY));
            }
            vectorized(|| {
                for row in part.rows.clone() {
                    let x = &logits[(row - first) * v..][..v];
                    for (most, &x) in part.maxima.iter_mut().zip(x) {
                        *most = if x > *most { x } else { *most };
                    }
                }
            });
            if let Some((ids, weights)) = part.out {
                top_k(part.maxima, &b[..v], ids, weights);
            }
        });
    }

    fn top_k<F: Real>(maxima: &[F], b: &[F], ids: &mut [u32], weights: &mut [F]) {
        // Adding 0 leaves no −0, which would come after 0.
        let words = maxima.iter().zip(b).map(|(&x, &b)| x + b + F::ZERO).zip(0u32..);
        let mut words: Vec<(F, u32)> = words.collect();
        let order = |x: &(F, u32), y: &(F, u32)| y.0.f64().total_cmp(&x.0.f64()).then(x.1.cmp(&y.1));
        if ids.len() < words.len() {
            words.select_nth_unstable_by(ids.len() - 1, order);
            words.truncate(ids.len());
        }
        words.sort_unstable_by(order);
        for ((id, weight), word) in ids.iter_mut().zip(weights).zip(words) {
            *id = if word.0.f64() == f64::NEG_INFINITY { u32::MAX } else { word.1 };
            *weight = word.0;
        }
    }
}

/// The launches of `lexical.cu`.
mod gpu {
    use super::super::gpu::{blocks, launch_as};
    use super::{Lexical, MAX_VOCABULARY, Shape};
    use crate::device::gpu::Gpu;
    use crate::device::launch::Shape as Launch;

    /// Texts of a chunk that are worked on at a time: they have tens of rows each.
    const TEXTS: u32 = 16;

    pub fn chunk(gpu: &Gpu, a: &Lexical<'_>, first: usize) {
        let Shape { rows, vocabulary: v, chunk, k, .. } = a.shape;
        assert!(v <= MAX_VOCABULARY && v.is_multiple_of(8), "{v} words");
        let (cu_seqlens, sequence, rows) = (a.shape.cu_seqlens.get(), a.shape.sequence.get(), rows.get());
        let (first, chunk) = (first as i32, chunk as i32);
        launch_as!(
            gpu,
            a.logits,
            Launch { grid: [blocks(v, 1024), TEXTS.min(chunk as u32), 1], ..Launch::linear(1, 128) },
            LexicalMaxF32
                | LexicalMaxBf16 {
                    maxima: a.maxima.get_mut(),
                    logits: a.logits.get(),
                    cu_seqlens,
                    sequence,
                    rows,
                    first,
                    chunk,
                    V: v as i32,
                }
        );
        let size = k.next_power_of_two().max(32);
        launch_as!(
            gpu,
            a.logits,
            Launch::linear((2 * gpu.facts().multiprocessors).min(chunk as u32), 512).shared(8 * size as u32),
            LexicalTopKF32
                | LexicalTopKBf16 {
                    ids: a.ids.get_mut(),
                    weights: a.weights.get_mut(),
                    maxima: a.maxima.get(),
                    bias: a.b.get(),
                    cu_seqlens,
                    sequence,
                    rows,
                    first,
                    chunk,
                    V: v as i32,
                    K: k as i32,
                    size: size as i32,
                }
        );
    }
}
