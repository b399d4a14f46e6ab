//! `tokenize`: text to shards.

use std::path::PathBuf;
use std::time::Instant;

use clap::ValueEnum;
use serde_json::json;

use crate::data::shard::{Counts, META, Packing, TitleSep};
use crate::data::source::{self, Format};
use crate::data::tokenize::{self, Event, Options};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::files::OutputDir;
use crate::model::hub;

use super::progress::Progress;
use super::{Global, grouped, say};

/// Turn text into token shards.
///
/// Reads plain text, JSON lines, tab-separated columns (2: id text, 3: id title text, 4: id url title body), BEIR folders and
/// Parquet, each also as .gz or .zst. Documents without text are left out and counted. Of documents with the same id the first one
/// stays, the others are left out and counted; --keep-duplicates keeps them.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Files, folders, globs, or - for standard input
    #[arg(long, required = true, num_args = 1.., value_name = "PATH")]
    input: Vec<String>,
    /// Folder or hub name of a model with tokenizer.json or vocab.txt, or one of these files
    #[arg(long, value_name = "PATH")]
    tokenizer: PathBuf,
    /// Folder to make
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Replace an output folder of an earlier run
    #[arg(long)]
    overwrite: bool,
    /// docs: one text, one sequence, cut at the limit; blocks: a text fills as many sequences as it needs
    #[arg(long, value_enum, default_value = "docs")]
    packing: PackingArg,
    /// Limit of tokens in a sequence, `[CLS]` and `[SEP]` included
    #[arg(long, default_value_t = 512, value_name = "N", alias = "max_length", alias = "max-seq-length", alias = "max_seq_length",
          value_parser = clap::value_parser!(u32).range(3..=1 << 20))]
    max_length: u32,
    /// What joins title and text; none leaves titles out
    #[arg(long, value_enum, default_value = "space")]
    title_sep: TitleSep,
    /// What the input is
    #[arg(long, value_enum, default_value = "auto")]
    format: FormatArg,
    /// What separates documents of plain text
    #[arg(long, value_enum, default_value = "line")]
    doc_sep: DocSep,
    /// Keep documents whose id was seen before
    #[arg(long)]
    keep_duplicates: bool,
    /// Tokens after which the next shard begins
    #[arg(long, default_value_t = 1 << 25, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 28))]
    shard_tokens: u32,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PackingArg {
    Docs,
    Blocks,
}

/// What raw input is.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum FormatArg {
    /// Found by name and first bytes
    Auto,
    /// Plain text
    Txt,
    /// JSON lines
    Jsonl,
    /// Tab-separated columns
    Tsv,
    /// Parquet
    Parquet,
}

impl FormatArg {
    /// The format, where one was named.
    pub fn format(self) -> Option<Format> {
        match self {
            FormatArg::Auto => None,
            FormatArg::Txt => Some(Format::Text),
            FormatArg::Jsonl => Some(Format::Jsonl),
            FormatArg::Tsv => Some(Format::Tsv),
            FormatArg::Parquet => Some(Format::Parquet),
        }
    }
}

/// What separates documents of plain text.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum DocSep {
    /// The end of a line
    Line,
    /// A blank line
    Blank,
}

impl Arguments {
    fn options(&self, threads: usize) -> Options {
        Options {
            packing: match self.packing {
                PackingArg::Docs => Packing::Docs,
                PackingArg::Blocks => Packing::Blocks,
            },
            max_length: self.max_length,
            title_sep: self.title_sep,
            shard_tokens: self.shard_tokens as usize,
            threads,
            format: self.format.format(),
            blank_lines: self.doc_sep == DocSep::Blank,
            keep_duplicates: self.keep_duplicates,
        }
    }
}

/// Runs the subcommand.
pub fn run(args: Arguments, global: &Global) -> Result<()> {
    let inputs = source::expand(&args.input)?;
    let tokenizer = Tokenizer::load(&hub::resolve(&args.tokenizer.to_string_lossy())?)?;
    let output = OutputDir::create(&args.output, args.overwrite, META)?;
    let total = inputs.iter().map(|i| i.bytes).sum::<Option<u64>>();
    let progress = Progress::start(total, global.quiet);
    let started = Instant::now();
    let shown = std::sync::atomic::AtomicUsize::new(0);
    let note = |text: String| {
        if !global.quiet {
            progress.note(&text);
        }
    };
    let watch = |event: Event<'_>| match event {
        Event::Opened(path, format) => {
            // A folder of ten thousand files needs no line for each.
            let n = shown.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if n < 10 || global.verbose {
                note(format!("{}: {}", path.display(), format.describe()));
            } else if n == 10 {
                note(format!("… and {} more files (-v names them)", inputs.len() - 10));
            }
        }
        Event::NoDocuments(path) => note(format!("warning: {}: no documents in it", path.display())),
        Event::Duplicate(path, id) => {
            let fate = if args.keep_duplicates { "kept" } else { "left out" };
            note(format!(
                "warning: {}: id {id:?} was seen before; such documents are {fate} and counted",
                path.display()
            ));
        }
        Event::Progress(documents, text, read) => progress.update(read, documents, text),
    };
    let result = tokenize::run(&inputs, &tokenizer, &args.options(global.threads()), output.path(), &watch);
    progress.finish();
    let counts = result?;
    output.commit()?;
    report(&args, &counts, started.elapsed().as_secs_f64(), global)
}

fn report(args: &Arguments, counts: &Counts, seconds: f64, global: &Global) -> Result<()> {
    let mut value = serde_json::to_value(counts)
        .map_err(|e| Error::refused(format!("the counts cannot be written: {e}")).remedy("report this"))?;
    value["seconds"] = json!(seconds);
    value["output"] = json!(args.output);
    global.write_json(&value)?;
    if counts.unchecked_ids > 0 {
        global.note(&format!(
            "warning: {} ids came after the first 28 million and were only compared with those",
            grouped(counts.unchecked_ids)
        ));
    }
    let rate = counts.text_bytes as f64 / 1e6 / seconds.max(1e-9);
    let rows = [
        ("documents", counts.documents),
        ("sequences", counts.sequences),
        ("tokens", counts.tokens),
        ("empty", counts.empty),
        ("truncated", counts.truncated),
        ("duplicates", counts.duplicates),
        ("unknown", counts.unknown),
    ];
    let lines: Vec<String> = rows.iter().map(|(name, n)| format!("{name:<11}{:>15}", grouped(*n))).collect();
    say(&format!(
        "{}\nwritten to {} in {seconds:.1} s, {rate:.1} MB/s of text",
        lines.join("\n"),
        args.output.display()
    ))
}
