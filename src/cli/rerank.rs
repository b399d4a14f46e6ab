//! `rerank`: the passages on a run's lists in the order of a cross-encoder's scores.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;
use sha2::{Digest, Sha256};

use super::progress::Progress;
use super::search::FormatArg;
use super::{Global, Hardware, grouped, say};
use crate::data::masking::LONGEST_TEXT;
use crate::data::pairs::batch::PairTexts;
use crate::data::pairs::files::{check_sets, same_tokenizer};
use crate::data::pairs::runs::{Run, RunFormat};
use crate::data::pairs::texts::TextRules;
use crate::data::shard::ShardSet;
use crate::data::source::Input;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Kind, Result};
use crate::files::{Disk, hex16};
use crate::graph::{Capacity, check_gpu};
use crate::model::parameters::Parameters;
use crate::model::reranker::Reranker;
use crate::model::{digest, hub};
use crate::retrieve::rerank::{Candidates, Outputs, Rerank};
use crate::retrieve::scorer::Scorer;
use crate::train::signals::{self, Stop};
use crate::train::target::Target;

/// Longest pair where neither the command line nor the model says one.
const USUAL_LENGTH: usize = 512;

/// Score the passages on a run's lists with a cross-encoder, and put them in that order
///
/// Interrupted in any way and given again with the same arguments, it goes on where it was and ends with the same bytes. Scores are the
/// raw logits. With --scores they are also written pair by pair, exactly, as `train --teacher-scores` reads them.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Cross-encoder: a folder, a file of weights, or a name of the Hugging Face hub
    #[arg(long, value_name = "DIR")]
    model: String,
    /// Lists to rerank: a TREC run, an MS MARCO ranking, Tevatron's, or pairs; - for standard input
    #[arg(long, value_name = "FILE", required_unless_present = "pairs", conflicts_with = "pairs")]
    run: Option<PathBuf>,
    /// Pairs of query and passage id to score, in place of a run; further columns are not read
    #[arg(long, value_name = "FILE")]
    pairs: Option<PathBuf>,
    /// Queries: a folder that tokenize wrote
    #[arg(long, value_name = "DIR")]
    queries: PathBuf,
    /// Passages: a folder that tokenize wrote
    #[arg(long, value_name = "DIR")]
    corpus: PathBuf,
    /// The reranked run; must not exist
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Write the scores here, too: query, passage, score, in the order of the run
    #[arg(long, value_name = "FILE")]
    scores: Option<PathBuf>,
    /// Take this many passages from the beginning of each list, and leave out the others [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    top_k: Option<u32>,
    /// Cut pairs to this many tokens [default: as the model was trained, at most 512]
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Cut queries to this many tokens [default: half of --max-length]
    #[arg(long, value_name = "N")]
    query_length: Option<usize>,
    /// Text put before every query
    #[arg(long, value_name = "TEXT", default_value = "")]
    query_prefix: String,
    /// Text put before every passage
    #[arg(long, value_name = "TEXT", default_value = "")]
    passage_prefix: String,
    /// Tokens that go through the model at once [default: 16384 on a GPU, 4096 on the CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    tokens_per_batch: Option<u32>,
    /// Format of the reranked run
    #[arg(long, value_enum, default_value = "trec")]
    format: FormatArg,
    /// Format of the lists, where the first line does not tell
    #[arg(long, value_enum, conflicts_with = "pairs")]
    run_format: Option<RunFormat>,
    /// Name of the run in TREC's format
    #[arg(long, value_name = "NAME", default_value = "retromae-engine", value_parser = tag)]
    tag: String,
    /// Replace earlier files of the outputs' names
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    hardware: Hardware,
}

/// A tag is one column.
fn tag(text: &str) -> std::result::Result<String, String> {
    let word = !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
    word.then(|| text.to_string()).ok_or_else(|| "a word without blanks".into())
}

/// Runs the subcommand.
pub fn run(args: Arguments, global: &Global) -> Result<()> {
    let outputs = Outputs {
        run: args.output.clone(),
        scores: args.scores.clone(),
        format: args.format.format(),
        tag: args.tag.clone(),
        overwrite: args.overwrite,
    };
    let target = Target::open(&args.hardware.device, args.hardware.precision)?;
    target.note.iter().for_each(|note| global.note(note));
    let path = hub::resolve(&args.model)?;
    let model = Reranker::open(&path)?;
    if target.device.is_gpu() {
        check_gpu(&model.config)?;
    }
    let data = Data::open(&args, &model, global)?;
    if let Some(note) = &model.note {
        global.note(&format!("warning: {note}"));
    }

    let gpu = target.device.is_gpu();
    let tokens = args.tokens_per_batch.map_or(if gpu { 16_384 } else { 4_096 }, |n| n as usize).max(data.max_length);
    let settings =
        settings(&args, &data, &target, tokens, digest::of(Some(&path), &model.config, digest::Parts::Inference)?);
    let disk = Disk::default();
    let mut rerank = Rerank::begin(&disk, &data.candidates, &outputs, settings)?;
    if rerank.scored() > 0 {
        global.note(&format!("{} pairs are scored already: going on after them", grouped(rerank.scored() as u64)));
    }
    let (started, before) = (Instant::now(), rerank.scored());
    if !rerank.is_scored() {
        let stop = Stop::install()?;
        // Packed texts have at least [CLS] and twice [SEP]; so many short ones that each has 8 tokens are room enough.
        let capacity = Capacity { tokens, sequences: (tokens / 8).max(1), length: data.max_length, encoder_labels: 0 };
        let mut scorer = Scorer::new(target.device, &model.config, capacity, target.storage)?;
        scorer.params().load(0, 0.0, |name, shape, out| model.read(name, shape, out))?;
        let total = data.candidates.len();
        let progress = Progress::start(Some(total as u64), global.quiet);
        let mut seen = 0u64;
        let scored = rerank.score(&data.texts, &mut scorer, if gpu { 4096 } else { 512 }, &mut |done, tokens| {
            seen += tokens as u64;
            progress.tell(done as u64, |seconds| {
                let pairs = (done - before) as f64 / seconds;
                format!("{} pairs, {pairs:.0} pairs/s, {:.0} tokens/s", grouped(done as u64), seen as f64 / seconds)
            });
            stop.requested().map_or(Ok(()), |signal| Err(stopped(signal, &args.output)))
        });
        progress.finish();
        scored?;
    }
    let seconds = started.elapsed().as_secs_f64();
    let done = rerank.write()?;
    say(&format!(
        "{}: {} queries, {} pairs",
        args.output.display(),
        grouped(done.queries as u64),
        grouped(done.pairs as u64)
    ))?;
    global.write_json(&json!({
        "output": args.output,
        "scores": args.scores,
        "queries": done.queries,
        "pairs": done.pairs,
        "resumed": done.resumed,
        "nudged": done.nudged,
        "seconds": seconds,
    }))
}

fn stopped(signal: i32, output: &Path) -> Error {
    Error::new(Kind::Signal(signal), format!("stopped by {}", signals::name(signal)))
        .path(output)
        .remedy("give the same command again to go on")
}

/// Pairs and their texts.
struct Data {
    candidates: Candidates,
    texts: PairTexts,
    max_length: usize,
    query_length: usize,
    /// Digests of queries and passages.
    sets: [String; 2],
}

impl Data {
    fn open(args: &Arguments, model: &Reranker, global: &Global) -> Result<Data> {
        let [queries, passages] = [&args.queries, &args.corpus].map(|dir| ShardSet::open(dir).map(Arc::new));
        let (queries, passages) = (queries?, passages?);
        check_sets(&[&queries, &passages], None)?;
        let tokenizer = Tokenizer::load(model.tokenizer().unwrap_or(passages.dir()))?;
        let mut notes = Vec::new();
        for set in [&queries, &passages] {
            let tokens = set.facts().vocab_size as usize;
            if tokens > model.config.vocab_size {
                let cause =
                    format!("the tokens are of a vocabulary of {tokens}, the model has {}", model.config.vocab_size);
                return Err(Error::refused(cause).path(set.dir()).remedy("tokenize with the tokenizer of the model"));
            }
            if let Some(folder) = model.tokenizer() {
                same_tokenizer((&tokenizer, folder), set, &mut notes)?;
            }
        }
        notes.iter().for_each(|note| global.note(&format!("warning: {note}")));

        let most = model.config.max_position_embeddings.min(LONGEST_TEXT);
        let max_length =
            args.max_length.unwrap_or(model.max_length.unwrap_or(USUAL_LENGTH).min(USUAL_LENGTH).min(most));
        if max_length > most {
            let cause = format!("--max-length {max_length}: the model has {most} positions");
            return Err(Error::usage(cause).remedy(format!("choose at most {most}")));
        }
        let query_length = args.query_length.unwrap_or(max_length / 2);
        let [query_prefix, passage_prefix] = [&args.query_prefix, &args.passage_prefix].map(|text| tokenizer.ids(text));
        let query = TextRules { max_length: query_length, prefix: query_prefix? };
        let texts = PairTexts::new(queries.clone(), passages.clone(), query, passage_prefix?, max_length)?;

        let (path, format) = match (&args.pairs, &args.run) {
            (Some(pairs), _) => (pairs, Some(RunFormat::Pairs)),
            (None, Some(run)) => (run, args.run_format),
            (None, None) => return Err(Error::usage("--run is missing").remedy("give --run or --pairs")),
        };
        let input = Input { path: path.clone(), bytes: None };
        let run = Run::read(&input, format)?;
        let depth = args.top_k.map(|k| k as usize);
        let sets = [digest_of(&queries)?, digest_of(&passages)?];
        let candidates = Candidates::new(&input, run, &queries, &passages, depth)?;
        Ok(Data { candidates, texts, max_length, query_length, sets })
    }
}

/// What tells a set from others.
fn digest_of(set: &ShardSet) -> Result<String> {
    Ok(hex16(&Sha256::digest(set.description()?)))
}

/// All that scores depend on.
fn settings(args: &Arguments, data: &Data, target: &Target, tokens: usize, model: String) -> BTreeMap<String, String> {
    let [queries, corpus] = data.sets.clone();
    let device = if target.device.is_gpu() { target.words.clone() } else { "cpu".into() };
    let all = [
        ("model", model),
        ("queries", queries),
        ("corpus", corpus),
        ("top-k", args.top_k.map_or("all".into(), |k| k.to_string())),
        ("max-length", data.max_length.to_string()),
        ("query-length", data.query_length.to_string()),
        ("query-prefix", args.query_prefix.clone()),
        ("passage-prefix", args.passage_prefix.clone()),
        ("tokens-per-batch", tokens.to_string()),
        ("device", device),
        ("precision", target.precision().into()),
        ("engine", env!("CARGO_PKG_VERSION").into()),
    ];
    all.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
}
