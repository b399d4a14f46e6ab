//! The dev set of a run on many ranks: rank 0 judges it, all ranks know the figures, and stop together when they are no longer better.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;

use crate::pair_world::{DEV, PairWorld};
use crate::runs::{assert_same_bits, assert_same_training, metrics};

const NAMES: [&str; 3] = ["mrr@10", "ndcg@10", "recall@100"];
/// Of equal texts and of models that differ by rounding: how far apart two scores are, as a part of their size.
const ROUNDING: f64 = 1e-6;

/// The figures of every evaluation.
fn judged(out: &Path) -> Vec<[f64; 3]> {
    let all = metrics(out).into_iter().filter(|line| line["split"] == "eval");
    all.map(|line| NAMES.map(|name| line[name].as_f64().unwrap())).collect()
}

/// A run that evaluates every other step.
fn run(world: &PairWorld, out: &str, own: &[&str]) -> std::path::PathBuf {
    let more = [&["--eval-every", "2", "--patience", "2", "--eval-size", "4", "--batch-size", "3"], own, &DEV].concat();
    world.trained("contrastive", out, &more);
    world.command(&["verify", &format!("@{out}")]);
    world.path(out)
}

#[test]
fn a_dev_set_is_judged_once_for_all_ranks() {
    let world = PairWorld::new();
    // Weights of the usual size leave a model of one layer with all but equal embeddings of all texts; of these they differ.
    let config = std::fs::read_to_string(world.path("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["initializer_range"] = 0.2.into();
    std::fs::write(world.path("config.json"), config.to_string()).unwrap();
    let alone = run(&world, "alone", &["--accumulate", "2"]);
    let two = run(&world, "two", &["--ranks", "2"]);
    assert_same_training(&two, &alone, &[]);
    assert_eq!(judged(&two), judged(&alone));
    assert_eq!(judged(&two).len(), 7);
    let again = run(&world, "again", &["--ranks", "2"]);
    assert_same_bits(&again, &two);
}

/// The rows of a folder of embeddings, in f64.
fn rows(folder: &Path) -> Vec<Vec<f64>> {
    let bytes = std::fs::read(folder.join("embeddings-00000.npy")).unwrap();
    let head = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let floats: Vec<f64> =
        bytes[head..].chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect();
    floats.chunks_exact(64).map(<[f64]>::to_vec).collect()
}

/// What the newest checkpoint of a run finds.
struct Found {
    /// Scores of each query with each passage, by their numbers.
    scores: Vec<Vec<f64>>,
    /// The place of each passage on each query's list.
    places: Vec<HashMap<usize, usize>>,
    /// What `evaluate` says of it.
    figures: [f64; 3],
}

fn found(world: &PairWorld, out: &str) -> Found {
    let at = |what: &str| format!("@{out}-{what}");
    world.command(&["export", "--run", &format!("@{out}"), "--output", &at("model")]);
    for (kind, input) in [("query", "@queries"), ("passage", "@passages")] {
        let encode = ["encode", "--device", "cpu", "--threads", "1", "--kind", kind, "--input", input];
        world.command(&[&encode[..], &["--model", &at("model"), "--output", &at(kind)]].concat());
    }
    let search = ["search", "--device", "cpu", "--top-k", "40", "--queries", &at("query"), "--corpus", &at("passage")];
    world.command(&[&search[..], &["--output", &at("run")]].concat());
    world.command(&["evaluate", "--run", &at("run"), "--qrels", "@qrels.tsv", "--json", &at("figures")]);
    let read = |what: &str| std::fs::read_to_string(world.path(&at(what)[1..])).unwrap();
    let figures: Value = serde_json::from_str(&read("figures")).unwrap();
    let [queries, passages] = ["query", "passage"].map(|kind| rows(&world.path(&at(kind)[1..])));
    let dot = |q: &[f64], p: &[f64]| q.iter().zip(p).map(|(a, b)| a * b).sum();
    let mut places = vec![HashMap::new(); queries.len()];
    for line in read("run").lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |word: &str| word[1..].parse::<usize>().unwrap();
        places[number(words[0])].insert(number(words[2]), number(&format!("r{}", words[3])));
    }
    Found {
        scores: queries.iter().map(|q| passages.iter().map(|p| dot(q, p)).collect()).collect(),
        places,
        figures: NAMES.map(|name| figures[name].as_f64().unwrap()),
    }
}

/// A model that gives all texts all but the same embedding has figures that hang on rounding, so those of one rank and of two differ. They
/// are the figures of its own lists nevertheless, and the lists differ in nothing but the order of passages whose scores rounding
/// changes.
#[test]
fn figures_of_ranks_differ_by_near_ties_alone() {
    let world = PairWorld::new();
    let alone = run(&world, "alone", &["--accumulate", "2"]);
    let two = run(&world, "two", &["--ranks", "2"]);
    assert_same_training(&two, &alone, &[]);
    assert_eq!(judged(&two)[0], judged(&alone)[0], "before the first step nothing is rounded");
    // Twelve steps would be seven evaluations; two without a better one end the run.
    assert!(judged(&two).len() < 7 && judged(&two).len() == judged(&alone).len());
    let [one, other] = ["alone", "two"].map(|out| found(&world, out));
    for (found, out) in [(&one, &alone), (&other, &two)] {
        let last = judged(out).pop().unwrap();
        assert!(found.figures.iter().zip(last).all(|(a, b)| (a - b).abs() < 1e-12), "{:?} {last:?}", found.figures);
    }
    for (query, (a, b)) in one.scores.iter().zip(&other.scores).enumerate() {
        assert_eq!((a.len(), one.places[query].len(), other.places[query].len()), (40, 40, 40));
        for i in 0..a.len() {
            assert!((a[i] - b[i]).abs() < ROUNDING * a[i].abs(), "q{query} p{i}: {} {}", a[i], b[i]);
            for j in 0..i {
                let order = |found: &Found| found.places[query][&i] < found.places[query][&j];
                let apart = (a[i] - a[j]).abs();
                assert!(order(&one) == order(&other) || apart < ROUNDING * a[i].abs(), "q{query} p{i} p{j}: {apart}");
            }
        }
    }
}
