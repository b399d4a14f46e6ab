//! `inspect`: what a folder of shards holds, in words.

use std::path::PathBuf;

use serde_json::json;

use crate::data::batch::Builder;
use crate::data::corpus::{Corpus, MemoryCorpus, Tokens};
use crate::data::masking::MaskRules;
use crate::data::order::{Order, Part};
use crate::data::picture::{LEGEND, picture};
use crate::data::shard::{Facts, ShardSet};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};

use super::{Global, grouped, say};

/// Show what a folder of shards holds.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Folder that tokenize wrote
    dir: PathBuf,
    /// Texts to show
    #[arg(long, default_value_t = 3, value_name = "N")]
    samples: u64,
    /// Show this text, numbered from 0
    #[arg(long, value_name = "NUMBER", conflicts_with = "samples")]
    text: Option<u64>,
    /// Draw the masks that --seed gives the shown texts: encoder, and some rows of the enhanced decoder
    #[arg(long)]
    masks: bool,
}

/// Fractions of a text that the published recipe hides from encoder and decoder.
const HIDDEN: (f64, f64) = (0.3, 0.5);

/// Runs the subcommand.
pub fn run(args: Arguments, global: &Global) -> Result<()> {
    let set = ShardSet::open(&args.dir)?;
    let tokenizer = Tokenizer::load(&args.dir)?;
    if args.text.is_none() {
        say(&describe(set.facts()))?;
    }
    let mut samples = Vec::new();
    for i in chosen(&args, set.len()) {
        let (line, value) = sample(&set, &tokenizer, i, args.text.is_some() || global.verbose)?;
        say(&line)?;
        if args.masks {
            say(&masks(&set, i, global.seed.unwrap_or(42))?)?;
        }
        samples.push(value);
    }
    let facts = serde_json::to_value(set.facts())
        .map_err(|e| Error::refused(format!("the facts cannot be written: {e}")).remedy("report this"))?;
    global.write_json(&json!({ "facts": facts, "samples": samples }))
}

/// The masks of text `i`, drawn with characters: it is made the only text of a corpus, and so the first sample.
fn masks(set: &ShardSet, i: u64, seed: u64) -> Result<String> {
    let (mut ids, mut word_start) = (Vec::new(), Vec::new());
    set.read(i, &mut ids, &mut word_start)?;
    let mut one = MemoryCorpus::default();
    one.push(Tokens { ids: &ids, word_start: &word_start });
    let vocabulary = set.facts().vocabulary();
    let rules = MaskRules::new(seed, vocabulary, HIDDEN.0, Some(HIDDEN.1))?;
    let batch = Builder::new(rules, Order::new(seed, 1, 0)?, Part::Train, ids.len()).build(&one, 0..1)?;
    // The first, the last and three between.
    let positions: Vec<usize> = (0..5).map(|k| k * ids.len().saturating_sub(1) / 4).collect();
    Ok(format!("{LEGEND}\n{}", picture(&batch, 0, &word_start, &vocabulary, &positions, 100)))
}

/// The texts to show: the one asked for, or some spread evenly.
fn chosen(args: &Arguments, len: u64) -> Vec<u64> {
    match args.text {
        Some(i) => vec![i],
        None => {
            let n = args.samples.min(len);
            (0..n).map(|k| (u128::from(k) * u128::from(len) / u128::from(n)) as u64).collect()
        }
    }
}

fn describe(facts: &Facts) -> String {
    let special = facts.special;
    let mean = facts.tokens as f64 / facts.sequences.max(1) as f64;
    let rows = [
        ("sequences", grouped(facts.sequences)),
        ("tokens", format!("{} ({mean:.1} a sequence, longest {})", grouped(facts.tokens), facts.longest)),
        ("shards", format!("{} ({} bytes a token)", grouped(facts.shards as u64), facts.token_width)),
        ("packing", format!("{:?}, at most {} tokens", facts.packing, facts.max_length).to_lowercase()),
        ("titles", format!("{:?}", facts.title_sep).to_lowercase()),
        ("ids", if facts.has_ids { "yes" } else { "no" }.to_string()),
        ("vocabulary", grouped(u64::from(facts.vocab_size))),
        (
            "special",
            format!(
                "[CLS] {}, [SEP] {}, [MASK] {}, [PAD] {}, [UNK] {}",
                special.cls, special.sep, special.mask, special.pad, special.unk
            ),
        ),
        ("tokenizer", facts.fingerprint.clone()),
        (
            "read",
            format!(
                "{} documents: {} empty, {} truncated, {} duplicates, {} unknown tokens",
                grouped(facts.counts.documents),
                grouped(facts.counts.empty),
                grouped(facts.counts.truncated),
                grouped(facts.counts.duplicates),
                grouped(facts.counts.unknown)
            ),
        ),
    ];
    rows.iter().map(|(name, value)| format!("{name:<12}{value}")).collect::<Vec<_>>().join("\n")
}

/// One text: its number, id and tokens, words apart and pieces of a word joined by `·`.
fn sample(set: &ShardSet, tokenizer: &Tokenizer, i: u64, whole: bool) -> Result<(String, serde_json::Value)> {
    let text = set.text(i)?;
    let id = set.id(i)?;
    let shown = if whole { text.len() } else { text.len().min(48) };
    let mut line = format!("\n#{i}  {}  {} tokens\n", id.unwrap_or("(no id)"), text.len());
    let mut tokens = Vec::new();
    for k in 0..text.len() {
        tokens.push(text.token(k));
        if k < shown {
            line.push(if text.is_word_start(k) { ' ' } else { '·' });
            let spelling = tokenizer.spelling(text.token(k));
            line.push_str(spelling.strip_prefix("##").filter(|_| !text.is_word_start(k)).unwrap_or(&spelling));
        }
    }
    if shown < text.len() {
        line.push_str(" …");
    }
    Ok((line, json!({ "number": i, "id": id, "tokens": tokens })))
}
