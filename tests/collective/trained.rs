//! What ranks train together is what one rank trains alone: same texts, masks and dropout, equal losses, gradients and weights.

use crate::pair_world::PairWorld;
use crate::runs::{assert_same_bits, assert_same_training, good};
use crate::world::World;

#[test]
fn pre_training_on_ranks_is_that_of_one() {
    let world = World::new();
    for objective in ["retromae", "dupmae"] {
        let run = |out: &str, more: &[&str]| {
            let more = [&["--objective", objective], more].concat();
            good(&mut world.train(out, &more));
            world.path(out)
        };
        let alone = run(&format!("{objective}-1"), &["--batch-size", "8"]);
        let two = run(&format!("{objective}-2"), &["--ranks", "2"]);
        let again = run(&format!("{objective}-2-again"), &["--ranks", "2"]);
        assert_same_training(&two, &alone, &[]);
        assert_same_bits(&again, &two);
        let four = run(&format!("{objective}-4"), &["--ranks", "4", "--batch-size", "2"]);
        assert_same_training(&four, &alone, &[]);
    }
}

/// 35 texts in epochs of steps of 4 × 3: the last step has a text for some ranks and none for others.
#[test]
fn the_last_step_may_have_fewer_texts_than_ranks() {
    let world = World::new();
    let run = |out: &str, more: &[&str]| {
        let more = [&["--objective", "mlm", "--epochs", "1"], more].concat();
        good(&mut world.train(out, &more));
        world.path(out)
    };
    let alone = run("alone", &["--batch-size", "3", "--accumulate", "4"]);
    let four = run("four", &["--batch-size", "3", "--ranks", "4"]);
    assert_same_training(&four, &alone, &[]);
    // 35 = 8 × 4 + 3: of four ranks with one text each the last is left without.
    let alone = run("alone-1", &["--batch-size", "4"]);
    let four = run("four-1", &["--batch-size", "1", "--ranks", "4"]);
    assert_same_training(&four, &alone, &[]);
}

#[test]
fn batches_by_tokens_are_shared_too() {
    let world = World::new();
    let run = |out: &str, more: &[&str]| {
        let more = [&["--tokens-per-batch", "40"], more].concat();
        good(&mut world.train(out, &more));
        world.path(out)
    };
    let alone = run("alone", &["--accumulate", "4"]);
    let two = run("two", &["--accumulate", "2", "--ranks", "2"]);
    assert_same_training(&two, &alone, &[]);
}

/// On the emulator work is laid out for rounded sizes, and tensors go through device memory.
#[test]
fn ranks_on_the_emulated_gpu() {
    let world = World::new();
    let run = |out: &str, more: &[&str]| {
        let more =
            [&["--device", "emulator", "--precision", "fp32", "--steps", "2", "--objective", "mlm"], more].concat();
        good(&mut world.train(out, &more));
        world.path(out)
    };
    let alone = run("alone", &["--batch-size", "4"]);
    let two = run("two", &["--batch-size", "2", "--ranks", "2"]);
    assert_same_training(&two, &alone, &[]);
}

/// Without the flag a query's negatives are those of its own rank: micro-batches, as one rank accumulates them.
#[test]
fn fine_tuning_on_ranks_is_that_of_accumulated_batches() {
    let world = PairWorld::new();
    // The softmax of a group is the same whatever is added to all of its scores.
    for (objective, more, free) in [
        ("contrastive", &["--group-size", "2"][..], &[][..]),
        ("cross-encoder", &["--group-size", "3"], &["classifier.bias"]),
    ] {
        let run = |out: &str, own: &[&str]| {
            let more = [more, own, &["--negatives", "@negatives.tsv", "--batch-size", "3"]].concat();
            world.trained(objective, out, &more);
            world.path(out)
        };
        let alone = run(&format!("{objective}-1"), &["--accumulate", "2"]);
        let two = run(&format!("{objective}-2"), &["--ranks", "2"]);
        assert_same_training(&two, &alone, free);
    }
}

/// With it they are those of all ranks: one large batch.
#[test]
fn negatives_across_devices_are_those_of_one_large_batch() {
    let world = PairWorld::new();
    let run = |name: &str, size: &str, own: &[&str], more: &[&str]| {
        let more = [more, own, &["--negatives", "@negatives.tsv", "--batch-size", size]].concat();
        world.trained("contrastive", name, &more);
        world.path(name)
    };
    for (name, more) in [
        ("plain", &["--group-size", "2"][..]),
        ("chunked", &["--group-size", "2", "--chunk", "4"]),
        ("kept", &["--group-size", "1", "--duplicates", "keep", "--untied"]),
        ("taught", &["--group-size", "3", "--teacher-scores", "@scores.tsv", "--contrastive-loss-weight", "0.5"]),
        ("joined", &["--group-size", "2", "--representation", "both", "--lexical-top-k", "4", "--temperature", "5"]),
    ] {
        let alone = run(&format!("{name}-1"), "6", &[], more);
        let across = ["--cross-device-negatives", "--ranks", "2"];
        let two = run(&format!("{name}-2"), "3", &across, more);
        // What is added to all passages of an encoder of their own is added to all scores of a query.
        let free: &[&str] =
            if name == "kept" { &["passage_model.bert.encoder.layer.0.output.LayerNorm.bias"] } else { &[] };
        assert_same_training(&two, &alone, free);
        if name == "chunked" {
            let again = run(&format!("{name}-2-again"), "3", &across, more);
            assert_same_bits(&again, &two);
        }
    }
    // 24 queries in steps of 4 × 2: three epochs end with all; of 21, held-out ones left out, the last step is ragged.
    let ragged = ["--group-size", "2", "--eval-size", "3", "--epochs", "1"];
    let alone = run("ragged-1", "8", &[], &ragged);
    let four = run("ragged-4", "2", &["--cross-device-negatives", "--ranks", "4"], &ragged);
    assert_same_steps(&four, &alone);
    // It matters: the negatives of one's own rank alone give another loss.
    let own = run("own-2", "3", &["--ranks", "2"], &["--group-size", "2"]);
    let first = |out: &std::path::Path| crate::runs::metrics(out)[1]["loss"].as_f64().unwrap();
    assert!(first(&own) < 0.8 * first(&world.path("plain-1")));
}

/// As [`assert_same_training`] but for evaluations, whose batches are those of one rank.
#[track_caller]
fn assert_same_steps(a: &std::path::Path, b: &std::path::Path) {
    let steps = |out: &std::path::Path| -> Vec<(f64, f64)> {
        let all = crate::runs::metrics(out);
        let steps = all.iter().filter(|line| line["split"] == "train");
        steps.map(|line| (line["loss"].as_f64().unwrap(), line["grad_norm"].as_f64().unwrap())).collect()
    };
    let (one, other) = (steps(a), steps(b));
    assert_eq!(one.len(), other.len());
    let close = |a: f64, b: f64| (a - b).abs() <= 2e-5 * b.abs().max(1e-3);
    assert!(one.iter().zip(&other).all(|(a, b)| close(a.0, b.0) && close(a.1, b.1)), "{one:?} {other:?}");
}
