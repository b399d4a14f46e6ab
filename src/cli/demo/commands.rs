//! The steps of the demo as the command lines that a user would type, in their order.

use std::ffi::OsString;
use std::path::Path;

use clap::ValueEnum;

use crate::data::shard::ShardSet;

/// What the demo's pre-training minimises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pretraining {
    /// RetroMAE's losses
    Retromae,
    /// Those of DupMAE, a bag of words beside them
    Dupmae,
}

impl Pretraining {
    /// What a command line says of it: nothing of what stands without it.
    fn words(self) -> &'static str {
        match self {
            Pretraining::Retromae => "",
            Pretraining::Dupmae => "--objective dupmae ",
        }
    }

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Pretraining::Retromae => "retromae",
            Pretraining::Dupmae => "dupmae",
        }
    }
}

/// What a demo runs: all of it, or a short form for tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Not shortened: the figures must be those of models that have learned something.
    pub whole: bool,
    /// Texts unpacked.
    pub texts: usize,
    /// Texts of those held out from pre-training.
    pub held_out: u64,
    /// Steps of pre-training.
    pub steps: u64,
    /// Steps of fine-tuning.
    pub tuning: u64,
    /// Queries of a step of fine-tuning.
    pub queries: u32,
}

impl Size {
    /// About a minute on two cores.
    pub const WHOLE: Size = Size { whole: true, texts: 4000, held_out: 200, steps: 1200, tuning: 340, queries: 64 };

    /// As the user asked for it.
    pub fn new(steps: Option<u64>) -> Size {
        let short = |n| Size { whole: false, texts: 300, held_out: 60, steps: n, tuning: n, queries: 16 };
        steps.map_or(Size::WHOLE, short)
    }
}

/// The encoders that are judged, as their folders and files are named.
pub const ENCODERS: [&str; 3] = ["untrained", "pre-trained", "fine-tuned"];
/// The run and figures beside theirs.
pub const BM25: &str = "bm25";

/// One thing the demo does: a command, perhaps with a line before it that says what for.
pub struct Step {
    pub about: &'static str,
    pub words: Vec<OsString>,
    pub done: bool,
}

/// Where the demo is, and the options of its own that its commands get, too.
pub struct Commands<'a> {
    pub dir: &'a Path,
    pub size: Size,
    pub objective: Pretraining,
    /// Options of every command.
    pub passed_on: &'a [OsString],
    /// Options of commands that compute.
    pub hardware: &'a [OsString],
}

impl Commands<'_> {
    /// All steps.
    pub fn steps(&self) -> Vec<Step> {
        let mut steps = self.pre_training();
        steps.extend(self.fine_tuning());
        let models = ["untrained/model", "run/model", "retriever/model"];
        let about = [
            "How well does each encoder find the passage of a query that no training saw? The untrained one first",
            "The pre-trained one, not fine-tuned",
            "The fine-tuned one; it brings its own pooling and normalisation",
        ];
        for ((name, model), about) in ENCODERS.into_iter().zip(models).zip(about) {
            steps.extend(self.judging(name, model, about));
        }
        let line =
            format!("bm25 --queries @dev-queries.jsonl --corpus @corpus.jsonl --top-k 100 --output @{BM25}.trec");
        steps.push(self.line("BM25 beside them", &line, false));
        steps.push(self.evaluate(BM25));
        steps.push(self.line("Is everything on the disk as it was written?", "verify @shards @run @retriever", false));
        steps
    }

    fn pre_training(&self) -> Vec<Step> {
        let size = self.size;
        let every = (size.steps / 6).max(20);
        vec![
            self.tokenize("Text to token shards", "corpus.jsonl", "shards", 64, false),
            self.line(
                match self.objective {
                    Pretraining::Retromae => "Pre-training from random weights, with RetroMAE's objective",
                    Pretraining::Dupmae => "Pre-training from random weights, with DupMAE's objective",
                },
                &format!(
                    "train {}--config-file @config.json --data @shards --output @run --steps {} --batch-size 8 \
                     --learning-rate 1.5e-3 --eval-size {} --eval-every {every} --save-every {every} --log-every 50",
                    self.objective.words(),
                    size.steps,
                    size.held_out
                ),
                true,
            ),
        ]
    }

    fn fine_tuning(&self) -> Vec<Step> {
        let size = self.size;
        vec![
            self.tokenize("Queries and their passages", "train-queries.jsonl", "train-queries", 32, true),
            self.tokenize("", "dev-queries.jsonl", "dev-queries", 32, true),
            self.tokenize("", "corpus.jsonl", "passages", 64, true),
            self.line(
                "Fine-tuning: a query's passage against those of the other queries beside it",
                &format!(
                    "train --objective contrastive --model @run/model --queries @train-queries --corpus @passages \
                     --qrels @train-qrels.tsv --dev-queries @dev-queries --dev-qrels @dev-qrels.tsv --output @retriever \
                     --pooling mean --normalize --temperature 0.05 --batch-size {} --learning-rate 3e-3 --steps {} \
                     --eval-every 0 --keep-best false --save-every {} --log-every 50",
                    size.queries,
                    size.tuning,
                    (size.tuning / 4).max(20)
                ),
                true,
            ),
            self.line(
                "To compare with: the random weights that pre-training began with, by one step too small to change them",
                &format!(
                    "train {}--config-file @config.json --data @shards --output @untrained --steps 1 \
                     --batch-size 1 --learning-rate 1e-30 --eval-size 0",
                    self.objective.words()
                ),
                true,
            ),
        ]
    }

    /// Encode, search, evaluate. A model that is no bi-encoder yet is used as the fine-tuned one is.
    fn judging(&self, name: &str, model: &str, about: &'static str) -> Vec<Step> {
        let plain = if model.starts_with("retriever") { "" } else { " --pooling mean --normalize" };
        let encode = |about, kind: &str, input: &str| {
            let output = format!("@embeddings/{name}/{input}");
            let line = format!("encode --model @{model} --kind {kind} --input @{input} --output {output}{plain}");
            self.line(about, &line, true)
        };
        let lists = format!(
            "search --queries @embeddings/{name}/dev-queries --corpus @embeddings/{name}/passages --top-k 100 \
             --output @{name}.trec"
        );
        vec![
            encode(about, "passage", "passages"),
            encode("", "query", "dev-queries"),
            self.line("", &lists, true),
            self.evaluate(name),
        ]
    }

    fn evaluate(&self, name: &str) -> Step {
        let metrics = super::ranking::METRICS.join(",");
        let line =
            format!("evaluate --run @{name}.trec --qrels @dev-qrels.tsv --metrics {metrics} --json @{name}.json");
        self.line("", &line, false)
    }

    fn tokenize(&self, about: &'static str, input: &str, output: &str, length: u32, keep: bool) -> Step {
        let mut line =
            format!("tokenize --input @{input} --tokenizer @vocab.txt --output @{output} --max-length {length}");
        if keep {
            line += " --keep-duplicates";
        }
        Step { done: ShardSet::is_set(&self.dir.join(output)), ..self.line(about, &line, false) }
    }

    /// A command of words without blanks; one that begins with @ is in the demo's folder.
    fn line(&self, about: &'static str, line: &str, computes: bool) -> Step {
        let word = |part: &str| match part.strip_prefix('@') {
            Some(name) => self.dir.join(name).into_os_string(),
            None => part.into(),
        };
        let hardware = if computes { self.hardware } else { &[] };
        let words = line.split(' ').map(word).chain(hardware.iter().cloned()).chain(self.passed_on.iter().cloned());
        Step { about, words: words.collect(), done: false }
    }
}
