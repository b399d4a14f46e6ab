//! Hard negatives: passages that rank high for a query and do not answer it.
//!
//! A list is gone through by rank, and a passage is dropped by the first rule that applies: outside the ranks, a positive, too high a
//! score, too near to the positives' scores in the run, a text equal to a positive's, a text taken already, too near by a cross-encoder's
//! scores. Of what is left the first are taken, or random ones. What each rule dropped is counted.
//!
//! With s⁺ the lowest score of the query's positives on its list, a passage of score s is kept by the absolute margin m when
//! `s ≤ s⁺ − m`, and by the relative margin r when `s ≤ s⁺ − r |s⁺|`. By a cross-encoder's scores it is kept when its own is at least the
//! margin below that of the lowest-scored positive.

use std::sync::Arc;

use ahash::{AHashMap, AHashSet, RandomState};
use rayon::prelude::*;
use serde::Serialize;

use crate::data::masking::LONGEST_TEXT;
use crate::data::pairs::ids::IdIndex;
use crate::data::pairs::runs::{Hit, Run};
use crate::data::pairs::teacher;
use crate::data::pairs::texts::{TextRules, Texts};
use crate::data::shard::ShardSet;
use crate::data::source::{self, Input};
use crate::error::{Error, Result};
use crate::eval::qrels::{Judged, Qrels};
use crate::rng::{Site, Stream};

/// Which of the passages left are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Pick {
    /// The best ranked.
    Top,
    /// Random ones, in the order of their ranks.
    Random,
}

/// What is taken.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    /// Ranks looked at, from 1, both included.
    pub ranks: [u32; 2],
    /// Negatives of a query.
    pub count: usize,
    /// Which of them.
    pub pick: Pick,
    /// Lowest grade of a positive.
    pub least_grade: i32,
    /// Highest score of a negative.
    pub max_score: Option<f32>,
    /// Least distance to the lowest positive's score.
    pub margin: Option<f32>,
    /// The same, as a share of that score.
    pub relative_margin: Option<f32>,
    /// Least distance of cross-encoder scores.
    pub ce_margin: f32,
    /// Seed of the random choice.
    pub seed: u64,
}

impl Default for Rules {
    fn default() -> Self {
        Rules {
            ranks: [1, 200],
            count: 15,
            pick: Pick::Random,
            least_grade: 1,
            max_score: None,
            margin: None,
            relative_margin: None,
            ce_margin: 3.0,
            seed: 42,
        }
    }
}

/// How many passages each rule dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// Not among the ranks.
    pub outside_ranks: u64,
    /// Positives.
    pub positives: u64,
    /// Equal in text to a positive.
    pub equal_to_positive: u64,
    /// Equal in text to a better ranked passage.
    pub equal_to_earlier: u64,
    /// Score too high.
    pub max_score: u64,
    /// Within a margin of the positives, or no positive on the list to compare with.
    pub margin: u64,
    /// Without a cross-encoder score, or no positive with one.
    pub unscored: u64,
    /// Within the margin by the cross-encoder.
    pub ce_margin: u64,
    /// Left by all rules and not taken: there were enough.
    pub not_needed: u64,
}

impl Dropped {
    fn add(&mut self, other: &Dropped) {
        self.outside_ranks += other.outside_ranks;
        self.positives += other.positives;
        self.equal_to_positive += other.equal_to_positive;
        self.equal_to_earlier += other.equal_to_earlier;
        self.max_score += other.max_score;
        self.margin += other.margin;
        self.unscored += other.unscored;
        self.ce_margin += other.ce_margin;
        self.not_needed += other.not_needed;
    }
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mined<'r> {
    /// Query and its negatives by rank, in the order of the run; those without any are left out.
    pub lists: Vec<(&'r str, Vec<&'r str>)>,
    /// What was dropped.
    pub dropped: Dropped,
    /// Queries with fewer negatives than asked for, and how many they have.
    pub short: Vec<(&'r str, usize)>,
    /// Queries of the run without a positive: passed over.
    pub without_positive: u64,
    /// Queries with positives that the run does not have.
    pub not_in_run: u64,
}

/// Tells which texts are equal.
pub enum Equality {
    /// Nobody knows.
    Unknown,
    /// By the tokens of shards.
    Tokens(Box<Texts>, IdIndex),
    /// By hashes of ids' texts.
    Hashes(AHashMap<String, u64>),
}

impl Equality {
    /// By the tokens of a set of shards.
    ///
    /// # Errors
    /// Shards without ids.
    pub fn of_shards(set: ShardSet) -> Result<Equality> {
        let set = Arc::new(set);
        let index = IdIndex::new(set.clone()).map_err(|e| e.path(set.dir()))?;
        Ok(Equality::Tokens(Box::new(Texts::new(set, TextRules::new(LONGEST_TEXT))?), index))
    }

    /// By the characters of raw documents, of those that the run or the judgements name.
    ///
    /// # Errors
    /// A file that cannot be read or is refused.
    pub fn of_documents(inputs: &[Input], run: &Run, qrels: &Qrels) -> Result<Equality> {
        let mut named: AHashSet<&str> = AHashSet::new();
        (0..run.queries().len()).for_each(|query| named.extend(run.hits(query).map(|hit| hit.id)));
        qrels.queries().for_each(|(_, judged)| named.extend(judged.keys().map(String::as_str)));
        let (hasher, mut hashes) = (hasher(), AHashMap::new());
        for input in inputs {
            let (_, documents) = source::open(input, None, false, Arc::default())?;
            for document in documents {
                let document = document?;
                let Some(id) = document.id.filter(|id| named.contains(id.as_str())) else { continue };
                // Case and spacing are nothing to most tokenizers.
                let words = |text: &str| text.split_whitespace().map(str::to_lowercase).collect::<Vec<_>>();
                let text = (document.title.as_deref().map(words), words(&document.text));
                hashes.entry(id).or_insert(hasher.hash_one(text));
            }
        }
        Ok(Equality::Hashes(hashes))
    }

    /// A name for the text of a passage; none where it is not known.
    fn hash(&self, id: &str) -> Result<Option<u64>> {
        match self {
            Equality::Unknown => Ok(None),
            Equality::Hashes(hashes) => Ok(hashes.get(id).copied()),
            Equality::Tokens(texts, index) => index.find(id)?.map(|number| texts.hash(number)).transpose(),
        }
    }
}

fn hasher() -> RandomState {
    RandomState::with_seeds(0x4528_21E6, 0x38D0_1377, 0xBE54_66CF, 0x34E9_0C6C)
}

/// Scores of a cross-encoder by query and passage.
pub type Scores = AHashMap<String, AHashMap<String, f32>>;

/// Reads scores: `qid pid score`, separated by tabs. Of a pair scored twice the last score counts.
///
/// # Errors
/// A file that cannot be read or is refused.
pub fn read_scores(inputs: &[Input]) -> Result<Scores> {
    let mut scores = Scores::new();
    for input in inputs {
        teacher::read(input, |s| {
            if !scores.contains_key(s.query) {
                scores.insert(s.query.to_owned(), AHashMap::new());
            }
            if let Some(of_query) = scores.get_mut(s.query) {
                of_query.insert(s.passage.to_owned(), s.score);
            }
            Ok(())
        })?;
    }
    Ok(scores)
}

/// Mines the lists of a run.
///
/// # Errors
/// No query of the run has a positive, or a text that cannot be read.
pub fn mine<'r>(
    run: &'r Run,
    qrels: &Qrels,
    equality: &Equality,
    scores: Option<&Scores>,
    rules: &Rules,
) -> Result<Mined<'r>> {
    let all: Vec<Option<(Vec<&str>, Dropped)>> = (0..run.queries().len())
        .into_par_iter()
        .map(|query| {
            let id = run.queries()[query].as_str();
            let positives = |judged: &&Judged| judged.values().any(|&grade| grade >= rules.least_grade);
            let Some(judged) = qrels.of(id).filter(positives) else { return Ok(None) };
            let hits: Vec<Hit<'_>> = run.hits(query).collect();
            let of_query = scores.map(|scores| scores.get(id));
            one(id, &hits, judged, equality, of_query, rules).map(Some)
        })
        .collect::<Result<_>>()?;
    let mut mined = Mined::default();
    for (id, found) in run.queries().iter().zip(all) {
        let Some((list, dropped)) = found else {
            mined.without_positive += 1;
            continue;
        };
        mined.dropped.add(&dropped);
        if list.len() < rules.count {
            mined.short.push((id, list.len()));
        }
        if !list.is_empty() {
            mined.lists.push((id, list));
        }
    }
    if mined.without_positive == run.queries().len() as u64 {
        let (ours, judged) = (run.queries().first(), qrels.queries().next());
        return Err(Error::refused(format!(
            "none of the {} queries of the run (as {}) has a positive among the judgements (as of {})",
            run.queries().len(),
            ours.map_or("none", String::as_str),
            judged.map_or("none", |(query, _)| query),
        ))
        .remedy("check that run and judgements belong together"));
    }
    let ours: AHashSet<&str> = run.queries().iter().map(String::as_str).collect();
    let positive = |judged: &Judged| judged.values().any(|&grade| grade >= rules.least_grade);
    let missing = qrels.queries().filter(|(query, judged)| positive(judged) && !ours.contains(query));
    mined.not_in_run = missing.count() as u64;
    Ok(mined)
}

/// The negatives of one query. `scores`: outer none: no cross-encoder; inner none: it scored nothing of this query.
fn one<'r>(
    query: &str,
    hits: &[Hit<'r>],
    judged: &Judged,
    equality: &Equality,
    scores: Option<Option<&AHashMap<String, f32>>>,
    rules: &Rules,
) -> Result<(Vec<&'r str>, Dropped)> {
    let is_positive = |id: &str| judged.get(id).is_some_and(|&grade| grade >= rules.least_grade);
    let mut texts: AHashSet<u64> = AHashSet::new();
    for id in judged.keys().filter(|id| is_positive(id)) {
        texts.extend(equality.hash(id)?);
    }
    let lowest = |scores: &mut dyn Iterator<Item = f32>| scores.reduce(f32::min);
    let bar = bar(rules, lowest(&mut hits.iter().filter(|hit| is_positive(hit.id)).map(|hit| hit.score)));
    let of_ce = |id: &str| scores.flatten().and_then(|scores| scores.get(id)).copied();
    let ce_positive = lowest(&mut judged.keys().filter(|id| is_positive(id)).filter_map(|id| of_ce(id)));
    let positives = texts.clone();
    let (mut left, mut dropped) = (Vec::new(), Dropped::default());
    for (place, hit) in (1u32..).zip(hits) {
        if !(rules.ranks[0]..=rules.ranks[1]).contains(&place) {
            dropped.outside_ranks += 1;
        } else if is_positive(hit.id) {
            dropped.positives += 1;
        } else if rules.max_score.is_some_and(|most| hit.score > most) {
            dropped.max_score += 1;
        } else if bar.is_some_and(|bar| hit.score > bar) {
            dropped.margin += 1;
        } else if let Some(hash) = equality.hash(hit.id)?.filter(|hash| texts.contains(hash)) {
            if positives.contains(&hash) {
                dropped.equal_to_positive += 1;
            } else {
                dropped.equal_to_earlier += 1;
            }
        } else if scores.is_some() && of_ce(hit.id).zip(ce_positive).is_none() {
            dropped.unscored += 1;
        } else if of_ce(hit.id).zip(ce_positive).is_some_and(|(own, positive)| own > positive - rules.ce_margin) {
            dropped.ce_margin += 1;
        } else {
            texts.extend(equality.hash(hit.id)?);
            left.push(hit.id);
        }
    }
    dropped.not_needed = left.len().saturating_sub(rules.count) as u64;
    if rules.pick == Pick::Random && left.len() > rules.count {
        left = random(query, &left, rules);
    }
    left.truncate(rules.count);
    Ok((left, dropped))
}

/// The highest score of a negative by the margins; none: there are no margins.
fn bar(rules: &Rules, positive: Option<f32>) -> Option<f32> {
    let margins = [
        rules.margin.map(|margin| positive.map(|positive| positive - margin)),
        rules.relative_margin.map(|share| positive.map(|positive| positive - share * positive.abs())),
    ];
    // Without a positive on the list nothing is known to be far enough from it.
    margins.into_iter().flatten().map(|bar| bar.unwrap_or(f32::NEG_INFINITY)).reduce(f32::min)
}

/// So many as asked for, by the first steps of a Fisher–Yates shuffle that depends on seed and query alone; in the order of ranks.
fn random<'r>(query: &str, left: &[&'r str], rules: &Rules) -> Vec<&'r str> {
    let mut stream = Stream::new(rules.seed, 0, Site::Mine, hasher().hash_one(query));
    let mut places: Vec<usize> = (0..left.len()).collect();
    for i in 0..rules.count {
        let other = i + stream.below((places.len() - i) as u32) as usize;
        places.swap(i, other);
    }
    places.truncate(rules.count);
    places.sort_unstable();
    places.into_iter().map(|place| left[place]).collect()
}
