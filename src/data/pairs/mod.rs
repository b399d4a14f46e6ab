//! The data of fine-tuning: queries, the passages that answer them, hard negatives, and a teacher's scores.
//!
//! - [`ids`]: from ids to text numbers
//! - [`qrels`], [`negatives`], [`teacher`], [`runs`]: the files that name texts by id
//! - [`rows`]: files that bring their own texts
//! - [`files`]: all of these put together
//! - [`groups`]: the passages of a query in an epoch
//! - [`texts`], [`batch`]: packed batches
//! - [`findings`]: what was left out and why

pub mod batch;
mod draft;
pub mod files;
pub mod findings;
pub mod groups;
pub mod ids;
pub mod lists;
pub mod negatives;
pub mod qrels;
mod records;
pub mod rows;
pub mod runs;
mod table;
pub mod teacher;
pub mod texts;

use std::sync::Arc;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::data::corpus::Corpus;
use crate::error::{Error, Result};

pub use draft::{Draft, Sealed};
use findings::Findings;
use ids::Ids;
use lists::Lists;

/// Most passages of a group: a member's number has 16 bits, and 0 is the query.
pub const LARGEST_GROUP: usize = 65_535;

/// The queries or the passages.
#[derive(Clone)]
pub struct Side {
    /// The texts.
    pub corpus: Arc<dyn Corpus>,
    /// Their ids, where they have some.
    pub ids: Option<Arc<dyn Ids>>,
}

impl Side {
    /// What messages call text `i`: its id, or its number.
    pub fn name(&self, i: u32) -> String {
        let id = self.ids.as_ref().and_then(|ids| ids.id(u64::from(i)).ok().flatten());
        id.map_or_else(|| format!("text {i}"), str::to_owned)
    }
}

/// What happens to passages that a teacher gave no score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum MissingScore {
    /// The data is refused.
    #[default]
    Error,
    /// The passage is dropped, and a query that keeps too few of them is not trained on.
    Drop,
}

/// What groups will be made of the pairs; decides which of them are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairsSettings {
    /// Passages of a query in a step, the positive among them.
    pub group: usize,
    /// Negatives are drawn from this many of the best ranked.
    pub depth: usize,
    /// What happens to passages without a score, where there is a teacher.
    pub missing_score: MissingScore,
}

impl Default for PairsSettings {
    fn default() -> Self {
        PairsSettings { group: 8, depth: 200, missing_score: MissingScore::Error }
    }
}

impl PairsSettings {
    fn check(&self, passages: u64) -> Result<()> {
        if !(1..=LARGEST_GROUP).contains(&self.group) {
            return Err(Error::usage(format!("groups of {} passages", self.group))
                .remedy(format!("choose from 1 to {LARGEST_GROUP}")));
        }
        if self.group as u64 > passages {
            return Err(Error::refused(format!("groups of {} passages from a corpus of {passages}", self.group))
                .remedy("choose smaller groups or give the whole corpus"));
        }
        Ok(())
    }
}

/// The training queries and their passages. A *row* is the number of a query among those that are trained on.
pub struct Pairs {
    queries: Side,
    passages: Side,
    settings: PairsSettings,
    /// `[rows]` text number of each query, ascending.
    query: Vec<u32>,
    /// Each list ascending.
    positives: Lists,
    /// Each list by rank.
    negatives: Lists,
    scores: Option<[Vec<f32>; 2]>,
    findings: Findings,
}

impl Pairs {
    /// Number of queries that are trained on.
    pub fn rows(&self) -> usize {
        self.query.len()
    }

    /// The queries.
    pub fn queries(&self) -> &Side {
        &self.queries
    }

    /// The passages.
    pub fn passages(&self) -> &Side {
        &self.passages
    }

    /// What groups are made of the pairs.
    pub fn settings(&self) -> &PairsSettings {
        &self.settings
    }

    /// The number of the text of row `row`.
    pub fn query(&self, row: usize) -> u32 {
        self.query[row]
    }

    /// The passages that answer the query of `row`, ascending; at least one.
    pub fn positives(&self, row: usize) -> &[u32] {
        self.positives.get(row)
    }

    /// The negatives of `row`, best ranked first; no positives, none twice, at most `depth`.
    pub fn negatives(&self, row: usize) -> &[u32] {
        self.negatives.get(row)
    }

    /// The teacher's scores of [`Pairs::positives`], in their order.
    pub fn positive_scores(&self, row: usize) -> Option<&[f32]> {
        self.scores.as_ref().map(|[positives, _]| &positives[self.positives.range(row)])
    }

    /// The teacher's scores of [`Pairs::negatives`], in their order.
    pub fn negative_scores(&self, row: usize) -> Option<&[f32]> {
        self.scores.as_ref().map(|[_, negatives]| &negatives[self.negatives.range(row)])
    }

    /// Whether there is a teacher.
    pub fn has_scores(&self) -> bool {
        self.scores.is_some()
    }

    /// Whether `passage` answers the query of `row`.
    pub fn is_positive(&self, row: usize, passage: u32) -> bool {
        self.positives(row).binary_search(&passage).is_ok()
    }

    /// What was left out and why.
    pub fn findings(&self) -> &Findings {
        &self.findings
    }

    /// A digest of what belongs to what: of two sets of pairs over the same texts, equal only for equal pairs.
    pub fn digest(&self) -> [u8; 32] {
        let mut sha = Sha256::new();
        for row in 0..self.rows() {
            let (positives, negatives) = (self.positives(row), self.negatives(row));
            sha.update(bytemuck::cast_slice(&[self.query(row), positives.len() as u32, negatives.len() as u32]));
            sha.update(bytemuck::cast_slice(positives));
            sha.update(bytemuck::cast_slice(negatives));
            for scores in [self.positive_scores(row), self.negative_scores(row)].into_iter().flatten() {
                sha.update(bytemuck::cast_slice(scores));
            }
        }
        sha.finalize().into()
    }

    /// Bytes of memory, texts and ids set aside.
    pub fn bytes(&self) -> usize {
        let scores = self.scores.iter().flatten().map(Vec::capacity).sum::<usize>();
        4 * self.query.capacity() + self.positives.bytes() + self.negatives.bytes() + 4 * scores
    }
}
