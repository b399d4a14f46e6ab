//! The loss of a bi-encoder on the embeddings of a whole batch: what it needs, what it leaves.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::data::order::Share;
use crate::data::pairs::batch::ContrastiveBatch;
use crate::device::{Arena, DType, Device, Tensor};
use crate::graph::Pass;
use crate::graph::activations::{Plan, Slot};
use crate::graph::extent::Extent;
use crate::graph::params::upload_f32;
use crate::ops::cross_entropy;
use crate::ops::{contrastive, group_loss, group_scores};
use crate::train::biencoder::Room;
use crate::train::updates::{Scales, one_of};

/// Learning from a teacher's scores of the passages of each query's own group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distillation {
    /// How scores are compared.
    pub loss: DistillLoss,
    /// Weight of the contrastive loss beside it.
    pub contrastive_weight: f64,
}

/// How a student's scores are compared with a teacher's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum DistillLoss {
    /// Kullback-Leibler divergence of the softmax over the group, as mean over all B g scores.
    #[default]
    Kl,
    /// Squared differences of the margins between the positive and each negative, as mean over all B (g − 1).
    MarginMse,
}

/// Sums over the queries of one or more batches.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Losses {
    /// Queries.
    pub queries: usize,
    /// Sum of their contrastive losses.
    pub contrastive: f64,
    /// Queries whose own passage scores highest of all.
    pub correct: f64,
    /// Weight of the contrastive loss.
    pub contrastive_weight: f64,
    /// Sum of the distillation losses, and of how many terms.
    pub distill: f64,
    /// Terms of the sum; 0 without a teacher.
    pub distill_terms: usize,
}

impl Losses {
    /// Mean contrastive loss.
    pub fn contrastive_loss(&self) -> f64 {
        self.contrastive / self.queries.max(1) as f64
    }

    /// Mean distillation loss.
    pub fn distill_loss(&self) -> f64 {
        self.distill / self.distill_terms.max(1) as f64
    }

    /// What is minimised.
    pub fn total(&self) -> f64 {
        self.distill_loss() + self.contrastive_weight * self.contrastive_loss()
    }
}

/// The loss's inputs and buffers.
pub(super) struct Head {
    pub width: usize,
    temperature: f32,
    pub room: Room,
    /// The ranks whose passages are candidates.
    share: Share,
    queries: Extent,
    passages: Extent,
    targets: Tensor,
    hidden: Tensor,
    correct: Tensor,
    /// Of a query's contrastive loss and of a term of the distillation loss.
    scales: Scales<2>,
    /// `[Q', W]` embeddings of queries and `[P, W]` of passages behind them, and their gradients; Q' is Q rounded up. Passages of all ranks
    /// are one block a rank.
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
        (room, share): (Room, Share),
    ) -> Self {
        let u32s = |len| device.zeros(DType::U32, len);
        let (q, candidates) = (room.queries, room.passages * share.ranks as usize);
        let sides = [room.first_passage(), candidates].map(|rows| rows * width);
        Head {
            width,
            temperature,
            room,
            share,
            queries: Extent::new(device),
            passages: Extent::new(device),
            targets: u32s(q),
            hidden: u32s(q * candidates.div_ceil(32)),
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

    /// Row of this rank's first passage among those of all ranks, where they are candidates.
    pub fn own_block(&self, across: bool) -> usize {
        if across { self.share.rank as usize * self.room.passages } else { 0 }
    }

    /// The gradients of a rank without queries.
    pub fn nothing(&self) {
        self.d_all.whole().clear(self.d_all.whole().len());
    }

    /// Uploads what the loss of a batch needs besides the embeddings.
    pub fn set(&mut self, batch: &ContrastiveBatch, teacher: &Tensor) {
        let (q, own) = (batch.queries.samples.len(), batch.passages.samples.len());
        let p = batch.across.map_or(own, |across| across.passages);
        self.queries.set(q, self.room.queries);
        self.passages.set(p, self.room.passages * self.share.ranks as usize);
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
    pub fn distill(
        &self,
        p: &Pass<'_>,
        loss: DistillLoss,
        group: usize,
        gradients: bool,
        across: bool,
        sums_acc: &Tensor,
    ) {
        let own = self.own_block(across) * self.width..(self.own_block(across) + self.room.passages) * self.width;
        let (q, passages, queries) = (self.all.tensor(0), &self.all.tensor(1).slice(own.clone()), self.queries.get());
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
            let (dq_acc, dp_acc) = (self.d_all.tensor(0), &self.d_all.tensor(1).slice(own));
            let backward = group_scores::Backward { shape, q, p: passages, ds, dq_acc, dp_acc };
            group_scores::backward(p.device, &backward);
        }
    }
}
