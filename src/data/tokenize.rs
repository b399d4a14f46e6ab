//! From documents to shards: one thread reads, several encode, one writes in the order read.
//!
//! Between the threads lie chunks of documents of bounded total size, so that memory does not grow with the input, however slow one
//! of the three is. The output depends on the input and the options alone, never on the number of threads.

mod ids;
mod queue;
pub mod stream;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use crate::error::{Error, Kind, Result};

use super::shard::{Counts, Packing, SetSpec, SetWriter, TitleSep};
use super::source::{self, Document, Format, Input};
use super::tokenizer::{Encoder, Token, Tokenizer};
use ids::Seen;
use queue::Budget;

/// Settings of one run.
#[derive(Clone, Debug)]
pub struct Options {
    /// How texts become sequences.
    pub packing: Packing,
    /// Limit that sequences are cut at, `[CLS]` and `[SEP]` included; at least 3.
    pub max_length: u32,
    /// How titles are joined.
    pub title_sep: TitleSep,
    /// A shard is full with this many tokens.
    pub shard_tokens: usize,
    /// Encoding threads; at least 1.
    pub threads: usize,
    /// Overrules the detection of formats.
    pub format: Option<Format>,
    /// Plain text is separated by blank lines.
    pub blank_lines: bool,
    /// Documents whose id was seen before are kept, too.
    pub keep_duplicates: bool,
}

/// What a run tells while it works.
#[derive(Debug)]
pub enum Event<'a> {
    /// A file was opened and is read as this.
    Opened(&'a Path, Format),
    /// A file held no document.
    NoDocuments(&'a Path),
    /// An id was seen before; told once.
    Duplicate(&'a Path, &'a str),
    /// Totals so far: documents, bytes of text, bytes consumed on disk.
    Progress(u64, u64, u64),
}

/// Takes events; called from several threads.
pub type Watch<'a> = &'a (dyn Fn(Event<'_>) + Sync);

/// Bytes of text in one chunk, unless one document has more.
const CHUNK_BYTES: usize = 256 << 10;
/// Documents in one chunk.
const CHUNK_DOCUMENTS: usize = 4096;
/// Bytes of text between reader and writer.
const IN_FLIGHT: usize = 64 << 20;
/// Refused records after which reading stops.
const ERRORS: usize = 100_000;

/// Documents on their way to an encoder.
struct Chunk {
    number: u64,
    bytes: usize,
    documents: Vec<Document>,
}

/// Encoded documents on their way to the writer.
struct Encoded {
    number: u64,
    bytes: usize,
    tokens: Vec<Token>,
    documents: Vec<Extent>,
}

/// Where an encoded document's tokens end.
struct Extent {
    id: String,
    end: usize,
}

/// What the reader counted.
#[derive(Default)]
struct ReadCounts {
    duplicates: u64,
    dropped: u64,
    unchecked_ids: u64,
}

/// Reads `inputs` and writes a set of shards into `dir`, which must exist and be empty.
pub fn run(inputs: &[Input], tokenizer: &Tokenizer, options: &Options, dir: &Path, watch: Watch<'_>) -> Result<Counts> {
    let spec = SetSpec {
        max_length: options.max_length,
        vocab_size: tokenizer.vocab_size(),
        special: tokenizer.special(),
        packing: options.packing,
        title_sep: options.title_sep,
        fingerprint: tokenizer.fingerprint(),
        shard_tokens: options.shard_tokens,
    };
    let mut writer = SetWriter::new(dir, &spec);
    for (name, bytes) in tokenizer.files() {
        writer.add_file(name, bytes)?;
    }
    let read_bytes = Arc::new(AtomicU64::new(0));
    let budget = Budget::new(IN_FLIGHT);
    let (to_encode, chunks) = sync_channel::<Chunk>(options.threads);
    let (encoded_to, encoded) = sync_channel::<Result<Encoded>>(options.threads);
    let chunks = Arc::new(Mutex::new(chunks));
    let (read, mut counts) = std::thread::scope(|scope| {
        let reader = {
            let mut reader = Reader {
                options,
                budget: &budget,
                out: to_encode,
                number: 0,
                seen: Seen::default(),
                watch,
                read_bytes: read_bytes.clone(),
            };
            scope.spawn(move || reader.run(inputs))
        };
        for _ in 0..options.threads {
            let (chunks, encoded_to) = (chunks.clone(), encoded_to.clone());
            scope.spawn(move || encode_chunks(tokenizer, options, &chunks, &encoded_to));
        }
        // The threads hold the only ends of the channels: when they stop, the channels close.
        drop((chunks, encoded_to));
        let written = write_all(encoded, &mut writer, options, tokenizer, &budget, &|documents, text| {
            watch(Event::Progress(documents, text, read_bytes.load(Ordering::Relaxed)));
        });
        budget.close();
        let read =
            reader.join().unwrap_or_else(|_| Err(Error::refused("the reading thread failed").remedy("report this")));
        (read, written)
    });
    if let (Err(e), Err(w)) = (&read, &counts) {
        // A full disk matters more than what the reader then saw.
        return Err(if w.kind() == Kind::Io { w.clone() } else { e.clone() });
    }
    let read = read?;
    let counts = counts.as_mut().map_err(|e| e.clone())?;
    counts.documents += read.dropped;
    counts.duplicates = read.duplicates;
    counts.unchecked_ids = read.unchecked_ids;
    if counts.sequences == 0 {
        return Err(nothing(inputs, counts));
    }
    writer.finish(counts.clone())?;
    Ok(counts.clone())
}

fn nothing(inputs: &[Input], counts: &Counts) -> Error {
    let path = inputs.first().map_or_else(|| PathBuf::from("-"), |i| i.path.clone());
    let error = if counts.documents == 0 {
        Error::refused("no documents: the input is empty")
    } else {
        Error::refused(format!("none of the {} documents holds any text", counts.documents))
    };
    error.path(path).remedy("check --input and --format")
}

/// The reading thread.
struct Reader<'a> {
    options: &'a Options,
    budget: &'a Budget,
    out: SyncSender<Chunk>,
    number: u64,
    seen: Seen,
    watch: Watch<'a>,
    read_bytes: Arc<AtomicU64>,
}

impl Reader<'_> {
    fn run(&mut self, inputs: &[Input]) -> Result<ReadCounts> {
        let mut counts = ReadCounts::default();
        let mut errors = Vec::new();
        for input in inputs {
            match self.file(input, &mut counts, &mut errors) {
                Ok(true) => {}
                Ok(false) => break,
                Err(e) if errors.is_empty() => return Err(e),
                Err(e) => {
                    errors.push(e);
                    break;
                }
            }
        }
        counts.unchecked_ids = self.seen.unchecked();
        if errors.is_empty() { Ok(counts) } else { Err(Error::several(errors)) }
    }

    /// Reads one file. Refused records go to `errors`, and reading goes on to count them; anything else is returned. Gives whether
    /// to go on with the next file.
    fn file(&mut self, input: &Input, counts: &mut ReadCounts, errors: &mut Vec<Error>) -> Result<bool> {
        let before = self.read_bytes.load(Ordering::Relaxed);
        let own = Arc::new(AtomicU64::new(0));
        let (format, documents) = source::open(input, self.options.format, self.options.blank_lines, own.clone())?;
        (self.watch)(Event::Opened(&input.path, format));
        let mut chunk = Vec::new();
        let (mut bytes, mut found) = (0, false);
        for document in documents {
            found = true;
            let document = match document {
                Ok(document) => document,
                Err(e) if e.kind() == Kind::Refused && errors.len() < ERRORS => {
                    errors.push(e);
                    continue;
                }
                Err(e) => return Err(e),
            };
            if let Some(id) = document.id.as_deref().filter(|id| self.seen.again(id)) {
                if counts.duplicates == 0 {
                    (self.watch)(Event::Duplicate(&input.path, id));
                }
                counts.duplicates += 1;
                if !self.options.keep_duplicates {
                    counts.dropped += 1;
                    continue;
                }
            }
            if !errors.is_empty() {
                continue;
            }
            bytes += document.text.len() + document.title.as_ref().map_or(0, String::len);
            chunk.push(document);
            if bytes >= CHUNK_BYTES || chunk.len() >= CHUNK_DOCUMENTS {
                self.read_bytes.store(before + own.load(Ordering::Relaxed), Ordering::Relaxed);
                if !self.send(std::mem::take(&mut chunk), std::mem::take(&mut bytes)) {
                    return Ok(false);
                }
            }
        }
        if !found {
            (self.watch)(Event::NoDocuments(&input.path));
        }
        self.read_bytes.store(before + own.load(Ordering::Relaxed), Ordering::Relaxed);
        Ok(chunk.is_empty() || self.send(chunk, bytes))
    }

    /// Hands a chunk on; false when nobody takes it any more.
    fn send(&mut self, documents: Vec<Document>, bytes: usize) -> bool {
        let chunk = Chunk { number: self.number, bytes, documents };
        self.number += 1;
        self.budget.take(bytes) && self.out.send(chunk).is_ok()
    }
}

/// An encoding thread.
fn encode_chunks(
    tokenizer: &Tokenizer,
    options: &Options,
    chunks: &Mutex<Receiver<Chunk>>,
    out: &SyncSender<Result<Encoded>>,
) {
    let mut encoder = tokenizer.encoder();
    let sep = tokenizer.special().sep;
    loop {
        // A poisoned lock means that another encoder panicked; its panic ends the run.
        let next = chunks.lock().map(|receiver| receiver.recv());
        let Ok(Ok(chunk)) = next else { return };
        let encoded = encode_chunk(&mut encoder, options, sep, chunk);
        let failed = encoded.is_err();
        if out.send(encoded).is_err() || failed {
            return;
        }
    }
}

fn encode_chunk(encoder: &mut Encoder<'_>, options: &Options, sep: u32, chunk: Chunk) -> Result<Encoded> {
    let mut out = Encoded { number: chunk.number, bytes: chunk.bytes, tokens: Vec::new(), documents: Vec::new() };
    for document in chunk.documents {
        // One token past the limit tells that something was cut.
        let limit = match options.packing {
            Packing::Docs => out.tokens.len() + options.max_length as usize - 1,
            Packing::Blocks => usize::MAX,
        };
        let (title, text) = (document.title.as_deref(), document.text.as_str());
        encode_document(encoder, options.title_sep, title, text, limit, sep, &mut out.tokens)?;
        out.documents.push(Extent { id: document.id.unwrap_or_default(), end: out.tokens.len() });
    }
    Ok(out)
}

/// Appends the tokens of a document, its title joined, without `[CLS]` and the last `[SEP]`, until `out` holds `limit` tokens or more.
pub(super) fn encode_document(
    encoder: &mut Encoder<'_>,
    title_sep: TitleSep,
    title: Option<&str>,
    text: &str,
    limit: usize,
    sep: u32,
    out: &mut Vec<Token>,
) -> Result<()> {
    match (title_sep, title.map(str::trim).filter(|t| !t.is_empty())) {
        (TitleSep::None, _) | (_, None) => encoder.encode(text, limit, out),
        (TitleSep::Space, Some(title)) => encoder.encode(format!("{title} {text}").trim_end(), limit, out),
        (TitleSep::Sep, Some(title)) => {
            encoder.encode(title, limit, out)?;
            out.push(Token::new(sep, true));
            encoder.encode(text, limit, out)
        }
    }
}

/// Writes the chunks in the order of their numbers, until the encoders stop.
fn write_all(
    encoded: Receiver<Result<Encoded>>,
    writer: &mut SetWriter,
    options: &Options,
    tokenizer: &Tokenizer,
    budget: &Budget,
    progress: &dyn Fn(u64, u64),
) -> Result<Counts> {
    let mut counts = Counts::default();
    let mut early = BTreeMap::new();
    let mut next = 0;
    for chunk in encoded {
        let chunk = chunk?;
        early.insert(chunk.number, chunk);
        while let Some(chunk) = early.remove(&next) {
            write_chunk(&chunk, writer, options, tokenizer, &mut counts)?;
            budget.give(chunk.bytes);
            progress(counts.documents, counts.text_bytes);
            next += 1;
        }
    }
    Ok(counts)
}

fn write_chunk(
    chunk: &Encoded,
    writer: &mut SetWriter,
    options: &Options,
    tokenizer: &Tokenizer,
    counts: &mut Counts,
) -> Result<()> {
    let special = tokenizer.special();
    let room = options.max_length as usize - 2;
    let mut start = 0;
    for Extent { id, end } in &chunk.documents {
        let tokens = &chunk.tokens[start..*end];
        start = *end;
        counts.documents += 1;
        counts.empty += u64::from(tokens.is_empty());
        let pieces = match options.packing {
            Packing::Docs => {
                counts.truncated += u64::from(tokens.len() > room);
                &tokens[..tokens.len().min(room)]
            }
            Packing::Blocks => tokens,
        };
        for piece in pieces.chunks(room) {
            // A sequence cut inside a word begins with what is, to it, a word.
            let inner = piece.iter().enumerate().map(|(i, t)| (t.id(), i == 0 || t.starts_word()));
            let all = std::iter::once((special.cls, true)).chain(inner).chain([(special.sep, true)]);
            writer.push(id, all)?;
            counts.sequences += 1;
            counts.tokens += piece.len() as u64 + 2;
            counts.unknown += piece.iter().filter(|t| t.id() == special.unk).count() as u64;
        }
    }
    counts.text_bytes += chunk.bytes as u64;
    Ok(())
}
