//! What is timed: the models and batches of the PyTorch baselines, at equal work.
//!
//! `full512`: 64 texts of 512 tokens. `passages`: 32,768 tokens in texts of the lengths in `passages.txt`. `minilm` has a sixteenth of
//! that, for CPUs, and `mini` next to nothing, to try the code. 30 % of a text's tokens are masked, a position of the decoder sees 50 %.
//! `finetune`: 64 queries with 8 passages each, of the lengths in `finetune.txt`; `minilm` has 8 queries with 4, `mini` 4 with 4.
//! Every batch holds the same multiset of lengths in a new order with new tokens.

use clap::ValueEnum;
use retromae_engine::data::batch::{Builder, PretrainBatch};
use retromae_engine::data::corpus::{Corpus, MemoryCorpus, Tokens};
use retromae_engine::data::masking::{MaskRules, Vocabulary};
use retromae_engine::data::order::{Order, Part};
use retromae_engine::graph::Capacity;
use retromae_engine::model::config::BertConfig;
use retromae_engine::model::presets::preset;
use retromae_engine::rng::{Site, Stream};
use retromae_engine::{Error, Result};

/// Files of lengths, under their names.
const PASSAGES: (&str, &str) = ("passages.txt", include_str!("passages.txt"));
const FINETUNE: (&str, &str) = ("finetune.txt", include_str!("finetune.txt"));
/// Ids below this one are special.
const FIRST_WORD: u32 = 5;

/// Size of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Model {
    /// BERT-base.
    Base,
    /// BERT-small, on the batches of `base`.
    Small,
    /// MiniLM: 6 layers, 384 wide, vocabulary 30,522.
    Minilm,
    /// 2 layers, 128 wide, vocabulary 1,000.
    Mini,
}

impl Model {
    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Model::Base => "base",
            Model::Small => "small",
            Model::Minilm => "minilm",
            Model::Mini => "mini",
        }
    }

    /// Its configuration, dropout 0.1.
    pub fn config(self) -> Result<BertConfig> {
        match self {
            Model::Base => preset("bert-base"),
            Model::Small => preset("bert-small"),
            Model::Minilm => preset("minilm-l6"),
            Model::Mini => Ok(BertConfig {
                vocab_size: 1000,
                num_hidden_layers: 2,
                hidden_size: 128,
                num_attention_heads: 2,
                intermediate_size: 256,
                max_position_embeddings: 64,
                ..preset("bert-mini")?
            }),
        }
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
    pub fn lengths(self, model: Model) -> Result<[Vec<usize>; 2]> {
        // `small` has the batches of `base`.
        let size = if model == Model::Small { Model::Base } else { model };
        let texts = match (self, size) {
            (Workload::Full512, Model::Minilm) => vec![128; 16],
            (Workload::Full512, Model::Mini) => vec![64; 4],
            (Workload::Full512, _) => vec![512; 64],
            (Workload::Passages, _) => listed(PASSAGES, size.name())?,
            (Workload::Finetune, _) => {
                let side = |name: &str| listed(FINETUNE, &format!("{} {name}", size.name()));
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
fn vocabulary(model: Model) -> Result<Vocabulary> {
    let size = model.config()?.vocab_size as u32;
    Ok(Vocabulary { size, cls: 1, sep: 2, pad: 0, mask: 3, unk: Some(4) })
}

/// Texts of these lengths, of random words; others under each `seed` and in each batch.
pub fn texts(model: Model, seed: u64, batch: u64, lengths: &[usize]) -> Result<MemoryCorpus> {
    let vocabulary = vocabulary(model)?;
    let mut corpus = MemoryCorpus::default();
    for (text, &length) in lengths.iter().enumerate() {
        let mut random = Stream::new(seed, batch, Site::Init, text as u64);
        let words = (0..length).map(|_| FIRST_WORD + random.below(vocabulary.size - FIRST_WORD));
        let mut ids: Vec<u32> = words.collect();
        (ids[0], ids[length - 1]) = (vocabulary.cls, vocabulary.sep);
        corpus.push(Tokens { ids: &ids, word_start: &vec![true; length] });
    }
    Ok(corpus)
}

/// `count` batches of a workload of pre-training, and the capacity that holds each of them.
pub fn batches(workload: Workload, model: Model, count: u64) -> Result<(Vec<PretrainBatch>, Capacity)> {
    let [_, lengths] = workload.lengths(model)?;
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let batches = (0..count)
        .map(|batch| {
            let corpus = texts(model, 1, batch, &lengths)?;
            let rules = MaskRules::new(batch, vocabulary(model)?, 0.3, Some(0.5))?;
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
