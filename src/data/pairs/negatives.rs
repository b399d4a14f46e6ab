//! Hard negatives: passages that look like answers to a query and are none.

use serde::Deserialize;
use serde_json::Value;

use crate::data::source::Input;
use crate::error::Result;

use super::qrels::pair;
use super::table::{self, Wrong};

/// How a file holds negatives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NegativesFormat {
    /// `qid nid,nid,...`, separated by a tab, in the order of their ranks; further lines of a query extend its list.
    Lists,
    /// `qid pos neg`, separated by tabs: MS MARCO's `qidpidtriples`.
    Triples,
    /// One JSON object a line: `{"qid", "pos", "neg": {"system": [...]}}`, the hard negatives of sentence-transformers.
    Systems,
}

impl NegativesFormat {
    /// What the user is told.
    pub fn describe(self) -> &'static str {
        match self {
            NegativesFormat::Lists => "query and list of negatives",
            NegativesFormat::Triples => "triples of query, positive and negative",
            NegativesFormat::Systems => "negatives by system, JSON lines",
        }
    }
}

/// What is taken of negatives by system.
#[derive(Clone, Debug, PartialEq)]
pub struct SystemRules {
    /// A passage is taken when its cross-encoder score is at least this far below that of the lowest positive.
    pub margin: f32,
    /// Passages taken of each system.
    pub per_system: usize,
    /// The systems; none named means all.
    pub systems: Vec<String>,
}

impl Default for SystemRules {
    fn default() -> Self {
        SystemRules { margin: 3.0, per_system: usize::MAX, systems: Vec::new() }
    }
}

/// A passage that a file names for a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate<'a> {
    /// The query's id.
    pub query: &'a str,
    /// The passage's id.
    pub passage: &'a str,
    /// Whether the file calls it a positive.
    pub positive: bool,
    /// Line of the file, from 1.
    pub line: u64,
}

/// Reads candidates in the order of the file, which is that of their ranks.
pub fn read(
    input: &Input,
    rules: &SystemRules,
    mut each: impl FnMut(Candidate<'_>) -> Result<()>,
) -> Result<NegativesFormat> {
    let (mut format, mut failed) = (None, Ok(()));
    table::each_line(input, |line, text| {
        let format = match format {
            Some(format) => format,
            None => *format.insert(detect(text)?),
        };
        if failed.is_err() {
            return Ok(());
        }
        parse(format, text, rules, |query, passage, positive| {
            if failed.is_ok() {
                failed = each(Candidate { query, passage, positive, line });
            }
        })
    })?;
    failed?;
    Ok(format.unwrap_or(NegativesFormat::Lists))
}

fn detect(line: &str) -> std::result::Result<NegativesFormat, Wrong> {
    match line.split('\t').count() {
        _ if line.trim_start().starts_with('{') => Ok(NegativesFormat::Systems),
        2 => Ok(NegativesFormat::Lists),
        3 => Ok(NegativesFormat::Triples),
        n => Err(Wrong::new(format!("{n} tab-separated columns, which are no negatives"))
            .remedy("give qid and a list of passages, or qid, positive and negative, separated by tabs")
            .separated(line, true)),
    }
}

fn parse(
    format: NegativesFormat,
    line: &str,
    rules: &SystemRules,
    mut each: impl FnMut(&str, &str, bool),
) -> std::result::Result<(), Wrong> {
    match format {
        NegativesFormat::Lists => {
            let (query, list) = pair(line)?;
            let query = table::id(query)?;
            // A query without negatives is a line that ends after its tab.
            for passage in list.split(',').filter(|_| !list.is_empty()) {
                each(query, table::id_of_list(passage)?, false);
            }
        }
        NegativesFormat::Triples => {
            let mut columns = line.split('\t');
            let (Some(query), Some(positive), Some(negative), None) =
                (columns.next(), columns.next(), columns.next(), columns.next())
            else {
                let count = line.split('\t').count();
                return Err(Wrong::new(format!("{count} tab-separated columns where a triple has 3")));
            };
            let query = table::id(query)?;
            let (positive, negative) = (table::id(positive)?, table::id(negative)?);
            each(query, positive, true);
            each(query, negative, false);
        }
        NegativesFormat::Systems => systems(line, rules, each)?,
    }
    Ok(())
}

/// A line of negatives by system.
#[derive(Deserialize)]
struct Systems {
    qid: Value,
    #[serde(default)]
    pos: Vec<Value>,
    #[serde(default)]
    neg: serde_json::Map<String, Value>,
}

fn systems(line: &str, rules: &SystemRules, mut each: impl FnMut(&str, &str, bool)) -> std::result::Result<(), Wrong> {
    let found: Systems =
        serde_json::from_str(line).map_err(|e| Wrong::new(e.to_string().replace("at line 1 column", "at column")))?;
    let query = id_of(&found.qid)?;
    let mut lowest = f32::INFINITY;
    for positive in &found.pos {
        let (id, score) = passage(positive)?;
        lowest = lowest.min(score.unwrap_or(f32::INFINITY));
        each(&query, &id, true);
    }
    // Without scores of the positives there is no margin to hold.
    let highest = lowest - rules.margin;
    let mut lists = Vec::new();
    for (system, list) in &found.neg {
        let Value::Array(list) = list else {
            return Err(Wrong::new(format!("the negatives of {system} are not a list")));
        };
        if !rules.systems.is_empty() && !rules.systems.contains(system) {
            continue;
        }
        let mut kept = Vec::new();
        for item in list {
            let (id, score) = passage(item)?;
            if kept.len() < rules.per_system && score.is_none_or(|score| score <= highest) {
                kept.push(id);
            }
        }
        lists.push(kept);
    }
    // By rank: the best of every system, then the second best of every system.
    let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
    for rank in 0..longest {
        lists.iter().filter_map(|list| list.get(rank)).for_each(|id| each(&query, id, false));
    }
    Ok(())
}

/// An item of a list: the passage's id alone, or an object with its id and score.
fn passage(item: &Value) -> std::result::Result<(String, Option<f32>), Wrong> {
    let Value::Object(fields) = item else { return Ok((id_of(item)?, None)) };
    let Some(pid) = fields.get("pid") else { return Err(Wrong::new("a passage has no pid")) };
    let score = match fields.get("ce-score") {
        None | Some(Value::Null) => None,
        Some(value) => match value.as_f64().map(|s| s as f32).filter(|s| s.is_finite()) {
            None => return Err(Wrong::new("a ce-score is not a finite number")),
            score => score,
        },
    };
    Ok((id_of(pid)?, score))
}

/// An id in JSON: a string or a whole number.
pub(super) fn id_of(value: &Value) -> std::result::Result<String, Wrong> {
    match value {
        Value::String(s) => table::id(s).map(str::to_owned),
        Value::Number(n) if n.is_u64() || n.is_i64() => Ok(n.to_string()),
        other => Err(Wrong::new(format!("the id {} is neither text nor a whole number", other))),
    }
}
