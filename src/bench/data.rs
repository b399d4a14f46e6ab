//! Speed of the data side: batches from shards; masks and batches of texts in memory (goal G3); and what fine-tuning does with its
//! texts once and at every step.

mod pairs;

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};

use super::step::Minimised;
use super::{Report, Times};
use crate::data::batch::Builder;
use crate::data::corpus::{Corpus, MemoryCorpus, Tokens};
use crate::data::masking::{MaskRules, MaskedText, Masker, TextVisibility, Vocabulary, pool_rows, row_words};
use crate::data::order::{BatchSize, Batching, Order, Part, Plan};
use crate::data::shard::ShardSet;
use crate::error::{Error, Result};
use crate::rng::{Site, Stream};
use crate::train::step::Objective;

/// What to time, and how often.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Shards to build batches from; without them texts in memory are masked.
    pub data: Option<PathBuf>,
    /// Times the data side of fine-tuning, on a set of so many texts.
    pub pairs: Option<u32>,
    /// What the masks are for.
    pub objective: Objective,
    /// Its name.
    pub objective_name: &'static str,
    /// Texts of a batch, at least 1.
    pub batch_size: u64,
    /// Batches that are timed, at least 1.
    pub batches: u64,
    /// Longer texts are cut; none: as long as the shards' texts may be.
    pub max_length: Option<usize>,
}

impl Settings {
    /// The objective of pre-training that masks are made for.
    ///
    /// # Errors
    /// One that has no masks.
    pub fn masks(objective: Minimised) -> Result<(Objective, &'static str)> {
        let refused = || Error::usage("--objective contrastive has no masks").remedy("use --pairs for fine-tuning");
        objective.pretraining().ok_or_else(refused)
    }

    fn rules(&self, vocabulary: Vocabulary) -> Result<MaskRules> {
        let rules = MaskRules::new(7, vocabulary, 0.3, self.objective.has_decoder().then_some(0.5))?;
        Ok(if self.objective == Objective::DupMae { rules.with_bags() } else { rules })
    }
}

/// Times what the settings ask for.
///
/// # Errors
/// Shards that are refused, threads that cannot be started, or a failed write.
pub fn run(settings: &Settings, report: &Report<'_>) -> Result<()> {
    if let Some(dir) = &settings.data {
        from_shards(settings, dir, report)?;
    } else if settings.pairs.is_none() {
        in_one_thread(|| in_memory(settings, report))?;
    }
    settings.pairs.map_or(Ok(()), |texts| pairs::run(texts, report))
}

/// Runs work in a pool of one thread.
fn in_one_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    in_threads(1, work)
}

fn in_threads<T: Send>(threads: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.map_err(|e| Error::refused(format!("cannot start {threads} threads: {e}")).remedy("use fewer --threads"))?
        .install(work)
}

/// Batches of the shards' texts in training's order, on one thread and on all.
fn from_shards(settings: &Settings, dir: &Path, report: &Report<'_>) -> Result<()> {
    let set = ShardSet::open(dir)?;
    if set.is_empty() {
        return Err(Error::refused("holds no texts").path(dir).remedy("tokenize something first"));
    }
    let (rules, most) = (settings.rules(set.facts().vocabulary())?, set.facts().max_length as usize);
    let length = settings.max_length.unwrap_or(most);
    let builder = Builder::new(rules, Order::new(7, set.len(), 0)?, Part::Train, length);
    report.say(&format!("{} texts, {} tokens in {}\n", set.len(), set.tokens(), dir.display()))?;
    report.head(&["batches from shards", "median ms", "p10", "p90", "batches/s", "tokens/s", "tokens/s a core"])?;
    let all = rayon::current_num_threads();
    let counts = if all > 1 { vec![1, all] } else { vec![1] };
    for threads in counts {
        let (times, tokens) = in_threads(threads, || batches(settings, &builder, &set))?;
        let (ms, each) = (times.median(), tokens as f64 / settings.batches as f64);
        let (per_s, name) = (each / ms * 1e3, settings.objective_name);
        let what =
            format!("{name}, {} texts, {threads} thread{}", settings.batch_size, if threads > 1 { "s" } else { "" });
        let mut line = json!({
            "case": format!("data {what}"), "objective": name, "data": dir, "batch_size": settings.batch_size, "max_length": length,
            "tokens": tokens, "batches_per_s": 1e3 / ms, "tokens_per_s": per_s, "tokens_per_s_per_core": per_s / threads as f64,
            "threads": threads,
        });
        times.describe(&mut line);
        let shown = [0.5, 0.1, 0.9].map(|part| format!("{:.3}", times.at(part)));
        let rates = [1e3 / ms, per_s, per_s / threads as f64].map(|rate| format!("{rate:.0}"));
        report.case(&[&[what][..], &shown, &rates].concat(), line)?;
    }
    Ok(())
}

/// The times of all batches, and their tokens. One batch is built before, so that files are mapped and memory is there.
fn batches(settings: &Settings, builder: &Builder, corpus: &dyn Corpus) -> Result<(Times, usize)> {
    let size = settings.batch_size;
    let (mut times, mut tokens) = (Vec::new(), 0);
    for step in 0..=settings.batches {
        let start = Instant::now();
        let batch = black_box(builder.build(corpus, step * size..(step + 1) * size)?);
        if step > 0 {
            times.push(start.elapsed().as_secs_f64() * 1e3);
            tokens += batch.tokens();
        }
    }
    Ok((Times::new(times), tokens))
}

/// BERT's.
const VOCABULARY: Vocabulary = Vocabulary { size: 30_522, cls: 101, sep: 102, pad: 0, mask: 103, unk: Some(100) };
/// Texts in memory.
const TEXTS: u64 = 512;

/// Texts of `length` tokens, one in seven of which continues a word: about 437 words in 512 tokens, as measured on English package
/// descriptions under BERT's vocabulary. More words are more draws, so fewer continuations would be the harder case.
fn corpus(length: usize) -> MemoryCorpus {
    let mut corpus = MemoryCorpus::default();
    for text in 0..TEXTS {
        let mut random = Stream::new(1, 0, Site::Init, text);
        let mut ids: Vec<u32> = (0..length).map(|_| 1000 + random.below(29_000)).collect();
        let mut word_start: Vec<bool> = (0..length).map(|_| random.below(7) != 0).collect();
        (ids[0], ids[length - 1]) = (VOCABULARY.cls, VOCABULARY.sep);
        (word_start[0], word_start[1], word_start[length - 1]) = (true, true, true);
        corpus.push(Tokens { ids: &ids, word_start: &word_start });
    }
    corpus
}

/// Times of masking each text of `corpus` several times over.
fn mask_times(settings: &Settings, corpus: &MemoryCorpus, rounds: u64, length: usize) -> Result<Times> {
    let rules = settings.rules(VOCABULARY)?;
    let mut masker = Masker::new(&rules);
    let (mut ids, mut starts, mut labels) = (Vec::new(), Vec::new(), Vec::new());
    let mut encoder_ids = vec![0; length];
    let mut pool = vec![0; pool_rows(length) * row_words(length)];
    let mut row = vec![0; length];
    let mut times = Vec::new();
    for sample in 0..rounds * TEXTS {
        corpus.read(sample % TEXTS, &mut ids, &mut starts)?;
        let visibility = rules.has_decoder().then(|| TextVisibility { pool: &mut pool, row: &mut row });
        let out = MaskedText { encoder_ids: &mut encoder_ids, labels: &mut labels, visibility };
        let start = Instant::now();
        masker.mask(black_box(Tokens { ids: &ids, word_start: &starts }), 0, sample, out);
        times.push(start.elapsed().as_secs_f64() * 1e3);
        black_box((&encoder_ids, &pool, &row, &labels));
    }
    Ok(Times::new(times))
}

/// Time to count the steps of batches by tokens.
fn plan_time(corpus: &MemoryCorpus, samples: u64) -> Result<f64> {
    let batching = Batching { size: BatchSize::Tokens(8192), accumulation: 1, ranks: 1, max_length: 512 };
    let plan = Plan::new(Order::new(7, TEXTS, 12)?, Part::Train, batching, samples)?;
    let start = Instant::now();
    black_box(plan.steps(corpus, 0)?);
    Ok(start.elapsed().as_secs_f64())
}

/// Masks and batches of texts in memory.
fn in_memory(settings: &Settings, report: &Report<'_>) -> Result<()> {
    let name = settings.objective_name;
    report.head(&["texts in memory, one core", "median ms", "p10", "p90", "tokens/s"])?;
    let told = |what: String, times: &Times, tokens: f64, more: Value| {
        let per_s = tokens / times.median() * 1e3;
        let mut line =
            json!({ "case": format!("data {what}"), "objective": name, "tokens_per_s": per_s, "threads": 1 });
        if let (Value::Object(line), Value::Object(more)) = (&mut line, more) {
            line.extend(more);
        }
        times.describe(&mut line);
        let shown = [0.5, 0.1, 0.9].map(|part| format!("{:.3}", times.at(part)));
        report.case(&[&[what][..], &shown, &[format!("{per_s:.0}")]].concat(), line)
    };
    for length in [512, 128] {
        let corpus = corpus(length);
        let rounds = settings.batches.div_ceil(8);
        let times = mask_times(settings, &corpus, rounds, length)?;
        told(format!("{name} masks of {length} tokens"), &times, length as f64, json!({ "tokens": length }))?;
        let builder = Builder::new(settings.rules(VOCABULARY)?, Order::new(7, TEXTS, 0)?, Part::Train, length);
        let (times, tokens) = batches(settings, &builder, &corpus)?;
        let (what, ms) = (format!("{name} batch of {} x {length} tokens", settings.batch_size), times.median());
        let more = json!({ "batch_size": settings.batch_size, "tokens": tokens, "batches_per_s": 1e3 / ms });
        told(what, &times, tokens as f64 / settings.batches as f64, more)?;
    }
    let samples = 200 * TEXTS;
    let ms = plan_time(&corpus(128), samples)? * 1e3;
    let more = json!({ "samples": samples, "ns_per_sample": ms * 1e6 / samples as f64 });
    told(format!("plan of {samples} texts by tokens"), &Times::new(vec![ms]), 128.0 * samples as f64, more)
}
