//! `bm25`: texts to ranked lists by the words they share.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use ahash::AHashSet;
use rayon::prelude::*;
use serde_json::json;

use super::search::FormatArg;
use super::{Global, grouped, say};
use crate::data::pairs::runs::{RunFormat, RunWriter};
use crate::data::source::{self, Document, Input};
use crate::error::{Error, Result};
use crate::eval::bm25::Bm25;
use crate::files;

/// Queries whose lists are made at once.
const BLOCK: usize = 1024;

/// Find the passages that share words with every query (BM25)
///
/// The baseline of dense retrieval, and where a first round of hard negatives comes from (`mine --run`). Lucene's form with k1 = 0.9 and
/// b = 0.4; a word is a run of letters and digits in lower case. A title counts as part of its text. The index is held in memory.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Queries: files, folders or globs of text with ids (jsonl, tsv, Parquet; .gz, .zst)
    #[arg(long, required = true, num_args = 1.., value_name = "PATH")]
    queries: Vec<String>,
    /// Passages, likewise
    #[arg(long, required = true, num_args = 1.., value_name = "PATH")]
    corpus: Vec<String>,
    /// Passages on a list
    #[arg(long, default_value_t = 1000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    top_k: u32,
    /// File to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Form of the file
    #[arg(long, value_enum, default_value = "trec")]
    format: FormatArg,
}

/// Runs the subcommand.
pub fn run(args: Arguments, global: &Global) -> Result<()> {
    files::probe(&args.output)?;
    let corpus = Texts::read(&source::expand(&args.corpus)?)?;
    let queries = Texts::read(&source::expand(&args.queries)?)?;
    for (texts, side) in [(&corpus, "passages"), (&queries, "queries")] {
        if texts.repeated > 0 {
            global.note(&format!("{} {side} repeat an id and are left out", grouped(texts.repeated)));
        }
    }
    let hits = rank(&corpus, &queries, args.top_k as usize, args.format.format(), &args.output)?;
    let (queries, passages) = (queries.ids.len(), corpus.ids.len());
    global.write_json(&json!({ "queries": queries, "passages": passages, "hits": hits, "output": args.output }))?;
    let counts = [("queries", queries as u64), ("passages", passages as u64), ("hits", hits)];
    let lines: Vec<String> = counts.iter().map(|(name, n)| format!("{name:<11}{:>15}", grouped(*n))).collect();
    say(&format!("{}\nwritten to {}", lines.join("\n"), args.output.display()))
}

/// Texts with their ids, in the order of their files.
pub struct Texts {
    ids: Vec<String>,
    texts: Vec<String>,
    /// Later ones of an id.
    repeated: u64,
}

impl Texts {
    /// Reads them.
    pub fn read(inputs: &[Input]) -> Result<Texts> {
        let (mut all, mut seen) = (Texts { ids: Vec::new(), texts: Vec::new(), repeated: 0 }, AHashSet::new());
        for input in inputs {
            let documents = source::open(input, None, false, Arc::new(AtomicU64::new(0)))?.1;
            for (number, document) in (1u64..).zip(documents) {
                let Document { id, title, text } = document?;
                let Some(id) = id.filter(|id| !id.is_empty()) else {
                    let cause = format!("text {number} has no id");
                    let remedy = "give texts with ids: JSON lines with _id or id, or tab-separated columns";
                    return Err(Error::refused(cause).path(&input.path).remedy(remedy));
                };
                if id.chars().any(char::is_whitespace) {
                    let cause = format!("the id {id:?} of text {number} has white space, which a run cannot hold");
                    return Err(Error::refused(cause).path(&input.path).remedy("name texts without white space"));
                }
                if !seen.insert(id.clone()) {
                    all.repeated += 1;
                    continue;
                }
                all.ids.push(id);
                all.texts.push(title.filter(|title| !title.is_empty()).map_or(text.clone(), |t| format!("{t} {text}")));
            }
        }
        Ok(all)
    }
}

/// Writes the `depth` best passages of every query; returns how many there are in all.
pub fn rank(corpus: &Texts, queries: &Texts, depth: usize, format: RunFormat, run: &Path) -> Result<u64> {
    let index = Bm25::new(corpus.texts.iter().map(String::as_str));
    let mut hits = 0;
    files::write_atomic(run, |out| {
        let mut writer = RunWriter::new(out, format, "bm25");
        for (ids, texts) in queries.ids.chunks(BLOCK).zip(queries.texts.chunks(BLOCK)) {
            let lists: Vec<Vec<(u32, f32)>> = texts.par_iter().map(|text| index.search(text, depth)).collect();
            for (id, list) in ids.iter().zip(&lists) {
                hits += list.len() as u64;
                writer.query(id, list.iter().map(|&(number, score)| (corpus.ids[number as usize].as_str(), score)))?;
            }
        }
        Ok(())
    })?;
    Ok(hits)
}
