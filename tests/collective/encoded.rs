//! Embeddings by parts: each process has its own texts, and a search over the parts is one over the whole.

use std::path::PathBuf;
use std::process::Command;

use crate::runs::good;
use crate::world::{BINARY, World, stderr};

#[test]
fn a_search_over_parts_is_one_over_the_whole() {
    let world = World::new();
    good(&mut world.train("out", &["--steps", "2"]));
    let encode = |output: &str, more: &[&str]| {
        let mut command = Command::new(BINARY);
        command.args(["encode", "--device", "cpu", "--threads", "1", "--input"]).arg(world.path("shards"));
        command.arg("--model").arg(world.path("out/model")).arg("--output").arg(world.path(output)).args(more);
        command
    };
    good(&mut encode("whole", &[]));
    let parts: Vec<PathBuf> = (0..3).map(|i| world.path(&format!("part{i}"))).collect();
    for i in 0..3 {
        good(&mut encode(&format!("part{i}"), &["--shard", &format!("{i}/3")]));
    }
    // As a launcher's processes.
    for rank in 0..3 {
        let mut command = encode("ranks", &["--shard", "rank"]);
        command.env("RANK", rank.to_string()).env("WORLD_SIZE", "3").env("LOCAL_RANK", "0").env("MASTER_ADDR", "x");
        good(&mut command);
    }
    let of_ranks: Vec<PathBuf> = (0..3).map(|i| world.path(&format!("ranks/part-000{i}-of-0003"))).collect();
    let search = |corpus: &[PathBuf], name: &str| {
        let mut command = Command::new(BINARY);
        command.args(["search", "--device", "cpu", "--top-k", "40", "--queries"]).arg(world.path("whole"));
        good(command.arg("--corpus").args(corpus).arg("--output").arg(world.path(name)));
        std::fs::read_to_string(world.path(name)).unwrap()
    };
    let whole = search(&[world.path("whole")], "whole.trec");
    assert_eq!(whole.lines().count(), 40 * 40);
    assert_eq!(search(&parts, "parts.trec"), whole);
    assert_eq!(search(&of_ranks, "ranks.trec"), whole);

    // Again there is nothing to do; another part is another input.
    let again = good(&mut encode("part1", &["--shard", "1/3"]));
    assert!(String::from_utf8_lossy(&again.stdout).contains("resumed"));
    let refused = |command: &mut Command| {
        let done = command.output().unwrap();
        assert!(!done.status.success());
        stderr(&done)
    };
    assert!(refused(&mut encode("part1", &["--shard", "2/3"])).contains("another input"));
    assert_eq!(
        refused(&mut encode("none", &["--shard", "0/41"])).trim_end(),
        "error: --shard 0/41: there are 40 texts; use fewer shards"
    );
    assert!(!world.path("none").exists());
    assert!(refused(&mut encode("none", &["--shard", "3/3"])).contains("give I/N with I from 0 to N - 1, or rank"));
    let mut raw = Command::new(BINARY);
    raw.args(["encode", "--device", "cpu", "--shard", "0/2", "--input"]).arg(world.path("texts.txt"));
    raw.arg("--model").arg(world.path("out/model")).arg("--output").arg(world.path("raw"));
    assert!(
        refused(&mut raw)
            .starts_with("error: --shard: of raw text nobody knows where its parts begin; tokenize it first")
    );
}
