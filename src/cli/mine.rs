//! `mine`: a run to hard negatives.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{Global, grouped, say};
use crate::data::pairs::runs::Run;
use crate::data::shard::ShardSet;
use crate::data::source::{self, Input};
use crate::error::{Error, Result};
use crate::eval::qrels::Qrels;
use crate::files;
use crate::retrieve::mine::{Equality, Mined, Pick, Rules, mine, read_scores};

/// Mine hard negatives from a run
///
/// Goes through each list by rank and drops positives, texts equal to one, and what is too near to the positives; writes
/// `qid<tab>pid,pid,…`, which train --negatives reads, and tells what each rule dropped.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Run: TREC, MS MARCO or Tevatron form
    #[arg(long, value_name = "FILE")]
    run: PathBuf,
    /// Judgements of the queries
    #[arg(long, value_name = "FILE")]
    qrels: PathBuf,
    /// File to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Passages: a folder of token shards, or files of text; without them only ids tell what is equal to a positive
    #[arg(long, num_args = 1.., value_name = "PATH")]
    corpus: Vec<String>,
    /// Ranks to take from, as 10-200; the first is 1
    #[arg(long, default_value = "1-200", value_name = "A-B", value_parser = ranks)]
    ranks: Ranks,
    /// Negatives of a query
    #[arg(long, default_value_t = 15, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    count: u32,
    /// Which of those left
    #[arg(long, value_enum, default_value = "random")]
    pick: Pick,
    /// Lowest grade of a positive
    #[arg(long, default_value_t = 1, value_name = "N", allow_negative_numbers = true)]
    least_grade: i32,
    /// Highest score of a negative
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = finite)]
    max_score: Option<f32>,
    /// How far below the lowest positive on the list a negative must score
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = finite)]
    margin: Option<f32>,
    /// The same, as a share of the positive's score: 0.05 keeps what scores at most 95 % of it
    #[arg(long, value_name = "X", value_parser = finite)]
    relative_margin: Option<f32>,
    /// Scores of a cross-encoder, `qid pid score` separated by tabs; passages without one are dropped
    #[arg(long, num_args = 1.., value_name = "FILE")]
    scores: Vec<String>,
    /// How far below the lowest positive a negative must be by these scores
    #[arg(long, default_value_t = 3.0, value_name = "X", allow_negative_numbers = true, value_parser = finite)]
    ce_margin: f32,
}

/// First and last rank.
type Ranks = [u32; 2];

fn ranks(text: &str) -> std::result::Result<Ranks, String> {
    let parts = text.split_once('-').and_then(|(a, b)| Some([a.trim().parse().ok()?, b.trim().parse().ok()?]));
    parts.filter(|[a, b]| (1..=*b).contains(a)).ok_or_else(|| "ranks are two numbers from 1 on, as 10-200".into())
}

fn finite(text: &str) -> std::result::Result<f32, String> {
    text.parse().ok().filter(|x: &f32| x.is_finite()).ok_or_else(|| "not a finite number".into())
}

/// Runs the subcommand.
pub fn run(args: Arguments, global: &Global) -> Result<()> {
    files::probe(&args.output)?;
    let input = |path: &Path| Input { path: path.to_path_buf(), bytes: None };
    let run = Run::read(&input(&args.run), None)?;
    let (qrels, _) = Qrels::read(&input(&args.qrels), None)?;
    let equality = match &args.corpus[..] {
        [] => {
            global.note("without --corpus only ids tell what is equal to a positive");
            Equality::Unknown
        }
        [one] if ShardSet::is_set(Path::new(one)) => Equality::of_shards(ShardSet::open(Path::new(one))?)?,
        several if several.iter().any(|path| ShardSet::is_set(Path::new(path))) => {
            return Err(Error::usage("--corpus names several sets of shards").remedy("give one set, or files of text"));
        }
        texts => Equality::of_documents(&source::expand(texts)?, &run, &qrels)?,
    };
    let scores = match args.scores.is_empty() {
        true => None,
        false => Some(read_scores(&source::expand(&args.scores)?)?),
    };
    let rules = Rules {
        ranks: args.ranks,
        count: args.count as usize,
        pick: args.pick,
        least_grade: args.least_grade,
        max_score: args.max_score,
        margin: args.margin,
        relative_margin: args.relative_margin,
        ce_margin: args.ce_margin,
        seed: global.seed.unwrap_or(42),
    };
    let mined = mine(&run, &qrels, &equality, scores.as_ref(), &rules).map_err(|e| match e.has_path() {
        true => e,
        false => e.path(&args.run),
    })?;
    files::write_atomic(&args.output, |w| {
        mined.lists.iter().try_for_each(|(query, list)| writeln!(w, "{query}\t{}", list.join(",")))
    })?;
    report(&args, &mined, global)
}

fn report(args: &Arguments, mined: &Mined<'_>, global: &Global) -> Result<()> {
    let negatives: u64 = mined.lists.iter().map(|(_, list)| list.len() as u64).sum();
    let short: Vec<_> = mined.short.iter().map(|(query, has)| json!({ "query": query, "negatives": has })).collect();
    global.write_json(&json!({
        "queries": mined.lists.len(), "negatives": negatives, "dropped": mined.dropped, "short": short,
        "without_positive": mined.without_positive, "not_in_run": mined.not_in_run, "output": args.output,
    }))?;
    let d = &mined.dropped;
    let rows = [
        ("queries", mined.lists.len() as u64),
        ("negatives", negatives),
        ("dropped: outside the ranks", d.outside_ranks),
        ("dropped: positive", d.positives),
        ("dropped: score too high", d.max_score),
        ("dropped: within the margin", d.margin),
        ("dropped: text of a positive", d.equal_to_positive),
        ("dropped: text taken already", d.equal_to_earlier),
        ("dropped: no cross-encoder score", d.unscored),
        ("dropped: within its margin", d.ce_margin),
        ("not needed", d.not_needed),
        ("queries without a positive", mined.without_positive),
        ("judged queries not in the run", mined.not_in_run),
    ];
    let mut lines: Vec<String> = rows.iter().map(|(name, n)| format!("{name:<33}{:>15}", grouped(*n))).collect();
    if let Some((query, has)) = mined.short.first() {
        let n = mined.short.len() as u64;
        lines.push(format!(
            "{} fell short of {} negatives (first: {query}, which has {has}); --json names them",
            if n == 1 { "1 query".into() } else { format!("{} queries", grouped(n)) },
            args.count
        ));
    }
    lines.push(format!("written to {}", args.output.display()));
    say(&lines.join("\n"))
}
