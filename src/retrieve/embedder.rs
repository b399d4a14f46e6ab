//! A bi-encoder's tower as it is used: texts to embeddings, without optimizer, gradients or dropout.

use super::representation::{Embedded, Representation};
use crate::data::pairs::texts::TextBatch;
use crate::device::{DType, Device, Tensor};
use crate::error::{Error, Result};
use crate::graph::activations::{Activations, Plan};
use crate::graph::biencoder::{Needed, Shape, Tower, TowerInputs};
use crate::graph::extent::Bounds;
use crate::graph::lexical::LexicalHead;
use crate::graph::params::{Params, Table, to_f32};
use crate::graph::records::Records;
use crate::graph::{Capacity, Pass, StepDropout, check_gpu};
use crate::model::config::BertConfig;
use crate::model::towers::{PROJECTION, PROJECTIONS, SIDES, Towers};
use crate::ops::joined::Words;

/// What is embedded: decides the encoder where a model has two, and the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Queries.
    Query,
    /// Passages.
    Passage,
}

impl Kind {
    /// The name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Query => "query",
            Kind::Passage => "passage",
        }
    }

    /// Place among the two sides of a model.
    pub fn side(self) -> usize {
        match self {
            Kind::Query => 0,
            Kind::Passage => 1,
        }
    }
}

/// A tower with its weights and buffers for batches up to a capacity.
pub struct Embedder {
    device: Device,
    params: Params,
    buffers: Activations,
    tower: Tower,
    lexical: Option<LexicalHead>,
    inputs: TowerInputs,
    /// `[S, W]`.
    embeddings: Tensor,
    dim: usize,
    representation: Representation,
    capacity: Capacity,
    records: Records<Bounds>,
}

impl Embedder {
    /// The tower of `kind` in `towers`, for batches up to `capacity`; `kept`: of a lexical representation that many of the largest tokens.
    ///
    /// # Errors
    /// Weights that cannot be read, not enough memory, or a model whose sizes the kernels do not have.
    pub fn new(
        (device, storage): (Device, DType),
        towers: &Towers,
        shape: Shape,
        kind: Kind,
        capacity: Capacity,
        kept: (Representation, usize),
    ) -> Result<Embedder> {
        let names = match towers.untied() {
            true => (format!("{}.", SIDES[kind.side()]), PROJECTIONS[kind.side()]),
            false => (String::new(), PROJECTION),
        };
        let load = |params: &Params| params.load(0, 0.0, |name, shape, out| towers.read(name, shape, out));
        Self::build((device, storage), (&towers.config, shape), (&names.0, names.1), capacity, kept, load)
    }

    /// An encoder with random weights, for measurements.
    ///
    /// # Errors
    /// Not enough memory, or a model whose sizes the kernels do not have.
    pub fn random(target: (Device, DType), config: &BertConfig, shape: Shape, capacity: Capacity) -> Result<Embedder> {
        let load = |params: &Params| params.load(1, config.initializer_range, |_, _, _| Ok(false)).map(|_| Vec::new());
        Self::build(target, (config, shape), ("", PROJECTION), capacity, (Representation::Cls, 0), load)
    }

    /// The graph of a tower whose parameters and projection have these names, with the weights that `load` fills in; it gives the names of
    /// those that are missing.
    fn build(
        (device, storage): (Device, DType),
        (config, shape): (&BertConfig, Shape),
        (prefix, projection): (&str, &'static str),
        capacity: Capacity,
        (representation, k): (Representation, usize),
        load: impl FnOnce(&Params) -> Result<Vec<String>>,
    ) -> Result<Embedder> {
        let width = shape.width(config);
        if device.is_gpu() {
            check_gpu(config)?;
            if !width.is_multiple_of(8) {
                let cause = format!("embeddings are {width} wide; the GPU's kernels need a multiple of 8");
                return Err(Error::refused(cause).remedy("use --device cpu, or a model of another size"));
            }
        }
        let (mut table, mut plan) = (Table::default(), Plan::forward_only());
        let needed = if representation.lexical() { Needed::All } else { Needed::by(shape.pooling) };
        let tower = Tower::with(&mut table, &mut plan, config, capacity, (shape, needed), (prefix, projection));
        let lexical = representation.lexical().then(|| {
            let (word, rows) = (tower.word(), (capacity.tokens, capacity.sequences));
            table.within(prefix, |t| LexicalHead::new((device, storage), (t, &mut plan), config, word, rows, k))
        });
        let params = table.allocate_weights(device, storage);
        let missing = load(&params)?;
        if let Some(name) = missing.first() {
            return Err(Error::refused("parameter is missing").tensor(name).remedy("give a model that has it"));
        }
        let embedder = Embedder {
            device,
            params,
            buffers: plan.allocate(device, storage),
            tower,
            lexical,
            inputs: TowerInputs::with(device, config, capacity, needed),
            embeddings: device.zeros(storage, capacity.sequences * width),
            dim: width,
            representation,
            capacity,
            records: Records::default(),
        };
        device.check().map(|()| embedder)
    }

    /// Numbers and tokens of a text: W, and K; 0 for what the representation lacks.
    pub fn widths(&self) -> (usize, usize) {
        let dim = if self.representation.dense() { self.dim } else { 0 };
        (dim, self.lexical.as_ref().map_or(0, LexicalHead::k))
    }

    /// The largest batch.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// The embeddings of the texts of a batch, which must fit the capacity.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn embed(&mut self, texts: &TextBatch) -> Result<Embedded> {
        let count = texts.sequences();
        let places: Vec<u32> = (0..count as u32).collect();
        let bounds = self.inputs.set(texts, &places, false);
        let mut records = std::mem::take(&mut self.records);
        let pass = Pass {
            device: self.device,
            params: &self.params,
            buffers: &self.buffers,
            dropout: StepDropout::OFF,
            complete: None,
        };
        records.run(self.device, bounds, || {
            self.tower.forward(&pass, &self.inputs, &self.embeddings);
            if let Some(head) = &self.lexical {
                head.forward(&pass, &self.inputs.tokens, pass.b(self.tower.hidden()));
            }
        });
        let mut embedded = Embedded::default();
        if self.representation.dense() {
            embedded.dense = to_f32(&self.embeddings.slice(0..count * self.dim));
        }
        if let Some(head) = &self.lexical {
            let Words { ids, weights } = head.words(&pass);
            let used = 0..count * head.k();
            (embedded.ids, embedded.weights) = (ids.slice(used.clone()).to_vec(), to_f32(&weights.slice(used)));
        }
        self.records = records;
        self.device.check().map(|()| embedded)
    }
}

/// How many tokens and texts go through a tower at once: enough to keep the device busy, few enough for its memory.
pub fn capacity(device: Device, config: &BertConfig, length: usize, tokens: Option<usize>) -> Capacity {
    let tokens = tokens.unwrap_or(if device.is_gpu() { 32_768 } else { 2_048 }).max(length);
    let length = length.min(config.max_position_embeddings);
    Capacity { tokens, sequences: (tokens / 4).max(1), length, encoder_labels: 0 }
}
