//! Lists of passages for many queries: collected in any order in bounded memory, kept without an allocation a query.

use ahash::AHashSet;
use rayon::prelude::*;

/// Pairs between two compactions, at least.
const SLACK: usize = 1 << 22;

/// One list for each of many keys, in one array.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lists {
    /// Where each list ends.
    ends: Vec<usize>,
    items: Vec<u32>,
}

impl Lists {
    /// Number of lists.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no list.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// List `i`.
    pub fn get(&self, i: usize) -> &[u32] {
        &self.items[self.range(i)]
    }

    /// Where list `i` lies among all items.
    pub fn range(&self, i: usize) -> std::ops::Range<usize> {
        (if i == 0 { 0 } else { self.ends[i - 1] })..self.ends[i]
    }

    /// Appends a list.
    pub fn push(&mut self, items: impl IntoIterator<Item = u32>) {
        self.items.extend(items);
        self.ends.push(self.items.len());
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        8 * self.ends.capacity() + 4 * self.items.capacity()
    }
}

/// A passage on a query's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    pub query: u32,
    pub passage: u32,
}

/// Collects pairs. A query's passages keep the order they came in; repeated ones and those past `cap` are dropped on the way, so that
/// hundreds of millions of lines take no more memory than what is kept of them, twice.
#[derive(Clone, Debug)]
pub(super) struct Ranked {
    pairs: Vec<Pair>,
    cap: usize,
    compact: usize,
}

impl Ranked {
    /// Keeps the first `cap` passages of a query.
    pub fn new(cap: usize) -> Ranked {
        Ranked { pairs: Vec::new(), cap, compact: 0 }
    }

    pub fn push(&mut self, query: u32, passage: u32) {
        self.pairs.push(Pair { query, passage });
        if self.pairs.len() > 2 * self.compact + SLACK {
            self.compact();
        }
    }

    /// All pairs by query; those of one query as they came.
    pub fn finish(mut self) -> Vec<Pair> {
        self.compact();
        self.pairs
    }

    fn compact(&mut self) {
        // Stable: the order within a query is the order of the ranks.
        self.pairs.par_sort_by_key(|pair| pair.query);
        let (mut seen, mut query) = (AHashSet::new(), None);
        let cap = self.cap;
        self.pairs.retain(|pair| {
            if query != Some(pair.query) {
                query = Some(pair.query);
                seen.clear();
            }
            seen.len() < cap && seen.insert(pair.passage)
        });
        self.compact = self.pairs.len();
    }
}

/// A teacher's score of a pair.
#[derive(Clone, Copy, Debug)]
pub(super) struct Score {
    pub query: u32,
    pub passage: u32,
    pub score: f32,
}

/// Scores by pair, 12 bytes each.
#[derive(Clone, Debug, Default)]
pub(super) struct Scores {
    all: Vec<Score>,
}

impl Scores {
    pub fn push(&mut self, query: u32, passage: u32, score: f32) {
        self.all.push(Score { query, passage, score });
    }

    /// Sorts by pair. Of several scores of one pair the last stays; gives how many others said something else.
    pub fn sort(&mut self) -> u64 {
        let key = |s: &Score| (s.query, s.passage);
        self.all.par_sort_by_key(key);
        let mut conflicts = 0;
        self.all.dedup_by(|later, kept| {
            let same = key(later) == key(kept);
            if same {
                conflicts += u64::from(later.score != kept.score);
                *kept = *later;
            }
            same
        });
        self.all.shrink_to_fit();
        conflicts
    }

    /// The scores of a query; after [`Scores::sort`].
    pub fn of(&self, query: u32) -> &[Score] {
        let start = self.all.partition_point(|s| s.query < query);
        let count = self.all[start..].partition_point(|s| s.query == query);
        &self.all[start..start + count]
    }
}

/// The score of a passage among those of one query.
pub(super) fn find(scores: &[Score], passage: u32) -> Option<f32> {
    scores.binary_search_by_key(&passage, |s| s.passage).ok().map(|at| scores[at].score)
}
