//! The work of a training step: for every kernel, and so for every stage, the FLOP that are required, the bytes that must move at
//! least, and the launches. All rates of `bench step`, and the floors of its breakdown, come from here.
//!
//! Two counts of FLOP, for two questions:
//!
//! - [`Work::flop`]: what the step of this engine requires. Only real tokens and rows with a label; the last layer on the rows that are
//!   needed of it, the decoder's queries by parts. The backward of a product is two products; that of attention is 2.5 times its forward,
//!   since no implementation keeps the scores. The padding of the vocabulary to a multiple of 64 is counted (0.02 % of BERT's). A kernel's
//!   floor is `max(FLOP / product rate, bytes / copy rate)`.
//! - [`model`]: what a padded textbook implementation does, three times the forward, the same number for every implementation. TFLOP/s
//!   and MFU beside PyTorch's are relative to it.
//!
//! Formulas of single ops are in `list`, each with what it reads and writes; `graph` lists the ops of a step. Launches and sizes of
//! products are those that work is laid out for ([`crate::graph::extent`]); FLOP and bytes are of the rows in use. `tests/work.rs`
//! compares both with what a step queues, and this count with the other to the last FLOP.

mod graph;
mod list;
pub mod model;

use std::collections::BTreeSet;

use crate::data::batch::PretrainBatch;
use crate::data::pairs::batch::ContrastiveBatch;
use crate::device::{DType, Device, Product};
use crate::graph::extent::Bounds;
use crate::graph::{Capacity, Dims, head_chunks, mlm};
use crate::model::config::BertConfig;
use crate::ops::attention::hopper::{self, Whole};
use crate::train::step::Objective;
pub(super) use list::{Attention, Input, List};

/// The launches of one kernel, or the products of one kind, in one stage and phase of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// [`crate::graph::stages`].
    pub phase: &'static str,
    /// The same.
    pub stage: &'static str,
    /// Its name in the source; [`product_name`] of a product; `fill`.
    pub name: String,
    /// Launches.
    pub launches: usize,
    /// Required floating-point operations of all of them.
    pub flop: u64,
    /// Bytes that all of them must move at least.
    pub bytes: u64,
    /// Sizes of the products as they are laid out.
    pub products: Vec<(Product, [usize; 3])>,
}

/// The name of products of this kind.
pub fn product_name(product: Product) -> String {
    format!("product {product:?}")
}

/// The work of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    /// Kernel by kernel, in the order of their first launch.
    pub kernels: Vec<Kernel>,
}

impl Work {
    /// Required floating-point operations.
    pub fn flop(&self) -> u64 {
        self.kernels.iter().map(|k| k.flop).sum()
    }

    /// Bytes that must move at least.
    pub fn bytes(&self) -> u64 {
        self.kernels.iter().map(|k| k.bytes).sum()
    }

    /// Launches.
    pub fn launches(&self) -> usize {
        self.kernels.iter().map(|k| k.launches).sum()
    }

    /// The kernels of a stage, of all phases.
    pub fn stage(&self, stage: &str) -> Work {
        Work { kernels: self.kernels.iter().filter(|k| k.stage == stage).cloned().collect() }
    }

    /// Launches and sizes as laid out, FLOP and bytes as required.
    fn of(sizes: Sizes, rows: &Rows, laid_out: &Rows, add: impl Fn(&mut List, &Rows)) -> Work {
        let [required, mut all] = [rows, laid_out].map(|rows| {
            let mut list = List::new(sizes);
            add(&mut list, rows);
            list.kernels
        });
        for kernel in &mut all {
            let key = |k: &Kernel| (k.phase, k.stage, k.name.clone());
            let own = required.iter().find(|k| key(k) == key(kernel));
            (kernel.flop, kernel.bytes) = own.map_or((0, 0), |k| (k.flop, k.bytes));
        }
        Work { kernels: all }
    }
}

/// What a model and a device are to the formulas.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    dims: Dims,
    layers: usize,
    storage: DType,
    parameters: usize,
    dropout: bool,
    device: Device,
    /// Keys of the longest sequence that work is laid out for.
    longest: usize,
}

impl Sizes {
    fn new((device, storage): (Device, DType), config: &BertConfig, parameters: usize, longest: usize) -> Self {
        Sizes {
            dims: Dims::new(config),
            layers: config.num_hidden_layers,
            storage,
            parameters,
            dropout: config.hidden_dropout_prob > 0.0,
            device,
            longest,
        }
    }

    /// Whether attention has Hopper's kernels.
    fn warpgroups(&self) -> bool {
        match self.device {
            Device::Gpu(gpu) => hopper::has_kernels(gpu.facts(), self.storage, self.dims.head_size()),
            Device::Cpu => false,
        }
    }

    /// How the backward of attention is cut there, where it is one kernel.
    fn whole(&self) -> Option<Whole> {
        match self.device {
            Device::Gpu(gpu) => hopper::cut(gpu.facts(), self.storage, self.dims.head_size(), self.longest),
            Device::Cpu => None,
        }
    }

    fn multiprocessors(&self) -> u32 {
        match self.device {
            Device::Gpu(gpu) => gpu.facts().multiprocessors,
            Device::Cpu => 1,
        }
    }
}

/// The work of some ops by themselves, one launch each of what `add` lists.
pub(super) fn of_ops(
    (device, storage): (Device, DType),
    dims: Dims,
    longest: usize,
    add: impl FnOnce(&mut List),
) -> Work {
    let mut list = List::new(Sizes { dims, layers: 0, storage, parameters: 0, dropout: true, device, longest });
    add(&mut list);
    Work { kernels: list.kernels }
}

/// Pairs of a query and a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Pairs {
    /// Of all tokens: Σ L².
    all: u64,
    /// Of the rows needed of the last layer and all tokens of their text.
    needed: u64,
    /// Of the decoder's rows; pairs that masks hide count, since every row hides others.
    decoder: u64,
}

/// Rows that a step goes over.
#[derive(Clone, Debug, Default)]
struct Rows {
    tokens: usize,
    sequences: usize,
    /// Needed of the encoder's last layer.
    needed: usize,
    labels: usize,
    decoder_rows: usize,
    longest: usize,
    pairs: Pairs,
    /// Distinct words of the encoder's and of the decoder's tokens.
    words: [usize; 2],
    /// Rows of the LM head whose logits exist at a time.
    chunk: usize,
    /// Rows of DupMAE's chunks of whole sequences.
    bag_chunks: Vec<usize>,
    /// Queries and passages.
    sides: [usize; 2],
}

fn distinct(ids: &[u32]) -> usize {
    ids.iter().collect::<BTreeSet<_>>().len()
}

/// Σ over the texts of the rows among `rows` that are of the text, times its length.
fn pairs(rows: &[u32], cu_seqlens: &[u32]) -> u64 {
    let of = |text: &[u32]| {
        let [first, end] = [text[0], text[1]].map(|at| rows.partition_point(|&row| row < at));
        (end - first) as u64 * u64::from(text[1] - text[0])
    };
    cu_seqlens.windows(2).map(of).sum()
}

fn longest(cu_seqlens: &[u32]) -> usize {
    cu_seqlens.windows(2).map(|text| (text[1] - text[0]) as usize).max().unwrap_or(0)
}

/// A step of pre-training of `parameters` parameters on `batch`, laid out for `capacity` in the storage type of `on`.
pub fn pretraining(
    on: (Device, DType),
    config: &BertConfig,
    objective: Objective,
    (capacity, parameters): (Capacity, usize),
    batch: &PretrainBatch,
) -> Work {
    let bounds = Bounds::new(on.0, capacity, batch);
    let sizes = Sizes::new(on, config, parameters, bounds.length);
    let (cu, all) = (&batch.cu_seqlens, (0..batch.tokens() as u32).collect::<Vec<_>>());
    let decoder = batch.decoder.as_ref().filter(|_| objective.has_decoder());
    let needed: Vec<u32> = match objective {
        Objective::DupMae => all.clone(),
        Objective::Mlm => batch.encoder_label_rows.clone(),
        Objective::RetroMae => {
            let first = &cu[..batch.sequences()];
            batch.encoder_label_rows.iter().chain(first).copied().collect::<BTreeSet<_>>().into_iter().collect()
        }
    };
    let room = if objective == Objective::Mlm { capacity.encoder_labels } else { capacity.tokens };
    let usual = mlm::rows_at_a_time(on, sizes.dims.vocabulary, room);
    let bags = objective == Objective::DupMae;
    let chunk = if bags { head_chunks::rows(usual, capacity.length) } else { usual };
    let chunks = if bags { head_chunks::layout(cu, chunk) } else { Vec::new() };
    let rows = Rows {
        tokens: batch.tokens(),
        sequences: batch.sequences(),
        needed: needed.len(),
        labels: batch.encoder_label_ids.len(),
        decoder_rows: decoder.map_or(0, |d| d.label_ids.len()),
        longest: longest(cu),
        pairs: Pairs {
            all: pairs(&all, cu),
            needed: pairs(&needed, cu),
            decoder: decoder.map_or(0, |d| pairs(&d.label_rows, cu)),
        },
        words: [distinct(&batch.encoder_ids), decoder.map_or(0, |d| distinct(&d.ids))],
        chunk,
        bag_chunks: chunks.iter().map(|c| (cu[c.end] - cu[c.start]) as usize).collect(),
        sides: [0; 2],
    };
    let laid_out = Rows {
        tokens: bounds.tokens,
        sequences: bounds.sequences,
        needed: match objective {
            Objective::DupMae => bounds.tokens,
            // On the CPU bounds are exact, but for [CLS] rows that have a label or are not needed.
            _ if !on.0.is_gpu() => rows.needed,
            _ => bounds.needed(),
        },
        labels: bounds.labels,
        decoder_rows: if objective.has_decoder() { bounds.decoder_rows } else { 0 },
        longest: bounds.length,
        bag_chunks: if on.0.is_gpu() { vec![chunk; head_chunks::bound(chunks.len())] } else { rows.bag_chunks.clone() },
        ..rows.clone()
    };
    Work::of(sizes, &rows, &laid_out, |list, rows| list.pretraining(objective, rows))
}

/// A step of a bi-encoder whose towers take all of `batch` at once; `[CLS]` is the embedding, without projection and normalisation.
/// `capacity` is the tower's, `sides` the most queries and passages.
pub fn fine_tuning(
    on: (Device, DType),
    config: &BertConfig,
    (capacity, sides, parameters): (Capacity, [usize; 2], usize),
    batch: &ContrastiveBatch,
) -> Work {
    let both = batch.queries.joined(&batch.passages);
    let (cu, count) = (&both.cu_seqlens, both.sequences());
    let all: Vec<u32> = (0..both.tokens() as u32).collect();
    let rows = Rows {
        tokens: both.tokens(),
        sequences: count,
        needed: count,
        longest: longest(cu),
        pairs: Pairs { all: pairs(&all, cu), needed: pairs(&cu[..count], cu), decoder: 0 },
        words: [distinct(&both.ids), 0],
        sides: [batch.queries.sequences(), batch.passages.sequences()],
        ..Rows::default()
    };
    let bounds = Bounds {
        tokens: rows.tokens,
        sequences: count,
        labels: 0,
        decoder_rows: 0,
        length: rows.longest,
        head_chunks: 0,
    };
    let bounds = if on.0.is_gpu() { bounds.rounded(capacity) } else { bounds };
    let sides = if on.0.is_gpu() { sides } else { rows.sides };
    let laid_out =
        Rows { tokens: bounds.tokens, sequences: bounds.sequences, needed: bounds.sequences, sides, ..rows.clone() };
    let sizes = Sizes::new(on, config, parameters, bounds.length);
    Work::of(sizes, &rows, &laid_out, List::fine_tuning)
}
