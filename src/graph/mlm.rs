//! BERT's masked-LM head and its loss: `y = LN(act(h W + b))`, logits over the tied word embeddings, cross entropy.
//!
//! Only rows with a label come here, but from [`super::dupmae`]. Loss and backward are one pass: the gradient of `h` is ready when the loss
//! is.

use super::activations::{Plan, Slot};
use super::block::{Linear, Norm};
use super::head_chunks;
use super::params::{Id, Init, Table};
use super::{Dims, Pass};
use crate::device::{DType, Device, Output, Tensor};
use crate::model::config::BertConfig;
use crate::ops::cross_entropy::{self, Scale};
use crate::ops::{Count, activation, layernorm};

/// Bytes of logits that exist at a time on the CPU.
const LOGITS_BYTES: usize = 64 << 20;
/// The same on a GPU.
pub const LOGITS_BYTES_GPU: usize = 32 << 20;

/// Rows whose logits exist at a time in a head for up to `rows` of them.
pub fn rows_at_a_time((device, storage): (Device, DType), vocabulary: usize, rows: usize) -> usize {
    let bytes = if device.is_gpu() { LOGITS_BYTES_GPU } else { LOGITS_BYTES };
    let chunk = (bytes / (storage.size().min(4) * vocabulary)).clamp(16, rows.max(16));
    // Whole tiles of the products, where there are enough rows.
    if chunk > 128 { chunk / 128 * 128 } else { chunk }
}

/// The head.
pub struct MlmHead {
    dims: Dims,
    transform: Linear,
    norm: Norm,
    /// Tied to the embedding table.
    word: Id,
    bias: Id,
    chunk: usize,
    u: Slot,
    z: Slot,
    mean: Slot,
    rstd: Slot,
    y: Slot,
    dy: Slot,
    logits: Slot,
    row_loss: Slot,
    row_correct: Tensor,
}

/// Weights, gradients and buffers of what comes after the transform.
pub(super) struct Buffers<'a> {
    /// `[rows, C]`.
    pub y: &'a Tensor,
    /// `[rows, C]` gradient of `y`.
    pub dy: &'a Tensor,
    /// `[V, C]`.
    pub w: &'a Tensor,
    /// `[V]`.
    pub b: &'a Tensor,
    /// `[V, C]`.
    pub dw_acc: &'a Tensor,
    /// `[V]`.
    pub db_acc: &'a Tensor,
    /// `[chunk, V]`.
    pub logits: &'a Tensor,
    /// `[rows]`.
    pub row_loss: &'a Tensor,
    /// `[rows]` u32.
    pub row_correct: &'a Tensor,
}

/// Loss of the labelled rows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSums {
    /// Sum of the rows' losses.
    pub loss: f64,
    /// Rows whose label has the largest logit.
    pub correct: f64,
}

impl MlmHead {
    /// For up to `rows` labelled rows; `word` is the embedding table.
    pub fn new(
        on: (Device, DType),
        t: &mut Table,
        plan: &mut Plan,
        config: &BertConfig,
        word: Id,
        rows: usize,
    ) -> Self {
        Self::with_chunks(on, t, plan, config, word, rows, |usual| usual)
    }

    /// The same for whole sequences of up to `longest` rows, each of which must fit a chunk.
    pub fn of_sequences(
        on: (Device, DType),
        t: &mut Table,
        plan: &mut Plan,
        config: &BertConfig,
        word: Id,
        (rows, longest): (usize, usize),
    ) -> Self {
        Self::with_chunks(on, t, plan, config, word, rows, |usual| head_chunks::rows(usual, longest))
    }

    fn with_chunks(
        (device, storage): (Device, DType),
        t: &mut Table,
        plan: &mut Plan,
        config: &BertConfig,
        word: Id,
        rows: usize,
        chunk_of: impl Fn(usize) -> usize,
    ) -> Self {
        let dims = Dims::new(config);
        let (c, v) = (dims.hidden, dims.vocabulary);
        let chunk = chunk_of(rows_at_a_time((device, storage), v, rows));
        let bias = t.vectors(&["cls.predictions.bias".into()], config.vocab_size, Init::Zeros);
        t.pad(bias, v, f32::NEG_INFINITY);
        MlmHead {
            dims,
            transform: Linear::new(t, "cls.predictions.transform.dense".into(), c, c),
            norm: Norm::new(t, "cls.predictions.transform.LayerNorm", c),
            word,
            bias,
            chunk,
            u: plan.add("head.u", rows, c),
            z: plan.add("head.z", rows, c),
            mean: plan.add_wide("head.mean", rows, 1),
            rstd: plan.add_wide("head.rstd", rows, 1),
            y: plan.add("head.y", rows, c),
            dy: plan.add("head.dy", rows, c),
            logits: plan.add("head.logits", chunk, v),
            row_loss: plan.add_wide("head.row_loss", rows, 1),
            row_correct: device.zeros(DType::U32, rows),
        }
    }

    /// Rows whose logits exist at a time.
    pub fn chunk(&self) -> usize {
        self.chunk
    }

    /// `y` of `rows` rows `h [rows, C]`, left in its buffer.
    pub(super) fn transform(&self, p: &Pass<'_>, rows: Count<'_>, h: &Tensor) {
        let c = self.dims.hidden;
        self.transform.forward(p, (rows, c, c), h, p.b(self.u));
        activation::forward(p.device, self.dims.activation, p.b(self.u), p.b(self.z), (rows, c));
        let (gamma, beta) = (p.master(self.norm.gamma), p.master(self.norm.beta));
        let (x, y, mean, rstd) = (p.b(self.z), p.b(self.y), p.b(self.mean), p.b(self.rstd));
        layernorm::forward(
            p.device,
            &layernorm::Forward {
                shape: self.shape(rows),
                x,
                residual: None,
                dropout: None,
                gamma,
                beta,
                y,
                mean,
                rstd,
            },
        );
    }

    fn shape<'a>(&self, rows: Count<'a>) -> layernorm::Shape<'a> {
        layernorm::Shape { rows, width: self.dims.hidden, eps: self.dims.eps }
    }

    /// What comes after the transform works with.
    pub(super) fn buffers<'a>(&'a self, p: &'a Pass<'_>) -> Buffers<'a> {
        Buffers {
            y: p.b(self.y),
            dy: p.b(self.dy),
            w: p.w(self.word),
            b: p.master(self.bias),
            dw_acc: p.g(self.word),
            db_acc: p.g(self.bias),
            logits: p.b(self.logits),
            row_loss: p.b(self.row_loss),
            row_correct: &self.row_correct,
        }
    }

    /// Adds loss and correct rows of `rows` rows `h [rows, C]` with these labels to `sums_acc` `[2]`. With `gradient` (weight of a
    /// row's loss, and where to write the gradient of `h`, `[rows, C]`), parameter gradients are added too.
    pub fn loss(
        &self,
        p: &Pass<'_>,
        rows: Count<'_>,
        h: &Tensor,
        labels: &Tensor,
        sums_acc: &Tensor,
        gradient: Option<(Scale<'_>, &Tensor)>,
    ) {
        if rows.rows == 0 {
            return;
        }
        self.transform(p, rows, h);
        let Buffers { y, dy, w, b, dw_acc, db_acc, logits, row_loss, row_correct } = self.buffers(p);
        let (width, vocabulary) = (self.dims.hidden, self.dims.vocabulary);
        cross_entropy::run(
            p.device,
            &cross_entropy::CrossEntropy {
                shape: cross_entropy::Shape { rows, width, vocabulary, chunk: self.chunk },
                h: y,
                w,
                b,
                labels,
                logits,
                row_loss,
                row_correct,
                sums_acc,
                gradients: gradient.map(|(scale, _)| cross_entropy::Gradients { scale, dh: dy, dw_acc, db_acc }),
            },
        );
        if let Some((_, dh)) = gradient {
            self.transform_backward(p, rows, h, (dh, Output::Set));
        }
    }

    /// From the gradient of `y` in `dy` to that of `h` in `dh`, set or added to.
    pub(super) fn transform_backward(&self, p: &Pass<'_>, rows: Count<'_>, h: &Tensor, dh: (&Tensor, Output)) {
        let (c, shape) = (self.dims.hidden, self.shape(rows));
        let dy = p.b(self.dy);
        layernorm::backward(
            p.device,
            &layernorm::Backward {
                shape,
                z: p.b(self.z),
                mean: p.b(self.mean),
                rstd: p.b(self.rstd),
                gamma: p.master(self.norm.gamma),
                dy,
                dropout: None,
                dgamma_acc: p.g(self.norm.gamma),
                dbeta_acc: p.g(self.norm.beta),
            },
        );
        let activated = (h, p.b(self.u), self.dims.activation);
        self.transform.backward_activated(p, (rows, c, c), activated, dy, dh);
    }
}
