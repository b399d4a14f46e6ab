//! A folder of embeddings: what it says of itself, and its rows, read in order in bounded memory.
//!
//! `meta.json` names the files with their digests, `ids.txt` holds the id of every row, a line each. Rows are read through the file and
//! not through a map: a file that is cut meanwhile is then an error and not a signal. Digests are checked on the way.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::npy::{FAISS_HEADER, HEADER, Number, Stored};
use crate::data::shard::Verified;
use crate::error::{Error, IoContext, Result};
use crate::files::sealed::{self, Sealed};
use crate::ops::pool::Pooling;

/// File that describes the folder.
pub const META: &str = "meta.json";
/// The id of every row.
pub const IDS: &str = "ids.txt";
/// What `meta.json` calls itself.
const KIND: &str = "retromae-engine embeddings";
const FORMAT: u32 = 1;
/// Largest description that is read.
const LARGEST: u64 = 64 << 20;
/// Widest embeddings.
const WIDEST: usize = 1 << 20;

/// How the files are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// `embeddings-00000.npy`, ….
    Npy,
    /// One `index.faiss`, which `faiss.read_index` opens as an `IndexFlatIP`.
    FaissFlat,
    /// One file as the published code reads it: `passage_reps/passage.npy` or `query_reps/query.npy`, and the ids beside it.
    Retromae,
}

/// One file of rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its name in the folder.
    pub file: String,
    /// Rows in it.
    pub rows: u64,
    /// CRC32C of the whole file.
    pub crc: u32,
}

/// What embeddings were made with; equal for all rows of a folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Numbers of an embedding, W.
    pub dim: usize,
    /// Type of the numbers.
    pub dtype: Stored,
    /// Whether embeddings have length 1.
    pub normalized: bool,
    /// What embeddings are made of.
    pub pooling: Pooling,
    /// Text put before every text.
    pub prefix: String,
    /// Tokens that texts were cut to, [CLS] and [SEP] included.
    pub max_len: usize,
    /// `query` or `passage`.
    pub side: String,
    /// What its weights and configuration are told apart by: the first 64 bits of a SHA-256.
    pub model_sha256: String,
    /// The model, as it was named.
    pub model: String,
    /// Arithmetic and device kind they were computed in.
    pub computed: String,
}

impl Spec {
    /// The first thing that makes inner products of these embeddings and others meaningless: what, and the two values.
    pub fn difference(&self, other: &Spec) -> Option<(&'static str, String, String)> {
        let of = |spec: &Spec| {
            let pooling = format!("{:?}", spec.pooling).to_lowercase();
            [
                (
                    "the model",
                    format!("{} ({})", spec.model, spec.model_sha256.get(..12).unwrap_or(&spec.model_sha256)),
                ),
                ("the dimension", spec.dim.to_string()),
                ("the pooling", pooling),
                ("normalisation", if spec.normalized { "on" } else { "off" }.to_string()),
            ]
        };
        let (a, b) = (of(self), of(other));
        let same_model = self.model_sha256 == other.model_sha256;
        let pairs = a.into_iter().zip(b).enumerate();
        pairs
            .into_iter()
            .find(|(i, ((_, a), (_, b)))| if *i == 0 { !same_model } else { a != b })
            .map(|(_, ((what, a), (_, b)))| (what, a, b))
    }
}

/// `meta.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    kind: String,
    format: u32,
    created_by: String,
    /// How the files are laid out.
    pub layout: Layout,
    /// Rows in all.
    pub count: u64,
    /// What the embeddings were made with.
    #[serde(flatten)]
    pub spec: Spec,
    /// SHA-256 of what was embedded.
    pub source_sha256: String,
    /// CRC32C of `ids.txt`.
    pub ids_crc: u32,
    /// The files, in the order of the rows.
    pub shards: Vec<Part>,
}

impl Meta {
    /// A description by this program.
    pub fn new(layout: Layout, spec: Spec, source_sha256: String, ids_crc: u32, shards: Vec<Part>) -> Meta {
        Meta {
            kind: KIND.into(),
            format: FORMAT,
            created_by: concat!("retromae-engine ", env!("CARGO_PKG_VERSION")).into(),
            layout,
            count: shards.iter().map(|part| part.rows).sum(),
            spec,
            source_sha256,
            ids_crc,
            shards,
        }
    }

    /// The sealed text of the file.
    ///
    /// # Errors
    /// A value that JSON cannot hold.
    pub fn text(&self) -> Result<String> {
        let text = serde_json::to_string_pretty(self);
        text.map(|text| sealed::seal(&text))
            .map_err(|e| Error::refused(format!("embeddings cannot be described: {e}")).remedy("report this"))
    }

    /// Reads the description of the folder `dir`, its digest checked.
    ///
    /// # Errors
    /// Not a folder of embeddings, one that is not complete, or a damaged description.
    pub fn read(dir: &Path) -> Result<Meta> {
        let path = dir.join(META);
        let bad = |what: String| Error::refused(what).path(&path).remedy("restore the file or encode again");
        if dir.is_dir() && !path.is_file() {
            let begun = super::encode::is_begun(dir);
            let cause =
                if begun { "was begun and is not complete" } else { "holds no embeddings: there is no meta.json" };
            let remedy =
                if begun { "run the same encode again: it goes on" } else { "give a folder that encode wrote" };
            return Err(Error::refused(cause).path(dir).remedy(remedy));
        }
        let mut text = String::new();
        let file = File::open(&path).at(&path, "cannot open")?;
        match file.take(LARGEST).read_to_string(&mut text) {
            Err(e) if e.kind() == std::io::ErrorKind::InvalidData => return Err(bad("is not UTF-8".into())),
            other => other.at(&path, "cannot read")?,
        };
        let foreign = || bad("is not a description of embeddings by this program".into());
        let body = match sealed::open(&text) {
            Sealed::Whole(body) => body,
            Sealed::Damaged => return Err(bad("does not match its digest".into())),
            Sealed::Foreign => return Err(foreign()),
        };
        let value: serde_json::Value = serde_json::from_str(&body).map_err(|_| foreign())?;
        if value.get("kind").and_then(|kind| kind.as_str()) != Some(KIND) {
            return Err(foreign());
        }
        let meta: Meta = serde_json::from_value(value).map_err(|e| bad(format!("cannot be read: {e}")))?;
        if meta.format != FORMAT {
            return Err(bad(format!("embeddings of format {}; this program reads {FORMAT}", meta.format)));
        }
        let rows = meta.shards.iter().try_fold(0u64, |sum, part| sum.checked_add(part.rows));
        if rows != Some(meta.count) || meta.spec.dim == 0 || meta.spec.dim > WIDEST {
            return Err(bad("contradicts itself".into()));
        }
        let inside = |name: &str| Path::new(name).components().all(|c| matches!(c, std::path::Component::Normal(_)));
        if meta.shards.iter().any(|part| !inside(&part.file)) {
            return Err(bad("names a file outside its folder".into()));
        }
        Ok(meta)
    }

    /// Whether `dir` holds a description of this kind.
    pub fn is_at(dir: &Path) -> bool {
        let mut head = [0; 256];
        let read = File::open(dir.join(META)).and_then(|mut f| f.read(&mut head)).unwrap_or(0);
        head[..read].windows(KIND.len()).any(|w| w == KIND.as_bytes())
    }

    /// Bytes before the first row of a file.
    fn header(&self) -> usize {
        if self.layout == Layout::FaissFlat { FAISS_HEADER } else { HEADER }
    }
}

/// An open folder.
#[derive(Debug)]
pub struct Embeddings {
    dir: PathBuf,
    meta: Meta,
    ids: IdList,
    files: Vec<File>,
}

/// Rows that are read at a time: some megabytes.
pub fn block_rows(dim: usize) -> usize {
    ((16 << 20) / (4 * dim)).clamp(64, 1 << 16)
}

impl Embeddings {
    /// Opens a folder: description and ids are checked, sizes of the files too; the rows when they are read.
    ///
    /// # Errors
    /// Something is missing, damaged or of another size.
    pub fn open(dir: &Path) -> Result<Embeddings> {
        let meta = Meta::read(dir)?;
        let ids = IdList::read(&dir.join(IDS), &meta)?;
        let mut files = Vec::new();
        for part in &meta.shards {
            let path = dir.join(&part.file);
            let file = File::open(&path).at(&path, "cannot open")?;
            let found = file.metadata().at(&path, "cannot look at")?.len();
            let expected = meta.header() as u64 + part.rows * (meta.spec.dim * meta.spec.dtype.size()) as u64;
            if found != expected {
                return Err(Error::refused(format!("has {found} bytes where {META} says {expected}"))
                    .path(&path)
                    .remedy(AGAIN));
            }
            files.push(file);
        }
        Ok(Embeddings { dir: dir.to_path_buf(), meta, ids, files })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the folder says of itself.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// Number of rows.
    pub fn rows(&self) -> u64 {
        self.meta.count
    }

    /// The id of row `row`, which must exist.
    pub fn id(&self, row: u64) -> &str {
        self.ids.get(row as usize)
    }

    /// Hands out all rows in order, some thousand at a time: `each(first, [n, W])`. While a block is worked on the next is read. Digests
    /// are compared at the end of every file.
    ///
    /// # Errors
    /// A failed read, a file that does not match its digest, a number that is not finite or too large for the type, or an error of `each`.
    pub fn each_block<N: Number>(&self, mut each: impl FnMut(u64, &[N]) -> Result<()>) -> Result<()> {
        let (to, blocks) = std::sync::mpsc::sync_channel::<Result<(u64, Vec<N>)>>(1);
        let (back, used) = std::sync::mpsc::channel::<Vec<N>>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut first = 0;
                for part in 0..self.files.len() {
                    let sent = self.read_part(part, |from, bytes| {
                        let mut block = used.try_recv().unwrap_or_default();
                        self.decode(part, from, bytes, &mut block)?;
                        // Nobody listens any more after an error there.
                        Ok(to.send(Ok((first + from, block))).is_ok())
                    });
                    match sent {
                        Ok(true) => first += self.meta.shards[part].rows,
                        Ok(false) => return,
                        Err(e) => return drop(to.send(Err(e))),
                    }
                }
            });
            for block in blocks {
                let (first, rows) = block?;
                each(first, &rows)?;
                // The reader may be done.
                let _ = back.send(rows);
            }
            Ok(())
        })
    }

    /// Reads a file in blocks: `each(first row of the file, bytes)` says whether to go on.
    fn read_part(&self, part: usize, mut each: impl FnMut(u64, &[u8]) -> Result<bool>) -> Result<bool> {
        let (file, of) = (&self.files[part], &self.meta.shards[part]);
        let path = self.dir.join(&of.file);
        let row = self.meta.spec.dim * self.meta.spec.dtype.size();
        let header = self.meta.header();
        let mut buffer = vec![0; header];
        file.read_exact_at(&mut buffer, 0).at(&path, "cannot read")?;
        let mut crc = crc32c::crc32c(&buffer);
        let block = block_rows(self.meta.spec.dim);
        let mut at = 0;
        while at < of.rows {
            let rows = (block as u64).min(of.rows - at);
            buffer.resize(rows as usize * row, 0);
            file.read_exact_at(&mut buffer, header as u64 + at * row as u64).at(&path, "cannot read")?;
            crc = crc32c::crc32c_append(crc, &buffer);
            if !each(at, &buffer)? {
                return Ok(false);
            }
            at += rows;
        }
        if crc != of.crc {
            return Err(Error::refused(format!("does not match its digest in {META}: it was changed or damaged"))
                .path(&path)
                .remedy(AGAIN));
        }
        Ok(true)
    }

    /// Bytes to numbers, all of which must be finite.
    fn decode<N: Number>(&self, part: usize, first: u64, bytes: &[u8], out: &mut Vec<N>) -> Result<()> {
        const PIECE: usize = 1 << 14;
        let (stored, dim) = (self.meta.spec.dtype, self.meta.spec.dim);
        out.resize(bytes.len() / stored.size(), N::default());
        let pieces = out.par_chunks_mut(PIECE).zip(bytes.par_chunks(PIECE * stored.size())).enumerate();
        let wrong = pieces.filter_map(|(i, (out, bytes))| {
            if N::decode(stored, bytes, out) {
                None
            } else {
                out.iter().position(|x| !x.is_finite()).map(|at| i * PIECE + at)
            }
        });
        let Some(at) = wrong.min() else { return Ok(()) };
        let row = first + (at / dim) as u64;
        let before: u64 = self.meta.shards[..part].iter().map(|part| part.rows).sum();
        let id = self.id(before + row);
        let mut number = [0.0];
        stored.decode(&bytes[at * stored.size()..(at + 1) * stored.size()], &mut number);
        let (what, remedy) = match number[0].is_finite() {
            true => {
                (format!("{}, too large for f16, which ends at {}", number[0], half::f16::MAX), "use --precision fp32")
            }
            false => ("a number that is not finite".into(), AGAIN),
        };
        Err(Error::refused(format!("the embedding of {id} (row {row}) holds {what}"))
            .path(self.dir.join(&self.meta.shards[part].file))
            .remedy(remedy))
    }

    /// Checks every digest and every number.
    ///
    /// # Errors
    /// What is damaged first.
    pub fn verify(&self) -> Result<Verified> {
        self.each_block::<f32>(|_, _| Ok(()))?;
        let row = (self.meta.spec.dim * self.meta.spec.dtype.size()) as u64;
        let header = self.meta.header() as u64 * self.files.len() as u64;
        let bytes = header + self.rows() * row + self.ids.text.len() as u64;
        Ok(Verified { files: self.files.len() + 2, bytes })
    }
}

const AGAIN: &str = "restore the file or encode again";

/// The ids, in memory: 8.8 million of MS MARCO take 70 MB.
#[derive(Debug)]
struct IdList {
    text: String,
    /// Where every [`EVERY`]th line begins.
    starts: Vec<usize>,
}

const EVERY: usize = 32;

impl IdList {
    fn read(path: &Path, meta: &Meta) -> Result<IdList> {
        let bytes = std::fs::read(path).at(path, "cannot read")?;
        if crc32c::crc32c(&bytes) != meta.ids_crc {
            return Err(Error::refused(format!("does not match its digest in {META}: it was changed or damaged"))
                .path(path)
                .remedy(AGAIN));
        }
        let text = String::from_utf8(bytes).map_err(|_| Error::refused("is not UTF-8").path(path).remedy(AGAIN))?;
        let (mut starts, mut line) = (Vec::new(), 0u64);
        let mut start = 0;
        for (end, _) in text.match_indices('\n') {
            if line.is_multiple_of(EVERY as u64) {
                starts.push(start);
            }
            (line, start) = (line + 1, end + 1);
        }
        if line != meta.count || start != text.len() {
            return Err(Error::refused(format!("has {line} lines for {} rows", meta.count)).path(path).remedy(AGAIN));
        }
        Ok(IdList { text, starts })
    }

    fn get(&self, row: usize) -> &str {
        self.text[self.starts[row / EVERY]..].lines().nth(row % EVERY).unwrap_or_default()
    }
}
