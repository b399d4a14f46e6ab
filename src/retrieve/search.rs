//! Exact search: for every query the rows of greatest score, in bounded memory: inner product of dense embeddings, of lexical ones, or the
//! sum of both.
//!
//! Queries come in groups whose candidates fit a budget; for each group all rows of the corpus are read once. Scores descend, equal ones
//! are ordered by row; folders follow each other in the order given. On a GPU rows are uploaded block by block, as f32 or as f16: what is
//! stored as f16 then goes there as it is, and f32 is rounded. Lexical embeddings are searched on the CPU.

use std::io;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::time::Instant;

use ahash::AHashSet;

use super::embeddings::{Embeddings, block_rows};
use super::joined::{Joined, Widths};
use super::npy::{Number, Stored};
use super::representation::{Embedded, Representation};
use super::topk::TopK;
use crate::data::pairs::runs::{RunFormat, RunWriter};
use crate::device::{DType, Device, Tensor};
use crate::error::{Error, IoContext, Result};
use crate::files;
use crate::ops::topk;

/// Bytes that the candidates of a group of queries may take.
const BUDGET: usize = 512 << 20;

/// Folders of embeddings as one list of rows.
#[derive(Debug)]
pub struct Rows {
    folders: Vec<Embeddings>,
    /// First row of each folder, and the number of all rows.
    first: Vec<u64>,
}

impl Rows {
    /// Opens the folders.
    ///
    /// # Errors
    /// What [`Embeddings::open`] refuses, more rows than can be numbered, or folders that do not belong together.
    pub fn open(dirs: &[PathBuf]) -> Result<Rows> {
        let folders = dirs.iter().map(|dir| Embeddings::open(dir)).collect::<Result<Vec<_>>>()?;
        let mut first = vec![0u64];
        for folder in &folders {
            first.push(first[first.len() - 1] + folder.rows());
        }
        let rows = Rows { folders, first };
        if rows.len() > u64::from(u32::MAX) {
            return Err(Error::refused(format!("{} rows are more than can be numbered", rows.len()))
                .remedy("search the folders one by one"));
        }
        for folder in rows.folders.iter().skip(1) {
            rows.check(folder, true)?;
        }
        Ok(rows)
    }

    /// Number of rows.
    pub fn len(&self) -> u64 {
        self.first[self.first.len() - 1]
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The folders.
    pub fn folders(&self) -> &[Embeddings] {
        &self.folders
    }

    /// What is stored of a row.
    pub fn representation(&self) -> Representation {
        self.folders.first().map_or(Representation::Cls, |folder| folder.meta().spec.representation)
    }

    /// Numbers and tokens of a row, W and K; 0 for what it has not.
    pub fn widths(&self) -> (usize, usize) {
        self.folders.first().map_or((0, 0), |folder| (folder.meta().spec.dim, folder.meta().spec.lexical_top_k))
    }

    /// Folder of row `row`, which must exist, and its number there.
    pub fn place(&self, row: u64) -> (usize, u64) {
        let folder = self.first.partition_point(|&first| first <= row) - 1;
        (folder, row - self.first[folder])
    }

    /// The id of row `row`, which must exist.
    pub fn id(&self, row: u64) -> &str {
        let (folder, row) = self.place(row);
        self.folders[folder].id(row)
    }

    /// Whether all files hold f16.
    pub fn are_f16(&self) -> bool {
        self.folders.iter().all(|folder| folder.meta().spec.dtype == Stored::F16)
    }

    /// Hands out all rows in order, some thousand at a time.
    ///
    /// # Errors
    /// As [`Embeddings::each_block`].
    pub fn each_block<N: Number>(&self, mut each: impl FnMut(u64, &Embedded<N>) -> Result<()>) -> Result<()> {
        for (folder, &first) in self.folders.iter().zip(&self.first) {
            folder.each_block(|row, block| each(first + row, block))?;
        }
        Ok(())
    }

    /// Refuses a folder whose embeddings cannot be compared with these, or ranked beside them.
    fn check(&self, other: &Embeddings, beside: bool) -> Result<()> {
        let Some(first) = self.folders.first() else { return Ok(()) };
        let (ours, theirs) = (&first.meta().spec, &other.meta().spec);
        let difference = if beside { ours.difference_in_rank(theirs) } else { ours.difference(theirs) };
        let Some((what, ours, theirs)) = difference else { return Ok(()) };
        Err(Error::refused(format!("differs in {what}: {theirs}; that of {} is {ours}", first.dir().display()))
            .path(other.dir())
            .remedy("encode queries and passages with the same model and settings"))
    }
}

/// What a search found.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Searched {
    /// Queries.
    pub queries: u64,
    /// Rows that were searched for each.
    pub rows: u64,
    /// Rows on all lists.
    pub hits: u64,
    /// Scores written smaller than they are, to keep the order of equal ones.
    pub nudged: u64,
    /// Seconds.
    pub seconds: f64,
}

/// Calls `each(query's id, list)` for every query in order: numbers and scores of the best `k` rows.
///
/// # Errors
/// Embeddings that do not belong together or are damaged, lexical ones on a GPU, two queries with one id, or an error of `each`.
pub fn search(
    target: Target,
    (queries, corpus): (&Rows, &Rows),
    k: usize,
    watch: &dyn Fn(u64),
    each: impl FnMut(&str, &[(u32, f32)]) -> Result<()>,
) -> Result<()> {
    queries.folders().iter().try_for_each(|folder| corpus.check(folder, false))?;
    if corpus.representation().lexical() {
        on_cpu(target.0, corpus.representation())?;
        return search_in::<Joined>(target.0, (queries, corpus), k, watch, each);
    }
    match target {
        (Device::Cpu, _) => search_in::<TopK>(target.0, (queries, corpus), k, watch, each),
        (_, DType::F16) => search_in::<OnGpu<half::f16>>(target.0, (queries, corpus), k, watch, each),
        _ => search_in::<OnGpu<f32>>(target.0, (queries, corpus), k, watch, each),
    }
}

/// Refuses a GPU where embeddings are lexical.
///
/// # Errors
/// They are, and it is one.
pub fn on_cpu(device: Device, representation: Representation) -> Result<()> {
    match device.is_gpu() && representation.lexical() {
        true => Err(Error::usage(format!(
            "{} embeddings on a GPU: lexical ones are searched on the CPU",
            representation.name()
        ))
        .remedy("use --device cpu")),
        false => Ok(()),
    }
}

fn search_in<B: Best>(
    device: Device,
    (queries, corpus): (&Rows, &Rows),
    k: usize,
    watch: &dyn Fn(u64),
    mut each: impl FnMut(&str, &[(u32, f32)]) -> Result<()>,
) -> Result<()> {
    let widths = queries.widths();
    let vocabulary = corpus.folders.first().map_or(0, |folder| folder.meta().spec.vocab_size);
    let of = Widths { dim: widths.0, tokens: [widths.1, corpus.widths().1], vocabulary };
    let group = (BUDGET / (size_of::<B::Number>() * widths.0 + 16 * widths.1 + 16 * k + 64)).max(64);
    let (mut waiting, mut begun, mut seen) = (Embedded::<B::Number>::default(), 0, AHashSet::new());
    let mut flush = |waiting: &mut Embedded<B::Number>, begun: &mut u64| -> Result<()> {
        let lists = one_group::<B>(device, (waiting, of), corpus, k)?;
        for (list, query) in lists.iter().zip(*begun..) {
            let id = queries.id(query);
            if !seen.insert(id) {
                return Err(Error::refused(format!("two queries have the id {id}"))
                    .remedy("give the folders of different queries"));
            }
            // Scores that are no number are on no list.
            let complete = list.len() as u64 == corpus.len().min(k as u64);
            if !complete || list.iter().any(|hit| !hit.1.is_finite()) {
                return Err(Error::refused(format!("inner products of query {id} are not finite"))
                    .remedy("encode with --normalize, or check the model"));
            }
            each(id, list)?;
        }
        *begun += lists.len() as u64;
        waiting.clear();
        watch(*begun);
        Ok(())
    };
    queries.each_block(|_, block| {
        let count = block.len(widths);
        for first in (0..count).step_by(group) {
            let piece = first..count.min(first + group);
            let held = waiting.len(widths);
            if held > 0 && held + piece.len() > group {
                flush(&mut waiting, &mut begun)?;
            }
            waiting.append(block, piece, widths);
        }
        Ok(())
    })?;
    if waiting.len(widths) == 0 { Ok(()) } else { flush(&mut waiting, &mut begun) }
}

/// Where a search computes, and as what the numbers are stored there: F32 or F16, on the CPU F32.
pub type Target = (Device, DType);

/// The search of a group of queries.
trait Best: Sized {
    /// What numbers are read as.
    type Number: Number;
    /// The best `k` of no rows, for `queries`.
    fn begin(device: Device, queries: &Embedded<Self::Number>, of: Widths, k: usize) -> Result<Self>;
    /// Goes over `rows`, which are numbered from `first` on.
    fn take(&mut self, first: u32, rows: &Embedded<Self::Number>);
    /// Row and score of each query's best.
    fn lists(self) -> Result<Vec<Vec<(u32, f32)>>>;
}

impl Best for TopK {
    type Number = f32;

    fn begin(_: Device, queries: &Embedded, of: Widths, k: usize) -> Result<Self> {
        Ok(TopK::new(&queries.dense, of.dim, k))
    }

    fn take(&mut self, first: u32, rows: &Embedded) {
        self.add(first, &rows.dense);
    }

    fn lists(self) -> Result<Vec<Vec<(u32, f32)>>> {
        Ok(self.finish())
    }
}

impl Best for Joined {
    type Number = f32;

    fn begin(_: Device, queries: &Embedded, of: Widths, k: usize) -> Result<Self> {
        Ok(Joined::new(queries, of, k))
    }

    fn take(&mut self, first: u32, rows: &Embedded) {
        self.add(first, rows);
    }

    fn lists(self) -> Result<Vec<Vec<(u32, f32)>>> {
        Ok(self.finish())
    }
}

/// On a GPU, stored as `N`.
struct OnGpu<N> {
    device: Device,
    best: topk::TopK,
    /// Room for a block of rows.
    rows: Tensor,
    shape: topk::Shape,
    stored: PhantomData<N>,
}

impl<N: Number> Best for OnGpu<N> {
    type Number = N;

    fn begin(device: Device, queries: &Embedded<N>, of: Widths, k: usize) -> Result<Self> {
        let (queries, width) = (&queries.dense[..], of.dim);
        let shape = topk::Shape { queries: queries.len() / width, width, k };
        let mut best = topk::TopK::new(device, shape)?;
        best.start(&device.tensor(queries), shape.queries);
        let rows = device.zeros(N::DTYPE, block_rows(width) * width);
        Ok(OnGpu { device, best, rows, shape, stored: PhantomData })
    }

    fn take(&mut self, first: u32, rows: &Embedded<N>) {
        self.rows.upload(&rows.dense);
        self.best.add(&self.rows, rows.dense.len() / self.shape.width, first);
    }

    fn lists(mut self) -> Result<Vec<Vec<(u32, f32)>>> {
        let (scores, rows) = self.best.results();
        self.device.check()?;
        let lists = rows.chunks_exact(self.shape.k).zip(scores.chunks_exact(self.shape.k));
        // Places that no row took hold the largest number.
        let list = |(rows, scores): (&[u32], &[f32])| {
            let hits = rows.iter().copied().zip(scores.iter().copied());
            hits.take_while(|hit| hit.0 != u32::MAX).collect()
        };
        Ok(lists.map(list).collect())
    }
}

fn one_group<B: Best>(
    device: Device,
    (queries, of): (&Embedded<B::Number>, Widths),
    corpus: &Rows,
    k: usize,
) -> Result<Vec<Vec<(u32, f32)>>> {
    let mut best = B::begin(device, queries, of, k)?;
    corpus.each_block(|first, rows| {
        best.take(first as u32, rows);
        Ok(())
    })?;
    best.lists()
}

/// How a run is written.
#[derive(Clone, Debug)]
pub struct Written<'a> {
    /// Where.
    pub path: &'a Path,
    /// In which form.
    pub format: RunFormat,
    /// The run's name in TREC's form.
    pub tag: &'a str,
}

/// What takes the list of a query: the query's id, and of each passage id and score.
pub(super) type Emit<'a> = dyn FnMut(&str, &[(&str, f32)]) -> Result<()> + 'a;

/// Searches, and writes the lists.
///
/// # Errors
/// As [`search`], a passage with the id of another one, or a failed write; the file then is as it was before.
pub fn write_run(
    target: Target,
    (queries, corpus): (&Rows, &Rows),
    k: usize,
    to: &Written<'_>,
    watch: &dyn Fn(u64),
) -> Result<Searched> {
    write_lists(to, corpus.len(), |emit| {
        search(target, (queries, corpus), k, watch, |query, list| {
            let list: Vec<_> = list.iter().map(|&(row, score)| (corpus.id(u64::from(row)), score)).collect();
            emit(query, &list)
        })
    })
}

/// Writes the lists, of `rows` rows, that `find` hands out.
pub(super) fn write_lists(
    to: &Written<'_>,
    rows: u64,
    find: impl FnOnce(&mut Emit<'_>) -> Result<()>,
) -> Result<Searched> {
    let started = Instant::now();
    files::probe(to.path)?;
    let mut done = Searched { rows, ..Searched::default() };
    let mut failed = None;
    let written = files::write_atomic(to.path, |w| {
        let mut writer = RunWriter::new(w, to.format, to.tag);
        let found = find(&mut |query, list| {
            let mut ids = AHashSet::with_capacity(list.len());
            if let Some((twice, _)) = list.iter().find(|(id, _)| !ids.insert(*id)) {
                return Err(Error::refused(format!("two passages of the corpus have the id {twice}"))
                    .remedy("give each folder of the corpus once, without repeated passages"));
            }
            (done.queries, done.hits) = (done.queries + 1, done.hits + list.len() as u64);
            writer.query(query, list.iter().copied()).at(to.path, "cannot write")
        });
        done.nudged = writer.nudged();
        found.map_err(|e| {
            failed = Some(e);
            io::Error::other("search failed")
        })
    });
    match failed {
        Some(e) => Err(e),
        None => written.map(|()| Searched { seconds: started.elapsed().as_secs_f64(), ..done }),
    }
}
