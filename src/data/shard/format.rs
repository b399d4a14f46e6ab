//! The shard file, byte by byte.
//!
//! Little endian. A 4096-byte header, then sections at multiples of 64 bytes in this order, then the digests:
//!
//! | section | bytes | content |
//! | --- | --- | --- |
//! | starts | 4 · (S + 1) | u32: first token of every sequence; the last entry is T |
//! | tokens | width · T | u16 or u32: token ids, `[CLS]` and `[SEP]` included |
//! | word starts | ⌈T / 8⌉ | bit `t % 8` of byte `t / 8`: token `t` begins a word |
//! | id starts | 4 · (S + 1) | u32: first byte of every id; only where the input has ids |
//! | ids | as the header says | UTF-8, one after the other; an empty one is none |
//! | digests | 4 per block | CRC32C of every 64 KiB block from the end of the header to here |
//!
//! The header holds counts only, and every offset follows from them, so that a header cannot point anywhere. Its last four bytes
//! are its own CRC32C; the CRC32C of the digests is in it, so that every byte of the file is covered.

use std::path::Path;

use crate::error::{Error, Result};

use super::{Packing, TitleSep};

/// Bytes of the header.
pub const HEADER: usize = 4096;
/// Bytes that one digest covers.
pub const BLOCK: usize = 64 * 1024;
/// Version of the format that this code writes and reads.
pub const VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"RMSHARD\0";
const ALIGN: u64 = 64;

/// What a shard's header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Number of the shard in its set.
    pub index: u32,
    /// S.
    pub sequences: u64,
    /// T.
    pub tokens: u64,
    /// Bytes of all ids; `None` where the input has none.
    pub id_bytes: Option<u64>,
    /// Bytes of a token: 2 or 4.
    pub width: u32,
    /// Tokens of the longest sequence.
    pub longest: u32,
    /// Limit that sequences were cut at.
    pub max_length: u32,
    /// Tokens in the vocabulary; every token id is below it.
    pub vocab_size: u32,
    /// Ids of `[CLS]`, `[SEP]`, `[MASK]`, `[PAD]`, `[UNK]`.
    pub special: [u32; 5],
    /// How texts were made into sequences.
    pub packing: Packing,
    /// How titles were joined.
    pub title_sep: TitleSep,
    /// SHA-256 of what decides the token ids of a text.
    pub fingerprint: [u8; 32],
    /// CRC32C of the digests.
    pub digests_crc: u32,
}

/// Where the sections of a shard lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// First byte of the starts.
    pub starts: usize,
    /// First byte of the tokens.
    pub tokens: usize,
    /// One past the last byte of the tokens.
    pub tokens_end: usize,
    /// First byte of the word-start bits.
    pub words: usize,
    /// First byte of the id starts.
    pub id_starts: usize,
    /// First byte of the ids.
    pub ids: usize,
    /// First byte of the digests, one past what they cover.
    pub digests: usize,
    /// Number of blocks.
    pub blocks: usize,
    /// Bytes of the file.
    pub end: usize,
}

impl Layout {
    /// The layout that follows from the counts; `None` if they overflow.
    pub fn of(header: &Header) -> Option<Layout> {
        let index_bytes = header.sequences.checked_add(1)?.checked_mul(4)?;
        let mut at = HEADER as u64;
        let mut section = |bytes: u64| -> Option<(usize, usize)> {
            let start = at;
            let end = start.checked_add(bytes)?;
            at = end.checked_next_multiple_of(ALIGN)?;
            Some((usize::try_from(start).ok()?, usize::try_from(end).ok()?))
        };
        let (starts, _) = section(index_bytes)?;
        let (tokens, tokens_end) = section(header.tokens.checked_mul(u64::from(header.width))?)?;
        let (words, _) = section(header.tokens.div_ceil(8))?;
        let (id_starts, _) = section(if header.id_bytes.is_some() { index_bytes } else { 0 })?;
        let (ids, _) = section(header.id_bytes.unwrap_or(0))?;
        let (digests, _) = section(0)?;
        let blocks = (digests - HEADER).div_ceil(BLOCK);
        let end = digests.checked_add(blocks.checked_mul(4)?)?;
        Some(Layout { starts, tokens, tokens_end, words, id_starts, ids, digests, blocks, end })
    }

    /// The bytes that block `b` covers.
    pub fn block(&self, b: usize) -> std::ops::Range<usize> {
        let start = HEADER + b * BLOCK;
        start..(start + BLOCK).min(self.digests)
    }
}

impl Header {
    /// The header's bytes; its CRC32C is the last four of them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER);
        out.extend_from_slice(&MAGIC);
        for v in [VERSION, HEADER as u32, self.index, self.width, self.longest, self.max_length, self.vocab_size] {
            out.extend_from_slice(&v.to_le_bytes());
        }
        for v in self.special {
            out.extend_from_slice(&v.to_le_bytes());
        }
        for v in [u32::from(self.packing.code()), u32::from(self.title_sep.code()), u32::from(self.id_bytes.is_some())]
        {
            out.extend_from_slice(&v.to_le_bytes());
        }
        out.extend_from_slice(&self.digests_crc.to_le_bytes());
        for v in [self.sequences, self.tokens, self.id_bytes.unwrap_or(0)] {
            out.extend_from_slice(&v.to_le_bytes());
        }
        out.extend_from_slice(&self.fingerprint);
        out.resize(HEADER - 4, 0);
        let crc = crc32c::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads and checks a header; `path` is for the message.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Header> {
        if !bytes.starts_with(&MAGIC) {
            return Err(Error::refused("is not a shard of this program").path(path).remedy("make it with tokenize"));
        }
        if bytes.len() < HEADER {
            return Err(damaged(path, bytes.len(), "the header is cut short"));
        }
        let mut fields = Fields { bytes, at: MAGIC.len() };
        let version = fields.u32();
        if version != VERSION {
            return Err(Error::refused(format!("shard format {version}; this program reads {VERSION}"))
                .path(path)
                .remedy("tokenize again with this program"));
        }
        let (body, stored) = bytes[..HEADER].split_at(HEADER - 4);
        if crc32c::crc32c(body).to_le_bytes() != stored {
            return Err(damaged(path, 0, "the header does not match its digest"));
        }
        let header_bytes = fields.u32();
        let (index, width, longest, max_length, vocab_size) =
            (fields.u32(), fields.u32(), fields.u32(), fields.u32(), fields.u32());
        let special = std::array::from_fn(|_| fields.u32());
        let (packing, title_sep, has_ids, digests_crc) = (fields.u32(), fields.u32(), fields.u32(), fields.u32());
        let (sequences, tokens, id_bytes) = (fields.u64(), fields.u64(), fields.u64());
        let fingerprint = std::array::from_fn(|i| bytes[fields.at + i]);
        let bad = |what: &str| damaged(path, 0, what);
        let header = Header {
            index,
            sequences,
            tokens,
            id_bytes: (has_ids == 1).then_some(id_bytes),
            width,
            longest,
            max_length,
            vocab_size,
            special,
            packing: Packing::from_code(packing).ok_or_else(|| bad("the header names an unknown packing"))?,
            title_sep: TitleSep::from_code(title_sep)
                .ok_or_else(|| bad("the header names an unknown title separator"))?,
            fingerprint,
            digests_crc,
        };
        let widths_fit = width == 4 || (width == 2 && vocab_size <= 1 << 16);
        let counts_fit = sequences <= tokens && tokens <= u64::from(u32::MAX) && id_bytes <= u64::from(u32::MAX);
        let rest_fits = header_bytes == HEADER as u32 && has_ids <= 1 && longest <= max_length;
        if !(widths_fit && counts_fit && rest_fits && special.iter().all(|&id| id < vocab_size)) {
            return Err(bad("the header contradicts itself"));
        }
        Ok(header)
    }
}

/// A damaged shard at byte `offset`.
pub fn damaged(path: &Path, offset: usize, what: &str) -> Error {
    Error::refused(what).path(path).offset(offset as u64).remedy("restore the file or tokenize again")
}

/// Reads consecutive little-endian fields of a header whose length was checked.
struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let field = std::array::from_fn(|i| self.bytes[self.at + i]);
        self.at += N;
        field
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}
