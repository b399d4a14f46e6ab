//! A run goes on with another number of ranks: same samples, masks and dropout; and stops in an orderly way on all of them.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::runs::{assert_same_training, good, metrics};
use crate::world::{World, stderr};

/// Runs until a checkpoint of step `step` is there, then sends the launcher a signal.
#[track_caller]
fn stopped_after(mut command: Command, out: &std::path::Path, step: u64, signal: &str) -> std::process::Output {
    let child = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let saved = out.join(format!("checkpoints/step-{step:08}"));
    let began = Instant::now();
    while !saved.exists() {
        assert!(began.elapsed() < Duration::from_secs(60), "no checkpoint");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
    child.wait_with_output().unwrap()
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    let world = World::new();
    let whole = world.path("whole");
    good(&mut world.train("whole", &["--batch-size", "4", "--steps", "12"]));
    let out = world.path("parts");
    // The checkpoints of steps 4 and 8 are those of unfinished runs of 12 steps: what comes after is taken away.
    for (shape, last) in [(["--ranks", "2", "--batch-size", "2"], 4), (["--ranks", "1", "--batch-size", "4"], 8)] {
        good(&mut world.train("parts", &[&shape[..], &["--steps", "12"]].concat()));
        for later in [4u64, 8, 12].into_iter().filter(|step| *step > last) {
            std::fs::remove_dir_all(out.join(format!("checkpoints/step-{later:08}"))).unwrap();
        }
    }
    let done = good(&mut world.train("parts", &["--ranks", "4", "--batch-size", "1", "--steps", "12"]));
    assert!(stderr(&done).contains("resuming from"), "{}", stderr(&done));
    assert_same_training(&out, &whole, &[]);
}

#[test]
fn another_batch_is_refused_whoever_shares_it() {
    let world = World::new();
    good(&mut world.train("out", &["--ranks", "2", "--batch-size", "2"]));
    let other = world.train("out", &["--ranks", "2", "--batch-size", "4"]).output().unwrap();
    assert_eq!(other.status.code(), Some(1));
    let text = stderr(&other);
    assert!(text.starts_with("error: rank 0: ") && text.contains("batch-size was 4 and is now 8"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

#[test]
fn ranks_stop_together_saved_and_go_on_to_the_same_bits() {
    let world = World::new();
    let shape =
        ["--ranks", "2", "--batch-size", "2", "--steps", "3000", "--save-every", "10", "-q", "--eval-every", "0"];
    let out = world.path("out");
    for signal in ["-TERM", "-INT"] {
        let done = stopped_after(world.train("out", &shape), &out, if signal == "-TERM" { 10 } else { 30 }, signal);
        let text = stderr(&done);
        assert_eq!(done.status.code(), Some(if signal == "-TERM" { 143 } else { 130 }), "{text}");
        assert!(
            text.starts_with(&format!("error: {}: stopped by SIG{} and saved", out.display(), &signal[1..])),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1, "{text}");
    }
    let steps: Vec<u64> =
        metrics(&out).iter().filter(|l| l["split"] == "train").map(|l| l["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>());
    let end = steps.len() as u64;
    // As far as the stopped run came, the bits are those of one that was not stopped.
    let undisturbed = world.path("undisturbed");
    let more =
        ["--ranks", "2", "--batch-size", "2", "--steps", "3000", "--save-every", &end.to_string(), "--eval-every", "0"];
    let done = stopped_after(world.train("undisturbed", &more), &undisturbed, end, "-KILL");
    assert!(!done.status.success());
    let cut = |out| metrics(out).into_iter().filter(|l| l["step"].as_u64().unwrap() <= end).collect::<Vec<_>>();
    assert_eq!(cut(&undisturbed), cut(&out));
}
