//! Writes a set: texts are collected in memory until a shard is full, then the shard is written in one go.

use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::files::{self, disk::File, hex};

use super::format::{BLOCK, HEADER, Header, Layout};
use super::meta::{Counts, FileDigest, Meta, ShardEntry, Special};
use super::{Packing, TitleSep, shard_name};

/// Ids take at most this much of one shard.
const ID_BYTES: usize = 64 << 20;
/// Sequences of one shard at most: keeps the index of many tiny texts in bounds.
const SEQUENCES: usize = 8 << 20;

/// Writes the shards of one set into a folder.
pub struct SetWriter {
    dir: PathBuf,
    shard_tokens: usize,
    header: Header,
    meta: Meta,
    open: Buffers,
}

/// The sections of the shard being filled.
#[derive(Default)]
struct Buffers {
    starts: Vec<u8>,
    tokens: Vec<u8>,
    words: Vec<u8>,
    id_starts: Vec<u8>,
    ids: Vec<u8>,
    sequences: usize,
    count: usize,
    longest: usize,
}

/// What all shards of a set have in common.
#[derive(Clone, Debug)]
pub struct SetSpec {
    /// Limit that sequences are cut at, `[CLS]` and `[SEP]` included.
    pub max_length: u32,
    /// Tokens in the vocabulary.
    pub vocab_size: u32,
    /// The special tokens' ids.
    pub special: Special,
    /// How texts become sequences.
    pub packing: Packing,
    /// How titles are joined.
    pub title_sep: TitleSep,
    /// SHA-256 of what decides the token ids of a text.
    pub fingerprint: [u8; 32],
    /// A shard is full with this many tokens.
    pub shard_tokens: usize,
}

impl SetWriter {
    /// Starts a set in `dir`, which must exist.
    pub fn new(dir: &Path, spec: &SetSpec) -> SetWriter {
        let header = Header {
            index: 0,
            sequences: 0,
            tokens: 0,
            id_bytes: None,
            width: if spec.vocab_size <= 1 << 16 { 2 } else { 4 },
            longest: 0,
            max_length: spec.max_length,
            vocab_size: spec.vocab_size,
            special: spec.special.to_array(),
            packing: spec.packing,
            title_sep: spec.title_sep,
            fingerprint: spec.fingerprint,
            digests_crc: 0,
        };
        let meta = Meta::new(&header, hex(&spec.fingerprint));
        // Token numbers in a shard are u32; a sequence more than the limit must still fit.
        let shard_tokens = spec.shard_tokens.clamp(1, 1 << 30);
        SetWriter { dir: dir.to_path_buf(), shard_tokens, header, meta, open: Buffers::default() }
    }

    /// Adds one sequence: (token id, whether it begins a word), and the id of its document or "".
    pub fn push(&mut self, id: &str, tokens: impl Iterator<Item = (u32, bool)>) -> Result<()> {
        let full = self.open.count >= self.shard_tokens
            || self.open.sequences >= SEQUENCES
            || (self.open.ids.len() + id.len() > ID_BYTES && self.open.sequences > 0);
        if full {
            self.flush()?;
        }
        let open = &mut self.open;
        open.starts.extend_from_slice(&(open.count as u32).to_le_bytes());
        open.id_starts.extend_from_slice(&(open.ids.len() as u32).to_le_bytes());
        open.ids.extend_from_slice(id.as_bytes());
        let before = open.count;
        for (token, starts_word) in tokens {
            if self.header.width == 2 {
                open.tokens.extend_from_slice(&(token as u16).to_le_bytes());
            } else {
                open.tokens.extend_from_slice(&token.to_le_bytes());
            }
            if open.count.is_multiple_of(8) {
                open.words.push(0);
            }
            open.words[open.count / 8] |= u8::from(starts_word) << (open.count % 8);
            open.count += 1;
        }
        open.longest = open.longest.max(open.count - before);
        open.sequences += 1;
        Ok(())
    }

    /// Copies a file's bytes into the set under `name`.
    pub fn add_file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        files::write_synced(&self.dir.join(name), |w| w.write_all(bytes))?;
        self.meta.files.push(FileDigest {
            name: name.into(),
            bytes: bytes.len() as u64,
            crc32c: crc32c::crc32c(bytes),
        });
        Ok(())
    }

    /// Writes the last shard and the description.
    pub fn finish(mut self, counts: Counts) -> Result<()> {
        if self.open.sequences > 0 {
            self.flush()?;
        }
        self.meta.counts = counts;
        self.meta.write(&self.dir)
    }

    /// Writes the collected sequences as the next shard.
    fn flush(&mut self) -> Result<()> {
        let open = std::mem::take(&mut self.open);
        let mut header = self.header.clone();
        header.index = self.meta.shards.len() as u32;
        header.sequences = open.sequences as u64;
        header.tokens = open.count as u64;
        header.longest = open.longest as u32;
        header.id_bytes = (!open.ids.is_empty()).then_some(open.ids.len() as u64);
        let path = self.dir.join(shard_name(self.meta.shards.len()));
        let mut crc = 0;
        files::write_synced(&path, |w| {
            crc = write_shard(w, &mut header, &open)?;
            Ok(())
        })?;
        self.meta.shards.push(ShardEntry { sequences: header.sequences, tokens: header.tokens, header_crc32c: crc });
        // Keep the allocations for the next shard.
        self.open = open.cleared();
        Ok(())
    }
}

impl Buffers {
    fn cleared(mut self) -> Buffers {
        for section in [&mut self.starts, &mut self.tokens, &mut self.words, &mut self.id_starts, &mut self.ids] {
            section.clear();
        }
        (self.sequences, self.count, self.longest) = (0, 0, 0);
        self
    }
}

/// Writes header, sections and digests; gives the header's digest.
fn write_shard(w: &mut BufWriter<File>, header: &mut Header, open: &Buffers) -> std::io::Result<u32> {
    let Some(layout) = Layout::of(header) else {
        return Err(std::io::Error::other("the shard is larger than this machine can address"));
    };
    w.write_all(&[0; HEADER])?;
    let mut out = Digesting { inner: w, at: HEADER, crc: 0, digests: Vec::with_capacity(4 * layout.blocks) };
    out.section(layout.starts, &[&open.starts, &(open.count as u32).to_le_bytes()])?;
    out.section(layout.tokens, &[&open.tokens])?;
    out.section(layout.words, &[&open.words])?;
    if header.id_bytes.is_some() {
        out.section(layout.id_starts, &[&open.id_starts, &(open.ids.len() as u32).to_le_bytes()])?;
        out.section(layout.ids, &[&open.ids])?;
    }
    out.section(layout.digests, &[])?;
    let digests = out.finish();
    header.digests_crc = crc32c::crc32c(&digests);
    w.write_all(&digests)?;
    let bytes = header.to_bytes();
    w.seek(SeekFrom::Start(0))?;
    w.write_all(&bytes)?;
    Ok(u32::from_le_bytes(std::array::from_fn(|i| bytes[HEADER - 4 + i])))
}

/// Passes bytes on and digests them block by block.
struct Digesting<'a> {
    inner: &'a mut BufWriter<File>,
    at: usize,
    crc: u32,
    digests: Vec<u8>,
}

impl Digesting<'_> {
    /// Zeros up to byte `start` of the file, then the parts.
    fn section(&mut self, start: usize, parts: &[&[u8]]) -> std::io::Result<()> {
        self.write(&vec![0; start - self.at])?;
        parts.iter().try_for_each(|part| self.write(part))
    }

    fn write(&mut self, mut bytes: &[u8]) -> std::io::Result<()> {
        self.inner.write_all(bytes)?;
        while !bytes.is_empty() {
            let room = BLOCK - (self.at - HEADER) % BLOCK;
            let (now, rest) = bytes.split_at(room.min(bytes.len()));
            self.crc = crc32c::crc32c_append(self.crc, now);
            self.at += now.len();
            if (self.at - HEADER).is_multiple_of(BLOCK) {
                self.digests.extend_from_slice(&self.crc.to_le_bytes());
                self.crc = 0;
            }
            bytes = rest;
        }
        Ok(())
    }

    fn finish(mut self) -> Vec<u8> {
        if !(self.at - HEADER).is_multiple_of(BLOCK) {
            self.digests.extend_from_slice(&self.crc.to_le_bytes());
        }
        self.digests
    }
}
