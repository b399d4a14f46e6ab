//! The ops of a step in the order of `train/step.rs`, `train/biencoder.rs` and `graph/`, for [`super::list`]: whoever changes one
//! changes the other, and a test compares the two.

use super::Rows;
use super::list::{Attention, Input, List};
use crate::device::DType;
use crate::graph::stages;
use crate::ops::contrastive;
use crate::train::step::Objective;

impl List {
    fn encoder(r: &Rows, pruned: bool) -> Attention {
        let (rows, pairs) = if pruned { (r.needed, r.pairs.needed) } else { (r.tokens, r.pairs.all) };
        Attention { stem: "attention", queries: rows, rows, keys: r.tokens, pairs }
    }

    fn decoder(r: &Rows, embedded: bool) -> Attention {
        let queries = if embedded { r.decoder_rows } else { r.longest + r.sequences };
        let (rows, keys, pairs) = (r.decoder_rows, r.tokens, r.pairs.decoder);
        Attention { stem: "enhanced_decoding", queries, rows, keys, pairs }
    }

    fn block_forward(&mut self, rows: usize) {
        let (c, i) = (self.sizes.dims.hidden, self.sizes.dims.intermediate);
        self.linear_forward((rows, c, c), true);
        self.within(stages::ROWS, |list| list.layernorm_forward(rows, true));
        self.linear_forward((rows, c, i), true);
        self.within(stages::ROWS, |list| list.activation_forward(rows, i));
        self.linear_forward((rows, i, c), true);
        self.within(stages::ROWS, |list| list.layernorm_forward(rows, true));
    }

    fn block_backward(&mut self, rows: usize) {
        let (c, i, dropout) = (self.sizes.dims.hidden, self.sizes.dims.intermediate, self.sizes.dropout);
        self.within(stages::ROWS, |list| list.layernorm_backward(rows, dropout));
        self.linear_backward((rows, i, c), true, Input::Set, true);
        self.within(stages::ROWS, |list| list.activation_backward_sums(rows, i));
        self.linear_backward((rows, c, i), false, Input::Add, true);
        self.within(stages::ROWS, |list| list.layernorm_backward(rows, dropout));
        self.linear_backward((rows, c, c), true, Input::Set, true);
    }

    fn encoder_forward(&mut self, r: &Rows) {
        let (c, last) = (self.sizes.dims.hidden, self.sizes.layers - 1);
        self.stage = stages::ENCODER_PRODUCTS;
        self.embed_forward(r.tokens, r.words[0], r.longest);
        for layer in 0..=last {
            let pruned = layer == last;
            if pruned {
                self.within(stages::ROWS, |list| list.moved("gather", r.needed));
                self.linear_forward((r.needed, c, c), true);
                self.linear_forward((r.tokens, c, 2 * c), true);
            } else {
                self.linear_forward((r.tokens, c, 3 * c), true);
            }
            let attention = List::encoder(r, pruned);
            self.within(stages::ATTENTION_FORWARD, |list| list.attention_forward(attention));
            self.block_forward(if pruned { r.needed } else { r.tokens });
        }
    }

    fn encoder_backward(&mut self, r: &Rows) {
        let (c, last) = (self.sizes.dims.hidden, self.sizes.layers - 1);
        self.stage = stages::ENCODER_PRODUCTS;
        for layer in (0..=last).rev() {
            let pruned = layer == last;
            self.block_backward(if pruned { r.needed } else { r.tokens });
            let attention = List::encoder(r, pruned);
            self.within(stages::ATTENTION_BACKWARD, |list| list.attention_backward(attention));
            if pruned {
                self.linear_backward((r.needed, c, c), true, Input::Add, true);
                self.linear_backward((r.tokens, c, 2 * c), true, Input::Set, true);
                self.within(stages::ROWS, |list| list.moved("scatter_add", r.needed));
            } else {
                self.linear_backward((r.tokens, c, 3 * c), true, Input::Add, true);
            }
            // The gradient of the key bias.
            self.fill(4 * c as u64);
        }
        self.embed_backward(r.tokens, r.words[0], r.longest);
    }

    fn transform_forward(&mut self, rows: usize) {
        let c = self.sizes.dims.hidden;
        self.linear_forward((rows, c, c), true);
        self.activation_forward(rows, c);
        self.layernorm_forward(rows, false);
    }

    fn transform_backward(&mut self, rows: usize) {
        let c = self.sizes.dims.hidden;
        self.layernorm_backward(rows, false);
        self.activation_backward_sums(rows, c);
        self.linear_backward((rows, c, c), false, Input::Set, true);
    }

    /// LM head and cross entropy of `rows` rows.
    fn head(&mut self, rows: usize, chunk: usize) {
        if rows == 0 {
            return;
        }
        self.transform_forward(rows);
        self.kernel("zero_tails", 0, 0);
        for first in (0..rows).step_by(chunk) {
            let count = chunk.min(rows - first);
            self.vocabulary(count, |list, bias| {
                list.kernel("cross_entropy_gradient", 0, bias + 12 * count as u64);
                list.kernel("cross_entropy_bias_sums", 0, 0);
                list.plain("cross_entropy_bias_add", 0, 2 * bias);
            });
        }
        self.plain("cross_entropy_sums", 0, 8 * rows as u64);
        self.transform_backward(rows);
    }

    /// The encoder's labels: gathered, through the head, back to their rows.
    fn encoder_loss(&mut self, r: &Rows) {
        self.moved("gather", r.labels);
        self.head(r.labels, r.chunk);
        let bytes = r.needed as u64 * self.width() * self.element();
        self.fill(bytes);
        self.moved("scatter_add", r.labels);
    }

    /// DupMAE's losses over all rows, chunk by chunk of whole sequences.
    fn bags_loss(&mut self, r: &Rows) {
        self.transform_forward(r.tokens);
        for &rows in &r.bag_chunks {
            self.moved("gather", rows);
            self.kernel("zero_tails", 0, 0);
            self.vocabulary(rows, |list, bias| {
                for stem in ["rows", "slabs", "places", "loss", "gradient"] {
                    list.kernel(&format!("bag_of_words_{stem}"), 0, if stem == "slabs" { 0 } else { bias });
                }
                list.plain("bag_of_words_bias", 0, 2 * bias);
            });
            self.moved("scatter", rows);
        }
        self.plain("cross_entropy_sums", 0, 8 * r.labels as u64);
        self.plain("cross_entropy_sums", 0, 8 * r.sequences as u64);
        self.transform_backward(r.tokens);
    }

    fn decoder_forward(&mut self, r: &Rows, embedded: bool) {
        let c = self.sizes.dims.hidden;
        self.stage = stages::DECODER_PRODUCTS;
        self.within(stages::ROWS, |list| {
            list.moved("gather", r.sequences);
            list.embed_forward(r.tokens, r.words[1], r.longest);
            list.moved("scatter", r.sequences);
        });
        self.linear_forward((r.tokens, c, 2 * c), true);
        if embedded {
            self.embed_forward(r.decoder_rows, r.sequences, r.longest);
            self.linear_forward((r.decoder_rows, c, c), true);
        } else {
            self.linear_forward((r.longest, c, c), false);
            self.linear_forward((r.sequences, c, c), true);
            let bytes = (r.longest + r.sequences + r.decoder_rows) as u64 * self.width() * self.element();
            self.within(stages::ROWS, |list| list.kernel("add_rows", 0, bytes));
        }
        let attention = List::decoder(r, embedded);
        self.within(stages::ATTENTION_FORWARD, |list| list.attention_forward(attention));
        self.block_forward(r.decoder_rows);
    }

    fn decoder_backward(&mut self, r: &Rows, embedded: bool) {
        let (c, row) = (self.sizes.dims.hidden, 4 * self.width());
        self.stage = stages::DECODER_PRODUCTS;
        self.block_backward(r.decoder_rows);
        let attention = List::decoder(r, embedded);
        self.within(stages::ATTENTION_BACKWARD, |list| list.attention_backward(attention));
        self.within(stages::ROWS, |list| list.fill(r.sequences as u64 * row));
        if embedded {
            self.linear_backward((r.decoder_rows, c, c), true, Input::Add, true);
            self.embed_backward(r.decoder_rows, r.sequences, r.longest);
        } else {
            self.within(stages::ROWS, |list| {
                let groups = [r.longest, r.sequences];
                groups.into_iter().for_each(|groups| list.group_sums(r.decoder_rows, groups));
                groups.into_iter().for_each(|rows| list.fill(rows as u64 * row));
                groups.into_iter().for_each(|groups| list.group_sums(r.decoder_rows, groups));
                groups.into_iter().for_each(|rows| list.rounded(rows));
            });
            self.linear_backward((r.longest, c, c), false, Input::AddWide, false);
            self.linear_backward((r.sequences, c, c), true, Input::AddWide, true);
        }
        self.linear_backward((r.tokens, c, 2 * c), true, Input::Set, true);
        self.fill(row);
        self.within(stages::ROWS, |list| {
            list.group_sums(r.sequences, r.sequences);
            list.kernel("zero_rows", 0, r.sequences as u64 * list.width() * list.element());
        });
        self.embed_backward(r.tokens, r.words[1], r.longest);
    }

    fn zero(&mut self, results: u64) {
        (self.phase, self.stage) = (stages::UPDATE, stages::OPTIMIZER);
        self.fill(results);
        self.fill(4 * self.sizes.parameters as u64);
    }

    /// Norm, then AdamW: g, w, m and v in; w, m, v and the rounded w out.
    fn update(&mut self) {
        (self.phase, self.stage) = (stages::UPDATE, stages::OPTIMIZER);
        let n = self.sizes.parameters as u64;
        self.plain("squared_norm_partials", 0, 4 * n);
        self.plain("squared_norm", 0, 0);
        let copy = if self.sizes.storage == DType::BF16 { 2 } else { 0 };
        self.kernel("adamw", 0, (28 + copy) * n);
    }

    /// One step of pre-training, of one micro-batch.
    pub(super) fn pretraining(&mut self, objective: Objective, r: &Rows) {
        let embedded = objective == Objective::DupMae;
        self.zero(7 * 8);
        self.phase = stages::FORWARD;
        self.encoder_forward(r);
        (self.phase, self.stage) = (stages::LOSS, stages::MLM_HEAD);
        if embedded {
            self.bags_loss(r)
        } else {
            self.encoder_loss(r)
        }
        if objective.has_decoder() {
            self.phase = stages::FORWARD;
            self.decoder_forward(r, embedded);
            (self.phase, self.stage) = (stages::LOSS, stages::LM_HEAD);
            self.head(r.decoder_rows, r.chunk);
            self.phase = stages::BACKWARD;
            self.decoder_backward(r, embedded);
            self.within(stages::ROWS, |list| {
                list.rounded(r.sequences);
                list.moved("scatter_add", r.sequences);
            });
        }
        self.phase = stages::BACKWARD;
        self.encoder_backward(r);
        self.update();
    }

    /// One step of a bi-encoder whose texts go through one tower at once, `[CLS]` being the embedding.
    pub(super) fn fine_tuning(&mut self, r: &Rows) {
        let (c, s, [queries, passages]) = (self.width(), self.element(), r.sides);
        self.zero(5 * 8);
        self.phase = stages::FORWARD;
        self.encoder_forward(r);
        self.within(stages::ROWS, |list| list.moved("scatter", r.sequences));
        (self.phase, self.stage) = (stages::LOSS, stages::CONTRASTIVE);
        // Scores: 2 C FLOP a pair; as much for each side's gradient. Nothing of [queries, passages] exists in memory.
        let (flop, once) = (2 * c * (queries * passages) as u64, (queries + passages) as u64 * c * s);
        self.kernel("contrastive_forward", flop, once);
        self.plain("contrastive_loss", 0, 0);
        self.plain("cross_entropy_sums", 0, 8 * queries as u64);
        for (side, [own, other]) in [("queries", [queries, passages]), ("passages", [passages, queries])] {
            self.kernel(&format!("contrastive_backward_{side}"), flop, once + own as u64 * c * s);
            let (units, storage, width) = (self.sizes.multiprocessors(), self.sizes.storage, self.sizes.dims.hidden);
            if contrastive::splits(units, storage, width, [own, other]) > 1 {
                self.kernel("contrastive_gradient", 0, own as u64 * c * s);
            }
        }
        self.phase = stages::BACKWARD;
        self.within(stages::ROWS, |list| list.moved("gather", r.sequences));
        self.encoder_backward(r);
        self.update();
    }
}
