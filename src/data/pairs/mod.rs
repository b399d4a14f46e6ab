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

use crate::data::corpus::Corpus;
use crate::error::{Error, Result};

use findings::{Findings, Tally};
use ids::Ids;
use lists::{Lists, Pair, Ranked, Score, Scores};

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

    /// Bytes of memory, texts and ids set aside.
    pub fn bytes(&self) -> usize {
        let scores = self.scores.iter().flatten().map(Vec::capacity).sum::<usize>();
        4 * self.query.capacity() + self.positives.bytes() + self.negatives.bytes() + 4 * scores
    }
}

/// Pairs being collected, by text numbers.
pub struct Draft {
    positives: Ranked,
    negatives: Ranked,
    scores: Option<Scores>,
    depth: usize,
    /// What was noticed so far.
    pub findings: Findings,
}

/// Negatives kept beyond the depth: so many may turn out to be positives.
const SPARE: usize = 32;

impl Draft {
    /// Keeps the `depth` best ranked negatives of a query.
    pub fn new(depth: usize) -> Draft {
        Draft {
            positives: Ranked::new(usize::MAX),
            negatives: Ranked::new(depth.saturating_add(SPARE)),
            scores: None,
            depth,
            findings: Findings::default(),
        }
    }

    /// `passage` answers `query`.
    pub fn positive(&mut self, query: u32, passage: u32) {
        self.positives.push(query, passage);
    }

    /// `passage` is the next negative of `query`.
    pub fn negative(&mut self, query: u32, passage: u32) {
        self.negatives.push(query, passage);
    }

    /// The teacher's score of a pair.
    pub fn score(&mut self, query: u32, passage: u32, score: f32) {
        self.scores.get_or_insert_default().push(query, passage, score);
    }

    /// Checks everything against everything and makes the lists final. `settings.depth` is that of [`Draft::new`] at most.
    pub fn finish(mut self, queries: Side, passages: Side, mut settings: PairsSettings) -> Result<Pairs> {
        settings.depth = settings.depth.min(self.depth);
        settings.check(passages.corpus.texts())?;
        if let Some(scores) = &mut self.scores {
            self.findings.conflicting_scores.count = scores.sort();
        }
        self.findings.queries = queries.corpus.texts();
        self.findings.passages = passages.corpus.texts();
        let (all, negatives) = (self.positives.finish(), self.negatives.finish());
        let mut building = Building {
            scores: self.scores.as_ref(),
            missing: Tally::default(),
            pairs: Pairs {
                queries,
                passages,
                settings,
                query: Vec::new(),
                positives: Lists::default(),
                negatives: Lists::default(),
                scores: self.scores.is_some().then(Default::default),
                findings: self.findings,
            },
        };
        let (mut rest, mut next) = (negatives.as_slice(), 0);
        for positives in all.chunk_by(|a, b| a.query == b.query) {
            let query = positives[0].query;
            building.skipped(next..query);
            next = query + 1;
            rest = &rest[rest.partition_point(|p| p.query < query)..];
            let count = rest.partition_point(|p| p.query == query);
            building.add(positives, &rest[..count]);
            rest = &rest[count..];
        }
        building.skipped(next..u32::try_from(building.pairs.queries.corpus.texts()).unwrap_or(u32::MAX));
        building.finish()
    }
}

/// [`Pairs`] being filled query by query.
struct Building<'a> {
    pairs: Pairs,
    scores: Option<&'a Scores>,
    /// Candidates without a score.
    missing: Tally,
}

impl Building<'_> {
    /// These queries have no positive.
    fn skipped(&mut self, queries: std::ops::Range<u32>) {
        if !queries.is_empty() {
            let tally = &mut self.pairs.findings.without_positive;
            tally.add(|| self.pairs.queries.name(queries.start));
            tally.count += queries.len() as u64 - 1;
        }
    }

    /// One query with its passages.
    fn add(&mut self, positives: &[Pair], negatives: &[Pair]) {
        let query = positives[0].query;
        let mut positive: Vec<u32> = positives.iter().map(|p| p.passage).collect();
        positive.sort_unstable();
        let mut negative = Vec::with_capacity(negatives.len());
        for pair in negatives {
            if positive.binary_search(&pair.passage).is_ok() {
                let (queries, passages) = (&self.pairs.queries, &self.pairs.passages);
                let name = || format!("{} of query {}", passages.name(pair.passage), queries.name(query));
                self.pairs.findings.positive_negatives.add(name);
            } else if negative.len() < self.pairs.settings.depth {
                negative.push(pair.passage);
            }
        }
        let needed = self.pairs.settings.group - 1;
        if let Some(scores) = self.scores {
            let scores = scores.of(query);
            let known = [&mut positive, &mut negative].map(|list| self.scored(query, list, scores));
            if positive.is_empty() || negative.len() < needed {
                self.pairs.findings.too_few_scored.add(|| self.pairs.queries.name(query));
                return;
            }
            if let Some(kept) = &mut self.pairs.scores {
                kept.iter_mut().zip(known).for_each(|(kept, known)| kept.extend(known));
            }
        } else if negative.len() < needed {
            self.pairs.findings.short_lists.add(|| self.pairs.queries.name(query));
        }
        self.pairs.query.push(query);
        self.pairs.positives.push(positive);
        self.pairs.negatives.push(negative);
    }

    /// Drops the passages of a list that have no score and gives the scores of the others.
    fn scored(&mut self, query: u32, list: &mut Vec<u32>, scores: &[Score]) -> Vec<f32> {
        let mut known = Vec::with_capacity(list.len());
        list.retain(|&passage| match lists::find(scores, passage) {
            Some(score) => {
                known.push(score);
                true
            }
            None => {
                let (queries, passages) = (&self.pairs.queries, &self.pairs.passages);
                self.missing.add(|| format!("query {} and passage {}", queries.name(query), passages.name(passage)));
                false
            }
        });
        known
    }

    /// The last checks: whether enough is left.
    fn finish(mut self) -> Result<Pairs> {
        let findings = &mut self.pairs.findings;
        let strict = self.scores.is_some() && self.pairs.settings.missing_score == MissingScore::Error;
        if strict && let Some(first) = &self.missing.first {
            let cause = format!("{} pairs have no score of the teacher (first: {first})", self.missing.count);
            return Err(Error::refused(cause).remedy("score them too, or let missing scores drop their passages"));
        }
        if strict && let Some(first) = &findings.too_few_scored.first {
            let cause = format!(
                "{} queries have fewer than {} scored negatives (first: {first})",
                findings.too_few_scored.count,
                self.pairs.settings.group - 1
            );
            return Err(Error::refused(cause)
                .remedy("score more negatives, choose smaller groups, or let missing scores drop their queries"));
        }
        findings.unscored = self.missing;
        findings.trained = self.pairs.query.len() as u64;
        if self.pairs.query.is_empty() {
            let why = findings.lines().join("; ");
            let why = if why.is_empty() { "no positives are given".into() } else { why };
            return Err(Error::refused(format!("there is no query to train on: {why}"))
                .remedy("check that judgements, queries and corpus belong together"));
        }
        Ok(self.pairs)
    }
}
