//! A small world for fine-tuning: twenty-four queries, forty passages, and what belongs to what.

#[path = "pair_files.rs"]
mod pair_files;

use std::path::PathBuf;
use std::process::{Command, Output};

use crate::world::{BINARY, World, stderr};

/// A [`World`] with pairs.
pub struct PairWorld {
    world: World,
}

impl PairWorld {
    /// Query `q<i>` is answered by passage `p<i>`, which holds its words among others; passages from `p24` on answer none. Each query has
    /// six negatives, and each of its passages a score.
    pub fn new() -> PairWorld {
        let world = World::new();
        pair_files::write(&world.path(""));
        let made = PairWorld { world };
        made.tokenize("queries.tsv", "tokenizer", "queries");
        made.tokenize("passages.tsv", "tokenizer", "passages");
        made
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.world.path(name)
    }

    /// `tokenize`.
    pub fn tokenize(&self, input: &str, tokenizer: &str, output: &str) {
        let mut command = Command::new(BINARY);
        command.args(["tokenize", "--max-length", "32", "--input"]).arg(self.path(input));
        command.arg("--tokenizer").arg(self.path(tokenizer)).arg("--output").arg(self.path(output));
        let made = command.output().unwrap();
        assert!(made.status.success(), "{}", stderr(&made));
    }

    /// `train` of `objective` into `out`, from scratch, on the CPU unless `RETROMAE_DEVICE` names another device. A word beginning with
    /// `@` names a file of this world.
    pub fn train(&self, objective: &str, out: &str, more: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command.args(["train", "--objective", objective, "--threads", "1", "--log-every", "1", "--save-every", "4"]);
        for (flag, value) in [("--learning-rate", "5e-3"), ("--batch-size", "6"), ("--eval-every", "4")] {
            if !more.contains(&flag) {
                command.args([flag, value]);
            }
        }
        if !more.contains(&"--device") {
            command.arg("--device").arg(std::env::var("RETROMAE_DEVICE").unwrap_or_else(|_| "cpu".into()));
        }
        if !more.contains(&"--model") {
            command.arg("--config-file").arg(self.path("config.json"));
        }
        if !more.contains(&"--data") {
            for (flag, name) in [("--queries", "queries"), ("--corpus", "passages"), ("--qrels", "qrels.tsv")] {
                if !more.contains(&flag) {
                    command.arg(flag).arg(self.path(name));
                }
            }
        }
        for word in more {
            match word.strip_prefix('@') {
                Some(name) => command.arg(self.path(name)),
                None => command.arg(word),
            };
        }
        if !more.contains(&"--epochs") && !more.contains(&"--steps") {
            command.args(["--steps", "12"]);
        }
        command.arg("--output").arg(self.path(out));
        command
    }

    /// Another command of the engine, whose words that begin with `@` name files of this world.
    #[track_caller]
    pub fn command(&self, words: &[&str]) {
        let mut command = Command::new(BINARY);
        for word in words {
            match word.strip_prefix('@') {
                Some(name) => command.arg(self.path(name)),
                None => command.arg(word),
            };
        }
        let done = command.output().unwrap();
        assert!(done.status.success(), "{}", stderr(&done));
    }

    /// A finished run.
    #[track_caller]
    pub fn trained(&self, objective: &str, out: &str, more: &[&str]) -> Output {
        let done = self.train(objective, out, more).output().unwrap();
        assert!(done.status.success(), "{}", stderr(&done));
        done
    }
}

/// The flags of a dev set that is the training set.
pub const DEV: [&str; 4] = ["--dev-queries", "@queries", "--dev-qrels", "@qrels.tsv"];
