//! A small world for the binary: forty short texts, tokenized, and a one-layer model.

use std::path::PathBuf;
use std::process::{Command, Output};

/// The program.
pub const BINARY: &str = env!("CARGO_BIN_EXE_retromae-engine");
const WORDS: [&str; 24] = [
    "the", "package", "library", "file", "of", "and", "a", "network", "server", "client", "tool", "for", "shell",
    "data", "text", "image", "module", "system", "kernel", "driver", "debug", "source", "build", "time",
];

/// A folder with texts, their shards and a model's configuration.
pub struct World {
    dir: tempfile::TempDir,
}

impl World {
    /// Forty short texts, tokenized; a one-layer model's configuration.
    pub fn new() -> World {
        let world = World { dir: crate::toy::folder() };
        let vocabulary: Vec<&str> = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].into_iter().chain(WORDS).collect();
        std::fs::create_dir(world.path("tokenizer")).unwrap();
        std::fs::write(world.path("tokenizer/vocab.txt"), vocabulary.join("\n") + "\n").unwrap();
        let texts: Vec<String> = (0..40)
            .map(|i| (0..6 + i % 7).map(|k| WORDS[(i * i + k * 5 + i * k) % WORDS.len()]).collect::<Vec<_>>().join(" "))
            .collect();
        std::fs::write(world.path("texts.txt"), texts.join("\n") + "\n").unwrap();
        let config = serde_json::json!({
            "model_type": "bert", "vocab_size": vocabulary.len(), "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 128, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
            "max_position_embeddings": 64, "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0,
        });
        std::fs::write(world.path("config.json"), config.to_string()).unwrap();
        let made = Command::new(BINARY)
            .args(["tokenize", "--max-length", "32", "--input"])
            .arg(world.path("texts.txt"))
            .arg("--tokenizer")
            .arg(world.path("tokenizer"))
            .arg("--output")
            .arg(world.path("shards"))
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        world
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `train` into `out` for 16 steps.
    pub fn train(&self, out: &str, more: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command.args(["train", "--threads", "1", "--log-every", "1", "--eval-size", "5"]);
        for (flag, value) in
            [("--learning-rate", "1e-2"), ("--batch-size", "4"), ("--save-every", "4"), ("--eval-every", "8")]
        {
            let instead = if flag == "--batch-size" { "--tokens-per-batch" } else { flag };
            if !more.contains(&flag) && !more.contains(&instead) {
                command.args([flag, value]);
            }
        }
        command.arg("--config-file").arg(self.path("config.json"));
        // What a run computes must not depend on what the machine has.
        if !more.contains(&"--device") {
            command.args(["--device", "cpu"]);
        }
        command.arg("--data").arg(self.path("shards")).arg("--output").arg(self.path(out)).args(more);
        if !more.iter().any(|m| m.starts_with("--steps") || m.starts_with("--epochs")) {
            command.args(["--steps", "16"]);
        }
        command
    }
}

/// What a process said on standard error.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
