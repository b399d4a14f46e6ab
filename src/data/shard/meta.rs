//! `meta.json` of a set: what is in the folder, with digests, and what `tokenize` counted.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, IoContext, Result};
use crate::files::sealed::{self, Sealed};
use crate::files::{self, hex};

use super::file::Shard;
use super::format::{Header, VERSION};
use super::{Facts, Packing, TitleSep};

/// Name of the file that describes a set.
pub const META: &str = "meta.json";

const KIND: &str = "retromae-shards";
/// A million shards need about this much; more is not ours.
const LARGEST: u64 = 128 << 20;

/// Ids of the special tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Special {
    /// `[CLS]`: first token of every sequence.
    pub cls: u32,
    /// `[SEP]`: last token of every sequence.
    pub sep: u32,
    /// `[MASK]`.
    pub mask: u32,
    /// `[PAD]`.
    pub pad: u32,
    /// `[UNK]`.
    pub unk: u32,
}

impl Special {
    pub(super) fn to_array(self) -> [u32; 5] {
        [self.cls, self.sep, self.mask, self.pad, self.unk]
    }
}

/// What `tokenize` read and wrote.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Documents read.
    pub documents: u64,
    /// Sequences written.
    pub sequences: u64,
    /// Tokens written, `[CLS]` and `[SEP]` included.
    pub tokens: u64,
    /// Documents left out because they hold no token.
    pub empty: u64,
    /// Documents cut at the limit (packing `docs`).
    pub truncated: u64,
    /// Documents with the id of an earlier one; left out unless the user kept them.
    pub duplicates: u64,
    /// Ids that were not compared because too many were seen before.
    pub unchecked_ids: u64,
    /// `[UNK]` tokens written.
    pub unknown: u64,
    /// Bytes of text read, titles included.
    pub text_bytes: u64,
}

/// One shard of a set.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ShardEntry {
    pub sequences: u64,
    pub tokens: u64,
    pub header_crc32c: u32,
}

/// A file copied into the set.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct FileDigest {
    pub name: String,
    pub bytes: u64,
    pub crc32c: u32,
}

impl FileDigest {
    /// The file's bytes, their digest checked. Files of a tokenizer: some megabytes.
    pub fn read(&self, dir: &Path) -> Result<Vec<u8>> {
        let path = dir.join(&self.name);
        let file = File::open(&path).at(&path, "cannot open")?;
        let mut bytes = Vec::new();
        // One more byte than there should be: a longer file is told from this one without being read.
        file.take(self.bytes.saturating_add(1)).read_to_end(&mut bytes).at(&path, "cannot read")?;
        if (crc32c::crc32c(&bytes), bytes.len() as u64) != (self.crc32c, self.bytes) {
            return Err(Error::refused(format!("does not match its digest in {META}"))
                .path(&path)
                .remedy("restore the file or tokenize again"));
        }
        Ok(bytes)
    }
}

/// `meta.json`, read and written whole. Its last field is the CRC32C of the bytes before that field.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Meta {
    pub kind: String,
    pub format: u32,
    pub created_by: String,
    pub packing: Packing,
    pub max_length: u32,
    pub title_sep: TitleSep,
    pub vocab_size: u32,
    pub special: Special,
    pub fingerprint: String,
    pub counts: Counts,
    pub files: Vec<FileDigest>,
    pub shards: Vec<ShardEntry>,
}

impl Meta {
    /// A description with this program's kind and version; counts, files and shards are to be filled in.
    pub fn new(header: &Header, fingerprint: String) -> Meta {
        let [cls, sep, mask, pad, unk] = header.special;
        Meta {
            kind: KIND.into(),
            format: VERSION,
            created_by: concat!("retromae-engine ", env!("CARGO_PKG_VERSION")).into(),
            packing: header.packing,
            max_length: header.max_length,
            title_sep: header.title_sep,
            vocab_size: header.vocab_size,
            special: Special { cls, sep, mask, pad, unk },
            fingerprint,
            counts: Counts::default(),
            files: Vec::new(),
            shards: Vec::new(),
        }
    }

    /// Whether `dir` holds a description of this kind; says nothing about its state.
    pub fn is_at(dir: &Path) -> bool {
        let mut head = [0; 256];
        let read = File::open(dir.join(META)).and_then(|mut f| f.read(&mut head)).unwrap_or(0);
        head[..read].windows(KIND.len()).any(|w| w == KIND.as_bytes())
    }

    /// Writes `dir/meta.json` and flushes it.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(META);
        let text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::refused(format!("cannot be described: {e}")).path(&path).remedy("report this"))?;
        files::write_synced(&path, |w| w.write_all(sealed::seal(&text).as_bytes()))
    }

    /// Reads `dir/meta.json`, its digest checked.
    pub fn read(dir: &Path) -> Result<Meta> {
        let path = dir.join(META);
        let bad = |what: String| Error::refused(what).path(&path).remedy("restore the file or tokenize again");
        let file = match File::open(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && dir.is_dir() => {
                return Err(Error::refused(format!("holds no {META}, so it is not an output folder of tokenize"))
                    .path(dir)
                    .remedy("give the folder that tokenize --output named"));
            }
            other => other.at(&path, "cannot open")?,
        };
        let mut text = String::new();
        match file.take(LARGEST).read_to_string(&mut text) {
            Err(e) if e.kind() == std::io::ErrorKind::InvalidData => return Err(bad("is not UTF-8".into())),
            other => other.at(&path, "cannot read")?,
        };
        let foreign = || bad("is not a description of shards by this program".into());
        let body = match sealed::open(&text) {
            Sealed::Whole(body) => body,
            Sealed::Damaged => return Err(bad("does not match its digest".into())),
            Sealed::Foreign => return Err(foreign()),
        };
        let meta: Meta = serde_json::from_str(&body).map_err(|e| bad(format!("cannot be read: {e}")))?;
        if meta.kind != KIND {
            return Err(foreign());
        }
        if meta.format != VERSION {
            return Err(bad(format!("shard format {}; this program reads {VERSION}", meta.format)));
        }
        if meta.files.iter().any(|f| Path::new(&f.name).file_name().is_none_or(|n| n != f.name.as_str())) {
            return Err(bad("names a file outside its folder".into()));
        }
        if meta.shards.is_empty() {
            return Err(bad("names no shard".into()));
        }
        Ok(meta)
    }

    /// Whether a shard was made with the settings described here.
    pub fn agrees_with(&self, header: &Header) -> bool {
        self.packing == header.packing
            && self.max_length == header.max_length
            && self.title_sep == header.title_sep
            && self.vocab_size == header.vocab_size
            && self.special.to_array() == header.special
            && self.fingerprint == hex(&header.fingerprint)
    }

    /// The facts of the set with these shards.
    pub fn facts(&self, shards: &[Shard]) -> Facts {
        let headers = || shards.iter().map(Shard::header);
        Facts {
            shards: shards.len(),
            sequences: headers().map(|h| h.sequences).sum(),
            tokens: headers().map(|h| h.tokens).sum(),
            longest: headers().map(|h| h.longest).max().unwrap_or(0),
            max_length: self.max_length,
            packing: self.packing,
            title_sep: self.title_sep,
            has_ids: headers().any(|h| h.id_bytes.is_some()),
            token_width: headers().map(|h| h.width).max().unwrap_or(0),
            vocab_size: self.vocab_size,
            special: self.special,
            fingerprint: self.fingerprint.clone(),
            counts: self.counts.clone(),
        }
    }
}
