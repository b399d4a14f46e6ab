//! A small world for the binary: forty short texts, tokenized, and a one-layer model.

#[path = "texts.rs"]
mod texts;

use std::path::PathBuf;
use std::process::{Command, Output};

/// The program.
pub const BINARY: &str = env!("CARGO_BIN_EXE_retromae-engine");

/// A folder with texts, their shards and a model's configuration.
pub struct World {
    dir: tempfile::TempDir,
}

impl World {
    /// Forty short texts, tokenized; a one-layer model's configuration.
    pub fn new() -> World {
        let world = World { dir: crate::toy::folder() };
        texts::write(world.dir.path());
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
