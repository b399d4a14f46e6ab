//! Token shards: what `tokenize` writes and everything else reads.
//!
//! A set is a folder: `shard-00000.rms` … (see [`mod@format`]), the tokenizer's files byte for byte, and `meta.json`, which names them
//! all with their digests. Shards are memory-mapped; opening a set reads one header per shard, whatever the number of texts. Every
//! 64 KiB block is checked against its CRC32C when it is first touched, so that a flipped bit is an error and never a training text.

mod file;
pub mod format;
mod meta;
mod writer;

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::data::masking::Vocabulary;
use crate::error::{Error, IoContext, Result};

use file::Shard;
pub use meta::{Counts, META, Special};
use meta::{FileDigest, Meta, ShardEntry};
pub use writer::{SetSpec, SetWriter};

/// How texts become sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// One text, one sequence, cut at the limit.
    Docs,
    /// A text is cut into as many sequences as it needs; no token is lost, and no two texts share a sequence.
    Blocks,
}

/// How a title is joined to its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum TitleSep {
    /// Titles are left out.
    None,
    /// `title + " " + text`.
    Space,
    /// `title [SEP] text`.
    Sep,
}

impl Packing {
    fn code(self) -> u8 {
        self as u8
    }

    fn from_code(code: u32) -> Option<Self> {
        [Packing::Docs, Packing::Blocks].into_iter().find(|p| u32::from(p.code()) == code)
    }
}

impl TitleSep {
    fn code(self) -> u8 {
        self as u8
    }

    fn from_code(code: u32) -> Option<Self> {
        [TitleSep::None, TitleSep::Space, TitleSep::Sep].into_iter().find(|t| u32::from(t.code()) == code)
    }
}

/// What a set of shards holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Facts {
    /// Number of shard files.
    pub shards: usize,
    /// Number of sequences.
    pub sequences: u64,
    /// Number of tokens, `[CLS]` and `[SEP]` included.
    pub tokens: u64,
    /// Tokens of the longest sequence.
    pub longest: u32,
    /// Limit that sequences were cut at, `[CLS]` and `[SEP]` included.
    pub max_length: u32,
    /// How texts became sequences.
    pub packing: Packing,
    /// How titles were joined.
    pub title_sep: TitleSep,
    /// Whether any text has an id.
    pub has_ids: bool,
    /// Bytes of a token: 2 or 4.
    pub token_width: u32,
    /// Tokens in the vocabulary; every token id is below it.
    pub vocab_size: u32,
    /// The special tokens' ids.
    pub special: Special,
    /// SHA-256, in hex, of what decides the token ids of a text.
    pub fingerprint: String,
    /// What `tokenize` read and wrote.
    pub counts: Counts,
}

impl Facts {
    /// What masking must know of the vocabulary.
    pub fn vocabulary(&self) -> Vocabulary {
        let Special { cls, sep, mask, pad, unk } = self.special;
        Vocabulary { size: self.vocab_size, cls, sep, pad, mask, unk: Some(unk) }
    }
}

/// What [`ShardSet::verify`] checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Number of files.
    pub files: usize,
    /// Bytes of all of them.
    pub bytes: u64,
}

/// An output folder of `tokenize`, memory-mapped.
#[derive(Debug)]
pub struct ShardSet {
    dir: PathBuf,
    shards: Vec<Shard>,
    /// First sequence of every shard; the last entry is the number of sequences.
    first: Vec<u64>,
    facts: Facts,
    files: Vec<FileDigest>,
}

impl ShardSet {
    /// Opens a folder in time proportional to its number of shards. A missing, foreign, incomplete or damaged header is refused;
    /// what lies behind the headers is checked on first use, or by [`verify`](ShardSet::verify).
    pub fn open(dir: &Path) -> Result<ShardSet> {
        let meta = Meta::read(dir)?;
        let shards: Vec<Shard> = meta
            .shards
            .par_iter()
            .enumerate()
            .map(|(i, entry)| open_entry(dir, i, entry, &meta))
            .collect::<Vec<_>>()
            .into_iter()
            .collect::<Result<_>>()?;
        let mut first = vec![0u64];
        for shard in &shards {
            first.push(first[first.len() - 1] + shard.header().sequences);
        }
        let facts = meta.facts(&shards);
        Ok(ShardSet { dir: dir.to_path_buf(), shards, first, facts, files: meta.files })
    }

    /// Whether `dir` looks like a set of shards.
    pub fn is_set(dir: &Path) -> bool {
        Meta::is_at(dir)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Number of sequences.
    pub fn len(&self) -> u64 {
        self.facts.sequences
    }

    /// Whether there is no sequence; `tokenize` never writes such a set.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.facts.tokens
    }

    /// What the set holds.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The tokens of sequence `i`, in O(log shards).
    pub fn text(&self, i: u64) -> Result<Text<'_>> {
        let (shard, k) = self.locate(i)?;
        shard.text(k)
    }

    /// Number of tokens of sequence `i`, without touching them.
    pub fn length(&self, i: u64) -> Result<usize> {
        let (shard, k) = self.locate(i)?;
        shard.length(k)
    }

    /// The id of the document that sequence `i` comes from; `None` where the input had none.
    pub fn id(&self, i: u64) -> Result<Option<&str>> {
        let (shard, k) = self.locate(i)?;
        shard.id(k)
    }

    /// The description beside the shards, which holds the digest of every header, which holds that of everything behind it: two sets of
    /// equal descriptions are equal.
    pub fn description(&self) -> Result<Vec<u8>> {
        let path = self.dir.join(META);
        std::fs::read(&path).at(&path, "cannot read")
    }

    /// The tokenizer's files by name, their digests checked.
    pub fn read_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        self.files.iter().map(|file| Ok((file.name.clone(), file.read(&self.dir)?))).collect()
    }

    /// Checks every digest of every file of the set.
    pub fn verify(&self) -> Result<Verified> {
        let mut errors: Vec<Error> = self.shards.par_iter().filter_map(|s| s.verify().err()).collect();
        let mut bytes: u64 = self.shards.iter().map(Shard::bytes).sum();
        for file in &self.files {
            match file.read(&self.dir) {
                Ok(_) => bytes += file.bytes,
                Err(e) => errors.push(e),
            }
        }
        if errors.is_empty() {
            // The shards, the tokenizer's files and meta.json, whose digest opening has checked.
            Ok(Verified { files: self.shards.len() + self.files.len() + 1, bytes })
        } else {
            Err(Error::several(errors))
        }
    }

    fn locate(&self, i: u64) -> Result<(&Shard, usize)> {
        if i >= self.len() {
            return Err(Error::refused(format!(
                "there is no text {i}; the texts are 0 to {}",
                self.len().saturating_sub(1)
            ))
            .path(&self.dir)
            .remedy("name one of these"));
        }
        let s = self.first.partition_point(|&f| f <= i) - 1;
        Ok((&self.shards[s], (i - self.first[s]) as usize))
    }
}

/// Opens the shard that `entry` describes and checks that it is that one.
fn open_entry(dir: &Path, i: usize, entry: &ShardEntry, meta: &Meta) -> Result<Shard> {
    let path = dir.join(shard_name(i));
    let shard = Shard::open(&path)?;
    let header = shard.header();
    let same = header.index as usize == i
        && shard.header_crc() == entry.header_crc32c
        && header.sequences == entry.sequences
        && header.tokens == entry.tokens;
    if !same {
        return Err(Error::refused(format!("is not the shard that {META} describes"))
            .path(&path)
            .remedy("restore the folder as tokenize wrote it, or tokenize again"));
    }
    if !meta.agrees_with(header) {
        return Err(Error::refused(format!("was made with other settings than {META} says"))
            .path(&path)
            .remedy("tokenize again"));
    }
    Ok(shard)
}

/// Checks one shard file by itself: its header and every digest.
pub fn verify_file(path: &Path) -> Result<Verified> {
    let shard = Shard::open(path)?;
    shard.verify()?;
    Ok(Verified { files: 1, bytes: shard.bytes() })
}

/// File name of shard `i`.
fn shard_name(i: usize) -> String {
    format!("shard-{i:05}.rms")
}

#[derive(Clone, Copy, Debug)]
enum Ids<'a> {
    U16(&'a [u16]),
    U32(&'a [u32]),
}

/// The tokens of one sequence, `[CLS]` and `[SEP]` included.
#[derive(Clone, Copy, Debug)]
pub struct Text<'a> {
    ids: Ids<'a>,
    words: &'a [u8],
    /// Bit of `words` that belongs to the first token.
    bit: usize,
}

impl Text<'_> {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        match self.ids {
            Ids::U16(ids) => ids.len(),
            Ids::U32(ids) => ids.len(),
        }
    }

    /// Whether there is no token; never in a set that `tokenize` wrote.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Token `i`.
    pub fn token(&self, i: usize) -> u32 {
        match self.ids {
            Ids::U16(ids) => u32::from(ids[i]),
            Ids::U32(ids) => ids[i],
        }
    }

    /// Appends all tokens to `out`.
    pub fn copy_tokens(&self, out: &mut Vec<u32>) {
        match self.ids {
            Ids::U16(ids) => out.extend(ids.iter().map(|&id| u32::from(id))),
            Ids::U32(ids) => out.extend_from_slice(ids),
        }
    }

    /// Whether token `i` begins a word; true for special tokens and for the first token of a sequence cut inside a word.
    pub fn is_word_start(&self, i: usize) -> bool {
        let bit = self.bit + i;
        self.words[bit / 8] >> (bit % 8) & 1 == 1
    }
}
