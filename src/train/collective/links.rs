//! The connections of a rank: rank 0 has one to every other, the others one to rank 0.
//!
//! Each connection has a thread that reads and a thread that sends signs of life and looks for the other side's. Whatever ends a rank
//! (its process, its machine, an error it tells) becomes the one [`Failure`] of all: rank 0 passes it on, whoever waits for a message
//! gets it as an error, and what else hangs is ended by [`Links::on_failure`].

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::wire::{self, Failure, Tag};
use crate::error::{Error, Result};

/// How often a waiting thread looks for a failure.
const POLL: Duration = Duration::from_millis(20);
/// Time that a rank has to end by itself once another has failed.
pub const GRACE: Duration = Duration::from_secs(2);
/// How long the reader of a broken connection may take to say why.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Longest message that is written in one piece, and most ranks that one thread writes to.
const SMALL: usize = 256 << 10;
const FEW: usize = 8;

/// What a rank does when its main thread does not come to see a failure.
type Hook = Box<dyn Fn(Error) + Send + Sync>;

/// The beginning of a message, or bytes of it.
type Piece = (Tag, Vec<u8>);

/// What all threads of a rank share.
struct Shared {
    rank: usize,
    timeout: Duration,
    began: Instant,
    failure: OnceLock<Failure>,
    /// This side is leaving: closed connections mean nothing any more.
    leaving: AtomicBool,
    peers: OnceLock<Vec<Arc<Peer>>>,
    hook: OnceLock<(Duration, Hook)>,
    /// Milliseconds after `began` when this process last sent signs of life: it may be stopped itself.
    alive: AtomicU64,
    /// The same of when it found that it was stopped for long; 0: never.
    resumed: AtomicU64,
}

/// The other side of a connection.
struct Peer {
    rank: usize,
    stream: TcpStream,
    writer: Mutex<TcpStream>,
    inbox: Mutex<Receiver<Piece>>,
    /// Milliseconds after [`Shared::began`] when the other side was last heard.
    heard: AtomicU64,
    /// The other side has finished.
    gone: AtomicBool,
    /// The other side was told of the failure.
    told: AtomicBool,
    beater: OnceLock<Thread>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn now(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    fn peers(&self) -> &[Arc<Peer>] {
        self.peers.get().map_or(&[], Vec::as_slice)
    }

    /// The failure behind a broken connection to `rank`: its own, unless this process was stopped so long that the others gave it up.
    fn lost(&self, rank: usize, e: &io::Error) -> Failure {
        let since = |when: &AtomicU64| Duration::from_millis(self.now().saturating_sub(when.load(Ordering::Acquire)));
        let stopped = since(&self.alive) > self.long();
        let resumed = self.resumed.load(Ordering::Relaxed) > 0 && since(&self.resumed) < self.timeout + LAST_WORDS;
        if stopped || resumed { silent(self.rank, self.timeout) } else { lost(rank, e, self.timeout) }
    }

    /// Notes that this process runs, and whether it was stopped.
    fn lives(&self) {
        let now = self.now();
        if Duration::from_millis(now.saturating_sub(self.alive.load(Ordering::Relaxed))) > self.long() {
            self.resumed.store(now, Ordering::Release);
        }
        self.alive.store(now, Ordering::Release);
    }

    /// How long a process that the others gave up was stopped at least.
    fn long(&self) -> Duration {
        self.timeout - 2 * self.period()
    }

    /// How often signs of life are sent.
    fn period(&self) -> Duration {
        (self.timeout / 10).min(Duration::from_secs(1))
    }

    /// A rank has failed: the first to tell is believed. Passes it on, and unblocks what is stuck on that rank's connection.
    fn fail(self: &Arc<Self>, failure: Failure) {
        if self.leaving.load(Ordering::Relaxed) || self.failure.set(failure.clone()).is_err() {
            return;
        }
        let culprit = |peer: &&Arc<Peer>| peer.rank == failure.rank;
        for peer in self.peers().iter().filter(culprit) {
            let _ = peer.stream.shutdown(Shutdown::Both);
        }
        self.pass_on(&failure);
        let shared = self.clone();
        // If no thread can be started the main thread still sees the failure when it next waits for a rank.
        let _ = std::thread::Builder::new().name("failure".into()).spawn(move || {
            let (began, grace) = (Instant::now(), shared.hook.get().map_or(GRACE, |(grace, _)| *grace));
            while began.elapsed() < grace && !shared.leaving.load(Ordering::Relaxed) {
                std::thread::sleep(POLL);
            }
            if let (Some((_, hook)), false) = (shared.hook.get(), shared.leaving.load(Ordering::Relaxed)) {
                hook(failure.to_error());
            }
        });
    }

    /// Tells a failure to all but the rank that failed.
    fn pass_on(&self, failure: &Failure) {
        self.peers().iter().filter(|peer| peer.rank != failure.rank).for_each(|peer| peer.tell(failure));
    }

    fn check(&self) -> Result<()> {
        self.failure.get().map_or(Ok(()), |failure| Err(failure.to_error()))
    }
}

impl Peer {
    /// Tells a failure once, unless the connection is stuck.
    fn tell(&self, failure: &Failure) {
        for _ in 0..10 {
            if let Ok(mut writer) = self.writer.try_lock() {
                if !self.told.swap(true, Ordering::Relaxed) {
                    // One that cannot be told notices the closed connection.
                    let _ = wire::write_json(&mut *writer, Tag::Failed, failure);
                }
                return;
            }
            std::thread::sleep(POLL);
        }
    }

    /// Writes frames; what goes wrong is this peer's failure.
    fn write(&self, shared: &Arc<Shared>, frames: impl FnOnce(&mut TcpStream) -> io::Result<()>) -> Result<()> {
        let written = frames(&mut locked(&self.writer));
        if let Err(e) = written {
            // Its own word, if it has left one, says more than a broken connection: the reader is about to find either.
            let began = Instant::now();
            while shared.failure.get().is_none() && began.elapsed() < LAST_WORDS {
                std::thread::sleep(Duration::from_millis(5));
            }
            shared.fail(shared.lost(self.rank, &e));
        }
        shared.check()
    }
}

/// The failure behind a broken connection.
fn lost(rank: usize, e: &io::Error, timeout: Duration) -> Failure {
    match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => silent(rank, timeout),
        io::ErrorKind::InvalidData => {
            Failure::new(rank, format!("sent something that is {e}"), "start the same program on every rank")
        }
        _ => Failure::new(
            rank,
            "its process ended, or the connection to it broke, without a word",
            "see what the system says of it (out of memory?), then run the same command to go on",
        ),
    }
}

fn silent(rank: usize, timeout: Duration) -> Failure {
    let cause = format!("has given no sign of life for {} s", timeout.as_secs_f64());
    Failure::new(
        rank,
        cause,
        "see whether its machine hangs or its process is stopped, then run the same command to go on",
    )
}

/// Reads and notes when something came.
struct Heard<'a> {
    stream: &'a TcpStream,
    peer: &'a Peer,
    shared: &'a Shared,
}

impl Read for Heard<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let n = self.stream.read(to)?;
        self.peer.heard.store(self.shared.now(), Ordering::Relaxed);
        Ok(n)
    }
}

/// Takes in what a peer sends until it says goodbye.
fn listen(shared: &Arc<Shared>, peer: &Peer, inbox: &Sender<Piece>) {
    let mut from = io::BufReader::with_capacity(1 << 16, Heard { stream: &peer.stream, peer, shared });
    loop {
        match wire::read(&mut from) {
            Ok((Tag::Beat, _)) => {}
            Ok((tag @ (Tag::Begin | Tag::Data), payload)) => {
                if inbox.send((tag, payload)).is_err() {
                    return;
                }
            }
            Ok((Tag::Failed, payload)) => match wire::parse::<Failure>(&payload) {
                Ok(failure) => return shared.fail(failure),
                Err(e) => return shared.fail(lost(peer.rank, &e, shared.timeout)),
            },
            Ok((Tag::Bye, _)) => return peer.gone.store(true, Ordering::Relaxed),
            Ok(_) => return shared.fail(lost(peer.rank, &wire::invalid("no frame of a run"), shared.timeout)),
            Err(e) => return shared.fail(shared.lost(peer.rank, &e)),
        }
    }
}

/// Sends signs of life to a peer, and looks for its own.
fn beat(shared: &Arc<Shared>, peer: &Peer) {
    let period = shared.period();
    loop {
        let done = shared.leaving.load(Ordering::Relaxed) || peer.gone.load(Ordering::Relaxed);
        if done || shared.failure.get().is_some() {
            return;
        }
        shared.lives();
        let quiet = shared.now().saturating_sub(peer.heard.load(Ordering::Relaxed));
        if Duration::from_millis(quiet) > shared.timeout {
            return shared.fail(silent(peer.rank, shared.timeout));
        }
        // While the connection is busy no beat is needed.
        if let Ok(mut writer) = peer.writer.try_lock()
            && let Err(e) = wire::write(&mut *writer, Tag::Beat, &[])
            && matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
        {
            drop(writer);
            return shared.fail(silent(peer.rank, shared.timeout));
        }
        let slept = Instant::now();
        std::thread::park_timeout(period);
        if slept.elapsed() > 2 * period {
            // This process itself was held up, and what came meanwhile is not read yet.
            peer.heard.store(shared.now(), Ordering::Relaxed);
        }
    }
}

/// The connections of a rank.
pub struct Links {
    shared: Arc<Shared>,
    size: usize,
}

impl Links {
    /// Over `streams`, each to the rank beside it, in their order; a rank without a sign of life for `timeout` has failed.
    ///
    /// # Errors
    /// Threads that cannot be started.
    pub(super) fn new(rank: usize, size: usize, streams: Vec<(usize, TcpStream)>, timeout: Duration) -> Result<Links> {
        let shared = Arc::new(Shared {
            rank,
            timeout,
            began: Instant::now(),
            failure: OnceLock::new(),
            leaving: AtomicBool::new(false),
            peers: OnceLock::new(),
            hook: OnceLock::new(),
            alive: AtomicU64::new(0),
            resumed: AtomicU64::new(0),
        });
        let (mut peers, mut senders) = (Vec::new(), Vec::new());
        for (rank, stream) in streams {
            let (send, receive) = channel();
            let writer = prepared(&stream, timeout)
                .map_err(|e| Error::refused(format!("the connection to rank {rank}: {e}")).remedy("run again"))?;
            senders.push(send);
            peers.push(Arc::new(Peer {
                rank,
                stream,
                writer: Mutex::new(writer),
                inbox: Mutex::new(receive),
                heard: AtomicU64::new(0),
                gone: AtomicBool::new(false),
                told: AtomicBool::new(false),
                beater: OnceLock::new(),
            }));
        }
        let links = Links { shared: shared.clone(), size };
        let _ = shared.peers.set(peers.clone());
        for (peer, inbox) in peers.into_iter().zip(senders) {
            let (own, other) = (shared.clone(), peer.clone());
            start(format!("rank-{}", peer.rank), move || listen(&own, &other, &inbox))?;
            let (own, other) = (shared.clone(), peer.clone());
            let beater = start(format!("beat-{}", peer.rank), move || beat(&own, &other))?;
            let _ = peer.beater.set(beater);
        }
        Ok(links)
    }

    /// The number of this rank.
    pub fn rank(&self) -> usize {
        self.shared.rank
    }

    /// Ranks in all.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Calls `hook` when a rank has failed and this one has not ended within [`GRACE`]: it computes, or it waits for something that
    /// will not come.
    pub fn on_failure(&self, hook: impl Fn(Error) + Send + Sync + 'static) {
        self.on_failure_after(GRACE, hook);
    }

    /// The same with a time of one's own.
    pub fn on_failure_after(&self, grace: Duration, hook: impl Fn(Error) + Send + Sync + 'static) {
        let _ = self.shared.hook.set((grace, Box::new(hook)));
    }

    /// The failure of a rank, if there was one.
    ///
    /// # Errors
    /// That failure.
    pub fn check(&self) -> Result<()> {
        self.shared.check()
    }

    fn peer(&self, rank: usize) -> Result<&Peer> {
        let peers = self.shared.peers();
        let found = peers.binary_search_by_key(&rank, |peer| peer.rank).ok().and_then(|i| peers.get(i));
        found.map(|peer| &**peer).ok_or_else(|| {
            Error::refused(format!("there is no connection to rank {rank}")).remedy("report this as a defect")
        })
    }

    /// Begins a message of `bytes` bytes for operation `operation`.
    pub(super) fn begin(&self, to: usize, operation: u8, bytes: usize) -> Result<()> {
        self.peer(to)?.write(&self.shared, |to| wire::write(to, Tag::Begin, &wire::begin(operation, bytes)))
    }

    /// Sends bytes of a message that has begun.
    pub(super) fn send(&self, to: usize, bytes: &[u8]) -> Result<()> {
        let peer = self.peer(to)?;
        bytes.chunks(wire::CHUNK).try_for_each(|chunk| peer.write(&self.shared, |to| wire::write(to, Tag::Data, chunk)))
    }

    /// Sends the same message to some ranks. A small one is one call of the system each, and by all threads: what rank 0 does one after
    /// another is what a step of many ranks waits for.
    pub(super) fn spread(&self, to: std::ops::Range<usize>, operation: u8, bytes: &[u8]) -> Result<()> {
        if bytes.len() > SMALL {
            return to.into_iter().try_for_each(|rank| {
                self.begin(rank, operation, bytes.len())?;
                self.send(rank, bytes)
            });
        }
        let frames = wire::message(operation, bytes);
        let write = |rank| self.peer(rank)?.write(&self.shared, |to| to.write_all(&frames));
        match to.len() > FEW {
            true => to.into_par_iter().with_min_len(FEW / 2).try_for_each(write),
            false => to.into_iter().try_for_each(write),
        }
    }

    /// How many bytes the message has that rank `from` begins, which must be for the same operation.
    pub(super) fn began(&self, from: usize, operation: u8) -> Result<usize> {
        let (tag, head) = self.piece(from)?;
        match (tag, head.split_first()) {
            (Tag::Begin, Some((&own, length))) if own == operation => {
                let length: [u8; 8] = length.try_into().map_err(|_| self.out_of_step(from))?;
                Ok(u64::from_le_bytes(length) as usize)
            }
            _ => Err(self.out_of_step(from)),
        }
    }

    /// The next bytes of a message that has begun.
    pub(super) fn receive(&self, from: usize) -> Result<Vec<u8>> {
        match self.piece(from)? {
            (Tag::Data, bytes) => Ok(bytes),
            _ => Err(self.out_of_step(from)),
        }
    }

    /// A rank does something else than this one.
    pub(super) fn out_of_step(&self, rank: usize) -> Error {
        Failure::new(rank, "is not where the other ranks are in the run", "report this as a defect").to_error()
    }

    fn piece(&self, from: usize) -> Result<Piece> {
        let peer = self.peer(from)?;
        let inbox = locked(&peer.inbox);
        loop {
            match inbox.recv_timeout(POLL) {
                Ok(piece) => return Ok(piece),
                Err(RecvTimeoutError::Timeout) => self.check()?,
                Err(RecvTimeoutError::Disconnected) => {
                    // The reader has ended: it is about to say why, unless the peer has finished while this rank still waits for it.
                    std::thread::sleep(POLL);
                    self.check()?;
                    if peer.gone.load(Ordering::Relaxed) {
                        return Err(self.out_of_step(from));
                    }
                }
            }
        }
    }

    /// Ends the connections: with an error, which becomes that of all ranks unless it came from one; or with the work done.
    pub fn leave(&self, error: Option<&Error>) {
        let own = error.filter(|_| self.shared.failure.get().is_none());
        self.shared.leaving.store(true, Ordering::Relaxed);
        let failure = own.map(|error| Failure::of(self.rank(), error));
        for peer in self.shared.peers() {
            match (&failure, error) {
                (Some(failure), _) => peer.tell(failure),
                (None, None) => {
                    let _ = wire::write(&mut *locked(&peer.writer), Tag::Bye, &[]);
                }
                // The failure of another rank, which closing passes on.
                (None, Some(_)) => {}
            }
        }
        self.close();
    }

    fn close(&self) {
        self.shared.leaving.store(true, Ordering::Relaxed);
        // The thread that found a failure may not have come to pass it on when the main thread already leaves.
        if let Some(failure) = self.shared.failure.get() {
            self.shared.pass_on(failure);
        }
        for peer in self.shared.peers() {
            // What was written is still delivered; the other side's last words are of no more use.
            let _ = peer.stream.shutdown(Shutdown::Write);
            if let Some(beater) = peer.beater.get() {
                beater.unpark();
            }
        }
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.close();
        for peer in self.shared.peers() {
            let _ = peer.stream.shutdown(Shutdown::Both);
        }
    }
}

/// Settings of a connection; gives the side that writes.
fn prepared(stream: &TcpStream, timeout: Duration) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(Some(timeout))?;
    stream.try_clone()
}

fn start(name: String, work: impl FnOnce() + Send + 'static) -> Result<Thread> {
    match std::thread::Builder::new().name(name).spawn(work) {
        Ok(handle) => Ok(handle.thread().clone()),
        Err(e) => Err(Error::refused(format!("cannot start the threads of a connection: {e}"))
            .remedy("raise the limit of processes (ulimit -u)")),
    }
}
