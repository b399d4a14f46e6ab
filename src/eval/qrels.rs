//! Judgements with grades, by ids.

use std::collections::BTreeMap;

use ahash::AHashMap;

use crate::data::pairs::qrels::{self, QrelsFormat};
use crate::data::source::Input;
use crate::error::{Error, Result};

/// The judged passages of one query, by id.
pub type Judged = AHashMap<String, i32>;

/// Judgements of many queries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Qrels {
    queries: BTreeMap<String, Judged>,
}

impl Qrels {
    /// Reads judgements; the format is found by the first line unless it is given. A pair judged twice and differently is refused.
    pub fn read(input: &Input, format: Option<QrelsFormat>) -> Result<(Qrels, QrelsFormat)> {
        let (mut found, mut errors) = (Qrels::default(), Vec::new());
        let format = qrels::read(input, format, |j| {
            if let Some(before) = found.insert(j.query, j.passage, j.grade) {
                let cause = format!("passage {} of query {} is judged {before} and {}", j.passage, j.query, j.grade);
                errors.push(Error::refused(cause).path(&input.path).line(j.line).remedy("keep one of the judgements"));
            }
            Ok(())
        })?;
        if errors.is_empty() { Ok((found, format)) } else { Err(Error::several(errors)) }
    }

    /// Adds a judgement; gives the grade of an earlier one that says something else, which stays.
    pub fn insert(&mut self, query: &str, passage: &str, grade: i32) -> Option<i32> {
        if !self.queries.contains_key(query) {
            self.queries.insert(query.to_owned(), Judged::new());
        }
        let judged = self.queries.get_mut(query)?;
        let kept = *judged.entry(passage.to_owned()).or_insert(grade);
        (kept != grade).then_some(kept)
    }

    /// Number of judged queries.
    pub fn len(&self) -> usize {
        self.queries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.queries.is_empty()
    }

    /// The judged passages of a query.
    pub fn of(&self, query: &str) -> Option<&Judged> {
        self.queries.get(query)
    }

    /// The queries, sorted by id.
    pub fn queries(&self) -> impl Iterator<Item = (&str, &Judged)> {
        self.queries.iter().map(|(query, judged)| (query.as_str(), judged))
    }

    /// Whether a query's own id is judged relevant to it: then ids of queries and passages are names of one thing, and passages
    /// that bear their query's id must not be ignored.
    pub fn judges_own_ids(&self) -> bool {
        self.queries().any(|(query, judged)| judged.get(query).is_some_and(|&grade| grade > 0))
    }
}
