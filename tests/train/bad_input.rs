//! Data and models that do not fit: one clear line from `train`, exit code 1, and nothing left behind.

use std::path::Path;
use std::process::{Command, Output};

use crate::interrupted::copy_dir;
use crate::world::{BINARY, World, stderr};

/// `train --model` on the world's shards.
fn from_model(world: &World, model: &Path, out: &str) -> Output {
    let mut command = Command::new(BINARY);
    command.args(["train", "--steps", "1", "--batch-size", "4", "--threads", "1", "--model"]).arg(model);
    command.arg("--data").arg(world.path("shards")).arg("--output").arg(world.path(out)).output().unwrap()
}

#[track_caller]
fn refused(output: &Output, expected: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.starts_with("error: ") && text.lines().count() == 1, "{text}");
    assert!(expected.iter().all(|e| text.contains(e)), "{text}");
}

#[test]
fn damaged_shards_stop_a_run_that_goes_on_when_they_are_restored() {
    let world = World::new();
    let shard = world.path("shards/shard-00000.rms");
    let good = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &good[..good.len() - 5]).unwrap();
    refused(&world.train("cut", &[]).output().unwrap(), &["shard-00000.rms", "; "]);
    assert!(!world.path("cut").exists(), "what is refused at once leaves nothing");
    // In the tokens, behind the header: found when it is read.
    let mut flipped = good.clone();
    let at = good.len() / 2;
    flipped[at] ^= 4;
    std::fs::write(&shard, &flipped).unwrap();
    refused(&world.train("flip", &[]).output().unwrap(), &["shard-00000.rms", "; "]);
    std::fs::write(&shard, &good).unwrap();
    let done = world.train("flip", &[]).output().unwrap();
    assert!(done.status.success(), "{}", stderr(&done));
}

#[test]
fn a_wider_vocabulary_is_told_and_a_narrower_one_refused() {
    let world = World::new();
    let read = std::fs::read(world.path("config.json")).unwrap();
    let config = |vocabulary: u64| {
        let mut config: serde_json::Value = serde_json::from_slice(&read).unwrap();
        config["vocab_size"] = vocabulary.into();
        std::fs::write(world.path("config.json"), config.to_string()).unwrap();
    };
    config(40);
    let wide = world.train("wide", &["--steps", "1"]).output().unwrap();
    assert!(wide.status.success(), "{}", stderr(&wide));
    assert!(stderr(&wide).contains("the model has 11 tokens more than the tokenizer of the data"), "{}", stderr(&wide));
    config(28);
    let narrow = world.train("narrow", &["--steps", "1"]).output().unwrap();
    refused(
        &narrow,
        &["the tokens are of a vocabulary of 29, the model has 28; tokenize with the tokenizer of the model"],
    );
    assert!(!world.path("narrow").exists());
}

#[test]
fn shards_of_another_tokenizer_than_the_models_are_refused() {
    let world = World::new();
    assert!(world.train("first", &["--steps", "1"]).output().unwrap().status.success());
    let model = world.path("model");
    copy_dir(&world.path("first/model"), &model);
    assert!(from_model(&world, &model, "same").status.success());

    // Two words change places: every size is the same, every id in range, and the model would learn nonsense.
    let words = std::fs::read_to_string(model.join("vocab.txt")).unwrap();
    let swapped = words.replace("library\n", "@\n").replace("package\n", "library\n").replace("@\n", "package\n");
    assert_ne!(words, swapped);
    std::fs::write(model.join("vocab.txt"), &swapped).unwrap();
    std::fs::remove_file(model.join("tokenizer.json")).unwrap();
    let other = from_model(&world, &model, "other");
    let of_model = format!("another tokenizer than that of {}", model.display());
    refused(
        &other,
        &["shards: made with ", &of_model, "token 6 is \"package\" in the data and \"library\" in the model"],
    );
    assert!(!world.path("other").exists());

    // The same words, treated otherwise: told, since the ids mean what they should.
    std::fs::write(model.join("vocab.txt"), &words).unwrap();
    std::fs::write(model.join("tokenizer_config.json"), "{\"do_lower_case\": false}").unwrap();
    let cased = from_model(&world, &model, "cased");
    assert!(cased.status.success(), "{}", stderr(&cased));
    assert!(stderr(&cased).contains("the same tokens but treat text differently"), "{}", stderr(&cased));

    // A model without tokenizer: only sizes can be compared.
    for name in ["vocab.txt", "tokenizer_config.json", "special_tokens_map.json"] {
        std::fs::remove_file(model.join(name)).unwrap();
    }
    let without = from_model(&world, &model, "without");
    assert!(without.status.success(), "{}", stderr(&without));
    assert!(!stderr(&without).contains("warning"), "{}", stderr(&without));
}

#[test]
fn two_trainers_on_one_folder() {
    let world = World::new();
    let lock = retromae_engine::files::Lock::acquire(&{
        std::fs::create_dir(world.path("out")).unwrap();
        world.path("out")
    });
    let held = world.train("out", &[]).output().unwrap();
    let expected = format!("process {} is writing to this output folder", std::process::id());
    refused(&held, &[&expected]);
    drop(lock.unwrap());
    assert!(world.train("out", &[]).output().unwrap().status.success());
}
