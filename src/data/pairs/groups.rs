//! The passages of a query in an epoch: a pure function of (seed, sample).
//!
//! One positive is drawn uniformly from the query's positives; then negatives uniformly and without repetition from its best ranked
//! ones; then, where these are too few, random passages of the corpus. A passage whose text equals that of a positive of the query, or
//! of another passage of the group, is not taken. Short lists were padded with any random passages in the published code, positives
//! included; here they never are.

use std::sync::Arc;

use crate::data::corpus::Corpus;
use crate::data::loader::Ahead;
use crate::data::order::{BatchSize, Order, Part};
use crate::error::{Error, Result};
use crate::rng::{Site, Stream};

use super::Pairs;
use super::texts::{Scratch, Texts};

/// What one query is trained with in one epoch.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// The query's row of [`Pairs`].
    pub row: u32,
    /// The number of the query's text.
    pub query: u32,
    /// Numbers of the passages' texts: the positive, then the others.
    pub passages: Vec<u32>,
    /// The teacher's scores of the passages.
    pub scores: Option<Vec<f32>>,
}

/// Makes groups.
#[derive(Clone)]
pub struct Groups {
    pairs: Arc<Pairs>,
    /// The passages; equal texts are found by their hashes.
    texts: Arc<Texts>,
    order: Order,
    seed: u64,
}

/// Random passages tried before the corpus is gone through in order.
const TRIES: usize = 64;

impl Groups {
    /// Groups of `pairs`, in the order that belongs to `seed`. `texts` are the passages as they are cut.
    pub fn new(seed: u64, pairs: Arc<Pairs>, texts: Arc<Texts>) -> Result<Groups> {
        let order = Order::new(seed, pairs.rows() as u64, 0)?;
        Ok(Groups { pairs, texts, order, seed })
    }

    /// The same with `queries` of them held out for evaluation.
    pub fn hold_out(&mut self, queries: u64) -> Result<()> {
        self.order = Order::new(self.seed, self.pairs.rows() as u64, queries)?;
        Ok(())
    }

    /// The order of the queries.
    pub fn order(&self) -> &Order {
        &self.order
    }

    /// The pairs.
    pub fn pairs(&self) -> &Arc<Pairs> {
        &self.pairs
    }

    /// The queries, for a loader; a plan whose batches are counted in tokens is refused.
    pub(super) fn queries_for(&self, ahead: &Ahead) -> Result<Arc<dyn Corpus>> {
        match ahead.plan.batching().size {
            BatchSize::Sequences(_) => Ok(self.pairs.queries().corpus.clone()),
            BatchSize::Tokens(_) => Err(Error::usage("batches of queries and passages are not counted in tokens")
                .remedy("choose a number of queries")),
        }
    }

    /// The group of a sample of training.
    pub fn group(&self, sample: u64) -> Result<Group> {
        self.group_of(Part::Train, sample)
    }

    /// The group of a sample of a part.
    pub fn group_of(&self, part: Part, sample: u64) -> Result<Group> {
        let pairs = &*self.pairs;
        let row = self.order.text(part, sample) as usize;
        // No epoch of training ever comes so far.
        let epoch = if part == Part::Train { sample / self.order.texts(part) } else { u64::MAX };
        let mut making = Making {
            texts: &self.texts,
            random: Stream::new(self.seed, epoch, Site::Passages, sample),
            scratch: Scratch::default(),
            taken: Vec::new(),
            size: pairs.settings().group,
            passages: Vec::with_capacity(pairs.settings().group),
            scores: pairs.has_scores().then(Vec::new),
        };
        for &positive in pairs.positives(row) {
            let hash = making.hash(positive)?;
            making.taken.push(hash);
        }
        let at = making.random.below(pairs.positives(row).len() as u32) as usize;
        making.push(pairs.positives(row)[at], pairs.positive_scores(row).map(|s| s[at]));
        making.negatives(pairs.negatives(row), pairs.negative_scores(row))?;
        making.fill(|| pairs.queries().name(pairs.query(row)))?;
        let Making { passages, scores, .. } = making;
        Ok(Group { row: row as u32, query: pairs.query(row), passages, scores })
    }
}

/// A group being made.
struct Making<'a> {
    texts: &'a Texts,
    random: Stream,
    scratch: Scratch,
    /// Hashes of the texts that must not come, or come again.
    taken: Vec<u64>,
    size: usize,
    passages: Vec<u32>,
    scores: Option<Vec<f32>>,
}

impl Making<'_> {
    fn hash(&mut self, passage: u32) -> Result<u64> {
        self.texts.hash_with(passage, &mut self.scratch)
    }

    fn push(&mut self, passage: u32, score: Option<f32>) {
        self.passages.push(passage);
        if let Some(scores) = &mut self.scores {
            scores.extend(score);
        }
    }

    fn is_full(&self) -> bool {
        self.passages.len() == self.size
    }

    /// Takes a passage unless its text was taken; gives whether it did.
    fn take(&mut self, passage: u32, score: Option<f32>) -> Result<bool> {
        let hash = self.hash(passage)?;
        let fresh = !self.taken.contains(&hash);
        if fresh {
            self.taken.push(hash);
            self.push(passage, score);
        }
        Ok(fresh)
    }

    /// Negatives from the list, in random order.
    fn negatives(&mut self, list: &[u32], scores: Option<&[f32]>) -> Result<()> {
        let mut left: Vec<u32> = (0..list.len() as u32).collect();
        let mut equal = Vec::new();
        for i in 0..left.len() {
            if self.is_full() {
                return Ok(());
            }
            let j = i + self.random.below((left.len() - i) as u32) as usize;
            left.swap(i, j);
            let at = left[i] as usize;
            if !self.take(list[at], scores.map(|s| s[at]))? {
                equal.push(at);
            }
        }
        // A random passage has no score. The equal texts have one, and the same as the text they equal.
        let needed = if scores.is_some() { self.size - self.passages.len() } else { 0 };
        for at in equal.into_iter().take(needed) {
            self.push(list[at], scores.map(|s| s[at]));
        }
        Ok(())
    }

    /// Random passages until the group is full.
    fn fill(&mut self, query: impl Fn() -> String) -> Result<()> {
        let texts = u32::try_from(self.texts.texts()).unwrap_or(u32::MAX);
        let mut tries = TRIES + 8 * self.size;
        while !self.is_full() && tries > 0 {
            let passage = self.random.below(texts);
            self.take(passage, None)?;
            tries -= 1;
        }
        // Only where nearly all texts are taken: a small corpus, or one of equal texts.
        let start = if self.is_full() { 0 } else { self.random.below(texts) };
        for i in 0..texts {
            if self.is_full() {
                return Ok(());
            }
            let at = (u64::from(start) + u64::from(i)) % u64::from(texts);
            self.take(at as u32, None)?;
        }
        if self.is_full() {
            return Ok(());
        }
        let cause = format!(
            "query {} has only {} passages of different text that are none of its positives; its group takes {}",
            query(),
            self.passages.len() - 1,
            self.size - 1
        );
        Err(Error::refused(cause).remedy("choose smaller groups or give the whole corpus"))
    }
}
