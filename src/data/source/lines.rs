//! The formats that are made of lines.

use crate::error::{Error, Result};

use super::bytes::{Lines, Opened, too_long};
use super::separator::Separator;
use super::{Document, LONGEST, json};

/// One document a line.
pub struct Text(Lines);

impl Text {
    /// Reads `opened` from the start.
    pub fn new(opened: Opened) -> Self {
        Text(Lines::new(opened))
    }
}

impl Iterator for Text {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        let line = self.0.next_line()?;
        Some(line.map(|text| Document { text: text.to_owned(), ..Document::default() }))
    }
}

/// Documents separated by blank lines; their own lines are kept apart by line ends.
pub struct Paragraphs {
    lines: Lines,
    done: bool,
}

impl Paragraphs {
    /// Reads `opened` from the start.
    pub fn new(opened: Opened) -> Self {
        Paragraphs { lines: Lines::new(opened), done: false }
    }
}

impl Iterator for Paragraphs {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut text = String::new();
        while !self.done {
            match self.lines.next_line() {
                None => self.done = true,
                Some(Err(e)) => return Some(Err(e)),
                Some(Ok(line)) if line.trim().is_empty() => {
                    if !text.is_empty() {
                        break;
                    }
                }
                Some(Ok(line)) if text.len() + line.len() >= LONGEST => {
                    self.done = true;
                    return Some(Err(too_long().path(&self.lines.path).line(self.lines.number)));
                }
                Some(Ok(line)) => {
                    if !text.is_empty() {
                        text.push('\n');
                    }
                    text.push_str(line);
                }
            }
        }
        (!text.is_empty()).then(|| Ok(Document { text, ..Document::default() }))
    }
}

/// One JSON object a line; blank lines are skipped.
pub struct Jsonl(Lines);

impl Jsonl {
    /// Reads `opened` from the start.
    pub fn new(opened: Opened) -> Self {
        Jsonl(Lines::new(opened))
    }
}

impl Iterator for Jsonl {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let line = match self.0.next_line()? {
                Ok(line) if line.trim().is_empty() => continue,
                Ok(line) => line,
                Err(e) => return Some(Err(e)),
            };
            let parsed = json::parse(line);
            let remedy = if line.trim_start().starts_with('[') {
                "write one object a line: jq -c '.[]'"
            } else {
                "correct the line, or name the right --format"
            };
            return Some(
                parsed.map_err(|cause| Error::refused(cause).path(&self.0.path).line(self.0.number).remedy(remedy)),
            );
        }
    }
}

/// Columns separated by tabs. The first line says how many: 2 are `id text`, 3 `id title text`, 4 `id url title body`.
pub struct Tsv {
    lines: Lines,
    columns: Option<usize>,
    done: bool,
}

impl Tsv {
    /// Reads `opened` from the start.
    pub fn new(opened: Opened) -> Self {
        Tsv { lines: Lines::new(opened), columns: None, done: false }
    }
}

impl Iterator for Tsv {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.done {
            let line = match self.lines.next_line()? {
                Ok("") => continue,
                Ok(line) => line,
                Err(e) => return Some(Err(e)),
            };
            let found = line.split('\t').count();
            let columns = *self.columns.get_or_insert(found);
            let bad = |cause: String, remedy: &str| Error::refused(cause).remedy(remedy);
            let document = if !(2..=4).contains(&columns) {
                // Every further line would say the same.
                self.done = true;
                let cause = format!("{columns} tab-separated column{}", if columns == 1 { "" } else { "s" });
                match Separator::of(line) {
                    Some(found) => Err(bad(
                        format!("{cause}: the line has {} in place of tabs", found.words()),
                        &found.command(&self.lines.path, true),
                    )),
                    None => Err(bad(
                        cause,
                        "give 2 (id, text), 3 (id, title, text) or 4 (id, url, title, body), or the right --format",
                    )),
                }
            } else if found != columns {
                let cause = format!("{found} tab-separated columns where the first line has {columns}");
                Err(bad(cause, "correct the line; a text must not hold tabs"))
            } else {
                row(line, columns).ok_or_else(|| bad("the id is empty".into(), "correct the line"))
            };
            return Some(document.map_err(|e| e.path(&self.lines.path).line(self.lines.number)));
        }
        None
    }
}

/// The document in a line of 2 to 4 columns; `None` if its id is empty.
fn row(line: &str, columns: usize) -> Option<Document> {
    let fields: Vec<&str> = line.split('\t').collect();
    let title = if columns > 2 { fields[columns - 2] } else { "" };
    (!fields[0].is_empty()).then(|| Document {
        id: Some(fields[0].to_owned()),
        title: (!title.is_empty()).then(|| title.to_owned()),
        text: fields[columns - 1].to_owned(),
    })
}
