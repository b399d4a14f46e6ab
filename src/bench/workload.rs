//! What is timed: the models and batches of the PyTorch baselines, at equal work.
//!
//! `full512`: 64 texts of 512 tokens. `passages`: 32,768 tokens in texts of the lengths in `passages.txt`. `minilm` has a sixteenth of
//! that, for CPUs, and `mini` next to nothing, to try the code. 30 % of a text's tokens are masked, a position of the decoder sees 50 %.
//! `finetune`: 64 queries with 8 passages each, of the lengths in `finetune.txt`; `minilm` has 8 queries with 4, `mini` 4 with 4.
//! Every batch holds the same multiset of lengths in a new order with new tokens.

use clap::ValueEnum;

use crate::data::batch::{Builder, PretrainBatch};
use crate::data::corpus::{Corpus, MemoryCorpus, Tokens};
use crate::data::masking::{MaskRules, Vocabulary};
use crate::data::order::{Order, Part};
use crate::error::{Error, Result};
use crate::graph::Capacity;
use crate::model::config::BertConfig;
use crate::model::presets::preset;
use crate::rng::{Site, Stream};
use crate::train::step::Objective;

/// Files of lengths, under their names.
const PASSAGES: (&str, &str) = ("passages.txt", include_str!("passages.txt"));
const FINETUNE: (&str, &str) = ("finetune.txt", include_str!("finetune.txt"));
/// Ids below this one are special.
const FIRST_WORD: u32 = 5;

/// A model by the name that measurements give it, and its configuration, dropout 0.1.
#[derive(Clone, Debug)]
pub struct Model {
    name: String,
    config: BertConfig,
}

impl Model {
    /// `base`, `small`, `minilm`, `mini` (2 layers, 128 wide, vocabulary 1,000) or the name of a preset.
    ///
    /// # Errors
    /// An unknown name, with the known ones.
    pub fn named(name: &str) -> Result<Model> {
        let (name, known) = match name {
            "base" | "bert-base" | "bert-base-uncased" => ("base", "bert-base"),
            "small" | "bert-small" => ("small", "bert-small"),
            "minilm" | "minilm-l6" => ("minilm", "minilm-l6"),
            "mini" => ("mini", "bert-mini"),
            other => (other, other),
        };
        let config = preset(known).map_err(|e| {
            Error::usage(e.cause().to_string()).remedy(format!("{}, base, small, minilm or mini", e.advice()))
        })?;
        let config = match name {
            "mini" => BertConfig {
                vocab_size: 1000,
                num_hidden_layers: 2,
                hidden_size: 128,
                num_attention_heads: 2,
                intermediate_size: 256,
                max_position_embeddings: 64,
                ..config
            },
            _ => config,
        };
        Ok(Model { name: name.to_string(), config })
    }

    /// Its name in results.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its configuration.
    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// Whether its sizes are for trying the code only.
    pub fn tiny(&self) -> bool {
        self.name == "mini"
    }

    /// The name of its batches: all but the two smallest have those of `base`.
    fn batches(&self) -> &str {
        if matches!(self.name(), "minilm" | "mini") { self.name() } else { "base" }
    }
}

/// Which texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// Texts of one length: no padding in any layout.
    Full512,
    /// Texts of many lengths.
    Passages,
    /// Queries, and passages of many lengths.
    Finetune,
}

impl Workload {
    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Workload::Full512 => "full512",
            Workload::Passages => "passages",
            Workload::Finetune => "finetune",
        }
    }

    /// Lengths of the queries of a batch, none in pre-training, and of its texts.
    ///
    /// # Errors
    /// Never, unless the list of lengths is broken.
    pub fn lengths(self, model: &Model) -> Result<[Vec<usize>; 2]> {
        let size = model.batches();
        let texts = match (self, size) {
            (Workload::Full512, "minilm") => vec![128; 16],
            (Workload::Full512, "mini") => vec![64; 4],
            (Workload::Full512, _) => vec![512; 64],
            (Workload::Passages, _) => listed(PASSAGES, size)?,
            (Workload::Finetune, _) => {
                let side = |name: &str| listed(FINETUNE, &format!("{size} {name}"));
                return Ok([side("queries")?, side("passages")?]);
            }
        };
        Ok([Vec::new(), texts])
    }
}

/// The lengths in the line of a file that begins with `name`.
fn listed((file, contents): (&str, &str), name: &str) -> Result<Vec<usize>> {
    let line = contents.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let groups = line.unwrap_or_default().split_whitespace().map(|group| {
        let (length, count) = group.split_once('x').unwrap_or((group, "1"));
        Some(vec![length.parse().ok()?; count.parse().ok()?])
    });
    let lengths: Option<Vec<Vec<usize>>> = groups.collect();
    match lengths.map(|groups| groups.concat()).filter(|lengths| !lengths.is_empty()) {
        Some(lengths) => Ok(lengths),
        None => Err(Error::refused(format!("{file} has no lengths for {name}")).remedy("restore the file")),
    }
}

/// The special tokens, and the size of the model's vocabulary.
fn vocabulary(words: usize) -> Vocabulary {
    Vocabulary { size: words as u32, cls: 1, sep: 2, pad: 0, mask: 3, unk: Some(4) }
}

/// Texts of these lengths, of random ones of so many words; others under each `seed` and in each batch.
pub fn texts(words: usize, seed: u64, batch: u64, lengths: &[usize]) -> MemoryCorpus {
    let vocabulary = vocabulary(words);
    let mut corpus = MemoryCorpus::default();
    for (text, &length) in lengths.iter().enumerate() {
        let mut random = Stream::new(seed, batch, Site::Init, text as u64);
        let words = (0..length).map(|_| FIRST_WORD + random.below(vocabulary.size - FIRST_WORD));
        let mut ids: Vec<u32> = words.collect();
        (ids[0], ids[length - 1]) = (vocabulary.cls, vocabulary.sep);
        corpus.push(Tokens { ids: &ids, word_start: &vec![true; length] });
    }
    corpus
}

/// `count` batches of a workload of pre-training, and the capacity that holds each of them.
///
/// # Errors
/// A model whose vocabulary has no words.
pub fn batches(
    workload: Workload,
    model: &Model,
    objective: Objective,
    count: u64,
) -> Result<(Vec<PretrainBatch>, Capacity)> {
    let [_, lengths] = workload.lengths(model)?;
    let (words, longest) = (model.config().vocab_size, lengths.iter().copied().max().unwrap_or(0));
    let batches = (0..count)
        .map(|batch| {
            let corpus = texts(words, 1, batch, &lengths);
            let rules = MaskRules::new(batch, vocabulary(words), 0.3, objective.has_decoder().then_some(0.5))?;
            let rules = if objective == Objective::DupMae { rules.with_bags() } else { rules };
            let order = Order::new(batch, corpus.texts(), 0)?;
            Builder::new(rules, order, Part::Train, longest).build(&corpus, 0..corpus.texts())
        })
        .collect::<Result<Vec<_>>>()?;
    let capacity = Capacity {
        tokens: lengths.iter().sum(),
        sequences: lengths.len(),
        length: longest,
        encoder_labels: batches.iter().map(|b| b.encoder_label_ids.len()).max().unwrap_or(0),
    };
    Ok((batches, capacity))
}
