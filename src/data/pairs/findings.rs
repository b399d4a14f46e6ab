//! What was noticed while queries, judgements, negatives and scores were put together: one clear line each, with a count.

use std::path::PathBuf;

/// A number of things of one kind, and the first of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// How many.
    pub count: u64,
    /// The first, as a message names it.
    pub first: Option<String>,
}

impl Tally {
    /// Counts one more, named by `name` if it is the first.
    pub fn add(&mut self, name: impl FnOnce() -> String) {
        if self.count == 0 {
            self.first = Some(name());
        }
        self.count += 1;
    }

    fn line(&self, one: &str, many: &str) -> Option<String> {
        let what = if self.count == 1 { one } else { many };
        let first = self.first.as_ref().map(|f| format!(" (first: {f})")).unwrap_or_default();
        (self.count > 0).then(|| format!("{} {what}{first}", self.count))
    }
}

/// The findings of one [`Pairs`](super::Pairs).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// The files read, and as what.
    pub files: Vec<(PathBuf, &'static str)>,
    /// Queries in all.
    pub queries: u64,
    /// Queries that are trained on.
    pub trained: u64,
    /// Passages in all.
    pub passages: u64,
    /// Rows that brought their own texts.
    pub rows: u64,
    /// Queries without a positive: not trained on.
    pub without_positive: Tally,
    /// Ids in the files that no query has.
    pub unknown_queries: Tally,
    /// Positives that are not in the corpus.
    pub unknown_positives: Tally,
    /// Negatives that are not in the corpus.
    pub unknown_negatives: Tally,
    /// Scored passages that are not in the corpus.
    pub unknown_scored: Tally,
    /// Positives that a file names as negatives, too; dropped.
    pub positive_negatives: Tally,
    /// Candidates without a teacher's score; dropped.
    pub unscored: Tally,
    /// Queries with too few scored negatives for a group; not trained on.
    pub too_few_scored: Tally,
    /// Pairs with several scores that differ; the last one counts.
    pub conflicting_scores: Tally,
    /// Queries with fewer negatives than a group takes; filled with random passages.
    pub short_lists: Tally,
    /// Texts whose id an earlier text has, of queries and passages.
    pub duplicate_ids: Tally,
    /// Texts of rows that hold no token; left out.
    pub empty_texts: Tally,
    /// Rows that bring an instruction of their own, which is not used.
    pub prompts: Tally,
}

impl Findings {
    /// One line for each finding; those of what was left out or replaced.
    pub fn lines(&self) -> Vec<String> {
        let all = [
            self.duplicate_ids.line(
                "text has the id of an earlier one; the first is used",
                "texts have the id of an earlier one; the first is used",
            ),
            self.unknown_queries.line(
                "line names a query that is not among the queries; left out",
                "lines name a query that is not among the queries; left out",
            ),
            self.unknown_positives
                .line("positive is not in the corpus; left out", "positives are not in the corpus; left out"),
            self.unknown_negatives
                .line("negative is not in the corpus; left out", "negatives are not in the corpus; left out"),
            self.unknown_scored.line(
                "scored passage is not in the corpus; left out",
                "scored passages are not in the corpus; left out",
            ),
            self.without_positive
                .line("query has no positive and is not trained on", "queries have no positive and are not trained on"),
            self.positive_negatives.line(
                "negative is a positive of its query; dropped",
                "negatives are positives of their query; dropped",
            ),
            self.conflicting_scores.line(
                "pair is scored twice and differently; the last score counts",
                "pairs are scored twice and differently; the last score counts",
            ),
            self.unscored
                .line("passage has no score of the teacher; dropped", "passages have no score of the teacher; dropped"),
            self.too_few_scored.line(
                "query has too few scored passages for a group and is not trained on",
                "queries have too few scored passages for a group and are not trained on",
            ),
            self.short_lists.line(
                "query has fewer negatives than a group takes; random passages fill it",
                "queries have fewer negatives than a group takes; random passages fill it",
            ),
            self.empty_texts.line("text of a row is empty; left out", "texts of rows are empty; left out"),
            self.prompts.line(
                "row brings its own instruction, which is not used; give one with the query prefix",
                "rows bring their own instruction, which is not used; give one with the query prefix",
            ),
        ];
        all.into_iter().flatten().collect()
    }
}
