//! Joined embeddings of a bi-encoder in training: of each text its dense embedding, and behind it a column for every word of the
//! vocabulary, in which stand the weights of the text's K words ([`super::lexical`]). The inner product of two rows is the joined score,
//! dense and lexical.
//!
//! `all[place_s, 0..W] = dense_s`, `all[place_s, W + id] = weight`, 0 elsewhere. A weight is `h_i · W_id + b_id` for the row i in which
//! that is largest, so the backward goes through that row alone: `dh_i = Σ d W_id`, `dW_id += Σ d h_i`, `db_id += Σ d`, the sums over the
//! words of texts whose row i is. Words that a text does not keep have no gradient. Ids of all bits set are no word.
//!
//! Which row is largest is found again from the sums in f32, once a step, for the words that were kept; of equal ones the first counts.

use super::gpu::Rows;
use super::{Count, cross_entropy, gather, linear};
use crate::device::{Device, Matrix, Output, Tensor};

/// Sizes and borders of texts.
#[derive(Clone, Copy)]
pub struct Shape<'a> {
    /// S.
    pub texts: Count<'a>,
    /// `[S + 1]` u32: first row of each text.
    pub cu_seqlens: &'a Tensor,
    /// W.
    pub dense: usize,
    /// V, padding included.
    pub vocabulary: usize,
    /// K.
    pub k: usize,
}

/// The words of texts.
#[derive(Clone, Copy)]
pub struct Words<'a> {
    /// `[S, K]` u32.
    pub ids: &'a Tensor,
    /// `[S, K]`, on the GPU f32.
    pub weights: &'a Tensor,
}

/// Writes the rows `places [S]` (u32) of `all [N, W + V]` from `dense [S, W]` and words.
pub fn put(device: Device, shape: Shape<'_>, dense: &Tensor, words: Words<'_>, places: &Tensor, all: &Tensor) {
    match device {
        Device::Cpu => super::on_cpu!(all, cpu::put, shape, dense, words, places, all),
        Device::Gpu(gpu) => gpu::put(gpu, shape, dense, words, places, all),
    }
}

/// The way back: `d_dense [S, W]` and, in `d_words.weights`, the gradients of the words' weights, both written, from `d_all [N, W + V]`.
pub fn take(device: Device, shape: Shape<'_>, d_dense: &Tensor, d_words: Words<'_>, places: &Tensor, d_all: &Tensor) {
    match device {
        Device::Cpu => super::on_cpu!(d_all, cpu::take, shape, d_dense, d_words, places, d_all),
        Device::Gpu(gpu) => gpu::take(gpu, shape, d_dense, d_words, places, d_all),
    }
}

/// Arguments of [`backward`].
pub struct Backward<'a> {
    /// Sizes.
    pub shape: Shape<'a>,
    /// T.
    pub rows: Count<'a>,
    /// C.
    pub width: usize,
    /// Rows of `g`.
    pub chunk: usize,
    /// `[T, C]`: states after the head's transform. On the GPU rows past the true number become zero.
    pub h: &'a Tensor,
    /// `[V, C]`.
    pub w: &'a Tensor,
    /// Ids of words, and gradients of their weights.
    pub d_words: Words<'a>,
    /// `[S, K]` u32, written: the row in which each word is largest.
    pub winners: &'a Tensor,
    /// `[chunk, V]` scratch: gradients of logits.
    pub g: &'a Tensor,
    /// `[T, C]`, written.
    pub dh: &'a Tensor,
    /// `[V, C]`, added to.
    pub dw_acc: &'a Tensor,
    /// `[V]`, added to.
    pub db_acc: &'a Tensor,
}

/// Gradients of states, words and bias. Memory is that of a chunk of logits.
pub fn backward(device: Device, a: &Backward<'_>) {
    let (width, vocabulary) = (a.width, a.shape.vocabulary);
    match device {
        Device::Cpu => super::on_cpu!(a.h, cpu::winners, a),
        Device::Gpu(gpu) => {
            a.rows.zero_tails(gpu, &Rows::dense(a.h, width), None);
            gpu::winners(gpu, a);
        }
    }
    for first in (0..a.rows.rows).step_by(a.chunk) {
        let count = a.chunk.min(a.rows.rows - first);
        gather::zero(device, a.g, count * vocabulary);
        match device {
            Device::Cpu => super::on_cpu!(a.g, cpu::scatter, a, first, count),
            Device::Gpu(gpu) => gpu::scatter(gpu, a, first, count),
        }
        linear::backward(
            device,
            &linear::Backward {
                rows: count.into(),
                inputs: width,
                outputs: vocabulary,
                x: Matrix::columns(a.h, first * width, width),
                w: a.w,
                dy: Matrix::new(a.g, vocabulary),
                dx: Some((Matrix::columns(a.dh, first * width, width), Output::Set)),
                dw_acc: a.dw_acc,
                db_acc: (!device.is_gpu()).then_some(a.db_acc),
            },
        );
        if let Device::Gpu(gpu) = device {
            cross_entropy::add_columns(gpu, a.g, a.rows, (first, count), vocabulary, a.db_acc);
        }
    }
}

/// The reference: texts in parallel.
mod cpu {
    use super::{Backward, Shape, Words};
    use crate::device::Tensor;
    use crate::device::cpu::{Real, vectorized};
    use rayon::prelude::*;

    /// No word.
    const NONE: u32 = u32::MAX;

    pub fn put<F: Real>(a: Shape<'_>, dense: &Tensor, words: Words<'_>, places: &Tensor, all: &Tensor) {
        let (w, row) = (a.dense, a.dense + a.vocabulary);
        let (dense, ids, weights) = (dense.read::<F>(), words.ids.read::<u32>(), words.weights.read::<F>());
        let mut all = all.write::<F>();
        for (s, &place) in places.read::<u32>()[..a.texts.rows].iter().enumerate() {
            let to = &mut all[place as usize * row..][..row];
            to[..w].copy_from_slice(&dense[s * w..][..w]);
            to[w..].fill(F::ZERO);
            for k in (s * a.k..(s + 1) * a.k).filter(|&k| ids[k] != NONE) {
                to[w + ids[k] as usize] = weights[k];
            }
        }
    }

    pub fn take<F: Real>(a: Shape<'_>, d_dense: &Tensor, d_words: Words<'_>, places: &Tensor, d_all: &Tensor) {
        let (w, row) = (a.dense, a.dense + a.vocabulary);
        let (mut d_dense, mut d_weights) = (d_dense.write::<F>(), d_words.weights.write::<F>());
        let (ids, d_all) = (d_words.ids.read::<u32>(), d_all.read::<F>());
        for (s, &place) in places.read::<u32>()[..a.texts.rows].iter().enumerate() {
            let from = &d_all[place as usize * row..][..row];
            d_dense[s * w..][..w].copy_from_slice(&from[..w]);
            for k in s * a.k..(s + 1) * a.k {
                d_weights[k] = if ids[k] == NONE { F::ZERO } else { from[w + ids[k] as usize] };
            }
        }
    }

    pub fn winners<F: Real>(a: &Backward<'_>) {
        let (c, k) = (a.width, a.shape.k);
        let (h, w, ids) = (a.h.read::<F>(), a.w.read::<F>(), a.d_words.ids.read::<u32>());
        let (cu, mut winners) = (a.shape.cu_seqlens.read::<u32>(), a.winners.write::<u32>());
        winners[..a.shape.texts.rows * k].par_chunks_exact_mut(k).enumerate().for_each(|(s, winners)| {
            for (winner, &id) in winners.iter_mut().zip(&ids[s * k..]) {
                *winner = NONE;
                if id == NONE {
                    continue;
                }
                let (word, mut most) = (&w[id as usize * c..][..c], F::ZERO);
                for row in cu[s] + 1..cu[s + 1] {
                    let x = &h[row as usize * c..][..c];
                    let sum = vectorized(|| x.iter().zip(word).fold(F::ZERO, |sum, (&x, &w)| sum + x * w));
                    if *winner == NONE || sum > most {
                        (most, *winner) = (sum, row);
                    }
                }
            }
        });
    }

    pub fn scatter<F: Real>(a: &Backward<'_>, first: usize, count: usize) {
        let (winners, ids) = (a.winners.read::<u32>(), a.d_words.ids.read::<u32>());
        let (d_weights, mut g) = (a.d_words.weights.read::<F>(), a.g.write::<F>());
        for at in (0..a.shape.texts.rows * a.shape.k).filter(|&at| winners[at] != NONE) {
            let row = winners[at] as usize;
            if (first..first + count).contains(&row) {
                g[(row - first) * a.shape.vocabulary + ids[at] as usize] = d_weights[at];
            }
        }
    }
}

/// The launches of `joined.cu`.
mod gpu {
    use super::super::gpu::{blocks, launch_as};
    use super::{Backward, Shape, Words};
    use crate::device::Tensor;
    use crate::device::gpu::Gpu;
    use crate::device::launch::Shape as Launch;

    pub fn put(gpu: &Gpu, a: Shape<'_>, dense: &Tensor, words: Words<'_>, places: &Tensor, all: &Tensor) {
        launch_as!(
            gpu,
            all,
            Launch::linear(a.texts.rows as u32, 256),
            JoinedPutF32
                | JoinedPutBf16 {
                    all: all.get_mut(),
                    dense: dense.get(),
                    ids: words.ids.get(),
                    weights: words.weights.get(),
                    places: places.get(),
                    texts: a.texts.get(),
                    W: a.dense as i32,
                    V: a.vocabulary as i32,
                    K: a.k as i32,
                }
        );
    }

    pub fn take(gpu: &Gpu, a: Shape<'_>, d_dense: &Tensor, d_words: Words<'_>, places: &Tensor, d_all: &Tensor) {
        launch_as!(
            gpu,
            d_all,
            Launch::linear(a.texts.rows as u32, 256),
            JoinedTakeF32
                | JoinedTakeBf16 {
                    d_dense: d_dense.get_mut(),
                    d_weights: d_words.weights.get_mut(),
                    d_all: d_all.get(),
                    ids: d_words.ids.get(),
                    places: places.get(),
                    texts: a.texts.get(),
                    W: a.dense as i32,
                    V: a.vocabulary as i32,
                    K: a.k as i32,
                }
        );
    }

    pub fn winners(gpu: &Gpu, a: &Backward<'_>) {
        let (texts, k) = (a.shape.texts, a.shape.k);
        launch_as!(
            gpu,
            a.h,
            Launch { grid: [texts.rows as u32, blocks(k, 8), 1], ..Launch::linear(1, 256) },
            JoinedWinnersF32
                | JoinedWinnersBf16 {
                    winners: a.winners.get_mut(),
                    h: a.h.get(),
                    w: a.w.get(),
                    ids: a.d_words.ids.get(),
                    cu_seqlens: a.shape.cu_seqlens.get(),
                    texts: texts.get(),
                    C: a.width as i32,
                    K: k as i32,
                }
        );
    }

    pub fn scatter(gpu: &Gpu, a: &Backward<'_>, first: usize, count: usize) {
        launch_as!(
            gpu,
            a.g,
            Launch::linear(a.shape.texts.rows as u32, 128),
            JoinedScatterF32
                | JoinedScatterBf16 {
                    g: a.g.get_mut(),
                    d_weights: a.d_words.weights.get(),
                    ids: a.d_words.ids.get(),
                    winners: a.winners.get(),
                    texts: a.shape.texts.get(),
                    first: first as i32,
                    chunk: count as i32,
                    V: a.shape.vocabulary as i32,
                    K: a.shape.k as i32,
                }
        );
    }
}
