//! `train` through the binary, on the real engine: text to exported model, resumed and refused.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use retromae_engine::rng::{Site, Stream};

use crate::world::{BINARY, World, stderr};

/// Bits of losses and norms, by line.
fn bits(out: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
    lines.map(|l| format!("{} {} {} {}", l["step"], l["split"], l["loss_bits"], l["grad_norm_bits"])).collect()
}

#[test]
fn text_becomes_a_model_and_kills_change_no_bit() {
    let world = World::new();
    let start = Instant::now();
    let whole = world.train("whole", &[]).arg("--json").arg(world.path("summary.json")).output().unwrap();
    let duration = start.elapsed();
    assert!(whole.status.success(), "{}", stderr(&whole));
    assert!(
        String::from_utf8_lossy(&whole.stdout).contains("16 steps, 64 texts"),
        "{}",
        String::from_utf8_lossy(&whole.stdout)
    );
    for fact in [
        "model      BERT from scratch, 1 layers of width 64",
        "objective  RetroMAE",
        "35 texts",
        "5 texts held out",
        "steps      16",
    ] {
        assert!(stderr(&whole).contains(fact), "{fact}: {}", stderr(&whole));
    }
    let summary: serde_json::Value =
        serde_json::from_slice(&std::fs::read(world.path("summary.json")).unwrap()).unwrap();
    assert_eq!((summary["steps"].as_u64(), summary["skipped"].as_u64()), (Some(16), Some(0)));
    let expected = bits(&world.path("whole"));
    assert_eq!(expected.len(), 16 + 3);
    let model = std::fs::read(world.path("whole/model/model.safetensors")).unwrap();

    let (mut random, mut struck) = (Stream::new(20, 0, Site::Init, 0), 0);
    for round in 0..20 {
        let out = format!("killed-{round}");
        let mut child = world.train(&out, &[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let wait = duration.mul_f32(0.6 * random.uniform());
        std::thread::sleep(wait);
        child.kill().unwrap();
        struck += u32::from(child.wait().unwrap().code().is_none());
        let done = world.train(&out, &[]).output().unwrap();
        assert!(done.status.success(), "{}", stderr(&done));
        assert_eq!(bits(&world.path(&out)), expected, "killed after {wait:?}");
        assert_eq!(
            std::fs::read(world.path(&out).join("model/model.safetensors")).unwrap(),
            model,
            "killed after {wait:?}"
        );
    }

    assert!(struck >= 5, "only {struck} of 20 kills came before the end");

    let verified = Command::new(BINARY).arg("verify").arg(world.path("whole")).output().unwrap();
    assert!(verified.status.success(), "{}", stderr(&verified));
    let state = world.path("whole/checkpoints/step-00000012/moment2.safetensors");
    let mut bytes = std::fs::read(&state).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&state, bytes).unwrap();
    let verified = Command::new(BINARY).arg("verify").arg(world.path("whole")).output().unwrap();
    assert_eq!(verified.status.code(), Some(1));
    assert!(stderr(&verified).contains("moment2.safetensors: its digest does not hold"), "{}", stderr(&verified));
}

/// bf16 on the CPU: the same bits again, and losses beside those of fp32.
#[test]
fn bf16_on_the_cpu_repeats_and_stays_near_fp32() {
    let world = World::new();
    let losses = |out: &str, precision: &str| {
        let done = world.train(out, &["--device", "cpu", "--precision", precision]).output().unwrap();
        assert!(done.status.success(), "{}", stderr(&done));
        let text = std::fs::read_to_string(world.path(out).join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
        lines.map(|l| l["loss"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    let (fp32, bf16) = (losses("fp32", "fp32"), losses("bf16", "bf16"));
    losses("again", "bf16");
    assert_eq!(bits(&world.path("bf16")), bits(&world.path("again")));
    assert!(fp32 != bf16 && fp32.iter().zip(&bf16).all(|(a, b)| (a / b - 1.0).abs() < 1e-2), "{fp32:?} {bf16:?}");
}

/// On the CPU and on a GPU: three losses a line, and a killed run ends with the bits of a whole one.
#[test]
fn dupmae_logs_its_losses_and_kills_change_no_bit() {
    let world = World::new();
    let gpu = std::env::var("RETROMAE_DEVICE").unwrap_or_else(|_| "emulator".into());
    let mut ends = Vec::new();
    for device in ["cpu", &gpu] {
        let run = |out: &str| world.train(out, &["--device", device, "--objective", "dupmae"]);
        let (whole, killed) = (format!("whole-{device}"), format!("killed-{device}"));
        let done = run(&whole).output().unwrap();
        assert!(done.status.success(), "{}", stderr(&done));
        let plan = "objective  DupMAE, encoder mask 30 %, decoder mask 50 %, 0.1 × bag of words";
        assert!(stderr(&done).contains(plan), "{}", stderr(&done));
        let text = std::fs::read_to_string(world.path(&whole).join("metrics.jsonl")).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let number = |line: &serde_json::Value, key: &str| line[key].as_f64().unwrap_or(f64::NAN);
        for line in &lines {
            let parts = ["loss_enc", "loss_dec", "loss_bow"].map(|key| number(line, key));
            let sum = parts[0] + parts[1] + 0.1 * parts[2];
            assert!((number(line, "loss") - sum).abs() < 1e-9, "{line}");
        }
        let held_out: Vec<f64> =
            lines.iter().filter(|l| l["split"] == "eval").map(|line| number(line, "loss_bow")).collect();
        assert!(held_out[2] < held_out[0] - 0.1, "{held_out:?}");
        ends.push(held_out[2]);

        let mut child = run(&killed).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while !world.path(&killed).join("checkpoints/step-00000004").exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let done = run(&killed).output().unwrap();
        assert!(done.status.success(), "{}", stderr(&done));
        assert_eq!(bits(&world.path(&killed)), bits(&world.path(&whole)), "{device}");
        let model = |out: &str| std::fs::read(world.path(out).join("model/model.safetensors")).unwrap();
        assert!(model(&killed) == model(&whole), "{device}");
        let card = std::fs::read_to_string(world.path(&whole).join("model/README.md")).unwrap();
        assert!(card.contains("DupMAE pre-trained encoder") && card.contains("- dupmae\n"), "{card}");
        // Another weight is another run.
        let other = run(&whole).args(["--bow-loss-weight", "0.2"]).output().unwrap();
        assert!(stderr(&other).contains("bow-loss-weight was 0.1 and is now 0.2"), "{}", stderr(&other));
    }
    assert!((ends[0] - ends[1]).abs() < 0.05, "bf16 follows the CPU: {ends:?}");
}

#[test]
fn pre_training_goes_on_from_an_export() {
    let world = World::new();
    assert!(world.train("first", &["--steps", "8"]).output().unwrap().status.success());
    let mut next = Command::new(BINARY);
    next.args(["train", "--steps", "2", "--batch-size", "4", "--model"]).arg(world.path("first/model"));
    let next = next.arg("--data").arg(world.path("shards")).arg("--output").arg(world.path("next")).output().unwrap();
    assert!(next.status.success(), "{}", stderr(&next));
    assert!(!stderr(&next).contains("start fresh"), "{}", stderr(&next));
}

#[test]
fn the_spellings_of_the_published_scripts_are_taken() {
    let world = World::new();
    let mut command = Command::new(BINARY);
    command.args(["train", "--dry-run", "--config-file"]).arg(world.path("config.json"));
    command.arg("--data_dir").arg(world.path("shards")).arg("--output_dir").arg(world.path("out"));
    command.args([
        "--per_device_train_batch_size",
        "5",
        "--encoder_mlm_probability",
        "0.4",
        "--decoder_mlm_probability",
        "0.6",
    ]);
    command.args([
        "--num_train_epochs",
        "2",
        "--learning_rate",
        "3e-4",
        "--warmup_ratio",
        "0.5",
        "--lr_scheduler_type",
        "cosine",
    ]);
    command.args([
        "--gradient_accumulation_steps",
        "2",
        "--fp16",
        "--save_steps",
        "7",
        "--max_grad_norm",
        "2",
        "--seed",
        "3",
    ]);
    let plan = command.output().unwrap();
    assert!(plan.status.success(), "{}", stderr(&plan));
    let text = String::from_utf8_lossy(&plan.stdout).into_owned();
    for fact in [
        "encoder mask 40 %, decoder mask 60 %",
        "5 texts × 2 micro-batches",
        "steps      8,",
        "3e-4 after 4 steps of warm-up, falling along a cosine",
    ] {
        assert!(text.contains(fact), "{fact} in {text}");
    }
    assert!(!world.path("out").exists(), "a dry run leaves nothing");
}

#[test]
fn wrong_use_is_one_line_with_the_contracted_exit_code() {
    let world = World::new();
    assert!(world.train("out", &["--steps", "2"]).output().unwrap().status.success());
    let mut narrow: serde_json::Value =
        serde_json::from_slice(&std::fs::read(world.path("config.json")).unwrap()).unwrap();
    narrow["vocab_size"] = 20.into();
    std::fs::write(world.path("narrow.json"), narrow.to_string()).unwrap();
    std::fs::write(world.path("bad.toml"), "steps = 3\nbatchsize = 4\n").unwrap();
    let narrow = world.path("narrow.json").display().to_string();
    let bad = world.path("bad.toml").display().to_string();
    let cases: [(&str, &[&str], i32, &str); 6] = [
        ("out", &["--steps", "3"], 1, "steps was 2 and is now 3"),
        ("out", &["--steps", "2", "--resume", "never"], 1, "holds a run that was saved at step 2"),
        ("new", &["--epochs", "2", "--steps", "3"], 2, "cannot be used with"),
        ("out", &["--steps", "2", "--precision", "bf16"], 1, "precision was fp32 and is now bf16"),
        ("new", &["--config", &bad], 1, "bad.toml:2: unknown field `batchsize`"),
        ("new", &["--eval-size", "40"], 2, "the argument '--eval-size <N>' cannot be used multiple times"),
    ];
    for (out, more, code, expected) in cases {
        let output = world.train(out, more).output().unwrap();
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{more:?}: {text}");
        assert!(
            text.starts_with("error: ") && text.lines().count() == 1 && text.contains(expected),
            "{more:?}: {text}"
        );
    }
    let mut command = Command::new(BINARY);
    command
        .args(["train", "--config-file", &narrow, "--data"])
        .arg(world.path("shards"))
        .arg("--output")
        .arg(world.path("new"));
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("the tokens are of a vocabulary of 29, the model has 20; tokenize with"),
        "{}",
        stderr(&output)
    );
    assert!(!world.path("new").exists(), "what is refused leaves nothing");
}
