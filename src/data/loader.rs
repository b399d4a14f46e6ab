//! Builds the batches of coming steps while the present one is computed, whatever the batches are.
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
use super::order::{Micro, Plan};
use crate::error::{Error, Result};

/// The micro-batches of one step of one rank.
#[derive(Clone, Debug, PartialEq)]
pub struct StepBatches<T = PretrainBatch> {
    /// The micro-batches, `accumulation` of them; at the end of the data some may be empty.
    pub micro: Vec<T>,
    /// The cursor after the step, over all ranks: what a checkpoint stores.
    pub next: u64,
}

/// Which steps a [`Loader`] builds ahead, and how.
#[derive(Clone, Debug)]
pub struct Ahead {
    /// The steps.
    pub plan: Plan,
    /// Where to begin: 0, or what a checkpoint stored.
    pub cursor: u64,
    /// This process among the plan's ranks.
    pub rank: u64,
    /// Whether ranks get about equal numbers of tokens; else each has neighbouring samples.
    pub even: bool,
    /// Steps to build ahead, at least 1.
    pub steps: usize,
    /// Threads that build, at least 1.
    pub threads: usize,
}

/// Everything a [`Loader`] of pre-training needs.
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
pub struct Loader<T = PretrainBatch> {
    /// `None` once the data ended or failed, and while dropping.
    steps: Option<Receiver<Result<StepBatches<T>>>>,
    /// What has been received and not been given out.
    peeked: Option<Result<StepBatches<T>>>,
    thread: Option<JoinHandle<()>>,
    waited: Duration,
}

impl Loader<PretrainBatch> {
    /// Starts building batches of pre-training.
    pub fn start(corpus: Arc<dyn Corpus>, settings: LoaderSettings) -> Result<Self> {
        let LoaderSettings { plan, rules, cursor, rank, ahead: steps, threads } = settings;
        let builder = Builder::new(rules, plan.order().clone(), plan.part(), plan.batching().max_length);
        let texts = corpus.clone();
        let ahead = Ahead { plan, cursor, rank, even: true, steps, threads };
        Self::build_ahead(corpus, ahead, move |micro| builder.build(&*texts, micro.own.iter().copied()))
    }
}

impl<T: Send + 'static> Loader<T> {
    /// Starts building with `build`, which gets what a micro-batch is made of; it is called inside a pool of the loader's own.
    /// `corpus` is what a plan of batches by tokens looks up lengths in.
    pub fn build_ahead(
        corpus: Arc<dyn Corpus>,
        ahead: Ahead,
        build: impl Fn(&Micro) -> Result<T> + Send + Sync + 'static,
    ) -> Result<Self> {
        let ranks = ahead.plan.batching().ranks;
        if ahead.rank >= ranks {
            return Err(Error::usage(format!("rank {} of {ranks} does not exist", ahead.rank))
                .remedy("check the launcher's variables"));
        }
        let pool = ThreadPoolBuilder::new()
            .num_threads(ahead.threads.max(1))
            .thread_name(|i| format!("masks-{i}"))
            .build()
            .map_err(|e| cannot_start(&e))?;
        let (send, receive) = sync_channel(ahead.steps.max(1));
        let thread = std::thread::Builder::new()
            .name("batches".into())
            .spawn(move || produce(&*corpus, &ahead, &pool, &build, &send))
            .map_err(|e| cannot_start(&e))?;
        Ok(Loader { steps: Some(receive), peeked: None, thread: Some(thread), waited: Duration::ZERO })
    }
}

impl<T> Loader<T> {
    /// Time spent so far waiting for batches.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// What `next` will give, if it is there already and good. Waits for nothing.
    pub fn peek(&mut self) -> Option<&StepBatches<T>> {
        if self.peeked.is_none() {
            self.peeked = self.steps.as_ref()?.try_recv().ok();
        }
        self.peeked.as_ref()?.as_ref().ok()
    }
}

impl<T> Iterator for Loader<T> {
    type Item = Result<StepBatches<T>>;

    fn next(&mut self) -> Option<Self::Item> {
        let steps = self.steps.as_ref()?;
        let start = Instant::now();
        let step = self.peeked.take().map_or_else(|| steps.recv(), Ok);
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

impl<T> Drop for Loader<T> {
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
fn produce<T: Send>(
    corpus: &dyn Corpus,
    ahead: &Ahead,
    pool: &ThreadPool,
    build: &(dyn Fn(&Micro) -> Result<T> + Sync),
    send: &SyncSender<Result<StepBatches<T>>>,
) {
    let plan = &ahead.plan;
    let mut cursor = ahead.cursor;
    loop {
        let step = match plan.step(corpus, cursor) {
            Ok(Some(step)) => step,
            Ok(None) => return,
            Err(error) => {
                let _ = send.send(Err(error));
                return;
            }
        };
        let micro = plan.micro(corpus, &step, ahead.rank, ahead.even);
        let micro: Result<Vec<T>> = micro.and_then(|all| pool.install(|| all.iter().map(build).collect()));
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
