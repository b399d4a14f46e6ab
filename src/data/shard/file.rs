//! One memory-mapped shard, checked block by block on first touch.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::Mmap;

use crate::error::{Error, IoContext, Result};

use super::format::{BLOCK, HEADER, Header, Layout, damaged};
use super::{Ids, Text};

/// An open shard.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    map: Mmap,
    header: Header,
    layout: Layout,
    /// One bit per block: it matched its digest.
    checked: Box<[AtomicU64]>,
    /// Whether the digests match the header; asked once.
    digests_ok: OnceLock<bool>,
}

impl Shard {
    /// Maps the file and checks its header and length.
    pub fn open(path: &Path) -> Result<Shard> {
        let file = File::open(path).at(path, "cannot open")?;
        let meta = file.metadata().at(path, "cannot look at")?;
        if !meta.is_file() {
            return Err(Error::refused("is not a file").path(path).remedy("restore the folder as tokenize wrote it"));
        }
        if meta.len() == 0 {
            return Err(damaged(path, 0, "the file is empty"));
        }
        // SAFETY: the map is read-only and private to this struct. Finished shards are never written again: `SetWriter` fills them
        // under a temporary folder that is renamed when complete. Who truncates one while it is in use breaks that contract.
        let map = unsafe { Mmap::map(&file) }.at(path, "cannot map into memory")?;
        let header = Header::parse(&map[..map.len().min(HEADER)], path)?;
        let layout = Layout::of(&header).ok_or_else(|| damaged(path, 0, "the header's counts are impossible"))?;
        if map.len() != layout.end {
            let what = format!("the file has {} bytes where its header says {}", map.len(), layout.end);
            return Err(damaged(path, map.len().min(layout.end), &what));
        }
        let checked = (0..layout.blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Ok(Shard { path: path.to_path_buf(), map, header, layout, checked, digests_ok: OnceLock::new() })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The header's own digest.
    pub fn header_crc(&self) -> u32 {
        self.word(HEADER - 4)
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.layout.end as u64
    }

    /// Number of tokens of sequence `k`, which must exist; the tokens are not touched.
    pub fn length(&self, k: usize) -> Result<usize> {
        self.extent(k).map(|tokens| tokens.len())
    }

    /// The tokens of sequence `k`, which must exist.
    pub fn text(&self, k: usize) -> Result<Text<'_>> {
        let Range { start: first, end } = self.extent(k)?;
        let width = self.header.width as usize;
        let bytes = self.layout.tokens + first * width..self.layout.tokens + end * width;
        let words = self.layout.words + first / 8..self.layout.words + end.div_ceil(8);
        self.check(bytes.clone())?;
        self.check(words.clone())?;
        Ok(Text { ids: self.ids(bytes), words: &self.map[words], bit: first % 8 })
    }

    /// Where sequence `k` lies among the tokens.
    fn extent(&self, k: usize) -> Result<Range<usize>> {
        let at = self.layout.starts + 4 * k;
        self.check(at..at + 8)?;
        let (first, end) = (self.word(at) as usize, self.word(at + 4) as usize);
        if !(first <= end && end as u64 <= self.header.tokens && end - first <= self.header.longest as usize) {
            return Err(damaged(&self.path, at, "a sequence lies outside the tokens"));
        }
        Ok(first..end)
    }

    /// The id of sequence `k`, which must exist.
    pub fn id(&self, k: usize) -> Result<Option<&str>> {
        let Some(id_bytes) = self.header.id_bytes else { return Ok(None) };
        let at = self.layout.id_starts + 4 * k;
        self.check(at..at + 8)?;
        let (first, end) = (self.word(at) as usize, self.word(at + 4) as usize);
        if !(first <= end && end as u64 <= id_bytes) {
            return Err(damaged(&self.path, at, "an id lies outside the ids"));
        }
        let bytes = self.layout.ids + first..self.layout.ids + end;
        self.check(bytes.clone())?;
        let id = std::str::from_utf8(&self.map[bytes])
            .map_err(|_| damaged(&self.path, self.layout.ids + first, "an id is not UTF-8"))?;
        Ok((!id.is_empty()).then_some(id))
    }

    /// Checks all blocks, reading the file anew and not through the map: a failing disk is then an error and not a signal.
    pub fn verify(&self) -> Result<()> {
        let file = File::open(&self.path).at(&self.path, "cannot open")?;
        let mut digests = vec![0; self.layout.end - self.layout.digests];
        file.read_exact_at(&mut digests, self.layout.digests as u64).at(&self.path, "cannot read")?;
        if crc32c::crc32c(&digests) != self.header.digests_crc {
            return Err(self.digests_damaged());
        }
        let mut buffer = vec![0; BLOCK];
        for (b, digest) in digests.chunks_exact(4).enumerate() {
            let range = self.layout.block(b);
            let bytes = &mut buffer[..range.len()];
            file.read_exact_at(bytes, range.start as u64).at(&self.path, "cannot read")?;
            if crc32c::crc32c(bytes).to_le_bytes() != digest {
                return Err(self.block_damaged(b));
            }
        }
        (0..self.layout.blocks).try_for_each(|b| self.check_vocabulary(b))?;
        (0..self.header.sequences as usize).try_for_each(|k| self.text(k).and(self.id(k)).map(drop))
    }

    /// Checks the blocks that hold `range` unless they were checked before.
    fn check(&self, range: Range<usize>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        for b in (range.start - HEADER) / BLOCK..=(range.end - 1 - HEADER) / BLOCK {
            let (word, bit) = (&self.checked[b / 64], 1u64 << (b % 64));
            // Relaxed: the bit says something about immutable bytes, nothing is published through it.
            if word.load(Ordering::Relaxed) & bit == 0 {
                self.check_block(b)?;
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn check_block(&self, b: usize) -> Result<()> {
        let digests = &self.map[self.layout.digests..self.layout.end];
        if !*self.digests_ok.get_or_init(|| crc32c::crc32c(digests) == self.header.digests_crc) {
            return Err(self.digests_damaged());
        }
        if crc32c::crc32c(&self.map[self.layout.block(b)]) != self.word(self.layout.digests + 4 * b) {
            return Err(self.block_damaged(b));
        }
        self.check_vocabulary(b)
    }

    /// Whether the token ids in block `b` are in the vocabulary: users index tables with them.
    fn check_vocabulary(&self, b: usize) -> Result<()> {
        let block = self.layout.block(b);
        let range = block.start.max(self.layout.tokens)..block.end.min(self.layout.tokens_end);
        let largest = match self.ids(range.start..range.end.max(range.start)) {
            Ids::U16(ids) => ids.iter().copied().max().map(u32::from),
            Ids::U32(ids) => ids.iter().copied().max(),
        };
        if largest.is_some_and(|id| id >= self.header.vocab_size) {
            return Err(damaged(&self.path, range.start, "a token id is not in the vocabulary"));
        }
        Ok(())
    }

    /// The tokens in a byte range of the token section; sections and blocks begin at multiples of 64 bytes of a page-aligned map.
    fn ids(&self, bytes: Range<usize>) -> Ids<'_> {
        if self.header.width == 2 {
            Ids::U16(bytemuck::cast_slice(&self.map[bytes]))
        } else {
            Ids::U32(bytemuck::cast_slice(&self.map[bytes]))
        }
    }

    fn word(&self, at: usize) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|i| self.map[at + i]))
    }

    fn block_damaged(&self, b: usize) -> Error {
        damaged(&self.path, self.layout.block(b).start, "a 64 KiB block does not match its digest")
    }

    fn digests_damaged(&self) -> Error {
        damaged(&self.path, self.layout.digests, "the digests do not match the header")
    }
}
