//! `bench`: how fast this machine is, and whether it became slower.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{Global, Hardware, say};
use crate::bench::compare::Comparison;
use crate::bench::step::{self, Minimised};
use crate::bench::workload::{Model, Workload};
use crate::bench::{self, Report, data, encode, kernels, search};
use crate::error::{Error, Result};
use crate::graph::mlm::LOGITS_BYTES_GPU;
use crate::model::hub;
use crate::train::target::Target;

/// Measure steps, kernels, data, encoding and search, and compare two measurements
///
/// A table on standard output. --json FILE appends a JSON object for every case, with the command, the commit (RETROMAE_COMMIT, else
/// the checkout's), the device, its driver and cuBLASLt, clocks and load before and after: what it takes to repeat it. Models: base,
/// small, minilm and mini (next to nothing, to try the command), or a preset as in train --config-name.
#[derive(Debug, Args)]
#[command(arg_required_else_help = true)]
pub struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Training steps: dropout, clipping, AdamW and the upload of the batch included
    Step(StepArguments),
    /// Single kernels beside a product and a copy measured in the same run; on a GPU, or in the emulator to try it
    Kernels(KernelArguments),
    /// Batches from shards, or masks of texts in memory
    Data(DataArguments),
    /// Embeddings of tokenized texts
    Encode(EncodeArguments),
    /// Exact search in random vectors, the run written
    Search(SearchArguments),
    /// Two files of results side by side; fails when a case became slower
    Compare(CompareArguments),
}

/// A number that is at least 1.
fn count() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(1..=1_000_000_000)
}

/// A number of texts in a set.
fn texts() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=100_000_000)
}

#[derive(Debug, Args)]
struct StepArguments {
    /// What is minimised [default: retromae, and contrastive for finetune]
    #[arg(long, value_enum)]
    objective: Option<Minimised>,
    /// Size of the model [default: base on a GPU, minilm on the CPU, mini in the emulator]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Batches, those of the PyTorch baselines; several may be given [default: all of the objective]
    #[arg(long, value_enum)]
    workload: Vec<Workload>,
    /// Steps to time
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = count())]
    steps: u64,
    /// Steps before them. A GPU records the work of a batch at its second step and replays it from then on
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = count())]
    warmup: u64,
    /// Distinct batches, used in turn
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = count())]
    batches: u64,
    /// Tell where the time goes: every stage beside the least it could take by a product and a copy of the same run; kernels in --json
    #[arg(long)]
    breakdown: bool,
    /// Draw it as a flame graph, of one --workload; tells the table, too
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    hardware: Hardware,
}

#[derive(Debug, Args)]
struct KernelArguments {
    /// Only cases whose name contains this
    #[arg(long, default_value = "", value_name = "TEXT")]
    only: String,
    /// Shapes [default: base; mini in the emulator]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Times each case is measured
    #[arg(long, default_value_t = 15, value_name = "N", value_parser = count())]
    repeats: u64,
    /// Sets of operands of each case, used in turn [default: 4, together larger than the cache; 1 in the emulator]
    #[arg(long, value_name = "N", value_parser = count())]
    copies: Option<u64>,
    /// MiB of logits that exist at a time, perhaps several [default: as in training]
    #[arg(long, value_delimiter = ',', value_name = "N", default_values_t = [(LOGITS_BYTES_GPU >> 20) as u64], value_parser = count())]
    logits_mib: Vec<u64>,
    #[command(flatten)]
    hardware: Hardware,
}

#[derive(Debug, Args)]
struct DataArguments {
    /// Shards that tokenize wrote [default: texts in memory]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// What masks are made for
    #[arg(long, value_enum, default_value = "retromae")]
    objective: Minimised,
    /// Texts of a batch
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = count())]
    batch_size: u64,
    /// Batches to time
    #[arg(long, default_value_t = 40, value_name = "N", value_parser = count())]
    batches: u64,
    /// Longer texts are cut to this many tokens [default: as in the shards]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(3..=65_535))]
    max_length: Option<u32>,
    /// Time the data of fine-tuning: ids, judgements and negatives, batches, in a set of so many texts
    #[arg(long, value_name = "TEXTS", num_args = 0..=1, default_missing_value = "2000000", value_parser = texts())]
    pairs: Option<u32>,
}

#[derive(Debug, Args)]
struct EncodeArguments {
    /// A model's folder or hub name, or a size, which has random weights [default: base on a GPU, minilm on the CPU, mini in the emulator]
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Texts [default: as many as the workload passages of the model's size has]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    texts: Option<u64>,
    /// Times that all of them are embedded
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = count())]
    repeats: u64,
    #[command(flatten)]
    hardware: Hardware,
}

#[derive(Debug, Args)]
struct SearchArguments {
    /// Queries
    #[arg(long, default_value_t = 512, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    queries: u64,
    /// Rows that are searched
    #[arg(long, default_value_t = 200_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    rows: u64,
    /// Numbers of a row
    #[arg(long, default_value_t = 768, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=65_536))]
    width: u64,
    /// Rows on a list
    #[arg(long, default_value_t = 1000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    top_k: u64,
    /// Times that all is searched
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = count())]
    repeats: u64,
    /// Folder to keep the vectors in, so that others can search them; those that are there are used
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    #[command(flatten)]
    hardware: Hardware,
}

#[derive(Debug, Args)]
struct CompareArguments {
    /// Results before
    before: PathBuf,
    /// Results after
    after: PathBuf,
    /// Fail when a case takes so many percent longer
    #[arg(long, default_value_t = 5.0, value_name = "PERCENT")]
    fail_above: f64,
    /// Compare results of different devices
    #[arg(long)]
    any_device: bool,
}

/// Runs the subcommand.
pub fn run(args: Arguments, global: &Global) -> Result<()> {
    match args.what {
        What::Step(args) => on(global, "step", &args.hardware, |target, report| {
            let settings = step::Settings {
                model: model(args.model.as_deref(), &args.hardware, target)?,
                objective: args.objective,
                workloads: args.workload,
                steps: args.steps,
                warmup: args.warmup,
                batches: args.batches,
                breakdown: args.breakdown || args.svg.is_some(),
                svg: args.svg,
            };
            step::run(&settings, target, report)
        }),
        What::Kernels(args) => on(global, "kernels", &args.hardware, |target, report| {
            let copies = args.copies.unwrap_or(if args.hardware.device == "emulator" { 1 } else { 4 });
            let settings = kernels::Settings {
                model: model(args.model.as_deref(), &args.hardware, target)?,
                only: args.only,
                repeats: args.repeats as usize,
                copies: copies as usize,
                logits_mib: args.logits_mib.iter().map(|&mib| mib as usize).collect(),
            };
            kernels::run(&settings, target, report)
        }),
        What::Data(args) => {
            let (objective, objective_name) = data::Settings::masks(args.objective)?;
            let settings = data::Settings {
                data: args.data,
                pairs: args.pairs,
                objective,
                objective_name,
                batch_size: args.batch_size,
                batches: args.batches,
                max_length: args.max_length.map(|n| n as usize),
            };
            let warn = |text: &str| global.note(text);
            data::run(&settings, &Report::new(&say, &warn, global.json.clone(), bench::machine("data"))?)
        }
        What::Encode(args) => on(global, "encode", &args.hardware, |target, report| {
            let source = source(args.model.as_deref(), &args.hardware, target)?;
            let texts = args.texts.map(|n| n as usize);
            encode::run(&encode::Settings { source, texts, repeats: args.repeats }, target, report)
        }),
        What::Search(args) => on(global, "search", &args.hardware, |target, report| {
            let [queries, rows, width, k] = [args.queries, args.rows, args.width, args.top_k].map(|n| n as usize);
            let settings = search::Settings { queries, rows, width, k, repeats: args.repeats, keep: args.keep };
            search::run(&settings, target, report)
        }),
        What::Compare(args) => compare(&args, global),
    }
}

/// Opens the device and runs a measurement on it.
fn on(
    global: &Global,
    name: &str,
    hardware: &Hardware,
    measure: impl FnOnce(&Target, &Report<'_>) -> Result<()>,
) -> Result<()> {
    let target = Target::open(&hardware.device, hardware.precision)?;
    target.note.iter().for_each(|note| global.note(note));
    let warn = |text: &str| global.note(text);
    measure(&target, &Report::new(&say, &warn, global.json.clone(), bench::facts(name, &target))?)
}

/// The model of this name, or the one that suits the device.
fn model(name: Option<&str>, hardware: &Hardware, target: &Target) -> Result<Model> {
    let standard = match (hardware.device.as_str(), target.device.is_gpu()) {
        ("emulator", _) => "mini",
        (_, true) => "base",
        (_, false) => "minilm",
    };
    Model::named(name.unwrap_or(standard))
}

/// Random weights for the name of a size, else the folder of that name.
fn source(name: Option<&str>, hardware: &Hardware, target: &Target) -> Result<encode::Source> {
    let folder = |name: &&str| Path::new(name).exists() || Model::named(name).is_err();
    match name.filter(folder) {
        None => Ok(encode::Source::Random(model(name, hardware, target)?)),
        Some(name) => {
            let path = hub::resolve(name)?.into_boxed_path();
            Ok(encode::Source::Folder(name.to_string(), path, model(None, hardware, target)?))
        }
    }
}

fn compare(args: &CompareArguments, global: &Global) -> Result<()> {
    if !(args.fail_above >= 0.0) {
        let cause = format!("--fail-above {}: no percentage", args.fail_above);
        return Err(Error::usage(cause).remedy("choose a number that is at least 0"));
    }
    let done = Comparison::of([&args.before, &args.after], args.any_device)?;
    say("| case | before ms | after ms | after / before |\n| --- | ---: | ---: | ---: |")?;
    for pair in &done.pairs {
        let [a, b] = pair.ms;
        say(&format!("| {} | {a:.4} | {b:.4} | {:.3} |", pair.case, pair.ratio()))?;
    }
    done.notes.iter().for_each(|note| global.note(note));
    let line = |pair: &crate::bench::compare::Pair| json!({ "case": pair.case, "ms": pair.ms, "ratio": pair.ratio() });
    let pairs: Value = done.pairs.iter().map(line).collect();
    global.write_json(&json!({ "before": args.before, "after": args.after, "cases": pairs, "notes": done.notes }))?;
    done.check(args.fail_above)
}
