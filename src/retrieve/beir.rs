//! A data set in BEIR's layout, from texts to figures: encode, search, evaluate.
//!
//! A folder holds `corpus.jsonl`, `queries.jsonl` (each perhaps with `.gz` or `.zst`) and `qrels/SPLIT.tsv`. As in BEIR, only judged
//! queries are searched for, a passage is `(title + " " + text).strip()`, and a passage with its query's id does not count.

use std::path::{Path, PathBuf};

use super::embedder::{Embedder, Kind};
use super::encode::{self, Job, Progress};
use super::model::{Model, Reading, Texts};
use super::representation::Representation;
use super::search::{Rows, Written, write_run};
use crate::data::pairs::runs::{Run, RunFormat};
use crate::data::shard::TitleSep;
use crate::data::source::{Format, Input};
use crate::device::{DType, Device};
use crate::error::{Error, Result};
use crate::eval::metrics::{EvalRules, Evaluation, Metric, Rules, evaluate};
use crate::eval::qrels::Qrels;
use crate::files::Disk;

/// What is reported unless other metrics are asked for.
pub const METRICS: [Metric; 4] = [Metric::Ndcg(10), Metric::Mrr(10), Metric::Recall(100), Metric::Map];

/// How data sets are judged.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which judgements.
    pub split: String,
    /// How queries are encoded.
    pub queries: Texts,
    /// How passages are encoded.
    pub passages: Texts,
    /// Passages on a list.
    pub top_k: usize,
    /// Figures.
    pub metrics: Vec<Metric>,
}

/// The files of a data set.
#[derive(Clone, Debug)]
pub struct Files {
    /// What the set is called: the folder's name.
    pub name: String,
    corpus: Input,
    queries: Input,
    qrels: Input,
}

impl Files {
    /// Finds the files of the set in `dir`.
    ///
    /// # Errors
    /// One of them is missing.
    pub fn find(dir: &Path, split: &str) -> Result<Files> {
        let one = |stem: &str| {
            let names = ["", ".gz", ".zst"].map(|end| dir.join(format!("{stem}{end}")));
            let found = names.iter().find(|path| path.is_file()).cloned();
            found.map(|path| Input { bytes: path.metadata().ok().map(|m| m.len()), path }).ok_or_else(|| {
                Error::refused(format!("holds no {stem}, compressed or not"))
                    .path(dir)
                    .remedy("give a folder in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv")
            })
        };
        let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
        let name = whole.file_name().map_or_else(|| "data".into(), |name| name.to_string_lossy().into_owned());
        Ok(Files {
            name,
            corpus: one("corpus.jsonl")?,
            queries: one("queries.jsonl")?,
            qrels: one(&format!("qrels/{split}.tsv"))?,
        })
    }
}

/// One data set's result.
#[derive(Clone, Debug)]
pub struct Judged {
    /// The set.
    pub name: String,
    /// Passages.
    pub passages: u64,
    /// Queries.
    pub queries: u64,
    /// The figures.
    pub evaluation: Evaluation,
    /// Seconds of encoding, and of searching.
    pub seconds: [f64; 2],
}

/// A model on its device, for several data sets.
pub struct Judge<'m> {
    model: &'m Model,
    options: &'m Options,
    jobs: [Job; 2],
    /// Of queries and of passages; one where the model has one encoder.
    embedders: Vec<Embedder>,
    /// Where embeddings are compared: the embedders' device, unless set otherwise.
    pub search: Device,
}

impl<'m> Judge<'m> {
    /// Loads what is needed of the model.
    ///
    /// # Errors
    /// Lengths that the model cannot take, or a device that fails.
    pub fn new(model: &'m Model, target: (Device, DType), options: &'m Options) -> Result<Judge<'m>> {
        let jobs = [model.job(target, &options.queries)?, model.job(target, &options.passages)?];
        let longest = &jobs[usize::from(jobs[1].spec.max_len >= jobs[0].spec.max_len)];
        let mut embedders = vec![model.embedder(target, Kind::Query, longest)?];
        if model.untied() {
            embedders.push(model.embedder(target, Kind::Passage, longest)?);
        }
        Ok(Judge { model, options, jobs, embedders, search: target.0 })
    }

    /// What is kept of a text, and the numbers of a dense embedding.
    pub fn kept(&self) -> (Representation, usize) {
        (self.jobs[0].spec.representation, self.jobs[0].spec.dim)
    }

    /// Passages that are searched for: one more than asked for, since the query's own does not count.
    pub fn depth(&self) -> usize {
        self.options.top_k + 1
    }

    /// Judges the model on one set, with the work left in `dir`: what an earlier run left there of the same is used.
    ///
    /// # Errors
    /// Data that is refused, or a failed write.
    pub fn run(&mut self, files: &Files, dir: &Path, watch: &dyn Fn(&str, Progress)) -> Result<Judged> {
        let (qrels, _) = Qrels::read(&files.qrels, None)?;
        let only = qrels.queries().map(|(query, _)| query.to_owned()).collect();
        let reading =
            |only| Reading { title_sep: TitleSep::Space, format: Some(Format::Jsonl), blank_lines: false, only };
        let mut folders: Vec<PathBuf> = Vec::new();
        let mut seconds = 0.0;
        let split = &self.options.split;
        let sides = [(format!("queries-{split}"), &files.queries, Some(only)), ("corpus".into(), &files.corpus, None)];
        for (side, (name, input, only)) in sides.into_iter().enumerate() {
            let job = &self.jobs[side];
            let source = self.model.documents(job, vec![input.clone()], reading(only))?;
            let last = self.embedders.len() - 1;
            let embedder = &mut self.embedders[side.min(last)];
            let folder = dir.join(name);
            let done = encode::run(&Disk::default(), source, embedder, job, &folder, &|at| {
                watch(&format!("{} of {}", if side == 0 { "queries" } else { "passages" }, files.name), at);
            });
            seconds += done.map_err(|e| with_path(e, &input.path))?.seconds;
            folders.push(folder);
        }
        let (queries, corpus) = (Rows::open(&folders[..1])?, Rows::open(&folders[1..])?);
        let run = dir.join(format!("run-{split}.trec"));
        let to = Written { path: &run, format: RunFormat::Trec, tag: "retromae-engine" };
        let searched = write_run((self.search, DType::F32), (&queries, &corpus), self.depth(), &to, &|_| {})?;
        let input = Input { path: run.clone(), bytes: None };
        let run = Run::read(&input, Some(RunFormat::Trec))?;
        let evaluation = evaluate(&run, &qrels, &self.options.metrics, &EvalRules::new(Rules::Trec))
            .map_err(|e| with_path(e, &files.qrels.path))?;
        Ok(Judged {
            name: files.name.clone(),
            passages: corpus.len(),
            queries: queries.len(),
            evaluation,
            seconds: [seconds, searched.seconds],
        })
    }
}

/// Names a file where the error names none.
fn with_path(error: Error, path: &Path) -> Error {
    if error.has_path() { error } else { error.path(path) }
}
