//! [`Batches`] over a corpus: the prefetching loader for training, and the same held-out batches at every evaluation.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::data::batch::{Builder, PretrainBatch};
use crate::data::corpus::Corpus;
use crate::data::loader::{Loader, LoaderSettings};
use crate::data::masking::MaskRules;
use crate::data::order::{BatchSize, Batching, Order, Part, Plan, Share};
use crate::error::{Error, Result};
use crate::train::Batches;
use crate::train::settings::Settings;

/// Steps built ahead of the one that is computed.
pub(super) const AHEAD: usize = 3;

/// Held-out texts of a run that does not say how many: 1 % of the data, at most 1,000, and none of fewer than 20 texts.
pub fn held_out_texts(settings: &Settings, texts: u64) -> u64 {
    settings.eval_size.unwrap_or(if texts < 20 { 0 } else { (texts / 100).clamp(1, 1000) })
}

/// How a text is called in messages, from its number in the corpus.
pub type Names = Box<dyn Fn(u64) -> Option<String> + Send>;

/// Steps' batches that are built ahead, from any point.
pub(super) struct Ahead<T> {
    /// Started at the first batch, so that a plan costs no thread.
    loader: Option<Loader<T>>,
    /// Waiting of loaders that are gone.
    waited: Duration,
    cursor: u64,
}

impl<T> Default for Ahead<T> {
    fn default() -> Self {
        Ahead { loader: None, waited: Duration::ZERO, cursor: 0 }
    }
}

impl<T: Send + 'static> Ahead<T> {
    /// The micro-batches of the next step; `start` begins to load at a cursor.
    pub fn next(&mut self, start: impl FnOnce(u64) -> Result<Loader<T>>) -> Result<Vec<T>> {
        if self.loader.is_none() {
            self.loader = Some(start(self.cursor)?);
        }
        let step = self.loader.as_mut().and_then(Iterator::next).unwrap_or_else(|| {
            Err(Error::refused(format!("the data ended at sample {}", self.cursor)).remedy("report this as a defect"))
        })?;
        self.cursor = step.next;
        Ok(step.micro)
    }

    /// The micro-batches that [`Self::next`] will give, if they are there already.
    pub fn peek(&mut self) -> Option<&[T]> {
        self.loader.as_mut()?.peek().map(|step| step.micro.as_slice())
    }

    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    pub fn seek(&mut self, cursor: u64) {
        *self = Ahead { loader: None, waited: self.waited(), cursor };
    }

    pub fn waited(&self) -> Duration {
        self.waited + self.loader.as_ref().map_or(Duration::ZERO, Loader::waited)
    }
}

/// The batches of a whole plan, in its order.
pub(super) fn all<'a, T: 'a>(
    plan: &'a Plan,
    corpus: &'a dyn Corpus,
    build: impl Fn(Range<u64>) -> Result<T> + 'a,
) -> Box<dyn Iterator<Item = Result<T>> + 'a> {
    let mut cursor = 0;
    Box::new(std::iter::from_fn(move || match plan.step(corpus, cursor) {
        Ok(Some(step)) => {
            let samples = cursor..step.next;
            cursor = step.next;
            Some(build(samples))
        }
        Ok(None) => None,
        Err(e) => {
            cursor = u64::MAX;
            Some(Err(e))
        }
    }))
}

/// The steps of training under `settings`, and the batches of what is held out.
pub(super) fn plans(settings: &Settings, order: Order, size: BatchSize, max_length: usize) -> Result<[Plan; 2]> {
    let batching =
        Batching { size, accumulation: u64::from(settings.accumulate), ranks: settings.share.ranks, max_length };
    let end = match (settings.steps, settings.epochs) {
        (None, Some(epochs)) => order.samples(epochs),
        _ => u64::MAX,
    };
    let held_out = order.texts(Part::HeldOut);
    let evaluation =
        Plan::new(order.clone(), Part::HeldOut, Batching { accumulation: 1, ranks: 1, ..batching }, held_out)?;
    Ok([Plan::new(order, Part::Train, batching, end)?, evaluation])
}

/// Steps of the training that `plan` is of in `epochs` epochs.
pub(super) fn steps_of(plan: &Plan, corpus: &dyn Corpus, epochs: f64) -> Result<u64> {
    let order = plan.order().clone();
    let end = order.samples(epochs);
    Plan::new(order, Part::Train, *plan.batching(), end)?.steps(corpus, 0)
}

/// The batches of a corpus.
pub struct CorpusBatches {
    corpus: Arc<dyn Corpus>,
    plan: Plan,
    evaluation: Plan,
    rules: MaskRules,
    share: Share,
    threads: usize,
    names: Names,
    ahead: Ahead<PretrainBatch>,
}

impl CorpusBatches {
    /// The batches of `corpus` under `settings`. Texts are cut to `max_length` tokens, which the model and the settings bound;
    /// `threads` build ahead; `names` gives a text's id.
    pub fn new(
        corpus: Arc<dyn Corpus>,
        settings: &Settings,
        rules: MaskRules,
        max_length: usize,
        threads: usize,
        names: Names,
    ) -> Result<Self> {
        let order = Order::new(settings.seed, corpus.texts(), held_out_texts(settings, corpus.texts()))?;
        let size = match (settings.tokens_per_batch, settings.batch_size) {
            (Some(tokens), _) => BatchSize::Tokens(u64::from(tokens)),
            (None, sequences) => BatchSize::Sequences(u64::from(sequences.unwrap_or(32))),
        };
        let [plan, evaluation] = plans(settings, order, size, max_length)?;
        let share = settings.share;
        Ok(CorpusBatches { corpus, plan, evaluation, rules, share, threads, names, ahead: Ahead::default() })
    }

    /// Texts held out.
    pub fn held_out_count(&self) -> u64 {
        self.plan.order().texts(Part::HeldOut)
    }
}

impl Batches for CorpusBatches {
    type Batch = PretrainBatch;

    fn next(&mut self) -> Result<Vec<PretrainBatch>> {
        let micro = self.ahead.next(|cursor| {
            let settings = LoaderSettings {
                plan: self.plan.clone(),
                rules: self.rules,
                cursor,
                rank: self.share.rank,
                ahead: AHEAD,
                threads: self.threads,
            };
            Loader::start(self.corpus.clone(), settings)
        })?;
        // At the end of the data a micro-batch may hold no text.
        Ok(micro.into_iter().filter(|batch| batch.sequences() > 0).collect())
    }

    fn peek(&mut self) -> Option<&PretrainBatch> {
        self.ahead.peek()?.iter().find(|batch| batch.sequences() > 0)
    }

    fn cursor(&self) -> u64 {
        self.ahead.cursor()
    }

    fn seek(&mut self, cursor: u64) -> Result<()> {
        self.ahead.seek(cursor);
        Ok(())
    }

    fn texts(&self) -> u64 {
        self.plan.order().texts(Part::Train)
    }

    fn steps_of(&self, epochs: f64) -> Result<u64> {
        steps_of(&self.plan, &*self.corpus, epochs)
    }

    fn held_out(&self) -> Box<dyn Iterator<Item = Result<PretrainBatch>> + '_> {
        let batching = self.evaluation.batching();
        let builder = Builder::new(self.rules, self.evaluation.order().clone(), Part::HeldOut, batching.max_length);
        all(&self.evaluation, &*self.corpus, move |samples| builder.build(&*self.corpus, samples))
    }

    fn names(&self, batch: &PretrainBatch) -> Vec<String> {
        let name = |sample: &u64| {
            let text = self.plan.order().text(Part::Train, *sample);
            (self.names)(text).unwrap_or_else(|| format!("text {text}"))
        };
        batch.samples.iter().map(name).collect()
    }

    fn waited(&self) -> Duration {
        self.ahead.waited()
    }
}
