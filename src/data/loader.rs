//! Builds the batches of coming steps while the present one is computed.
//!
//! One thread walks the plan and builds batches in a small pool of its own, so that the threads of the training step never wait for a
//! mask; a bounded channel keeps it a few steps ahead at most. Dropping the loader stops and joins the thread.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::batch::{Builder, PretrainBatch};
use super::corpus::Corpus;
use super::masking::MaskRules;
use super::order::Plan;
use crate::error::{Error, Result};

/// The micro-batches of one step of one rank.
#[derive(Clone, Debug, PartialEq)]
pub struct StepBatches {
    /// The micro-batches, `accumulation` of them; at the end of the data some may be empty.
    pub micro: Vec<PretrainBatch>,
    /// The cursor after the step, over all ranks: what a checkpoint stores.
    pub next: u64,
}

/// Everything a [`Loader`] needs.
pub struct LoaderSettings {
    /// The steps.
    pub plan: Plan,
    /// The masks.
    pub rules: MaskRules,
    /// Where to begin: 0, or what a checkpoint stored.
    pub cursor: u64,
    /// This process among the plan's ranks.
    pub rank: u64,
    /// Steps to build ahead, at least 1.
    pub ahead: usize,
    /// Threads that build, at least 1.
    pub threads: usize,
}

/// An iterator over the steps' batches, built ahead.
pub struct Loader {
    /// `None` once the data ended or failed, and while dropping.
    steps: Option<Receiver<Result<StepBatches>>>,
    thread: Option<JoinHandle<()>>,
    waited: Duration,
}

impl Loader {
    /// Starts building.
    pub fn start(corpus: Arc<dyn Corpus>, settings: LoaderSettings) -> Result<Self> {
        let ranks = settings.plan.batching().ranks;
        if settings.rank >= ranks {
            return Err(Error::usage(format!("rank {} of {ranks} does not exist", settings.rank))
                .remedy("check the launcher's variables"));
        }
        let pool = ThreadPoolBuilder::new()
            .num_threads(settings.threads.max(1))
            .thread_name(|i| format!("masks-{i}"))
            .build()
            .map_err(|e| cannot_start(&e))?;
        let (send, receive) = sync_channel(settings.ahead.max(1));
        let thread = std::thread::Builder::new()
            .name("batches".into())
            .spawn(move || produce(&*corpus, &settings, &pool, &send))
            .map_err(|e| cannot_start(&e))?;
        Ok(Loader { steps: Some(receive), thread: Some(thread), waited: Duration::ZERO })
    }

    /// Time spent so far waiting for batches.
    pub fn waited(&self) -> Duration {
        self.waited
    }
}

impl Iterator for Loader {
    type Item = Result<StepBatches>;

    fn next(&mut self) -> Option<Self::Item> {
        let steps = self.steps.as_ref()?;
        let start = Instant::now();
        let step = steps.recv();
        self.waited += start.elapsed();
        match step {
            Ok(Ok(step)) => return Some(Ok(step)),
            Ok(Err(error)) => {
                self.steps = None;
                return Some(Err(error));
            }
            Err(_) => self.steps = None,
        }
        // The channel closed: either the data ended or the thread panicked, and the two must not look alike.
        let panicked = self.thread.take().is_some_and(|thread| thread.join().is_err());
        panicked.then(|| {
            Err(Error::refused("the thread that builds batches stopped").remedy("run again; report this if it repeats"))
        })
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // Without a receiver the thread's next send fails and it returns.
        self.steps = None;
        if let Some(thread) = self.thread.take() {
            // A panic was reported by `next`, or nobody waits for more steps.
            let _ = thread.join();
        }
    }
}

/// Sends step after step until the end, an error, or until nobody listens.
fn produce(corpus: &dyn Corpus, settings: &LoaderSettings, pool: &ThreadPool, send: &SyncSender<Result<StepBatches>>) {
    let plan = &settings.plan;
    let builder = Builder::new(settings.rules, plan.order().clone(), plan.part(), plan.batching().max_length);
    let mut cursor = settings.cursor;
    loop {
        let step = match plan.step(corpus, cursor) {
            Ok(Some(step)) => step,
            Ok(None) => return,
            Err(error) => {
                let _ = send.send(Err(error));
                return;
            }
        };
        let micro: Result<Vec<PretrainBatch>> = pool.install(|| {
            step.of_rank(settings.rank, plan.batching().ranks)
                .map(|samples| builder.build(corpus, samples.clone()))
                .collect()
        });
        cursor = step.next;
        let batches = micro.map(|micro| StepBatches { micro, next: cursor });
        let failed = batches.is_err();
        if send.send(batches).is_err() || failed {
            return;
        }
    }
}

fn cannot_start(cause: &dyn std::fmt::Display) -> Error {
    Error::refused(format!("cannot start the threads that build batches: {cause}"))
        .remedy("raise the limit of processes (ulimit -u)")
}
