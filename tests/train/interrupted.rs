//! What a run promises when it is killed, stopped or starved of disk: every test ends by comparing with a run that nothing
//! happened to.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::toy::{Job, STEPS, checkpoints, folder, metrics, undisturbed};
use retromae_engine::error::Kind;
use retromae_engine::files::disk::{Disk, Op};
use retromae_engine::train::checkpoint;
use retromae_engine::train::signals::Stop;

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
pub fn killer(at: usize) -> Arc<retromae_engine::files::disk::Hook> {
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
    command.args(["--exact", "interrupted::child", "--nocapture"]).env("RETROMAE_TOY_OUT", out);
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

pub fn copy_dir(from: &Path, to: &Path) {
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
            .args(["--exact", "interrupted::child", "--nocapture"])
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
