//! Lists of passages for many queries: collected in any order in bounded memory, kept without an allocation a query.

use ahash::AHashSet;
use rayon::prelude::*;

/// Pairs between two merges, at least.
const SLACK: usize = 1 << 22;

/// One list for each of many keys, in one array.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lists {
    /// Where each list ends.
    ends: Vec<usize>,
    items: Vec<u32>,
}

impl Lists {
    /// Room for so many items.
    pub fn with_capacity(items: usize) -> Lists {
        Lists { ends: Vec::new(), items: Vec::with_capacity(items) }
    }

    /// Items of all lists together.
    pub fn items(&self) -> usize {
        self.items.len()
    }

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

/// Lists of some keys, ascending by key.
#[derive(Clone, Debug, Default)]
pub(super) struct Keyed {
    pub keys: Vec<u32>,
    pub lists: Lists,
}

/// Collects the lists of queries. A query's passages keep the order they came in; repeated ones and those past `cap` are dropped on the
/// way, so that hundreds of millions of lines take little more memory than what is kept of them.
#[derive(Clone, Debug)]
pub(super) struct Ranked {
    kept: Keyed,
    /// Query and passage, as they came.
    new: Vec<(u32, u32)>,
    cap: usize,
}

impl Ranked {
    /// Keeps the first `cap` passages of a query.
    pub fn new(cap: usize) -> Ranked {
        Ranked { kept: Keyed::default(), new: Vec::new(), cap }
    }

    pub fn push(&mut self, query: u32, passage: u32) {
        self.new.push((query, passage));
        if self.new.len() >= SLACK.max(self.kept.lists.items() / 8) {
            self.merge();
        }
    }

    /// The lists.
    pub fn finish(mut self) -> Keyed {
        self.merge();
        self.kept
    }

    /// Puts what is new behind what is kept.
    fn merge(&mut self) {
        // Stable: the order within a query is the order of the ranks.
        self.new.par_sort_by_key(|&(query, _)| query);
        let old = std::mem::take(&mut self.kept);
        let mut to = Keyed { keys: Vec::new(), lists: Lists::with_capacity(old.lists.items() + self.new.len()) };
        let (mut rest, mut next, mut seen) = (self.new.as_slice(), 0, AHashSet::new());
        loop {
            let (kept, new) = (old.keys.get(next).copied(), rest.first().map(|&(query, _)| query));
            let Some(query) = kept.into_iter().chain(new).min() else { break };
            let list = if kept == Some(query) { old.lists.get(next) } else { &[] };
            next += usize::from(kept == Some(query));
            let count = rest.iter().take_while(|&&(q, _)| q == query).count();
            let (more, after) = rest.split_at(count);
            rest = after;
            to.keys.push(query);
            if more.is_empty() || list.len() >= self.cap {
                to.lists.push(list.iter().copied());
                continue;
            }
            seen.clear();
            let all = list.iter().copied().chain(more.iter().map(|&(_, passage)| passage));
            to.lists.push(all.filter(|&passage| seen.insert(passage)).take(self.cap));
        }
        self.kept = to;
        self.new.clear();
    }
}
