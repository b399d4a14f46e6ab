//! Runs: ranked passages of queries, as search writes them and reranking, mining and evaluation read them.

use std::io::{self, Write};

use ahash::AHashMap;
use clap::ValueEnum;

use crate::data::source::Input;
use crate::error::{Error, Result};

use super::files::place;
use super::findings::Tally;
use super::ids::{Finder, IdIndex};
use super::lists::Lists;
use super::table::{self, Wrong};

/// How a file holds a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RunFormat {
    /// `qid Q0 docid rank score tag`, separated by blanks or tabs.
    Trec,
    /// `qid pid rank [score]`, separated by tabs.
    Msmarco,
    /// `qid docid score`, separated by tabs.
    Tevatron,
    /// `qid pid`, separated by a tab; further columns (MS MARCO's texts) are not read. The rank is the order of the lines.
    Pairs,
}

impl RunFormat {
    /// What the user is told.
    pub fn describe(self) -> &'static str {
        match self {
            RunFormat::Trec => "TREC run",
            RunFormat::Msmarco => "MS MARCO ranking",
            RunFormat::Tevatron => "Tevatron run",
            RunFormat::Pairs => "pairs of query and passage",
        }
    }
}

/// A passage on a query's list.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit<'a> {
    /// The passage's id.
    pub id: &'a str,
    /// As in the file; where it says none, the place on the list, from 1.
    pub rank: u32,
    /// As in the file; where it says none, minus the rank.
    pub score: f32,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Where the id ends among the bytes of all ids; it begins where that of the line before ends.
    start: usize,
    length: u32,
    query: u32,
    rank: u32,
    score: f32,
    line: u32,
}

/// A run by ids. The lists are in the order of the file's ranks, or of its lines where it has none; queries as they first came.
#[derive(Clone, Debug)]
pub struct Run {
    format: RunFormat,
    queries: Vec<String>,
    ids: String,
    entries: Vec<Entry>,
    /// Where each query's list ends.
    ends: Vec<usize>,
}

impl Run {
    /// Reads a run; the format is found by the first line unless it is given. A passage twice on one list is refused.
    pub fn read(input: &Input, format: Option<RunFormat>) -> Result<Run> {
        let (mut numbers, mut format) = (AHashMap::new(), format);
        let mut run = Run {
            format: RunFormat::Trec,
            queries: Vec::new(),
            ids: String::new(),
            entries: Vec::new(),
            ends: Vec::new(),
        };
        let mut last = u32::MAX;
        table::each_line(input, |line, text| {
            let format = *format.get_or_insert_with(|| detect(text));
            let (query, id, rank, score) = parse(format, text)?;
            let (query, id) = (table::id(query)?, table::id(id)?);
            // Lines of one query mostly follow each other.
            if run.queries.get(last as usize).is_none_or(|q| q != query) {
                last = *numbers.entry(query.to_owned()).or_insert_with(|| {
                    run.queries.push(query.to_owned());
                    run.queries.len() as u32 - 1
                });
            }
            let (start, length) = (run.ids.len(), id.len() as u32);
            run.ids.push_str(id);
            let (rank, score) = (rank.unwrap_or(0), score.unwrap_or(f32::NAN));
            run.entries.push(Entry { start, length, query: last, rank, score, line: line as u32 });
            Ok(())
        })?;
        run.format = format.unwrap_or(RunFormat::Trec);
        run.arrange();
        run.refuse_repeated(input)?;
        Ok(run)
    }

    /// Sorts into lists and completes ranks and scores.
    fn arrange(&mut self) {
        // Stable: where ranks are equal or missing the order of the lines counts.
        self.entries.sort_by_key(|e| (e.query, e.rank));
        let mut start = 0;
        for query in 0..self.queries.len() as u32 {
            let count = self.entries[start..].partition_point(|e| e.query == query);
            for (place, entry) in self.entries[start..start + count].iter_mut().enumerate() {
                if matches!(self.format, RunFormat::Pairs | RunFormat::Tevatron) {
                    entry.rank = place as u32 + 1;
                }
                if entry.score.is_nan() {
                    entry.score = -(entry.rank as f32);
                }
            }
            start += count;
            self.ends.push(start);
        }
    }

    fn refuse_repeated(&self, input: &Input) -> Result<()> {
        let mut errors = Vec::new();
        for query in 0..self.queries.len() {
            let mut list: Vec<(&str, u32)> = self.entries(query).iter().map(|e| (self.id(e), e.line)).collect();
            list.sort_unstable();
            for twice in list.windows(2).filter(|two| two[0].0 == two[1].0) {
                let cause = format!("passage {} is twice on the list of query {}", twice[0].0, self.queries[query]);
                errors.push((twice[1].1, Wrong::new(cause).remedy("remove one of the lines")));
            }
        }
        if errors.is_empty() {
            return Ok(());
        }
        errors.sort_by_key(|e| e.0);
        Err(Error::several(errors.into_iter().map(|(line, wrong)| wrong.at(input, u64::from(line))).collect()))
    }

    fn entries(&self, query: usize) -> &[Entry] {
        &self.entries[if query == 0 { 0 } else { self.ends[query - 1] }..self.ends[query]]
    }

    fn id(&self, entry: &Entry) -> &str {
        &self.ids[entry.start..entry.start + entry.length as usize]
    }

    /// What the file is.
    pub fn format(&self) -> RunFormat {
        self.format
    }

    /// The queries' ids, as they first came.
    pub fn queries(&self) -> &[String] {
        &self.queries
    }

    /// The list of query `i`.
    pub fn hits(&self, i: usize) -> impl ExactSizeIterator<Item = Hit<'_>> + '_ {
        self.entries(i).iter().map(|e| Hit { id: self.id(e), rank: e.rank, score: e.score })
    }

    /// Passages on all lists together.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no passage; never so after [`Run::read`].
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The lists by text numbers; what is not among the texts is left out and counted. `path` is for the messages.
    pub fn resolve(&self, input: &Input, queries: &IdIndex, passages: &IdIndex) -> Result<ResolvedRun> {
        let mut found = ResolvedRun::default();
        let mut passages = Finder::new(passages);
        for (i, id) in self.queries.iter().enumerate() {
            let Some(query) = queries.find(id)? else {
                let line = self.entries(i).iter().map(|e| e.line).min().unwrap_or(0);
                found.unknown_queries.add(|| place(&input.path, u64::from(line), id));
                continue;
            };
            let mut list = Vec::with_capacity(self.entries(i).len());
            for entry in self.entries(i) {
                match passages.find(self.id(entry))? {
                    Some(passage) => {
                        list.push(passage);
                        found.scores.push(entry.score);
                    }
                    None => {
                        let name = || place(&input.path, u64::from(entry.line), self.id(entry));
                        found.unknown_passages.add(name);
                    }
                }
            }
            found.queries.push(query);
            found.lists.push(list);
        }
        Ok(found)
    }
}

/// A run by text numbers.
#[derive(Clone, Debug, Default)]
pub struct ResolvedRun {
    /// Number of each query's text.
    pub queries: Vec<u32>,
    /// Numbers of the passages' texts, by rank, a list a query.
    pub lists: Lists,
    /// The scores of all lists' passages, one after the other.
    pub scores: Vec<f32>,
    /// Queries that are not among the queries; left out.
    pub unknown_queries: Tally,
    /// Passages that are not in the corpus; left out.
    pub unknown_passages: Tally,
}

fn detect(line: &str) -> RunFormat {
    let (columns, words): (Vec<&str>, _) = (line.split('\t').collect(), line.split_ascii_whitespace().count());
    match columns[..] {
        [_] | [_, _, _, _, _, _] if words == 6 => RunFormat::Trec,
        [_, _, third] | [_, _, third, _] if third.parse::<u32>().is_ok() => RunFormat::Msmarco,
        [_, _, third] if third.parse::<f64>().is_ok() => RunFormat::Tevatron,
        _ => RunFormat::Pairs,
    }
}

/// Query, passage, rank and score.
type Fields<'a> = (&'a str, &'a str, Option<u32>, Option<f32>);

fn parse(format: RunFormat, line: &str) -> std::result::Result<Fields<'_>, Wrong> {
    let columns =
        |words: &[&str], expected: &str| Wrong::new(format!("{} columns where a line has {expected}", words.len()));
    let tabs = || line.split('\t').collect::<Vec<_>>();
    match format {
        RunFormat::Trec => {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            match words[..] {
                [query, _, id, rank, score, _] => Ok((query, id, Some(number(rank)?), Some(table::score(score)?))),
                _ => Err(columns(&words, "6: qid Q0 docid rank score tag")),
            }
        }
        RunFormat::Msmarco => match tabs()[..] {
            [query, id, rank] => Ok((query, id, Some(number(rank)?), None)),
            [query, id, rank, score] => Ok((query, id, Some(number(rank)?), Some(table::score(score)?))),
            ref other => Err(columns(other, "3 or 4: qid pid rank [score]")),
        },
        RunFormat::Tevatron => match tabs()[..] {
            [query, id, score] => Ok((query, id, None, Some(table::score(score)?))),
            ref other => Err(columns(other, "3: qid docid score")),
        },
        RunFormat::Pairs => match tabs()[..] {
            [query, id, ..] => Ok((query, id, None, None)),
            ref other => Err(columns(other, "2, separated by a tab: qid pid").separated(line, false)),
        },
    }
}

fn number(field: &str) -> std::result::Result<u32, Wrong> {
    let remedy = "if the column holds scores, name the format that has them there";
    field.parse().map_err(|_| Wrong::new(format!("the rank {} is no whole number", table::shown(field))).remedy(remedy))
}

/// Writes runs, a query's list at a time.
///
/// trec_eval reads scores as f32 and breaks ties by document id, not by rank. So a score that is not below the one before it is
/// written as the next smaller f32: then everyone sees the order of the list.
pub struct RunWriter<W> {
    out: W,
    format: RunFormat,
    tag: String,
    nudged: u64,
}

impl<W: Write> RunWriter<W> {
    /// Writes to `out`. `tag` names the run in TREC's format.
    pub fn new(out: W, format: RunFormat, tag: &str) -> Self {
        RunWriter { out, format, tag: tag.to_string(), nudged: 0 }
    }

    /// Writes the list of a query, best first. Scores must be finite.
    pub fn query<'a>(&mut self, query: &str, list: impl IntoIterator<Item = (&'a str, f32)>) -> io::Result<()> {
        let mut before = f32::INFINITY;
        for (place, (id, score)) in list.into_iter().enumerate() {
            if !score.is_finite() {
                return Err(io::Error::other(format!("the score of {id} for query {query} is not finite")));
            }
            let written = if score < before { score } else { before.next_down() };
            self.nudged += u64::from(written != score);
            before = written;
            let rank = place + 1;
            match self.format {
                RunFormat::Trec => writeln!(self.out, "{query} Q0 {id} {rank} {written} {}", self.tag)?,
                RunFormat::Msmarco => writeln!(self.out, "{query}\t{id}\t{rank}")?,
                RunFormat::Tevatron => writeln!(self.out, "{query}\t{id}\t{written:?}")?,
                RunFormat::Pairs => writeln!(self.out, "{query}\t{id}")?,
            }
        }
        Ok(())
    }

    /// Scores written smaller than they are, to keep the order.
    pub fn nudged(&self) -> u64 {
        self.nudged
    }

    /// Gives the output back.
    pub fn into_inner(self) -> W {
        self.out
    }
}
