//! `export` and the export at the end of `train`: complete or not there, from the folder of the run alone.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use retromae_engine::files::Disk;
use retromae_engine::files::disk::Op;
use retromae_engine::model::export::verify_export;
use retromae_engine::train::export::{Request, export_run};

use crate::interrupted::{copy_dir, killer};
use crate::toy::folder;
use crate::world::{BINARY, World, stderr};

/// A finished run of eight steps whose shards are gone, shared by the tests; each works on a copy.
fn finished() -> &'static Path {
    static RUN: OnceLock<(World, PathBuf)> = OnceLock::new();
    let (_, run) = RUN.get_or_init(|| {
        let world = World::new();
        let trained = world.train("run", &["--steps", "8"]).output().unwrap();
        assert!(trained.status.success(), "{}", stderr(&trained));
        std::fs::remove_dir_all(world.path("shards")).unwrap();
        std::fs::remove_dir_all(world.path("tokenizer")).unwrap();
        let run = world.path("run");
        (world, run)
    });
    run
}

fn export(run: &Path, output: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(BINARY);
    command.args(["export", "--run"]).arg(run).arg("--output").arg(output).args(more);
    command.output().unwrap()
}

/// Every file below a folder, by its relative path; model cards differ in the name of the folder only.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    fn collect(root: &Path, at: &Path, all: &mut BTreeMap<String, Vec<u8>>) {
        for entry in std::fs::read_dir(at).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() {
                collect(root, &path, all);
            } else if !path.ends_with("README.md") {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_string();
                all.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    let mut all = BTreeMap::new();
    collect(folder, folder, &mut all);
    all
}

fn names(folder: &Path) -> Vec<String> {
    Disk::default().list(folder).unwrap()
}

fn one_line(output: &Output, code: i32, expected: &str) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(text.starts_with("error: ") && text.lines().count() == 1 && text.contains(expected), "{text}");
}

#[test]
fn an_export_on_demand_is_that_of_the_end_without_the_data() {
    let dir = folder();
    let out = dir.path().join("model");
    let done = export(finished(), &out, &["--json", dir.path().join("facts.json").to_str().unwrap()]);
    assert!(done.status.success(), "{}", stderr(&done));
    assert!(String::from_utf8_lossy(&done.stdout).contains("(step 8)"));
    assert_eq!(files(&out), files(&finished().join("model")));
    assert!(out.join("README.md").is_file() && out.join("vocab.txt").is_file());
    let facts: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("facts.json")).unwrap()).unwrap();
    assert_eq!((facts["step"].as_u64(), facts["dtype"].as_str()), (Some(8), Some("F32")));

    one_line(&export(finished(), &out, &[]), 1, "already exists; choose another --output or add --overwrite");
    let half = export(finished(), &out, &["--overwrite", "--dtype", "bf16", "--max-shard-bytes", "20000"]);
    assert!(half.status.success(), "{}", stderr(&half));
    verify_export(&out).unwrap();
    let found = names(&out);
    assert!(found.contains(&"model.safetensors.index.json".into()), "{found:?}");
    assert!(!found.contains(&"model.safetensors".into()), "{found:?}");
    assert_eq!(names(dir.path()), ["facts.json", "model"]);
}

#[test]
fn pre_training_goes_on_from_an_export_with_every_weight() {
    let world = World::new();
    let out = world.path("exported");
    assert!(export(finished(), &out, &[]).status.success());
    let mut next = Command::new(BINARY);
    next.args(["train", "--steps", "2", "--batch-size", "4", "--threads", "1", "--model"]).arg(&out);
    let next = next.arg("--data").arg(world.path("shards")).arg("--output").arg(world.path("next")).output().unwrap();
    assert!(next.status.success(), "{}", stderr(&next));
    assert!(!stderr(&next).contains("start fresh"), "{}", stderr(&next));
    // The learning rate warms up from 0 nowhere here, so the start is what the first evaluation saw: equal to the end of the run.
    let held_out = |run: &Path, step: u64| {
        let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
        lines.filter(|l| l["split"] == "eval" && l["step"] == step).map(|l| l["loss_bits"].clone()).next().unwrap()
    };
    let mut same = world.train("same", &["--steps", "1"]);
    let same = same.output().unwrap();
    assert!(same.status.success(), "{}", stderr(&same));
    let mut again = Command::new(BINARY);
    again.args(["train", "--steps", "1", "--batch-size", "4", "--threads", "1", "--eval-size", "5", "--model"]);
    again.arg(&out).arg("--data").arg(world.path("shards")).arg("--output").arg(world.path("again"));
    assert!(again.output().unwrap().status.success());
    assert_eq!(held_out(&world.path("again"), 0), held_out(finished(), 8));
    assert_ne!(held_out(&world.path("same"), 0), held_out(finished(), 8));
}

#[test]
fn damaged_checkpoints_are_passed_over_and_left_alone() {
    let dir = folder();
    let run = dir.path().join("run");
    copy_dir(finished(), &run);
    let newest = run.join("checkpoints/step-00000008/weights.safetensors");
    let mut bytes = std::fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&newest, &bytes).unwrap();
    let before = names(&run.join("checkpoints"));
    let done = export(&run, &dir.path().join("a"), &[]);
    assert!(done.status.success(), "{}", stderr(&done));
    assert!(String::from_utf8_lossy(&done.stdout).contains("(step 4)"));
    let told = stderr(&done);
    assert!(told.lines().count() == 1 && told.starts_with("warning: "), "{told}");
    assert!(told.contains("weights.safetensors: its digest does not hold") && told.contains("exporting"), "{told}");
    assert_eq!(names(&run.join("checkpoints")), before);

    let damaged = run.join("checkpoints/step-00000008");
    let given = export(&run, &dir.path().join("b"), &["--checkpoint", damaged.to_str().unwrap()]);
    one_line(&given, 1, "its digest does not hold; the checkpoint is damaged; use another one");
    let good = run.join("checkpoints/step-00000004");
    assert!(export(&run, &dir.path().join("c"), &["--checkpoint", good.to_str().unwrap()]).status.success());
    assert_eq!(files(&dir.path().join("a")), files(&dir.path().join("c")));
    std::fs::remove_file(good.join("state.json")).unwrap();
    one_line(&export(&run, &dir.path().join("d"), &[]), 1, "no checkpoint of this run is good");
    assert_eq!(names(dir.path()), ["a", "c", "run"]);
}

#[test]
fn what_is_no_run_is_refused() {
    let dir = folder();
    let out = dir.path().join("out");
    one_line(
        &export(dir.path(), &out, &[]),
        1,
        "is not the folder of a run; give the folder that train --output named",
    );
    one_line(&export(finished(), &out, &["--dtype", "f8"]), 2, "invalid value 'f8'");
    let run = dir.path().join("run");
    copy_dir(finished(), &run);
    let vocabulary = run.join("origin/vocab.txt");
    let mut bytes = std::fs::read(&vocabulary).unwrap();
    bytes[3] ^= 1;
    std::fs::write(&vocabulary, bytes).unwrap();
    one_line(&export(&run, &out, &[]), 1, "origin/vocab.txt: its digest does not hold; give the train command");
    let verified = Command::new(BINARY).arg("verify").arg(&run).output().unwrap();
    one_line(&verified, 1, "origin/vocab.txt: its digest does not hold");
    std::fs::remove_dir_all(run.join("origin")).unwrap();
    std::fs::remove_dir_all(run.join("checkpoints")).unwrap();
    std::fs::create_dir(run.join("checkpoints")).unwrap();
    copy_dir(&finished().join("origin"), &run.join("origin"));
    one_line(&export(&run, &out, &[]), 1, "nothing was saved here yet; let train save a checkpoint first");
    assert!(!out.exists());
}

/// Exports in this process, as the end of `train` (an old model replaced) or as `export` (a new one).
fn in_process(disk: &Disk, run: &Path, replace: bool) -> retromae_engine::Result<()> {
    let request = Request { overwrite: replace, ..Request::new(run, target(run)) };
    export_run(disk, &request, &mut |line| panic!("{line}")).map(drop)
}

fn target(run: &Path) -> PathBuf {
    run.join("model")
}

/// A copy of the run whose model is absent, or an older one: that of step 4.
fn prepared(run: &Path, replace: bool) {
    copy_dir(finished(), run);
    std::fs::remove_dir_all(target(run)).unwrap();
    if replace {
        let older = Some(run.join("checkpoints/step-00000004"));
        let request = Request { checkpoint: older, ..Request::new(run, target(run)) };
        export_run(&Disk::default(), &request, &mut |line| panic!("{line}")).unwrap();
    }
}

/// Counts the file operations of an export.
fn operations(dir: &Path, replace: bool) -> usize {
    let run = dir.join("count");
    prepared(&run, replace);
    let counter = Arc::new(AtomicUsize::new(0));
    let seen = counter.clone();
    let disk = Disk::with_hook(Arc::new(move |_, _| {
        seen.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }));
    in_process(&disk, &run, replace).unwrap();
    std::fs::remove_dir_all(&run).unwrap();
    counter.load(Ordering::Relaxed)
}

/// What is under the final name is whole, old or new; the next export completes and sweeps up.
fn whole_and_completed(run: &Path, replace: bool, what: &str) {
    if target(run).exists() {
        verify_export(target(run)).unwrap_or_else(|e| panic!("{what}: {e}"));
    } else {
        assert!(!replace, "{what}: the old model is gone");
    }
    in_process(&Disk::default(), run, true).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(files(&target(run)), files(&target(finished())), "{what}");
    let left: Vec<String> = names(run).into_iter().filter(|n| n.starts_with('.') && n != ".lock").collect();
    assert!(left.is_empty(), "{what}: left {left:?}");
}

/// Exports in a process of its own when the environment says so: the test binary doubles as the program that is killed.
#[test]
fn export_child() {
    let Ok(run) = std::env::var("RETROMAE_EXPORT_RUN") else {
        verify_export(target(finished())).unwrap();
        return;
    };
    let at = std::env::var("RETROMAE_EXPORT_KILL_AT").unwrap().parse().unwrap();
    let replace = std::env::var("RETROMAE_EXPORT_REPLACE").unwrap() == "true";
    let done = in_process(&Disk::with_hook(killer(at)), Path::new(&run), replace);
    std::process::exit(i32::from(done.is_err()));
}

#[test]
fn killed_at_every_file_operation_of_an_export() {
    let dir = folder();
    for replace in [false, true] {
        let count = operations(dir.path(), replace);
        assert!(count > 60, "{count} operations");
        for at in 0..count {
            let run = dir.path().join(at.to_string());
            prepared(&run, replace);
            let mut child = Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", "exported::export_child", "--nocapture"]).env("RETROMAE_EXPORT_RUN", &run);
            child.env("RETROMAE_EXPORT_KILL_AT", at.to_string()).env("RETROMAE_EXPORT_REPLACE", replace.to_string());
            let output = child.stdout(Stdio::null()).output().unwrap();
            assert_eq!(output.status.signal(), Some(9), "operation {at}: {}", stderr(&output));
            whole_and_completed(&run, replace, &format!("killed at operation {at}, replace {replace}"));
            std::fs::remove_dir_all(&run).unwrap();
        }
    }
}

#[test]
fn every_file_operation_of_an_export_fails_once_or_for_good() {
    let (enospc, eio) = (28, 5);
    let dir = folder();
    for (replace, errno, lasting) in [(false, enospc, true), (true, eio, false)] {
        for at in 0..operations(dir.path(), replace) {
            let what = format!("errno {errno} at operation {at}, replace {replace}");
            let run = dir.path().join(at.to_string());
            prepared(&run, replace);
            let counter = AtomicUsize::new(0);
            let disk = Disk::with_hook(Arc::new(move |op, _| {
                let n = counter.fetch_add(1, Ordering::Relaxed);
                let writes = matches!(op, Op::Write | Op::Create | Op::CreateDir | Op::SyncFile | Op::SyncDir);
                if n == at || (lasting && n > at && writes) { Err(io::Error::from_raw_os_error(errno)) } else { Ok(()) }
            }));
            let error = in_process(&disk, &run, replace).err().unwrap_or_else(|| panic!("{what}: not noticed"));
            assert_eq!(error.exit_code(), 1, "{what}: {error}");
            assert!(error.to_string().contains("; "), "{what}: {error}");
            whole_and_completed(&run, replace, &what);
            std::fs::remove_dir_all(&run).unwrap();
        }
    }
}

#[test]
fn a_run_killed_while_it_exports_is_completed_by_the_same_command() {
    let world = World::new();
    assert!(world.train("run", &["--steps", "8"]).output().unwrap().status.success());
    let model = files(&world.path("run/model"));
    // As a kill in the middle of the export leaves it.
    std::fs::rename(world.path("run/model"), world.path("run/.model.tmp")).unwrap();
    std::fs::remove_file(world.path("run/.model.tmp/config.json")).unwrap();
    let again = world.train("run", &["--steps", "8"]).output().unwrap();
    assert!(again.status.success(), "{}", stderr(&again));
    assert_eq!(files(&world.path("run/model")), model);
    // And with what a run keeps damaged, before the export reads it.
    std::fs::write(world.path("run/origin/config.json"), "{}").unwrap();
    assert!(world.train("run", &["--steps", "8"]).output().unwrap().status.success());
    assert_eq!(files(&world.path("run/model")), model);
    let verified = Command::new(BINARY).arg("verify").arg(world.path("run")).output().unwrap();
    assert!(verified.status.success(), "{}", stderr(&verified));
}
