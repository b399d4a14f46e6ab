//! The prefetching loader: same batches, clean ends.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use retromae_engine::data::batch::Builder;
use retromae_engine::data::corpus::{Corpus, MemoryCorpus};
use retromae_engine::data::loader::{Loader, LoaderSettings, StepBatches};
use retromae_engine::data::order::{BatchSize, Batching, Order, Part, Plan};
use retromae_engine::{Error, Result};

use super::common::*;

fn settings(texts: u64, size: BatchSize, ranks: u64, rank: u64, cursor: u64, end: u64) -> LoaderSettings {
    let batching = Batching { size, accumulation: 4 / ranks, ranks, max_length: 128 };
    let plan = Plan::new(Order::new(4, texts, 0).unwrap(), Part::Train, batching, end).unwrap();
    LoaderSettings { plan, rules: rules(4), cursor, rank, ahead: 2, threads: 2 }
}

fn load(corpus: &Arc<MemoryCorpus>, settings: LoaderSettings) -> Vec<StepBatches> {
    Loader::start(corpus.clone(), settings).unwrap().collect::<Result<Vec<_>>>().unwrap()
}

#[test]
fn the_loader_gives_the_plans_batches_and_resumes_at_a_cursor() {
    let corpus = Arc::new(corpus((0..30).map(|i| 2 + 13 * i % 120)));
    for size in [BatchSize::Sequences(3), BatchSize::Tokens(256)] {
        let all = load(&corpus, settings(30, size, 1, 0, 0, 70));
        let samples: Vec<u64> =
            all.iter().flat_map(|step| &step.micro).flat_map(|micro| micro.samples.clone()).collect();
        assert_eq!(samples, (0..70).collect::<Vec<_>>());
        let builder = Builder::new(rules(4), Order::new(4, 30, 0).unwrap(), Part::Train, 128);
        for micro in all.iter().flat_map(|step| &step.micro).filter(|micro| micro.sequences() > 0) {
            let range = micro.samples[0]..micro.samples[0] + micro.sequences() as u64;
            assert_eq!(*micro, builder.build(&*corpus, range).unwrap());
        }
        assert_eq!(load(&corpus, settings(30, size, 1, 0, all[1].next, 70)), all[2..]);
    }
}

#[test]
fn a_step_that_was_looked_at_comes_next() {
    let corpus = Arc::new(corpus((0..30).map(|i| 2 + 13 * i % 120)));
    let all = load(&corpus, settings(30, BatchSize::Sequences(3), 1, 0, 0, 70));
    let mut loader = Loader::start(corpus, settings(30, BatchSize::Sequences(3), 1, 0, 0, 70)).unwrap();
    for step in &all {
        let until = Instant::now() + Duration::from_secs(60);
        while loader.peek().is_none() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(loader.peek(), Some(step));
        assert_eq!(loader.peek(), Some(step));
        assert_eq!(loader.next().unwrap().unwrap(), *step);
    }
    assert!(loader.next().is_none() && loader.peek().is_none());
    assert!(loader.waited() < Duration::from_secs(1), "looking is not waiting: {:?}", loader.waited());
}

#[test]
fn ranks_together_load_what_one_rank_loads() {
    let corpus = Arc::new(corpus((0..30).map(|i| 2 + 13 * i % 120)));
    let alone = load(&corpus, settings(30, BatchSize::Tokens(256), 1, 0, 0, 70));
    for ranks in [2, 4] {
        let shares: Vec<_> =
            (0..ranks).map(|rank| load(&corpus, settings(30, BatchSize::Tokens(256), ranks, rank, 0, 70))).collect();
        for (i, step) in alone.iter().enumerate() {
            let dealt: Vec<_> =
                (0..4).map(|m| shares[m % ranks as usize][i].micro[m / ranks as usize].clone()).collect();
            assert!(dealt == step.micro, "step {i} of {ranks} ranks");
            assert!(shares.iter().all(|share| share[i].next == step.next));
        }
    }
}

/// A corpus that counts reads, fails or panics at a text, and can be held shut.
struct Watched {
    texts: MemoryCorpus,
    reads: AtomicU64,
    fails_at: Option<u64>,
    panics_at: Option<u64>,
    open: (Mutex<bool>, Condvar),
}

impl Watched {
    fn new(texts: u64) -> Self {
        let texts = corpus((0..texts).map(|_| 20));
        Watched {
            texts,
            reads: AtomicU64::new(0),
            fails_at: None,
            panics_at: None,
            open: (Mutex::new(true), Condvar::new()),
        }
    }

    fn set_open(&self, open: bool) {
        *self.open.0.lock().unwrap() = open;
        self.open.1.notify_all();
    }
}

impl Corpus for Watched {
    fn texts(&self) -> u64 {
        self.texts.texts()
    }
    fn length(&self, i: u64) -> Result<usize> {
        self.texts.length(i)
    }
    fn read(&self, i: u64, ids: &mut Vec<u32>, word_start: &mut Vec<bool>) -> Result<()> {
        drop(self.open.1.wait_while(self.open.0.lock().unwrap(), |open| !*open).unwrap());
        self.reads.fetch_add(1, Ordering::SeqCst);
        assert!(self.panics_at != Some(i), "a bug");
        match self.fails_at {
            Some(bad) if bad == i => Err(Error::refused("bad block").path("s.rms").offset(77)),
            _ => self.texts.read(i, ids, word_start),
        }
    }
}

#[test]
fn an_error_comes_after_the_steps_before_it_and_ends_the_loader() {
    let order = Order::new(4, 100, 0).unwrap();
    let corpus = Arc::new(Watched { fails_at: Some(order.text(Part::Train, 29)), ..Watched::new(100) });
    let mut loader = Loader::start(corpus, settings(100, BatchSize::Sequences(3), 1, 0, 0, 100)).unwrap();
    assert_eq!(loader.next().unwrap().unwrap().next, 12);
    assert_eq!(loader.next().unwrap().unwrap().next, 24);
    assert_eq!(loader.next().unwrap().unwrap_err().to_string(), "s.rms@77: bad block");
    assert!(loader.next().is_none());
}

#[test]
fn a_panic_while_building_is_an_error_and_not_the_end_of_the_data() {
    let order = Order::new(4, 100, 0).unwrap();
    let corpus = Arc::new(Watched { panics_at: Some(order.text(Part::Train, 13)), ..Watched::new(100) });
    let mut loader = Loader::start(corpus, settings(100, BatchSize::Sequences(3), 1, 0, 0, 100)).unwrap();
    assert!(loader.next().unwrap().is_ok());
    assert!(loader.next().unwrap().unwrap_err().to_string().contains("builds batches stopped"));
    assert!(loader.next().is_none());
}

#[test]
fn dropping_a_loader_stops_it_at_once_and_it_never_runs_far_ahead() {
    let corpus = Arc::new(Watched::new(10_000));
    let mut loader = Loader::start(corpus.clone(), settings(10_000, BatchSize::Sequences(3), 1, 0, 0, 10_000)).unwrap();
    loader.next().unwrap().unwrap();
    drop(loader);
    // Given away 1 step, 2 in the channel, 1 waiting to be sent and 1 that the freed place let begin: 12 samples each.
    let reads = corpus.reads.load(Ordering::SeqCst);
    assert!(reads <= 5 * 12, "{reads} texts read");
    assert_eq!(Arc::strong_count(&corpus), 1, "the thread is gone");
}

#[test]
fn waiting_for_data_is_measured() {
    let corpus = Arc::new(Watched::new(50));
    corpus.set_open(false);
    let mut loader = Loader::start(corpus.clone(), settings(50, BatchSize::Sequences(3), 1, 0, 0, 50)).unwrap();
    assert_eq!(loader.waited(), Duration::ZERO);
    let start = Instant::now();
    let opener = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(80));
        corpus.set_open(true);
    });
    loader.next().unwrap().unwrap();
    let elapsed = start.elapsed();
    opener.join().unwrap();
    assert!(loader.waited() >= Duration::from_millis(50) && loader.waited() <= elapsed, "{:?}", loader.waited());
}

#[test]
fn a_rank_outside_the_plan_is_refused() {
    let corpus = Arc::new(corpus([10, 10]));
    let error = Loader::start(corpus, settings(2, BatchSize::Sequences(1), 2, 2, 0, 2)).err().unwrap();
    assert!(error.to_string().contains("rank 2 of 2"), "{error}");
}
