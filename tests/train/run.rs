//! The training run: schedule, settings, plan, log files, TensorBoard, and the batches under it.

use std::path::Path;
use std::process::Command;

use crate::toy::{self, Job, STEPS, checkpoints, folder, metrics};
use retromae_engine::error::Kind;
use retromae_engine::train::Batches;
use retromae_engine::train::plan::Plan;
use retromae_engine::train::schedule::{Decay, Schedule};
use retromae_engine::train::settings::Settings;

#[test]
fn learning_rates_of_the_golden_trajectory() {
    // `lrs` of golden case head32/trajectory: 25 steps, 5 of warm-up, peak 3e-4, stored as float32.
    #[rustfmt::skip]
    let expected: [f32; 25] = [
        0.0, 6e-5, 1.2e-4, 1.8e-4, 2.4e-4, 3e-4, 2.85e-4, 2.7e-4, 2.55e-4, 2.4e-4, 2.25e-4, 2.1e-4, 1.95e-4, 1.8e-4, 1.65e-4, 1.5e-4,
        1.35e-4, 1.2e-4, 1.05e-4, 9e-5, 7.5e-5, 6e-5, 4.5e-5, 3e-5, 1.5e-5,
    ];
    let schedule = Schedule { peak: 3e-4, warmup: 5, total: 25, decay: Decay::Linear };
    let lrs: Vec<f32> = (0..25).map(|step| schedule.lr(step) as f32).collect();
    assert_eq!(lrs, expected);
}

#[test]
fn a_run_logs_evaluates_saves_and_prunes() {
    let dir = folder();
    let out = dir.path().join("new/out");
    let mut job = Job::new(&out);
    let summary = job.run().unwrap();
    assert_eq!((summary.state.step, summary.steps, summary.state.skipped), (STEPS, STEPS, 0));
    assert_eq!(summary.state.cursor, STEPS * 4);
    assert_eq!(checkpoints(&out), ["latest", "step-00000020", "step-00000024"]);
    assert_eq!(std::fs::read_to_string(out.join("checkpoints/latest")).unwrap(), "step-00000024\n");

    let lines: Vec<serde_json::Value> = metrics(&out).iter().map(|l| serde_json::from_str(l).unwrap()).collect();
    let steps = |split: &str| -> Vec<u64> {
        lines.iter().filter(|l| l["split"] == split).map(|l| l["step"].as_u64().unwrap()).collect()
    };
    assert_eq!(steps("train"), (1..=STEPS).collect::<Vec<_>>());
    assert_eq!(steps("eval"), [0, 8, 16, 24]);
    let first = lines.iter().find(|l| l["split"] == "train").unwrap();
    for key in [
        "step",
        "epoch",
        "tokens",
        "loss",
        "loss_enc",
        "loss_dec",
        "acc_enc",
        "acc_dec",
        "lr",
        "grad_norm",
        "skipped",
        "labels",
    ] {
        assert!(!first[key].is_null(), "{key} of {first}");
    }
    let loss = f64::from_bits(u64::from_str_radix(first["loss_bits"].as_str().unwrap(), 16).unwrap());
    assert!((loss - first["loss"].as_f64().unwrap()).abs() < 1e-15);
    let held_out: Vec<f64> =
        lines.iter().filter(|l| l["split"] == "eval").map(|l| l["loss"].as_f64().unwrap()).collect();
    let lowest = held_out.iter().copied().fold(f64::INFINITY, f64::min);
    let best = summary.state.best.unwrap();
    assert!((best.value - lowest).abs() < 1e-12, "{best:?} of {held_out:?}");
    assert!((held_out[best.step as usize / 8] - lowest).abs() < 1e-12, "{best:?} of {held_out:?}");
    assert!(job.told.text().contains("held-out loss"), "{}", job.told.text());
    assert!(job.told.text().contains("step 24/24"), "{}", job.told.text());
}

#[test]
fn a_finished_run_has_nothing_left_to_do() {
    let dir = folder();
    let out = dir.path().join("out");
    let mut first = Job::new(&out);
    first.run().unwrap();
    let (lines, bits) = (metrics(&out), first.toy.bits());
    let mut again = Job::new(&out);
    assert_eq!(again.run().unwrap().steps, 0);
    assert_eq!((metrics(&out), again.toy.bits()), (lines, bits));
}

#[test]
fn run_toml_repeats_the_run() {
    let dir = folder();
    let out = dir.path().join("out");
    let mut job = Job::new(&out);
    job.run().unwrap();
    let again = Settings::resolve(toml::Table::new(), Some(&out.join("run.toml"))).unwrap();
    assert_eq!(again, toy::settings(&out, ""));
}

fn refusal(text: &str) -> String {
    let dir = folder();
    let path = dir.path().join("run.toml");
    std::fs::write(&path, text).unwrap();
    let error = Settings::resolve(toml::Table::new(), Some(&path)).unwrap_err();
    error.to_string().replace(&path.display().to_string(), "run.toml")
}

#[test]
fn configuration_files_are_refused_with_their_line() {
    let least = "model = 'm'\ndata = 'd'\noutput = 'o'\n";
    let cases = [
        (format!("{least}lerning-rate = 1"), "run.toml:4: unknown field `lerning-rate`"),
        (format!("{least}\n\nbatch-size = 'many'"), "run.toml:6: invalid type: string \"many\""),
        (format!("{least}seed = 1\nseed = 2"), "run.toml:5: duplicate key"),
        ("model = ".to_string(), "run.toml:1: "),
        (format!("{least}steps = 5\nepochs = 1"), "more than one of --epochs, --steps is set; give one of them"),
        (format!("{least}learning-rate = 0"), "--learning-rate must be positive"),
        (format!("{least}learning-rate = nan"), "--learning-rate must be positive"),
        (format!("{least}clip = inf"), "--clip must be positive, or 0"),
        (format!("{least}warmup-ratio = 1.5"), "--warmup-ratio must be between 0 and 1"),
        (format!("{least}device = 'tpu'"), "--device must be auto, cpu, cuda or emulator"),
        (format!("{least}objective = 'bert'"), "run.toml:4: unknown variant `bert`"),
        (format!("{least}seed = -1"), "run.toml:4: invalid value: integer `-1`"),
        ("data = 'd'\noutput = 'o'".to_string(), "--model is missing; give --model, --config-file or --config-name"),
        ("model = 'm'\noutput = 'o'".to_string(), "--data is missing"),
    ];
    for (text, expected) in cases {
        let error = refusal(&text);
        assert!(error.starts_with(expected), "{text:?}: {error}");
        assert!(error.contains("; "), "no remedy: {error}");
    }
}

#[test]
fn flags_win_over_the_file_and_drop_its_alternative() {
    let dir = folder();
    let path = dir.path().join("run.toml");
    std::fs::write(&path, "model = 'm'\ndata = 'd'\noutput = 'o'\nsteps = 5\nbatch-size = 8\nlearning-rate = 0.5\n")
        .unwrap();
    let flags: toml::Table = toml::from_str("epochs = 2\ntokens-per-batch = 4096\nlearning-rate = 0.25").unwrap();
    let s = Settings::resolve(flags, Some(&path)).unwrap();
    assert_eq!((s.steps, s.epochs, s.batch_size, s.tokens_per_batch), (None, Some(2.0), None, Some(4096)));
    assert_eq!((s.learning_rate, s.warmup_ratio, s.model.as_deref()), (0.25, Some(0.1), Some("m")));
}

#[test]
fn the_plan_counts_steps_tokens_and_disk() {
    let dir = folder();
    let mut settings = toy::settings(&dir.path().join("out"), "");
    (settings.steps, settings.epochs) = (None, Some(2.5));
    let batches = toy::batches(&settings).unwrap();
    let plan = Plan::new(settings, toy::about(&batches), &batches).unwrap();
    // 54 texts × 2.5 epochs = 135 samples in steps of 4.
    assert_eq!((batches.texts(), plan.total, plan.checkpoint_bytes(), plan.disk_bytes()), (54, 34, 276, 920));
    let text = plan.to_text();
    for expected in [
        "toy of 23 numbers, 23 parameters",
        "54 texts",
        "6 texts held out",
        "batch      4 texts",
        "steps      34",
        "the CPU, fp32",
    ] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
    assert_eq!(plan.to_json()["steps"], 34);
    assert_eq!(plan.room(&dir.path().join("out")), None);
}

#[test]
fn epochs_end_exactly_where_the_data_does() {
    let dir = folder();
    let out = dir.path().join("out");
    let table: toml::Table = toml::from_str(&format!(
        "model = 't'\ndata = 'd'\noutput = '{}'\nepochs = 1.5\nbatch-size = 7\naccumulate = 2\neval-size = 6",
        out.display()
    ))
    .unwrap();
    let settings = Settings::resolve(table, None).unwrap();
    let mut batches = toy::batches(&settings).unwrap();
    let steps = batches.steps_of(1.5).unwrap();
    let mut samples = Vec::new();
    for _ in 0..steps {
        for batch in batches.next().unwrap() {
            assert!(batch.sequences() > 0);
            samples.extend(batch.samples);
        }
    }
    assert_eq!((steps, samples), (6, (0..81).collect::<Vec<u64>>()));
    assert_eq!(batches.next().unwrap_err().kind(), Kind::Refused);
}

#[test]
fn batches_go_on_from_any_cursor() {
    let dir = folder();
    let settings = toy::settings(&dir.path().join("out"), "");
    let mut whole = toy::batches(&settings).unwrap();
    let all: Vec<_> = (0..20).map(|_| (whole.cursor(), whole.next().unwrap())).collect();
    for (cursor, expected) in all.iter().rev() {
        let mut resumed = toy::batches(&settings).unwrap();
        resumed.seek(*cursor).unwrap();
        assert_eq!(resumed.next().unwrap(), *expected);
    }
    let held_out: Vec<_> = whole.held_out().map(Result::unwrap).collect();
    assert_eq!(held_out, whole.held_out().map(Result::unwrap).collect::<Vec<_>>());
    assert_eq!(held_out.iter().map(|b| b.sequences()).sum::<usize>(), 6);
}

/// A Python that has the module, from `RETROMAE_PYTHON` or the path.
fn python_with(module: &str) -> Option<String> {
    let python = std::env::var("RETROMAE_PYTHON").unwrap_or_else(|_| "python3".into());
    let found =
        Command::new(&python).args(["-c", &format!("import {module}")]).output().is_ok_and(|o| o.status.success());
    if !found {
        println!("left out: {python} has no {module}; set RETROMAE_PYTHON to one that has");
    }
    found.then_some(python)
}

const READ_EVENTS: &str = r#"
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
acc = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0, "tensors": 0})
acc.Reload()
tags = acc.Tags()
text = acc.Tensors("run/settings")[0].tensor_proto.string_val[0].decode()
print(json.dumps({"text": text, **{t: [[e.step, e.value] for e in acc.Scalars(t)] for t in tags["scalars"]}}))
"#;

fn events(python: &str, out: &Path) -> serde_json::Value {
    let read = Command::new(python).args(["-c", READ_EVENTS]).arg(out.join("tensorboard")).output().unwrap();
    assert!(read.status.success(), "{}", String::from_utf8_lossy(&read.stderr));
    serde_json::from_slice(&read.stdout).unwrap()
}

#[test]
fn tensorboard_reads_the_events_and_forgets_what_a_killed_run_logged_too_much() {
    let Some(python) = python_with("tensorboard") else { return };
    let dir = folder();
    let out = dir.path().join("out");
    let mut job = Job::new(&out).with("tensorboard = true");
    job.run().unwrap();
    let whole = events(&python, &out);
    let steps: Vec<u64> = whole["train/loss"].as_array().unwrap().iter().map(|e| e[0].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>());
    for tag in [
        "train/loss_enc",
        "train/loss_dec",
        "train/lr",
        "train/grad_norm",
        "perf/tps",
        "eval/loss",
        "eval/loss_dec",
        "eval/acc_enc",
    ] {
        assert!(whole[tag].is_array(), "{tag}");
    }
    assert!(whole["text"].as_str().unwrap().contains("learning-rate = 0.01"));
    let logged = whole["train/lr"][5][1].as_f64().unwrap();
    assert_eq!(logged as f32, Schedule { peak: 0.01, warmup: 3, total: STEPS, decay: Decay::Linear }.lr(5) as f32);

    // As after a kill between the checkpoints of steps 20 and 24.
    std::fs::remove_dir_all(out.join("checkpoints/step-00000024")).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1100)); // event files are told apart by their second
    Job::new(&out).with("tensorboard = true").run().unwrap();
    let resumed = events(&python, &out);
    for tag in ["train/loss", "eval/loss"] {
        assert_eq!(resumed[tag], whole[tag], "{tag}");
    }
}
