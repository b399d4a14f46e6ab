//! Killed, starved and stopped: given again, `rerank` ends with the bytes of an undisturbed one.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use retromae_engine::data::pairs::batch::PairTexts;
use retromae_engine::data::pairs::runs::{Run, RunFormat};
use retromae_engine::data::pairs::texts::TextRules;
use retromae_engine::data::shard::ShardSet;
use retromae_engine::data::source::Input;
use retromae_engine::device::{DType, Device};
use retromae_engine::files::Disk;
use retromae_engine::files::disk::{Hook, Op};
use retromae_engine::graph::Capacity;
use retromae_engine::retrieve::rerank::{Candidates, Outputs, Rerank};

use crate::scores::scorer;
use crate::world::{World, stderr};

/// Reranks the world in `root` in parts of a few pairs, in this process.
fn in_process(disk: &Disk, root: &Path, out: &Path) -> retromae_engine::Result<usize> {
    let set = |name: &str| Arc::new(ShardSet::open(&root.join(name)).unwrap());
    let (queries, passages) = (set("queries"), set("passages"));
    let input = Input { path: root.join("run.trec"), bytes: None };
    let run = Run::read(&input, None).unwrap();
    let candidates = Candidates::new(&input, run, &queries, &passages, Some(4)).unwrap();
    let texts = PairTexts::new(queries, passages, TextRules::new(12), Vec::new(), 40).unwrap();
    let (run, scores) = (out.join("run"), Some(out.join("scores")));
    let outputs = Outputs { run, scores, format: RunFormat::Trec, tag: "t".into(), overwrite: false };
    let settings = BTreeMap::from([("model".to_string(), "m".to_string())]);
    let mut rerank = Rerank::begin(disk, &candidates, &outputs, settings)?;
    let capacity = Capacity { tokens: 120, sequences: 8, length: 40, encoder_labels: 0 };
    let mut scorer = scorer(&root.join("model"), Device::Cpu, DType::F32, capacity);
    rerank.score(&texts, &mut scorer, 13, &mut |_, _| Ok(()))?;
    rerank.write().map(|done| done.resumed)
}

/// Both outputs, where they are there.
fn outputs(out: &Path) -> [Option<String>; 2] {
    ["run", "scores"].map(|name| std::fs::read_to_string(out.join(name)).ok())
}

fn names(folder: &Path) -> Vec<String> {
    Disk::default().list(folder).unwrap()
}

/// The undisturbed outputs, and the number of file operations they took.
fn undisturbed(world: &World) -> ([Option<String>; 2], usize) {
    let out = world.path("undisturbed");
    std::fs::create_dir(&out).unwrap();
    let counter = Arc::new(AtomicUsize::new(0));
    let seen = counter.clone();
    let disk = Disk::with_hook(Arc::new(move |_, _| {
        seen.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }));
    assert_eq!(in_process(&disk, &world.path(""), &out).unwrap(), 0);
    assert_eq!(names(&out), ["run", "scores"]);
    (outputs(&out), counter.load(Ordering::Relaxed))
}

/// What is under a final name is whole; the next rerank completes and leaves nothing else.
fn whole_and_completed(world: &World, out: &Path, expected: &[Option<String>; 2], what: &str) {
    for (found, whole) in outputs(out).iter().zip(expected) {
        assert!(found.is_none() || found == whole, "{what}: a part is under the final name");
    }
    let finished = outputs(out) == *expected && !out.join(".run.parts/state.json").exists();
    match in_process(&Disk::default(), &world.path(""), out) {
        Ok(_) => {}
        // Killed after the last byte was in place: there is nothing left to do.
        Err(e) if finished => assert!(e.to_string().contains("exists already"), "{what}: {e}"),
        Err(e) => panic!("{what}: {e}"),
    }
    assert_eq!(outputs(out), *expected, "{what}");
    assert_eq!(names(out), ["run", "scores"], "{what}");
}

/// Reranks in a process of its own when the environment says so: the test binary doubles as the program that is killed.
#[test]
fn child() {
    let Ok(root) = std::env::var("RETROMAE_RERANK_ROOT") else { return assert!(std::env::current_exe().is_ok()) };
    let at: usize = std::env::var("RETROMAE_RERANK_KILL_AT").unwrap().parse().unwrap();
    let counter = AtomicUsize::new(0);
    let killer: Arc<Hook> = Arc::new(move |_, _| {
        if counter.fetch_add(1, Ordering::Relaxed) == at {
            let _ = Command::new("kill").args(["-9", &std::process::id().to_string()]).status();
            std::thread::sleep(Duration::from_secs(60));
        }
        Ok(())
    });
    let out = std::env::var("RETROMAE_RERANK_OUT").unwrap();
    let done = in_process(&Disk::with_hook(killer), Path::new(&root), Path::new(&out));
    std::process::exit(i32::from(done.is_err()));
}

#[test]
fn killed_at_every_file_operation() {
    let world = World::new();
    let (expected, count) = undisturbed(&world);
    assert!(count > 25, "{count} operations");
    for at in 0..count {
        let out = world.path(&format!("out-{at}"));
        std::fs::create_dir(&out).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "interrupted::child", "--nocapture"]).env("RETROMAE_RERANK_ROOT", world.path(""));
        child.env("RETROMAE_RERANK_KILL_AT", at.to_string()).env("RETROMAE_RERANK_OUT", &out);
        let output = child.stdout(Stdio::null()).output().unwrap();
        assert_eq!(output.status.signal(), Some(9), "operation {at}: {}", stderr(&output));
        whole_and_completed(&world, &out, &expected, &format!("killed at operation {at} of {count}"));
    }
}

#[test]
fn every_file_operation_fails_once_or_for_good() {
    let (enospc, eio) = (28, 5);
    let world = World::new();
    let (expected, count) = undisturbed(&world);
    for (errno, lasting) in [(enospc, true), (eio, false)] {
        for at in 0..count {
            let what = format!("errno {errno} at operation {at} of {count}");
            let out: PathBuf = world.path(&format!("out-{errno}-{at}"));
            std::fs::create_dir(&out).unwrap();
            let counter = AtomicUsize::new(0);
            let disk = Disk::with_hook(Arc::new(move |op, _| {
                let n = counter.fetch_add(1, Ordering::Relaxed);
                let writes = matches!(op, Op::Write | Op::Create | Op::CreateDir | Op::SyncFile | Op::SyncDir);
                if n == at || (lasting && n > at && writes) { Err(io::Error::from_raw_os_error(errno)) } else { Ok(()) }
            }));
            let error = in_process(&disk, &world.path(""), &out).err().unwrap_or_else(|| panic!("{what}: not noticed"));
            assert_eq!(error.exit_code(), 1, "{what}: {error}");
            assert!(error.to_string().contains("; "), "{what}: {error}");
            whole_and_completed(&world, &out, &expected, &what);
        }
    }
}

/// A world of more pairs than a part has, so that the command can be stopped between parts.
fn large() -> (World, Vec<&'static str>) {
    let world = World::new();
    (world, vec!["--scores", "scores.tsv", "--tokens-per-batch", "600"])
}

/// Runs the command and sends it a signal as soon as a part is kept; what it said. On a busy machine the signal may come too late: then
/// once more.
fn interrupt(world: &World, more: &[&str], signal: &str) -> Output {
    let kept = world.path(".out.parts/numbers.bin");
    for _ in 0..20 {
        let mut child = world.rerank("out", more).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        while !std::fs::metadata(&kept).is_ok_and(|meta| meta.len() > 0) && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_micros(200));
        }
        let _ = Command::new("kill").args([signal, &child.id().to_string()]).status();
        let done = child.wait_with_output().unwrap();
        if !done.status.success() {
            return done;
        }
        for name in ["out", "scores.tsv"] {
            std::fs::remove_file(world.path(name)).unwrap();
        }
    }
    panic!("it always ends before the signal comes")
}

#[test]
fn the_command_killed_and_given_again() {
    let (world, more) = large();
    let expected = (world.reranked("whole", &more), std::fs::read(world.path("scores.tsv")).unwrap());
    std::fs::remove_file(world.path("scores.tsv")).unwrap();
    assert_eq!(interrupt(&world, &more, "-9").status.signal(), Some(9));

    // Other settings, another model, another run: one line that says what differs, and nothing is lost.
    let refused = |more: &[&str], expected: &str| {
        let done = world.rerank("out", more).output().unwrap();
        let text = stderr(&done);
        assert_eq!(done.status.code(), Some(1), "{text}");
        let last = text.lines().last().unwrap_or_default();
        assert!(last.starts_with("error: ") && last.contains("is half done with other settings: "), "{text}");
        assert!(last.contains(expected), "{text}");
    };
    refused(&[&more[..], &["--max-length", "40"]].concat(), "max-length was 51, is 40, query-length was 25, is 20");
    refused(&[&more[..], &["--top-k", "3"]].concat(), "pairs was 1080, is 36, run was ");
    refused(&[&more[..2], &["--tokens-per-batch", "700"]].concat(), "tokens-per-batch was 600, is 700; give the same");
    std::fs::create_dir(world.path("other")).unwrap();
    for name in ["config.json", "vocab.txt", "model.safetensors"] {
        std::fs::copy(world.path("model").join(name), world.path("other").join(name)).unwrap();
    }
    let path = world.path("other/model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len() - 8;
    bytes[end] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    refused(&[&more[..], &["--model", "other"]].concat(), "model was ");

    let facts = world.path("facts.json");
    let done = world.reranked("out", &[&more[..], &["--json", facts.to_str().unwrap()]].concat());
    assert_eq!((done, std::fs::read(world.path("scores.tsv")).unwrap()), expected);
    let facts: serde_json::Value = serde_json::from_slice(&std::fs::read(facts).unwrap()).unwrap();
    let resumed = facts["resumed"].as_u64().unwrap();
    assert!((512..1080).contains(&resumed), "{facts}");
    assert_eq!(world.hidden(), Vec::<String>::new());
}

#[test]
fn a_signal_ends_it_with_the_finished_parts_kept() {
    let (world, more) = large();
    let expected = world.reranked("whole", &more);
    std::fs::remove_file(world.path("scores.tsv")).unwrap();
    let done = interrupt(&world, &more, "-TERM");
    assert_eq!(done.status.code(), Some(143), "{}", stderr(&done));
    assert!(stderr(&done).contains("stopped by SIGTERM; give the same command again to go on"), "{}", stderr(&done));
    assert_eq!(world.reranked("out", &more), expected);
}
