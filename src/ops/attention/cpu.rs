//! The reference: sequences in parallel, a head at a time with the whole score matrix; no tiling, no online softmax. Shared with the
//! enhanced decoder, which adds a visibility mask.

use super::{Backward, Forward, Gradient, RowNames, SiteDropout};
use crate::device::cpu::{Real, Threads, View, gemm, max, scratch, sum1, sum2, vectorized};
use crate::device::{Output, Read};
use rayon::prelude::*;

/// Which keys each query row of a sequence sees.
#[derive(Clone, Copy)]
pub struct Visible<'a> {
    /// Bit rows of the sequence's pool.
    pub pool: &'a [u32],
    /// Row of the pool, by position.
    pub row: &'a [u16],
}

/// Dropout of one sequence's probabilities.
#[derive(Clone, Copy)]
pub struct Drop {
    pub site: SiteDropout,
    pub sample: u64,
}

impl Drop {
    pub fn new(site: SiteDropout, names: &RowNames<'_>, sequence: usize) -> Self {
        Drop { site, sample: names.samples.read::<u64>()[sequence] }
    }
}

/// Attention of one sequence: Lq query rows over L keys.
pub struct Sequence<'a, F> {
    pub heads: usize,
    pub head_size: usize,
    /// L.
    pub keys: usize,
    pub q: View<'a, F>,
    pub k: View<'a, F>,
    pub v: View<'a, F>,
    /// `[Lq]` position of each query.
    pub positions: &'a [u32],
    pub visible: Option<Visible<'a>>,
    pub drop: Drop,
}

impl<F: Real> Sequence<'_, F> {
    fn head<'b>(&self, m: View<'b, F>, head: usize) -> View<'b, F> {
        View { data: &m.data[(head * self.head_size).min(m.data.len())..], ..m }
    }

    fn scale(&self) -> F {
        F::of(1.0 / (self.head_size as f64).sqrt())
    }

    /// `[Lq, L]` scaled scores, hidden ones −∞.
    fn scores(&self, head: usize, s: &mut [F]) {
        let (n, l) = (self.positions.len(), self.keys);
        let (q, k) = (self.head(self.q, head), self.head(self.k, head));
        gemm((n, l, self.head_size), self.scale(), q, k.t(), s, l, Output::Set, Threads::One);
        let Some(visible) = self.visible else { return };
        let words = l.div_ceil(32);
        for (s, &own) in s.chunks_exact_mut(l).zip(self.positions) {
            let bits = &visible.pool[visible.row[own as usize] as usize * words..][..words];
            for (s, &bits) in s.chunks_mut(32).zip(bits) {
                for (j, s) in s.iter_mut().enumerate() {
                    *s = if bits >> j & 1 == 0 { F::NEG_INFINITY } else { *s };
                }
            }
            s[own as usize] = F::NEG_INFINITY;
        }
    }

    /// Zeroes or scales the probabilities (or their gradients) of one row.
    #[inline(always)]
    fn dropout_row(&self, head: usize, row: usize, p: &mut [F]) {
        let mask = self.drop.site.mask;
        if !mask.is_on() {
            return;
        }
        let scale = F::of(mask.scale());
        let base = (head as u32) << 13;
        mask.each(self.drop.site.site, self.drop.sample, self.positions[row], base, p.len(), |j, keep| {
            p[j] = if keep { p[j] * scale } else { F::ZERO };
        });
    }

    /// `out [Lq, H·D]` and `lse [Lq, H]` of all heads.
    pub fn forward(&self, out: &mut [F], lse: &mut [F]) {
        let (n, l, d, c) = (self.positions.len(), self.keys, self.head_size, self.heads * self.head_size);
        if n == 0 {
            return;
        }
        scratch(n * l, |s| {
            for head in 0..self.heads {
                self.scores(head, s);
                vectorized(|| {
                    for (row, s) in s.chunks_exact_mut(l).enumerate() {
                        lse[row * self.heads + head] = softmax(s);
                        self.dropout_row(head, row, s);
                    }
                });
                let (p, v) = (View::rows(&*s, l), self.head(self.v, head));
                gemm((n, d, l), F::ONE, p, v, &mut out[head * d..], c, Output::Set, Threads::One);
            }
        });
    }

    /// Gradients of all heads from the saved `out`, `lse` and the incoming `dout`.
    pub fn backward(&self, out: &[F], lse: &[F], dout: &[F], grad: &mut SequenceGrad<'_, F>) {
        let (n, l, d, c) = (self.positions.len(), self.keys, self.head_size, self.heads * self.head_size);
        let scale = self.scale();
        scratch(2 * n * l, |buffer| {
            let (p, ds) = buffer.split_at_mut(n * l);
            for head in 0..self.heads {
                let (q, k, v) = (self.head(self.q, head), self.head(self.k, head), self.head(self.v, head));
                let dout = View::rows(&dout[(head * d).min(dout.len())..], c);
                self.scores(head, p);
                gemm((n, l, d), F::ONE, dout, v.t(), ds, l, Output::Set, Threads::One);
                vectorized(|| {
                    for row in 0..n {
                        let (p, ds) = (&mut p[row * l..(row + 1) * l], &mut ds[row * l..(row + 1) * l]);
                        let o = row * c + head * d;
                        let delta = sum2(&out[o..o + d], &dout.data[row * c..row * c + d], |a, b| a * b);
                        let lse = lse[row * self.heads + head];
                        self.dropout_row(head, row, ds);
                        for (p, ds) in p.iter_mut().zip(ds.iter_mut()) {
                            *p = (*p - lse).exp();
                            *ds = *p * (*ds - delta);
                        }
                        self.dropout_row(head, row, p);
                    }
                });
                let (p, ds) = (View::rows(&*p, l), View::rows(&*ds, l));
                let (wide, stride) = (&mut *grad.wide, grad.stride);
                gemm(
                    (l, d, n),
                    F::ONE,
                    p.t(),
                    dout,
                    &mut wide[grad.dv + head * d..],
                    stride,
                    Output::Set,
                    Threads::One,
                );
                gemm((l, d, n), scale, ds.t(), q, &mut wide[grad.dk + head * d..], stride, Output::Set, Threads::One);
                match &mut grad.dq {
                    Some(dq) if n > 0 => {
                        gemm((n, d, l), scale, ds, k, &mut dq[head * d..], c, Output::Set, Threads::One)
                    }
                    Some(_) => {}
                    None => gemm((n, d, l), scale, ds, k, &mut wide[head * d..], stride, Output::Set, Threads::One),
                }
            }
        });
    }
}

/// Where one sequence's gradients go.
pub struct SequenceGrad<'a, F> {
    /// `[Lq, H·D]`; `None`: the first columns of `wide`.
    pub dq: Option<&'a mut [F]>,
    /// `[L, stride]`.
    pub wide: &'a mut [F],
    pub stride: usize,
    /// First column of dK in `wide`.
    pub dk: usize,
    /// First column of dV in `wide`.
    pub dv: usize,
}

/// Softmax in place; returns the log-sum-exp. A row that sees nothing becomes zeros with log-sum-exp +∞.
#[inline(always)]
fn softmax<F: Real>(s: &mut [F]) -> F {
    let top = max(s);
    if top == F::NEG_INFINITY {
        s.fill(F::ZERO);
        return -F::NEG_INFINITY;
    }
    for s in s.iter_mut() {
        *s = (*s - top).exp();
    }
    let sum = sum1(s, |s| s);
    let inverse = F::ONE / sum;
    for s in s.iter_mut() {
        *s *= inverse;
    }
    top + sum.ln()
}

/// Cuts rows of `width` elements at the sequence borders `cu`.
pub fn split<'a, F>(mut x: &'a mut [F], cu: &[u32], width: usize) -> Vec<&'a mut [F]> {
    cu.windows(2)
        .map(|w| {
            let (head, tail) = std::mem::take(&mut x).split_at_mut((w[1] - w[0]) as usize * width);
            x = tail;
            head
        })
        .collect()
}

/// Everything the sequences read.
struct Inputs<'a, F> {
    q: Read<'a, F>,
    k: Read<'a, F>,
    v: Read<'a, F>,
    cu_rows: Read<'a, u32>,
    cu_seqlens: Read<'a, u32>,
    positions: Read<'a, u32>,
}

impl<'a, F: Real> Inputs<'a, F> {
    fn new(a: &Forward<'a>) -> Self {
        Inputs {
            q: a.q.tensor.read(),
            k: a.k.tensor.read(),
            v: a.v.tensor.read(),
            cu_rows: a.shape.cu_rows.read(),
            cu_seqlens: a.shape.cu_seqlens.read(),
            positions: a.names.position.read(),
        }
    }

    fn rows(&self, s: usize) -> std::ops::Range<usize> {
        self.cu_rows[s] as usize..self.cu_rows[s + 1] as usize
    }

    /// The attention problem of sequence `s`.
    fn sequence(&self, a: &Forward<'_>, s: usize) -> Sequence<'_, F> {
        let (rows, first) = (self.rows(s), self.cu_seqlens[s] as usize);
        Sequence {
            heads: a.shape.heads,
            head_size: a.shape.head_size,
            keys: self.cu_seqlens[s + 1] as usize - first,
            q: View::rows(&self.q[(a.q.offset + rows.start * a.q.stride).min(self.q.len())..], a.q.stride),
            k: View::rows(&self.k[a.k.offset + first * a.k.stride..], a.k.stride),
            v: View::rows(&self.v[a.v.offset + first * a.v.stride..], a.v.stride),
            positions: &self.positions[rows],
            visible: None,
            drop: Drop::new(a.dropout, &a.names, s),
        }
    }
}

pub fn forward<F: Real>(a: &Forward<'_>) {
    let inputs = Inputs::<F>::new(a);
    let (mut out, mut lse) = (a.out.write::<F>(), a.lse.write::<F>());
    let cu_rows = &inputs.cu_rows[..a.shape.sequences + 1];
    let out = split(&mut out, cu_rows, a.shape.heads * a.shape.head_size);
    let lse = split(&mut lse, cu_rows, a.shape.heads);
    out.into_par_iter().zip(lse).enumerate().for_each(|(s, (out, lse))| inputs.sequence(a, s).forward(out, lse));
}

pub fn backward<F: Real>(a: &Backward<'_>) {
    let fwd = &a.forward;
    let (h, c) = (fwd.shape.heads, fwd.shape.heads * fwd.shape.head_size);
    let inputs = Inputs::<F>::new(fwd);
    let (out, lse, dout) = (fwd.out.read::<F>(), fwd.lse.read::<F>(), a.dout.read::<F>());
    let cu_seqlens = &inputs.cu_seqlens[..fwd.shape.sequences + 1];
    let sequence = |s: usize, grad: &mut SequenceGrad<'_, F>| {
        let r = inputs.rows(s);
        let (out, dout) = (&out[r.start * c..r.end * c], &dout[r.start * c..r.end * c]);
        inputs.sequence(fwd, s).backward(out, &lse[r.start * h..r.end * h], dout, grad);
    };
    match a.gradient {
        Gradient::Fused(wide) => {
            let mut wide = wide.write::<F>();
            split(&mut wide, cu_seqlens, 3 * c).into_par_iter().enumerate().for_each(|(s, wide)| {
                sequence(s, &mut SequenceGrad { dq: None, wide, stride: 3 * c, dk: c, dv: 2 * c });
            });
        }
        Gradient::Split(dq, wide) => {
            let (mut dq, mut wide) = (dq.write::<F>(), wide.write::<F>());
            let dq = split(&mut dq, &inputs.cu_rows[..fwd.shape.sequences + 1], c);
            let parts = dq.into_par_iter().zip(split(&mut wide, cu_seqlens, 2 * c));
            parts.enumerate().for_each(|(s, (dq, wide))| {
                sequence(s, &mut SequenceGrad { dq: Some(dq), wide, stride: 2 * c, dk: 0, dv: c });
            });
        }
    }
}
