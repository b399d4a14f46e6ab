//! Attention of RetroMAE's enhanced decoder (arXiv 2205.12035, section 3.3): every position has its own visibility mask, and no
//! position sees itself.
//!
//! RetroMAE's query of row i is `W_q (p_i + c) + b_q`, with `p_i` the position embedding and `c` the sentence embedding, so it is the sum
//! of a row of `q_position = P W_qᵀ` `[Lmax, C]` and a row of `q_sentence = c W_qᵀ + b_q` `[S, C]`; no `[T, C]` query exists. DupMAE's
//! (arXiv 2211.08769) is of a normalised sum, and comes whole. Keys and values come from the stream `[c, e_1, e_2, …]`. Masks are bit
//! rows. Formulas and saved tensors are those of `attention`.

use super::attention::Shape;
use super::{RowNames, SiteDropout};
use crate::device::{Device, Matrix, Tensor};

/// Position-specific masks of a batch, as in [`crate::data::batch::Visibility`].
#[derive(Clone, Copy)]
pub struct Visible<'a> {
    /// `[S + 1]` u32: first word of each sequence's pool.
    pub offsets: &'a Tensor,
    /// u32 bit rows.
    pub words: &'a Tensor,
    /// `[T]` u16: row of the pool, by token.
    pub row: &'a Tensor,
}

/// What the queries are made of.
#[derive(Clone, Copy)]
pub enum Queries<'a> {
    /// A sum of two rows.
    Parts {
        /// `[Lmax, C]`.
        position: &'a Tensor,
        /// `[S, C]`.
        sentence: &'a Tensor,
    },
    /// `[R, C]`.
    Whole(&'a Tensor),
}

/// Arguments of [`forward`].
pub struct Forward<'a> {
    /// Sizes; `cu_rows` counts the decoder's rows.
    pub shape: Shape<'a>,
    /// The queries.
    pub queries: Queries<'a>,
    /// `[T, C]`.
    pub k: Matrix<'a>,
    /// `[T, C]`.
    pub v: Matrix<'a>,
    /// Who sees what.
    pub visible: Visible<'a>,
    /// Names of the query rows.
    pub names: RowNames<'a>,
    /// Dropout of the probabilities.
    pub dropout: SiteDropout,
    /// `[R, C]`, written.
    pub out: &'a Tensor,
    /// `[R, H]`, on the GPU f32, written.
    pub lse: &'a Tensor,
}

/// `out = dropout(softmax(masked(Q Kᵀ / √D))) V`.
pub fn forward(device: Device, a: &Forward<'_>) {
    match device {
        Device::Cpu => super::on_cpu!(a.out, cpu::forward, a),
        Device::Gpu(gpu) => gpu::forward(gpu, a),
    }
}

/// Arguments of [`backward`].
pub struct Backward<'a> {
    /// The forward's arguments; `out` and `lse` are read here.
    pub forward: Forward<'a>,
    /// `[R, C]`.
    pub dout: &'a Tensor,
    /// `[R, C]`: gradient of each row's query, written; its sums by position and by sequence are the gradients of two parts.
    pub dq: &'a Tensor,
    /// `[T, 2C]`: dK, dV side by side, written.
    pub dkv: &'a Tensor,
}

/// Gradients of queries, keys and values.
pub fn backward(device: Device, a: &Backward<'_>) {
    match device {
        Device::Cpu => super::on_cpu!(a.dq, cpu::backward, a),
        Device::Gpu(gpu) => gpu::backward(gpu, a),
    }
}

/// The reference: builds the queries of a sequence, then the attention of `attention::cpu` with a mask.
mod cpu {
    use super::super::attention::cpu::{Drop, Sequence, SequenceGrad, Visible, split};
    use super::{Backward, Forward, Queries};
    use crate::device::Read;
    use crate::device::cpu::{Real, View, scratch};
    use rayon::prelude::*;

    /// Everything the sequences read.
    struct Inputs<'a, F> {
        /// By position, or whole; in the first case also by sequence.
        queries: (Read<'a, F>, Option<Read<'a, F>>),
        k: Read<'a, F>,
        v: Read<'a, F>,
        cu_rows: Read<'a, u32>,
        cu_seqlens: Read<'a, u32>,
        offsets: Read<'a, u32>,
        words: Read<'a, u32>,
        row: Read<'a, u16>,
        positions: Read<'a, u32>,
    }

    impl<'a, F: Real> Inputs<'a, F> {
        fn new(a: &Forward<'a>) -> Self {
            Inputs {
                queries: match a.queries {
                    Queries::Parts { position, sentence } => (position.read(), Some(sentence.read())),
                    Queries::Whole(q) => (q.read(), None),
                },
                k: a.k.tensor.read(),
                v: a.v.tensor.read(),
                cu_rows: a.shape.cu_rows.read(),
                cu_seqlens: a.shape.cu_seqlens.read(),
                offsets: a.visible.offsets.read(),
                words: a.visible.words.read(),
                row: a.visible.row.read(),
                positions: a.names.position.read(),
            }
        }

        fn rows(&self, s: usize) -> std::ops::Range<usize> {
            self.cu_rows[s] as usize..self.cu_rows[s + 1] as usize
        }

        /// Lends `f` the attention problem of sequence `s`.
        fn with(&self, a: &Forward<'_>, s: usize, f: impl FnOnce(&Sequence<'_, F>)) {
            let c = a.shape.heads * a.shape.head_size;
            let (rows, first) = (self.rows(s), self.cu_seqlens[s] as usize);
            let keys = self.cu_seqlens[s + 1] as usize - first;
            let positions = &self.positions[rows.clone()];
            scratch(rows.len() * c, |q| {
                match &self.queries {
                    (whole, None) => q.copy_from_slice(&whole[rows.start * c..rows.end * c]),
                    (by_position, Some(sentence)) => {
                        let sentence = &sentence[s * c..(s + 1) * c];
                        for (q, &p) in q.chunks_exact_mut(c).zip(positions) {
                            for ((q, &p), &s) in q.iter_mut().zip(&by_position[p as usize * c..]).zip(sentence) {
                                *q = p + s;
                            }
                        }
                    }
                }
                f(&Sequence {
                    heads: a.shape.heads,
                    head_size: a.shape.head_size,
                    keys,
                    q: View::rows(q, c),
                    k: View::rows(&self.k[a.k.offset + first * a.k.stride..], a.k.stride),
                    v: View::rows(&self.v[a.v.offset + first * a.v.stride..], a.v.stride),
                    positions,
                    visible: Some(Visible {
                        pool: &self.words[self.offsets[s] as usize..self.offsets[s + 1] as usize],
                        row: &self.row[first..first + keys],
                    }),
                    drop: Drop::new(a.dropout, &a.names, s),
                });
            });
        }
    }

    pub fn forward<F: Real>(a: &Forward<'_>) {
        let inputs = Inputs::<F>::new(a);
        let (mut out, mut lse) = (a.out.write::<F>(), a.lse.write::<F>());
        let cu_rows = &inputs.cu_rows[..a.shape.sequences + 1];
        let out = split(&mut out, cu_rows, a.shape.heads * a.shape.head_size);
        let lse = split(&mut lse, cu_rows, a.shape.heads);
        out.into_par_iter().zip(lse).enumerate().for_each(|(s, (out, lse))| {
            inputs.with(a, s, |sequence| sequence.forward(out, lse));
        });
    }

    pub fn backward<F: Real>(a: &Backward<'_>) {
        let fwd = &a.forward;
        let (h, c) = (fwd.shape.heads, fwd.shape.heads * fwd.shape.head_size);
        let inputs = Inputs::<F>::new(fwd);
        let (out, lse, dout) = (fwd.out.read::<F>(), fwd.lse.read::<F>(), a.dout.read::<F>());
        let (mut dq, mut dkv) = (a.dq.write::<F>(), a.dkv.write::<F>());
        let dq = split(&mut dq, &inputs.cu_rows[..fwd.shape.sequences + 1], c);
        let dkv = split(&mut dkv, &inputs.cu_seqlens[..fwd.shape.sequences + 1], 2 * c);
        dq.into_par_iter().zip(dkv).enumerate().for_each(|(s, (dq, wide))| {
            let r = inputs.rows(s);
            let mut grad = SequenceGrad { dq: Some(dq), wide, stride: 2 * c, dk: 0, dv: c };
            inputs.with(fwd, s, |sequence| {
                sequence.backward(
                    &out[r.start * c..r.end * c],
                    &lse[r.start * h..r.end * h],
                    &dout[r.start * c..r.end * c],
                    &mut grad,
                );
            });
        });
    }
}

/// The launches of `enhanced_decoding.cu`.
mod gpu {
    use super::super::attention::Pass;
    use super::super::attention::gpu::{batch, by_head, elements};
    use super::super::attention::hopper::{self, Whole};
    use super::super::gpu::launch;
    use super::{Backward, Forward, Queries, Visible};
    use crate::device::Element;
    use crate::device::gpu::Gpu;
    use crate::device::kernels::VisibleKeys;
    use crate::device::launch::{ConstPtr, MutPtr};

    /// Rows by position and by sequence, or whole ones and nothing.
    fn queries<T: Element>(q: Queries<'_>) -> [ConstPtr<T>; 2] {
        match q {
            Queries::Parts { position, sentence } => [position.get(), sentence.get()],
            Queries::Whole(q) => [q.get(), ConstPtr::null()],
        }
    }

    fn visible(v: &Visible<'_>) -> VisibleKeys {
        VisibleKeys { offsets: v.offsets.get(), words: v.words.get(), row: v.row.get() }
    }

    pub fn forward(gpu: &Gpu, a: &Forward<'_>) {
        let (heads, site, visible) = (a.shape.heads as i32, a.dropout.site, visible(&a.visible));
        let (dropout, batch) = (gpu.dropout(&a.dropout.mask), batch(&a.shape, &a.names, Pass::Forward));
        let hopper_grid = hopper::forward_grid(&a.shape);
        by_head!(gpu, a.out, a.shape, Pass::Forward, hopper(hopper_grid, EnhancedDecodingForwardHopperD64Bf16), [
            EnhancedDecodingForwardD32F32 EnhancedDecodingForwardD64F32 EnhancedDecodingForwardD128F32
            | EnhancedDecodingForwardD32Bf16 EnhancedDecodingForwardD64Bf16 EnhancedDecodingForwardD128Bf16
        ] {
            out: a.out.get_mut(),
            lse: a.lse.get_mut(),
            q_position: queries(a.queries)[0],
            q_sentence: queries(a.queries)[1],
            k: elements(&a.k),
            k_stride: a.k.stride as i32,
            v: elements(&a.v),
            v_stride: a.v.stride as i32,
            visible,
            batch,
            dropout,
            site,
            heads,
        });
    }

    fn hopper_backward(gpu: &Gpu, a: &Backward<'_>, whole: Whole) {
        let f = &a.forward;
        let (heads, site, visible) = (f.shape.heads as i32, f.dropout.site, visible(&f.visible));
        let (dropout, batch) = (gpu.dropout(&f.dropout.mask), batch(&f.shape, &f.names, Pass::Whole));
        let [q_position, q_sentence] = queries(f.queries);
        let (grid, tiles) = whole.grid(&f.shape);
        macro_rules! launch_kind {
            ($($kind:pat => $kernel:ident),*) => {
                match whole {
                    $($kind => launch!(gpu, grid, $kernel {
                        dq: a.dq.get_mut(),
                        dkv: a.dkv.get_mut(),
                        q_position,
                        q_sentence,
                        k: elements(&f.k),
                        k_stride: f.k.stride as i32,
                        v: elements(&f.v),
                        v_stride: f.v.stride as i32,
                        out: f.out.get(),
                        lse: f.lse.get(),
                        dout: a.dout.get(),
                        visible,
                        batch,
                        dropout,
                        site,
                        heads,
                        tiles,
                    }),)*
                }
            };
        }
        launch_kind!(Whole::Short => EnhancedDecodingBackwardShortD64Bf16, Whole::Long => EnhancedDecodingBackwardLongD64Bf16);
    }

    pub fn backward(gpu: &Gpu, a: &Backward<'_>) {
        let f = &a.forward;
        if let Some(whole) = hopper::whole(gpu, a.dq, &f.shape) {
            return hopper_backward(gpu, a, whole);
        }
        let (heads, site, visible) = (f.shape.heads as i32, f.dropout.site, visible(&f.visible));
        let dropout = gpu.dropout(&f.dropout.mask);
        let delta: MutPtr<f32> = gpu.scratch(f.lse.len());
        let rows = batch(&f.shape, &f.names, Pass::Queries);
        by_head!(gpu, a.dq, f.shape, Pass::Queries, [
            EnhancedDecodingBackwardDqD32F32 EnhancedDecodingBackwardDqD64F32 EnhancedDecodingBackwardDqD128F32
            | EnhancedDecodingBackwardDqD32Bf16 EnhancedDecodingBackwardDqD64Bf16 EnhancedDecodingBackwardDqD128Bf16
        ] {
            dq: a.dq.get_mut(),
            delta,
            q_position: queries(f.queries)[0],
            q_sentence: queries(f.queries)[1],
            k: elements(&f.k),
            k_stride: f.k.stride as i32,
            v: elements(&f.v),
            v_stride: f.v.stride as i32,
            out: f.out.get(),
            lse: f.lse.get(),
            dout: a.dout.get(),
            visible,
            batch: rows,
            dropout,
            site,
            heads,
        });
        let keys = batch(&f.shape, &f.names, Pass::Keys);
        by_head!(gpu, a.dq, f.shape, Pass::Keys, [
            EnhancedDecodingBackwardDkvD32F32 EnhancedDecodingBackwardDkvD64F32 EnhancedDecodingBackwardDkvD128F32
            | EnhancedDecodingBackwardDkvD32Bf16 EnhancedDecodingBackwardDkvD64Bf16 EnhancedDecodingBackwardDkvD128Bf16
        ] {
            dkv: a.dkv.get_mut(),
            q_position: queries(f.queries)[0],
            q_sentence: queries(f.queries)[1],
            k: elements(&f.k),
            k_stride: f.k.stride as i32,
            v: elements(&f.v),
            v_stride: f.v.stride as i32,
            lse: f.lse.get(),
            delta: delta.into(),
            dout: a.dout.get(),
            visible,
            batch: keys,
            dropout,
            site,
            heads,
        });
    }
}
