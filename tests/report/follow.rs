//! `watch`: the state once, and a run followed as its metrics grow, are cut back, and end.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use retromae_engine::report::history::{Follower, History};
use rustix::process::{Pid, Signal, kill_process};

use crate::support::{engine, folder, metrics, resumed, written};
use crate::world::{BINARY, World, stderr};

fn watch(run: &Path) -> Child {
    let mut command = Command::new(BINARY);
    command.arg("watch").arg(run).args(["--interval", "0.05"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

#[test]
fn once_shows_the_state_without_colours_and_ends() {
    let world = World::new();
    let run = resumed(&world, "first", &[]);
    let done = engine(&["watch", "--once", run.to_str().unwrap()]);
    let text = String::from_utf8(done.stdout.clone()).unwrap();
    assert!(done.status.success(), "{}", stderr(&done));
    for fact in [
        "first  retromae",
        "finished",
        "step 16/16  100.0 %",
        "(dec ",
        "tokens/s",
        "held out, step 16: loss ",
        "newest checkpoint step-00000016",
    ] {
        assert!(text.contains(fact), "{fact}: {text}");
    }
    assert!(!text.contains('\u{1b}') && text.lines().all(|line| line.chars().count() <= 100), "{text}");
    assert!(
        text.lines().any(|line| line.chars().count() == 16 && line.chars().all(|c| ('▁'..='█').contains(&c))),
        "{text}"
    );

    let nothing = engine(&["watch", "--once", world.path("nowhere").to_str().unwrap()]);
    assert_eq!(nothing.status.code(), Some(1));
    assert!(stderr(&nothing).contains("no run is there; give the folder") && stderr(&nothing).lines().count() == 1);
    let fast = engine(&["watch", "--interval", "0", run.to_str().unwrap()]);
    assert!(fast.status.code() == Some(2) && stderr(&fast).lines().count() == 1, "{}", stderr(&fast));
}

#[test]
fn a_run_is_followed_to_its_end() {
    let world = World::new();
    let mut train = world.train("out", &["--steps", "400"]);
    let mut train = train.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let run = world.path("out");
    let since = Instant::now();
    while !run.join("run.toml").exists() {
        assert!(since.elapsed() < Duration::from_secs(60), "the run does not begin");
        std::thread::sleep(Duration::from_millis(5));
    }
    let seen = watch(&run).wait_with_output().unwrap();
    assert!(train.wait().unwrap().success());
    assert!(seen.status.success(), "{}", stderr(&seen));
    let text = String::from_utf8(seen.stdout).unwrap();
    assert!(text.lines().last().unwrap().starts_with("step 400/400  100.0 %"), "{text}");
}

#[test]
fn what_is_cut_back_is_read_again_and_ctrl_c_ends_it() {
    let dir = folder();
    written(dir.path(), &metrics(3, |_| 1.0), "objective = 'mlm'\nsteps = 10\n");
    let mut child = watch(dir.path());
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || lines.next().unwrap().unwrap();
    assert!(next().starts_with("step 3/10  30.0 %  loss 1.0000"));
    // As a resumed run leaves it: shorter, then longer.
    written(dir.path(), &metrics(2, |_| 2.0), "objective = 'mlm'\nsteps = 10\n");
    assert!(next().starts_with("step 2/10  20.0 %  loss 2.0000"));
    let mut file = std::fs::File::options().append(true).open(dir.path().join("metrics.jsonl")).unwrap();
    let more = metrics(5, |_| 4.0);
    let more: Vec<&str> = more.split_inclusive('\n').skip(2).collect();
    file.write_all(more.concat().as_bytes()).unwrap();
    assert!(next().starts_with("step 5/10  50.0 %  loss 4.0000"));
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130), "{}", stderr(&ended));
    assert!(stderr(&ended).starts_with("error: ") && stderr(&ended).lines().count() == 1, "{}", stderr(&ended));
}

/// Whatever happens to the file between two looks, what was followed is what a fresh reader finds.
#[test]
fn a_follower_knows_what_a_fresh_reader_knows() {
    let dir = folder();
    let path = dir.path().join("metrics.jsonl");
    let mut follower = Follower::new(dir.path());
    assert!(!follower.poll().unwrap() && !follower.exists);
    let (a, b) = (metrics(40, |step| step as f64), metrics(60, |step| -(step as f64)));
    let texts = [&a[..a.len() / 2], &a, &b[..b.len() / 3], &b, &a[..a.len() / 3], ""];
    for text in texts {
        std::fs::write(&path, text).unwrap();
        follower.poll().unwrap();
        let mut fresh = Follower::new(dir.path());
        fresh.poll().unwrap();
        assert_eq!(follower.history, fresh.history);
        assert!(!follower.poll().unwrap(), "nothing new, nothing changed");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(follower.poll().unwrap() && follower.history == History::default());
}

/// A second of work a step, and half an hour in which nothing ran.
#[test]
fn pauses_are_found_by_rates_and_clocks() {
    let dir = folder();
    let text = metrics(6, |_| 1.0);
    let mut lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for line in &mut lines[4..] {
        line["ts"] = serde_json::json!(line["ts"].as_f64().unwrap() + 1800.0);
    }
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    written(dir.path(), &text, "");
    let history = History::read(dir.path()).unwrap();
    let pauses: Vec<(u64, u64)> =
        history.pauses.iter().map(|pause| (pause.after, pause.seconds.round() as u64)).collect();
    assert_eq!(pauses, [(4, 1800)]);
    assert!((history.seconds - 6.0).abs() < 0.1, "{}", history.seconds);
}
