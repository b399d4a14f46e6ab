//! Queries and passages of two sets of shards, brought together by the files that name them by id.

use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;

use crate::data::shard::{Packing, ShardSet};
use crate::data::source::Input;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};

use super::findings::Findings;
use super::ids::{Finder, IdIndex};
use super::negatives::{self, SystemRules};
use super::qrels::{self, QrelsFormat};
use super::{Draft, Pairs, PairsSettings, Sealed, Side, teacher};

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
                .remedy("tokenize queries and passages with the model's own tokenizer: tokenize --tokenizer MODEL"));
        }
        if set.facts().packing == Packing::Blocks {
            return Err(Error::refused("holds blocks: a text may be several sequences there")
                .path(set.dir())
                .remedy("tokenize with --packing docs"));
        }
    }
    Ok(())
}

/// Refuses data whose token ids mean other tokens to the model than to the tokenizer that made them. Tokenizers that only
/// treat text differently are noted. `model`: its tokenizer, and where that is from.
pub fn same_tokenizer(model: (&Tokenizer, &Path), set: &ShardSet, notes: &mut Vec<String>) -> Result<()> {
    let (of_model, folder) = model;
    let of_data = Tokenizer::load(set.dir())?;
    if of_model.fingerprint() == of_data.fingerprint() {
        return Ok(());
    }
    let folder = folder.display();
    if let Some((id, data, model)) = of_data.first_difference(of_model, of_data.vocab_size()) {
        let cause = format!(
            "made with another tokenizer than that of {folder}: token {id} is {data:?} in the data and {model:?} in the model"
        );
        return Err(Error::refused(cause).path(set.dir()).remedy(format!("tokenize with --tokenizer {folder}")));
    }
    let set = set.dir().display();
    notes.push(format!(
        "{set} and {folder}: the tokenizers have the same tokens but treat text differently, as in lower-casing"
    ));
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
    reading.pairs.findings.duplicate_ids.count = query_ids.duplicates() + passage_ids.duplicates();
    for input in &files.qrels {
        reading.qrels(input, files)?;
    }
    for input in &files.negatives {
        reading.negatives(input, &files.systems, files.qrels.is_empty())?;
    }
    let side = |set: &Arc<ShardSet>| Side { corpus: set.clone(), ids: Some(set.clone()) };
    let mut reading = reading.seal(side(&queries), side(&passages), settings)?;
    for input in &files.teacher {
        reading.teacher(input)?;
    }
    reading.pairs.finish()
}

/// Passages looked up at once, in parallel: a look-up is a few misses of the cache, and files have a hundred million of them.
const BLOCK: usize = 1 << 16;

/// Turns the files' ids into numbers.
struct Reading<'a, P> {
    pairs: P,
    queries: Finder<'a>,
    passages: &'a IdIndex,
    waiting: Waiting,
}

/// What a passage is to a query.
#[derive(Clone, Copy)]
enum Role {
    Positive,
    Negative,
    Scored(f32),
}

/// Passages to be looked up, in the order of the file.
#[derive(Default)]
struct Waiting {
    ids: String,
    passages: Vec<Passage>,
}

struct Passage {
    /// Where the id ends in `ids`; it begins where the one before ends.
    end: usize,
    query: u32,
    role: Role,
    line: u64,
}

/// Where the facts go: lists first, then, when these are final, scores.
trait Facts {
    fn findings(&mut self) -> &mut Findings;
    fn add(&mut self, query: u32, passage: u32, role: Role);
}

impl Facts for Draft {
    fn findings(&mut self) -> &mut Findings {
        &mut self.findings
    }

    fn add(&mut self, query: u32, passage: u32, role: Role) {
        match role {
            Role::Positive => self.positive(query, passage),
            Role::Negative => self.negative(query, passage),
            Role::Scored(score) => self.score(query, passage, score),
        }
    }
}

impl Facts for Sealed {
    fn findings(&mut self) -> &mut Findings {
        Sealed::findings(self)
    }

    fn add(&mut self, query: u32, passage: u32, role: Role) {
        if let Role::Scored(score) = role {
            self.score(query, passage, score);
        }
    }
}

impl<P: Facts> Reading<'_, P> {
    /// One line's passage of a query.
    fn add(&mut self, input: &Input, line: u64, query: &str, passage: &str, role: Role) -> Result<()> {
        let Some(query) = self.queries.find(query)? else {
            self.pairs.findings().unknown_queries.add(|| place(&input.path, line, query));
            return Ok(());
        };
        self.waiting.ids.push_str(passage);
        self.waiting.passages.push(Passage { end: self.waiting.ids.len(), query, role, line });
        if self.waiting.passages.len() == BLOCK { self.look_up(input) } else { Ok(()) }
    }

    /// Looks up what is waiting and puts it on its list.
    fn look_up(&mut self, input: &Input) -> Result<()> {
        let Waiting { ids, passages } = &mut self.waiting;
        let start = |k: usize| if k == 0 { 0 } else { passages[k - 1].end };
        let find = |k: usize| self.passages.find(&ids[start(k)..passages[k].end]);
        let found: Vec<Result<Option<u32>>> = (0..passages.len()).into_par_iter().map(find).collect();
        for (k, found) in found.into_iter().enumerate() {
            let Passage { end, query, role, line } = passages[k];
            if let Some(passage) = found? {
                self.pairs.add(query, passage, role);
                continue;
            }
            let findings = self.pairs.findings();
            let tally = match role {
                Role::Positive => &mut findings.unknown_positives,
                Role::Negative => &mut findings.unknown_negatives,
                Role::Scored(_) => &mut findings.unknown_scored,
            };
            tally.add(|| place(&input.path, line, &ids[start(k)..end]));
        }
        ids.clear();
        passages.clear();
        Ok(())
    }

    /// The end of a file.
    fn read(&mut self, input: &Input, what: &'static str) -> Result<()> {
        self.pairs.findings().files.push((input.path.clone(), what));
        self.look_up(input)
    }
}

impl<'a> Reading<'a, Draft> {
    fn new(queries: &'a IdIndex, passages: &'a IdIndex, depth: usize) -> Self {
        Reading { pairs: Draft::new(depth), queries: Finder::new(queries), passages, waiting: Waiting::default() }
    }

    fn seal(self, queries: Side, passages: Side, settings: PairsSettings) -> Result<Reading<'a, Sealed>> {
        let pairs = self.pairs.seal(queries, passages, settings)?;
        Ok(Reading { pairs, queries: self.queries, passages: self.passages, waiting: self.waiting })
    }

    fn qrels(&mut self, input: &Input, files: &PairFiles) -> Result<()> {
        let format = qrels::read(input, files.qrels_format, |j| match j.grade >= files.least_grade {
            true => self.add(input, j.line, j.query, j.passage, Role::Positive),
            false => Ok(()),
        })?;
        self.read(input, format.describe())
    }

    fn negatives(&mut self, input: &Input, rules: &SystemRules, positives_too: bool) -> Result<()> {
        let mut last = (String::new(), String::new());
        let format = negatives::read(input, rules, |c| match c.positive {
            true if !positives_too => Ok(()),
            // Triples name a positive again and again.
            true if last.0 == c.query && last.1 == c.passage => Ok(()),
            true => {
                c.query.clone_into(&mut last.0);
                c.passage.clone_into(&mut last.1);
                self.add(input, c.line, c.query, c.passage, Role::Positive)
            }
            false => self.add(input, c.line, c.query, c.passage, Role::Negative),
        })?;
        self.read(input, format.describe())
    }
}

impl Reading<'_, Sealed> {
    fn teacher(&mut self, input: &Input) -> Result<()> {
        teacher::read(input, |s| self.add(input, s.line, s.query, s.passage, Role::Scored(s.score)))?;
        self.read(input, "the teacher's scores")
    }
}

/// `path:line: id`.
pub(super) fn place(path: &Path, line: u64, id: &str) -> String {
    format!("{}:{line}: {id}", path.display())
}
