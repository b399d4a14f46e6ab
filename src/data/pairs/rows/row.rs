//! One training row in each of the forms that tools write.

use serde_json::{Map, Value};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::data::pairs::negatives::id_of;
use crate::data::pairs::table::Wrong;

/// How rows hold a query and its passages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum RowFormat {
    /// Tevatron: `query_id, query, positive_passages [{docid, title, text}], negative_passages`.
    TevatronTexts,
    /// Tevatron since v2: `query_id, query_text, positive_document_ids, negative_document_ids`, next to a corpus.
    TevatronIds,
    /// FlagEmbedding: `query, pos [], neg [], pos_scores []?, neg_scores []?`.
    FlagEmbedding,
    /// sentence-transformers: columns in the order anchor, positive, negative, negative, …; a label or score beside them.
    Tuples,
}

/// A row as read.
#[derive(Debug, Default)]
pub(super) struct Row {
    pub query: String,
    pub passages: Vec<Member>,
    /// The row has an instruction of its own.
    pub prompt: bool,
}

/// A passage of a row.
#[derive(Debug)]
pub(super) struct Member {
    pub passage: Passage,
    pub positive: bool,
    pub score: Option<f32>,
}

#[derive(Debug)]
pub(super) enum Passage {
    Text { title: Option<String>, text: String },
    Id(String),
}

type Found<T> = std::result::Result<T, Wrong>;

/// Columns of rows of texts that are no text.
const LABELS: [&str; 4] = ["label", "labels", "score", "scores"];

impl RowFormat {
    /// What the user is told.
    pub fn describe(self) -> &'static str {
        match self {
            RowFormat::TevatronTexts => "rows with passages (Tevatron)",
            RowFormat::TevatronIds => "rows with ids of passages (Tevatron)",
            RowFormat::FlagEmbedding => "rows with pos and neg (FlagEmbedding)",
            RowFormat::Tuples => "columns anchor, positive, negatives (sentence-transformers)",
        }
    }

    /// The format of a row by its fields.
    pub(super) fn detect(row: &Value) -> Option<RowFormat> {
        let has = |name: &str| row.get(name).is_some();
        match row {
            Value::Array(_) => Some(RowFormat::Tuples),
            Value::Object(_) if has("positive_passages") => Some(RowFormat::TevatronTexts),
            Value::Object(_) if has("positive_document_ids") => Some(RowFormat::TevatronIds),
            Value::Object(_) if has("query") && has("pos") => Some(RowFormat::FlagEmbedding),
            Value::Object(fields) if fields.keys().filter(|k| !LABELS.contains(&k.as_str())).count() > 1 => {
                Some(RowFormat::Tuples)
            }
            _ => None,
        }
    }
}

/// Reads a row. `corpus`: whether there is one that ids are looked up in.
pub(super) fn parse(format: Option<RowFormat>, value: Value, corpus: bool) -> Found<Row> {
    let Some(format) = format else {
        return Err(Wrong::new("this is no training row")
            .remedy("give query and pos, query and positive_passages, or the columns anchor, positive and negatives"));
    };
    match (format, corpus) {
        (RowFormat::TevatronIds, false) => {
            return Err(Wrong::new("the row names passages by id, and there is no corpus").remedy("give the corpus"));
        }
        (RowFormat::TevatronIds, true) | (_, false) => {}
        (_, true) => {
            let remedy = "leave the corpus out, or give files that name passages by id";
            return Err(Wrong::new("the row brings its own passages, and there is a corpus").remedy(remedy));
        }
    }
    let mut fields = match (format, value) {
        (RowFormat::Tuples, Value::Array(columns)) => {
            return tuple(columns.into_iter().enumerate().map(|(i, v)| (format!("column {}", i + 1), v)).collect());
        }
        (_, Value::Object(fields)) => fields,
        _ => return Err(Wrong::new("the row is no JSON object").remedy("write one object a line")),
    };
    let mut row = Row { prompt: fields.get("prompt").is_some_and(|p| !p.is_null()), ..Row::default() };
    let (query, lists) = match format {
        RowFormat::TevatronTexts => (["query", "query_text"], ["positive_passages", "negative_passages"]),
        RowFormat::TevatronIds => (["query_text", "query"], ["positive_document_ids", "negative_document_ids"]),
        RowFormat::FlagEmbedding => (["query", "query"], ["pos", "neg"]),
        RowFormat::Tuples => return tuple(fields.into_iter().collect()),
    };
    let name = if fields.contains_key(query[0]) { query[0] } else { query[1] };
    row.query = text(name, fields.remove(name).unwrap_or_default())?;
    for (i, list) in lists.into_iter().enumerate() {
        let scores = match format {
            RowFormat::FlagEmbedding => scores(&fields, ["pos_scores", "neg_scores"][i])?,
            _ => None,
        };
        let items = match fields.remove(list) {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(items)) => items,
            Some(_) => return Err(Wrong::new(format!("{list} is not a list"))),
        };
        if let Some(scores) = scores.as_ref().filter(|s| s.len() != items.len()) {
            return Err(Wrong::new(format!("{} scores of the {} passages in {list}", scores.len(), items.len())));
        }
        for (k, item) in items.into_iter().enumerate() {
            let passage = match format {
                RowFormat::TevatronIds => Passage::Id(id_of(&item)?),
                _ => passage(list, item)?,
            };
            let score = scores.as_ref().map(|s| s[k]);
            row.passages.push(Member { passage, positive: i == 0, score });
        }
    }
    Ok(row)
}

fn text(name: &str, value: Value) -> Found<String> {
    match value {
        Value::String(text) => Ok(text),
        Value::Null => Err(Wrong::new(format!("{name} is missing"))),
        _ => Err(Wrong::new(format!("{name} is not text"))),
    }
}

/// A text, or an object with text and title.
fn passage(list: &str, item: Value) -> Found<Passage> {
    match item {
        Value::Object(mut fields) => {
            let text = text(&format!("the text of a passage in {list}"), fields.remove("text").unwrap_or_default())?;
            let title = fields.remove("title").and_then(|t| t.as_str().map(str::to_owned));
            Ok(Passage::Text { title, text })
        }
        item => Ok(Passage::Text { title: None, text: text(&format!("a passage in {list}"), item)? }),
    }
}

/// A list of finite numbers, where there is one.
fn scores(fields: &Map<String, Value>, name: &str) -> Found<Option<Vec<f32>>> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(list)) => numbers(name, list).map(Some),
        Some(_) => Err(Wrong::new(format!("{name} is not a list"))),
    }
}

fn numbers(name: &str, list: &[Value]) -> Found<Vec<f32>> {
    let number = |v: &Value| v.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
    let all: Option<Vec<f32>> = list.iter().map(number).collect();
    all.ok_or_else(|| Wrong::new(format!("{name} holds something that is not a finite number")))
}

/// Columns in order: the anchor, the positive, then negatives; of a pair with label 0 the second text is a negative.
fn tuple(columns: Vec<(String, Value)>) -> Found<Row> {
    let (mut texts, mut label) = (Vec::new(), None);
    for (name, value) in columns {
        match value {
            value if LABELS.contains(&name.as_str()) => label = Some((name, value)),
            Value::Array(list) if !texts.is_empty() => {
                for item in list {
                    texts.push(text(&format!("a text in {name}"), item)?);
                }
            }
            // Rows with fewer negatives than others.
            Value::Null if texts.len() > 1 => {}
            value => texts.push(text(&name, value)?),
        }
    }
    let mut texts = texts.into_iter();
    let Some(query) = texts.next() else { return Err(Wrong::new("the row holds no text")) };
    let positive = |i| i == 0;
    let mut passages: Vec<Member> = texts
        .enumerate()
        .map(|(i, text)| Member { passage: Passage::Text { title: None, text }, positive: positive(i), score: None })
        .collect();
    if passages.is_empty() {
        return Err(Wrong::new("the row has an anchor and nothing else"));
    }
    match label {
        None | Some((_, Value::Null)) => {}
        Some((name, Value::Array(list))) => {
            let scores = numbers(&name, &list)?;
            if scores.len() != passages.len() {
                return Err(Wrong::new(format!("{} scores of {} passages", scores.len(), passages.len())));
            }
            passages.iter_mut().zip(scores).for_each(|(passage, score)| passage.score = Some(score));
        }
        Some((name, value)) => {
            let value = value.as_f64().or_else(|| value.as_bool().map(|b| f64::from(u8::from(b))));
            match value {
                Some(1.0) => {}
                Some(0.0) if passages.len() == 1 => passages[0].positive = false,
                _ => {
                    let remedy = "give 1 or 0 for a pair, a list of one score a passage, or no such column";
                    return Err(Wrong::new(format!("{name} does not say whether the pair is one")).remedy(remedy));
                }
            }
        }
    }
    Ok(Row { query, passages, prompt: false })
}
