//! Runs for these tests: one of the real engine, and metrics written by hand where a real run would take too long.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::world::{BINARY, World, stderr};

/// A folder for the test.
pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// A run of 16 steps that was stopped at step 8 and went on, in `out`.
pub fn resumed(world: &World, out: &str, more: &[&str]) -> PathBuf {
    for steps in [&["--steps", "8"][..], &["--steps", "16", "--override", "steps", "--override", "warmup-steps"]] {
        let done = world.train(out, &[more, steps].concat()).output().unwrap();
        assert!(done.status.success(), "{}", stderr(&done));
    }
    world.path(out)
}

/// `retromae-engine` with these arguments.
pub fn engine(arguments: &[&str]) -> Output {
    Command::new(BINARY).args(arguments).output().unwrap()
}

/// A page of `runs`.
pub fn page(runs: &[&Path], more: &[&str]) -> String {
    let dir = folder();
    let output = dir.path().join("page.html");
    let mut command = Command::new(BINARY);
    command.arg("report").args(runs).arg("--output").arg(&output).args(more);
    let done = command.output().unwrap();
    assert!(done.status.success(), "{}", stderr(&done));
    std::fs::read_to_string(output).unwrap()
}

/// The page as XML, which it is besides being HTML: a tag that is not closed, or a name that is no entity, fails.
pub fn parsed(page: &str) -> roxmltree::Document<'_> {
    let options = roxmltree::ParsingOptions { allow_dtd: true, ..roxmltree::ParsingOptions::default() };
    roxmltree::Document::parse_with_options(page, options).unwrap()
}

/// A folder with these metrics and settings.
pub fn written(dir: &Path, metrics: &str, settings: &str) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("metrics.jsonl"), metrics).unwrap();
    std::fs::write(dir.join("run.toml"), settings).unwrap();
}

/// Metrics of `steps` logged steps whose loss at each is `loss`, at a thousand tokens a step and a second.
pub fn metrics(steps: u64, loss: impl Fn(u64) -> f64) -> String {
    let mut out = String::new();
    for step in 1..=steps {
        let x = loss(step);
        let line = serde_json::json!({
            "ts": 1_795_854_519 + step, "step": step, "epoch": 0.5, "split": "train", "tokens": 1000 * step, "loss": x, "loss_enc": x,
            "loss_dec": x, "acc_enc": 0.25, "lr": 0.001, "grad_norm": x, "skipped": false, "loss_bits": "00", "tps": 1000.0, "mem_gib": 0.5,
        });
        writeln!(out, "{line}").unwrap();
    }
    out
}
