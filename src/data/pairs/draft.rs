//! From single facts to [`Pairs`]: passages of queries in any order, then their scores, then what is left of them.

use super::findings::{Findings, Tally};
use super::lists::{Keyed, Lists, Ranked};
use super::{MissingScore, Pairs, PairsSettings, Side};
use crate::error::{Error, Result};

/// Pairs being collected, by text numbers.
pub struct Draft {
    positives: Ranked,
    negatives: Ranked,
    /// Scores that came together with their pairs.
    scores: Vec<(u32, u32, f32)>,
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
            scores: Vec::new(),
            depth,
            findings: Default::default(),
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

    /// The teacher's score of a pair; where there are very many, [`Sealed::score`] takes less memory.
    pub fn score(&mut self, query: u32, passage: u32, score: f32) {
        self.scores.push((query, passage, score));
    }

    /// [`Draft::seal`] and [`Sealed::finish`].
    pub fn finish(self, queries: Side, passages: Side, settings: PairsSettings) -> Result<Pairs> {
        self.seal(queries, passages, settings)?.finish()
    }

    /// Ends the lists; only scores may still come. `settings.depth` is that of [`Draft::new`] at most.
    pub fn seal(self, queries: Side, passages: Side, mut settings: PairsSettings) -> Result<Sealed> {
        settings.depth = settings.depth.min(self.depth);
        settings.check(passages.corpus.texts())?;
        let mut findings = self.findings;
        findings.queries = queries.corpus.texts();
        findings.passages = passages.corpus.texts();
        let Keyed { keys: query, lists: unsorted } = self.positives.finish();
        let mut positives = Lists::with_capacity(unsorted.items());
        for row in 0..query.len() {
            let mut list = unsorted.get(row).to_vec();
            list.sort_unstable();
            positives.push(list);
        }
        let candidates = self.negatives.finish();
        let mut negatives = Lists::with_capacity(candidates.lists.items());
        let mut at = 0;
        for (row, &query) in query.iter().enumerate() {
            at += candidates.keys[at..].partition_point(|&key| key < query);
            let list = if candidates.keys.get(at) == Some(&query) { candidates.lists.get(at) } else { &[] };
            let positives = positives.get(row);
            let is_negative = |passage: &&u32| {
                let positive = positives.binary_search(passage).is_ok();
                if positive {
                    let name = || format!("{} of query {}", passages.name(**passage), queries.name(query));
                    findings.positive_negatives.add(name);
                }
                !positive
            };
            let kept: Vec<u32> = list.iter().filter(is_negative).copied().collect();
            negatives.push(kept.into_iter().take(settings.depth));
        }
        let pairs = Pairs { queries, passages, settings, query, positives, negatives, scores: None, findings };
        let mut sealed = Sealed { pairs, last: None };
        for (query, passage, score) in self.scores {
            sealed.score(query, passage, score);
        }
        Ok(sealed)
    }
}

/// Pairs whose lists are final but for what has no score.
pub struct Sealed {
    pairs: Pairs,
    /// The query that was scored last, and its row.
    last: Option<(u32, usize)>,
}

impl Sealed {
    /// What was noticed so far.
    pub fn findings(&mut self) -> &mut Findings {
        &mut self.pairs.findings
    }

    /// The teacher's score of a pair, which must be finite; pairs on no list are passed over. Of several scores the last counts.
    pub fn score(&mut self, query: u32, passage: u32, score: f32) {
        let row = match self.last {
            Some((last, row)) if last == query => row,
            _ => match self.pairs.query.binary_search(&query) {
                Ok(row) => row,
                // Scores of a query that is not trained on say nothing, but there is a teacher.
                Err(_) => usize::MAX,
            },
        };
        self.last = Some((query, row));
        let pairs = &mut self.pairs;
        let unknown = |lists: &Lists| vec![f32::NAN; lists.items()];
        let [positive, negative] =
            pairs.scores.get_or_insert_with(|| [unknown(&pairs.positives), unknown(&pairs.negatives)]);
        if row == usize::MAX {
            return;
        }
        let known = if let Ok(at) = pairs.positives.get(row).binary_search(&passage) {
            &mut positive[pairs.positives.range(row).start + at]
        } else if let Some(at) = pairs.negatives.get(row).iter().position(|&n| n == passage) {
            &mut negative[pairs.negatives.range(row).start + at]
        } else {
            return;
        };
        if !known.is_nan() && *known != score {
            let name = || format!("query {} and passage {}", pairs.queries.name(query), pairs.passages.name(passage));
            pairs.findings.conflicting_scores.add(name);
        }
        *known = score;
    }

    /// The last checks: what has no score, and whether enough is left.
    pub fn finish(self) -> Result<Pairs> {
        let mut pairs = self.pairs;
        without_positive(&mut pairs);
        let unknown = &pairs.findings.unknown_negatives;
        if let (Some(first), 0) =
            (&unknown.first, pairs.negatives.items() as u64 + pairs.findings.positive_negatives.count)
        {
            let cause = format!("none of the {} negatives is in the corpus (first: {first})", unknown.count);
            return Err(Error::refused(cause)
                .remedy("give those of this corpus, by its ids: qid<TAB>pid,pid, or leave --negatives out"));
        }
        let needed = pairs.settings.group - 1;
        if let Some(scores) = pairs.scores.take() {
            complete(&mut pairs, &scores)?;
        } else {
            for row in (0..pairs.rows()).filter(|&row| pairs.negatives.get(row).len() < needed) {
                pairs.findings.short_lists.add(|| pairs.queries.name(pairs.query[row]));
            }
        }
        let findings = &mut pairs.findings;
        findings.trained = pairs.query.len() as u64;
        if pairs.query.is_empty() {
            let why = findings.lines().join("; ");
            let why = if why.is_empty() { "no positives are given".into() } else { why };
            return Err(Error::refused(format!("there is no query to train on: {why}"))
                .remedy("check that judgements, queries and corpus belong together"));
        }
        Ok(pairs)
    }
}

/// Counts the queries that are on no list of positives.
fn without_positive(pairs: &mut Pairs) {
    let (texts, rows) = (pairs.queries.corpus.texts(), pairs.query.len() as u64);
    let first =
        pairs.query.iter().zip(0u32..).find(|(query, expected)| *query != expected).map_or(rows as u32, |x| x.1);
    if texts > rows {
        pairs.findings.without_positive = Tally { count: texts - rows, first: Some(pairs.queries.name(first)) };
    }
}

/// Drops passages without a score and queries that keep too few of them, or refuses them.
fn complete(pairs: &mut Pairs, scores: &[Vec<f32>; 2]) -> Result<()> {
    let needed = pairs.settings.group - 1;
    let mut missing = Tally::default();
    let lists = [&pairs.positives, &pairs.negatives];
    let room = |lists: &Lists| (Lists::with_capacity(lists.items()), Vec::with_capacity(lists.items()));
    let (mut queries, mut kept) = (Vec::with_capacity(pairs.query.len()), lists.map(room));
    for (row, &query) in pairs.query.iter().enumerate() {
        let [positive, negative] =
            [(&pairs.positives, &scores[0]), (&pairs.negatives, &scores[1])].map(|(all, scores)| {
                let mut list = Vec::with_capacity(all.get(row).len());
                for (&passage, &score) in all.get(row).iter().zip(&scores[all.range(row)]) {
                    if score.is_nan() {
                        let (queries, passages) = (&pairs.queries, &pairs.passages);
                        missing.add(|| format!("query {} and passage {}", queries.name(query), passages.name(passage)));
                    } else {
                        list.push((passage, score));
                    }
                }
                list
            });
        if positive.is_empty() || negative.len() < needed {
            pairs.findings.too_few_scored.add(|| pairs.queries.name(query));
            continue;
        }
        queries.push(query);
        for ((lists, scores), list) in kept.iter_mut().zip([positive, negative]) {
            lists.push(list.iter().map(|x| x.0));
            scores.extend(list.iter().map(|x| x.1));
        }
    }
    let few = &pairs.findings.too_few_scored;
    if pairs.settings.missing_score == MissingScore::Error {
        if let Some(first) = &missing.first {
            let cause = format!("{} pairs have no score of the teacher (first: {first})", missing.count);
            return Err(
                Error::refused(cause).remedy("score them too, as rerank --scores does, or give --missing-teacher drop")
            );
        }
        if let Some(first) = &few.first {
            let cause = format!("{} queries have fewer than {needed} scored negatives (first: {first})", few.count);
            return Err(Error::refused(cause)
                .remedy("score more negatives, choose smaller groups, or give --missing-teacher drop"));
        }
    }
    pairs.findings.unscored = missing;
    let [(positives, positive_scores), (negatives, negative_scores)] = kept;
    (pairs.query, pairs.positives, pairs.negatives) = (queries, positives, negatives);
    pairs.scores = Some([positive_scores, negative_scores]);
    Ok(())
}
