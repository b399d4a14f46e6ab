//! Runs that must not go on as they are: their output is there already, their loss is exactly 0, their gradients are no numbers.

use crate::desk::{Desk, PAIRS, TRAIN, between};

#[test]
fn existing_output() {
    let desk = Desk::new();
    let tokenize = "retromae-engine tokenize --input queries.tsv --tokenizer tokenizer --output queries";
    let told = desk.refused_at_once(tokenize);
    assert_eq!(told, "queries: the output folder already exists; choose another --output or add --overwrite");
    desk.works(&format!("{tokenize} --overwrite"));

    std::fs::create_dir(desk.path("mine")).unwrap();
    desk.write("mine/thesis.tex", "x");
    let train = format!("{TRAIN} --data shards --output");
    let told = desk.refused_at_once(&format!("{train} mine"));
    assert_eq!(told, "mine: the output folder holds thesis.tex and no run; choose a new or empty folder");
    desk.works(&format!("{train} run"));
    let told = desk.refused_at_once(&format!("{train} run --learning-rate 2e-4"));
    let expected = "run/checkpoints/step-00000002: learning-rate was 0.0001 and is now 0.0002; give the old value, or --override \
                    learning-rate to change it, or another --output";
    assert_eq!(told, expected);
    desk.works(&format!("{train} run --learning-rate 2e-4 --override learning-rate"));
    let told = desk.refused_at_once(&format!("{train} run --resume never"));
    let expected = "run/checkpoints/step-00000002: the output folder holds a run that was saved at step 2; leave --resume never out to \
                    go on with it, or choose another --output";
    assert_eq!(told, expected);

    let encode = "retromae-engine encode --model run/model --device cpu --output emb --input";
    desk.works(&format!("{encode} passages.tsv"));
    let told = desk.refused_at_once(&format!("{encode} queries.tsv"));
    assert_eq!(told, "emb: holds the embeddings of another input; choose another --output or add --overwrite");
    desk.works(&format!("{encode} queries.tsv --overwrite"));
    let told = desk.refused_at_once("retromae-engine export --run run --output mine");
    assert_eq!(told, "mine: the output folder already exists; choose another --output or add --overwrite");
    assert_eq!(desk.read("mine/thesis.tex"), "x");
}

#[test]
fn loss_exactly_0() {
    let desk = Desk::new();
    let told = desk.refused_at_once(&format!("{PAIRS} --qrels qrels.tsv --output out --batch-size 1 --group-size 1"));
    let expected = "--group-size of one passage leaves nothing to tell it from, so that the loss is always 0: raise it, or \
                    --batch-size; see train --help";
    assert_eq!(told, expected);
    desk.works(&format!("{PAIRS} --qrels qrels.tsv --output tuned --batch-size 2 --group-size 1"));
    for flag in ["--encoder-mask-probability", "--decoder-mask-probability"] {
        let told = desk.refused_at_once(&format!("{TRAIN} --data shards --output out {flag} 0"));
        let expected = "must be above 0, where nothing is predicted and the loss is exactly 0, and below 1; published are 0.3 and 0.5; \
                        see train --help";
        assert_eq!(told, format!("{flag} {expected}"));
    }
    // One passage is the answer to all.
    let all: String = (0..24).map(|i| format!("q{i}\tp0\n")).collect();
    desk.write("all.tsv", &all);
    let told =
        desk.warned(&format!("{PAIRS} --qrels all.tsv --output same --batch-size 4 --group-size 1"), "exactly 0");
    let expected = "step 1: the loss is exactly 0: every passage of the batch is a positive of every query, so that there is nothing to \
                    tell apart; check --qrels, raise --batch-size, or give --negatives";
    assert_eq!(told, expected);
    // No token of the texts is in the vocabulary.
    let foreign: String = (0..8).map(|i| format!("ein deutscher Satz {i}\n")).collect();
    desk.write("foreign.txt", &foreign);
    desk.works("retromae-engine tokenize --input foreign.txt --tokenizer tokenizer --output foreign");
    let told = desk.warned(&format!("{TRAIN} --data foreign --output unknown --batch-size 4"), "exactly 0");
    let expected = "step 1: the encoder loss is exactly 0: no word of the batch was there to predict, as when the tokenizer knows none \
                    ([UNK]); see what the texts became: inspect foreign --masks";
    assert_eq!(told, expected);
    let shown = desk.works(&format!("retromae-engine {}", between(&told, "became: ", "\n")));
    assert!(shown.contains("[UNK]"), "{shown}");
}

#[test]
fn gradients_that_are_no_numbers() {
    let desk = Desk::new();
    let train = format!(
        "{} --data shards --output out --batch-size 4 --max-skipped 3 --warmup-steps 0",
        TRAIN.replace("--steps 2", "--steps 9")
    );
    let told = desk.refused(&format!("{train} --learning-rate 1e30"));
    let start = "out: the gradient was not finite in 3 steps in a row, up to step ";
    assert!(told.starts_with(start) && told.contains("; the last batch begins at sample "), "{told}");
    assert_eq!(told.matches("text ").count(), 4, "{told}");
    let end = "nothing was saved yet; start again with a lower rate than 1e30: --learning-rate 1e-4";
    assert!(told.ends_with(end), "{told}");
    desk.works(&format!("{train} {}", between(&told, "than 1e30: ", "\n")));
    // What is saved is gone on from.
    let saving = format!("{train} --save-every 1 --output late").replace("--output out ", "");
    let told = desk.refused(&format!("{saving} --learning-rate 1e25"));
    let advice = between(&told, "; go on from it with a lower rate than 1e25: ", "\n").to_string();
    assert_eq!(advice, "--learning-rate 1e-4 --override learning-rate");
}
