//! `demo`: the whole way from text to a model that others load, offline, with the commands a user would type.
//!
//! The text, the vocabulary and the model's configuration are part of the binary. Each step is printed as a command line, parsed by
//! the same parser and run by the same code as if it had been typed; nothing here knows a shortcut.

mod figures;

use std::ffi::OsString;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Parser, ValueEnum};
use flate2::read::GzDecoder;
use serde_json::{Value, json};

use super::{Cli, Global, Hardware, say};
use crate::data::shard::ShardSet;
use crate::error::{Error, IoContext, Result};
use crate::files::{OutputDir, write_synced};
use crate::train::settings::{Precision, Settings};
use crate::train::workspace::MODEL;
use figures::Figures;

/// 4,000 descriptions of Debian packages, and their one-line synopses; see assets/demo/README.md.
const CORPUS: &[u8] = include_bytes!("../../assets/demo/corpus.jsonl.gz");
const QUERIES: &[u8] = include_bytes!("../../assets/demo/queries.jsonl.gz");
const VOCABULARY: &[u8] = include_bytes!("../../assets/demo/vocab.txt");
const CONFIG: &[u8] = include_bytes!("../../assets/demo/config.json");
const ABOUT: &[u8] = include_bytes!("../../assets/demo/README.md");

/// File that marks a folder as a demo's and holds what the demo in it was asked for.
const MARKER: &str = "demo.json";
/// Steps of the whole demo: about a minute on two cores.
const STEPS: u64 = 1800;
/// Texts held out: enough for a steady loss, few enough not to slow the demo.
const HELD_OUT: u64 = 200;
/// Limit of what an embedded file may unpack to.
const MOST_TEXT: u64 = 64 << 20;

/// Turn bundled text into a pre-trained encoder in about a minute, offline
///
/// Unpacks 4,000 texts, then runs the commands a user would type: tokenize, train, verify. Ends with the loss on held-out text
/// before, during and after training, and how to load the model. The same command again goes on where it was stopped.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Folder to make
    #[arg(long, value_name = "DIR", default_value = "retromae-demo")]
    output: PathBuf,
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
    demo.unpack(global)?;
    let mut commands = Vec::new();
    for command in demo.commands() {
        let line = demo.line(&command);
        if command.done {
            global.note(&format!("there already, made by: {line}"));
        } else {
            say(&format!("\n$ {line}"))?;
            demo.execute(&command)?;
        }
        commands.push(line);
    }
    let shards = ShardSet::open(&demo.dir.join("shards"))?;
    let figures = Figures::gather(&demo.dir.join("run"), &shards, demo.seed, HELD_OUT)?;
    let seconds = began.elapsed().as_secs_f64();
    let model = demo.dir.join("run").join(MODEL);
    say(&format!("\n{}\n\n{}", figures.to_text(seconds), demo.farewell(&model)))?;
    let mut value = figures.to_json();
    value["seconds"] = json!(seconds);
    value["model"] = json!(model);
    value["commands"] = json!(commands);
    global.write_json(&value)?;
    figures.check(demo.whole)
}

struct Demo {
    dir: PathBuf,
    steps: u64,
    /// Not shortened: the figures must be those of a model that has learned something.
    whole: bool,
    seed: u64,
    /// Options of the demo that its commands get, too, and those that `train` gets.
    passed_on: Vec<OsString>,
    train: Vec<OsString>,
    program: OsString,
}

/// A command line, less the program's name.
struct Command {
    words: Vec<OsString>,
    /// An earlier demo in this folder has run it.
    done: bool,
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
        let mut train = Vec::new();
        let Hardware { device, precision } = args.hardware;
        if device != "auto" {
            train.extend(["--device".into(), device.into()]);
        }
        if let Some(value) = precision.to_possible_value().filter(|_| precision != Precision::Auto) {
            train.extend(["--precision".into(), value.get_name().into()]);
        }
        Demo {
            dir: args.output,
            steps: args.steps.unwrap_or(STEPS),
            whole: args.steps.is_none(),
            seed: global.seed.unwrap_or(Settings::default().seed),
            passed_on,
            train,
            program: std::env::args_os().next().unwrap_or_else(|| "retromae-engine".into()),
        }
    }

    /// Makes the folder, or finds that of an earlier, equal demo.
    fn unpack(&self, global: &Global) -> Result<()> {
        let asked = json!({ "engine": env!("CARGO_PKG_VERSION"), "steps": self.steps, "seed": self.seed });
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
        write("corpus.jsonl", &unpacked(CORPUS)?)?;
        write("queries.jsonl", &unpacked(QUERIES)?)?;
        write("vocab.txt", VOCABULARY)?;
        write("config.json", CONFIG)?;
        write("README.md", ABOUT)?;
        write(MARKER, format!("{asked:#}\n").as_bytes())?;
        folder.commit()?;
        say(&format!("unpacked 4,000 texts, a vocabulary and a model configuration to {}", self.dir.display()))
    }

    /// What a user would type, in its order.
    fn commands(&self) -> Vec<Command> {
        let at = |name: &str| self.dir.join(name).into_os_string();
        let tokenize = [("--input", at("corpus.jsonl")), ("--tokenizer", at("vocab.txt")), ("--output", at("shards"))];
        let tokenize = flags("tokenize", tokenize).chain(["--max-length", "64"].map(OsString::from));
        let every = (self.steps / 6).max(20).to_string();
        let (steps, held_out) = (self.steps.to_string(), HELD_OUT.to_string());
        let train = [("--config-file", at("config.json")), ("--data", at("shards")), ("--output", at("run"))];
        let settings = [
            ["--steps", &steps],
            ["--batch-size", "8"],
            ["--learning-rate", "1.5e-3"],
            ["--eval-size", &held_out],
            ["--eval-every", &every],
            ["--save-every", &every],
            ["--log-every", "50"],
        ];
        let train = flags("train", train).chain(settings.into_iter().flatten().map(OsString::from));
        let verify = ["verify".into(), at("shards"), at("run")];
        let passed_on = || self.passed_on.iter().cloned();
        vec![
            Command { words: tokenize.chain(passed_on()).collect(), done: ShardSet::is_set(&self.dir.join("shards")) },
            Command { words: train.chain(self.train.iter().cloned()).chain(passed_on()).collect(), done: false },
            Command { words: verify.into_iter().chain(passed_on()).collect(), done: false },
        ]
    }

    /// The command as a shell takes it.
    fn line(&self, command: &Command) -> String {
        let words = std::iter::once(&self.program).chain(&command.words);
        words.map(|word| quoted(&word.to_string_lossy())).collect::<Vec<_>>().join(" ")
    }

    fn execute(&self, command: &Command) -> Result<()> {
        let cli = Cli::try_parse_from(std::iter::once(&self.program).chain(&command.words)).map_err(|e| {
            let told = e.to_string();
            let told = told.lines().next().unwrap_or_default().trim_start_matches("error: ");
            Error::usage(told).remedy("give the demo another --output; else report this as a defect")
        })?;
        super::run(cli)
    }

    fn farewell(&self, model: &Path) -> String {
        let program = quoted(&self.program.to_string_lossy());
        let dir = quoted(&self.dir.to_string_lossy());
        let model = model.display();
        format!(
            "The model, in Python:\n\
             \x20   from transformers import AutoModelForMaskedLM\n\
             \x20   model = AutoModelForMaskedLM.from_pretrained({path:?})\n\
             \x20   from sentence_transformers import SentenceTransformer\n\
             \x20   model = SentenceTransformer({path:?})\n\
             \n\
             With your own text (txt, jsonl, tsv or parquet), starting from a model you have:\n\
             \x20   {program} tokenize --input TEXTS --tokenizer MODEL --output shards\n\
             \x20   {program} train --model MODEL --data shards --output run\n\
             The texts of the demo, and what was made of them, are in {dir}.",
            path = model.to_string(),
        )
    }
}

/// A subcommand and its flags with their values, as words.
fn flags<const N: usize>(name: &str, flags: [(&'static str, OsString); N]) -> impl Iterator<Item = OsString> {
    std::iter::once(name.into()).chain(flags.into_iter().flat_map(|(flag, value)| [flag.into(), value]))
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
        let config: Value = serde_json::from_slice(CONFIG).unwrap_or_default();
        let tokens = VOCABULARY.split(|b| *b == b'\n').filter(|l| !l.is_empty()).count();
        assert_eq!(config["vocab_size"].as_u64(), Some(tokens as u64));
        Ok(())
    }
}
