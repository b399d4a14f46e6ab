//! The loss of a bi-encoder on the embeddings of a whole batch: what it needs, what it leaves.

use crate::data::pairs::batch::ContrastiveBatch;
use crate::device::{Arena, DType, Device, Tensor};
use crate::graph::Pass;
use crate::graph::activations::{Plan, Slot};
use crate::graph::extent::Extent;
use crate::graph::params::upload_f32;
use crate::ops::cross_entropy;
use crate::ops::{contrastive, group_loss, group_scores};
use crate::train::biencoder::{DistillLoss, Losses, Room};
use crate::train::updates::{Scales, one_of};

/// The loss's inputs and buffers.
pub(super) struct Head {
    pub width: usize,
    temperature: f32,
    pub room: Room,
    queries: Extent,
    passages: Extent,
    targets: Tensor,
    hidden: Tensor,
    correct: Tensor,
    /// Of a query's contrastive loss and of a term of the distillation loss.
    scales: Scales<2>,
    /// `[Q', W]` embeddings of queries and `[P, W]` of passages behind them, and their gradients; Q' is Q rounded up.
    pub all: Arena,
    pub d_all: Arena,
    loss: Slot,
    lse: Slot,
    /// `[P]`: scores of each query's own group, their gradients, the teacher's.
    scores: Slot,
    d_scores: Slot,
    pub teacher: Slot,
}

impl Head {
    pub fn new(
        (device, storage): (Device, DType),
        plan: &mut Plan,
        width: usize,
        temperature: f32,
        room: Room,
    ) -> Self {
        let u32s = |len| device.zeros(DType::U32, len);
        let q = room.queries;
        let sides = [room.first_passage(), room.passages].map(|rows| rows * width);
        Head {
            width,
            temperature,
            room,
            queries: Extent::new(device),
            passages: Extent::new(device),
            targets: u32s(q),
            hidden: u32s(q * room.passages.div_ceil(32)),
            correct: u32s(q),
            scales: Scales::new(device),
            all: Arena::zeros(device, storage, sides),
            d_all: Arena::zeros(device, storage, sides),
            loss: plan.add_wide("loss", q, 1),
            lse: plan.add_wide("lse", q, 3),
            scores: plan.add_wide("scores", room.passages, 1),
            d_scores: plan.add_wide("d_scores", room.passages, 1),
            teacher: plan.add_wide("teacher", room.passages, 1),
        }
    }

    /// What a query's losses are weighted with: the contrastive one, and that of distillation.
    pub fn weigh(&mut self, losses: &Losses) {
        self.scales.set([losses.contrastive_weight * one_of(losses.queries), one_of(losses.distill_terms)]);
    }

    /// Uploads what the loss of a batch needs besides the embeddings.
    pub fn set(&mut self, batch: &ContrastiveBatch, teacher: &Tensor) {
        let (q, p) = (batch.queries.samples.len(), batch.passages.samples.len());
        self.queries.set(q, self.room.queries);
        self.passages.set(p, self.room.passages);
        self.targets.upload(&batch.targets);
        if let Some(bits) = &batch.hidden {
            // Rows of bits are as long as the work is laid out for.
            let (own, laid_out) = (p.div_ceil(32), self.passages.get().rows.div_ceil(32));
            let mut rows = vec![0u32; q * laid_out];
            for (to, from) in rows.chunks_exact_mut(laid_out).zip(bits.chunks_exact(own)) {
                to[..own].copy_from_slice(from);
            }
            self.hidden.upload(&rows);
        }
        if let Some(scores) = &batch.teacher {
            upload_f32(teacher, scores);
        }
    }

    /// Adds the losses to `sums_acc`, and leaves the gradients of all embeddings.
    pub fn contrast(&self, p: &Pass<'_>, hidden: bool, gradients: bool, sums_acc: &Tensor) {
        let (q, passages) = (self.all.tensor(0), self.all.tensor(1));
        let shape = contrastive::Shape {
            queries: self.queries.get(),
            passages: self.passages.get(),
            width: self.width,
            temperature: self.temperature,
            targets: &self.targets,
            hidden: hidden.then_some(&self.hidden),
        };
        let (loss, lse, correct) = (p.b(self.loss), p.b(self.lse), &self.correct);
        contrastive::forward(p.device, &contrastive::Forward { shape, q, p: passages, loss, lse, correct });
        cross_entropy::sums(p.device, self.queries.get(), loss, correct, sums_acc);
        if gradients {
            let (dq, dp) = (self.d_all.tensor(0), self.d_all.tensor(1));
            let scale = self.scales.get(0);
            let backward = contrastive::Backward { shape, scale, q, p: passages, lse, dq, dp };
            contrastive::backward(p.device, &backward);
        }
    }

    /// The same for the distillation loss, whose gradients are added.
    pub fn distill(&self, p: &Pass<'_>, loss: DistillLoss, group: usize, gradients: bool, sums_acc: &Tensor) {
        let (q, passages, queries) = (self.all.tensor(0), self.all.tensor(1), self.queries.get());
        let shape = group_scores::Shape { queries, group, width: self.width, temperature: self.temperature };
        let (scores, ds, teacher) = (p.b(self.scores), p.b(self.d_scores), p.b(self.teacher));
        group_scores::forward(p.device, &group_scores::Forward { shape, q, p: passages, s: scores });
        let kind = match loss {
            DistillLoss::Kl => group_loss::Kind::Kl { teacher },
            DistillLoss::MarginMse => group_loss::Kind::MarginMse { teacher },
        };
        let scale = self.scales.get(1);
        group_loss::run(
            p.device,
            &group_loss::GroupLoss {
                shape: group_loss::Shape { queries, group, stride: 1, temperature: 1.0 },
                kind,
                scores,
                loss: p.b(self.loss),
                correct: &self.correct,
                sums_acc,
                gradient: gradients.then_some(group_loss::Gradient { scale, ds }),
            },
        );
        if gradients {
            let (dq_acc, dp_acc) = (self.d_all.tensor(0), self.d_all.tensor(1));
            let backward = group_scores::Backward { shape, q, p: passages, ds, dq_acc, dp_acc };
            group_scores::backward(p.device, &backward);
        }
    }
}
