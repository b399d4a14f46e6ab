//! DupMAE's losses of the encoder (arXiv 2211.08769): masked-LM cross entropy of the labelled rows and the bag-of-words loss of every
//! sequence, from one pass of the LM head over all rows.
//!
//! The head's transform goes over the whole stream; its product with the vocabulary and what follows go chunk by chunk, so that no more
//! logits exist than those of a chunk. Loss and backward are one pass, as in [`super::mlm`].

use super::activations::{Plan, Slot};
use super::head_chunks::HeadChunks;
use super::inputs::Inputs;
use super::mlm::MlmHead;
use super::{Capacity, Dims, Pass};
use crate::device::{DType, Device, Output, Tensor};
use crate::ops::bag_of_words::{self, BagOfWords, Gradients};
use crate::ops::cross_entropy::{self, Scale};
use crate::ops::gather;

/// Buffers of the losses.
pub struct BagHead {
    dims: Dims,
    /// `[chunk, C]` rows of a chunk, and their gradient.
    h: Slot,
    dh: Slot,
    /// `[S]`.
    bag_loss: Slot,
    /// `[S]` zeros: a bag is not right or wrong.
    correct: Tensor,
}

/// What a loss pass adds to.
pub struct Sums<'a> {
    /// `[2]`: losses and correct rows of the labels.
    pub labels: &'a Tensor,
    /// `[2]`: losses of the bags, and nothing.
    pub bags: &'a Tensor,
}

/// What the gradients are weighted with, and where that of the rows goes.
pub struct Gradient<'a> {
    /// Weight of a label's loss.
    pub label_scale: Scale<'a>,
    /// Weight of a bag's.
    pub bag_scale: Scale<'a>,
    /// `[T, C]`, written.
    pub dx: &'a Tensor,
}

impl BagHead {
    /// For chunks of `rows` rows.
    pub fn new(device: Device, plan: &mut Plan, dims: Dims, capacity: Capacity, rows: usize) -> Self {
        BagHead {
            dims,
            h: plan.add("bag_of_words.h", rows, dims.hidden),
            dh: plan.add("bag_of_words.dh", rows, dims.hidden),
            bag_loss: plan.add_wide("bag_of_words.loss", capacity.sequences, 1),
            correct: device.zeros(DType::U32, capacity.sequences),
        }
    }

    /// Adds both losses of all rows `x [T, C]` of the encoder to `sums`; with `gradient`, parameter gradients are added, too.
    pub fn loss(
        &self,
        p: &Pass<'_>,
        head: &MlmHead,
        (inputs, chunks): (&Inputs, &HeadChunks),
        x: &Tensor,
        sums: &Sums<'_>,
        gradient: Option<&Gradient<'_>>,
    ) {
        let (rows, c) = (inputs.tokens.count.get(), self.dims.hidden);
        head.transform(p, rows, x);
        let buffers = head.buffers(p);
        let (h, dh, bag_loss) = (p.b(self.h), p.b(self.dh), p.b(self.bag_loss));
        for (stream, chunk) in chunks.chunks() {
            gather::gather(p.device, buffers.y, stream, chunk.rows, c, h);
            bag_of_words::run(
                p.device,
                &BagOfWords {
                    shape: chunks.shape(c, self.dims.vocabulary),
                    chunk,
                    h,
                    w: buffers.w,
                    b: buffers.b,
                    logits: buffers.logits,
                    row_loss: buffers.row_loss,
                    row_correct: buffers.row_correct,
                    bag_loss,
                    gradients: gradient.map(|g| Gradients {
                        label_scale: g.label_scale,
                        bag_scale: g.bag_scale,
                        dh,
                        dw_acc: buffers.dw_acc,
                        db_acc: buffers.db_acc,
                    }),
                },
            );
            if gradient.is_some() {
                gather::scatter(p.device, dh, stream, chunk.rows, c, buffers.dy);
            }
        }
        let (row_loss, row_correct) = (buffers.row_loss, buffers.row_correct);
        cross_entropy::sums(p.device, inputs.label_count.get(), row_loss, row_correct, sums.labels);
        cross_entropy::sums(p.device, inputs.tokens.sequences.get(), bag_loss, &self.correct, sums.bags);
        if let Some(g) = gradient {
            head.transform_backward(p, rows, x, (g.dx, Output::Set));
        }
    }
}
