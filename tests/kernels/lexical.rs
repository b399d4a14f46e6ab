//! The largest words of texts, from logits that are given: results must equal a sort bit for bit, ties included.

use crate::harness::*;
use half::bf16;
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::kernels::*;
use retromae_engine::device::launch::Shape;
use retromae_engine::error::Result;

/// Texts of the capacity that are not in use.
const SPARE: usize = 3;

#[derive(Clone, Copy)]
struct Case {
    lengths: &'static [usize],
    /// Words, the last three of them padding.
    vocabulary: usize,
    k: usize,
    chunk: usize,
    /// Blocks that share the texts of a chunk.
    blocks: u32,
    /// Integers of -2 to 2: many equal weights.
    coarse: bool,
}

const PLAIN: Case = Case { lengths: &[4, 1, 7, 2], vocabulary: 64, k: 5, chunk: 64, blocks: 2, coarse: false };

/// Arguments of both kernels.
struct Chunk<'a, T> {
    maxima: &'a Buffer<T>,
    logits: &'a Buffer<T>,
    bias: &'a Buffer<f32>,
    cu_seqlens: &'a Buffer<u32>,
    sequence: &'a Buffer<u32>,
    rows: &'a Buffer<i32>,
    ids: &'a Buffer<u32>,
    weights: &'a Buffer<f32>,
    first: usize,
}

/// Entry points of one storage type.
trait Kernels: Storage {
    fn launch(device: &'static Gpu, case: &Case, a: &Chunk<Self>) -> Result<()>;
}

macro_rules! kernels {
    ($t:ty, $max:ident, $top:ident) => {
        impl Kernels for $t {
            fn launch(device: &'static Gpu, case: &Case, a: &Chunk<Self>) -> Result<()> {
                let (cu_seqlens, sequence, rows) = (a.cu_seqlens.get(), a.sequence.get(), a.rows.get());
                let (first, chunk, v) = (a.first as i32, case.chunk as i32, case.vocabulary as i32);
                let grid = [case.vocabulary.div_ceil(1024) as u32, case.blocks, 1];
                let maxima = a.maxima.get_mut();
                $max { maxima, logits: a.logits.get(), cu_seqlens, sequence, rows, first, chunk, V: v }
                    .launch(device, Shape { grid, ..Shape::linear(1, 128) })?;
                let (ids, weights, maxima, bias) = (a.ids.get_mut(), a.weights.get_mut(), a.maxima.get(), a.bias.get());
                let size = case.k.next_power_of_two().max(32) as i32;
                let k = case.k as i32;
                $top { ids, weights, maxima, bias, cu_seqlens, sequence, rows, first, chunk, V: v, K: k, size }
                    .launch(device, Shape::linear(case.blocks, 512).shared(8 * size as u32))
            }
        }
    };
}
kernels!(f32, LexicalMaxF32, LexicalTopKF32);
kernels!(bf16, LexicalMaxBf16, LexicalTopKBf16);

impl Case {
    fn rows(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Logits and bias.
    fn x<T: Storage>(&self) -> (Vec<f32>, Vec<f32>) {
        let (mut x, mut bias) = (normal(self.rows() * self.vocabulary, 1), normal(self.vocabulary, 2));
        if self.coarse {
            x.iter_mut().chain(&mut bias).for_each(|x| *x = x.round().clamp(-2.0, 2.0));
        }
        bias[self.vocabulary - 3..].fill(f32::NEG_INFINITY);
        (rounded::<T>(&x), bias)
    }

    fn sorted<T: Storage>(&self) -> (Vec<u32>, Vec<f32>) {
        let ((x, bias), v) = (self.x::<T>(), self.vocabulary);
        let (mut ids, mut weights, mut first) = (Vec::new(), Vec::new(), 0);
        for &length in self.lengths {
            let rows = &x[(first + 1) * v..(first + length) * v];
            first += length;
            let most = |word: usize| rows.chunks(v).map(|row| row[word]).fold(f32::NEG_INFINITY, f32::max);
            let mut all: Vec<(f32, u32)> = (0..v).map(|word| (most(word) + bias[word] + 0.0, word as u32)).collect();
            all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            ids.extend(all[..self.k].iter().map(|a| if length == 1 { u32::MAX } else { a.1 }));
            weights.extend(all[..self.k].iter().map(|a| a.0));
        }
        (ids, weights)
    }

    fn check<T: Kernels>(&self) {
        let ((x, bias), v, texts) = (self.x::<T>(), self.vocabulary, self.lengths.len());
        let borders: Vec<u32> = (0..=texts).map(|s| self.lengths[..s].iter().sum::<usize>() as u32).collect();
        let sequence: Vec<u32> = self.lengths.iter().zip(0..).flat_map(|(&n, s)| vec![s; n]).collect();
        let got = in_every_order(|on| {
            let of = |x: &[u32]| Buffer::with_room(on, x, x.len() + SPARE);
            let (cu_seqlens, sequence) = (of(&borders), of(&sequence));
            let (rows, bias) = (Buffer::of(on, &[self.rows() as i32]), Buffer::of(on, &bias));
            let maxima = Buffer::<T>::poisoned(on, self.chunk * v);
            let ids = Buffer::<u32>::poisoned(on, (texts + SPARE) * self.k);
            let weights = Buffer::<f32>::poisoned(on, (texts + SPARE) * self.k);
            // A chunk more than there are rows, as work for a bound has it.
            for first in (0..self.rows() + self.chunk).step_by(self.chunk) {
                let chunk = &x[(first * v).min(x.len())..((first + self.chunk) * v).min(x.len())];
                let logits = stored::<T>(on, chunk, self.chunk * v - chunk.len());
                let chunk = Chunk {
                    maxima: &maxima,
                    logits: &logits,
                    bias: &bias,
                    cu_seqlens: &cu_seqlens,
                    sequence: &sequence,
                    rows: &rows,
                    ids: &ids,
                    weights: &weights,
                    first,
                };
                T::launch(on, self, &chunk).expect("a correct kernel raises nothing");
                on.synchronize().expect("a correct kernel raises nothing");
            }
            let ids = ids.take(texts * self.k).into_iter().map(f32::from_bits).collect();
            vec![ids, weights.take(texts * self.k)]
        });
        let (ids, weights) = self.sorted::<T>();
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&got[0]), ids, "ids");
        assert_eq!(bits(&got[1]), bits(&weights), "weights");
    }

    fn check_both(&self) {
        self.check::<f32>();
        self.check::<bf16>();
    }
}

/// A text of one row among others; one that is alone; as many words as there are without the padding.
#[test]
fn words_are_those_of_a_sort() {
    PLAIN.check_both();
    Case { lengths: &[1], ..PLAIN }.check_both();
    Case { lengths: &[2, 2], k: 61, ..PLAIN }.check_both();
}

/// Texts that begin or end with a chunk, go over several, or share one.
#[test]
fn chunks() {
    for chunk in [1, 3, 4, 5, 14] {
        Case { chunk, ..PLAIN }.check_both();
    }
    Case { lengths: &[30, 3], chunk: 7, blocks: 1, ..PLAIN }.check_both();
}

/// More words than a block has columns, and than it has threads; the K-th largest weight is one of many.
#[test]
fn equal_weights() {
    Case { vocabulary: 1608, k: 100, coarse: true, ..PLAIN }.check_both();
    Case { vocabulary: 1608, k: 1, coarse: true, lengths: &[3], ..PLAIN }.check_both();
}

/// K of a whole power of two, and of more than a block has threads.
#[test]
fn many_words() {
    Case { vocabulary: 2056, k: 128, lengths: &[3, 2], ..PLAIN }.check_both();
    Case { vocabulary: 2056, k: 1300, lengths: &[3, 2], ..PLAIN }.check::<bf16>();
}
