//! Scores that a teacher, usually a cross-encoder, gave to pairs of query and passage.

use crate::data::source::Input;
use crate::error::Result;

use super::table::{self, Wrong};

/// A scored pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored<'a> {
    /// The query's id.
    pub query: &'a str,
    /// The passage's id.
    pub passage: &'a str,
    /// The score, finite.
    pub score: f32,
    /// Line of the file, from 1.
    pub line: u64,
}

/// Reads `qid pid score`, separated by tabs, in the order of the file.
pub fn read(input: &Input, mut each: impl FnMut(Scored<'_>) -> Result<()>) -> Result<()> {
    let mut failed = Ok(());
    table::each_line(input, |line, text| {
        let mut columns = text.split('\t');
        let (Some(query), Some(passage), Some(score), None) =
            (columns.next(), columns.next(), columns.next(), columns.next())
        else {
            let count = text.split('\t').count();
            let cause = format!("{count} tab-separated columns where a score has 3: qid pid score");
            return Err(Wrong::new(cause).separated(text, false));
        };
        let (query, passage, score) = (table::id(query)?, table::id(passage)?, table::score(score)?);
        if failed.is_ok() {
            failed = each(Scored { query, passage, score, line });
        }
        Ok(())
    })?;
    failed
}
