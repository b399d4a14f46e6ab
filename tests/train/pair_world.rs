//! A small world for fine-tuning: twenty-four queries, forty passages, and what belongs to what.

use std::path::PathBuf;
use std::process::{Command, Output};

use crate::world::{BINARY, World, stderr};

/// Words of a query and of the passage that answers it.
fn words(i: usize) -> [usize; 3] {
    [i % 24, (i * 7 + 3) % 24, (i * 11 + 5) % 24]
}

/// A [`World`] with pairs.
pub struct PairWorld {
    world: World,
}

impl PairWorld {
    /// Query `q<i>` is answered by passage `p<i>`, which holds its words among others; passages from `p24` on answer none. Each query has
    /// six negatives, and each of its passages a score.
    pub fn new() -> PairWorld {
        let world = World::new();
        let vocabulary = std::fs::read_to_string(world.path("tokenizer/vocab.txt")).unwrap();
        let vocabulary: Vec<&str> = vocabulary.lines().skip(5).collect();
        let text = |words: &[usize]| words.iter().map(|w| vocabulary[w % 24]).collect::<Vec<_>>().join(" ");
        let queries: String = (0..24).map(|i| format!("q{i}\t{}\n", text(&words(i)))).collect();
        let passage = |i: usize| {
            let [a, b, c] = words(i);
            text(&[i * 5 + 1, a, b, i * 3, c, a + i % 4])
        };
        let passages: String = (0..40).map(|i| format!("p{i}\t{}\n", passage(i))).collect();
        let qrels: String = (0..24).map(|i| format!("q{i}\tp{i}\n")).collect();
        let lists = |i: usize| (1..7).map(|k| (i + k * 5) % 40).filter(|&n| n != i).collect::<Vec<_>>();
        let ids = |list: Vec<usize>| list.iter().map(|n| format!("p{n}")).collect::<Vec<_>>().join(",");
        let negatives: String = (0..24).map(|i| format!("q{i}\t{}\n", ids(lists(i)))).collect();
        let score = |i: usize, p: usize| format!("q{i}\tp{p}\t[{}]\n", if p == i { 4.0 } else { -0.25 * p as f64 });
        let scores: String = (0..24)
            .flat_map(|i| std::iter::once(i).chain(lists(i)).map(move |p| score(i, p)).collect::<Vec<_>>())
            .collect();
        let run: String = (0..24)
            .flat_map(|i| {
                let list: Vec<usize> = lists(i).into_iter().take(4).chain([i]).collect();
                let line = move |(rank, p): (usize, &usize)| format!("q{i} Q0 p{p} {} {} x\n", rank + 1, 9 - rank);
                list.iter().enumerate().map(line).collect::<Vec<_>>()
            })
            .collect();
        let made = PairWorld { world };
        for (name, contents) in [
            ("queries.tsv", &queries),
            ("passages.tsv", &passages),
            ("qrels.tsv", &qrels),
            ("negatives.tsv", &negatives),
            ("scores.tsv", &scores),
            ("run.trec", &run),
        ] {
            std::fs::write(made.path(name), contents).unwrap();
        }
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
