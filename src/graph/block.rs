//! The part of a transformer layer after its attention, shared by the encoder and the enhanced decoder:
//! `x1 = LN(dropout(ctx W_o + b_o) + residual)`, `x2 = LN(dropout(act(x1 W_i + b_i) W_d + b_d) + x1)`.

use super::activations::{Plan, Slot};
use super::params::{Id, Init, Table};
use super::{Dims, Pass};
use crate::device::{Matrix, Output, Tensor};
use crate::ops::{RowNames, activation, layernorm, linear};

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
    pub fn forward(&self, p: &Pass<'_>, (rows, inputs, outputs): (usize, usize, usize), x: &Tensor, y: &Tensor) {
        let (x, y) = (Matrix::new(x, inputs), Matrix::new(y, outputs));
        let (w, b) = (p.w(self.weight), Some(p.w(self.bias)));
        linear::forward(p.device, &linear::Forward { rows, inputs, outputs, x, w, b, y });
    }

    /// Gradients of [`Self::forward`]; `dx` is set or added to.
    pub fn backward(
        &self,
        p: &Pass<'_>,
        (rows, inputs, outputs): (usize, usize, usize),
        x: &Tensor,
        dy: &Tensor,
        dx: (&Tensor, Output),
    ) {
        let dx = Some((Matrix::new(dx.0, inputs), dx.1));
        let (x, dy) = (Matrix::new(x, inputs), Matrix::new(dy, outputs));
        let (w, dw_acc, db_acc) = (p.w(self.weight), p.g(self.weight), Some(p.g(self.bias)));
        linear::backward(p.device, &linear::Backward { rows, inputs, outputs, x, w, dy, dx, dw_acc, db_acc });
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

/// Buffers of one dropout + residual + LayerNorm.
#[derive(Clone, Copy, Debug)]
struct NormSlots {
    z: Slot,
    mean: Slot,
    rstd: Slot,
    y: Slot,
}

impl NormSlots {
    fn new(plan: &mut Plan, name: &str, rows: usize, width: usize) -> Self {
        NormSlots {
            z: plan.add(format!("{name}.z"), rows, width),
            mean: plan.add(format!("{name}.mean"), rows, 1),
            rstd: plan.add(format!("{name}.rstd"), rows, 1),
            y: plan.add(format!("{name}.y"), rows, width),
        }
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
            dropped: plan.add("backward.dropped", rows, dims.hidden),
            wide: plan.add("backward.wide", rows, dims.intermediate),
            context: plan.add("backward.context", rows, dims.hidden),
        }
    }
}

/// Parameters and buffers of a block.
#[derive(Clone, Debug)]
pub struct Block {
    dims: Dims,
    site: u32,
    out: Linear,
    norm1: Norm,
    up: Linear,
    down: Linear,
    norm2: Norm,
    slots1: NormSlots,
    /// `[rows, I]` before the activation.
    u: Slot,
    /// `[rows, I]` after it.
    act: Slot,
    slots2: NormSlots,
}

impl Block {
    /// Dropout sites a block takes, starting with its own.
    pub const SITES: u32 = 2;

    /// The block of the layer `name`, for up to `rows` rows.
    pub fn new(t: &mut Table, plan: &mut Plan, dims: Dims, name: &str, rows: usize, site: u32) -> Self {
        let (c, i) = (dims.hidden, dims.intermediate);
        Block {
            dims,
            site,
            out: Linear::new(t, format!("{name}.attention.output.dense"), c, c),
            norm1: Norm::new(t, &format!("{name}.attention.output.LayerNorm"), c),
            up: Linear::new(t, format!("{name}.intermediate.dense"), i, c),
            down: Linear::new(t, format!("{name}.output.dense"), c, i),
            norm2: Norm::new(t, &format!("{name}.output.LayerNorm"), c),
            slots1: NormSlots::new(plan, &format!("{name}.norm1"), rows, c),
            u: plan.add(format!("{name}.u"), rows, i),
            act: plan.add(format!("{name}.act"), rows, i),
            slots2: NormSlots::new(plan, &format!("{name}.norm2"), rows, c),
        }
    }

    /// Where [`Self::forward`] leaves x2.
    pub fn output(&self) -> Slot {
        self.slots2.y
    }

    fn norm_forward(
        &self,
        p: &Pass<'_>,
        rows: usize,
        norm: Norm,
        s: NormSlots,
        residual: &Tensor,
        names: RowNames<'_>,
        site: u32,
    ) {
        layernorm::forward(
            p.device,
            &layernorm::Forward {
                shape: layernorm::Shape { rows, width: self.dims.hidden, eps: self.dims.eps },
                x: p.b(s.z),
                residual: Some(residual),
                dropout: Some((p.dropout.hidden(site), names)),
                gamma: p.w(norm.gamma),
                beta: p.w(norm.beta),
                y: p.b(s.y),
                mean: p.b(s.mean),
                rstd: p.b(s.rstd),
            },
        );
    }

    /// From the attention output `ctx [rows, C]` and the residual stream `[rows, C]` to [`Self::output`].
    pub fn forward(&self, p: &Pass<'_>, rows: usize, names: RowNames<'_>, ctx: &Tensor, residual: &Tensor) {
        let (c, i) = (self.dims.hidden, self.dims.intermediate);
        self.out.forward(p, (rows, c, c), ctx, p.b(self.slots1.z));
        self.norm_forward(p, rows, self.norm1, self.slots1, residual, names, self.site);
        self.up.forward(p, (rows, c, i), p.b(self.slots1.y), p.b(self.u));
        activation::forward(p.device, self.dims.activation, p.b(self.u), p.b(self.act), rows * i);
        self.down.forward(p, (rows, i, c), p.b(self.act), p.b(self.slots2.z));
        self.norm_forward(p, rows, self.norm2, self.slots2, p.b(self.slots1.y), names, self.site + 1);
    }

    /// LayerNorm backward; returns where the gradient of the dropped input is.
    fn norm_backward<'a>(
        &self,
        p: &Pass<'a>,
        rows: usize,
        (norm, s): (Norm, NormSlots),
        names: RowNames<'_>,
        site: u32,
        dy: &'a Tensor,
        dropped: &'a Tensor,
    ) -> &'a Tensor {
        let site = p.dropout.hidden(site);
        let on = site.mask.is_on();
        layernorm::backward(
            p.device,
            &layernorm::Backward {
                shape: layernorm::Shape { rows, width: self.dims.hidden, eps: self.dims.eps },
                z: p.buffers.tensor(s.z),
                mean: p.buffers.tensor(s.mean),
                rstd: p.buffers.tensor(s.rstd),
                gamma: p.params.weight(norm.gamma),
                dy,
                dropout: on.then_some((site, names, dropped)),
                dgamma_acc: p.params.gradient(norm.gamma),
                dbeta_acc: p.params.gradient(norm.beta),
            },
        );
        if on { dropped } else { dy }
    }

    /// `d` holds the gradient of x2 and leaves holding that of the residual stream; `s.context` gets that of `ctx`.
    pub fn backward<'a>(
        &self,
        p: &Pass<'a>,
        rows: usize,
        names: RowNames<'_>,
        ctx: &Tensor,
        d: &'a Tensor,
        s: Scratch,
    ) {
        let (c, i) = (self.dims.hidden, self.dims.intermediate);
        let dropped = p.buffers.tensor(s.dropped);
        let wide = p.b(s.wide);
        let dz = self.norm_backward(p, rows, (self.norm2, self.slots2), names, self.site + 1, d, dropped);
        self.down.backward(p, (rows, i, c), p.b(self.act), dz, (wide, Output::Set));
        activation::backward(p.device, self.dims.activation, p.b(self.u), wide, rows * i);
        self.up.backward(p, (rows, c, i), p.b(self.slots1.y), wide, (d, Output::Add));
        let dz = self.norm_backward(p, rows, (self.norm1, self.slots1), names, self.site, d, dropped);
        self.out.backward(p, (rows, c, c), ctx, dz, (p.b(s.context), Output::Set));
    }
}
