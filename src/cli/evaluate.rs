//! `evaluate`: a run and judgements to figures.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::ValueEnum;
use serde_json::{Map, Value, json};

use super::{Global, say};
use crate::data::pairs::runs::{Run, RunFormat};
use crate::data::source::Input;
use crate::error::Result;
use crate::eval::compare::{Comparison, compare};
use crate::eval::metrics::{EvalRules, Evaluation, IdenticalIds, Metric, Rules, evaluate, strangers};
use crate::eval::mteb::{self, Task};
use crate::eval::qrels::Qrels;
use crate::files;

/// Judge a run: MRR, recall, NDCG, MAP, precision
///
/// --rules trec gives the figures of trec_eval, which pytrec_eval, BEIR and MTEB use; msmarco those of MS MARCO's script. They differ:
/// trec orders by score and averages over the queries of the run, msmarco takes the ranks and counts every judged query.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Run: TREC, MS MARCO or Tevatron form
    #[arg(long, value_name = "FILE")]
    run: PathBuf,
    /// Judgements: TREC, BEIR or RetroMAE form
    #[arg(long, value_name = "FILE")]
    qrels: PathBuf,
    /// Whose rules
    #[arg(long, value_enum, default_value = "trec")]
    rules: RulesArg,
    /// Figures, separated by commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "ndcg@10,mrr@10,recall@100,map,p@10")]
    metrics: Vec<Metric>,
    /// Form of the run [default: found by its first line]
    #[arg(long, value_enum)]
    run_format: Option<RunFormat>,
    /// Under trec rules: average over all judged queries, those without a list count 0 (trec_eval -c)
    #[arg(long)]
    complete: bool,
    /// Passages with the id of their query: auto takes them off the lists as BEIR does, unless such a passage is judged relevant
    #[arg(long, value_enum, default_value = "auto")]
    identical_ids: IdenticalArg,
    /// Write the figures of every query to this file, separated by tabs
    #[arg(long, value_name = "FILE")]
    per_query: Option<PathBuf>,
    /// Another run: is the difference more than chance?
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Random exchanges of the comparison
    #[arg(long, default_value_t = 100_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    samples: u32,
    /// Write the result of a task in MTEB's form, too; MTEB itself did not run, and the file says so
    #[arg(long, value_name = "FILE")]
    mteb_json: Option<PathBuf>,
    /// Name of MTEB's task
    #[arg(long, default_value = "Retrieval", value_name = "NAME")]
    task: String,
    /// Split of MTEB's task
    #[arg(long, default_value = "test", value_name = "NAME")]
    split: String,
    /// Revision of the data set of MTEB's task
    #[arg(long, default_value = "", value_name = "NAME")]
    revision: String,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RulesArg {
    Trec,
    Msmarco,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum IdenticalArg {
    Auto,
    Ignore,
    Keep,
}

/// Runs the subcommand.
pub fn run(args: Arguments, global: &Global) -> Result<()> {
    let started = Instant::now();
    [&args.per_query, &args.mteb_json].into_iter().flatten().try_for_each(|path| files::probe(path))?;
    let (qrels, _) = Qrels::read(&input(&args.qrels), None)?;
    let rules = EvalRules {
        rules: match args.rules {
            RulesArg::Trec => Rules::Trec,
            RulesArg::Msmarco => Rules::Msmarco,
        },
        complete: args.complete,
        identical: match args.identical_ids {
            IdenticalArg::Auto => IdenticalIds::Auto,
            IdenticalArg::Ignore => IdenticalIds::Ignore,
            IdenticalArg::Keep => IdenticalIds::Keep,
        },
    };
    let judge = |path: &Path| -> Result<Evaluation> {
        let run = Run::read(&input(path), args.run_format)?;
        let found = evaluate(&run, &qrels, &args.metrics, &rules).map_err(|e| e.path(path))?;
        if let Some((ours, judged)) = strangers(&run, &qrels) {
            global.note(&format!(
                "warning: {}: no passage on any list is judged; it names {ours}, the judgements {judged}; \
                 check that both belong together",
                path.display()
            ));
        }
        Ok(found)
    };
    let found = judge(&args.run)?;
    let compared = match &args.compare {
        Some(path) => compare(&found, &judge(path)?, args.samples, global.seed.unwrap_or(42)),
        None => Vec::new(),
    };
    if let Some(path) = &args.per_query {
        per_query(path, &found)?;
    }
    if let Some(path) = &args.mteb_json {
        let (name, split, revision) = (args.task.clone(), args.split.clone(), args.revision.clone());
        let result = mteb::result(&Task { name, split, revision }, &found, started.elapsed().as_secs_f64());
        files::write_atomic(path, |w| writeln!(w, "{result:#}"))?;
    }
    let mut json = figures(&found.metrics, &found.means);
    json.insert("rules".into(), json!(found.rules.rules.name()));
    json.insert("queries".into(), json!(found.per_query.len()));
    json.insert("judged".into(), json!(found.judged));
    json.insert("found".into(), json!(found.found));
    json.insert("unjudged".into(), json!(found.unjudged));
    json.insert("ignored_identical_ids".into(), json!(found.ignored_identical));
    if !compared.is_empty() {
        json.insert("comparison".into(), compared.iter().map(comparison).collect());
    }
    global.write_json(&Value::Object(json))?;
    say(&table(&args, &found, &compared))
}

fn input(path: &Path) -> Input {
    Input { path: path.to_path_buf(), bytes: None }
}

/// Means by the metrics' names.
pub fn figures(metrics: &[Metric], means: &[f64]) -> Map<String, Value> {
    metrics.iter().zip(means).map(|(metric, mean)| (metric.to_string(), json!(mean))).collect()
}

fn comparison(c: &Comparison) -> Value {
    let [better, same, worse] = c.wins;
    json!({
        "metric": c.metric.to_string(), "first": c.first, "second": c.second, "difference": c.first - c.second, "p": c.p,
        "better": better, "same": same, "worse": worse, "pairs": c.pairs, "samples": c.samples,
    })
}

fn per_query(path: &Path, found: &Evaluation) -> Result<()> {
    let names: Vec<String> = found.metrics.iter().map(Metric::to_string).collect();
    let mut text = format!("query\t{}\n", names.join("\t"));
    for (query, values) in &found.per_query {
        let values: Vec<String> = values.iter().map(f64::to_string).collect();
        text += &format!("{query}\t{}\n", values.join("\t"));
    }
    files::write_atomic(path, |w| w.write_all(text.as_bytes()))
}

fn table(args: &Arguments, found: &Evaluation, compared: &[Comparison]) -> String {
    let rules = found.rules.rules.name();
    let mut lines: Vec<String> = found
        .metrics
        .iter()
        .zip(&found.means)
        .map(|(metric, mean)| format!("{:<12}{mean:>9.4}", metric.to_string()))
        .collect();
    let of = match found.rules.rules {
        Rules::Msmarco => "all judged queries",
        Rules::Trec if found.rules.complete => "all judged queries",
        Rules::Trec => "judged queries of the run",
    };
    let own = if found.ignored_identical { "; passages with their query's id do not count" } else { "" };
    lines.push(format!(
        "{rules} rules, mean over {} {of}; {} judged, {} of them in the run, {} of the run not judged{own}",
        found.per_query.len(),
        found.judged,
        found.found,
        found.unjudged
    ));
    if let (Some(path), Some(first)) = (&args.compare, compared.first()) {
        lines.push(format!("\ncompared with {}:", path.display()));
        lines.push(format!("{:<12}{:>9}{:>9}{:>10}{:>9}  better/same/worse", "", "this", "other", "difference", "p"));
        for c in compared {
            let [better, same, worse] = c.wins;
            let difference = c.first - c.second;
            lines.push(format!(
                "{:<12}{:>9.4}{:>9.4}{difference:>+10.4}{:>9.4}  {better}/{same}/{worse}",
                c.metric.to_string(),
                c.first,
                c.second,
                c.p
            ));
        }
        lines.push(format!(
            "paired randomisation test, two-sided, {} exchanges over {} queries",
            super::grouped(u64::from(first.samples)),
            first.pairs
        ));
    }
    lines.join("\n")
}
