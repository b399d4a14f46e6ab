//! `search`: embeddings to ranked lists.

use std::path::PathBuf;

use clap::ValueEnum;
use serde_json::json;

use super::progress::Rows as Progress;
use super::{Global, Hardware, grouped, say};
use crate::data::pairs::runs::RunFormat;
use crate::device::{DType, Device};
use crate::error::{Error, Result};
use crate::retrieve::search::{Rows, Written, write_run};
use crate::train::settings::Precision;

/// Find the best passages of every query, exactly
///
/// Inner products of all queries with all passages, in f32; of embeddings that are dense and lexical, the sum of both products. The order
/// of equal scores is that of the corpus. In TREC's form the second of two equal scores is written as the next smaller number, so that
/// trec_eval sees the same order. On a GPU --precision bf16 rounds the embeddings; without it they are compared as they are. Lexical
/// embeddings are searched on the CPU.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Folders of the queries' embeddings
    #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
    queries: Vec<PathBuf>,
    /// Folders of the passages' embeddings
    #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
    corpus: Vec<PathBuf>,
    /// Passages on a list
    #[arg(long, default_value_t = 1000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    top_k: u32,
    /// File to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Form of the file
    #[arg(long, value_enum, default_value = "trec")]
    format: FormatArg,
    /// Name of the run, in TREC's form
    #[arg(long, default_value = "retromae-engine", value_name = "NAME", value_parser = tag)]
    tag: String,
    #[command(flatten)]
    hardware: Hardware,
}

/// Form of a run that is written.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum FormatArg {
    /// qid Q0 docid rank score tag
    Trec,
    /// qid, pid, rank
    Msmarco,
    /// qid, docid, score
    Tevatron,
}

impl FormatArg {
    /// The library's name for it.
    pub fn format(self) -> RunFormat {
        match self {
            FormatArg::Trec => RunFormat::Trec,
            FormatArg::Msmarco => RunFormat::Msmarco,
            FormatArg::Tevatron => RunFormat::Tevatron,
        }
    }
}

fn tag(text: &str) -> std::result::Result<String, String> {
    match !text.is_empty() && text.chars().all(|c| !c.is_whitespace() && !c.is_control()) {
        true => Ok(text.to_string()),
        false => Err("a tag is one word".into()),
    }
}

/// Runs the subcommand.
pub fn run(args: Arguments, global: &Global) -> Result<()> {
    let (queries, corpus) = (Rows::open(&args.queries)?, Rows::open(&args.corpus)?);
    for (rows, side) in [(&queries, "query"), (&corpus, "passage")] {
        for folder in rows.folders().iter().filter(|folder| folder.meta().spec.side != side) {
            let kind = &folder.meta().spec.side;
            global.note(&format!("warning: {}: was encoded with --kind {kind}", folder.dir().display()));
        }
    }
    let mut target = args.hardware.open(global)?;
    let representation = corpus.representation();
    if representation.lexical() && target.device.is_gpu() {
        if args.hardware.device != "auto" {
            let (name, device) = (representation.name(), &args.hardware.device);
            return Err(Error::usage(format!("--device {device}: {name} embeddings are searched on the CPU"))
                .remedy("use --device cpu, or leave it out"));
        }
        global.note("lexical embeddings are searched on the CPU");
        target.device = Device::Cpu;
    }
    // Rounded vectors change the order of near ones: only who asks for it gets them.
    let storage = if args.hardware.precision == Precision::Bf16 { target.storage } else { DType::F32 };
    let total = queries.len();
    let progress = Progress::start(global.quiet, "queries");
    let to = Written { path: &args.output, format: args.format.format(), tag: &args.tag };
    let (target, k) = ((target.device, storage), args.top_k as usize);
    let done = write_run(target, (&queries, &corpus), k, &to, &|queries| progress.update(queries, Some(total)));
    progress.finish();
    let done = done?;
    global.write_json(&json!({
        "queries": done.queries, "passages": done.rows, "hits": done.hits, "nudged": done.nudged, "seconds": done.seconds,
        "output": args.output,
    }))?;
    let counts = [("queries", done.queries), ("passages", done.rows), ("hits", done.hits), ("nudged", done.nudged)];
    let lines: Vec<String> = counts.iter().map(|(name, n)| format!("{name:<11}{:>15}", grouped(*n))).collect();
    say(&format!("{}\nwritten to {} in {:.1} s", lines.join("\n"), args.output.display(), done.seconds))
}
