//! The BERT encoder over a packed token stream.
//!
//! The last layer computes queries, attention rows, output projection, feed-forward and LayerNorms only for the rows that are
//! needed of it (labels, `[CLS]`); keys and values for all. Loss and gradients are those of the full layer.

use super::activations::{Plan, Slot};
use super::block::{Block, Linear, Norm, Scratch};
use super::inputs::{Rows, TokenInputs};
use super::params::{Entries, Id, Init, Table};
use super::stages::{self, within};
use super::{Capacity, Dims, Pass};
use crate::device::{Matrix, Output, Tensor, trace};
use crate::model::config::BertConfig;
use crate::ops::embed::Tables;
use crate::ops::{Count, Groups, attention, embed, gather, layernorm};

/// Numbers of the embedding tables; the decoder reads them too.
#[derive(Clone, Copy, Debug)]
pub struct Embeddings {
    /// `[V, C]`, tied to the LM head.
    pub word: Id,
    /// `[max positions, C]`.
    pub position: Id,
    token_type: Id,
    norm: Norm,
}

impl Embeddings {
    fn new(t: &mut Table, config: &BertConfig) -> Self {
        let c = config.hidden_size;
        let name = |part: &str| [format!("bert.embeddings.{part}_embeddings.weight")];
        let word = t.matrices(&name("word"), config.vocab_size, c, Init::NormalWithPad(config.pad_token_id));
        t.pad(word, Dims::new(config).vocabulary, 0.0);
        Embeddings {
            word,
            position: t.matrices(&name("position"), config.max_position_embeddings, c, Init::Normal),
            token_type: t.matrices(&name("token_type"), config.type_vocab_size, c, Init::Normal),
            norm: Norm::new(t, "bert.embeddings.LayerNorm", c),
        }
    }

    fn weights<'a>(&self, p: &'a Pass<'_>) -> Tables<'a> {
        Tables {
            word: p.w(self.word),
            position: p.w(self.position),
            token_type: p.w(self.token_type),
            gamma: p.master(self.norm.gamma),
            beta: p.master(self.norm.beta),
        }
    }

    fn gradients<'a>(&self, p: &'a Pass<'_>) -> Tables<'a> {
        Tables {
            word: p.g(self.word),
            position: p.g(self.position),
            token_type: p.g(self.token_type),
            gamma: p.g(self.norm.gamma),
            beta: p.g(self.norm.beta),
        }
    }
}

/// One use of the embedding layer: its dropout site and buffers.
#[derive(Clone, Copy, Debug)]
pub struct Embedding {
    tables: Embeddings,
    dims: Dims,
    site: u32,
    mean: Slot,
    rstd: Slot,
    /// `[T, C]`.
    pub y: Slot,
}

impl Embedding {
    /// For up to `tokens` rows.
    pub fn new(plan: &mut Plan, tables: Embeddings, dims: Dims, name: &str, tokens: usize, site: u32) -> Self {
        Embedding {
            tables,
            dims,
            site,
            mean: plan.add_wide(format!("{name}.mean"), tokens, 1),
            rstd: plan.add_wide(format!("{name}.rstd"), tokens, 1),
            y: plan.add(format!("{name}.y"), tokens, dims.hidden),
        }
    }

    fn shape<'a>(&self, rows: Count<'a>) -> layernorm::Shape<'a> {
        layernorm::Shape { rows, width: self.dims.hidden, eps: self.dims.eps }
    }

    /// Embeds the tokens into `y`.
    pub fn forward(&self, p: &Pass<'_>, tokens: &TokenInputs) {
        let of = embed::Tokens { ids: &tokens.ids, types: &tokens.types, names: tokens.names() };
        self.forward_of(p, tokens.count.get(), of, p.w(self.tables.word));
    }

    /// [`Self::forward`] of rows whose ids name rows of `word`.
    pub fn forward_of(&self, p: &Pass<'_>, rows: Count<'_>, tokens: embed::Tokens<'_>, word: &Tensor) {
        let _stage = trace::stage(stages::ROWS);
        embed::forward(
            p.device,
            &embed::Forward {
                shape: self.shape(rows),
                tokens,
                tables: Tables { word, ..self.tables.weights(p) },
                dropout: p.dropout.hidden(self.site),
                y: p.b(self.y),
                mean: p.b(self.mean),
                rstd: p.b(self.rstd),
            },
        );
    }

    /// Adds the gradients of the tables; `dy [T, C]` is used up.
    pub fn backward(&self, p: &Pass<'_>, tokens: &TokenInputs, dy: &Tensor) {
        let of = embed::Tokens { ids: &tokens.ids, types: &tokens.types, names: tokens.names() };
        let word = (p.w(self.tables.word), p.g(self.tables.word));
        self.backward_of(p, tokens.count.get(), of, word, dy, tokens.groups());
    }

    /// [`Self::backward`] of [`Self::forward_of`]: `word` and its gradient. `groups`: rows by id, by position, by token type.
    pub fn backward_of(
        &self,
        p: &Pass<'_>,
        rows: Count<'_>,
        tokens: embed::Tokens<'_>,
        (word, dword_acc): (&Tensor, &Tensor),
        dy: &Tensor,
        groups: [Groups<'_>; 3],
    ) {
        let _stage = trace::stage(stages::ROWS);
        embed::backward(
            p.device,
            &embed::Backward {
                shape: self.shape(rows),
                tokens,
                tables: Tables { word, ..self.tables.weights(p) },
                dropout: p.dropout.hidden(self.site),
                mean: p.b(self.mean),
                rstd: p.b(self.rstd),
                dy,
                groups,
                grad_acc: Tables { word: dword_acc, ..self.tables.gradients(p) },
            },
        );
    }
}

/// One layer.
#[derive(Clone, Debug)]
struct Layer {
    entries: Entries,
    site: u32,
    qkv: Linear,
    block: Block,
    /// `[T, 3C]`; in a pruned layer `[T, 2C]` keys and values, and `q` apart.
    wide: Slot,
    ctx: Slot,
    lse: Slot,
    pruned: Option<Pruned>,
}

/// Buffers of the last layer when only some rows of it are needed.
#[derive(Clone, Copy, Debug)]
struct Pruned {
    /// `[R, C]` needed rows of the layer's input.
    x: Slot,
    /// `[R, C]`.
    q: Slot,
    /// `[R, C]`.
    dq: Slot,
}

/// Gradient buffers of the encoder, shared with the decoder.
#[derive(Clone, Copy, Debug)]
pub struct Gradients {
    /// `[T, C]`: gradient of the current layer's output, then input.
    pub hidden: Slot,
    /// `[R, C]`: gradient of the needed rows.
    pub rows: Slot,
    /// `[T, 3C]`.
    pub wide: Slot,
    /// Shared by all blocks.
    pub block: Scratch,
}

/// What stands before the number of a layer.
const LAYERS: &str = "bert.encoder.layer";

/// The encoder.
#[derive(Clone, Debug)]
pub struct Encoder {
    dims: Dims,
    /// The embedding tables.
    pub embeddings: Embeddings,
    embedding: Embedding,
    layers: Vec<Layer>,
    /// Gradient buffers.
    pub gradients: Gradients,
    first_entry: usize,
}

impl Encoder {
    /// Dropout sites of a layer: attention, then those of its block.
    const SITES: u32 = 1 + Block::SITES;

    /// Adds the encoder's parameters and buffers to the tables. `rows`: most rows needed of the last layer.
    pub fn new(t: &mut Table, plan: &mut Plan, config: &BertConfig, capacity: Capacity, rows: usize) -> Self {
        let dims = Dims::new(config);
        let (tokens, c, first_entry) = (capacity.tokens, dims.hidden, t.len());
        let embeddings = Embeddings::new(t, config);
        let embedding = Embedding::new(plan, embeddings, dims, "embeddings", tokens, 0);
        let last = config.num_hidden_layers - 1;
        let layers = (0..=last).map(|i| {
            let site = 1 + i as u32 * Self::SITES;
            let names = (format!("{LAYERS}.{i}"), plan.layer(LAYERS, i));
            Layer::new(t, plan, dims, (&names.0, &names.1), tokens, site, (i == last).then_some(rows))
        });
        let layers = layers.collect();
        let gradients = Gradients {
            hidden: plan.add_gradient("backward.hidden", tokens, c),
            rows: plan.add_gradient("backward.rows", rows, c),
            wide: plan.add_gradient("backward.qkv", tokens, 3 * c),
            block: Scratch::new(plan, &dims, tokens),
        };
        Encoder { dims, embeddings, embedding, layers, gradients, first_entry }
    }

    /// Its entries in the order in which [`Self::backward`] completes their gradients: layer by layer, then the embeddings, which the
    /// LM head and the decoder use, too.
    pub fn completed(&self) -> Vec<Entries> {
        let layers = self.layers.iter().rev().map(|layer| layer.entries.clone());
        let layers_begin = self.layers.first().map_or(self.first_entry, |layer| layer.entries.start);
        layers.chain(std::iter::once(self.first_entry..layers_begin)).collect()
    }

    /// The entry behind its own.
    pub fn end(&self) -> usize {
        self.layers.last().map_or(self.first_entry, |layer| layer.entries.end)
    }

    /// First dropout site after the encoder's.
    pub fn next_site(&self) -> u32 {
        1 + self.layers.len() as u32 * Self::SITES
    }

    /// Where [`Self::forward`] leaves the needed rows `[R, C]` of the last layer.
    pub fn output(&self) -> Slot {
        self.layers.last().map_or(self.embedding.y, |l| l.block.output())
    }

    /// Input of layer `i`.
    fn input(&self, i: usize) -> Slot {
        if i == 0 { self.embedding.y } else { self.layers[i - 1].block.output() }
    }

    /// Tokens to the needed rows of the last hidden state.
    pub fn forward(&self, p: &Pass<'_>, tokens: &TokenInputs, needed: &Rows) {
        let _stage = trace::stage(stages::ENCODER_PRODUCTS);
        self.embedding.forward(p, tokens);
        for (i, layer) in self.layers.iter().enumerate() {
            layer.forward(p, &self.dims, tokens, needed, p.b(self.input(i)));
        }
    }

    /// `gradients.rows` holds the gradient of the output; adds those of all parameters.
    pub fn backward(&self, p: &Pass<'_>, tokens: &TokenInputs, needed: &Rows) {
        let _stage = trace::stage(stages::ENCODER_PRODUCTS);
        for (i, layer) in self.layers.iter().enumerate().rev() {
            layer.backward(p, &self.dims, tokens, needed, p.b(self.input(i)), self.gradients);
            p.complete(&layer.entries);
        }
        self.embedding.backward(p, tokens, p.b(self.gradients.hidden));
    }
}

impl Layer {
    fn new(
        t: &mut Table,
        plan: &mut Plan,
        dims: Dims,
        (name, buffers): (&str, &str),
        tokens: usize,
        site: u32,
        pruned: Option<usize>,
    ) -> Self {
        let (c, first) = (dims.hidden, t.len());
        let names = ["query", "key", "value"].map(|x| format!("{name}.attention.self.{x}"));
        let rows = pruned.unwrap_or(tokens);
        let qkv = Linear::fused(t, &names, c, c);
        let block = Block::new(t, plan, dims, (name, buffers), rows, site + 1);
        Layer {
            entries: t.since(first),
            site,
            qkv,
            block,
            wide: plan.add(format!("{buffers}.qkv"), tokens, if pruned.is_some() { 2 * c } else { 3 * c }),
            ctx: plan.add(format!("{buffers}.ctx"), rows, c),
            lse: plan.add_wide(format!("{buffers}.lse"), rows, dims.heads),
            pruned: pruned.map(|rows| Pruned {
                x: plan.add(format!("{buffers}.x"), rows, c),
                q: plan.add(format!("{buffers}.q"), rows, c),
                dq: plan.add_gradient(format!("{buffers}.dq"), rows, c),
            }),
        }
    }

    /// Queries, keys, values of the layer as matrices.
    fn qkv<'a>(&self, p: &Pass<'a>, c: usize) -> [Matrix<'a>; 3] {
        let wide = p.buffers.tensor(self.wide);
        match self.pruned {
            None => [0, c, 2 * c].map(|offset| Matrix::columns(wide, offset, 3 * c)),
            Some(s) => [
                Matrix::new(p.buffers.tensor(s.q), c),
                Matrix::columns(wide, 0, 2 * c),
                Matrix::columns(wide, c, 2 * c),
            ],
        }
    }

    fn attention<'a>(
        &self,
        p: &Pass<'a>,
        dims: &Dims,
        tokens: &'a TokenInputs,
        rows: Option<&'a Rows>,
    ) -> attention::Forward<'a> {
        let [q, k, v] = self.qkv(p, dims.hidden);
        attention::Forward {
            shape: attention::Shape {
                sequences: tokens.sequences.count,
                heads: dims.heads,
                head_size: dims.head_size(),
                cu_rows: rows.map_or(&tokens.cu_seqlens, |r| &r.cu_rows),
                cu_seqlens: &tokens.cu_seqlens,
                work: rows.map_or(tokens.work(), Rows::work),
            },
            q,
            k,
            v,
            names: rows.map_or(tokens.names(), |r| tokens.names_of(r)),
            dropout: p.dropout.attention(self.site),
            out: p.buffers.tensor(self.ctx),
            lse: p.buffers.tensor(self.lse),
        }
    }

    fn forward(&self, p: &Pass<'_>, dims: &Dims, tokens: &TokenInputs, needed: &Rows, x: &Tensor) {
        let (c, count) = (dims.hidden, tokens.count.get());
        let rows = self.pruned.map(|_| needed);
        let mut residual = x;
        match self.pruned {
            None => self.qkv.forward(p, (count, c, 3 * c), x, p.b(self.wide)),
            Some(s) => {
                residual = p.b(s.x);
                within(stages::ROWS, || gather::gather(p.device, x, &needed.token, needed.count.get(), c, residual));
                self.qkv.forward_parts(p, (needed.count.get(), c, 0..1), residual, true, p.b(s.q));
                self.qkv.forward_parts(p, (count, c, 1..3), x, true, p.b(self.wide));
            }
        }
        let attention = self.attention(p, dims, tokens, rows);
        within(stages::ATTENTION_FORWARD, || attention::forward(p.device, &attention));
        self.block.forward(p, rows.map_or(count, |r| r.count.get()), attention.names, attention.out, residual);
    }

    /// From the gradient of the output (`g.rows` in the pruned layer, `g.hidden` else) to that of the input in `g.hidden`.
    fn backward(&self, p: &Pass<'_>, dims: &Dims, tokens: &TokenInputs, needed: &Rows, x: &Tensor, g: Gradients) {
        let (c, count) = (dims.hidden, tokens.count.get());
        let rows = self.pruned.map(|_| needed);
        let forward = self.attention(p, dims, tokens, rows);
        let d = p.buffers.tensor(if self.pruned.is_some() { g.rows } else { g.hidden });
        self.block.backward(p, rows.map_or(count, |r| r.count.get()), forward.names, forward.out, d, g.block);
        let wide = p.b(g.wide);
        let gradient = match self.pruned {
            None => attention::Gradient::Fused(wide),
            Some(s) => attention::Gradient::Split(p.b(s.dq), wide),
        };
        let backward = attention::Backward { forward, dout: p.b(g.block.context), gradient };
        within(stages::ATTENTION_BACKWARD, || attention::backward(p.device, &backward));
        let Some(s) = self.pruned else {
            self.qkv.backward(p, (count, c, 3 * c), x, wide, (d, Output::Add));
            return zero_key_bias(p, self.qkv.bias, c);
        };
        self.qkv.backward_parts(p, (needed.count.get(), c, 0..1), p.b(s.x), p.b(s.dq), true, (d, Output::Add));
        self.qkv.backward_parts(p, (count, c, 1..3), x, wide, true, (p.b(g.hidden), Output::Set));
        let hidden = p.b(g.hidden);
        within(stages::ROWS, || gather::scatter_add(p.device, d, &needed.token, needed.count.get(), c, hidden));
        zero_key_bias(p, self.qkv.bias, c);
    }
}

/// The softmax does not change when a constant is added to a row of scores, so the gradient of the key bias is zero; what the
/// product computes is rounding noise, which Adam would blow up to steps of full size.
pub fn zero_key_bias(p: &Pass<'_>, qkv_bias: Id, c: usize) {
    gather::zero(p.device, &p.g(qkv_bias).slice(c..2 * c), c);
}
