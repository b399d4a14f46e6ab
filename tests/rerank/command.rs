//! `rerank` through the binary: what it writes.

use std::collections::HashMap;

use retromae_engine::data::pairs::teacher;
use retromae_engine::data::source::Input;
use retromae_engine::device::{DType, Device};
use retromae_engine::graph::Capacity;

use crate::scores::{scorer, texts};
use crate::world::{PASSAGES, QUERIES, World, scored, stderr};

/// Ids of the world's texts to their numbers: `q7` is text 7.
fn number(id: &str) -> u32 {
    id[1..].parse().unwrap()
}

/// Checks that every list is in the order of the scores, and of equal scores in that of the run that was read.
fn in_order(run: &str, scores: &str) {
    let first = scored(scores);
    for q in 0..QUERIES {
        let query = format!("q{q}");
        let mut expected: Vec<(&str, f32)> =
            first.iter().filter(|(of, ..)| *of == query).map(|(_, p, score)| (p.as_str(), *score)).collect();
        expected.sort_by(|a, b| b.1.total_cmp(&a.1));
        let got: Vec<String> = scored(run).into_iter().filter(|(of, ..)| *of == query).map(|(_, p, _)| p).collect();
        assert_eq!(got, expected.iter().map(|(p, _)| p.to_string()).collect::<Vec<_>>(), "{query}");
    }
}

#[test]
fn a_run_in_the_order_of_the_scores() {
    let world = World::new();
    let run = world.reranked("out.trec", &["--scores", "scores.tsv", "--json", "facts.json", "--max-length", "48"]);
    let scores = std::fs::read_to_string(world.path("scores.tsv")).unwrap();
    assert_eq!((run.lines().count(), scores.lines().count()), (QUERIES * PASSAGES, QUERIES * PASSAGES));
    assert!(run.starts_with("q0 Q0 ") && run.lines().next().unwrap().ends_with(" retromae-engine"));
    in_order(&run, &scores);
    assert_eq!(world.hidden(), Vec::<String>::new());

    // Every score is that of the pair alone, to the last bit, and reads as a teacher's.
    let texts = texts(&world, 48);
    let capacity = Capacity { tokens: 48, sequences: 1, length: 48, encoder_labels: 0 };
    let mut scorer = scorer(&world.path("model"), Device::Cpu, DType::F32, capacity);
    let mut by_pair = HashMap::new();
    for (query, passage, score) in scored(&scores) {
        let alone = scorer.scores(&texts.pack(&[(0, number(&query), number(&passage))]).unwrap()).unwrap()[0];
        assert_eq!(alone.to_bits(), score.to_bits(), "{query} {passage}");
        by_pair.insert((query, passage), score);
    }
    let mut taught = 0;
    teacher::read(&Input { path: world.path("scores.tsv"), bytes: None }, |line| {
        let expected = by_pair[&(line.query.to_string(), line.passage.to_string())];
        assert_eq!(line.score.to_bits(), expected.to_bits());
        taught += 1;
        Ok(())
    })
    .unwrap();
    assert_eq!(taught, QUERIES * PASSAGES);

    // The first and the last passage have one text and so one score: the order of the run stays, and TREC's scores tell it.
    let lines = scored(&run);
    for q in 0..QUERIES {
        let query = format!("q{q}");
        assert_eq!(by_pair[&(query.clone(), "p0".into())], by_pair[&(query.clone(), format!("p{}", PASSAGES - 1))]);
    }
    assert!(lines.windows(2).all(|two| two[0].0 != two[1].0 || two[0].2 > two[1].2), "scores fall strictly");
    let facts: serde_json::Value = serde_json::from_slice(&std::fs::read(world.path("facts.json")).unwrap()).unwrap();
    assert!(facts["nudged"].as_u64().unwrap() >= QUERIES as u64, "{facts}");
    assert_eq!((facts["pairs"].as_u64(), facts["resumed"].as_u64()), (Some((QUERIES * PASSAGES) as u64), Some(0)));

    // Threads and the size of batches change no bit.
    let again = world.reranked("again", &["--threads", "3", "--tokens-per-batch", "300", "--max-length", "48"]);
    assert_eq!(again, run);
}

#[test]
fn formats_depths_and_pairs() {
    let world = World::new();
    let all = scored(&world.reranked("all.tsv", &["--format", "tevatron", "--scores", "scores.tsv"]));
    let scores = std::fs::read_to_string(world.path("scores.tsv")).unwrap();

    // The first five of each list only, in other formats; the scores are the same.
    let top = world.reranked("top.tsv", &["--format", "tevatron", "--top-k", "5", "--scores", "top-scores.tsv"]);
    let top_scores = std::fs::read_to_string(world.path("top-scores.tsv")).unwrap();
    assert_eq!((scored(&top).len(), top_scores.lines().count()), (5 * QUERIES, 5 * QUERIES));
    in_order(&top, &top_scores);
    assert!(top_scores.lines().all(|line| scores.lines().any(|other| other == line)));
    let ranking = world.reranked("ranking", &["--format", "msmarco", "--top-k", "5"]);
    for (i, line) in ranking.lines().enumerate() {
        let (query, passage, _) = &scored(&top)[i];
        assert_eq!(line, format!("{query}\t{passage}\t{}", i % 5 + 1));
    }
    let tagged = world.reranked("tagged", &["--tag", "mine", "--top-k", "1"]);
    assert!(tagged.lines().all(|line| line.ends_with(" mine")));

    // Each output is an input, and the pairs of a file are scored as those of a run.
    for (input, format) in [("all.tsv", "tevatron"), ("ranking", "msmarco")] {
        let out = format!("from-{input}");
        let from = world.path(input);
        let again =
            world.reranked(&out, &["--run", from.to_str().unwrap(), "--run-format", format, "--format", "tevatron"]);
        let expected: Vec<_> = if input == "all.tsv" { all.clone() } else { scored(&top) };
        assert_eq!(
            scored(&again).iter().map(|l| (&l.0, &l.1)).collect::<Vec<_>>(),
            expected.iter().map(|l| (&l.0, &l.1)).collect::<Vec<_>>()
        );
    }
    let pairs: String = scored(&scores).iter().map(|(q, p, _)| format!("{q}\t{p}\tmore\n")).collect();
    std::fs::write(world.path("pairs.tsv"), pairs).unwrap();
    world.reranked("from-pairs", &["--pairs", "pairs.tsv", "--scores", "pair-scores.tsv"]);
    assert_eq!(std::fs::read_to_string(world.path("pair-scores.tsv")).unwrap(), scores);
}

/// Prefixes are tokens of the pair: another function, and the same as texts that begin with these words.
#[test]
fn prefixes() {
    let world = World::new();
    let plain = world.reranked("plain", &[]);
    let with = world.reranked("with", &["--query-prefix", "word1 word2", "--passage-prefix", "word3"]);
    assert_ne!(scored(&plain), scored(&with));
    for (name, prefix) in [("queries", "word1 word2 "), ("passages", "word3 ")] {
        let text = std::fs::read_to_string(world.path(&format!("{name}.tsv"))).unwrap();
        std::fs::write(world.path(&format!("long-{name}.tsv")), text.replace('\t', &format!("\t{prefix}"))).unwrap();
        world.tokenize(&format!("long-{name}"), &format!("long-{name}"), "model");
    }
    let same = world.reranked("same", &["--queries", "long-queries", "--corpus", "long-passages"]);
    assert_eq!(same, with);
}

/// The emulated GPU, or with `RETROMAE_DEVICE=cuda` a real one, gives the CPU's scores.
#[test]
fn a_gpu_gives_the_same_scores() {
    let world = World::new();
    let device = std::env::var("RETROMAE_DEVICE").unwrap_or_else(|_| "emulator".into());
    let read = |name: &str| scored(&std::fs::read_to_string(world.path(name)).unwrap());
    let common = ["--top-k", "9", "--tokens-per-batch", "512"];
    world.reranked("cpu", &[&common[..], &["--scores", "cpu.tsv"]].concat());
    let on = ["--scores", "gpu.tsv", "--device", &device, "--precision", "fp32"];
    world.reranked("gpu", &[&common[..], &on].concat());
    let size = read("cpu.tsv").iter().map(|l| f64::from(l.2).powi(2)).sum::<f64>().sqrt();
    let off =
        read("cpu.tsv").iter().zip(read("gpu.tsv")).map(|(a, b)| f64::from(a.2 - b.2).powi(2)).sum::<f64>().sqrt();
    assert!(off <= 1e-5 * size, "error {:.1e}", off / size);
    // Fewer lines than a batch has room for, and the usual precision there.
    let done = world.rerank("half", &[&common[..], &["--device", &device]].concat()).output().unwrap();
    assert!(done.status.success(), "{}", stderr(&done));
}
