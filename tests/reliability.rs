//! What a run promises when it is killed, stopped, starved of disk, or handed damaged files: RELIABILITY contracts 1 to 10, on the
//! toy. Every test ends by comparing with a run that nothing happened to.

#[path = "toy/mod.rs"]
mod toy;

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use retromae_engine::error::Kind;
use retromae_engine::train::checkpoint;
use retromae_engine::train::disk::{Disk, Op};
use retromae_engine::train::signals::Stop;
use toy::{Job, STEPS, checkpoints, folder, metrics, undisturbed};

/// Runs the toy in a process of its own when the environment says so, and else checks the undisturbed run: the test binary doubles
/// as the program that is killed.
#[test]
fn child() {
    let Ok(out) = std::env::var("RETROMAE_TOY_OUT") else {
        let (lines, bits) = undisturbed();
        assert_eq!((lines.len() as u64, bits.len()), (STEPS + 4, 96));
        return;
    };
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse::<u64>().ok());
    let mut job = Job::new(Path::new(&out));
    job.toy.pace = Duration::from_millis(number("RETROMAE_TOY_PACE").unwrap_or(0));
    job.stop = Stop::install().unwrap();
    if let Some(at) = number("RETROMAE_TOY_KILL_AT") {
        job.disk = Disk::with_hook(killer(at as usize));
    }
    if let Err(e) = job.run() {
        eprintln!("error: {e}");
        std::process::exit(e.exit_code());
    }
    std::process::exit(0);
}

/// Kills this very process at the file operation of number `at`.
fn killer(at: usize) -> Arc<retromae_engine::train::disk::Hook> {
    let counter = AtomicUsize::new(0);
    Arc::new(move |_, _| {
        if counter.fetch_add(1, Ordering::Relaxed) == at {
            let _ = Command::new("kill").args(["-9", &std::process::id().to_string()]).status();
            std::thread::sleep(Duration::from_secs(60));
        }
        Ok(())
    })
}

fn command(out: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture"]).env("RETROMAE_TOY_OUT", out);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn start(out: &Path, pace: u64) -> Child {
    command(out).env("RETROMAE_TOY_PACE", pace.to_string()).spawn().unwrap()
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

fn wait_for_step(out: &Path, step: u64) {
    let began = Instant::now();
    let path = out.join("metrics.jsonl");
    while !std::fs::read_to_string(&path).unwrap_or_default().contains(&format!("\"step\":{step},")) {
        assert!(began.elapsed() < Duration::from_secs(20), "no step {step} after 20 s");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Goes on with the run in `out` and checks that it ends like the undisturbed one.
fn ends_undisturbed(out: &Path, expected: &(Vec<String>, Vec<u32>), what: &str) {
    let mut job = Job::new(out);
    job.run().unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(metrics(out), expected.0, "{what}: metrics");
    assert_eq!(job.toy.bits(), expected.1, "{what}: weights");
    let left: Vec<_> = checkpoints(out).into_iter().filter(|name| name.starts_with('.')).collect();
    assert!(left.is_empty(), "{what}: left {left:?}");
    for name in checkpoints(out).iter().filter(|name| name.starts_with("step-")) {
        checkpoint::verify(&out.join("checkpoints").join(name)).unwrap_or_else(|e| panic!("{what}: {e}"));
    }
}

/// A small generator for moments and places; the seed is printed by every assertion that uses it.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

#[test]
fn twenty_kills_at_random_times() {
    let expected = undisturbed();
    let dir = folder();
    let mut seed = 7;
    for round in 0..20 {
        let out = dir.path().join(round.to_string());
        let mut kills = 0;
        // A process takes about 80 ms; it is killed somewhere in there until one gets through.
        loop {
            let mut child = start(&out, 2);
            std::thread::sleep(Duration::from_micros(5_000 + random(&mut seed) % 90_000));
            let _ = child.kill();
            let output = child.wait_with_output().unwrap();
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            match output.status.code() {
                Some(0) => break,
                Some(code) => panic!("round {round}: exit {code}: {text}"),
                None => assert_eq!(output.status.signal(), Some(9), "round {round}: {text}"),
            }
            kills += 1;
            assert!(kills < 200, "round {round} never ends");
        }
        ends_undisturbed(&out, &expected, &format!("round {round} after {kills} kills"));
    }
}

/// Counts the file operations of a whole run, and of a resumed one.
fn operations(out: &Path) -> usize {
    let counter = Arc::new(AtomicUsize::new(0));
    let seen = counter.clone();
    let mut job = Job::new(out);
    job.disk = Disk::with_hook(Arc::new(move |_, _| {
        seen.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }));
    job.run().unwrap();
    counter.load(Ordering::Relaxed)
}

#[test]
fn killed_at_every_file_operation() {
    let expected = undisturbed();
    let dir = folder();
    let count = operations(&dir.path().join("count"));
    assert!(count > 150, "{count} operations");
    for at in 0..count {
        let out = dir.path().join(at.to_string());
        let output = command(&out).env("RETROMAE_TOY_KILL_AT", at.to_string()).output().unwrap();
        assert_eq!(output.status.signal(), Some(9), "operation {at}: {}", String::from_utf8_lossy(&output.stderr));
        ends_undisturbed(&out, &expected, &format!("killed at operation {at}"));
        std::fs::remove_dir_all(&out).unwrap();
    }
}

/// A disk whose operation of number `at` fails, and with `lasting` every write, creation and flush after it.
fn failing(at: usize, errno: i32, lasting: bool) -> Disk {
    let counter = AtomicUsize::new(0);
    Disk::with_hook(Arc::new(move |op, _| {
        let n = counter.fetch_add(1, Ordering::Relaxed);
        let writes = matches!(op, Op::Write | Op::Create | Op::CreateDir | Op::SyncFile | Op::SyncDir);
        if n == at || (lasting && n > at && writes) { Err(io::Error::from_raw_os_error(errno)) } else { Ok(()) }
    }))
}

#[test]
fn every_file_operation_fails_once_or_for_good() {
    let (enospc, eio, emfile) = (28, 5, 24);
    let expected = undisturbed();
    let dir = folder();
    let count = operations(&dir.path().join("count"));
    for (errno, lasting) in [(enospc, true), (eio, false), (emfile, false)] {
        for at in 0..count {
            let what = format!("errno {errno} at operation {at}");
            let out = dir.path().join(format!("{errno}-{at}"));
            let mut job = Job::new(&out);
            job.disk = failing(at, errno, lasting);
            let error = job.run().err().unwrap_or_else(|| panic!("{what}: not noticed"));
            assert_eq!(error.exit_code(), 1, "{what}: {error}");
            assert!(error.to_string().contains("; "), "{what}: {error}");
            drop(job);
            ends_undisturbed(&out, &expected, &what);
            std::fs::remove_dir_all(&out).unwrap();
        }
    }
}

#[test]
fn resuming_fails_cleanly_and_loses_nothing() {
    let expected = undisturbed();
    let dir = folder();
    let saved = dir.path().join("saved");
    let mut job = Job::new(&saved);
    job.toy.stop_at = Some((12, job.stop.clone()));
    assert_eq!(job.run().unwrap_err().kind(), Kind::Signal(15));
    drop(job);
    let copy = dir.path().join("count");
    copy_dir(&saved, &copy);
    for at in 0..operations(&copy) {
        let out = dir.path().join(at.to_string());
        copy_dir(&saved, &out);
        let mut job = Job::new(&out);
        job.disk = failing(at, 5, false);
        let error = job.run().err().unwrap_or_else(|| panic!("operation {at}: not noticed"));
        assert_eq!(error.kind(), Kind::Io, "operation {at}: {error}");
        drop(job);
        ends_undisturbed(&out, &expected, &format!("EIO at operation {at} of a resumed run"));
        std::fs::remove_dir_all(&out).unwrap();
    }
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn a_file_size_limit_is_one_clean_error() {
    let expected = undisturbed();
    let dir = folder();
    for (i, blocks) in [1, 2, 4, 8].into_iter().enumerate() {
        let out = dir.path().join(i.to_string());
        let script = format!("ulimit -f {blocks}; exec \"$0\" \"$@\"");
        let output = Command::new("bash")
            .args(["-c", &script])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env("RETROMAE_TOY_OUT", &out)
            .stdout(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{blocks} KiB: {text}");
        assert!(text.starts_with("error: ") && text.lines().count() == 1 && text.contains("cannot write"), "{text}");
        ends_undisturbed(&out, &expected, &format!("after a limit of {blocks} KiB"));
    }
}

#[test]
fn a_full_disk_of_any_size_is_one_clean_error() {
    let expected = undisturbed();
    let dir = folder();
    let mount = dir.path().join("small");
    std::fs::create_dir(&mount).unwrap();
    let mut tried = 0;
    for kib in [4, 12, 24, 32, 40, 48, 64, 80] {
        let options = format!("size={kib}k");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&mount).output();
        if !mounted.is_ok_and(|o| o.status.success()) {
            println!("left out: mounting a small tmpfs needs root; a size limit stands in for it");
            return;
        }
        let output = command(&mount.join("out")).output();
        let kept = dir.path().join(format!("after-{kib}"));
        if mount.join("out").is_dir() {
            copy_dir(&mount.join("out"), &kept);
        }
        assert!(Command::new("umount").arg(&mount).status().unwrap().success());
        let output = output.unwrap();
        if output.status.code() != Some(0) {
            tried += 1;
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(1), "{kib} KiB: {text}");
            assert!(text.starts_with("error: ") && text.lines().count() == 1, "{kib} KiB: {text}");
            assert!(text.contains("free space or choose another folder"), "{kib} KiB: {text}");
        }
        ends_undisturbed(&kept, &expected, &format!("after a disk of {kib} KiB"));
    }
    assert!(tried >= 4, "only {tried} sizes were too small");
}

/// Waits for a child that was sent a signal.
fn outcome(child: Child) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

#[test]
fn signals_finish_the_step_save_and_leave() {
    let expected = undisturbed();
    let dir = folder();
    for (name, code, word) in [("-INT", 130, "SIGINT"), ("-TERM", 143, "SIGTERM")] {
        let out = dir.path().join(word);
        let child = start(&out, 40);
        wait_for_step(&out, 7);
        signal(&child, name);
        let (status, text) = outcome(child);
        assert_eq!(status, Some(code), "{text}");
        assert!(text.contains(&format!("stopped by {word} and saved at step ")) && text.lines().count() == 1, "{text}");
        let step: u64 = text.split("at step ").nth(1).unwrap().split(';').next().unwrap().parse().unwrap();
        assert!((7..10).contains(&step), "{text}");
        assert!(checkpoints(&out).contains(&format!("step-{step:08}")), "{:?}", checkpoints(&out));
        ends_undisturbed(&out, &expected, word);
    }
}

#[test]
fn a_second_signal_ends_the_process_at_once() {
    let dir = folder();
    let out = dir.path().join("out");
    let child = start(&out, 1500);
    wait_for_step(&out, 1);
    std::thread::sleep(Duration::from_millis(50)); // inside step 2
    let began = Instant::now();
    signal(&child, "-TERM");
    std::thread::sleep(Duration::from_millis(50));
    signal(&child, "-INT");
    let (status, text) = outcome(child);
    assert_eq!(status, Some(130), "{text}");
    assert!(began.elapsed() < Duration::from_millis(1000), "took {:?}", began.elapsed());
}

#[test]
fn stopped_at_every_step() {
    let expected = undisturbed();
    let dir = folder();
    for at in 0..STEPS {
        let out = dir.path().join(at.to_string());
        let mut job = Job::new(&out);
        job.toy.stop_at = Some((at, job.stop.clone()));
        let error = job.run().unwrap_err();
        assert_eq!((error.kind(), error.exit_code()), (Kind::Signal(15), 143));
        assert!(checkpoints(&out).contains(&format!("step-{:08}", at + 1)));
        drop(job);
        ends_undisturbed(&out, &expected, &format!("stopped in step {at}"));
    }
}

#[test]
fn a_second_trainer_is_told_who_holds_the_folder() {
    let dir = folder();
    let out = dir.path().join("out");
    let mut child = start(&out, 50);
    wait_for_step(&out, 1);
    let error = Job::new(&out).run().unwrap_err();
    assert!(error.to_string().contains(&format!("process {} is writing to this output folder", child.id())), "{error}");
    assert_eq!(error.exit_code(), 1);
    child.kill().unwrap();
    child.wait().unwrap();
    // The lock dies with its holder.
    ends_undisturbed(&out, &undisturbed(), "after a killed holder");
}

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
