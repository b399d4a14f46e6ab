//! The part of a transformer layer after its attention, shared by the encoder and the enhanced decoder:
//! `x1 = LN(dropout(ctx W_o + b_o) + residual)`, `x2 = LN(dropout(act(x1 W_i + b_i) W_d + b_d) + x1)`.

use std::ops::Range;

use super::activations::{Plan, Slot};
use super::params::{Id, Init, Table};
use super::stages::{self, within};
use super::{Dims, Pass};
use crate::device::{Matrix, Output, Tensor, trace};
use crate::ops::{Count, RowNames, activation, layernorm, linear};

/// A linear layer's parameters.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// `[N, K]`.
    pub weight: Id,
    /// `[N]`.
    pub bias: Id,
}

impl Linear {
    /// `names` below each other as one `[names · outputs, inputs]` matrix.
    pub fn fused(t: &mut Table, names: &[String], outputs: usize, inputs: usize) -> Self {
        let with = |suffix: &str| names.iter().map(|n| format!("{n}.{suffix}")).collect::<Vec<_>>();
        Linear {
            weight: t.matrices(&with("weight"), outputs, inputs, Init::Normal),
            bias: t.vectors(&with("bias"), outputs, Init::Zeros),
        }
    }

    /// A single layer.
    pub fn new(t: &mut Table, name: String, outputs: usize, inputs: usize) -> Self {
        Self::fused(t, &[name], outputs, inputs)
    }

    /// `y [rows, outputs] = x [rows, inputs] wᵀ + b`.
    pub fn forward(&self, p: &Pass<'_>, (rows, inputs, outputs): (Count<'_>, usize, usize), x: &Tensor, y: &Tensor) {
        let (x, y) = (Matrix::new(x, inputs), Matrix::new(y, outputs));
        let (w, b) = (p.w(self.weight), Some(p.w(self.bias)));
        linear::forward(p.device, &linear::Forward { rows, inputs, outputs, x, w, b, y });
    }

    /// Gradients of [`Self::forward`]; `dx` is set or added to.
    pub fn backward(
        &self,
        p: &Pass<'_>,
        (rows, inputs, outputs): (Count<'_>, usize, usize),
        x: &Tensor,
        dy: &Tensor,
        dx: (&Tensor, Output),
    ) {
        let db_acc = Some(p.g(self.bias));
        self.gradients(p, (rows, inputs, outputs), x, dy, dx, db_acc);
    }

    fn gradients(
        &self,
        p: &Pass<'_>,
        (rows, inputs, outputs): (Count<'_>, usize, usize),
        x: &Tensor,
        dy: &Tensor,
        dx: (&Tensor, Output),
        db_acc: Option<&Tensor>,
    ) {
        let dx = Some((Matrix::new(dx.0, inputs), dx.1));
        let (x, dy) = (Matrix::new(x, inputs), Matrix::new(dy, outputs));
        let (w, dw_acc) = (p.w(self.weight), p.g(self.weight));
        linear::backward(p.device, &linear::Backward { rows, inputs, outputs, x, w, dy, dx, dw_acc, db_acc });
    }

    /// Gradients of [`Self::forward`] and of the activation of its output `u`; `d` holds that of the activated output and leaves holding
    /// that of `u`.
    pub fn backward_activated(
        &self,
        p: &Pass<'_>,
        (rows, inputs, outputs): (Count<'_>, usize, usize),
        (x, u, function): (&Tensor, &Tensor, activation::Function),
        d: &Tensor,
        dx: (&Tensor, Output),
    ) {
        activation::backward_with_bias(p.device, function, u, d, p.g(self.bias), (rows, outputs));
        self.gradients(p, (rows, inputs, outputs), x, d, dx, None);
    }

    /// Rows `parts` (in units of C) of a fused layer of `[C, C]` matrices, and the same of its bias.
    fn parts<'a>(&self, of: impl Fn(Id) -> &'a Tensor, c: usize, parts: &Range<usize>) -> (Tensor, Tensor) {
        let (from, to) = (parts.start * c, parts.end * c);
        (of(self.weight).slice(from * c..to * c), of(self.bias).slice(from..to))
    }

    /// [`Self::forward`] of some of the `[C, C]` matrices of a fused layer, with or without their bias.
    pub fn forward_parts(
        &self,
        p: &Pass<'_>,
        (rows, c, parts): (Count<'_>, usize, Range<usize>),
        x: &Tensor,
        bias: bool,
        y: &Tensor,
    ) {
        let (w, b) = self.parts(|id| p.params.weight(id), c, &parts);
        let (inputs, outputs) = (c, parts.len() * c);
        let (x, y) = (Matrix::new(x, inputs), Matrix::new(y, outputs));
        linear::forward(p.device, &linear::Forward { rows, inputs, outputs, x, w: &w, b: bias.then_some(&b), y });
    }

    /// Gradients of [`Self::forward_parts`]; `dx` is set or added to.
    pub fn backward_parts(
        &self,
        p: &Pass<'_>,
        (rows, c, parts): (Count<'_>, usize, Range<usize>),
        x: &Tensor,
        dy: &Tensor,
        bias: bool,
        dx: (&Tensor, Output),
    ) {
        let (w, _) = self.parts(|id| p.params.weight(id), c, &parts);
        let (dw, db) = self.parts(|id| p.params.gradient(id), c, &parts);
        let (inputs, outputs) = (c, parts.len() * c);
        let dx = Some((Matrix::new(dx.0, inputs), dx.1));
        let (x, dy, db_acc) = (Matrix::new(x, inputs), Matrix::new(dy, outputs), bias.then_some(&db));
        linear::backward(p.device, &linear::Backward { rows, inputs, outputs, x, w: &w, dy, dx, dw_acc: &dw, db_acc });
    }
}

/// A LayerNorm's parameters.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    /// γ.
    pub gamma: Id,
    /// β.
    pub beta: Id,
}

impl Norm {
    /// `name.weight` and `name.bias`.
    pub fn new(t: &mut Table, name: &str, width: usize) -> Self {
        Norm {
            gamma: t.vectors(&[format!("{name}.weight")], width, Init::Ones),
            beta: t.vectors(&[format!("{name}.bias")], width, Init::Zeros),
        }
    }
}

/// One dropout + residual + LayerNorm of a block: its parameters, buffers and dropout site.
#[derive(Clone, Copy, Debug)]
struct Junction {
    norm: Norm,
    site: u32,
    z: Slot,
    mean: Slot,
    rstd: Slot,
    y: Slot,
    width: usize,
    eps: f32,
}

impl Junction {
    /// For up to `rows` rows; `name` is that of the buffers.
    fn new(plan: &mut Plan, name: &str, dims: &Dims, rows: usize, norm: Norm, site: u32) -> Self {
        Junction {
            norm,
            site,
            z: plan.add(format!("{name}.z"), rows, dims.hidden),
            mean: plan.add_wide(format!("{name}.mean"), rows, 1),
            rstd: plan.add_wide(format!("{name}.rstd"), rows, 1),
            y: plan.add(format!("{name}.y"), rows, dims.hidden),
            width: dims.hidden,
            eps: dims.eps,
        }
    }

    fn shape<'a>(&self, rows: Count<'a>) -> layernorm::Shape<'a> {
        layernorm::Shape { rows, width: self.width, eps: self.eps }
    }

    /// `y = LN(dropout(z) + residual)`; leaves the sum in `z`.
    fn forward(&self, p: &Pass<'_>, rows: Count<'_>, names: RowNames<'_>, residual: &Tensor) {
        let _stage = trace::stage(stages::ROWS);
        layernorm::forward(
            p.device,
            &layernorm::Forward {
                shape: self.shape(rows),
                x: p.b(self.z),
                residual: Some(residual),
                dropout: Some((p.dropout.hidden(self.site), names)),
                gamma: p.master(self.norm.gamma),
                beta: p.master(self.norm.beta),
                y: p.b(self.y),
                mean: p.b(self.mean),
                rstd: p.b(self.rstd),
            },
        );
    }

    /// `dy` becomes the gradient of the sum; returns where that of the dropped input is.
    fn backward<'a>(
        &self,
        p: &Pass<'_>,
        rows: Count<'_>,
        names: RowNames<'_>,
        dy: &'a Tensor,
        dropped: &'a Tensor,
    ) -> &'a Tensor {
        let _stage = trace::stage(stages::ROWS);
        let site = p.dropout.hidden(self.site);
        let on = site.mask.is_on();
        layernorm::backward(
            p.device,
            &layernorm::Backward {
                shape: self.shape(rows),
                z: p.b(self.z),
                mean: p.b(self.mean),
                rstd: p.b(self.rstd),
                gamma: p.master(self.norm.gamma),
                dy,
                dropout: on.then_some((site, names, dropped)),
                dgamma_acc: p.g(self.norm.gamma),
                dbeta_acc: p.g(self.norm.beta),
            },
        );
        if on { dropped } else { dy }
    }
}

/// Gradient buffers that all blocks share.
#[derive(Clone, Copy, Debug)]
pub struct Scratch {
    /// `[rows, C]`: gradient through a dropout.
    pub dropped: Slot,
    /// `[rows, I]`.
    pub wide: Slot,
    /// `[rows, C]`: gradient of the attention output.
    pub context: Slot,
}

impl Scratch {
    /// Room for `rows` rows.
    pub fn new(plan: &mut Plan, dims: &Dims, rows: usize) -> Self {
        Scratch {
            dropped: plan.add_gradient("backward.dropped", rows, dims.hidden),
            wide: plan.add_gradient("backward.wide", rows, dims.intermediate),
            context: plan.add_gradient("backward.context", rows, dims.hidden),
        }
    }
}

/// Parameters and buffers of a block.
#[derive(Clone, Debug)]
pub struct Block {
    dims: Dims,
    out: Linear,
    after_attention: Junction,
    up: Linear,
    down: Linear,
    /// `[rows, I]` before the activation.
    u: Slot,
    /// `[rows, I]` after it.
    act: Slot,
    after_feed_forward: Junction,
}

impl Block {
    /// Dropout sites a block takes, starting with its own.
    pub const SITES: u32 = 2;

    /// The block of the layer `name`, whose buffers are called `buffers`, for up to `rows` rows.
    pub fn new(
        t: &mut Table,
        plan: &mut Plan,
        dims: Dims,
        (name, buffers): (&str, &str),
        rows: usize,
        site: u32,
    ) -> Self {
        let (c, i) = (dims.hidden, dims.intermediate);
        let out = Linear::new(t, format!("{name}.attention.output.dense"), c, c);
        let norm1 = Norm::new(t, &format!("{name}.attention.output.LayerNorm"), c);
        let up = Linear::new(t, format!("{name}.intermediate.dense"), i, c);
        let down = Linear::new(t, format!("{name}.output.dense"), c, i);
        let norm2 = Norm::new(t, &format!("{name}.output.LayerNorm"), c);
        Block {
            dims,
            out,
            after_attention: Junction::new(plan, &format!("{buffers}.norm1"), &dims, rows, norm1, site),
            up,
            down,
            u: plan.add(format!("{buffers}.u"), rows, i),
            act: plan.add(format!("{buffers}.act"), rows, i),
            after_feed_forward: Junction::new(plan, &format!("{buffers}.norm2"), &dims, rows, norm2, site + 1),
        }
    }

    /// Where [`Self::forward`] leaves x2.
    pub fn output(&self) -> Slot {
        self.after_feed_forward.y
    }

    /// From the attention output `ctx [rows, C]` and the residual stream `[rows, C]` to [`Self::output`].
    pub fn forward(&self, p: &Pass<'_>, rows: Count<'_>, names: RowNames<'_>, ctx: &Tensor, residual: &Tensor) {
        let (c, i) = (self.dims.hidden, self.dims.intermediate);
        let (first, second) = (&self.after_attention, &self.after_feed_forward);
        self.out.forward(p, (rows, c, c), ctx, p.b(first.z));
        first.forward(p, rows, names, residual);
        self.up.forward(p, (rows, c, i), p.b(first.y), p.b(self.u));
        let (function, u) = (self.dims.activation, p.b(self.u));
        within(stages::ROWS, || activation::forward(p.device, function, u, p.b(self.act), (rows, i)));
        self.down.forward(p, (rows, i, c), p.b(self.act), p.b(second.z));
        second.forward(p, rows, names, p.b(first.y));
    }

    /// `d` holds the gradient of x2 and leaves holding that of the residual stream; `s.context` gets that of `ctx`.
    pub fn backward(&self, p: &Pass<'_>, rows: Count<'_>, names: RowNames<'_>, ctx: &Tensor, d: &Tensor, s: Scratch) {
        let (c, i) = (self.dims.hidden, self.dims.intermediate);
        let (dropped, wide) = (p.b(s.dropped), p.b(s.wide));
        let dz = self.after_feed_forward.backward(p, rows, names, d, dropped);
        self.down.backward(p, (rows, i, c), p.b(self.act), dz, (wide, Output::Set));
        let (function, u, db_acc) = (self.dims.activation, p.b(self.u), p.g(self.up.bias));
        within(stages::ROWS, || activation::backward_with_bias(p.device, function, u, wide, db_acc, (rows, i)));
        self.up.gradients(p, (rows, c, i), p.b(self.after_attention.y), wide, (d, Output::Add), None);
        let dz = self.after_attention.backward(p, rows, names, d, dropped);
        self.out.backward(p, (rows, c, c), ctx, dz, (p.b(s.context), Output::Set));
    }
}
