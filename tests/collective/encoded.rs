//! Embeddings by parts: each process has its own texts, and a search over the parts is one over the whole.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use crate::failures::{rank, started};
use crate::runs::good;
use crate::support::free_port;
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

    // Several ranks that this program starts; and two that have their own folders only.
    let begin = |queries: &str, corpus: &[PathBuf], name: &str| {
        let mut command = Command::new(BINARY);
        command.args(["search", "-q", "--device", "cpu", "--top-k", "40", "--collective-timeout", "1", "--queries"]);
        command.arg(world.path(queries)).arg("--corpus").args(corpus).arg("--output").arg(world.path(name));
        command
    };
    for ranks in ["2", "3"] {
        let name = format!("by-{ranks}.trec");
        good(begin("whole", &parts, &name).args(["--ranks", ranks]));
        assert_eq!(std::fs::read_to_string(world.path(&name)).unwrap(), whole);
    }
    let dealt: Vec<PathBuf> = (0..3).map(|i| PathBuf::from(format!("part{i}"))).collect();
    for (machine, own) in [("a", &[0, 2][..]), ("b", &[1])] {
        std::fs::create_dir(world.path(machine)).unwrap();
        own.iter().for_each(|i| {
            std::os::unix::fs::symlink(&parts[*i], world.path(machine).join(format!("part{i}"))).unwrap();
        });
    }
    let both = |queries: [&str; 2], folders: usize, name: &str| {
        let port = free_port();
        let start = |i: usize| {
            let mut command = rank(begin(queries[i], &dealt[..[3, folders][i]], name), i, 2, port);
            started(command.current_dir(world.path(["a", "b"][i])))
        };
        [0, 1].map(start).map(|child| child.wait_with_output().unwrap())
    };
    let done = both(["whole", "whole"], 3, "machines.trec");
    assert!(done.iter().all(|one| one.status.success()), "{}{}", stderr(&done[0]), stderr(&done[1]));
    assert_eq!(std::fs::read_to_string(world.path("machines.trec")).unwrap(), whole);
    assert!(done[1].stdout.is_empty(), "rank 0 alone reports");
    let other_queries = both(["whole", "part0"], 3, "none.trec");
    let other_folders = both(["whole", "whole"], 2, "none.trec");
    for one in other_queries.into_iter().chain(other_folders) {
        let line = stderr(&one);
        assert!(line.contains(": queries of rank ") && line.lines().count() == 1, "{line}");
        assert!(line.starts_with("error: rank ") && one.status.code() == Some(1), "{line}");
    }
    let few = begin("whole", &parts, "none.trec").args(["--ranks", "4"]).output().unwrap();
    assert_eq!(few.status.code(), Some(2));
    let folders = "error: 4 ranks, and 3 folders of the corpus; encode the corpus in parts (encode --shard I/4), or use at most 3 ranks";
    assert_eq!(stderr(&few).trim_end(), folders);
    assert!(!world.path("none.trec").exists());

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

/// Scores of a run by query, best first: `query passage score`.
fn lists(text: &str) -> BTreeMap<String, Vec<(String, f64)>> {
    let mut all: BTreeMap<String, Vec<(String, f64)>> = BTreeMap::new();
    for line in text.lines() {
        let [query, passage, score] = line.split_whitespace().collect::<Vec<_>>()[..] else { panic!("{line}") };
        all.entry(query.into()).or_default().push((passage.into(), score.parse().unwrap()));
    }
    all
}

/// A distributed engine takes the parts as they are: faiss's shards find what `search` finds.
#[test]
fn faiss_shards_find_what_search_finds() {
    let python = std::env::var("RETROMAE_PYTHON").unwrap_or_else(|_| "python3".into());
    if !Command::new(&python).args(["-c", "import faiss"]).output().is_ok_and(|done| done.status.success()) {
        eprintln!("left out: no Python with faiss-cpu (set RETROMAE_PYTHON)");
        return;
    }
    let world = World::new();
    // Of smaller weights all embeddings of this model are all but equal.
    let config = std::fs::read_to_string(world.path("config.json")).unwrap();
    let larger = config.replace(r#""initializer_range":0.02"#, r#""initializer_range":0.2"#);
    assert_ne!(larger, config);
    std::fs::write(world.path("config.json"), larger).unwrap();
    good(&mut world.train("out", &["--steps", "2"]));
    let encode = |output: &str, more: &[&str]| {
        let mut command = Command::new(BINARY);
        command.args(["encode", "--device", "cpu", "--threads", "1", "--format", "faiss-flat", "--input"]);
        command.arg(world.path("shards")).arg("--model").arg(world.path("out/model"));
        good(command.arg("--output").arg(world.path(output)).args(more));
        world.path(output)
    };
    let whole = encode("whole", &[]);
    let parts: Vec<PathBuf> = (0..3).map(|i| encode(&format!("part{i}"), &["--shard", &format!("{i}/3")])).collect();
    let mut search = Command::new(BINARY);
    search.args(["search", "--device", "cpu", "--top-k", "40", "--format", "tevatron", "--queries"]).arg(&whole);
    good(search.arg("--corpus").args(&parts).arg("--output").arg(world.path("run.tsv")));
    let ours = lists(&std::fs::read_to_string(world.path("run.tsv")).unwrap());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/faiss_shards.py");
    let theirs = good(Command::new(&python).arg(script).arg(&whole).arg("10").args(&parts));
    let theirs = lists(&String::from_utf8_lossy(&theirs.stdout));
    assert_eq!((ours.len(), theirs.len()), (40, 40));
    for (query, found) in &theirs {
        let own = &ours[query];
        assert_eq!((own.len(), found.len()), (40, 10));
        for ((passage, score), (expected, best)) in found.iter().zip(own) {
            // Where faiss has another passage in a place, its score by `search` is that of the place up to rounding.
            let known = own.iter().find(|(name, _)| name == passage).unwrap().1;
            let close = |a: f64| (a - best).abs() <= 1e-6 * best.abs();
            assert!(close(*score) && close(known), "{query}: {passage} {score} {known}, {expected} {best}");
        }
    }
}
