//! Ranks without memory, and ranks that come late or never, with the program itself: all end in time, and one line names the rank.

use std::ffi::OsString;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::failures::{children, rank, signal, started, wait_for};
use crate::runs::{assert_same_bits, good};
use crate::support::free_port;
use crate::world::{BINARY, World, stderr};

/// A model whose weights, gradients and moments take a GiB, mostly never touched.
fn large(world: &World) {
    let config = std::fs::read_to_string(world.path("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["max_position_embeddings"] = (1 << 20).into();
    std::fs::write(world.path("config.json"), config.to_string()).unwrap();
}

/// The command with an address space of this many MiB.
fn limited(command: &Command, mib: usize) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("ulimit -v {}; exec \"$0\" \"$@\"", mib << 10), BINARY]);
    // Of a limited space the allocator takes 64 MiB a thread otherwise.
    shell.args(command.get_args().map(OsString::from)).env("MALLOC_ARENA_MAX", "1");
    shell
}

/// Everything a rank may say: one line that begins so.
#[track_caller]
fn one_line(output: &Output, words: &str) {
    let text = stderr(output);
    assert!(text.starts_with(&format!("error: {words}")) && text.lines().count() == 1, "{text}");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_rank_without_memory_ends_all_and_is_named() {
    let world = World::new();
    large(&world);
    let on = |device: &str| {
        let device = ["--device", device, "--precision", "fp32"];
        world.train("out", &[&["-q", "--collective-timeout", "1", "--steps", "2"], &device[..]].concat())
    };
    let run = || on("cpu");
    for (culprit, device, words) in [
        (0, "cpu", "the system has no 0.25 GiB for a tensor"),
        (1, "cpu", "the system has no 0.25 GiB for a tensor"),
        (1, "emulator", "the emulator cannot map 268738048 bytes"),
    ] {
        let port = free_port();
        let mut both = [0, 1].map(|i| {
            let command = if i == culprit { limited(&on(device), 500) } else { on(device) };
            Some(started(&mut rank(command, i, 2, port)))
        });
        let mut end = |i: usize| both[i].take().unwrap().wait_with_output().unwrap();
        let first = end(culprit);
        let began = Instant::now();
        let second = end(1 - culprit);
        // The timeout and five seconds after the failure, however long it took to come to it.
        assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
        for output in &[first, second] {
            one_line(output, &format!("rank {culprit}: out of memory: {words}; use a smaller batch"));
        }
    }
    // All of them at once, as in a run that is too large for its machine; and alone, where no rank is named.
    let began = Instant::now();
    let all = limited(&world.train("out", &["-q", "--ranks", "2", "--steps", "2"]), 400).output().unwrap();
    one_line(&all, "rank ");
    assert!(stderr(&all).contains(": out of memory: "), "{}", stderr(&all));
    assert!(began.elapsed() < Duration::from_secs(6));
    one_line(&limited(&run(), 400).output().unwrap(), "out of memory: the system has no 0.25 GiB for a tensor; use a");
}

#[test]
fn a_worker_that_ends_before_it_comes_is_named() {
    let world = World::new();
    for victim in [0, 1] {
        let began = Instant::now();
        let child = started(&mut world.train("out", &["-q", "--ranks", "2", "--steps", "100000"]));
        wait_for("two ranks", || children(child.id()).len() == 2);
        signal(children(child.id())[victim], "-KILL");
        let done = child.wait_with_output().unwrap();
        one_line(&done, &format!("rank {victim}: "));
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    }
}

#[test]
fn a_rank_that_is_late_changes_nothing_and_one_that_comes_too_late_is_named() {
    let world = World::new();
    let run = |out: &str, wait: &str| {
        world.train(out, &["-q", "--steps", "3", "--collective-timeout", "1", "--rendezvous-timeout", wait])
    };
    for (out, late) in [("zero", 0), ("one", 1), ("none", 2)] {
        let port = free_port();
        let start = |i: usize| started(&mut rank(run(out, "30"), i, 2, port));
        let (first, second) = if late == 0 { (1, 0) } else { (0, 1) };
        let early = start(first);
        if late < 2 {
            // Longer than a rank of the run may be silent.
            std::thread::sleep(Duration::from_millis(1500));
        }
        let last = start(second);
        for child in [early, last] {
            let done = child.wait_with_output().unwrap();
            assert!(done.status.success(), "{}", stderr(&done));
        }
    }
    for out in ["zero", "one"] {
        assert_same_bits(&world.path(out), &world.path("none"));
    }
    // Rank 2 of 3 never comes; rank 1 comes, and then a rank when nobody waits any more.
    let (port, began) = (free_port(), Instant::now());
    let both = [0, 1].map(|i| started(&mut rank(run("never", "0.7"), i, 3, port)));
    for child in both {
        one_line(&child.wait_with_output().unwrap(), "rank 2: did not come within 0.7 s; start all 3 ranks");
    }
    let late = rank(run("never", "0.7"), 2, 3, port).output().unwrap();
    one_line(&late, &format!("rank 0: did not answer at 127.0.0.1:{port} within 0.7 s: "));
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    assert!(!world.path("never").exists());
}

/// A rank that the system stops for less than the timeout.
#[test]
fn a_short_pause_of_a_rank_is_waited_out() {
    let world = World::new();
    let run = |out: &str| world.train(out, &["-q", "--ranks", "2", "--steps", "120", "--collective-timeout", "3"]);
    let child = started(&mut run("paused"));
    wait_for("a checkpoint", || world.path("paused/checkpoints/latest").exists());
    let ranks = children(child.id());
    assert_eq!(ranks.len(), 2);
    for pid in ranks {
        signal(pid, "-STOP");
        std::thread::sleep(Duration::from_millis(700));
        signal(pid, "-CONT");
    }
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "{}", stderr(&done));
    good(&mut run("undisturbed"));
    assert_same_bits(&world.path("paused"), &world.path("undisturbed"));
}
