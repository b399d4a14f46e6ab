//! Files of texts to a folder of embeddings.
//!
//! One thread reads and tokenizes some thousand texts ahead while the device works. These are sorted by length, packed without padding,
//! and their embeddings put back into the order of the input; a text's embedding does not depend on its neighbours. Rows go to files of
//! a fixed number of rows (`writer`), so that a run that was killed goes on after its last complete file, and memory does not grow with
//! the input.

mod pyserini;
pub mod source;
mod writer;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Instant;

use self::source::{Source, SourceCounts};
use self::writer::Writer;
use super::embedder::Embedder;
use super::embeddings::{Column, Files, Layout, Meta, Spec};
use super::representation::Embedded;
use crate::data::pairs::texts::{TextBatch, by_length};
use crate::data::shard::Special;
use crate::data::tokenize::stream::Documented;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::files::Disk;

pub use writer::is_begun;

/// What is written, and how.
#[derive(Clone)]
pub struct Job {
    /// What the embeddings are made with.
    pub spec: Spec,
    /// Ids of the tokens put after `[CLS]`.
    pub prefix: Vec<u32>,
    /// The special tokens.
    pub special: Special,
    /// How the files are laid out.
    pub layout: Layout,
    /// Rows of a file while the work goes on; none: 128 MiB.
    pub shard_rows: Option<u64>,
    /// Replaces embeddings that are there.
    pub overwrite: bool,
    /// The vocabulary, for files that spell tokens out.
    pub tokenizer: Arc<Tokenizer>,
}

impl Job {
    /// Rows of a file.
    fn rows_per_file(&self) -> u64 {
        let row = Column::of(&self.spec).iter().map(|column| column.row(&self.spec)).sum::<usize>() as u64;
        self.shard_rows.unwrap_or(((128 << 20) / row).next_multiple_of(1024)).max(1)
    }
}

/// How far the work is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// Rows that are computed or were there.
    pub rows: u64,
    /// Rows in all, where that is known.
    pub total: Option<u64>,
    /// Tokens of the rows that were computed.
    pub tokens: u64,
}

/// What was done.
#[derive(Clone, Debug, Default)]
pub struct Encoded {
    /// Rows in all.
    pub rows: u64,
    /// Rows that an earlier run had written.
    pub resumed: u64,
    /// Tokens of the rows that were computed, `[CLS]` and `[SEP]` included.
    pub tokens: u64,
    /// What was read.
    pub counts: SourceCounts,
    /// From the first text read to the last row written.
    pub seconds: f64,
}

/// Texts that are sorted by length together.
const WINDOW: u64 = 16_384;

/// Some texts and what is known of the input after them.
struct Window {
    texts: Documented,
    digest: String,
    counts: SourceCounts,
}

/// Embeds all of `source` into the folder `output`. Where an earlier run of the same job was interrupted, goes on;
/// where it was not, nothing is done.
///
/// # Errors
/// An input that is refused, a folder of something else, settings or an input that changed since the folder was begun, an embedding that
/// is not finite, or a failed write.
pub fn run(
    disk: &Disk,
    mut source: Source,
    embedder: &mut Embedder,
    job: &Job,
    output: &Path,
    watch: &dyn Fn(Progress),
) -> Result<Encoded> {
    let started = Instant::now();
    if let Some(meta) = writer::complete(disk, output, job)? {
        let same = source.skip(meta.count)? && source.next(1)?.is_none() && source.digest() == meta.source_sha256;
        if !same {
            return Err(Error::refused("holds the embeddings of another input")
                .path(output)
                .remedy("choose another --output or add --overwrite"));
        }
        return Ok(Encoded { rows: meta.count, resumed: meta.count, ..Encoded::default() });
    }
    let mut writer = Writer::open(disk, output, job, &source.describe())?;
    let resumed = writer.rows();
    if resumed > 0 {
        let enough = source.skip(resumed)?;
        if !enough || !writer.agrees_with(&source.digest()) {
            return Err(Error::refused("the input has changed since these embeddings were begun")
                .path(output)
                .remedy("restore the input, or begin anew with --overwrite"));
        }
    }
    let total = source.total();
    let per_file = job.rows_per_file();
    let mut done = Encoded { rows: resumed, resumed, ..Encoded::default() };
    let mut last = (source.digest(), source.counts());
    let (to, windows) = sync_channel::<Result<Window>>(1);
    std::thread::scope(|scope| -> Result<()> {
        scope.spawn(move || read(source, resumed, per_file, &to));
        for window in windows {
            let window = window?;
            let rows = embed(embedder, job, &window.texts, |texts, tokens| {
                done.rows += texts;
                done.tokens += tokens;
                watch(Progress { rows: done.rows, total, tokens: done.tokens });
            })?;
            writer.push(&window.texts.ids, &rows, &window.digest)?;
            last = (window.digest, window.counts);
        }
        Ok(())
    })?;
    let (digest, counts) = last;
    if done.rows == 0 {
        return Err(Error::refused("no documents: the input is empty").remedy("check --input and --format"));
    }
    writer.finish(&digest)?;
    Ok(Encoded { counts, seconds: started.elapsed().as_secs_f64(), ..done })
}

/// The reading thread: windows that end where files of rows end.
fn read(mut source: Source, mut row: u64, per_file: u64, to: &SyncSender<Result<Window>>) {
    loop {
        let left = per_file - row % per_file;
        let window = source.next(left.min(WINDOW) as usize);
        let message = match window {
            Ok(None) => return,
            Ok(Some(texts)) => {
                row += texts.ids.len() as u64;
                Ok(Window { texts, digest: source.digest(), counts: source.counts() })
            }
            Err(e) => Err(e),
        };
        let failed = message.is_err();
        // Nobody listens any more after an error of the device or the disk.
        if to.send(message).is_err() || failed {
            return;
        }
    }
}

/// The embeddings of some texts in their order; `done(texts, tokens)` is told of every batch.
fn embed(embedder: &mut Embedder, job: &Job, texts: &Documented, mut done: impl FnMut(u64, u64)) -> Result<Embedded> {
    let (count, widths, capacity) = (texts.ids.len(), embedder.widths(), embedder.capacity());
    let start = |i: usize| if i == 0 { 0 } else { texts.ends[i - 1] };
    let border = 2 + job.prefix.len();
    let length = |i: usize| (texts.ends[i] - start(i) + border).min(job.spec.max_len);
    let lengths: Vec<usize> = (0..count).map(length).collect();
    let (mut rows, mut named) = (Embedded::zeros(count, widths.0, widths.1), 0u64);
    for members in by_length(&lengths, (capacity.sequences, capacity.tokens)) {
        let mut batch = TextBatch { cu_seqlens: vec![0], ..TextBatch::default() };
        for &i in &members {
            batch.ids.push(job.special.cls);
            batch.ids.extend_from_slice(&job.prefix);
            batch.ids.extend_from_slice(&texts.tokens[start(i)..][..lengths[i] - border]);
            batch.ids.push(job.special.sep);
            batch.cu_seqlens.push(batch.ids.len() as u32);
            batch.samples.push(named);
            named += 1;
        }
        batch.types = vec![0; batch.ids.len()];
        let embedded = embedder.embed(&batch)?;
        for (from, &i) in members.iter().enumerate() {
            rows.set(i, &embedded, from, widths);
            if !rows.is_finite(i, widths) {
                return Err(Error::refused(format!("the embedding of {} is not finite", texts.ids[i]))
                    .remedy("check the model with `verify`, or use --precision fp32"));
            }
        }
        done(members.len() as u64, batch.ids.len() as u64);
    }
    Ok(rows)
}

/// The meta of a complete folder.
fn describe(job: &Job, digest: &str, ids_crc: u32, files: Files) -> Meta {
    Meta::new(job.layout, job.spec.clone(), digest.to_string(), ids_crc, files)
}
