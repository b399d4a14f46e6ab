//! A rank that is killed or stopped, that has other settings or another program: all end, one line says which rank and why, nothing is
//! half-written, and the same command goes on.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::runs::{good, metrics};
use crate::support::{connect, free_port};
use crate::world::{BINARY, World, stderr};

/// The processes that `parent` has started, in the order of their start.
pub fn children(parent: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
    text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

pub fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").args([name, &pid.to_string()]).status().unwrap().success());
}

#[track_caller]
pub fn wait_for(what: &str, mut there: impl FnMut() -> bool) {
    let began = Instant::now();
    while !there() {
        assert!(began.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn started(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// A long run of three ranks.
fn long(world: &World, out: &str, more: &[&str]) -> Command {
    let base =
        ["--ranks", "3", "--batch-size", "2", "--steps", "100000", "--save-every", "20", "-q", "--eval-every", "0"];
    world.train(out, &[&base, more].concat())
}

/// Checks every digest of a run.
fn verified(out: &Path) {
    let verify = Command::new(BINARY).arg("verify").arg(out).output().unwrap();
    assert!(verify.status.success(), "{}", stderr(&verify));
}

/// Newest checkpoint.
fn newest(out: &Path) -> u64 {
    let text = std::fs::read_to_string(out.join("checkpoints/latest")).unwrap();
    text.trim().trim_start_matches("step-").parse().unwrap()
}

#[test]
fn a_killed_or_stopped_rank_ends_all_and_is_named() {
    let world = World::new();
    for (victim, name, words) in [
        (0, "-KILL", "rank 0: its process ended"),
        (2, "-KILL", "rank 2: its process ended"),
        (1, "-STOP", "rank 1: has given no sign of life for 1 s"),
        (0, "-STOP", "rank 0: has given no sign of life for 1 s"),
    ] {
        let name_of_run = format!("out{victim}{name}");
        let out = world.path(&name_of_run);
        let child = started(&mut long(&world, &name_of_run, &["--collective-timeout", "1"]));
        wait_for("a checkpoint", || out.join("checkpoints/latest").exists());
        let (ranks, began) = (children(child.id()), Instant::now());
        assert_eq!(ranks.len(), 3);
        signal(ranks[victim], name);
        let done = child.wait_with_output().unwrap();
        // The timeout and five seconds.
        assert!(began.elapsed() < Duration::from_secs(6), "{name} {victim}: {:?}", began.elapsed());
        let text = stderr(&done);
        assert!(text.starts_with(&format!("error: {words}")) && text.lines().count() == 1, "{name} {victim}: {text}");
        assert_eq!(done.status.code(), Some(1));
        assert!(ranks.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists()), "a rank is left");
        verified(&out);
        let saved = newest(&out);
        let steps = (saved + 3).to_string();
        let more = ["--override", "steps", "--override", "warmup-steps", "--steps", &steps, "--ranks", "3"];
        let shape = ["--batch-size", "2", "--eval-every", "0"];
        let again = good(&mut world.train(&name_of_run, &[&more[..], &shape].concat()));
        assert!(stderr(&again).contains(&format!("resuming from {}", out.join("checkpoints").display())));
        assert_eq!(metrics(&out).last().unwrap()["step"], saved + 3);
    }
}

/// A launcher that is killed leaves no ranks behind.
#[test]
fn ranks_end_with_their_launcher() {
    let world = World::new();
    let mut child = started(&mut long(&world, "out", &[]));
    wait_for("a checkpoint", || world.path("out/checkpoints/latest").exists());
    let ranks = children(child.id());
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for("all ranks to end", || ranks.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists()));
    verified(&world.path("out"));
}

/// A rank as torchrun would start it.
pub fn rank(mut command: Command, rank: usize, size: usize, port: u16) -> Command {
    command.env("RANK", rank.to_string()).env("WORLD_SIZE", size.to_string()).env("LOCAL_RANK", rank.to_string());
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
    command
}

/// Outputs of two ranks.
fn both(first: Command, second: Command) -> [Output; 2] {
    let port = free_port();
    let children = [first, second].into_iter().enumerate().map(|(i, command)| started(&mut rank(command, i, 2, port)));
    let outputs: Vec<Output> =
        children.collect::<Vec<_>>().into_iter().map(|c| c.wait_with_output().unwrap()).collect();
    outputs.try_into().unwrap()
}

#[track_caller]
fn refused_alike(outputs: [Output; 2], words: &str) {
    for output in &outputs {
        let text = stderr(output);
        assert!(text.starts_with(&format!("error: {words}")) && text.lines().count() == 1, "{text}");
        assert!(!output.status.success());
    }
}

#[test]
fn ranks_that_differ_are_refused_before_anything_is_written() {
    let world = World::new();
    let run = |more: &[&str]| world.train("out", &[&["-q"], more].concat());
    refused_alike(
        both(run(&[]), run(&["--weight-decay", "0.5"])),
        "rank 1: weight-decay is 0.5, that of rank 0 0.01; give every rank the same settings, data and model",
    );
    // Another vocabulary of equal size, so that nothing but the digest of the data differs.
    let texts = std::fs::read_to_string(world.path("texts.txt")).unwrap().replace("the package", "package the");
    std::fs::write(world.path("others.txt"), texts).unwrap();
    let mut tokenize = Command::new(BINARY);
    tokenize.args(["tokenize", "--max-length", "32", "--input"]).arg(world.path("others.txt"));
    good(tokenize.arg("--tokenizer").arg(world.path("tokenizer")).arg("--output").arg(world.path("others")));
    let other_data = |command: Command| {
        let mut other = Command::new(BINARY);
        other.args(command.get_args().map(|a| if a == world.path("shards") { world.path("others") } else { a.into() }));
        other
    };
    refused_alike(both(run(&[]), other_data(run(&[]))), "rank 1: data is 40 sequences");
    let missing = |command: Command| {
        let mut other = Command::new(BINARY);
        other
            .args(command.get_args().map(|a| if a == world.path("shards") { world.path("nowhere") } else { a.into() }));
        other
    };
    let [zero, one] = both(run(&[]), missing(run(&[])));
    let (zero, one) = (stderr(&zero), stderr(&one));
    assert!(zero.starts_with("error: rank 1: ") && zero.contains("nowhere"), "{zero}");
    assert_eq!(zero, one);
    // The same program with a byte behind its end.
    let build: PathBuf = world.path("another-build");
    std::fs::copy(BINARY, &build).unwrap();
    std::fs::OpenOptions::new().append(true).open(&build).unwrap().write_all(b"x").unwrap();
    let other_build = |command: Command| {
        let mut other = Command::new(&build);
        other.args(command.get_args());
        other
    };
    refused_alike(both(run(&[]), other_build(run(&[]))), "rank 1: is another build of the program than rank 0");
    assert!(!world.path("out").exists());
    let (out, shape) = (world.path("out"), ["--steps", "2"]);
    let done = both(run(&shape), run(&shape));
    assert!(done.iter().all(|output| output.status.success()));
    assert!(stderr(&done[0]).is_empty() && out.join("model").is_dir());
    assert!(done[1].stdout.is_empty() && done[1].stderr.is_empty(), "only rank 0 speaks");
}

#[test]
fn a_rank_that_never_comes_is_named_and_a_stranger_is_ignored() {
    let world = World::new();
    let port = free_port();
    let mut command = rank(world.train("out", &["-q", "--rendezvous-timeout", "0.7"]), 0, 2, port);
    let child = started(&mut command);
    connect(port).write_all(b"SSH-2.0-x\r\n").unwrap();
    let done = child.wait_with_output().unwrap();
    let text = stderr(&done);
    assert!(text.starts_with("error: rank 1: did not come within 0.7 s; start all 2 ranks"), "{text}");
    let mut command = world.train("out", &["--ranks", "2", "--collective-timeout", "0"]);
    assert_eq!(command.output().unwrap().status.code(), Some(2));
    let mut command = rank(world.train("out", &["--ranks", "2"]), 0, 2, port);
    let text = stderr(&command.output().unwrap());
    assert!(
        text.starts_with("error: --gpus or --ranks 2, and 2 processes by RANK and WORLD_SIZE (torchrun); "),
        "{text}"
    );
    // Whatever the variables say.
    good(&mut rank(world.train("alone", &["--ranks", "1", "--steps", "1"]), 0, 2, port));
}

/// A gradient that is not finite at one rank skips the step at all of them, as alone; the last of several ends the run.
#[test]
fn steps_without_a_finite_gradient_are_skipped_by_all() {
    let world = World::new();
    let more =
        ["--learning-rate", "1e30", "--max-skipped", "3", "--ranks", "2", "-q", "--clip", "0", "--warmup-steps", "0"];
    let done = world.train("out", &more).output().unwrap();
    let text = stderr(&done);
    let error: Vec<&str> = text.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(error.len(), 1, "{text}");
    assert!(error[0].contains("the gradient of ranks 0, 1 was not finite in 3 steps in a row"), "{text}");
    assert_eq!(metrics(&world.path("out")).last().unwrap()["ranks"], serde_json::json!([0, 1]));
    assert_eq!(done.status.code(), Some(1));
}
