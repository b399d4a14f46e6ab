//! Queries and passages of two sets of shards, brought together by the files that name them by id.

use std::sync::Arc;

use crate::data::shard::{Packing, ShardSet};
use crate::data::source::Input;
use crate::error::{Error, Result};

use super::findings::Findings;
use super::ids::{Finder, IdIndex};
use super::negatives::{self, SystemRules};
use super::qrels::{self, QrelsFormat};
use super::{Draft, Pairs, PairsSettings, Side, teacher};

/// The files that say what belongs to what.
#[derive(Clone, Debug)]
pub struct PairFiles {
    /// Judgements. Without any, the positives are those that `negatives` name.
    pub qrels: Vec<Input>,
    /// Overrules the detection of the judgements' format.
    pub qrels_format: Option<QrelsFormat>,
    /// The lowest grade of a positive.
    pub least_grade: i32,
    /// Hard negatives.
    pub negatives: Vec<Input>,
    /// What is taken of negatives by system.
    pub systems: SystemRules,
    /// A teacher's scores.
    pub teacher: Vec<Input>,
}

impl Default for PairFiles {
    fn default() -> Self {
        PairFiles {
            qrels: Vec::new(),
            qrels_format: None,
            least_grade: 1,
            negatives: Vec::new(),
            systems: SystemRules::default(),
            teacher: Vec::new(),
        }
    }
}

/// Refuses sets that cannot be trained on together: of another tokenizer than `fingerprint` (in hex, where there is a model), or with
/// texts cut into several sequences.
pub fn check_sets(sets: &[&ShardSet], fingerprint: Option<&str>) -> Result<()> {
    let first = sets.first().map(|set| (set.dir().display().to_string(), set.facts().fingerprint.as_str()));
    let of_model = fingerprint.map(|f| ("the model".to_string(), f));
    let Some((whose, expected)) = of_model.or(first) else { return Ok(()) };
    for set in sets {
        if set.facts().fingerprint != expected {
            return Err(Error::refused(format!("was tokenized with another tokenizer than {whose}"))
                .path(set.dir())
                .remedy("tokenize queries and passages with the model's own tokenizer"));
        }
        if set.facts().packing == Packing::Blocks {
            return Err(Error::refused("holds blocks: a text may be several sequences there")
                .path(set.dir())
                .remedy("tokenize with --packing docs"));
        }
    }
    Ok(())
}

/// Reads the files and brings queries and passages together. `fingerprint` is that of the model's tokenizer, in hex.
pub fn from_files(
    queries: Arc<ShardSet>,
    passages: Arc<ShardSet>,
    files: &PairFiles,
    settings: PairsSettings,
    fingerprint: Option<&str>,
) -> Result<Pairs> {
    check_sets(&[&queries, &passages], fingerprint)?;
    settings.check(passages.len())?;
    let index = |set: &Arc<ShardSet>| IdIndex::new(set.clone()).map_err(|e| e.path(set.dir()));
    let (query_ids, passage_ids) = (index(&queries)?, index(&passages)?);
    let mut reading = Reading::new(&query_ids, &passage_ids, settings.depth);
    reading.draft.findings.duplicate_ids.count = query_ids.duplicates() + passage_ids.duplicates();
    for input in &files.qrels {
        reading.qrels(input, files)?;
    }
    for input in &files.negatives {
        reading.negatives(input, &files.systems, files.qrels.is_empty())?;
    }
    for input in &files.teacher {
        reading.teacher(input)?;
    }
    let draft = reading.draft;
    let side = |set: Arc<ShardSet>| Side { corpus: set.clone(), ids: Some(set) };
    draft.finish(side(queries), side(passages), settings)
}

/// Turns the files' ids into numbers.
struct Reading<'a> {
    draft: Draft,
    queries: Finder<'a>,
    passages: &'a IdIndex,
    positive: Finder<'a>,
}

/// Which of the findings counts a passage that is not there.
type Unknown = fn(&mut Findings) -> &mut super::findings::Tally;

impl<'a> Reading<'a> {
    fn new(queries: &'a IdIndex, passages: &'a IdIndex, depth: usize) -> Self {
        Reading { draft: Draft::new(depth), queries: Finder::new(queries), passages, positive: Finder::new(passages) }
    }

    fn opened(&mut self, input: &Input, what: &'static str) {
        self.draft.findings.files.push((input.path.clone(), what));
    }

    fn query(&mut self, input: &Input, line: u64, id: &str) -> Result<Option<u32>> {
        let found = self.queries.find(id)?;
        if found.is_none() {
            self.draft.findings.unknown_queries.add(|| place(&input.path, line, id));
        }
        Ok(found)
    }

    fn unknown(&mut self, input: &Input, line: u64, id: &str, tally: Unknown) {
        tally(&mut self.draft.findings).add(|| place(&input.path, line, id));
    }

    fn qrels(&mut self, input: &Input, files: &PairFiles) -> Result<()> {
        let format = qrels::read(input, files.qrels_format, |j| {
            if j.grade < files.least_grade {
                return Ok(());
            }
            let Some(query) = self.query(input, j.line, j.query)? else { return Ok(()) };
            match self.passages.find(j.passage)? {
                Some(passage) => self.draft.positive(query, passage),
                None => self.unknown(input, j.line, j.passage, |f| &mut f.unknown_positives),
            }
            Ok(())
        })?;
        self.opened(input, format.describe());
        Ok(())
    }

    fn negatives(&mut self, input: &Input, rules: &SystemRules, positives_too: bool) -> Result<()> {
        let format = negatives::read(input, rules, |c| {
            if c.positive && !positives_too {
                return Ok(());
            }
            let Some(query) = self.query(input, c.line, c.query)? else { return Ok(()) };
            // Triples name a positive again and again.
            let found = if c.positive { self.positive.find(c.passage)? } else { self.passages.find(c.passage)? };
            match (found, c.positive) {
                (Some(passage), true) => self.draft.positive(query, passage),
                (Some(passage), false) => self.draft.negative(query, passage),
                (None, true) => self.unknown(input, c.line, c.passage, |f| &mut f.unknown_positives),
                (None, false) => self.unknown(input, c.line, c.passage, |f| &mut f.unknown_negatives),
            }
            Ok(())
        })?;
        self.opened(input, format.describe());
        Ok(())
    }

    fn teacher(&mut self, input: &Input) -> Result<()> {
        teacher::read(input, |s| {
            let Some(query) = self.query(input, s.line, s.query)? else { return Ok(()) };
            match self.passages.find(s.passage)? {
                Some(passage) => self.draft.score(query, passage, s.score),
                None => self.unknown(input, s.line, s.passage, |f| &mut f.unknown_scored),
            }
            Ok(())
        })?;
        self.opened(input, "the teacher's scores");
        Ok(())
    }
}

/// `path:line: id`.
pub(super) fn place(path: &std::path::Path, line: u64, id: &str) -> String {
    format!("{}:{line}: {id}", path.display())
}
