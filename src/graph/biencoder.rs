//! A tower of a bi-encoder: from packed texts to one embedding each. Queries and passages share a tower, or have one each.
//!
//! `e = normalize(W pool(hidden) + b)`, projection and normalisation where asked for. With CLS pooling only the first row of each text is
//! computed in the encoder's last layer; mean pooling needs all of them, and so does whoever reads the last hidden states beside: of a
//! joined embedding ([`crate::ops::joined`]) the lexical part is made of them.

use super::activations::{Plan, Slot};
use super::block::Linear;
use super::encoder::Encoder;
use super::extent::{Bounds, Extent};
use super::inputs::{Rows, TokenInputs};
use super::lexical::LexicalHead;
use super::params::{Entries, Id, Table};
use super::{Capacity, Pass, stages};
use crate::data::pairs::texts::TextBatch;
use crate::device::{DType, Device, Output, Tensor, trace};
use crate::model::config::BertConfig;
use crate::ops::pool::{self, Pooling};
use crate::ops::{gather, joined};

/// How hidden states become an embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Which token states count.
    pub pooling: Pooling,
    /// Width of the projection, where there is one.
    pub projection: Option<usize>,
    /// Whether embeddings are scaled to length 1.
    pub normalize: bool,
}

impl Shape {
    /// Width of the embeddings.
    pub fn width(&self, config: &BertConfig) -> usize {
        self.projection.unwrap_or(config.hidden_size)
    }
}

/// Texts of a chunk on the device.
pub struct TowerInputs {
    /// Their tokens.
    pub tokens: TokenInputs,
    /// Rows needed of the encoder's last layer.
    pub rows: Rows,
    /// `[S]` row of each text among all embeddings of the step.
    places: Tensor,
    /// Texts.
    pub count: Extent,
    device: Device,
    capacity: Capacity,
    needed: Needed,
}

/// Rows that are needed of the encoder's last layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needed {
    /// The first of each text.
    First,
    /// All.
    All,
}

impl Needed {
    /// What pooling alone needs.
    pub fn by(pooling: Pooling) -> Self {
        match pooling {
            Pooling::Cls => Needed::First,
            Pooling::Mean => Needed::All,
        }
    }

    fn rows(self, capacity: Capacity) -> usize {
        match self {
            Needed::First => capacity.sequences,
            Needed::All => capacity.tokens,
        }
    }
}

impl TowerInputs {
    /// Room for chunks up to `capacity`.
    pub fn new(device: Device, config: &BertConfig, capacity: Capacity, pooling: Pooling) -> Self {
        Self::with(device, config, capacity, Needed::by(pooling))
    }

    /// The same for a tower of [`Tower::with`].
    pub fn with(device: Device, config: &BertConfig, capacity: Capacity, needed: Needed) -> Self {
        TowerInputs {
            tokens: TokenInputs::new(device, capacity, config.vocab_size, config.type_vocab_size),
            rows: Rows::new(device, needed.rows(capacity), capacity),
            places: device.zeros(DType::U32, capacity.sequences),
            count: Extent::new(device),
            device,
            capacity,
            needed,
        }
    }

    /// Uploads texts whose embeddings go to `places`, with what a backward needs if it follows. Says for what the work is laid out.
    pub fn set(&mut self, texts: &TextBatch, places: &[u32], gradients: bool) -> Bounds {
        let (cu, count) = (&texts.cu_seqlens, texts.samples.len());
        let length = cu.windows(2).map(|w| (w[1] - w[0]) as usize).max().unwrap_or(0);
        let exact =
            Bounds { tokens: texts.ids.len(), sequences: count, labels: 0, decoder_rows: 0, length, head_chunks: 0 };
        let bounds = if self.device.is_gpu() { exact.rounded(self.capacity) } else { exact };
        self.tokens.set(&texts.ids, &texts.types, cu, &texts.samples, &bounds);
        if gradients {
            self.tokens.set_groups(&texts.ids, &texts.types, cu, &bounds);
        }
        match self.needed {
            Needed::First => self.rows.set(&cu[..count], cu, bounds.sequences, &bounds),
            Needed::All => self.rows.set(&(0..texts.ids.len() as u32).collect::<Vec<_>>(), cu, bounds.tokens, &bounds),
        };
        self.places.upload(places);
        self.count.set(count, bounds.sequences);
        bounds
    }
}

/// An encoder and what makes an embedding of its states.
pub struct Tower {
    encoder: Encoder,
    /// Behind those of the encoder.
    others: Entries,
    shape: Shape,
    needed: Needed,
    hidden: usize,
    projection: Option<Linear>,
    lexical: Option<LexicalHead>,
    /// `[S, C]`: pooled states, and their gradient.
    pooled: Slot,
    d_pooled: Slot,
    /// `[S, W]`: after the projection, and its gradient.
    projected: Slot,
    d_projected: Slot,
    /// `[S, W]`: the embeddings, and their gradient; `[S]` lengths before normalisation.
    embedding: Slot,
    d_embedding: Slot,
    length: Slot,
}

impl Tower {
    /// Adds parameters and buffers to the tables, for chunks up to `capacity`. `(prefix, projection)`: what stands before the names of the
    /// encoder's parameters, and what the projection is called.
    pub fn new(
        t: &mut Table,
        plan: &mut Plan,
        config: &BertConfig,
        capacity: Capacity,
        shape: Shape,
        names: (&str, &str),
    ) -> Self {
        Self::with(t, plan, config, capacity, (shape, Needed::by(shape.pooling)), names)
    }

    /// The same with the last hidden states of the rows `needed`, at least those that pooling needs.
    pub fn with(
        t: &mut Table,
        plan: &mut Plan,
        config: &BertConfig,
        capacity: Capacity,
        (shape, needed): (Shape, Needed),
        (prefix, projection): (&str, &str),
    ) -> Self {
        let (sequences, c, w) = (capacity.sequences, config.hidden_size, shape.width(config));
        let encoder = t.within(prefix, |t| Encoder::new(t, plan, config, capacity, needed.rows(capacity)));
        let (pooled, d_pooled) = match needed {
            Needed::First => (encoder.output(), encoder.gradients.rows),
            Needed::All => (plan.add("tower.pooled", sequences, c), plan.add_gradient("tower.d_pooled", sequences, c)),
        };
        let linear = shape.projection.map(|_| Linear::new(t, projection.into(), w, c));
        let (projected, d_projected) = match linear {
            Some(_) => {
                (plan.add("tower.projected", sequences, w), plan.add_gradient("tower.d_projected", sequences, w))
            }
            None => (pooled, d_pooled),
        };
        let (embedding, d_embedding) = match shape.normalize {
            true => (plan.add("tower.embedding", sequences, w), plan.add_gradient("tower.d_embedding", sequences, w)),
            false => (projected, d_projected),
        };
        let length = plan.add_wide("tower.length", sequences, 1);
        Tower {
            others: t.since(encoder.end()),
            encoder,
            shape,
            needed,
            hidden: c,
            projection: linear,
            lexical: None,
            pooled,
            d_pooled,
            projected,
            d_projected,
            embedding,
            d_embedding,
            length,
        }
    }

    /// The same for joined embeddings, whose texts have `k` words each at most, in training.
    pub fn joined(
        on: (Device, DType),
        (t, plan): (&mut Table, &mut Plan),
        config: &BertConfig,
        capacity: Capacity,
        (shape, k): (Shape, usize),
        names: (&str, &str),
    ) -> Self {
        let tower = Self::with(t, plan, config, capacity, (shape, Needed::All), names);
        let (word, sizes) = (tower.word(), (capacity.tokens, capacity.sequences));
        let head = t.within(names.0, |t| LexicalHead::trained(on, (t, plan), config, word, sizes, k));
        Tower { lexical: Some(head), others: t.since(tower.encoder.end()), ..tower }
    }

    /// Its entries in the order in which [`Self::backward`] completes their gradients.
    pub fn completed(&self) -> Vec<Entries> {
        [vec![self.others.clone()], self.encoder.completed()].concat()
    }

    /// Where [`Self::forward`] leaves the last hidden states of the rows needed, `[R, C]`.
    pub fn hidden(&self) -> Slot {
        self.encoder.output()
    }

    /// What the last [`Self::forward`] left of its texts: dense embeddings `[S, W]`, and words.
    pub fn embedded<'p>(&'p self, p: &'p Pass<'_>) -> (&'p Tensor, Option<joined::Words<'p>>) {
        (p.b(self.embedding), self.lexical.as_ref().map(|head| head.words(p)))
    }

    /// The word embeddings, which an MLM head projects with.
    pub fn word(&self) -> Id {
        self.encoder.embeddings.word
    }

    fn width(&self) -> usize {
        self.shape.projection.unwrap_or(self.hidden)
    }

    fn pool<'a>(&self, inputs: &'a TowerInputs) -> pool::Shape<'a> {
        let (sequences, pooling) = (inputs.count.get(), self.shape.pooling);
        pool::Shape { sequences, width: self.hidden, cu_seqlens: &inputs.rows.cu_rows, pooling }
    }

    /// Embeds the texts, and puts the embeddings where they belong in `all [N, W]`, joined ones in `all [N, W + V]`.
    pub fn forward(&self, p: &Pass<'_>, inputs: &TowerInputs, all: &Tensor) {
        let _stage = trace::stage(stages::ROWS);
        let (count, c, w) = (inputs.count.get(), self.hidden, self.width());
        self.encoder.forward(p, &inputs.tokens, &inputs.rows);
        if self.needed == Needed::All {
            pool::forward(p.device, self.pool(inputs), p.b(self.encoder.output()), p.b(self.pooled));
        }
        if let Some(projection) = &self.projection {
            projection.forward(p, (count, c, w), p.b(self.pooled), p.b(self.projected));
        }
        if self.shape.normalize {
            pool::normalize(p.device, (count, w), p.b(self.projected), p.b(self.embedding), p.b(self.length));
        }
        let Some(head) = &self.lexical else {
            return gather::scatter(p.device, p.b(self.embedding), &inputs.places, count, w, all);
        };
        head.forward(p, &inputs.tokens, p.b(self.hidden()));
        let shape = head.shape(&inputs.tokens, w);
        joined::put(p.device, shape, p.b(self.embedding), head.words(p), &inputs.places, all);
    }

    /// Adds the gradients of all parameters, from those of the embeddings in `d_all`, as wide as in the forward. The forward of the same
    /// texts comes before.
    pub fn backward(&self, p: &Pass<'_>, inputs: &TowerInputs, d_all: &Tensor) {
        let _stage = trace::stage(stages::ROWS);
        let (count, c, w) = (inputs.count.get(), self.hidden, self.width());
        let d_embedding = p.b(self.d_embedding);
        match &self.lexical {
            None => gather::gather(p.device, d_all, &inputs.places, count, w, d_embedding),
            Some(head) => {
                let shape = head.shape(&inputs.tokens, w);
                joined::take(p.device, shape, d_embedding, head.d_words(p), &inputs.places, d_all);
            }
        }
        if self.shape.normalize {
            let (y, length) = (p.b(self.embedding), p.b(self.length));
            let (dy, dx) = (p.b(self.d_embedding), p.b(self.d_projected));
            pool::normalize_backward(p.device, (count, w), y, length, dy, dx);
        }
        if let Some(projection) = &self.projection {
            let dx = (p.b(self.d_pooled), Output::Set);
            projection.backward(p, (count, c, w), p.b(self.pooled), p.b(self.d_projected), dx);
        }
        if self.needed == Needed::All {
            pool::backward(p.device, self.pool(inputs), p.b(self.d_pooled), p.b(self.encoder.gradients.rows));
        }
        if let Some(head) = &self.lexical {
            head.backward(p, &inputs.tokens, p.b(self.hidden()), p.b(self.encoder.gradients.rows));
        }
        p.complete(&self.others);
        self.encoder.backward(p, &inputs.tokens, &inputs.rows);
    }
}
