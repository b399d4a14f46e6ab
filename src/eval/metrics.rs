//! MRR, recall, NDCG, MAP and precision under two sets of rules, which give different figures for the same run.
//!
//! | | [`Rules::Msmarco`] | [`Rules::Trec`] |
//! | --- | --- | --- |
//! | program | MS MARCO's `ms_marco_eval.py` | trec_eval 9, and through pytrec_eval BEIR and MTEB |
//! | order of a list | its ranks | score as f32, descending; of equal scores the greater id (bytes) first |
//! | mean over | all judged queries | queries both judged and in the run; all judged ones if so asked (trec_eval `-c`) |
//!
//! With R the relevant passages of a query (grade ≥ 1) and g their grades, at cut k:
//!
//! - MRR: 1 / rank of the first relevant passage, if that is ≤ k
//! - recall: relevant ones among the first k / |R|
//! - precision: relevant ones among the first k / k
//! - MAP: mean over R of the precision at their ranks, 0 for those not found; no cut
//! - NDCG: Σ g / log2(rank + 1) over the first k, by the same sum over the best possible list; gains are linear, grades below 0 are 0

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use rayon::prelude::*;

use crate::data::pairs::runs::{Hit, Run};
use crate::error::{Error, Result};

use super::qrels::{Judged, Qrels};

/// Whose rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// MS MARCO's own script.
    Msmarco,
    /// trec_eval.
    Trec,
}

impl Rules {
    /// The name in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Rules::Msmarco => "msmarco",
            Rules::Trec => "trec",
        }
    }
}

/// A figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Metric {
    /// Mean reciprocal rank within the first k.
    Mrr(u32),
    /// Share of the relevant passages within the first k.
    Recall(u32),
    /// Normalised discounted cumulative gain of the first k.
    Ndcg(u32),
    /// Mean average precision.
    Map,
    /// Share of relevant passages among the first k.
    Precision(u32),
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Metric::Mrr(k) => write!(f, "mrr@{k}"),
            Metric::Recall(k) => write!(f, "recall@{k}"),
            Metric::Ndcg(k) => write!(f, "ndcg@{k}"),
            Metric::Map => f.write_str("map"),
            Metric::Precision(k) => write!(f, "p@{k}"),
        }
    }
}

impl FromStr for Metric {
    type Err = Error;

    fn from_str(name: &str) -> Result<Metric> {
        let (what, k) = name.split_once('@').unwrap_or((name, ""));
        let cut = k.parse::<u32>().ok().filter(|&k| k > 0);
        match (what.to_ascii_lowercase().as_str(), cut) {
            ("mrr", Some(k)) => Ok(Metric::Mrr(k)),
            ("recall", Some(k)) => Ok(Metric::Recall(k)),
            ("ndcg", Some(k)) => Ok(Metric::Ndcg(k)),
            ("p" | "precision", Some(k)) => Ok(Metric::Precision(k)),
            ("map", None) if k.is_empty() => Ok(Metric::Map),
            _ => Err(Error::usage(format!("there is no metric {name:?}"))
                .remedy("choose of mrr@k, recall@k, ndcg@k, p@k and map, as in ndcg@10")),
        }
    }
}

/// What happens to passages with the id of their query.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IdenticalIds {
    /// They are taken off the list, as BEIR does, unless a query is judged to be answered by its own id.
    #[default]
    Auto,
    /// They are taken off the list.
    Ignore,
    /// They stay.
    Keep,
}

/// How to evaluate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvalRules {
    /// Whose rules.
    pub rules: Rules,
    /// Under [`Rules::Trec`]: the mean is over all judged queries, of which those not in the run count 0.
    pub complete: bool,
    /// Passages with the id of their query.
    pub identical: IdenticalIds,
}

impl EvalRules {
    /// The rules as their program has them.
    pub fn new(rules: Rules) -> Self {
        EvalRules { rules, complete: false, identical: IdenticalIds::Auto }
    }
}

/// The figures of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// Under which rules.
    pub rules: EvalRules,
    /// Whether passages with the id of their query were taken off.
    pub ignored_identical: bool,
    /// The metrics, as asked.
    pub metrics: Vec<Metric>,
    /// The mean of each.
    pub means: Vec<f64>,
    /// Each query of the mean, sorted by id, and its figures.
    pub per_query: Vec<(String, Vec<f64>)>,
    /// Judged queries.
    pub judged: usize,
    /// Judged queries that the run has.
    pub found: usize,
    /// Queries of the run that nobody judged; they do not count.
    pub unjudged: usize,
}

impl Evaluation {
    /// The mean of a metric that was asked for.
    pub fn mean(&self, metric: Metric) -> Option<f64> {
        self.metrics.iter().position(|m| *m == metric).map(|i| self.means[i])
    }
}

/// Computes the metrics of a run. A run without any judged query is refused.
pub fn evaluate(run: &Run, qrels: &Qrels, metrics: &[Metric], rules: &EvalRules) -> Result<Evaluation> {
    let ignore = match rules.identical {
        IdenticalIds::Auto => !qrels.judges_own_ids(),
        IdenticalIds::Ignore => true,
        IdenticalIds::Keep => false,
    };
    let all_judged = rules.complete || rules.rules == Rules::Msmarco;
    let mut lists: Vec<(&str, &Judged, Option<usize>)> = Vec::with_capacity(qrels.len());
    let places: ahash::AHashMap<&str, usize> = run.queries().iter().map(String::as_str).zip(0..).collect();
    for (query, judged) in qrels.queries() {
        let place = places.get(query).copied();
        if place.is_some() || all_judged {
            lists.push((query, judged, place));
        }
    }
    let found = lists.iter().filter(|(_, _, place)| place.is_some()).count();
    if found == 0 {
        let (ours, judged) = (run.queries().first(), qrels.queries().next());
        return Err(Error::refused(format!(
            "none of the {} queries of the run (as {}) is among the {} judged ones (as {})",
            run.queries().len(),
            ours.map_or("none", String::as_str),
            qrels.len(),
            judged.map_or("none", |(query, _)| query),
        ))
        .remedy("check that run and judgements belong together"));
    }
    let per_query: Vec<(String, Vec<f64>)> = lists
        .par_iter()
        .map(|&(query, judged, place)| {
            let grades = place.map(|place| grades(run, place, judged, rules.rules, ignore)).unwrap_or_default();
            let ideal = Ideal::of(judged.values().copied());
            (query.to_owned(), metrics.iter().map(|m| m.of(&grades, &ideal)).collect())
        })
        .collect();
    let mean = |i: usize| per_query.iter().map(|(_, values)| values[i]).sum::<f64>() / per_query.len() as f64;
    Ok(Evaluation {
        rules: rules.clone(),
        ignored_identical: ignore,
        metrics: metrics.to_vec(),
        means: (0..metrics.len()).map(mean).collect(),
        judged: qrels.len(),
        found,
        unjudged: run.queries().len() - found,
        per_query,
    })
}

/// Ids of passages in the run and in the judgements, where no passage on any list is judged: the two are probably of different
/// collections, though their queries are the same.
pub fn strangers<'a>(run: &'a Run, qrels: &'a Qrels) -> Option<(&'a str, &'a str)> {
    for (query, id) in run.queries().iter().enumerate() {
        let judged = qrels.of(id);
        if judged.is_some_and(|judged| run.hits(query).any(|hit| judged.contains_key(hit.id))) {
            return None;
        }
    }
    let ours = (0..run.queries().len()).find_map(|query| run.hits(query).next());
    let judged = qrels.queries().find_map(|(_, judged)| judged.keys().min());
    Some((ours?.id, judged?))
}

/// The grades of a query's list in its order; 0 where nobody judged.
fn grades(run: &Run, query: usize, judged: &Judged, rules: Rules, ignore_identical: bool) -> Vec<i32> {
    let own = run.queries()[query].as_str();
    let mut hits: Vec<Hit<'_>> = run.hits(query).filter(|hit| !ignore_identical || hit.id != own).collect();
    if rules == Rules::Trec {
        hits.sort_by(|a, b| match b.score.partial_cmp(&a.score) {
            Some(Ordering::Equal) | None => b.id.as_bytes().cmp(a.id.as_bytes()),
            Some(order) => order,
        });
    }
    hits.iter().map(|hit| judged.get(hit.id).copied().unwrap_or(0)).collect()
}

/// What the best possible list of a query is like.
struct Ideal {
    /// Positive grades, descending.
    grades: Vec<i32>,
}

impl Ideal {
    fn of(judged: impl IntoIterator<Item = i32>) -> Ideal {
        let mut grades: Vec<i32> = judged.into_iter().filter(|&grade| grade > 0).collect();
        grades.sort_unstable_by(|a, b| b.cmp(a));
        Ideal { grades }
    }
}

impl Metric {
    /// The figure of one query: `grades` of its list in order (0: not relevant, or not judged), `judged` all grades that the query's
    /// judgements give.
    pub fn figure(self, grades: &[i32], judged: impl IntoIterator<Item = i32>) -> f64 {
        self.of(grades, &Ideal::of(judged))
    }

    /// The figure of a list with these grades.
    fn of(self, grades: &[i32], ideal: &Ideal) -> f64 {
        let relevant = ideal.grades.len() as f64;
        if relevant == 0.0 {
            return 0.0;
        }
        let top = |k: u32| &grades[..grades.len().min(k as usize)];
        let hits = |k: u32| top(k).iter().filter(|&&grade| grade > 0).count() as f64;
        match self {
            Metric::Mrr(k) => top(k).iter().position(|&g| g > 0).map_or(0.0, |place| 1.0 / (place as f64 + 1.0)),
            Metric::Recall(k) => hits(k) / relevant,
            Metric::Precision(k) => hits(k) / f64::from(k),
            Metric::Ndcg(k) => {
                let best = &ideal.grades[..ideal.grades.len().min(k as usize)];
                gain(top(k)) / gain(best)
            }
            Metric::Map => {
                let (mut found, mut sum) = (0.0, 0.0);
                for (place, _) in grades.iter().enumerate().filter(|&(_, &grade)| grade > 0) {
                    found += 1.0;
                    sum += found / (place as f64 + 1.0);
                }
                sum / relevant
            }
        }
    }
}

/// Discounted cumulative gain.
fn gain(grades: &[i32]) -> f64 {
    let gains = grades.iter().enumerate().filter(|&(_, &grade)| grade > 0);
    // A sum of nothing is -0.
    gains.map(|(place, &grade)| f64::from(grade) / (place as f64 + 2.0).log2()).sum::<f64>() + 0.0
}
