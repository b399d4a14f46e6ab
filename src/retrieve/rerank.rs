//! Reranking: the passages on the lists of a run, scored with their queries by a cross-encoder and put in the order of the scores.
//!
//! Pairs are scored in parts. A finished part is kept beside the output, so that a rerank that was interrupted goes on after it and ends
//! with the same bytes. Inside a part, pairs go through the model by length, and packed: none is padded.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use sha2::{Digest, Sha256};

use super::scorer::Scorer;
use crate::data::pairs::batch::PairTexts;
use crate::data::pairs::findings::Tally;
use crate::data::pairs::ids::IdIndex;
use crate::data::pairs::runs::{ResolvedRun, Run, RunFormat, RunWriter};
use crate::data::pairs::texts::{TextBatch, by_length};
use crate::data::shard::ShardSet;
use crate::data::source::Input;
use crate::error::{Error, Result};
use crate::files::unfinished::{Settings, Unfinished};
use crate::files::{self, Disk};

/// Batches packed ahead of the model.
const AHEAD: usize = 2;

/// The pairs to score.
pub struct Candidates {
    run: Run,
    found: ResolvedRun,
    /// Passages of each list, from its beginning.
    depth: usize,
}

impl Candidates {
    /// The first `depth` passages on each list of `run`, which was read from `input`.
    ///
    /// # Errors
    /// Ids that no text has: how many, and the first.
    pub fn new(
        input: &Input,
        run: Run,
        queries: &Arc<ShardSet>,
        passages: &Arc<ShardSet>,
        depth: Option<usize>,
    ) -> Result<Candidates> {
        let index = |set: &Arc<ShardSet>| IdIndex::new(set.clone()).map_err(|e| e.path(set.dir()));
        let found = run.resolve(input, &index(queries)?, &index(passages)?)?;
        let refuse = |tally: &Tally, what: &str, set: &ShardSet| {
            let first = tally.first.as_deref().unwrap_or_default();
            let cause =
                format!("{} {what} of the run are not in {} (first: {first})", tally.count, set.dir().display());
            Err(Error::refused(cause).path(&input.path).remedy("give the texts that the run was made from"))
        };
        if found.unknown_queries.count > 0 {
            return refuse(&found.unknown_queries, "queries", queries);
        }
        if found.unknown_passages.count > 0 {
            return refuse(&found.unknown_passages, "passages", passages);
        }
        Ok(Candidates { run, found, depth: depth.unwrap_or(usize::MAX) })
    }

    /// Number of queries.
    pub fn queries(&self) -> usize {
        self.found.queries.len()
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        (0..self.queries()).map(|i| self.list(i).len()).sum()
    }

    /// Whether there is no pair; never so after [`Candidates::new`] of a run that was read.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The passages of query `i` of the run.
    fn list(&self, i: usize) -> &[u32] {
        let list = self.found.lists.get(i);
        &list[..list.len().min(self.depth)]
    }

    /// Query and passage of every pair, in the order of the run.
    fn pairs(&self) -> Vec<(u32, u32)> {
        let of = |i: usize| self.list(i).iter().map(move |&passage| (self.found.queries[i], passage));
        (0..self.queries()).flat_map(of).collect()
    }

    /// 64 bits in hex of a digest of all pairs' ids in their order: runs are told apart by it.
    pub fn digest(&self) -> String {
        let mut sha = Sha256::new();
        for (i, query) in self.run.queries().iter().enumerate() {
            for hit in self.run.hits(i).take(self.depth) {
                sha.update(format!("{query}\t{}\n", hit.id));
            }
        }
        files::hex16(&sha.finalize())
    }

    /// The ids of pair `at`, for a message.
    fn name(&self, mut at: usize) -> String {
        for (i, query) in self.run.queries().iter().enumerate() {
            match self.run.hits(i).take(self.depth).nth(at) {
                Some(hit) => return format!("passage {} and query {query}", hit.id),
                None => at -= self.list(i).len(),
            }
        }
        String::new()
    }
}

/// Where the results go, and how.
#[derive(Clone, Debug)]
pub struct Outputs {
    /// The reranked run.
    pub run: PathBuf,
    /// The scores, if they are wanted: `qid pid score`, separated by tabs, in the order of the run that was read.
    pub scores: Option<PathBuf>,
    /// Format of the reranked run.
    pub format: RunFormat,
    /// Name of the run in TREC's format.
    pub tag: String,
    /// Whether older files of these names are replaced.
    pub overwrite: bool,
}

impl Outputs {
    fn paths(&self) -> impl Iterator<Item = &Path> {
        [Some(&self.run), self.scores.as_ref()].into_iter().flatten().map(PathBuf::as_path)
    }

    /// Refuses names that are taken.
    ///
    /// # Errors
    /// A file or folder of that name exists, or both outputs have one name.
    pub fn check(&self) -> Result<()> {
        for path in self.paths() {
            let Ok(meta) = std::fs::symlink_metadata(path) else { continue };
            if meta.is_dir() {
                return Err(Error::refused("is a folder").path(path).remedy("name a file"));
            }
            if !self.overwrite {
                return Err(Error::refused("exists already")
                    .path(path)
                    .remedy("choose another name or add --overwrite"));
            }
        }
        if self.scores.as_ref() == Some(&self.run) {
            return Err(Error::usage("is named twice, for the run and for the scores")
                .path(&self.run)
                .remedy("give --scores another name"));
        }
        Ok(())
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Queries.
    pub queries: usize,
    /// Pairs.
    pub pairs: usize,
    /// Pairs whose scores were there from an interrupted rerank.
    pub resumed: usize,
    /// Scores written smaller than they are, since they equal the one before.
    pub nudged: u64,
}

/// A rerank, begun or going on.
pub struct Rerank<'a> {
    candidates: &'a Candidates,
    outputs: &'a Outputs,
    disk: Disk,
    unfinished: Unfinished,
    resumed: usize,
}

impl<'a> Rerank<'a> {
    /// Begins, or goes on where an equal rerank was interrupted: `settings` are what the scores depend on.
    ///
    /// # Errors
    /// An output that exists, another process at it, or an interrupted rerank with other settings.
    pub fn begin(
        disk: &Disk,
        candidates: &'a Candidates,
        outputs: &'a Outputs,
        mut settings: BTreeMap<String, String>,
    ) -> Result<Self> {
        settings.insert("run".into(), candidates.digest());
        settings.insert("pairs".into(), candidates.len().to_string());
        let settings: Settings = settings;
        let unfinished = Unfinished::begin(disk, &outputs.run, &settings)?;
        if !unfinished.is_done() {
            outputs.check()?;
        }
        let resumed = unfinished.numbers().len();
        Ok(Rerank { candidates, outputs, disk: disk.clone(), unfinished, resumed })
    }

    /// Pairs whose scores are there.
    pub fn scored(&self) -> usize {
        self.unfinished.numbers().len()
    }

    /// Whether all of them are.
    pub fn is_scored(&self) -> bool {
        self.scored() >= self.candidates.len()
    }

    /// Scores all pairs that are left, `part` at a time. `tell` hears of every batch how many pairs are done in all and how many tokens
    /// the batch had; an error of it ends the work, which goes on with the part that was interrupted.
    ///
    /// # Errors
    /// Damaged texts, a score that is not finite, a failure of the device or of the system.
    pub fn score(
        &mut self,
        texts: &PairTexts,
        scorer: &mut Scorer,
        part: usize,
        tell: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<()> {
        let pairs = self.candidates.pairs();
        while self.scored() < pairs.len() {
            let start = self.scored();
            let end = pairs.len().min(start + part.max(1));
            let mut heard = |done: usize, tokens: usize| tell(start + done, tokens);
            let scores = score_part(texts, scorer, &pairs[start..end], &mut heard)?;
            if let Some(at) = scores.iter().position(|score| !score.is_finite()) {
                let cause = format!("the score of {} is {}", self.candidates.name(start + at), scores[at]);
                return Err(Error::refused(cause).remedy("the model has diverged: use another checkpoint"));
            }
            self.unfinished.append(&scores)?;
        }
        Ok(())
    }

    /// Writes the outputs and forgets the parts. All pairs must be scored.
    ///
    /// # Errors
    /// A failure of the system; nothing is then under the outputs' names that is not whole, and the scores are kept.
    pub fn write(mut self) -> Result<Summary> {
        self.unfinished.complete()?;
        let (candidates, outputs, scores) = (self.candidates, self.outputs, self.unfinished.numbers());
        if let Some(path) = &outputs.scores {
            self.replace(path, |w| {
                let mut at = scores.iter();
                for (i, query) in candidates.run.queries().iter().enumerate() {
                    for (hit, score) in candidates.run.hits(i).take(candidates.depth).zip(&mut at) {
                        writeln!(w, "{query}\t{}\t{score:?}", hit.id)?;
                    }
                }
                Ok(())
            })?;
        }
        let mut nudged = 0;
        self.replace(&outputs.run, |w| {
            let (mut writer, mut start) = (RunWriter::new(w, outputs.format, &outputs.tag), 0);
            for (i, query) in candidates.run.queries().iter().enumerate() {
                let own = &scores[start..start + candidates.list(i).len()];
                let mut list: Vec<(&str, f32)> =
                    candidates.run.hits(i).zip(own).map(|(hit, &score)| (hit.id, score)).collect();
                // Stable: where scores are equal the order of the run stays.
                list.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal));
                writer.query(query, list)?;
                start += own.len();
            }
            nudged = writer.nudged();
            Ok(())
        })?;
        let (queries, pairs) = (candidates.queries(), candidates.len());
        let summary = Summary { queries, pairs, resumed: self.resumed, nudged };
        self.unfinished.remove().map(|()| summary)
    }

    fn replace(
        &self,
        path: &Path,
        fill: impl FnOnce(&mut std::io::BufWriter<files::disk::File>) -> std::io::Result<()>,
    ) -> Result<()> {
        // One name, so that what a killed writer left is written over.
        self.disk.replace_by(&files::sibling(path, ".tmp")?, path, fill)
    }
}

/// The scores of some pairs, in their order.
fn score_part(
    texts: &PairTexts,
    scorer: &mut Scorer,
    pairs: &[(u32, u32)],
    tell: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Vec<f32>> {
    let lengths = pairs.iter().map(|&(query, passage)| texts.length(query, passage)).collect::<Result<Vec<_>>>()?;
    let capacity = scorer.capacity();
    let batches = by_length(&lengths, (capacity.sequences, capacity.tokens));
    let mut scores = vec![0.0; pairs.len()];
    std::thread::scope(|scope| {
        let (send, packed) = sync_channel::<Result<TextBatch>>(AHEAD);
        let batches = &batches;
        scope.spawn(move || {
            for batch in batches {
                let named: Vec<_> = batch.iter().map(|&k| (0, pairs[k].0, pairs[k].1)).collect();
                if send.send(texts.pack(&named)).is_err() {
                    // Nobody waits for it any more: the work has ended with an error.
                    return;
                }
            }
        });
        let mut done = 0;
        for (batch, packed) in batches.iter().zip(packed) {
            let packed = packed?;
            for (&k, score) in batch.iter().zip(scorer.scores(&packed)?) {
                scores[k] = score;
            }
            done += batch.len();
            tell(done, packed.tokens())?;
        }
        Ok(())
    })?;
    Ok(scores)
}
