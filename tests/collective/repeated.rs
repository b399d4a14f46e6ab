//! Ranks that are killed, stopped, late or too late, twenty times each at different moments: processes of this test that only sum.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use retromae_engine::Result;
use retromae_engine::error::Error;
use retromae_engine::train::collective::rendezvous::{Patience, meet};
use retromae_engine::train::collective::tcp::Tcp;
use retromae_engine::train::collective::{Collective, launch};

use crate::failures::{rank, signal};
use crate::operations::{numbers, sums, tensor};
use crate::support::free_port;

const TIMES: usize = 20;
const RANKS: usize = 3;
/// How many of the twenty run at once: most of the time all of them wait.
const AT_ONCE: usize = 4;
const SILENCE: Duration = Duration::from_secs(1);
/// What every run promises: the timeout and five seconds.
const PROMISED: Duration = Duration::from_secs(6);
/// The variables of a rank: milliseconds to wait for others, and sums to take; none ends on its own where these are none.
const WAIT: &str = "TEST_RENDEZVOUS";
const SUMS: &str = "TEST_SUMS";

/// A number below `n` that looks like chance: of repetition `time`, and of what it is for.
fn chance(time: usize, what: usize, n: u64) -> u64 {
    let mut x = ((time * 31 + what + 1) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (x ^ (x >> 27)) % n
}

/// Rank `number` of a run, a process that comes to [`as_rank`] by way of test `test`.
fn started(test: &str, number: usize, port: u16, wait: u64, sums: Option<usize>) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([&format!("repeated::{test}"), "--exact", "--nocapture", "--test-threads", "1"]);
    command.env(WAIT, wait.to_string()).env(SUMS, sums.map_or_else(String::new, |n| n.to_string()));
    rank(command, number, RANKS, port).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// What a process of [`started`] does, which then ends; nothing in the test itself.
fn as_rank() {
    let Ok(wait) = std::env::var(WAIT) else { return };
    let patience = Patience { rendezvous: Duration::from_millis(wait.parse().unwrap()), silence: SILENCE };
    let code = match summing(patience, std::env::var(SUMS).unwrap().parse().ok()) {
        Ok(()) => 0,
        Err(e) => ended(&e),
    };
    std::process::exit(code);
}

fn ended(e: &Error) -> i32 {
    let _ = writeln!(std::io::stderr(), "error: {e}");
    e.exit_code()
}

/// Sums of a few and of many numbers, with pauses as if this rank computed.
fn summing(patience: Patience, times: Option<usize>) -> Result<()> {
    let place = launch::detect(&|name| std::env::var(name).ok())?.expect("a rank");
    let tcp = Tcp::new(meet(&place, "test", patience)?);
    tcp.links().on_failure(|e| std::process::exit(ended(&e)));
    println!("met");
    for time in (0..).take_while(|time| times.is_none_or(|times| *time < times)) {
        let n = 1 + chance(time, 0, 100_000) as usize;
        let sum = tensor(&numbers(place.rank, n));
        tcp.all_reduce(&sum)?;
        assert_eq!(sum.to_vec::<f32>(), sums(place.size, n));
        std::thread::sleep(Duration::from_micros(chance(time, 1 + place.rank, 3_000)));
    }
    tcp.links().leave(None);
    Ok(())
}

/// Everything a rank said on standard error, and its exit code, once it has ended.
fn last_words(mut child: Child) -> (String, Option<i32>) {
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (said, child.wait().unwrap().code())
}

#[track_caller]
fn one_line(child: Child, words: &str, what: &str) {
    let (said, code) = last_words(child);
    assert!(said.starts_with(&format!("error: {words}")) && said.lines().count() == 1, "{what}: {said}");
    assert_eq!(code, Some(1), "{what}");
}

/// Calls `once` for each of the twenty times.
fn repeated(once: impl Fn(usize) + Sync) {
    std::thread::scope(|scope| {
        let once = &once;
        let all: Vec<_> =
            (0..AT_ONCE).map(|first| scope.spawn(move || (first..TIMES).step_by(AT_ONCE).for_each(once))).collect();
        // A panic of a thread is that of the test.
        all.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

/// Sends a signal to a rank that is summing with others, and sees what they say.
fn struck(test: &str, signal_name: &str, words: &str) {
    repeated(|time| {
        let (port, victim) = (free_port(), chance(time, 10, RANKS as u64) as usize);
        let mut all: Vec<Child> = (0..RANKS).map(|i| started(test, i, port, 30_000, None)).collect();
        for child in &mut all {
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            assert!(lines.any(|line| line.unwrap().ends_with("met")));
        }
        let moment = chance(time, 11, 150);
        std::thread::sleep(Duration::from_millis(moment));
        let began = Instant::now();
        signal(all[victim].id(), signal_name);
        let mut struck = all.remove(victim);
        let what = format!("{signal_name} of rank {victim} after {moment} ms");
        for child in all {
            one_line(child, &format!("rank {victim}: {words}"), &what);
        }
        assert!(began.elapsed() < PROMISED, "{what}: {:?}", began.elapsed());
        if signal_name == "-STOP" {
            // Once it may go on it finds that the others have gone, and why.
            signal(struck.id(), "-CONT");
            return one_line(struck, &format!("rank {victim}: {words}"), &what);
        }
        assert!(!struck.wait().unwrap().success());
    });
}

#[test]
fn a_killed_rank_is_named_twenty_times() {
    as_rank();
    struck(
        "a_killed_rank_is_named_twenty_times",
        "-KILL",
        "its process ended, or the connection to it broke, without a word; ",
    );
}

#[test]
fn a_stopped_rank_is_named_twenty_times() {
    as_rank();
    struck("a_stopped_rank_is_named_twenty_times", "-STOP", "has given no sign of life for 1 s; ");
}

#[test]
fn a_late_rank_is_waited_for_or_named_twenty_times() {
    as_rank();
    let test = "a_late_rank_is_waited_for_or_named_twenty_times";
    repeated(|time| {
        let (late, wait) = (chance(time, 20, RANKS as u64) as usize, chance(time, 21, 400));
        let port = free_port();
        let others = |wait| (0..RANKS).filter(|i| *i != late).map(|i| started(test, i, port, wait, Some(3))).collect();
        let mut all: Vec<Child> = others(30_000);
        std::thread::sleep(Duration::from_millis(wait));
        all.push(started(test, late, port, 30_000, Some(3)));
        for child in all {
            assert_eq!(last_words(child), (String::new(), Some(0)), "rank {late}, {wait} ms late");
        }
        // Comes when nobody waits any more.
        let (began, all): (_, Vec<Child>) = (Instant::now(), others(1_500));
        let words = match late {
            0 => format!("rank 0: did not answer at 127.0.0.1:{port} within 1.5 s: "),
            late => format!("rank {late}: did not come within 1.5 s; start all 3 ranks; "),
        };
        for child in all {
            one_line(child, &words, "too late");
        }
        assert!(began.elapsed() < PROMISED, "{:?}", began.elapsed());
        let first =
            if late == 0 { "rank 1: did not come within 0.1 s, nor did 1 others; " } else { "rank 0: did not answer " };
        one_line(started(test, late, port, 100, Some(3)), first, "alone");
    });
}
