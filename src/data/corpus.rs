//! What batches are built from: numbered, tokenized texts.
//!
//! The trait keeps masks and batches independent of the shard format; shards implement it, and so does [`MemoryCorpus`] for tests,
//! benchmarks and single steps.

use super::shard::ShardSet;
use crate::error::{Error, Result};

/// The tokens of one text, `[CLS]` and `[SEP]` included.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    /// `[L]` token ids.
    pub ids: &'a [u32],
    /// `[L]` whether the token begins a word (a continuation belongs to the word before it).
    pub word_start: &'a [bool],
}

/// Texts by number, read from several threads at once.
pub trait Corpus: Send + Sync {
    /// Number of texts.
    fn texts(&self) -> u64;

    /// Number of tokens of text `i`, without reading them: batches by tokens look at many lengths ahead.
    fn length(&self, i: u64) -> Result<usize>;

    /// Replaces the contents of `ids` and `word_start` by the tokens of text `i`.
    fn read(&self, i: u64, ids: &mut Vec<u32>, word_start: &mut Vec<bool>) -> Result<()>;
}

/// A corpus held in memory.
#[derive(Clone, Debug, Default)]
pub struct MemoryCorpus {
    ends: Vec<usize>,
    ids: Vec<u32>,
    word_start: Vec<bool>,
}

impl MemoryCorpus {
    /// Appends a text. `text.ids` and `text.word_start` must be of one length.
    pub fn push(&mut self, text: Tokens<'_>) {
        assert_eq!(text.ids.len(), text.word_start.len(), "one word-start flag a token");
        self.ids.extend_from_slice(text.ids);
        self.word_start.extend_from_slice(text.word_start);
        self.ends.push(self.ids.len());
    }

    /// The tokens of text `i`, where they lie.
    pub fn tokens(&self, i: u64) -> Result<Tokens<'_>> {
        let range = self.range(i)?;
        Ok(Tokens { ids: &self.ids[range.clone()], word_start: &self.word_start[range] })
    }

    fn range(&self, i: u64) -> Result<std::ops::Range<usize>> {
        let at = usize::try_from(i).ok().filter(|&at| at < self.ends.len());
        let at = at.ok_or_else(|| Error::refused(format!("text {i} of {} does not exist", self.ends.len())))?;
        Ok(if at == 0 { 0 } else { self.ends[at - 1] }..self.ends[at])
    }
}

impl Corpus for MemoryCorpus {
    fn texts(&self) -> u64 {
        self.ends.len() as u64
    }

    fn length(&self, i: u64) -> Result<usize> {
        Ok(self.range(i)?.len())
    }

    fn read(&self, i: u64, ids: &mut Vec<u32>, word_start: &mut Vec<bool>) -> Result<()> {
        let range = self.range(i)?;
        ids.clear();
        ids.extend_from_slice(&self.ids[range.clone()]);
        word_start.clear();
        word_start.extend_from_slice(&self.word_start[range]);
        Ok(())
    }
}

impl Corpus for ShardSet {
    fn texts(&self) -> u64 {
        self.len()
    }

    fn length(&self, i: u64) -> Result<usize> {
        ShardSet::length(self, i)
    }

    fn read(&self, i: u64, ids: &mut Vec<u32>, word_start: &mut Vec<bool>) -> Result<()> {
        let text = self.text(i)?;
        ids.clear();
        text.copy_tokens(ids);
        word_start.clear();
        word_start.extend((0..text.len()).map(|k| text.is_word_start(k)));
        Ok(())
    }
}
