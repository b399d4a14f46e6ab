//! A small world: queries and passages with ids, tokenized, a run of them, and the golden cross-encoder.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use retromae_engine::data::shard::ShardSet;

/// The program.
pub const BINARY: &str = env!("CARGO_BIN_EXE_retromae-engine");
/// Queries and passages.
pub const QUERIES: usize = 12;
pub const PASSAGES: usize = 90;

/// A file of `tests/golden/head32`.
pub fn golden(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/head32").join(relative)
}

pub struct World {
    dir: tempfile::TempDir,
}

/// The words of text `i`, `n` of them.
fn text(i: usize, n: usize) -> String {
    (0..n).map(|k| format!("word{}", (i * 31 + k * 17 + i * k) % 900)).collect::<Vec<_>>().join(" ")
}

impl World {
    /// Passages p0 … of different lengths, the last one equal to the first; queries q0 …; a TREC run that has every passage on every
    /// list, in an order of its own.
    pub fn new() -> World {
        let world = World { dir: tempfile::tempdir().unwrap() };
        let model = world.path("model");
        std::fs::create_dir(&model).unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(golden("cross_encoder/model").join(name), model.join(name)).unwrap();
        }
        let words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].map(String::from);
        let words: Vec<String> = words.into_iter().chain((0..998).map(|i| format!("word{i}"))).collect();
        std::fs::write(model.join("vocab.txt"), words.join("\n") + "\n").unwrap();
        let lines = |prefix: &str, count: usize, length: &dyn Fn(usize) -> usize| {
            (0..count).map(|i| format!("{prefix}{i}\t{}\n", text(i % (PASSAGES - 1), length(i)))).collect::<String>()
        };
        std::fs::write(world.path("queries.tsv"), lines("q", QUERIES, &|i| 2 + i % 5)).unwrap();
        let passages = lines("p", PASSAGES, &|i| 3 + (i % (PASSAGES - 1)) * 7 % 40);
        std::fs::write(world.path("passages.tsv"), passages).unwrap();
        for name in ["queries", "passages"] {
            world.tokenize(name, name, "model");
        }
        let mut run = String::new();
        for q in 0..QUERIES {
            for rank in 1..=PASSAGES {
                let p = (rank * 37 + q * 11) % PASSAGES;
                run += &format!("q{q} Q0 p{p} {rank} {:.3} first\n", 100.0 - rank as f64);
            }
        }
        std::fs::write(world.path("run.trec"), run).unwrap();
        world
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Tokenizes `from.tsv` into the set `to` with the tokenizer in a folder.
    pub fn tokenize(&self, from: &str, to: &str, tokenizer: &str) {
        let mut command = Command::new(BINARY);
        command.args(["tokenize", "--packing", "docs", "--max-length", "64", "--input"]);
        command.arg(self.path(&format!("{from}.tsv"))).arg("--tokenizer").arg(self.path(tokenizer));
        let made = command.arg("--output").arg(self.path(to)).output().unwrap();
        assert!(made.status.success(), "{}", stderr(&made));
    }

    /// A set of shards.
    pub fn set(&self, name: &str) -> Arc<ShardSet> {
        Arc::new(ShardSet::open(&self.path(name)).unwrap())
    }

    /// `rerank` of the world's run into `out`; what `more` names is not given twice.
    pub fn rerank(&self, out: &str, more: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command.args(["rerank", "--output"]).arg(self.path(out));
        for (flag, file) in
            [("--model", "model"), ("--queries", "queries"), ("--corpus", "passages"), ("--run", "run.trec")]
        {
            let given = more.contains(&flag) || (flag == "--run" && more.contains(&"--pairs"));
            if !given {
                command.arg(flag).arg(self.path(file));
            }
        }
        if !more.contains(&"--device") {
            command.args(["--device", "cpu"]);
        }
        if !more.contains(&"--threads") {
            command.args(["--threads", "1"]);
        }
        command.args(more);
        command.current_dir(self.dir.path());
        command
    }

    /// [`World::rerank`], which must succeed; the output.
    pub fn reranked(&self, out: &str, more: &[&str]) -> String {
        let done = self.rerank(out, more).output().unwrap();
        assert!(done.status.success(), "{}", stderr(&done));
        std::fs::read_to_string(self.path(out)).unwrap()
    }

    /// Names in the world's folder that begin with a dot: what is left of unfinished work.
    pub fn hidden(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with('.')).collect()
    }
}

/// What a process said on standard error.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Query, passage and score of every line.
pub fn scored(text: &str) -> Vec<(String, String, f32)> {
    let words = |line: &str| line.split_whitespace().map(String::from).collect::<Vec<_>>();
    text.lines()
        .map(words)
        .map(|w| match w.len() {
            6 => (w[0].clone(), w[2].clone(), w[4].parse().unwrap()),
            3 => (w[0].clone(), w[1].clone(), w[2].parse().unwrap()),
            n => panic!("{n} columns"),
        })
        .collect()
}
