//! LM head with two losses in one op: masked-LM cross entropy of the labelled rows, and the bag-of-words loss of whole sequences
//! (DupMAE, arXiv 2211.08769, section 3.2).
//!
//! `x = h Wᵀ + b`; `u_v` is the largest `x_rv` over a sequence's rows but its first (ties: the lowest row). A sequence's bag loss is
//! `weight Σ (lse(u) − u_j)` over the distinct words j of its text; one of a single row or an empty bag has none.
//!
//! Rows come in chunks of whole sequences, so neither the logits of a batch nor `u` of its sequences ever exist: both losses' gradient
//! takes the place of a chunk's logits and is used at once for `dh = g W`, `dW += gᵀ h`, `db += Σ g`.

use super::cross_entropy::Scale;
use super::gpu::Rows;
use super::{Count, linear};
use crate::device::{Device, Matmul, Matrix, Output, Product, Tensor};

/// In the place of a label: none.
pub const NO_LABEL: u32 = u32::MAX;

/// Rows of a sequence whose maxima are found together.
pub const SLAB: usize = 64;

/// Most rows of a chunk: a row is named by 16 bits, the last of which says nowhere.
pub const MOST_ROWS: usize = 65_535;

/// Sizes that all chunks are laid out for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// C.
    pub width: usize,
    /// V, padding included; its bias is −∞.
    pub vocabulary: usize,
    /// Most sequences of a chunk.
    pub sequences: usize,
    /// Most slabs of a chunk.
    pub slabs: usize,
}

/// One chunk: its sequences in the order of the batch, side by side. Slots are rows of the chunk.
#[derive(Clone, Copy)]
pub struct Chunk<'a> {
    /// Rows in use; the logits buffer has as many as this may be.
    pub rows: Count<'a>,
    /// `[6]` u32: rows, sequences, slabs of theirs, slabs in all, labels, number of the first label in the batch.
    pub counts: &'a Tensor,
    /// `[sequences]` u32: number of each in the batch.
    pub sequence: &'a Tensor,
    /// `[sequences + 1]` u32: first slot of each.
    pub cu_rows: &'a Tensor,
    /// `[sequences + 1]` u32: first slab of each.
    pub cu_slabs: &'a Tensor,
    /// `[slabs, 3]` u32: sequence of the chunk, first slot, end; behind them those of slots without one, whose gradient is 0.
    pub slabs: &'a Tensor,
    /// `[labels]` u32: their slots, ascending.
    pub label_slots: &'a Tensor,
    /// `[rows]` u32: label of each slot, or [`NO_LABEL`].
    pub labels: &'a Tensor,
    /// `[sequences + 1]` u32: first word of each bag.
    pub cu_bags: &'a Tensor,
    /// u32: the words of all bags, ascending and distinct in each.
    pub words: &'a Tensor,
    /// `[sequences]` f32: weight of each word of a bag.
    pub weights: &'a Tensor,
}

/// Gradients that the op also computes.
pub struct Gradients<'a> {
    /// Weight of a row's loss.
    pub label_scale: Scale<'a>,
    /// Weight of a sequence's.
    pub bag_scale: Scale<'a>,
    /// `[rows, C]`, written.
    pub dh: &'a Tensor,
    /// `[V, C]`, added to.
    pub dw_acc: &'a Tensor,
    /// `[V]`, added to.
    pub db_acc: &'a Tensor,
}

/// Arguments of [`run`].
pub struct BagOfWords<'a> {
    /// Sizes.
    pub shape: Shape,
    /// What goes through.
    pub chunk: Chunk<'a>,
    /// `[rows, C]`. On the GPU rows past the true number become zero where gradients are asked for.
    pub h: &'a Tensor,
    /// `[V, C]`.
    pub w: &'a Tensor,
    /// `[V]`, on the GPU f32.
    pub b: &'a Tensor,
    /// `[rows, V]` scratch.
    pub logits: &'a Tensor,
    /// `[labels of the batch]`, on the GPU f32: loss of each row; the chunk's are written.
    pub row_loss: &'a Tensor,
    /// `[labels of the batch]` u32: 1 where the label has the largest logit; the chunk's are written.
    pub row_correct: &'a Tensor,
    /// `[sequences of the batch]`, on the GPU f32: bag loss of each; the chunk's are written.
    pub bag_loss: &'a Tensor,
    /// Nothing: losses only.
    pub gradients: Option<Gradients<'a>>,
}

/// Losses of a chunk and, if asked for, all gradients.
pub fn run(device: Device, a: &BagOfWords<'_>) {
    let (rows, Shape { width, vocabulary, .. }) = (a.chunk.rows, a.shape);
    if rows.rows == 0 {
        return;
    }
    if let (Device::Gpu(gpu), Some(_)) = (device, &a.gradients) {
        rows.zero_tails(gpu, &Rows::dense(a.h, width), None);
    }
    let (x, logits) = (Matrix::new(a.h, width), Matrix::new(a.logits, vocabulary));
    // On the GPU the bias is added where the logits are read.
    let b = (!device.is_gpu()).then_some(a.b);
    let count = rows.rows.into();
    linear::forward(
        device,
        &linear::Forward { rows: count, inputs: width, outputs: vocabulary, x, w: a.w, b, y: logits },
    );
    match device {
        Device::Cpu => super::on_cpu!(a.h, cpu::losses, a),
        Device::Gpu(gpu) => gpu::losses(gpu, a),
    }
    let Some(g) = &a.gradients else { return };
    device.matmul(&Matmul {
        product: Product::NN,
        m: rows.rows,
        n: width,
        k: vocabulary,
        a: logits,
        b: Matrix::new(a.w, width),
        c: Matrix::new(g.dh, width),
        output: Output::Set,
        bias: None,
    });
    device.matmul(&Matmul {
        product: Product::TN,
        m: vocabulary,
        n: width,
        k: rows.rows,
        a: logits,
        b: x,
        c: Matrix::new(g.dw_acc, width),
        output: Output::Add,
        bias: None,
    });
}

/// The reference: sequences in parallel, each going through its rows twice, first for the maxima, then for the gradient.
mod cpu {
    use super::super::attention::cpu::split;
    use super::{BagOfWords, NO_LABEL};
    use crate::device::Read;
    use crate::device::cpu::{Real, max, scratch, sum1, vectorized};
    use rayon::prelude::*;

    /// The tables of the chunk.
    struct Tables<'a, F> {
        cu_rows: Read<'a, u32>,
        cu_bags: Read<'a, u32>,
        words: Read<'a, u32>,
        weights: Read<'a, f32>,
        labels: Read<'a, u32>,
        /// Weights of a row's and of a sequence's loss, where gradients are asked for.
        scales: Option<[F; 2]>,
        vocabulary: usize,
    }

    pub fn losses<F: Real>(a: &BagOfWords<'_>) {
        let (v, chunk) = (a.shape.vocabulary, &a.chunk);
        let counts = chunk.counts.read::<u32>();
        let [rows, sequences, labels, first] = [0, 1, 4, 5].map(|i| counts[i] as usize);
        let tables = Tables {
            cu_rows: chunk.cu_rows.read(),
            cu_bags: chunk.cu_bags.read(),
            words: chunk.words.read(),
            weights: chunk.weights.read(),
            labels: chunk.labels.read(),
            scales: a.gradients.as_ref().map(|g| [g.label_scale.value, g.bag_scale.value].map(F::of)),
            vocabulary: v,
        };
        let (number, slots) = (chunk.sequence.read::<u32>(), chunk.label_slots.read::<u32>());
        let mut logits = a.logits.write::<F>();
        let (mut loss, mut correct) = (a.row_loss.write::<F>(), a.row_correct.write::<u32>());
        let mut bag_loss = a.bag_loss.write::<F>();
        // Maximum and sum of each slot with a label.
        scratch(2 * rows, |statistics: &mut [F]| {
            for (i, &slot) in slots[..labels].iter().enumerate() {
                let (slot, label) = (slot as usize, tables.labels[slot as usize] as usize);
                let x = &logits[slot * v..][..v];
                let (top, sum) = vectorized(|| {
                    let top = max(x);
                    let sum = sum1(
                        x,
                        #[inline(always)]
                        |x| (x - top).exp(),
                    );
                    (top, sum)
                });
                (loss[first + i], correct[first + i]) = (top + sum.ln() - x[label], u32::from(x[label] >= top));
                (statistics[2 * slot], statistics[2 * slot + 1]) = (top, sum);
            }
            let statistics = &*statistics;
            let done: Vec<F> = split(&mut logits[..rows * v], &tables.cu_rows[..sequences + 1], v)
                .into_par_iter()
                .enumerate()
                .map(|(s, x)| scratch(v, |u| tables.sequence(s, x, u, statistics)))
                .collect();
            for (&number, loss) in number.iter().zip(done) {
                bag_loss[number as usize] = loss;
            }
        });
        if let Some(g) = &a.gradients {
            const BLOCK: usize = 512;
            g.db_acc.write::<F>()[..v].par_chunks_mut(BLOCK).enumerate().for_each(|(block, db)| {
                vectorized(|| {
                    for row in 0..rows {
                        for (db, &x) in db.iter_mut().zip(&logits[row * v + block * BLOCK..]) {
                            *db += x;
                        }
                    }
                });
            });
        }
    }

    impl<F: Real> Tables<'_, F> {
        /// Bag loss of sequence `s` of the chunk, whose logits `x` become their gradient where that is asked for. `u` `[V]` is scratch.
        fn sequence(&self, s: usize, x: &mut [F], u: &mut [F], statistics: &[F]) -> F {
            let v = self.vocabulary;
            let words = &self.words[self.cu_bags[s] as usize..self.cu_bags[s + 1] as usize];
            let weight = F::of(f64::from(self.weights[s]));
            let counts = x.len() > v && !words.is_empty();
            let (mut loss, mut maximum, mut sum) = (F::ZERO, F::ZERO, F::ONE);
            if counts {
                vectorized(|| {
                    u.copy_from_slice(&x[v..2 * v]);
                    for x in x.chunks_exact(v).skip(2) {
                        for (u, &x) in u.iter_mut().zip(x) {
                            *u = u.max(x);
                        }
                    }
                    maximum = max(u);
                    sum = sum1(
                        u,
                        #[inline(always)]
                        |u| (u - maximum).exp(),
                    );
                });
                let lse = maximum + sum.ln();
                loss = words.iter().fold(F::ZERO, |loss, &word| loss + weight * (lse - u[word as usize]));
            }
            let Some([label_scale, bag_scale]) = self.scales else { return loss };
            // Gradient of u, for whichever row it is of.
            scratch(v, |du| {
                if counts {
                    let factor = bag_scale * weight * F::of(words.len() as f64) / sum;
                    vectorized(|| {
                        for (du, &u) in du.iter_mut().zip(&*u) {
                            *du = (u - maximum).exp() * factor;
                        }
                    });
                    words.iter().for_each(|&word| du[word as usize] = du[word as usize] - bag_scale * weight);
                }
                for (row, x) in x.chunks_exact_mut(v).enumerate() {
                    let slot = self.cu_rows[s] as usize + row;
                    let label = self.labels[slot];
                    let taken = (counts && row > 0).then_some(());
                    let (top, scale) = match label {
                        NO_LABEL => (F::ZERO, F::ZERO),
                        _ => (statistics[2 * slot], label_scale / statistics[2 * slot + 1]),
                    };
                    let own = (label != NO_LABEL).then(|| x[label as usize]);
                    vectorized(|| match (taken, own) {
                        (None, None) => x.fill(F::ZERO),
                        (None, Some(_)) => x.iter_mut().for_each(|x| *x = (*x - top).exp() * scale),
                        (Some(()), None) => {
                            for ((x, u), &du) in x.iter_mut().zip(&mut *u).zip(&*du) {
                                *x = take(*x, u, du);
                            }
                        }
                        (Some(()), Some(_)) => {
                            for ((x, u), &du) in x.iter_mut().zip(&mut *u).zip(&*du) {
                                *x = (*x - top).exp() * scale + take(*x, u, du);
                            }
                        }
                    });
                    if own.is_some() {
                        x[label as usize] = x[label as usize] - label_scale;
                    }
                }
            });
            loss
        }
    }

    /// The gradient `du` where the logit is the maximum `u`, which then is of no later row.
    #[inline(always)]
    fn take<F: Real>(x: F, u: &mut F, du: F) -> F {
        let is = x == *u;
        *u = if is { -F::NEG_INFINITY } else { *u };
        if is { du } else { F::ZERO }
    }
}

/// The launches of `bag_of_words.cu`.
mod gpu {
    use super::super::gpu::{blocks, launch, launch_as};
    use super::BagOfWords;
    use crate::device::gpu::Gpu;
    use crate::device::kernels::HeadChunk;
    use crate::device::launch::{ConstPtr, MutPtr, Shape};

    /// Rows of a block of the statistics, columns of a block of everything else.
    const ROWS: usize = 4;
    const COLUMNS: usize = 1024;

    /// Temporary memory of a chunk, a few rows of V for each of its sequences and slabs.
    struct Scratch {
        stats: MutPtr<f32>,
        bags: MutPtr<f32>,
        partial: MutPtr<f32>,
        place: MutPtr<u16>,
        slab_place: MutPtr<u16>,
        /// The slabs' maxima, in the storage type, then their sums of gradients.
        slabs: u64,
    }

    impl Scratch {
        fn new(gpu: &Gpu, a: &BagOfWords<'_>) -> Self {
            let (v, sequences, slabs) = (a.shape.vocabulary, a.shape.sequences, a.shape.slabs);
            let lengths =
                [2 * a.chunk.rows.rows, 2 * sequences, 2 * sequences * parts(v), sequences * v / 2, slabs * v / 2];
            let lengths = lengths.map(|len| len.next_multiple_of(64));
            let all: MutPtr<f32> = gpu.scratch(lengths.iter().sum::<usize>() + slabs * v);
            let mut at = [0; 6];
            for (i, len) in lengths.iter().enumerate() {
                at[i + 1] = at[i] + len;
            }
            let [stats, bags, partial, place, slab_place, slabs] = at.map(|at| all.offset(at));
            let [place, slab_place] = [place, slab_place].map(|at| MutPtr::new(at.address()));
            Scratch { stats, bags, partial, place, slab_place, slabs: slabs.address() }
        }
    }

    fn parts(vocabulary: usize) -> usize {
        vocabulary.div_ceil(COLUMNS)
    }

    fn tables(a: &BagOfWords<'_>) -> HeadChunk {
        let c = &a.chunk;
        HeadChunk {
            counts: c.counts.get(),
            sequence: c.sequence.get(),
            cu_rows: c.cu_rows.get(),
            cu_slabs: c.cu_slabs.get(),
            slabs: c.slabs.get(),
            label_slots: c.label_slots.get(),
            labels: c.labels.get(),
            cu_bags: c.cu_bags.get(),
            words: c.words.get(),
            weights: c.weights.get(),
        }
    }

    /// Both losses, and gradients in place of the logits where they are asked for.
    pub fn losses(gpu: &Gpu, a: &BagOfWords<'_>) {
        let (rows, sequences, slabs) = (a.chunk.rows.rows, a.shape.sequences, a.shape.slabs);
        let (v, parts) = (a.shape.vocabulary as i32, parts(a.shape.vocabulary));
        let (scratch, chunk, bias) = (Scratch::new(gpu, a), tables(a), a.b.get());
        let scale = |scale: super::Scale<'_>| -> ConstPtr<f32> {
            let on_device = scale.on_device.map(|scale| scale.get());
            on_device.unwrap_or_else(|| panic!("the bag-of-words loss needs its scales in device memory"))
        };
        let scales = a.gradients.as_ref().map(|g| [scale(g.label_scale), scale(g.bag_scale)]);
        let [label_scale, bag_scale] = scales.unwrap_or([ConstPtr::null(); 2]);
        let columns = |rows: usize| Shape { grid: [parts as u32, rows as u32, 1], ..Shape::linear(1, 128) };
        let (stats, row_loss, row_correct) = (scratch.stats, a.row_loss.get_mut(), a.row_correct.get_mut());
        launch_as!(
            gpu,
            a.logits,
            Shape::linear(blocks(rows, ROWS), 512),
            BagOfWordsRowsF32
                | BagOfWordsRowsBf16 {
                    stats,
                    row_loss,
                    row_correct,
                    logits: a.logits.get(),
                    bias,
                    chunk,
                    label_scale,
                    V: v,
                }
        );
        launch_as!(
            gpu,
            a.logits,
            columns(slabs),
            BagOfWordsSlabsF32
                | BagOfWordsSlabsBf16 {
                    top: MutPtr::new(scratch.slabs),
                    place: scratch.slab_place,
                    logits: a.logits.get(),
                    chunk,
                    V: v,
                }
        );
        launch_as!(
            gpu,
            a.logits,
            columns(sequences),
            BagOfWordsPlacesF32
                | BagOfWordsPlacesBf16 {
                    place: scratch.place,
                    partial: scratch.partial,
                    top: ConstPtr::new(scratch.slabs),
                    slab_place: scratch.slab_place.into(),
                    bias,
                    chunk,
                    V: v,
                }
        );
        launch_as!(
            gpu,
            a.logits,
            Shape::linear(sequences as u32, 128),
            BagOfWordsLossF32
                | BagOfWordsLossBf16 {
                    bag_loss: a.bag_loss.get_mut(),
                    bags: scratch.bags,
                    partial: scratch.partial.into(),
                    logits: a.logits.get(),
                    bias,
                    place: scratch.place.into(),
                    chunk,
                    bag_scale,
                    parts: parts as i32,
                    V: v,
                }
        );
        let Some(g) = &a.gradients else { return };
        launch_as!(
            gpu,
            a.logits,
            columns(slabs),
            BagOfWordsGradientF32
                | BagOfWordsGradientBf16 {
                    logits: a.logits.get_mut(),
                    sums: MutPtr::new(scratch.slabs),
                    stats: stats.into(),
                    bags: scratch.bags.into(),
                    bias,
                    place: scratch.place.into(),
                    chunk,
                    label_scale,
                    bag_scale,
                    V: v,
                }
        );
        let (db_acc, sums) = (g.db_acc.get_mut(), ConstPtr::new(scratch.slabs));
        let grid = Shape::linear(blocks(a.shape.vocabulary, 256), 256);
        launch!(gpu, grid, BagOfWordsBias { db_acc, sums, counts: chunk.counts, V: v });
    }
}
