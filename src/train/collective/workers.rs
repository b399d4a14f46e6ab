//! A launcher of our own for one machine: the program starts itself again, once a rank, and sees that none is left behind.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};

use super::launch::OURS;
use crate::error::{Error, Kind, Result};
use crate::train::signals::Stop;

/// How often the workers are looked at.
const POLL: Duration = Duration::from_millis(20);
/// Time that workers have to end once one has failed; then they are taken to hang.
const GRACE: Duration = Duration::from_millis(2500);
/// Lines kept of what a worker says on standard error.
const LINES: usize = 20;

/// A worker that runs, or has run.
struct Worker {
    child: Child,
    ended: Option<ExitStatus>,
    said: Arc<Mutex<VecDeque<String>>>,
}

impl Worker {
    fn look(&mut self) -> Result<()> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().map_err(|e| cannot("wait for a worker", &e))?;
        }
        Ok(())
    }

    fn send(&self, signal: Signal) {
        if let (None, Some(pid)) = (self.ended, Pid::from_raw(self.child.id() as i32)) {
            // It may just have ended.
            let _ = kill_process(pid, signal);
        }
    }

    /// The error it ended with, if it said one.
    fn error(&self) -> Option<String> {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.iter().find_map(|line| line.strip_prefix("error: ")).map(str::to_string)
    }

    /// The last line it said.
    fn last(&self) -> Option<String> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).back().cloned()
    }

    /// Whether it ended in an orderly way: with its work done, or stopped and saved.
    fn orderly(status: ExitStatus) -> bool {
        matches!(status.code(), Some(0 | 130 | 143))
    }
}

fn cannot(what: &str, e: &std::io::Error) -> Error {
    Error::new(Kind::Io, format!("cannot {what}: {e}"))
        .remedy("raise the limit of processes (ulimit -u) or use fewer ranks")
}

/// Ends this process when the launcher that started it ends: for the workers.
pub fn end_with_launcher() {
    // Where the system cannot do it workers outlive a killed launcher until they are done.
    let _ = set_parent_process_death_signal(Some(Signal::TERM));
}

/// A port of this machine that is free now.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    listener.map(|address| address.port()).map_err(|e| cannot("find a free port", &e))
}

/// Runs this program with `arguments` as `ranks` ranks, and returns when all have ended.
///
/// # Errors
/// That of the run. What rank 0 has said itself is not said again: then only the exit code is given.
pub fn run(ranks: usize, arguments: &[OsString], threads: usize, stop: &Stop) -> Result<ExitStatus> {
    let program = std::env::current_exe().map_err(|e| cannot("find this program", &e))?;
    let (port, each) = (free_port()?, (threads / ranks).max(1));
    let mut workers: Vec<Worker> = Vec::new();
    for rank in 0..ranks {
        let mut command = Command::new(&program);
        command.args(arguments).process_group(0).env(OURS, "1").env_remove("TORCHELASTIC_USE_AGENT_STORE");
        command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
        command.env("WORLD_SIZE", ranks.to_string());
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        if std::env::var_os("RAYON_NUM_THREADS").is_none() {
            command.env("RAYON_NUM_THREADS", each.to_string());
        }
        if rank > 0 {
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        }
        let started = command.spawn().map_err(|e| cannot(&format!("start rank {rank}"), &e));
        match started.and_then(with_ears) {
            Ok(worker) => workers.push(worker),
            Err(e) => {
                workers.iter().for_each(|worker| worker.send(Signal::KILL));
                return Err(e);
            }
        }
    }
    let first = attend(&mut workers, stop)?;
    verdict(&workers, first)
}

/// Keeps the last lines of what a worker says.
fn with_ears(mut child: Child) -> Result<Worker> {
    let said = Arc::new(Mutex::new(VecDeque::new()));
    if let Some(from) = child.stderr.take() {
        let said = said.clone();
        let listen = move |from: ChildStderr| {
            for line in BufReader::new(from).lines().map_while(std::result::Result::ok) {
                let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
                said.push_back(line);
                if said.len() > LINES {
                    said.pop_front();
                }
            }
        };
        let name = std::thread::Builder::new().name("worker".into());
        name.spawn(move || listen(from)).map_err(|e| cannot("listen to a worker", &e))?;
    }
    Ok(Worker { child, ended: None, said })
}

/// Waits until all have ended: passes signals on, and kills what hangs once another has failed. Gives the first that failed.
fn attend(workers: &mut [Worker], stop: &Stop) -> Result<Option<usize>> {
    let (mut passed_on, mut failed): (Option<i32>, Option<Instant>) = (None, None);
    let mut first = None;
    loop {
        workers.iter_mut().try_for_each(Worker::look)?;
        let ended = |worker: &&Worker| worker.ended.is_some();
        if workers.iter().filter(ended).count() == workers.len() {
            return Ok(first);
        }
        let lost = |worker: &Worker| worker.ended.is_some_and(|status| !Worker::orderly(status));
        first = first.or_else(|| workers.iter().position(lost));
        // Nothing is left to do for ranks without rank 0.
        if first.is_some() || workers[0].ended.is_some() {
            failed.get_or_insert_with(Instant::now);
        }
        if failed.is_some_and(|since| since.elapsed() > GRACE) {
            workers.iter().for_each(|worker| worker.send(Signal::KILL));
        }
        if let (Some(signal), None) = (stop.requested(), passed_on) {
            passed_on = Some(signal);
            let signal = if signal == signal_hook::consts::SIGINT { Signal::INT } else { Signal::TERM };
            workers.iter().for_each(|worker| worker.send(signal));
        }
        std::thread::sleep(POLL);
    }
}

/// What the run ended with, when worker `first` failed before all others.
fn verdict(workers: &[Worker], first: Option<usize>) -> Result<ExitStatus> {
    let status = workers[0].ended.unwrap_or_default();
    if status.code().is_some() {
        return Ok(status);
    }
    // Rank 0 could say nothing. The others have, if it failed before them.
    let told = workers[1..].iter().find_map(Worker::error).unwrap_or_else(|| {
        let rank = first.unwrap_or(0);
        let ended = workers[rank].ended.unwrap_or_default();
        let how = ended.signal().map_or_else(|| ended.to_string(), |signal| format!("signal {signal}"));
        let said = workers[rank].last().map_or_else(String::new, |line| format!(": {line}"));
        let remedy = "see what the system says of it (out of memory?), then run the same command to go on";
        format!("rank {rank}: ended by {how}{said}; {remedy}")
    });
    let (cause, remedy) = told.rsplit_once("; ").unwrap_or((&told, ""));
    Err(Error::refused(cause).remedy(remedy))
}
