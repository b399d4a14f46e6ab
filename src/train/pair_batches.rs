//! [`Batches`] over queries and their passages: the prefetching loader for training, and the same held-out batches at every evaluation.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::data::corpus::Corpus;
use crate::data::loader::{Ahead, Loader};
use crate::data::order::{BatchSize, Part, Plan, Share};
use crate::data::pairs::batch::{ContrastiveBatch, ContrastiveBuilder, CrossBatch, CrossBuilder};
use crate::data::pairs::groups::Groups;
use crate::error::Result;
use crate::train::Batches;
use crate::train::batches::{self, AHEAD};
use crate::train::settings::Settings;

/// What makes batches of groups: of a bi-encoder or of a cross-encoder.
pub trait GroupBuilder: Clone {
    /// A micro-batch.
    type Batch: Send + 'static;

    /// What the samples are.
    fn groups(&self) -> &Groups;

    /// The batch of these samples of a part.
    ///
    /// # Errors
    /// A text that cannot be read, or a group that cannot be filled.
    fn batch(&self, part: Part, samples: Range<u64>) -> Result<Self::Batch>;

    /// The batches of a plan's steps, built ahead.
    ///
    /// # Errors
    /// Threads that cannot be started.
    fn ahead(self, ahead: Ahead) -> Result<Loader<Self::Batch>>;

    /// The queries of a batch: rows of its pairs.
    fn rows(batch: &Self::Batch) -> &[u32];

    /// Whether there is nothing to do for a batch, at no rank.
    fn is_void(batch: &Self::Batch) -> bool {
        Self::rows(batch).is_empty()
    }
}

impl GroupBuilder for ContrastiveBuilder {
    type Batch = ContrastiveBatch;

    fn groups(&self) -> &Groups {
        ContrastiveBuilder::groups(self)
    }

    fn batch(&self, part: Part, samples: Range<u64>) -> Result<ContrastiveBatch> {
        self.build_of(part, samples)
    }

    fn ahead(self, ahead: Ahead) -> Result<Loader<ContrastiveBatch>> {
        self.load(ahead)
    }

    fn rows(batch: &ContrastiveBatch) -> &[u32] {
        &batch.rows
    }

    fn is_void(batch: &ContrastiveBatch) -> bool {
        batch.across.map_or(batch.rows.is_empty(), |across| across.passages == 0)
    }
}

impl GroupBuilder for CrossBuilder {
    type Batch = CrossBatch;

    fn groups(&self) -> &Groups {
        CrossBuilder::groups(self)
    }

    fn batch(&self, part: Part, samples: Range<u64>) -> Result<CrossBatch> {
        self.build_of(part, samples)
    }

    fn ahead(self, ahead: Ahead) -> Result<Loader<CrossBatch>> {
        self.load(ahead)
    }

    fn rows(batch: &CrossBatch) -> &[u32] {
        &batch.rows
    }
}

/// The batches of pairs.
pub struct PairBatches<B: GroupBuilder> {
    builder: B,
    plan: Plan,
    evaluation: Plan,
    share: Share,
    ahead: batches::Ahead<B::Batch>,
}

impl<B: GroupBuilder> PairBatches<B> {
    /// The batches that `builder` makes under `settings`.
    ///
    /// # Errors
    /// Settings that give steps without queries.
    pub fn new(builder: B, settings: &Settings) -> Result<Self> {
        let order = builder.groups().order().clone();
        let size = BatchSize::Sequences(u64::from(settings.batch_size.unwrap_or(32)));
        // Texts are cut by the builder.
        let [plan, evaluation] = batches::plans(settings, order, size, 512)?;
        Ok(PairBatches { builder, plan, evaluation, share: settings.share, ahead: batches::Ahead::default() })
    }

    /// What makes the batches.
    pub fn builder(&self) -> &B {
        &self.builder
    }

    /// Queries held out.
    pub fn held_out_count(&self) -> u64 {
        self.plan.order().texts(Part::HeldOut)
    }

    fn queries(&self) -> &Arc<dyn Corpus> {
        &self.builder.groups().pairs().queries().corpus
    }
}

impl<B: GroupBuilder> Batches for PairBatches<B> {
    type Batch = B::Batch;

    fn next(&mut self) -> Result<Vec<B::Batch>> {
        let micro = self.ahead.next(|cursor| {
            let (plan, rank) = (self.plan.clone(), self.share.rank);
            self.builder.clone().ahead(Ahead { plan, cursor, rank, even: false, steps: AHEAD, threads: 1 })
        })?;
        // At the end of the data a micro-batch may hold no query.
        Ok(micro.into_iter().filter(|batch| !B::is_void(batch)).collect())
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
        batches::steps_of(&self.plan, &**self.queries(), epochs)
    }

    fn held_out(&self) -> Box<dyn Iterator<Item = Result<B::Batch>> + '_> {
        let queries = &**self.queries();
        batches::all(&self.evaluation, queries, |samples| self.builder.batch(Part::HeldOut, samples))
    }

    fn names(&self, batch: &B::Batch) -> Vec<String> {
        let pairs = self.builder.groups().pairs();
        B::rows(batch).iter().map(|&row| pairs.queries().name(pairs.query(row as usize))).collect()
    }

    fn waited(&self) -> Duration {
        self.ahead.waited()
    }
}
