//! From ids to text numbers: a compact index over a set of shards.
//!
//! An entry is 64 bits: the upper half of the id's hash, then the text's number. Entries are sorted, so that one look-up is a binary
//! search among the few hundred entries of equal upper bits, and then a comparison with the id itself, which stays in the mapped
//! shard: hashes of 32 bits collide. 8.8 million ids take 70 MB.

use std::sync::Arc;

use ahash::RandomState;
use rayon::prelude::*;

use crate::data::shard::ShardSet;
use crate::error::{Error, Result};

/// Texts with ids, read from several threads at once.
pub trait Ids: Send + Sync {
    /// Number of texts.
    fn texts(&self) -> u64;

    /// The id of text `i`; `None` where it has none.
    fn id(&self, i: u64) -> Result<Option<&str>>;
}

impl Ids for ShardSet {
    fn texts(&self) -> u64 {
        self.len()
    }

    fn id(&self, i: u64) -> Result<Option<&str>> {
        ShardSet::id(self, i)
    }
}

/// Bits of the hash that choose where the search begins.
const DIRECTORY: u32 = 16;

/// Finds the number of the text with an id.
pub struct IdIndex {
    ids: Arc<dyn Ids>,
    hasher: RandomState,
    /// `hash >> 32 << 32 | number`, ascending.
    entries: Vec<u64>,
    /// `[2^DIRECTORY + 1]` first entry of every value of the hash's upper bits.
    directory: Vec<u32>,
    duplicates: u64,
}

impl IdIndex {
    /// Indexes all ids, in parallel. Of texts with one id the first is found, as `tokenize` keeps the first.
    pub fn new(ids: Arc<dyn Ids>) -> Result<IdIndex> {
        let texts = ids.texts();
        if texts >= u64::from(u32::MAX) {
            return Err(Error::refused(format!("{texts} texts are more than can be numbered"))
                .remedy(format!("split them into sets of fewer than {} texts", u32::MAX)));
        }
        // Fixed keys: the same input is worked on in the same order, always.
        let hasher = RandomState::with_seeds(0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344);
        // No entry has all bits set: a number is below 2^32 - 1.
        let entry = |i: u64| Ok(ids.id(i)?.map_or(u64::MAX, |id| upper(&hasher, id) | i));
        let mut entries = (0..texts).into_par_iter().map(entry).collect::<Result<Vec<u64>>>()?;
        entries.retain(|&entry| entry != u64::MAX);
        if entries.is_empty() {
            return Err(Error::refused("no text has an id, so that nothing can refer to them")
                .remedy("tokenize an input with ids: tsv, or jsonl with _id"));
        }
        entries.par_sort_unstable();
        let mut index = IdIndex { ids, hasher, entries, directory: Vec::new(), duplicates: 0 };
        index.drop_duplicates()?;
        index.directory = directory(&index.entries);
        Ok(index)
    }

    /// The number of the text with this id.
    pub fn find(&self, id: &str) -> Result<Option<u32>> {
        let hash = upper(&self.hasher, id);
        let bucket = (hash >> (64 - DIRECTORY)) as usize;
        let entries = &self.entries[self.directory[bucket] as usize..self.directory[bucket + 1] as usize];
        let start = entries.partition_point(|&e| e < hash);
        for &entry in entries[start..].iter().take_while(|&&e| e >> 32 == hash >> 32) {
            let number = entry as u32;
            if self.ids.id(u64::from(number))? == Some(id) {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }

    /// Number of different ids.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none; never so after [`IdIndex::new`].
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Texts whose id an earlier text has.
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// Bytes of memory that the index holds; the ids themselves stay in their files.
    pub fn bytes(&self) -> usize {
        8 * self.entries.capacity() + 4 * self.directory.capacity()
    }

    /// Keeps the first entry of every id.
    fn drop_duplicates(&mut self) -> Result<()> {
        let (before, mut kept) = (self.entries.len(), 0);
        for at in 0..before {
            let entry = self.entries[at];
            let same_hash = self.entries[..kept].iter().rev().take_while(|&&e| e >> 32 == entry >> 32);
            let mut again = false;
            for &earlier in same_hash {
                again |= self.ids.id(u64::from(earlier as u32))? == self.ids.id(u64::from(entry as u32))?;
            }
            if !again {
                self.entries[kept] = entry;
                kept += 1;
            }
        }
        self.entries.truncate(kept);
        self.duplicates = (before - kept) as u64;
        Ok(())
    }
}

/// The upper half of an id's hash, in place.
fn upper(hasher: &RandomState, id: &str) -> u64 {
    hasher.hash_one(id) >> 32 << 32
}

fn directory(entries: &[u64]) -> Vec<u32> {
    let buckets = 1usize << DIRECTORY;
    let mut first = vec![0u32; buckets + 1];
    for entry in entries {
        first[(entry >> (64 - DIRECTORY)) as usize + 1] += 1;
    }
    for b in 0..buckets {
        first[b + 1] += first[b];
    }
    first
}

/// Remembers the last id that was looked up: in files that name a query on many lines it is the same for long.
pub(super) struct Finder<'a> {
    index: &'a IdIndex,
    id: String,
    found: Option<u32>,
}

impl<'a> Finder<'a> {
    pub fn new(index: &'a IdIndex) -> Self {
        Finder { index, id: String::new(), found: None }
    }

    pub fn find(&mut self, id: &str) -> Result<Option<u32>> {
        // No id is empty, so that the first one is always looked up.
        if self.id != id {
            self.found = self.index.find(id)?;
            id.clone_into(&mut self.id);
        }
        Ok(self.found)
    }
}
