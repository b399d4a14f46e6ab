//! Pairs that do not fit, through the command: one clear line each, counted where many; what can be left out is, and is told.

use std::process::Output;

use crate::pair_world::{DEV, PairWorld};
use crate::world::stderr;

/// A refused run: its one line, without the folder of the world.
#[track_caller]
fn refused(world: &PairWorld, objective: &str, more: &[&str]) -> String {
    let output = world.train(objective, "refused", more).output().unwrap();
    let text = stderr(&output);
    assert!(matches!(output.status.code(), Some(1 | 2)), "{text}");
    assert!(text.starts_with("error: ") && text.lines().count() == 1, "{text}");
    assert!(!world.path("refused").exists(), "what is refused at once leaves nothing");
    text.trim_end().replace(&format!("{}/", world.path("").display().to_string().trim_end_matches('/')), "")
}

fn write(world: &PairWorld, name: &str, text: &str) {
    std::fs::write(world.path(name), text).unwrap();
}

fn read(world: &PairWorld, name: &str) -> String {
    std::fs::read_to_string(world.path(name)).unwrap()
}

#[track_caller]
fn warned(output: &Output, line: &str) {
    assert!(stderr(output).lines().any(|l| l == format!("warning: {line}")), "{line}: {}", stderr(output));
}

#[test]
fn what_can_be_left_out_is_told_with_its_count() {
    let world = PairWorld::new();
    // q0 and q1 lose their positives; q2's is not in the corpus; a line names a query that does not exist; CR at line ends.
    let kept: String = read(&world, "qrels.tsv").lines().skip(3).map(|line| format!("{line}\r\n")).collect();
    write(&world, "some.tsv", &format!("q2\tp99\r\nq77\tp1\r\n{kept}"));
    // A positive among the negatives, and one that is not in the corpus.
    let negatives = read(&world, "negatives.tsv");
    write(&world, "negatives.tsv", &format!("{negatives}q5\tp5,p123\r\n"));
    let more = ["--qrels", "@some.tsv", "--negatives", "@negatives.tsv", "--steps", "1"];
    let done = world.trained("contrastive", "run", &more);
    let place = |name: &str| world.path(name).display().to_string();
    warned(&done, "3 queries have no positive and are not trained on (first: q0)");
    warned(&done, &format!("1 positive is not in the corpus; left out (first: {}:1: p99)", place("some.tsv")));
    let unknown =
        format!("1 line names a query that is not among the queries; left out (first: {}:2: q77)", place("some.tsv"));
    warned(&done, &unknown);
    warned(&done, "1 negative is a positive of its query; dropped (first: p5 of query q5)");
    let absent = format!("1 negative is not in the corpus; left out (first: {}:25: p123)", place("negatives.tsv"));
    warned(&done, &absent);
}

#[test]
fn a_teacher_without_all_scores_is_refused_or_does_without() {
    let world = PairWorld::new();
    let scores: String = read(&world, "scores.tsv").lines().skip(2).map(|line| format!("{line}\n")).collect();
    write(&world, "part.tsv", &scores);
    let more = ["--negatives", "@negatives.tsv", "--group-size", "3", "--teacher-scores", "@part.tsv"];
    let line = refused(&world, "contrastive", &more);
    assert!(line.contains("2 ") && line.contains("q0") && line.contains("p0"), "{line}");
    assert!(line.contains("--missing-teacher drop"), "{line}");
    let done =
        world.trained("contrastive", "run", &[&more[..], &["--missing-teacher", "drop", "--steps", "1"]].concat());
    assert!(stderr(&done).contains("no score of the teacher; dropped"), "{}", stderr(&done));
    write(&world, "part.tsv", &format!("{scores}q1\tp1\tgood\n"));
    let line = refused(&world, "contrastive", &more);
    assert!(line.contains("part.tsv:") && line.contains("good"), "{line}");
}

#[test]
fn groups_that_cannot_be_are_refused() {
    let world = PairWorld::new();
    let line = refused(&world, "contrastive", &["--group-size", "41"]);
    assert!(line.contains("groups of 41 passages from a corpus of 40"), "{line}");
    let line = refused(&world, "contrastive", &["--batch-size", "1"]);
    assert!(line.contains("the loss is always 0"), "{line}");
    let line = refused(&world, "cross-encoder", &["--group-size", "1"]);
    assert!(line.contains("the loss is always 0"), "{line}");
}

#[test]
fn lexical_representations_that_cannot_be_are_refused() {
    let world = PairWorld::new();
    let line = refused(&world, "contrastive", &["--representation", "lexical"]);
    assert!(line.contains("lexical is not trained alone: choose cls or both"), "{line}");
    let line = refused(&world, "contrastive", &["--lexical-top-k", "9"]);
    assert!(line.contains("lexical-top-k") && line.contains("belongs to --representation both"), "{line}");
    let line = refused(&world, "contrastive", &["--representation", "both", "--lexical-top-k", "5000"]);
    assert!(line.contains("must be between 1 and 4096"), "{line}");
    let line = refused(&world, "cross-encoder", &["--representation", "both"]);
    assert!(line.contains("representation"), "{line}");
    // A bi-encoder's model has no head any more.
    world.trained("contrastive", "bare", &["--steps", "1"]);
    let line = refused(&world, "contrastive", &["--representation", "both", "--model", "@bare/model"]);
    assert!(line.contains("bare/model/model.safetensors: holds no MLM head"), "{line}");
}

#[test]
fn texts_of_another_tokenizer_are_refused_whoever_has_it() {
    let world = PairWorld::new();
    std::fs::create_dir(world.path("other")).unwrap();
    let words = read(&world, "tokenizer/vocab.txt");
    let swapped = words.replace("library\n", "@\n").replace("package\n", "library\n").replace("@\n", "package\n");
    assert_ne!(words, swapped);
    write(&world, "other/vocab.txt", &swapped);
    world.tokenize("queries.tsv", "other", "queries-other");
    world.tokenize("passages.tsv", "other", "passages-other");
    let line = refused(&world, "contrastive", &["--queries", "@queries-other"]);
    assert!(line.contains("another tokenizer than that of queries-other"), "{line}");
    // Both alike, and the model's is another.
    world.trained("contrastive", "model", &["--steps", "1"]);
    let both = ["--queries", "@queries-other", "--corpus", "@passages-other", "--model", "@model/model"];
    let line = refused(&world, "contrastive", &both);
    assert!(line.contains("token 6 is \"library\" in the data and \"package\" in the model"), "{line}");
    let dev = ["--dev-queries", "@queries-other", "--dev-qrels", "@qrels.tsv"];
    let line = refused(&world, "contrastive", &dev);
    assert!(line.contains("queries-other: made with another tokenizer"), "{line}");
}

#[test]
fn ids_with_spaces_and_files_of_other_things_are_refused() {
    let world = PairWorld::new();
    write(&world, "spaced.tsv", "q0\tp0, p1\n");
    let line = refused(&world, "contrastive", &["--qrels", "@spaced.tsv"]);
    assert!(line.contains("spaced.tsv:1: "), "{line}");
    let line = refused(&world, "contrastive", &["--qrels", "@absent.tsv"]);
    assert!(line.contains("absent.tsv: cannot open"), "{line}");
    let line = refused(&world, "contrastive", &["--qrels", "@passages.tsv"]);
    assert!(line.contains("passages.tsv"), "{line}");
    write(&world, "foreign.tsv", "a1\tp1\na2\tp2\n");
    let line = refused(&world, "contrastive", &["--qrels", "@foreign.tsv"]);
    assert!(line.contains("no query"), "{line}");
    let foreign = ["--dev-queries", "@queries", "--dev-qrels", "@foreign.tsv"];
    let line = refused(&world, "contrastive", &foreign);
    assert!(line.contains("foreign.tsv: judges none of the dev set's queries: it names a1, the queries q0"), "{line}");
    let line = refused(&world, "cross-encoder", &DEV);
    assert!(line.contains("--dev-run is missing"), "{line}");
    let line = refused(&world, "contrastive", &["--data", "@passages"]);
    assert!(line.contains("holds shards, not rows"), "{line}");
}

#[test]
fn settings_that_contradict_the_model_or_the_data_are_refused() {
    let world = PairWorld::new();
    world.trained("contrastive", "wide", &["--projection", "16", "--untied", "--steps", "1"]);
    let line = refused(&world, "contrastive", &["--model", "@wide/model", "--projection", "24"]);
    assert!(line.contains("--projection 24: the model has a projection to 16"), "{line}");
    let line = refused(&world, "contrastive", &["--model", "@wide/model", "--untied", "false"]);
    assert!(line.contains("--untied false: the model has an encoder each"), "{line}");
    let line = refused(&world, "contrastive", &["--distill-loss", "kl"]);
    assert!(line.contains("--distill-loss: there are no scores of a teacher"), "{line}");
    let line = refused(&world, "contrastive", &["--encoder-mask-probability", "0.3"]);
    assert!(line.contains("--encoder-mask-probability means nothing to --objective contrastive"), "{line}");
    // Another corpus than that of the checkpoint.
    world.trained("contrastive", "run", &["--steps", "4"]);
    write(
        &world,
        "fewer.tsv",
        &read(&world, "qrels.tsv").lines().skip(1).map(|l| format!("{l}\n")).collect::<String>(),
    );
    let output = world.train("contrastive", "run", &["--steps", "4", "--qrels", "@fewer.tsv"]).output().unwrap();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("data was") && text.contains("--override data"), "{text}");
}
