//! Which of cuBLASLt's proposals is fastest: found by trying them, once for each kind of product and GPU.
//!
//! The library's first proposal stays unless another is faster by more than noise, and what is found is used only when it is
//! written down: a run that is repeated or resumed computes with the same algorithms. Each takes its turns among the others, so that
//! clocks that rise at the start of a process favour none.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::cublaslt::sys::cublasStatus_t as Status;

use super::algorithms::Algorithms;
use super::operation::{Algorithm, Key, Library, Operation};
use super::queue::{Queue, Room};
use crate::device::gpu::GpuProduct;
use crate::error::Result;

/// Proposals that are tried.
const PROPOSALS: usize = 8;

/// Rounds that are timed; the median of a proposal's times counts.
const ROUNDS: usize = 5;

/// A turn repeats the product until it takes about so long, at most this often: events are accurate to half a microsecond.
const TURN_US: f64 = 100.0;
const MOST_REPEATS: f64 = 16.0;

/// A proposal that takes so many times the best time is given up: by its first turn, by a later one.
const HOPELESS_FIRST: f64 = 1.5;
const HOPELESS: f64 = 1.15;

/// What a proposal must take at most of the first one's time to take its place.
const FASTER: f64 = 0.97;

/// What searching may take of a process. Kinds of product that come later have the first proposal and are searched by a later process.
const BUDGET: Duration = Duration::from_secs(1);

/// Chooses the algorithms.
pub struct Tuner {
    queue: Arc<Queue>,
    algorithms: Algorithms,
    /// Of the [`BUDGET`].
    left: Duration,
}

impl Tuner {
    pub fn new(queue: Arc<Queue>, algorithms: Algorithms) -> Self {
        Tuner { queue, algorithms, left: BUDGET }
    }

    /// [`Algorithms::settle`].
    pub fn settle(&mut self) {
        self.algorithms.settle();
    }

    /// The algorithm for products of the kind of `p`: the one that is remembered, else the fastest, else the first proposal. Its output,
    /// where it is set, may be overwritten; what is added to stays as it is.
    ///
    /// # Safety
    /// As for [`crate::device::gpu::Backend::product`].
    pub unsafe fn choose(&mut self, library: &Library, operation: &Operation, p: &GpuProduct) -> Result<Algorithm> {
        let name = Key::of(p).to_string();
        if let Some(known) = self.remembered(library, operation, &name) {
            return Ok(known);
        }
        // What is recorded does not run, so nothing can be timed.
        if !self.algorithms.may_search() || self.left.is_zero() || self.queue.is_recording() {
            return Ok(operation.propose(library, p, 1)?[0]);
        }
        let proposals = operation.propose(library, p, PROPOSALS)?;
        if proposals.len() == 1 {
            return Ok(proposals[0]);
        }
        // Work that was queued before is not counted.
        self.queue.wait(&"waiting for the GPU")?;
        let began = Instant::now();
        // SAFETY: passed on.
        let chosen = unsafe { self.search(library, operation, p, &name, &proposals, began + self.left) };
        self.left = self.left.saturating_sub(began.elapsed());
        Ok(chosen?.unwrap_or(proposals[0]))
    }

    /// What is known, if the library still runs it.
    fn remembered(&mut self, library: &Library, operation: &Operation, name: &str) -> Option<Algorithm> {
        let known = self.algorithms.find(name)?;
        if operation.accepts(library, &known) {
            return Some(known);
        }
        self.algorithms.refuse(name);
        None
    }

    /// # Safety
    /// As for [`Self::choose`].
    unsafe fn search(
        &mut self,
        library: &Library,
        operation: &Operation,
        p: &GpuProduct,
        name: &str,
        proposals: &[Algorithm],
        until: Instant,
    ) -> Result<Option<Algorithm>> {
        let Some(lock) = self.algorithms.claim(self.left) else { return Ok(None) };
        if let Some(known) = self.remembered(library, operation, name) {
            return Ok(Some(known));
        }
        let mut room = None;
        if p.add {
            // Without memory to spare the first proposal does.
            let Some(taken) = Room::take(&self.queue, ((p.m - 1) * p.c.stride + p.n) * p.c.dtype.size())? else {
                return Ok(None);
            };
            room = Some(taken);
        }
        let c = room.as_ref().map_or(p.c.address, Room::address);
        let start = |algorithm: &Algorithm| {
            // SAFETY: passed on; in the output's place is memory of its size, or the output, which is about to be overwritten.
            unsafe { operation.start(library, p, c, algorithm) }.map(|status| status == Status::CUBLAS_STATUS_SUCCESS)
        };
        let Some(fastest) = fastest(&self.queue, proposals, until, start)? else { return Ok(None) };
        let algorithm = proposals[fastest.proposal];
        let is_kept = self.algorithms.remember(&lock, name, &algorithm, fastest.us, fastest.first_us);
        Ok(is_kept.then_some(algorithm))
    }
}

/// The result of a search.
struct Fastest {
    proposal: usize,
    us: f64,
    first_us: f64,
}

/// Times of one proposal in microseconds, for as long as it takes part.
struct Candidate {
    takes_part: bool,
    times: Vec<f64>,
}

impl Candidate {
    fn least(&self) -> f64 {
        self.times.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// Infinite for one that was given up.
    fn median(&self) -> f64 {
        let mut times = self.times.clone();
        times.sort_by(f64::total_cmp);
        if self.takes_part { times.get(times.len() / 2).copied().unwrap_or(f64::INFINITY) } else { f64::INFINITY }
    }
}

/// Times the proposals; `start` queues one and says whether it was accepted. None when none was, or when time was up before.
fn fastest(
    queue: &Arc<Queue>,
    proposals: &[Algorithm],
    until: Instant,
    start: impl Fn(&Algorithm) -> Result<bool>,
) -> Result<Option<Fastest>> {
    let mut all: Vec<Candidate> = Vec::with_capacity(proposals.len());
    let mut marks = Vec::with_capacity(proposals.len());
    for algorithm in proposals {
        // The first use of an algorithm loads its code.
        all.push(Candidate { takes_part: start(algorithm)?, times: Vec::new() });
        marks.push((queue.event()?, queue.event()?));
    }
    let mut repeats = 1.0;
    for round in 0..=ROUNDS {
        if Instant::now() >= until {
            return Ok(None);
        }
        for (i, (algorithm, (begin, end))) in proposals.iter().zip(&marks).enumerate() {
            if all[i].takes_part {
                begin.record()?;
                for _ in 0..repeats as usize {
                    all[i].takes_part &= start(algorithm)?;
                }
                end.record()?;
            }
        }
        for (candidate, (begin, end)) in all.iter_mut().zip(&marks).filter(|(candidate, _)| candidate.takes_part) {
            candidate.times.push(end.microseconds_since(begin)? / repeats);
        }
        let best = all.iter().map(Candidate::least).fold(f64::INFINITY, f64::min);
        let most = best * if round == 0 { HOPELESS_FIRST } else { HOPELESS };
        for candidate in all.iter_mut().skip(1) {
            candidate.takes_part &= candidate.least() <= most;
        }
        if round == 0 {
            // The turn that says how long turns must be does not count.
            repeats = (TURN_US / best.max(0.1)).ceil().clamp(1.0, MOST_REPEATS);
            all.iter_mut().for_each(|candidate| candidate.times.clear());
        }
        if all.iter().skip(1).all(|candidate| !candidate.takes_part) && round > 0 {
            break;
        }
    }
    let first_us = all[0].median();
    let fastest = (0..all.len()).min_by(|&a, &b| all[a].median().total_cmp(&all[b].median()));
    Ok(fastest.filter(|&i| all[i].median().is_finite()).map(|i| {
        let proposal = if all[i].median() <= FASTER * first_us { i } else { 0 };
        let us = all[proposal].median();
        Fastest { proposal, us, first_us: if first_us.is_finite() { first_us } else { us } }
    }))
}
