//! What a run refuses: damaged checkpoints, changed settings, folders of others, and updates by gradients that are not finite.

use retromae_engine::files::disk::Disk;
use retromae_engine::train::checkpoint;

use crate::interrupted::copy_dir;
use crate::toy::{Job, checkpoints, folder, metrics, undisturbed};

#[test]
fn no_flipped_bit_of_a_checkpoint_is_accepted() {
    let dir = folder();
    let out = dir.path().join("out");
    Job::new(&out).run().unwrap();
    let checkpoint = out.join("checkpoints/step-00000024");
    checkpoint::verify(&checkpoint).unwrap();
    let mut flips = 0;
    for name in Disk::default().list(&checkpoint).unwrap() {
        let path = checkpoint.join(&name);
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            std::fs::write(&path, &bad).unwrap();
            assert!(checkpoint::verify(&checkpoint).is_err(), "{name}: bit {} of byte {at} was accepted", at % 8);
            flips += 1;
        }
        for cut in [0, 1, good.len() / 2, good.len() - 1] {
            std::fs::write(&path, &good[..cut]).unwrap();
            assert!(checkpoint::verify(&checkpoint).is_err(), "{name}: cut to {cut} bytes was accepted");
        }
        std::fs::write(&path, &good).unwrap();
    }
    assert!(flips > 2000, "{flips} flips");
    checkpoint::verify(&checkpoint).unwrap();
}

#[test]
fn a_damaged_newest_checkpoint_falls_back_with_one_warning() {
    let expected = undisturbed();
    let dir = folder();
    let saved = dir.path().join("saved");
    Job::new(&saved).run().unwrap();
    for file in ["weights.safetensors", "moment1.safetensors", "moment2.safetensors", "state.json", "manifest.json"] {
        for damage in ["flip", "cut", "missing", "other step's"] {
            let out = dir.path().join("out");
            copy_dir(&saved, &out);
            let path = out.join("checkpoints/step-00000024").join(file);
            match damage {
                "flip" => {
                    let mut bytes = std::fs::read(&path).unwrap();
                    let middle = bytes.len() / 2;
                    bytes[middle] ^= 4;
                    std::fs::write(&path, bytes).unwrap();
                }
                "cut" => std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(20).unwrap(),
                "missing" => std::fs::remove_file(&path).unwrap(),
                _ => drop(std::fs::copy(out.join("checkpoints/step-00000020").join(file), &path).unwrap()),
            }
            let mut job = Job::new(&out);
            job.run().unwrap_or_else(|e| panic!("{damage} {file}: {e}"));
            let told = job.told.text();
            let warnings: Vec<&str> = told.lines().filter(|l| l.starts_with("warning: ")).collect();
            assert_eq!(warnings.len(), 1, "{damage} {file}: {told}");
            assert!(warnings[0].contains("step-00000024/") && warnings[0].contains("resuming from"), "{}", warnings[0]);
            assert_eq!((metrics(&out), job.toy.bits()), expected, "{damage} {file}");
            assert!(checkpoints(&out).contains(&"damaged-step-00000024".to_string()), "{:?}", checkpoints(&out));
            std::fs::remove_dir_all(&out).unwrap();
        }
    }
}

#[test]
fn all_checkpoints_damaged_or_gone_is_refused() {
    let dir = folder();
    let out = dir.path().join("out");
    Job::new(&out).run().unwrap();
    for step in [20, 24] {
        std::fs::write(out.join(format!("checkpoints/step-000000{step}/state.json")), "{}").unwrap();
    }
    let lines = metrics(&out);
    let error = Job::new(&out).run().unwrap_err().to_string();
    assert!(
        error.contains("step-00000024/state.json: 2 bytes") && error.contains("no checkpoint of this run is good"),
        "{error}"
    );
    for step in [20, 24] {
        std::fs::remove_dir_all(out.join(format!("checkpoints/step-000000{step}"))).unwrap();
    }
    let error = Job::new(&out).run().unwrap_err().to_string();
    assert!(error.contains("checkpoints were saved here and all of them are gone"), "{error}");
    assert_eq!(metrics(&out), lines, "a refused run changes nothing");
}

#[test]
fn a_checkpoint_of_another_format_is_no_damage() {
    let dir = folder();
    let out = dir.path().join("out");
    Job::new(&out).run().unwrap();
    let path = out.join("checkpoints/step-00000024/manifest.json");
    let mut manifest: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    manifest.insert("format".into(), 2.into());
    manifest.shift_remove("sha256");
    let digest = <sha2::Sha256 as sha2::Digest>::digest(serde_json::Value::Object(manifest.clone()).to_string());
    manifest.insert("sha256".into(), digest.iter().map(|b| format!("{b:02x}")).collect::<String>().into());
    std::fs::write(&path, serde_json::Value::Object(manifest).to_string()).unwrap();
    let error = Job::new(&out).run().unwrap_err().to_string();
    assert!(error.contains("checkpoint format 2, this engine reads format 1; use the engine that wrote it"), "{error}");
    assert!(checkpoints(&out).contains(&"step-00000024".to_string()));
}

#[test]
fn a_bad_gradient_changes_no_bit_and_is_logged() {
    let dir = folder();
    let out = dir.path().join("out");
    let mut job = Job::new(&out).with("steps = 6\neval-every = 0");
    job.run().unwrap();
    let before = dir.path().join("bad");
    let mut bad = Job::new(&before).with("steps = 6\neval-every = 0");
    bad.toy.bad = (0..6).collect();
    let untouched = bad.toy.bits();
    let summary = bad.run().unwrap();
    assert_eq!((summary.state.skipped, summary.state.skipped_in_a_row), (6, 6));
    assert_eq!(bad.toy.bits(), untouched);
    assert_ne!(job.toy.bits(), untouched);
    let lines = metrics(&before);
    let skipped: Vec<_> = lines.iter().filter(|l| l.contains("\"skipped\":true")).collect();
    assert_eq!(skipped.len(), 6);
    assert!(skipped[0].contains("\"texts\":[\"doc-") && skipped[0].contains("\"loss\":null"), "{}", skipped[0]);
    assert!(skipped[0].contains("\"grad_norm_bits\":\"7ff0000000000000\""), "{}", skipped[0]);
    assert_eq!(bad.told.text().matches("the gradient is not finite, nothing was updated").count(), 6);
}

#[test]
fn bad_gradients_in_a_row_stop_the_run_and_name_the_texts() {
    let dir = folder();
    let out = dir.path().join("out");
    let mut job = Job::new(&out).with("max-skipped = 3");
    job.toy.bad = vec![2, 3, 11, 12, 13];
    let error = job.run().unwrap_err();
    let text = error.to_string();
    assert_eq!(error.exit_code(), 1);
    assert!(
        text.contains("not finite in 3 steps in a row, up to step 14; the last batch begins at sample 52: doc-"),
        "{text}"
    );
    assert!(text.contains("the last good checkpoint is that of step 10"), "{text}");
    assert_eq!(text.matches("doc-").count(), 4, "{text}");
    let state = checkpoint::verify(&out.join("checkpoints/step-00000010")).unwrap();
    assert_eq!((state.skipped, state.skipped_in_a_row), (2, 0));
    drop(job);
    // The counter is part of the state: a resumed run counts on.
    let mut again = Job::new(&out).with("max-skipped = 3");
    again.toy.bad = vec![11, 12];
    assert_eq!(again.run().unwrap().state.skipped, 4);
}

#[test]
fn changed_settings_are_refused_with_old_and_new_value() {
    let dir = folder();
    let out = dir.path().join("out");
    let mut job = Job::new(&out);
    job.toy.stop_at = Some((9, job.stop.clone()));
    assert!(job.run().is_err());
    drop(job);
    let cases = [
        ("learning-rate = 0.02", "learning-rate was 0.01 and is now 0.02"),
        ("seed = 1", "seed was 42 and is now 1"),
        ("batch-size = 8", "batch-size was 4 and is now 8"),
        ("steps = 30", "steps was 24 and is now 30"),
        ("encoder-mask-probability = 0.15", "encoder-mask-probability was 0.3 and is now 0.15"),
        ("weight-decay = 0.0\nbeta1 = 0.8", "beta1 was 0.9 and is now 0.8 | "),
    ];
    for (more, expected) in cases {
        let error = Job::new(&out).with(more).run().unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains(expected), "{error}");
        assert!(error.to_string().contains("--override "), "{error}");
    }
    // What does not change the result may change.
    let mut other = Job::new(&out).with("log-every = 2\nkeep = 5\nsave-every = 7\nsteps = 30");
    other.overrides = vec!["steps".into()];
    assert_eq!(other.run().unwrap().state.step, 30);
    let mut unknown = Job::new(&out);
    unknown.overrides = vec!["learning_rate".into()];
    let error = unknown.run().unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(
        error.to_string().contains("--override learning_rate: no such setting; the settings are accumulate, "),
        "{error}"
    );
}

#[test]
fn resume_never_and_resume_from_a_checkpoint() {
    let expected = undisturbed();
    let dir = folder();
    let (out, branch) = (dir.path().join("out"), dir.path().join("branch"));
    Job::new(&out).run().unwrap();
    let error = Job::new(&out).with("resume = 'never'").run().unwrap_err().to_string();
    assert!(error.contains("holds a run that was saved at step 24"), "{error}");

    let older = format!("resume = '{}'", out.join("checkpoints/step-00000020").display());
    let error = Job::new(&out).with(&older).run().unwrap_err().to_string();
    assert!(error.contains("holds this later checkpoint"), "{error}");
    let mut job = Job::new(&branch).with(&older);
    job.run().unwrap();
    assert_eq!(job.toy.bits(), expected.1);
    let after: Vec<_> = expected
        .0
        .iter()
        .filter(|l| ["21", "22", "23", "24"].iter().any(|s| l.contains(&format!("\"step\":{s},"))))
        .cloned()
        .collect();
    assert_eq!(metrics(&branch), after);
    let error = Job::new(&dir.path().join("third")).with("resume = '/nonexistent'").run().unwrap_err().to_string();
    assert!(error.starts_with("/nonexistent/manifest.json: missing"), "{error}");
}

#[test]
fn a_folder_of_somebody_else_is_refused_and_left_alone() {
    let dir = folder();
    std::fs::write(dir.path().join("thesis.tex"), "x").unwrap();
    let error = Job::new(dir.path()).run().unwrap_err().to_string();
    assert!(error.contains("the output folder holds thesis.tex and no run; choose a new or empty folder"), "{error}");
    assert_eq!(Disk::default().list(dir.path()).unwrap(), ["thesis.tex"]);
}

#[test]
fn the_padding_of_the_arenas_is_the_engines_own() {
    let dir = folder();
    let out = dir.path().join("out");
    Job::new(&out).run().unwrap();
    let mut resumed = Job::new(&out);
    resumed.run().unwrap();
    let weights = &resumed.toy.bits()[..32];
    assert_eq!(weights[12..16], [f32::NEG_INFINITY.to_bits(); 4]);
    let stored = std::fs::metadata(out.join("checkpoints/step-00000024/weights.safetensors")).unwrap().len();
    assert!(stored < 8 + 400 + 23 * 4, "{stored} bytes hold more than 23 numbers and a header");
}
