//! RetroMAE's enhanced decoder (arXiv 2205.12035, section 3.3): one BERT layer that rebuilds the whole text from the sentence
//! embedding and position-specific glimpses of the text.
//!
//! Keys and values come from `[c, e_1, e_2, …]`: the sentence embedding in place of the first token's embedding. RetroMAE's query stream
//! is `p_i + c`. Since `W_q (p_i + c) = W_q p_i + W_q c`, the query product is one `[L, C]` and one `[S, C]` product, and its
//! backward needs only the sums of dQ over sequences and over positions. That of DupMAE (arXiv 2211.08769) is the whole embedding layer
//! on the sentence embedding, `dropout(LN(c + p_i + type))`. Only labelled rows are computed.

use super::activations::{Plan, Slot};
use super::block::{Block, Linear, Scratch};
use super::encoder::{Embedding, Encoder, zero_key_bias};
use super::inputs::{DecoderInputs, Inputs};
use super::params::Table;
use super::stages::{self, within};
use super::{Capacity, Dims, Pass};
use crate::device::{Matrix, Output, Tensor, trace};
use crate::ops::{Count, attention, embed, enhanced_decoding, gather};

/// Dropout sites of the decoder but that of embedded queries: embedding, attention, block.
const SITES: u32 = 2 + Block::SITES;

/// The decoder.
pub struct EnhancedDecoder {
    dims: Dims,
    site: u32,
    position: super::params::Id,
    embedding: Embedding,
    qkv: Linear,
    block: Block,
    /// `[S, C]` sentence embeddings.
    c: Slot,
    /// `[T, 2C]`.
    kv: Slot,
    queries: Queries,
    ctx: Slot,
    lse: Slot,
    /// `[N, C]`.
    dq: Slot,
    /// `[N, C]` gradient of the decoder's output.
    d: Slot,
    /// `[S, C]` gradient of the sentence embeddings.
    dc: Sum,
}

/// The query stream, which is also the residual one, and its product.
enum Queries {
    /// `p_i + c`.
    Sum {
        /// `[N, C]`.
        stream: Slot,
        q_position: Slot,
        q_sentence: Slot,
        dq_position: Sum,
        dq_sentence: Sum,
    },
    /// The embedding layer on c.
    Embedded {
        stream: Embedding,
        /// `[N, C]`.
        q: Slot,
    },
}

impl Queries {
    fn stream(&self) -> Slot {
        match self {
            Queries::Sum { stream, .. } => *stream,
            Queries::Embedded { stream, .. } => stream.y,
        }
    }
}

/// A gradient that is summed up without rounding and then used in the storage type.
#[derive(Clone, Copy)]
struct Sum {
    wide: Slot,
    storage: Slot,
}

impl Sum {
    fn new(plan: &mut Plan, name: &str, rows: usize, columns: usize) -> Self {
        let wide = plan.add_wide(format!("{name}.sum"), rows, columns);
        Sum { wide, storage: plan.add(name, rows, columns) }
    }

    /// The sum of `rows` rows, in the storage type.
    fn rounded<'a>(&self, p: &'a Pass<'_>, rows: Count<'_>, columns: usize) -> &'a Tensor {
        gather::rounded(p.device, p.b(self.wide), rows, columns, p.b(self.storage))
    }
}

impl EnhancedDecoder {
    /// Adds the parameters and buffers of RetroMAE's decoder to the tables.
    pub fn new(t: &mut Table, plan: &mut Plan, encoder: &Encoder, dims: Dims, capacity: Capacity) -> Self {
        let (tokens, sequences, length, c) = (capacity.tokens, capacity.sequences, capacity.length, dims.hidden);
        let queries = Queries::Sum {
            q_position: plan.add("decoder.q_position", length, c),
            q_sentence: plan.add("decoder.q_sentence", sequences, c),
            stream: plan.add("decoder.query", tokens, c),
            dq_position: Sum::new(plan, "decoder.dq_position", length, c),
            dq_sentence: Sum::new(plan, "decoder.dq_sentence", sequences, c),
        };
        Self::of_queries(t, plan, encoder, dims, capacity, queries)
    }

    /// The same for DupMAE's.
    pub fn of_embedded_queries(
        t: &mut Table,
        plan: &mut Plan,
        encoder: &Encoder,
        dims: Dims,
        capacity: Capacity,
    ) -> Self {
        let (tokens, site) = (capacity.tokens, encoder.next_site() + SITES);
        let queries = Queries::Embedded {
            stream: Embedding::new(plan, encoder.embeddings, dims, "decoder.query", tokens, site),
            q: plan.add("decoder.q", tokens, dims.hidden),
        };
        Self::of_queries(t, plan, encoder, dims, capacity, queries)
    }

    fn of_queries(
        t: &mut Table,
        plan: &mut Plan,
        encoder: &Encoder,
        dims: Dims,
        capacity: Capacity,
        queries: Queries,
    ) -> Self {
        let (tokens, sequences, c) = (capacity.tokens, capacity.sequences, dims.hidden);
        let names = ["query", "key", "value"].map(|x| format!("c_head.attention.self.{x}"));
        let site = encoder.next_site();
        EnhancedDecoder {
            dims,
            site,
            position: encoder.embeddings.position,
            embedding: Embedding::new(plan, encoder.embeddings, dims, "decoder.embeddings", tokens, site),
            qkv: Linear::fused(t, &names, c, c),
            block: Block::new(t, plan, dims, ("c_head", "c_head"), tokens, site + 2),
            c: plan.add("decoder.c", sequences, c),
            kv: plan.add("decoder.kv", tokens, 2 * c),
            queries,
            ctx: plan.add("decoder.ctx", tokens, c),
            lse: plan.add_wide("decoder.lse", tokens, dims.heads),
            dq: plan.add("decoder.dq", tokens, c),
            d: plan.add("decoder.d", tokens, c),
            dc: Sum::new(plan, "decoder.dc", sequences, c),
        }
    }

    /// Where [`Self::forward`] leaves the labelled rows `[N, C]`.
    pub fn output(&self) -> Slot {
        self.block.output()
    }

    /// Where the gradient of the output must be before [`Self::backward`].
    pub fn output_gradient(&self) -> Slot {
        self.d
    }

    /// The gradient of the sentence embeddings `[S, C]` that [`Self::backward`] leaves.
    pub fn sentence_gradient<'a>(&self, p: &'a Pass<'_>, sequences: Count<'_>) -> &'a Tensor {
        within(stages::ROWS, || self.dc.rounded(p, sequences, self.dims.hidden))
    }

    fn attention<'a>(&self, p: &Pass<'a>, inputs: &'a DecoderInputs) -> enhanced_decoding::Forward<'a> {
        let (c, tokens) = (self.dims.hidden, &inputs.tokens);
        let kv = p.buffers.tensor(self.kv);
        enhanced_decoding::Forward {
            shape: attention::Shape {
                sequences: tokens.sequences.count,
                heads: self.dims.heads,
                head_size: self.dims.head_size(),
                cu_rows: &inputs.rows.cu_rows,
                cu_seqlens: &tokens.cu_seqlens,
                work: inputs.rows.work(),
            },
            queries: match &self.queries {
                Queries::Sum { q_position, q_sentence, .. } => enhanced_decoding::Queries::Parts {
                    position: p.buffers.tensor(*q_position),
                    sentence: p.buffers.tensor(*q_sentence),
                },
                Queries::Embedded { q, .. } => enhanced_decoding::Queries::Whole(p.buffers.tensor(*q)),
            },
            k: Matrix::columns(kv, 0, 2 * c),
            v: Matrix::columns(kv, c, 2 * c),
            visible: enhanced_decoding::Visible { offsets: &inputs.offsets, words: &inputs.words, row: &inputs.row },
            names: tokens.names_of(&inputs.rows),
            dropout: p.dropout.attention(self.site + 1),
            out: p.buffers.tensor(self.ctx),
            lse: p.buffers.tensor(self.lse),
        }
    }

    /// From the encoder's needed rows `[R, C]` to [`Self::output`].
    pub fn forward(&self, p: &Pass<'_>, inputs: &Inputs, decoder: &DecoderInputs, encoder_rows: &Tensor) {
        let _stage = trace::stage(stages::DECODER_PRODUCTS);
        let (c, tokens) = (self.dims.hidden, &decoder.tokens);
        let (sequences, rows) = (tokens.sequences.get(), decoder.rows.count.get());
        let (sentence, e) = (p.b(self.c), p.b(self.embedding.y));
        within(stages::ROWS, || {
            gather::gather(p.device, encoder_rows, &inputs.cls_rows, sequences, c, sentence);
            self.embedding.forward(p, tokens);
            gather::scatter(p.device, sentence, &inputs.first_tokens, sequences, c, e);
        });
        self.qkv.forward_parts(p, (tokens.count.get(), c, 1..3), e, true, p.b(self.kv));
        let names = tokens.names_of(&decoder.rows);
        match &self.queries {
            Queries::Sum { stream, q_position, q_sentence, .. } => {
                let positions = p.w(self.position);
                self.qkv.forward_parts(p, (tokens.longest.into(), c, 0..1), positions, false, p.b(*q_position));
                self.qkv.forward_parts(p, (sequences, c, 0..1), sentence, true, p.b(*q_sentence));
                let (positions, sentences) = ((positions, names.position), (sentence, names.sequence));
                within(stages::ROWS, || gather::add_rows(p.device, positions, sentences, rows, c, p.b(*stream)));
            }
            Queries::Embedded { stream, q } => {
                stream.forward_of(p, rows, query_tokens(decoder), sentence);
                self.qkv.forward_parts(p, (rows, c, 0..1), p.b(stream.y), true, p.b(*q));
            }
        }
        within(stages::ATTENTION_FORWARD, || enhanced_decoding::forward(p.device, &self.attention(p, decoder)));
        self.block.forward(p, rows, names, p.b(self.ctx), p.b(self.queries.stream()));
    }

    /// From the gradient of the output to that of the sentence embeddings; adds those of all parameters. `hidden [T, C]` and
    /// `wide [T, 2C]` are scratch.
    pub fn backward(
        &self,
        p: &Pass<'_>,
        inputs: &Inputs,
        decoder: &DecoderInputs,
        (hidden, wide): (&Tensor, &Tensor),
        s: Scratch,
    ) {
        let _stage = trace::stage(stages::DECODER_PRODUCTS);
        let (c, tokens) = (self.dims.hidden, &decoder.tokens);
        let (sequences, rows) = (tokens.sequences.get(), decoder.rows.count.get());
        let (d, dc, dq) = (p.buffers.tensor(self.d), p.b(self.dc.wide), p.b(self.dq));
        self.block.backward(p, rows, tokens.names_of(&decoder.rows), p.b(self.ctx), d, s);
        let forward = self.attention(p, decoder);
        let backward = enhanced_decoding::Backward { forward, dout: p.b(s.context), dq, dkv: wide };
        within(stages::ATTENTION_BACKWARD, || enhanced_decoding::backward(p.device, &backward));
        within(stages::ROWS, || gather::zero(p.device, dc, sequences.rows * c));
        match &self.queries {
            Queries::Sum { dq_position, dq_sentence, .. } => {
                self.sum_backward(p, decoder, (d, dq, dc), (*dq_position, *dq_sentence));
            }
            Queries::Embedded { stream, .. } => {
                self.qkv.backward_parts(p, (rows, c, 0..1), p.b(stream.y), dq, true, (d, Output::Add));
                let (by_sequence, by_position) = (decoder.by_sequence.groups(), decoder.by_position.groups());
                let Some(by_type) = &decoder.by_type else { panic!("embedded queries need their rows by token type") };
                let groups = [by_sequence, by_position, by_type.groups()];
                stream.backward_of(p, rows, query_tokens(decoder), (p.b(self.c), dc), d, groups);
            }
        }
        let kv = p.b(self.embedding.y);
        self.qkv.backward_parts(p, (tokens.count.get(), c, 1..3), kv, wide, true, (hidden, Output::Set));
        zero_key_bias(p, self.qkv.bias, c);
        // The first row of each sequence's keys and values was c, not an embedding.
        let _stage = trace::stage(stages::ROWS);
        gather::group_sums(p.device, hidden, inputs.by_first.groups(), c, dc);
        gather::zero_rows(p.device, &inputs.first_tokens, sequences, c, hidden);
        self.embedding.backward(p, tokens, hidden);
    }

    /// Of the queries p_i + c: from the gradient of the residual stream `d` and of the product `dq`, both `[N, C]`, to those of positions
    /// and of the sentence embeddings, `dc [S, C]`.
    fn sum_backward(
        &self,
        p: &Pass<'_>,
        decoder: &DecoderInputs,
        (d, dq, dc): (&Tensor, &Tensor, &Tensor),
        (dq_position, dq_sentence): (Sum, Sum),
    ) {
        let (c, tokens) = (self.dims.hidden, &decoder.tokens);
        let (sequences, longest) = (tokens.sequences.get(), tokens.longest);
        let (by_position, by_sequence) = (decoder.by_position.groups(), decoder.by_sequence.groups());
        let rows = trace::stage(stages::ROWS);
        gather::group_sums(p.device, d, by_position, c, p.g(self.position));
        gather::group_sums(p.device, d, by_sequence, c, dc);
        gather::zero(p.device, p.b(dq_position.wide), longest * c);
        gather::zero(p.device, p.b(dq_sentence.wide), sequences.rows * c);
        gather::group_sums(p.device, dq, by_position, c, p.b(dq_position.wide));
        gather::group_sums(p.device, dq, by_sequence, c, p.b(dq_sentence.wide));
        let dq_position = dq_position.rounded(p, tokens.longest_count(), c);
        let dq_sentence = dq_sentence.rounded(p, sequences, c);
        drop(rows);
        let (positions, d_positions) = (p.w(self.position), (p.g(self.position), Output::Add));
        self.qkv.backward_parts(p, (longest.into(), c, 0..1), positions, dq_position, false, d_positions);
        self.qkv.backward_parts(p, (sequences, c, 0..1), p.b(self.c), dq_sentence, true, (dc, Output::Add));
    }
}

/// The labelled rows as tokens of an embedding whose words are the sentence embeddings.
fn query_tokens(decoder: &DecoderInputs) -> embed::Tokens<'_> {
    let names = decoder.tokens.names_of(&decoder.rows);
    embed::Tokens { ids: names.sequence, types: &decoder.tokens.types, names }
}
