//! The command line: one file per subcommand, each thin.
//!
//! To add a subcommand: a file here with a `clap::Args` struct and `pub fn run(args, &Global) -> Result<()>`, and one line each in
//! `Command` and [`run`]. Results go to standard output through [`say`], progress and warnings to standard error.

mod beir;
mod bench;
mod bm25;
mod completions;
mod demo;
mod doctor;
mod encode;
mod evaluate;
mod export;
mod inspect;
mod mine;
mod progress;
mod report;
mod rerank;
mod search;
mod step;
mod tokenize;
mod train;
mod verify;
mod watch;

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};

use crate::error::{Error, IoContext, Result};
use crate::files;
use crate::train::settings::Precision;

/// What the whole command line parses to.
#[derive(Debug, Parser)]
#[command(name = "retromae-engine", version, about, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: Global,
}

/// Where a subcommand computes.
#[derive(Debug, Args)]
pub struct Hardware {
    /// Device: auto takes a GPU where there is one; emulator runs the GPU's kernels on the CPU, for tests
    #[arg(long, default_value = "auto", value_parser = ["auto", "cpu", "cuda", "emulator"])]
    pub device: String,
    /// Arithmetic: auto is bf16 on a GPU and fp32 on the CPU
    #[arg(long, value_enum, default_value = "auto")]
    pub precision: Precision,
}

/// Options of every subcommand.
#[derive(Debug, Args)]
pub struct Global {
    /// Threads to use; all cores by default
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub threads: Option<u32>,
    /// Seed of everything random; 42 by default
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub seed: Option<u64>,
    /// Write the result to this file as JSON, too
    #[arg(long, global = true, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Say nothing but results and errors
    #[arg(long, short, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Say more
    #[arg(long, short, global = true)]
    pub verbose: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Turn bundled text into a retriever and judge it, in one to two minutes, offline
    Demo(demo::Arguments),
    /// Tell what this machine offers the engine, and what each part means
    Doctor(doctor::Arguments),
    /// Compute loss and gradients of one batch, to compare with PyTorch
    Step(step::Arguments),
    /// Turn text into token shards
    Tokenize(tokenize::Arguments),
    /// Show what a folder of shards holds
    Inspect(inspect::Arguments),
    /// Pre-train an encoder
    Train(Box<train::Arguments>),
    /// Draw one or several runs on a page: curves, settings, checkpoints, masks
    Report(report::Arguments),
    /// Show a run while it goes on: steps, losses, rates, evaluations
    Watch(watch::Arguments),
    /// Make a checkpoint of a run a model that others load
    Export(export::Arguments),
    /// Turn texts into embeddings
    Encode(Box<encode::Arguments>),
    /// Find the best passages of every query, exactly
    Search(search::Arguments),
    /// Find the passages that share words with every query (BM25)
    Bm25(bm25::Arguments),
    /// Mine hard negatives from a run
    Mine(mine::Arguments),
    /// Judge a run: MRR, recall, NDCG, MAP, precision
    Evaluate(evaluate::Arguments),
    /// Judge a model on data sets in BEIR's layout: encode, search, evaluate
    Beir(Box<beir::Arguments>),
    /// Put the passages on a run's lists in the order of a cross-encoder's scores
    Rerank(rerank::Arguments),
    /// Measure this machine: steps, kernels, data, encoding, search; compare two measurements
    Bench(Box<bench::Arguments>),
    /// Check every digest of what this program wrote
    Verify(verify::Arguments),
    /// Print what a shell needs to complete commands and options
    Completions(completions::Completions),
    /// Write manual pages, one a command
    Man(completions::Man),
}

/// Runs the subcommand.
pub fn run(cli: Cli) -> Result<()> {
    let global = &cli.global;
    global.start_threads()?;
    match cli.command {
        Command::Demo(args) => demo::run(args, global),
        Command::Doctor(args) => doctor::run(args, global),
        Command::Step(args) => step::run(args, global),
        Command::Tokenize(args) => tokenize::run(args, global),
        Command::Inspect(args) => inspect::run(args, global),
        Command::Train(args) => train::run(*args, global),
        Command::Report(args) => report::run(args, global),
        Command::Watch(args) => watch::run(args, global),
        Command::Export(args) => export::run(args, global),
        Command::Encode(args) => encode::run(*args, global),
        Command::Search(args) => search::run(args, global),
        Command::Bm25(args) => bm25::run(args, global),
        Command::Evaluate(args) => evaluate::run(args, global),
        Command::Beir(args) => beir::run(*args, global),
        Command::Mine(args) => mine::run(args, global),
        Command::Rerank(args) => rerank::run(args, global),
        Command::Bench(args) => bench::run(*args, global),
        Command::Verify(args) => verify::run(args, global),
        Command::Completions(args) => completions::completions(&args),
        Command::Man(args) => completions::man(&args),
    }
}

impl Global {
    /// Number of threads to use.
    pub fn threads(&self) -> usize {
        self.threads.map_or_else(num_cpus::get, |n| n as usize)
    }

    /// Limits rayon's threads before anything uses them.
    fn start_threads(&self) -> Result<()> {
        let Some(threads) = self.threads else { return Ok(()) };
        let started = rayon::ThreadPoolBuilder::new().num_threads(threads as usize).build_global();
        // The commands of a demo find the threads that the demo itself has started.
        if started.is_err() && rayon::current_num_threads() == threads as usize {
            return Ok(());
        }
        started.map_err(|e| {
            Error::new(crate::error::Kind::Io, format!("cannot start {threads} threads: {e}"))
                .remedy("use fewer --threads")
        })
    }

    /// Writes a result to the file of `--json`, if one was named.
    pub fn write_json(&self, value: &serde_json::Value) -> Result<()> {
        let Some(path) = &self.json else { return Ok(()) };
        files::write_atomic(path, |w| writeln!(w, "{value:#}"))
    }

    /// Tells something that is neither a result nor an error, unless `--quiet`.
    pub fn note(&self, message: &str) {
        if !self.quiet {
            progress::line(message);
        }
    }
}

/// Prints a result. A reader that has seen enough, as `head` does, is not an error.
pub fn say(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush());
    match written {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.at(Path::new("<stdout>"), "cannot write"),
    }
}

/// `12345678` as `12,345,678`.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}
