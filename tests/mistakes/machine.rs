//! What the machine does not have or does not agree on: memory, a GPU, a model while offline, ranks with the same settings.

use std::net::TcpListener;

use crate::desk::{Desk, PAIRS, TRAIN, between, stderr};

/// The flags that a message says would fit, the first or the second of them.
fn fitting(told: &str, which: usize) -> String {
    let all = told.split_once("; what fits: ").unwrap_or_else(|| panic!("{told}")).1;
    all.split(", or ").nth(which).unwrap().rsplit_once(" (").unwrap().0.to_string()
}

/// With a model that one computes with on GPUs.
fn large(command: &str) -> String {
    command.replace("--config-file config.json", "--config-name bert-base")
}

#[test]
fn out_of_memory_before_step_0() {
    let desk = Desk::new();
    // On the CPU of any machine, and on a GPU of 8 GiB.
    for (device, whose) in [("cpu", "this machine has "), ("emulator", "kernel emulator has 8.00 GiB; ")] {
        let train = large(TRAIN).replace("--device cpu", &format!("--device {device}")) + " --data shards --output out";
        let told = desk.refused_at_once(&format!("{train} --batch-size 200000"));
        assert!(
            told.starts_with("out of memory: the run needs ") && told.contains(&format!(" GiB, {whose}")),
            "{told}"
        );
        let advice = fitting(&told, 0);
        let size: u64 = between(&advice, "--batch-size ", " ").parse().unwrap();
        let times: u64 = between(&advice, " --accumulate ", " ").parse().unwrap();
        assert!(size > 10 && (200_000..200_000 + size).contains(&(size * times)), "{told}");
        let plan = desk.works(&format!("{train} --dry-run {advice}"));
        assert!(plan.contains("memory ") && !plan.contains("warning: out of memory"), "{plan}");
        // What --dry-run says of the first is the same line.
        let plan = desk.works(&format!("{train} --dry-run --batch-size 200000"));
        let warning =
            plan.lines().find_map(|line| line.strip_prefix("warning: out of memory: the run needs ")).unwrap();
        assert!(
            told.contains(warning.split(',').next().unwrap()) && warning.contains("; what fits: --batch-size "),
            "{plan}"
        );
        assert!(!desk.path("out").exists(), "what is refused at once leaves nothing");
    }
    let train = format!("{} --data shards --output out --tokens-per-batch", large(TRAIN));
    let told = desk.refused_at_once(&format!("{train} 10000000"));
    let advice = fitting(&told, 0);
    let tokens = advice.strip_prefix("--tokens-per-batch ").unwrap();
    assert!(!desk.works(&format!("{train} {tokens} --dry-run")).contains("warning: "), "{told}");
    // Texts in parts give the same losses, so that --chunk comes first; shorter passages help, too.
    let train = format!("{} --qrels qrels.tsv --output out --batch-size 200000", large(PAIRS));
    let told = desk.refused_at_once(&train);
    let advice = fitting(&told, 0);
    assert!(advice.starts_with("--chunk ") && fitting(&told, 1).starts_with("--batch-size "), "{told}");
    assert!(!desk.works(&format!("{train} {advice} --dry-run")).contains("warning: out of memory"), "{told}");
    let ranking = large(PAIRS).replace("contrastive", "cross-encoder")
        + " --qrels qrels.tsv --group-size 4 --output out --batch-size";
    let told = desk.refused_at_once(&format!("{ranking} 100000"));
    let size = fitting(&told, 0).replace("--batch-size ", "");
    assert!(!desk.works(&format!("{ranking} {size} --dry-run")).contains("warning: out of memory"), "{told}");
}

#[test]
fn no_gpu() {
    let desk = Desk::new();
    let here = String::from_utf8(desk.typed("retromae-engine doctor").stdout).unwrap();
    if !here.contains("there is no NVIDIA driver") {
        return println!("left out: this machine has an NVIDIA driver");
    }
    let train = format!("{TRAIN} --data shards --output out");
    let told = desk.refused_at_once(&train.replace("--device cpu", "--device cuda"));
    if here.contains("GPU kernels  for compute capability") {
        let expected =
            "there is no NVIDIA driver (libcuda.so.1); install one, or let everything run on the CPU: --device cpu";
        assert_eq!(told, expected);
    }
    assert!(told.ends_with(": --device cpu"), "{told}");
    desk.works(&train);
}

#[test]
fn no_such_model_offline() {
    let desk = Desk::new();
    let train = "retromae-engine train --device cpu --data shards --output out --model";
    let told = desk.refused_at_once(&format!("HF_HUB_OFFLINE=1 HF_HOME=cache {train} org/retriever"));
    let expected = "org/retriever: no such file or folder, and cache/hub/models--org--retriever is not in the local cache; check the \
                    path, or fetch it first: hf download org/retriever, or unset HF_HUB_OFFLINE to fetch it now";
    assert_eq!(told, expected);
    // Nothing listens there.
    let told = desk.refused_at_once(&format!("HF_ENDPOINT=http://127.0.0.1:9 HF_HOME=cache {train} org/retriever"));
    assert!(told.starts_with("org/retriever, revision main: no such folder here, and fetching it from "), "{told}");
    assert!(
        told.ends_with(
            "; check the network, set HF_ENDPOINT to a mirror, or give a folder; a rerun goes on where it stopped"
        ),
        "{told}"
    );
    let told = desk.refused_at_once(&format!("{train} models/retriever/1"));
    assert_eq!(told, "models/retriever/1: no such file or folder, and not a hub name; check the path");
}

#[test]
fn ranks_disagree() {
    let desk = Desk::new();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let rank = |i: usize, more: &str| {
        let place = format!("RANK={i} LOCAL_RANK={i} WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={port}");
        format!("{place} {TRAIN} -q --data shards --output out --collective-timeout 3 {more}")
    };
    let both = desk.typed(&format!("{} 2> first.txt & {}", rank(0, ""), rank(1, "--learning-rate 3e-4")));
    let told = stderr(&both);
    let expected = "error: rank 1: learning-rate is 0.0003, that of rank 0 0.0001; give every rank the same settings, data and model\n";
    assert_eq!(told, expected);
    assert!(!desk.path("out").exists());
}
