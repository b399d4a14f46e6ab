//! A folder of embeddings: what it says of itself, and its rows, read in order in bounded memory.
//!
//! `meta.json` names the files with their digests, `ids.txt` holds the id of every row, a line each. What a row has lies in columns: the
//! dense embedding, and of a lexical one the token ids and the weights, `[n, K]` each, the largest weight first. Rows are read through the
//! file and not through a map: a file that is cut meanwhile is then an error and not a signal. Digests are checked on the way.

mod columns;
mod reader;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::npy::{FAISS_HEADER, HEADER, Stored};
use super::representation::Representation;
use crate::error::{Error, IoContext, Result};
use crate::files::sealed::{self, Sealed};
use crate::ops::lexical::{MAX_K, MAX_VOCABULARY};
use crate::ops::pool::Pooling;

pub(super) use columns::decode_ids;
pub use columns::{Column, Files};
pub use reader::{Embeddings, block_rows};

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
    /// As `npy`, and lexical embeddings also as JSON lines for Pyserini's impact index: `pyserini/vectors-00000.jsonl`, ….
    Pyserini,
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
    /// What of a text is stored.
    #[serde(default, skip_serializing_if = "Representation::is_cls")]
    pub representation: Representation,
    /// Tokens of a lexical embedding, K; 0 without one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub lexical_top_k: usize,
    /// Tokens in the vocabulary of a lexical embedding; 0 without one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub vocab_size: usize,
    /// Numbers of a dense embedding, W; 0 without one.
    pub dim: usize,
    /// Type of the numbers.
    pub dtype: Stored,
    /// Whether embeddings have length 1.
    pub normalized: bool,
    /// What embeddings are made of.
    pub pooling: Pooling,
    /// Text put before every text.
    pub prefix: String,
    /// Tokens that texts were cut to, `[CLS]` and `[SEP]` included.
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

fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl Spec {
    /// The first thing that makes scores of these embeddings and others meaningless: what, and the two values. Queries may have other
    /// numbers of tokens than passages.
    pub fn difference(&self, other: &Spec) -> Option<(&'static str, String, String)> {
        let of = |spec: &Spec| {
            let dense = spec.representation.dense();
            let pooling = format!("{:?}", spec.pooling).to_lowercase();
            let model = format!("{} ({})", spec.model, spec.model_sha256.get(..12).unwrap_or(&spec.model_sha256));
            let normalisation = if spec.normalized { "on" } else { "off" }.to_string();
            [
                ("the model", spec.model_sha256 == self.model_sha256, model),
                (
                    "the representation",
                    spec.representation == self.representation,
                    spec.representation.name().to_string(),
                ),
                ("the dimension", spec.dim == self.dim, spec.dim.to_string()),
                ("the pooling", !dense || spec.pooling == self.pooling, pooling),
                ("normalisation", !dense || spec.normalized == self.normalized, normalisation),
            ]
        };
        let pair = of(self).into_iter().zip(of(other)).find(|(_, (_, same, _))| !same);
        pair.map(|((what, _, ours), (_, _, theirs))| (what, ours, theirs))
    }

    /// The same of embeddings that are ranked against each other: then no row may have more tokens than another.
    pub fn difference_in_rank(&self, other: &Spec) -> Option<(&'static str, String, String)> {
        let k = |spec: &Spec| spec.lexical_top_k.to_string();
        let tokens = || (self.lexical_top_k != other.lexical_top_k).then(|| ("--lexical-top-k", k(self), k(other)));
        self.difference(other).or_else(tokens)
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
    #[serde(flatten)]
    pub files: Files,
}

impl Meta {
    /// A description by this program.
    pub fn new(layout: Layout, spec: Spec, source_sha256: String, ids_crc: u32, files: impl Into<Files>) -> Meta {
        let files = files.into();
        Meta {
            kind: KIND.into(),
            format: FORMAT,
            created_by: concat!("retromae-engine ", env!("CARGO_PKG_VERSION")).into(),
            layout,
            count: files.rows(&spec),
            spec,
            source_sha256,
            ids_crc,
            files,
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
        let Spec { dim, lexical_top_k: k, vocab_size, representation, .. } = meta.spec;
        let (dense, lexical) = (dim > 0 && dim <= WIDEST, k > 0 && k <= vocab_size && k <= MAX_K);
        let agrees =
            vocab_size <= MAX_VOCABULARY && (dense, lexical) == (representation.dense(), representation.lexical());
        if !agrees || !meta.files.agree(&meta.spec, meta.count) {
            return Err(bad("contradicts itself".into()));
        }
        let inside = |name: &str| Path::new(name).components().all(|c| matches!(c, std::path::Component::Normal(_)));
        if meta.files.all().any(|part| !inside(&part.file)) {
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
