//! Speed of turning tokens into embeddings: texts of the lengths of a workload's passages, sorted by length and packed as `encode` does.

use std::path::Path;
use std::time::Instant;

use serde_json::json;

use super::workload::{Model, Workload, texts};
use super::{Report, Times};
use crate::data::corpus::Corpus;
use crate::data::pairs::texts::{TextBatch, by_length};
use crate::error::{Error, Result};
use crate::graph::biencoder::Shape;
use crate::model::towers::Towers;
use crate::ops::pool::Pooling;
use crate::retrieve::embedder::{Embedder, Kind, capacity};
use crate::retrieve::representation::Representation;
use crate::train::target::Target;

/// What is embedded with.
#[derive(Clone, Debug)]
pub enum Source {
    /// A model's folder, and the lengths of this model's batches.
    Folder(String, Box<Path>, Model),
    /// Random weights.
    Random(Model),
}

/// What to time, and how often.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The model.
    pub source: Source,
    /// Texts, at least 1; none: as many as the workload `passages` has.
    pub texts: Option<usize>,
    /// Times that all of them are embedded, at least 1.
    pub repeats: u64,
}

/// Embeds the texts several times over.
///
/// # Errors
/// A folder that is no model, a model whose sizes the kernels do not have, an embedding that is not finite, a failure of the device, or a
/// failed write.
pub fn run(settings: &Settings, target: &Target, report: &Report<'_>) -> Result<()> {
    let on = (target.device, target.storage);
    let lengths_of = |model: &Model, most: usize| -> Result<Vec<usize>> {
        let [_, one] = Workload::Passages.lengths(model)?;
        let count = settings.texts.unwrap_or(one.len());
        Ok(one.into_iter().cycle().take(count).map(|length| length.min(most)).collect())
    };
    let longest = |lengths: &[usize]| lengths.iter().copied().max().unwrap_or(2);
    let (name, config, mut embedder, lengths) = match &settings.source {
        Source::Random(model) => {
            let (config, shape) =
                (model.config().clone(), Shape { pooling: Pooling::Cls, projection: None, normalize: false });
            let lengths = lengths_of(model, config.max_position_embeddings)?;
            let room = capacity(target.device, &config, longest(&lengths), None);
            (model.name().to_string(), config.clone(), Embedder::random(on, &config, shape, room)?, lengths)
        }
        Source::Folder(name, path, like) => {
            let towers = Towers::open(path)?;
            let (said, config) = (&towers.settings, towers.config.clone());
            let shape = Shape {
                pooling: said.pooling.unwrap_or_default(),
                projection: towers.projection,
                normalize: said.normalize.unwrap_or(false),
            };
            let lengths = lengths_of(like, config.max_position_embeddings)?;
            let room = capacity(target.device, &config, longest(&lengths), None);
            let kept = (Representation::Cls, 0);
            (name.clone(), config, Embedder::new(on, &towers, shape, Kind::Passage, room, kept)?, lengths)
        }
    };
    let batches = pack(config.vocab_size, &lengths, &embedder)?;
    let tokens: usize = lengths.iter().sum();
    report.say(&format!("{name} on {}, {}\n", target.words, target.precision()))?;
    report.head(&["encode", "median ms", "p10", "p90", "texts/s", "tokens/s"])?;
    let mut round = || {
        let start = Instant::now();
        for batch in &batches {
            let embedded = embedder.embed(batch)?;
            if !embedded.dense.iter().all(|x| x.is_finite()) {
                return Err(Error::device("an embedding is not finite").remedy("check the model with `verify`"));
            }
        }
        Ok(start.elapsed().as_secs_f64() * 1e3)
    };
    // The first time a GPU's work is queued, the second it is recorded.
    (0..2).try_for_each(|_| round().map(|_| ()))?;
    let times = Times::new((0..settings.repeats).map(|_| round()).collect::<Result<_>>()?);
    let per_second = |count: usize| count as f64 / times.median() * 1e3;
    let mut line = json!({
        "case": format!("encode {name} {} texts {}", lengths.len(), target.precision()), "model": name, "texts": lengths.len(),
        "tokens": tokens, "batches": batches.len(), "longest": longest(&lengths), "texts_per_s": per_second(lengths.len()),
        "tokens_per_s": per_second(tokens),
    });
    times.describe(&mut line);
    let shown = [0.5, 0.1, 0.9].map(|part| format!("{:.2}", times.at(part)));
    let rates = [lengths.len(), tokens].map(|count| format!("{:.0}", per_second(count)));
    report.case(&[&[format!("{} texts, {tokens} tokens", lengths.len())][..], &shown, &rates].concat(), line)
}

/// Random texts of these lengths in batches of like lengths.
fn pack(words: usize, lengths: &[usize], embedder: &Embedder) -> Result<Vec<TextBatch>> {
    let (corpus, room) = (texts(words, 1, 0, lengths), embedder.capacity());
    let (mut ids, mut starts) = (Vec::new(), Vec::new());
    let mut pack = |members: Vec<usize>| {
        let mut batch = TextBatch { cu_seqlens: vec![0], ..TextBatch::default() };
        for i in members {
            corpus.read(i as u64, &mut ids, &mut starts)?;
            batch.ids.extend(&ids);
            batch.cu_seqlens.push(batch.ids.len() as u32);
            batch.samples.push(i as u64);
        }
        batch.types = vec![0; batch.ids.len()];
        Ok(batch)
    };
    by_length(lengths, (room.sequences, room.tokens)).into_iter().map(&mut pack).collect()
}
