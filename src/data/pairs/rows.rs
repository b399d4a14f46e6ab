//! Training rows that bring their own texts, tokenized on the way into corpora in memory.
//!
//! Equal texts become one: a query that has several rows is one query with all their passages, so that the positive of one of its rows
//! is known for one in the others, too. Texts are compared as they are cut.

use std::sync::Arc;

use ahash::{AHashMap, RandomState};
use rayon::prelude::*;
use serde_json::Value;

use crate::data::corpus::{MemoryCorpus, Tokens};
use crate::data::shard::{ShardSet, TitleSep};
use crate::data::source::Input;
use crate::data::tokenize::encode_document;
use crate::data::tokenizer::{Encoder, Token, Tokenizer};
use crate::error::{Error, Kind, Result};
use crate::files::hex;

use super::files::{check_sets, place};
use super::ids::IdIndex;
use super::records::{self, Raw};
use super::table::{ERRORS, Wrong};
use super::{Draft, Pairs, PairsSettings, Side};

mod row;

pub use row::RowFormat;
use row::{Passage, Row};

/// How rows become texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowRules {
    /// Overrules the detection of the format.
    pub format: Option<RowFormat>,
    /// How titles are joined.
    pub title_sep: TitleSep,
    /// Queries are cut to this many tokens, `[CLS]` and `[SEP]` included.
    pub query_length: usize,
    /// Passages are cut to this many tokens, `[CLS]` and `[SEP]` included.
    pub passage_length: usize,
}

/// Rows worked on at once.
const BLOCK_ROWS: usize = 2048;
/// Bytes of rows worked on at once.
const BLOCK_BYTES: usize = 8 << 20;

/// Reads rows. `corpus` is what rows name their passages of, where they only name them ([`RowFormat::TevatronIds`]).
pub fn from_rows(
    inputs: &[Input],
    tokenizer: &Tokenizer,
    corpus: Option<Arc<ShardSet>>,
    rules: &RowRules,
    settings: PairsSettings,
) -> Result<Pairs> {
    if rules.query_length.min(rules.passage_length) < 3 {
        let lengths = format!("texts cut to {} and {} tokens", rules.query_length, rules.passage_length);
        return Err(Error::usage(lengths).remedy("choose lengths of at least 3"));
    }
    let index = match &corpus {
        Some(set) => {
            let fingerprint = hex(&tokenizer.fingerprint());
            check_sets(&[set], Some(&fingerprint))?;
            Some(IdIndex::new(set.clone()).map_err(|e| e.path(set.dir()))?)
        }
        None => None,
    };
    let mut reading = Reading {
        tokenizer,
        rules,
        index: index.as_ref(),
        queries: Interner::new(),
        passages: Interner::new(),
        draft: Draft::new(settings.depth),
    };
    for input in inputs {
        reading.file(input)?;
    }
    let Reading { queries, passages, mut draft, .. } = reading;
    draft.findings.duplicate_ids.count = index.map_or(0, |index| index.duplicates());
    let queries = Side { corpus: Arc::new(queries.corpus), ids: None };
    let passages = match corpus {
        Some(set) => Side { corpus: set.clone(), ids: Some(set) },
        None => Side { corpus: Arc::new(passages.corpus), ids: None },
    };
    draft.finish(queries, passages, settings)
}

/// A record's line and what it holds.
type Parsed = (u64, std::result::Result<Value, Wrong>);

/// A row ready to be added.
struct Encoded {
    query: Vec<Token>,
    passages: Vec<Known>,
    prompt: bool,
}

/// A passage of a row.
struct Known {
    what: What,
    positive: bool,
    score: Option<f32>,
}

enum What {
    Tokens(Vec<Token>),
    Number(u32),
    Missing(String),
}

struct Reading<'a> {
    tokenizer: &'a Tokenizer,
    rules: &'a RowRules,
    index: Option<&'a IdIndex>,
    queries: Interner,
    passages: Interner,
    draft: Draft,
}

impl Reading<'_> {
    fn file(&mut self, input: &Input) -> Result<()> {
        let mut records = records::open(input)?.peekable();
        let mut format = self.rules.format;
        let (mut errors, mut found) = (Vec::new(), false);
        while records.peek().is_some() {
            let (mut block, mut bytes) = (Vec::new(), 0);
            while block.len() < BLOCK_ROWS && bytes < BLOCK_BYTES {
                match records.next() {
                    None => break,
                    Some(Ok((line, raw))) => {
                        bytes += raw.size();
                        block.push((line, raw));
                    }
                    Some(Err(e)) if e.kind() == Kind::Refused && errors.len() < ERRORS => errors.push(e),
                    Some(Err(e)) => return Err(e),
                }
            }
            found |= !block.is_empty();
            let parsed: Vec<Parsed> =
                block.into_par_iter().map(|(line, raw): (u64, Raw)| (line, raw.parse())).collect();
            if format.is_none()
                && let Some((_, Ok(first))) = parsed.iter().find(|(_, value)| value.is_ok())
            {
                format = RowFormat::detect(first);
            }
            self.block(input, format, parsed, &mut errors)?;
            if errors.len() >= ERRORS {
                break;
            }
        }
        if !errors.is_empty() {
            return Err(Error::several(errors));
        }
        if !found {
            return Err(Error::refused("is empty").path(&input.path).remedy("check the path, or leave the file out"));
        }
        let what = format.map_or("rows", RowFormat::describe);
        self.draft.findings.files.push((input.path.clone(), what));
        Ok(())
    }

    /// Encodes rows in parallel and adds them in their order.
    fn block(
        &mut self,
        input: &Input,
        format: Option<RowFormat>,
        parsed: Vec<Parsed>,
        errors: &mut Vec<Error>,
    ) -> Result<()> {
        let (tokenizer, rules, index) = (self.tokenizer, self.rules, self.index);
        let encode = |encoder: &mut Encoder<'_>, (line, value): Parsed| {
            let row = value.and_then(|value| row::parse(format, value, index.is_some()));
            let row: Result<Encoded> = match row {
                Ok(row) => encode(encoder, tokenizer.special().sep, rules, index, row),
                Err(wrong) => Err(wrong.at(input, line)),
            };
            (line, row)
        };
        let encoded: Vec<(u64, Result<Encoded>)> =
            parsed.into_par_iter().map_init(|| tokenizer.encoder(), encode).collect();
        for (line, row) in encoded {
            match row {
                Ok(row) if errors.is_empty() => self.add(input, line, row)?,
                Ok(_) => {}
                Err(e) if e.kind() == Kind::Refused => errors.push(e),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn add(&mut self, input: &Input, line: u64, row: Encoded) -> Result<()> {
        let special = self.tokenizer.special();
        let borders = [special.cls, special.sep];
        let findings = &mut self.draft.findings;
        findings.rows += 1;
        if row.prompt {
            findings.prompts.add(|| format!("{}:{line}", input.path.display()));
        }
        if row.query.is_empty() {
            findings.empty_texts.add(|| place(&input.path, line, "the query"));
            return Ok(());
        }
        let query = self.queries.intern(&row.query, borders, self.rules.query_length)?;
        for Known { what, positive, score } in row.passages {
            let findings = &mut self.draft.findings;
            let passage = match what {
                What::Number(passage) => passage,
                What::Missing(id) => {
                    let tally =
                        if positive { &mut findings.unknown_positives } else { &mut findings.unknown_negatives };
                    tally.add(|| place(&input.path, line, &id));
                    continue;
                }
                What::Tokens(tokens) if tokens.is_empty() => {
                    findings.empty_texts.add(|| place(&input.path, line, "a passage"));
                    continue;
                }
                What::Tokens(tokens) => self.passages.intern(&tokens, borders, self.rules.passage_length)?,
            };
            if positive {
                self.draft.positive(query, passage);
            } else {
                self.draft.negative(query, passage);
            }
            if let Some(score) = score {
                self.draft.score(query, passage, score);
            }
        }
        Ok(())
    }
}

fn encode(encoder: &mut Encoder<'_>, sep: u32, rules: &RowRules, index: Option<&IdIndex>, row: Row) -> Result<Encoded> {
    let mut query = Vec::new();
    encoder.encode(&row.query, rules.query_length - 2, &mut query)?;
    let mut passages = Vec::with_capacity(row.passages.len());
    for row::Member { passage, positive, score } in row.passages {
        let what = match (passage, index) {
            (Passage::Text { title, text }, _) => {
                let (mut tokens, limit) = (Vec::new(), rules.passage_length - 2);
                encode_document(encoder, rules.title_sep, title.as_deref(), &text, limit, sep, &mut tokens)?;
                What::Tokens(tokens)
            }
            (Passage::Id(id), Some(index)) => match index.find(&id)? {
                Some(number) => What::Number(number),
                None => What::Missing(id),
            },
            (Passage::Id(id), None) => What::Missing(id),
        };
        passages.push(Known { what, positive, score });
    }
    Ok(Encoded { query, passages, prompt: row.prompt })
}

/// A corpus in memory in which no two texts are equal.
struct Interner {
    corpus: MemoryCorpus,
    hasher: RandomState,
    numbers: AHashMap<u64, u32>,
    ids: Vec<u32>,
    starts: Vec<bool>,
}

impl Interner {
    fn new() -> Self {
        Interner {
            corpus: MemoryCorpus::default(),
            hasher: RandomState::with_seeds(0x4528_21E6, 0x38D0_1377, 0xBE54_66CF, 0x34E9_0C6C),
            numbers: AHashMap::new(),
            ids: Vec::new(),
            starts: Vec::new(),
        }
    }

    /// The number of the text of these tokens, cut to `length` with its borders.
    fn intern(&mut self, tokens: &[Token], [cls, sep]: [u32; 2], length: usize) -> Result<u32> {
        let tokens = &tokens[..tokens.len().min(length - 2)];
        self.ids.clear();
        self.ids.push(cls);
        self.ids.extend(tokens.iter().map(|t| t.id()));
        self.ids.push(sep);
        self.starts.clear();
        self.starts.push(true);
        self.starts.extend(tokens.iter().enumerate().map(|(i, t)| i == 0 || t.starts_word()));
        self.starts.push(true);
        let mut hash = self.hasher.hash_one(&self.ids);
        while let Some(&number) = self.numbers.get(&hash) {
            if self.corpus.tokens(u64::from(number))?.ids == self.ids {
                return Ok(number);
            }
            // Another text of the same hash.
            hash = hash.wrapping_add(1);
        }
        let number = self.numbers.len() as u32;
        self.corpus.push(Tokens { ids: &self.ids, word_start: &self.starts });
        self.numbers.insert(hash, number);
        Ok(number)
    }
}
