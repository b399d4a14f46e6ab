//! `beir`: a model judged on data sets in BEIR's layout.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::encode::{ModelArgs, RepresentationArgs};
use super::evaluate::figures;
use super::progress::Rows as Progress;
use super::search::searching;
use super::{Global, Hardware, grouped, say};
use crate::error::{Error, IoContext, Result};
use crate::eval::metrics::Metric;
use crate::retrieve::beir::{Files, Judge, Judged, METRICS, Options};
use crate::retrieve::embedder::Kind;
use crate::retrieve::model::Texts;

/// Judge a model on data sets in BEIR's layout: encode, search, evaluate
///
/// A data set is a folder with corpus.jsonl, queries.jsonl (each perhaps .gz or .zst) and qrels/SPLIT.tsv. Only judged queries are
/// searched for; a passage is its title, a blank and its text; a passage with its query's id does not count. The figures are those of
/// pytrec_eval.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    /// Folders of data sets
    #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
    data: Vec<PathBuf>,
    /// Which judgements
    #[arg(long, default_value = "test", value_name = "NAME")]
    split: String,
    /// Longest passage in tokens, `[CLS]` and `[SEP]` included [default: what the model says]
    #[arg(long, value_name = "N", alias = "max_length", value_parser = clap::value_parser!(u32).range(3..=65_535))]
    max_length: Option<u32>,
    /// Longest query in tokens [default: that of passages]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(3..=65_535))]
    query_length: Option<u32>,
    /// Text put before every query [default: the model's prompt]
    #[arg(long, value_name = "TEXT")]
    query_prefix: Option<String>,
    /// Text put before every passage [default: the model's prompt]
    #[arg(long, value_name = "TEXT")]
    passage_prefix: Option<String>,
    /// Passages on a list
    #[arg(long, default_value_t = 1000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    top_k: u32,
    /// Figures, separated by commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    metrics: Vec<Metric>,
    /// Keep embeddings and runs in this folder; a further run uses what is there
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    #[command(flatten)]
    kept: RepresentationArgs,
    #[command(flatten)]
    hardware: Hardware,
}

/// A folder that is removed when nobody wants what is in it.
struct Work {
    path: PathBuf,
    temporary: bool,
}

impl Work {
    fn new(output: Option<&Path>) -> Result<Work> {
        if let Some(path) = output {
            return Ok(Work { path: path.to_path_buf(), temporary: false });
        }
        let path = std::env::temp_dir().join(format!("retromae-beir-{}", std::process::id()));
        std::fs::create_dir(&path).at(&path, "cannot create the folder")?;
        Ok(Work { path, temporary: true })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if self.temporary {
            // What is left of it is in the folder for such things.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// Runs the subcommand.
pub fn run(args: Arguments, global: &Global) -> Result<()> {
    let files = args.data.iter().map(|dir| Files::find(dir, &args.split)).collect::<Result<Vec<_>>>()?;
    if let Some(twice) = (1..files.len()).find(|&i| files[..i].iter().any(|other| other.name == files[i].name)) {
        return Err(Error::usage(format!("two data sets are called {}", files[twice].name))
            .path(&args.data[twice])
            .remedy("name each folder once, and folders of different names"));
    }
    let model = args.model.open(global)?;
    let target = args.hardware.open(global)?;
    let length = |n: Option<u32>| n.map(|n| n as usize);
    let texts = |kind| Texts {
        representation: args.kept.representation,
        lexical_top_k: args.kept.lexical_top_k as usize,
        ..Texts::new(kind)
    };
    let options = Options {
        split: args.split.clone(),
        queries: Texts {
            max_length: length(args.query_length.or(args.max_length)),
            prefix: args.query_prefix.clone(),
            ..texts(Kind::Query)
        },
        passages: Texts {
            max_length: length(args.max_length),
            prefix: args.passage_prefix.clone(),
            ..texts(Kind::Passage)
        },
        top_k: args.top_k as usize,
        metrics: if args.metrics.is_empty() { METRICS.to_vec() } else { args.metrics.clone() },
    };
    let mut judge = Judge::new(&model, (target.device, target.storage), &options)?;
    // A GPU that was named encodes, whoever searches.
    let named = if args.kept.representation.lexical() { "auto" } else { &args.hardware.device };
    judge.search = searching(global, (target.device, named), judge.kept(), judge.depth())?;
    let work = Work::new(args.output.as_deref())?;
    let mut judged = Vec::new();
    for files in &files {
        let progress = [Progress::start(global.quiet, "queries"), Progress::start(global.quiet, "passages")];
        let done = judge.run(files, &work.path.join(&files.name), &|what, at| {
            progress[usize::from(what.starts_with("passages"))].update(at.rows, at.total);
        });
        progress.iter().for_each(Progress::finish);
        judged.push(done?);
    }
    let metrics = &options.metrics;
    let averages: Vec<f64> = (0..metrics.len())
        .map(|i| judged.iter().map(|set| set.evaluation.means[i]).sum::<f64>() / judged.len() as f64)
        .collect();
    let mut json = figures(metrics, &averages);
    json.insert("split".into(), json!(args.split));
    json.insert("representation".into(), json!(args.kept.representation));
    json.insert("model".into(), json!(args.model.model));
    json.insert("datasets".into(), Value::Object(judged.iter().map(|set| (set.name.clone(), one(set))).collect()));
    global.write_json(&Value::Object(json))?;
    say(&table(metrics, &judged, &averages))
}

fn one(set: &Judged) -> Value {
    let mut json: Map<String, Value> = figures(&set.evaluation.metrics, &set.evaluation.means);
    json.insert("queries".into(), json!(set.queries));
    json.insert("judged".into(), json!(set.evaluation.judged));
    json.insert("passages".into(), json!(set.passages));
    json.insert("encode_seconds".into(), json!(set.seconds[0]));
    json.insert("search_seconds".into(), json!(set.seconds[1]));
    Value::Object(json)
}

fn table(metrics: &[Metric], judged: &[Judged], averages: &[f64]) -> String {
    let name = judged.iter().map(|set| set.name.chars().count()).max().unwrap_or(0).max(8);
    let row = |first: &str, figures: &[String], counts: [&str; 2]| {
        let figures: String = figures.iter().map(|figure| format!("{figure:>12}")).collect();
        format!("{first:<name$}{figures}{:>10}{:>12}", counts[0], counts[1]).trim_end().to_string()
    };
    let numbers = |means: &[f64]| means.iter().map(|mean| format!("{mean:.4}")).collect::<Vec<_>>();
    let mut lines = vec![row("", &metrics.iter().map(Metric::to_string).collect::<Vec<_>>(), ["queries", "passages"])];
    for set in judged {
        let counts = [grouped(set.queries), grouped(set.passages)];
        lines.push(row(&set.name, &numbers(&set.evaluation.means), [&counts[0], &counts[1]]));
    }
    if judged.len() > 1 {
        lines.push(row("average", &numbers(averages), ["", ""]));
    }
    lines.join("\n")
}
