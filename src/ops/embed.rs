//! BERT's embedding layer: `z = word[id] + position[p] + type[t]`, `y = dropout(LN(z))`.
//!
//! Saved: μ and ρ of each row; `z` is gathered again in the backward. Gradients of the tables are sums of groups of rows, prepared
//! with the batch (one group a distinct word, position, type).

use super::layernorm::Shape;
use super::{Groups, RowNames, SiteDropout, gather};
use crate::device::{Device, Tensor};

/// The tables and the affine parameters; also their gradients, under the same names.
#[derive(Clone, Copy)]
pub struct Tables<'a> {
    /// `[V, C]`.
    pub word: &'a Tensor,
    /// `[max positions, C]`.
    pub position: &'a Tensor,
    /// `[types, C]`.
    pub token_type: &'a Tensor,
    /// `[C]`.
    pub gamma: &'a Tensor,
    /// `[C]`.
    pub beta: &'a Tensor,
}

/// The tokens: ids, token types, names.
#[derive(Clone, Copy)]
pub struct Tokens<'a> {
    /// `[rows]` u32.
    pub ids: &'a Tensor,
    /// `[rows]` u32.
    pub types: &'a Tensor,
    /// Sequence and position of each row.
    pub names: RowNames<'a>,
}

/// Arguments of [`forward`].
pub struct Forward<'a> {
    /// Sizes.
    pub shape: Shape<'a>,
    /// What is embedded.
    pub tokens: Tokens<'a>,
    /// With what.
    pub tables: Tables<'a>,
    /// Dropout of the output.
    pub dropout: SiteDropout,
    /// `[rows, C]`, written.
    pub y: &'a Tensor,
    /// `[rows]`, written.
    pub mean: &'a Tensor,
    /// `[rows]`, written.
    pub rstd: &'a Tensor,
}

/// `y = dropout(LN(word + position + type))`.
pub fn forward(device: Device, a: &Forward<'_>) {
    match device {
        Device::Cpu => super::on_cpu!(a.y, cpu::forward, a),
        Device::Gpu(gpu) => gpu::forward(gpu, a),
    }
}

/// Arguments of [`backward`].
pub struct Backward<'a> {
    /// Sizes.
    pub shape: Shape<'a>,
    /// As in the forward.
    pub tokens: Tokens<'a>,
    /// As in the forward.
    pub tables: Tables<'a>,
    /// As in the forward.
    pub dropout: SiteDropout,
    /// `[rows]` saved.
    pub mean: &'a Tensor,
    /// `[rows]` saved.
    pub rstd: &'a Tensor,
    /// `[rows, C]`: dy in, dz out.
    pub dy: &'a Tensor,
    /// Rows by word id, by position, by token type.
    pub groups: [Groups<'a>; 3],
    /// Gradients, added to.
    pub grad_acc: Tables<'a>,
}

/// Gradients of tables and affine parameters.
pub fn backward(device: Device, a: &Backward<'_>) {
    match device {
        Device::Cpu => super::on_cpu!(a.dy, cpu::backward, a),
        Device::Gpu(gpu) => gpu::backward(gpu, a),
    }
    for (groups, table) in a.groups.iter().zip([a.grad_acc.word, a.grad_acc.position, a.grad_acc.token_type]) {
        gather::group_sums(device, a.dy, *groups, a.shape.width, table);
    }
}

/// The reference: rows in parallel, on the row functions of LayerNorm.
mod cpu {
    use super::super::layernorm::cpu::{BLOCK, Drop, add_partials, backward_row, normalize, statistics};
    use super::{Backward, Forward, Tables, Tokens};
    use crate::device::Read;
    use crate::device::cpu::{Real, scratch, vectorized};
    use rayon::prelude::*;

    /// Borrowed tables and tokens.
    struct Rows<'a, F> {
        word: Read<'a, F>,
        position: Read<'a, F>,
        token_type: Read<'a, F>,
        ids: Read<'a, u32>,
        types: Read<'a, u32>,
        positions: Read<'a, u32>,
    }

    impl<'a, F: Real> Rows<'a, F> {
        fn new(tables: &Tables<'a>, tokens: &Tokens<'a>) -> Self {
            Rows {
                word: tables.word.read(),
                position: tables.position.read(),
                token_type: tables.token_type.read(),
                ids: tokens.ids.read(),
                types: tokens.types.read(),
                positions: tokens.names.position.read(),
            }
        }

        #[inline(always)]
        fn sum(&self, row: usize, z: &mut [F]) {
            let c = z.len();
            let word = &self.word[self.ids[row] as usize * c..][..c];
            let position = &self.position[self.positions[row] as usize * c..][..c];
            let token_type = &self.token_type[self.types[row] as usize * c..][..c];
            for i in 0..c {
                z[i] = word[i] + position[i] + token_type[i];
            }
        }
    }

    pub fn forward<F: Real>(a: &Forward<'_>) {
        let (rows, c) = (a.shape.rows.rows, a.shape.width);
        let source = Rows::<F>::new(&a.tables, &a.tokens);
        let (gamma, beta) = (a.tables.gamma.read::<F>(), a.tables.beta.read::<F>());
        let (mut y, mut mean, mut rstd) = (a.y.write::<F>(), a.mean.write::<F>(), a.rstd.write::<F>());
        let drop = Drop::new(a.dropout, &a.tokens.names);
        y[..rows * c]
            .par_chunks_mut(BLOCK * c)
            .zip(mean[..rows].par_chunks_mut(BLOCK).zip(rstd[..rows].par_chunks_mut(BLOCK)))
            .enumerate()
            .for_each(|(block, (y, (mean, rstd)))| {
                scratch(c, |z| {
                    vectorized(|| {
                        for i in 0..mean.len() {
                            let (row, y) = (block * BLOCK + i, &mut y[i * c..(i + 1) * c]);
                            source.sum(row, z);
                            (mean[i], rstd[i]) = statistics(z, a.shape.eps);
                            normalize(z, mean[i], rstd[i], &gamma, &beta, y);
                            if let Some(drop) = &drop {
                                drop.row_in_place(row, y);
                            }
                        }
                    });
                });
            });
    }

    pub fn backward<F: Real>(a: &Backward<'_>) {
        let (rows, c) = (a.shape.rows.rows, a.shape.width);
        let source = Rows::<F>::new(&a.tables, &a.tokens);
        let (gamma, mean, rstd) = (a.tables.gamma.read::<F>(), a.mean.read::<F>(), a.rstd.read::<F>());
        let mut dy = a.dy.write::<F>();
        let drop = Drop::new(a.dropout, &a.tokens.names);
        let mut partials = vec![F::ZERO; rows.div_ceil(BLOCK) * 2 * c];
        dy[..rows * c].par_chunks_mut(BLOCK * c).zip(partials.par_chunks_mut(2 * c)).enumerate().for_each(
            |(block, (dy, partial))| {
                let (dgamma, dbeta) = partial.split_at_mut(c);
                scratch(c, |z| {
                    vectorized(|| {
                        for (i, dy) in dy.chunks_exact_mut(c).enumerate() {
                            let row = block * BLOCK + i;
                            if let Some(drop) = &drop {
                                drop.row_in_place(row, dy);
                            }
                            source.sum(row, z);
                            backward_row(z, mean[row], rstd[row], &gamma, dy, dgamma, dbeta);
                        }
                    });
                });
            },
        );
        add_partials(&partials, &mut a.grad_acc.gamma.write::<F>()[..c], &mut a.grad_acc.beta.write::<F>()[..c]);
    }
}

/// The launches of `embed.cu`.
mod gpu {
    use super::super::gpu::{blocks, dropout, launch_as, resident_blocks, rows_of_block};
    use super::super::layernorm::gpu::add_partials;
    use super::{Backward, Forward};
    use crate::device::gpu::Gpu;
    use crate::device::launch::Shape as Launch;

    /// Blocks of the backward that are resident on a multiprocessor (`EMBED` in the kernel's file).
    const RESIDENT: u32 = 2;

    pub fn forward(gpu: &Gpu, a: &Forward<'_>) {
        let (rows, width) = (a.shape.rows, a.shape.width);
        let (dropout, site, names) = dropout(gpu, Some((a.dropout, a.tokens.names)));
        let grid = Launch::linear(blocks(rows.rows, rows_of_block(width)), 128);
        launch_as!(
            gpu,
            a.y,
            grid,
            EmbedForwardF32
                | EmbedForwardBf16 {
                    y: a.y.get_mut(),
                    mean: a.mean.get_mut(),
                    rstd: a.rstd.get_mut(),
                    word: a.tables.word.get(),
                    position: a.tables.position.get(),
                    token_type: a.tables.token_type.get(),
                    gamma: a.tables.gamma.get(),
                    beta: a.tables.beta.get(),
                    ids: a.tokens.ids.get(),
                    types: a.tokens.types.get(),
                    names,
                    dropout,
                    site,
                    rows: rows.get(),
                    C: width as i32,
                    eps: a.shape.eps,
                }
        );
    }

    pub fn backward(gpu: &Gpu, a: &Backward<'_>) {
        let (rows, width) = (a.shape.rows, a.shape.width);
        let (dropout, site, names) = dropout(gpu, Some((a.dropout, a.tokens.names)));
        let blocks = resident_blocks(gpu, rows.rows, width, RESIDENT);
        let partials = gpu.scratch(blocks as usize * 2 * width);
        launch_as!(
            gpu,
            a.dy,
            Launch::linear(blocks, 128),
            EmbedBackwardF32
                | EmbedBackwardBf16 {
                    dy: a.dy.get_mut(),
                    partials,
                    word: a.tables.word.get(),
                    position: a.tables.position.get(),
                    token_type: a.tables.token_type.get(),
                    mean: a.mean.get(),
                    rstd: a.rstd.get(),
                    gamma: a.tables.gamma.get(),
                    ids: a.tokens.ids.get(),
                    types: a.tokens.types.get(),
                    names,
                    dropout,
                    site,
                    rows: rows.get(),
                    C: width as i32,
                }
        );
        add_partials(gpu, a.shape, blocks, partials, a.grad_acc.gamma, a.grad_acc.beta);
    }
}
