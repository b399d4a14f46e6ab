//! `demo`: the whole way from text to a retriever that others load and to its figures, offline, with the commands a user would type.
//!
//! The text, the vocabulary and the model's configuration are part of the binary. Each step is printed as a command line, parsed by
//! the same parser and run by the same code as if it had been typed; nothing here knows a shortcut.

mod commands;
mod figures;
mod ranking;

use std::ffi::OsString;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Parser, ValueEnum};
use flate2::read::GzDecoder;
use serde_json::{Value, json};

use super::{Cli, Global, Hardware, say};
use crate::data::shard::ShardSet;
use crate::error::{Error, IoContext, Kind, Result};
use crate::files::{OutputDir, write_synced};
use crate::train::settings::{Precision, Settings};
use crate::train::signals::{self, Stop};
use crate::train::workspace::MODEL;
use commands::{Commands, Pretraining, Size, Step};
use figures::Figures;
use ranking::Ranking;

/// 4,000 descriptions of Debian packages, and their one-line synopses; see assets/demo/README.md.
const CORPUS: &[u8] = include_bytes!("../../assets/demo/corpus.jsonl.gz");
const QUERIES: &[u8] = include_bytes!("../../assets/demo/queries.jsonl.gz");
const VOCABULARY: &[u8] = include_bytes!("../../assets/demo/vocab.txt");
const CONFIG: &[u8] = include_bytes!("../../assets/demo/config.json");
const ABOUT: &[u8] = include_bytes!("../../assets/demo/README.md");

/// File that marks a folder as a demo's and holds what the demo in it was asked for.
const MARKER: &str = "demo.json";
/// One query in so many is for the dev set.
const DEV_EVERY: usize = 10;
/// Limit of what an embedded file may unpack to.
const MOST_TEXT: u64 = 64 << 20;

/// Turn bundled text into a retriever and judge it, in one to two minutes, offline
///
/// Unpacks 4,000 texts with a query each, then runs the commands a user would type: tokenize, train (pre-training, fine-tuning), encode,
/// search, evaluate, verify. Ends with the loss on held-out text, the figures of the untrained, the pre-trained and the fine-tuned
/// encoder and of BM25 on queries that no training saw, and how to load the models. The same command again goes on where it was stopped.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Folder to make
    #[arg(long, value_name = "DIR", default_value = "retromae-demo")]
    output: PathBuf,
    /// What pre-training minimises
    #[arg(long, value_enum, default_value = "retromae")]
    objective: Pretraining,
    /// Training steps, for tests of the demo itself
    #[arg(long, value_name = "N", hide = true, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    steps: Option<u64>,
    #[command(flatten)]
    hardware: Hardware,
}

/// Runs the subcommand.
pub fn run(args: Arguments, global: &Global) -> Result<()> {
    let began = Instant::now();
    let demo = Demo::new(args, global);
    let stop = Stop::install()?;
    demo.unpack(global)?;
    let mut lines = Vec::new();
    for step in demo.commands().steps() {
        lines.push(demo.take(step, global)?);
        // Training stops by itself; the other commands are short, and end first.
        if let Some(signal) = stop.requested() {
            let cause = format!("stopped by {}", signals::name(signal));
            let remedy = "run the same command to go on";
            return Err(Error::new(Kind::Signal(signal), cause).path(&demo.dir).remedy(remedy));
        }
    }
    let shards = ShardSet::open(&demo.dir.join("shards"))?;
    let figures = Figures::gather(&demo.dir.join("run"), &shards, demo.seed, demo.size.held_out)?;
    let ranking = Ranking::gather(&demo.dir)?;
    let seconds = began.elapsed().as_secs_f64();
    let [model, retriever] = ["run", "retriever"].map(|run| demo.dir.join(run).join(MODEL));
    let table = ranking.to_text(demo.size.texts / DEV_EVERY, demo.size.texts);
    say(&format!("\n{}\n\n{table}\n\n{}", figures.to_text(seconds), demo.farewell(&model, &retriever)))?;
    let mut value = figures.to_json();
    value["retrieval"] = ranking.to_json();
    value["seconds"] = json!(seconds);
    value["model"] = json!(model);
    value["retriever"] = json!(retriever);
    value["commands"] = json!(lines);
    global.write_json(&value)?;
    figures.check(demo.size.whole)?;
    ranking.check(&demo.dir, demo.size.whole)
}

struct Demo {
    dir: PathBuf,
    size: Size,
    seed: u64,
    objective: Pretraining,
    /// Options of the demo that its commands get, too, and those that commands get which compute.
    passed_on: Vec<OsString>,
    hardware: Vec<OsString>,
    program: OsString,
}

impl Demo {
    fn new(args: Arguments, global: &Global) -> Demo {
        let mut passed_on: Vec<OsString> = Vec::new();
        if let Some(threads) = global.threads {
            passed_on.extend(["--threads".into(), threads.to_string().into()]);
        }
        if let Some(seed) = global.seed {
            passed_on.extend(["--seed".into(), seed.to_string().into()]);
        }
        if global.quiet {
            passed_on.push("--quiet".into());
        }
        let mut hardware = Vec::new();
        let Hardware { device, precision } = args.hardware;
        if device != "auto" {
            hardware.extend(["--device".into(), device.into()]);
        }
        if let Some(value) = precision.to_possible_value().filter(|_| precision != Precision::Auto) {
            hardware.extend(["--precision".into(), value.get_name().into()]);
        }
        Demo {
            dir: args.output,
            size: Size::new(args.steps),
            seed: global.seed.unwrap_or(Settings::default().seed),
            objective: args.objective,
            passed_on,
            hardware,
            program: std::env::args_os().next().unwrap_or_else(|| "retromae-engine".into()),
        }
    }

    /// Makes the folder, or finds that of an earlier, equal demo.
    fn unpack(&self, global: &Global) -> Result<()> {
        let asked = json!({
            "engine": env!("CARGO_PKG_VERSION"), "steps": self.size.steps, "seed": self.seed, "objective": self.objective.name(),
        });
        let marker = self.dir.join(MARKER);
        if marker.is_file() {
            let text = std::fs::read_to_string(&marker).at(&marker, "cannot read")?;
            if serde_json::from_str::<Value>(&text).ok().as_ref() != Some(&asked) {
                return Err(Error::refused("holds a demo of another version or with other options")
                    .path(&self.dir)
                    .remedy("remove the folder or choose another --output"));
            }
            global.note(&format!("{}: a demo is there already, going on with it", self.dir.display()));
            return Ok(());
        }
        let occupied = std::fs::read_dir(&self.dir).is_ok_and(|mut entries| entries.next().is_some());
        if occupied || self.dir.is_file() {
            return Err(Error::refused(format!("exists and is not a demo's: there is no {MARKER} in it"))
                .path(&self.dir)
                .remedy("choose another --output"));
        }
        let folder = OutputDir::create(&self.dir, false, MARKER)?;
        let write = |name: &str, bytes: &[u8]| write_synced(&folder.path().join(name), |w| w.write_all(bytes));
        write("corpus.jsonl", &first(&unpacked(CORPUS)?, self.size.texts))?;
        for (part, lines) in ["train", "dev"].iter().zip(split(&first(&unpacked(QUERIES)?, self.size.texts))) {
            write(&format!("{part}-queries.jsonl"), &lines.concat())?;
            write(&format!("{part}-qrels.tsv"), judgements(&lines).as_bytes())?;
        }
        write("vocab.txt", VOCABULARY)?;
        write("config.json", CONFIG)?;
        write("README.md", ABOUT)?;
        write(MARKER, format!("{asked:#}\n").as_bytes())?;
        folder.commit()?;
        let texts = super::grouped(self.size.texts as u64);
        let what = "texts, their queries and judgements, a vocabulary and a model configuration";
        say(&format!("unpacked {texts} {what} to {}", self.dir.display()))
    }

    fn commands(&self) -> Commands<'_> {
        Commands {
            dir: &self.dir,
            objective: self.objective,
            size: self.size,
            passed_on: &self.passed_on,
            hardware: &self.hardware,
        }
    }

    /// Does a step; gives the command line.
    fn take(&self, step: Step, global: &Global) -> Result<String> {
        let Step { about, words, done } = step;
        let all = std::iter::once(&self.program).chain(&words);
        // The command as a shell takes it.
        let line = all.map(|word| quoted(&word.to_string_lossy())).collect::<Vec<_>>().join(" ");
        if done {
            global.note(&format!("there already, made by: {line}"));
            return Ok(line);
        }
        let about = if about.is_empty() { String::new() } else { format!("\n# {about}") };
        say(&format!("{about}\n$ {line}"))?;
        self.execute(&words)?;
        Ok(line)
    }

    fn execute(&self, words: &[OsString]) -> Result<()> {
        let cli = Cli::try_parse_from(std::iter::once(&self.program).chain(words)).map_err(|e| {
            let told = e.to_string();
            let told = told.lines().next().unwrap_or_default().trim_start_matches("error: ");
            Error::usage(told).remedy("give the demo another --output; else report this as a defect")
        })?;
        super::run(cli)
    }

    fn farewell(&self, model: &Path, retriever: &Path) -> String {
        let program = quoted(&self.program.to_string_lossy());
        let dir = quoted(&self.dir.to_string_lossy());
        format!(
            "The models, in Python:\n\
             \x20   from transformers import AutoModelForMaskedLM\n\
             \x20   model = AutoModelForMaskedLM.from_pretrained({model:?})\n\
             \x20   from sentence_transformers import SentenceTransformer\n\
             \x20   retriever = SentenceTransformer({retriever:?})\n\
             \n\
             With your own text (txt, jsonl, tsv or parquet), starting from a model you have:\n\
             \x20   {program} tokenize --input TEXTS --tokenizer MODEL --output shards\n\
             \x20   {program} train --model MODEL --data shards --output run\n\
             With queries and their passages, go on as above, from the second tokenize.\n\
             The texts of the demo, and what was made of them, are in {dir}.",
            model = model.display().to_string(),
            retriever = retriever.display().to_string(),
        )
    }
}

/// The first lines of a text.
fn first(text: &[u8], lines: usize) -> Vec<u8> {
    text.split_inclusive(|b| *b == b'\n').take(lines).collect::<Vec<_>>().concat()
}

/// Lines for training and for the dev set.
fn split(queries: &[u8]) -> [Vec<&[u8]>; 2] {
    let mut parts = [Vec::new(), Vec::new()];
    for (i, line) in queries.split_inclusive(|b| *b == b'\n').enumerate() {
        parts[usize::from(i % DEV_EVERY == DEV_EVERY - 1)].push(line);
    }
    parts
}

/// Judgements of queries, as lines of JSON, by TREC's form: the passage of a query has its id.
fn judgements(queries: &[&[u8]]) -> String {
    let ids = queries.iter().filter_map(|line| serde_json::from_slice::<Value>(line).ok());
    ids.filter_map(|query| query["_id"].as_str().map(|id| format!("{id}\t0\t{id}\t1\n"))).collect()
}

fn unpacked(gzip: &[u8]) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    GzDecoder::new(gzip).take(MOST_TEXT).read_to_end(&mut text).at("<embedded text>", "cannot unpack")?;
    Ok(text)
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./,:=+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_string();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_a_shell() {
        assert_eq!(quoted("a/b-c.json"), "a/b-c.json");
        assert_eq!(quoted("my demo"), "'my demo'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn the_bundled_files_belong_together() -> Result<()> {
        let lines = |gzip| unpacked(gzip).map(|text| text.split(|b| *b == b'\n').filter(|l| !l.is_empty()).count());
        assert_eq!((lines(CORPUS)?, lines(QUERIES)?), (4000, 4000));
        let parts = unpacked(QUERIES)?;
        let [train, dev] = split(&parts);
        assert_eq!([train.len(), dev.len()], [3600, 400]);
        assert_eq!(judgements(&dev).lines().count(), 400);
        assert!(judgements(&train).starts_with("2vcard\t0\t2vcard\t1\n"));
        let config: Value = serde_json::from_slice(CONFIG).unwrap_or_default();
        let tokens = VOCABULARY.split(|b| *b == b'\n').filter(|l| !l.is_empty()).count();
        assert_eq!(config["vocab_size"].as_u64(), Some(tokens as u64));
        Ok(())
    }
}
