//! Judgements: which passages answer a query.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::data::source::Input;
use crate::error::Result;

use super::table::{self, Wrong};

/// How a file holds judgements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum QrelsFormat {
    /// `qid pid[,pid...]`, separated by a tab: RetroMAE's `train_qrels.txt`. All are relevant.
    Lists,
    /// `qid 0 docid grade`, separated by tabs or blanks: TREC, MS MARCO.
    Trec,
    /// `query-id corpus-id score`, separated by tabs, below a header: BEIR.
    Beir,
}

impl QrelsFormat {
    /// What the user is told.
    pub fn describe(self) -> &'static str {
        match self {
            QrelsFormat::Lists => "query and list of relevant passages",
            QrelsFormat::Trec => "TREC judgements",
            QrelsFormat::Beir => "BEIR judgements",
        }
    }
}

/// One judgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement<'a> {
    /// The query's id.
    pub query: &'a str,
    /// The passage's id.
    pub passage: &'a str,
    /// How relevant: 0 and less is not.
    pub grade: i32,
    /// Line of the file, from 1.
    pub line: u64,
}

/// Reads judgements in the order of the file; gives the format, which is found by the first line unless it is given.
pub fn read(
    input: &Input,
    format: Option<QrelsFormat>,
    mut each: impl FnMut(Judgement<'_>) -> Result<()>,
) -> Result<QrelsFormat> {
    let (mut format, mut first, mut failed) = (format, true, Ok(()));
    table::each_line(input, |line, text| {
        let beir = format.is_none_or(|f| f == QrelsFormat::Beir);
        let header = std::mem::take(&mut first) && beir && is_header(text);
        let format = match format {
            Some(format) => format,
            None => *format.insert(detect(text, header)?),
        };
        if header || failed.is_err() {
            return Ok(());
        }
        parse(format, text, |query, passage, grade| {
            if failed.is_ok() {
                failed = each(Judgement { query, passage, grade, line });
            }
        })
    })?;
    failed?;
    // A file of a header alone has a format too: there was a line.
    Ok(format.unwrap_or(QrelsFormat::Beir))
}

/// Whether the first line of a BEIR file is its header: three columns, the last no number.
fn is_header(line: &str) -> bool {
    let columns: Vec<&str> = line.split('\t').collect();
    columns.len() == 3 && columns[2].parse::<f64>().is_err() && columns.iter().all(|c| !c.is_empty())
}

fn detect(line: &str, header: bool) -> std::result::Result<QrelsFormat, Wrong> {
    let (tabs, words) = (line.split('\t').count(), line.split_ascii_whitespace().count());
    match (tabs, words) {
        _ if header => Ok(QrelsFormat::Beir),
        (1 | 4, 4) => Ok(QrelsFormat::Trec),
        (2, _) => Ok(QrelsFormat::Lists),
        (3, _) => Err(Wrong::new("three columns without the header query-id, corpus-id, score").remedy(
            "add the header if these are BEIR's judgements; triples of a query and two passages are negatives",
        )),
        _ => Err(Wrong::new(format!("{words} columns, which are no judgement"))
            .remedy("give qid 0 docid grade, query-id corpus-id score with its header, or qid and a list of passages")
            .separated(line, false)),
    }
}

fn parse(format: QrelsFormat, line: &str, mut each: impl FnMut(&str, &str, i32)) -> std::result::Result<(), Wrong> {
    match format {
        QrelsFormat::Lists => {
            let (query, list) = pair(line)?;
            let query = table::id(query)?;
            for passage in list.split(',') {
                each(query, table::id_of_list(passage)?, 1);
            }
        }
        QrelsFormat::Trec => {
            let mut words = line.split_ascii_whitespace();
            let (Some(query), Some(_), Some(passage), Some(grade_of), None) =
                (words.next(), words.next(), words.next(), words.next(), words.next())
            else {
                let count = line.split_ascii_whitespace().count();
                return Err(Wrong::new(format!("{count} columns where a judgement has 4: qid 0 docid grade")));
            };
            each(table::id(query)?, table::id(passage)?, grade(grade_of)?);
        }
        QrelsFormat::Beir => {
            let columns: Vec<&str> = line.split('\t').collect();
            let [query, passage, grade_of] = columns[..] else {
                let cause = format!("{} columns where a judgement has 3: query-id corpus-id score", columns.len());
                return Err(Wrong::new(cause));
            };
            each(table::id(query)?, table::id(passage)?, grade(grade_of)?);
        }
    }
    Ok(())
}

/// The two columns of a line.
pub(super) fn pair(line: &str) -> std::result::Result<(&str, &str), Wrong> {
    match line.split_once('\t') {
        Some((a, b)) if !b.contains('\t') => Ok((a, b)),
        _ => {
            let count = line.split('\t').count();
            Err(Wrong::new(format!("{count} tab-separated columns where there should be 2")))
        }
    }
}

fn grade(field: &str) -> std::result::Result<i32, Wrong> {
    field.parse().map_err(|_| Wrong::new(format!("the grade {} is not a whole number", table::shown(field))))
}
