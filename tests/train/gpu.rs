//! `train` through the binary on a GPU, the emulated one unless `RETROMAE_DEVICE` names a real one: the CPU's losses in bf16, and
//! killed runs that end with the same bits.

use std::path::Path;
use std::process::Stdio;

use crate::pair_world::{DEV, PairWorld};
use crate::world::{World, stderr};

/// The device of these tests.
fn device() -> String {
    std::env::var("RETROMAE_DEVICE").unwrap_or_else(|_| "emulator".into())
}

/// Losses and their bits, by line.
fn losses(out: &Path) -> Vec<(f64, String)> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
    lines
        .map(|l| (l["loss"].as_f64().unwrap_or(f64::NAN), format!("{} {}", l["loss_bits"], l["grad_norm_bits"])))
        .collect()
}

#[test]
fn bf16_follows_the_cpu_and_kills_change_no_bit() {
    let world = World::new();
    let device = device();
    let cpu = world.train("cpu", &["--device", "cpu"]).output().unwrap();
    assert!(cpu.status.success(), "{}", stderr(&cpu));
    let on_gpu = |out: &str| world.train(out, &["--device", &device]);
    let whole = on_gpu("whole").output().unwrap();
    assert!(whole.status.success(), "{}", stderr(&whole));
    assert!(stderr(&whole).contains(", bf16\n"), "the precision is told: {}", stderr(&whole));
    let (cpu, expected) = (losses(&world.path("cpu")), losses(&world.path("whole")));
    assert_eq!((cpu.len(), expected.len()), (16 + 3, 16 + 3));
    let learned = cpu[0].0 - cpu[18].0;
    assert!(learned > 0.5, "the CPU's loss fell by {learned}");
    for (step, (a, b)) in cpu.iter().zip(&expected).enumerate() {
        assert!((a.0 - b.0).abs() <= 0.05 * learned, "line {step}: {} on the CPU, {} on {device}", a.0, b.0);
    }

    let model = std::fs::read(world.path("whole/model/model.safetensors")).unwrap();
    // Waiting for a file instead of a time: the first checkpoint, and a later one.
    for (out, reached) in [("early", "checkpoints/step-00000004"), ("late", "checkpoints/step-00000012")] {
        let mut child = on_gpu(out).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while !world.path(out).join(reached).exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let done = on_gpu(out).output().unwrap();
        assert!(done.status.success(), "{}", stderr(&done));
        assert_eq!(losses(&world.path(out)), expected, "killed at {reached}");
        assert_eq!(std::fs::read(world.path(out).join("model/model.safetensors")).unwrap(), model);
    }
}

/// A run of one precision is not one of another.
#[test]
fn another_precision_is_another_run() {
    let world = World::new();
    let device = device();
    let made = world.train("out", &["--device", &device, "--precision", "fp32", "--steps", "2"]).output().unwrap();
    assert!(made.status.success(), "{}", stderr(&made));
    let other = world.train("out", &["--device", &device, "--steps", "2"]).output().unwrap();
    assert_eq!(other.status.code(), Some(1));
    assert!(stderr(&other).contains("precision was fp32 and is now bf16"), "{}", stderr(&other));
}

/// The plan needs no GPU memory, and tells what a run would take.
#[test]
fn a_dry_run_tells_the_memory_of_the_precision() {
    let world = World::new();
    let memory = |precision: &str| {
        let more = ["--device", &*device(), "--precision", precision, "--dry-run"].map(String::from);
        let json = world.path(&format!("{precision}.json"));
        let mut command = world.train("dry", &more.each_ref().map(|m| m.as_str()));
        let output = command.arg("--json").arg(&json).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let plan: serde_json::Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
        plan["memory_bytes"].as_u64().unwrap()
    };
    let (narrow, wide) = (memory("bf16"), memory("fp32"));
    assert!(narrow < wide && 2 * narrow > wide, "{narrow} bytes in bf16, {wide} in fp32");
}

/// Fine-tuning on a GPU: in f32 the CPU's losses, step by step, and its dev set; in bf16 a run that learns.
#[test]
fn fine_tuning_follows_the_cpu() {
    let world = PairWorld::new();
    let device = device();
    let hard = ["--negatives", "@negatives.tsv", "--group-size", "3", "--learning-rate", "1e-3"];
    let kinds: [(&str, &[&str]); 2] = [
        ("contrastive", &["--teacher-scores", "@scores.tsv", "--chunk", "7", "--pooling", "mean"]),
        ("cross-encoder", &["--dev-run", "@run.trec"]),
    ];
    for (objective, more) in kinds {
        let run = |out: &str, on: &[&str]| {
            let out = format!("{objective}-{out}");
            world.trained(objective, &out, &[&hard[..], more, &DEV, on].concat());
            losses(&world.path(&out))
        };
        let cpu = run("cpu", &["--device", "cpu"]);
        let f32 = run("f32", &["--device", &device, "--precision", "fp32"]);
        let bf16 = run("bf16", &["--device", &device]);
        assert_eq!((cpu.len(), f32.len(), bf16.len()), (12 + 4, 16, 16));
        for (line, ((a, _), (b, _))) in cpu.iter().zip(&f32).enumerate().filter(|(_, (a, _))| a.0.is_finite()) {
            assert!((a - b).abs() <= 1e-3 * a.abs(), "{objective}, line {line}: {a} on the CPU, {b} on {device}");
        }
        for (line, ((a, _), (b, _))) in cpu.iter().zip(&bf16).enumerate().filter(|(_, (a, _))| a.0.is_finite()) {
            assert!((a - b).abs() <= 0.1 * a.abs(), "{objective}, line {line}: {a} on the CPU, {b} in bf16");
        }
        let found = |out: &str| {
            let text =
                std::fs::read_to_string(world.path(&format!("{objective}-{out}")).join("metrics.jsonl")).unwrap();
            let lines = text.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
            lines.filter_map(|line| line["mrr@10"].as_f64()).collect::<Vec<_>>()
        };
        assert_eq!(found("cpu").len(), 4);
        for (a, b) in found("cpu").iter().zip(found("f32")) {
            assert!((a - b).abs() < 0.05, "{objective}: {:?} and {:?}", found("cpu"), found("f32"));
        }
    }
}
