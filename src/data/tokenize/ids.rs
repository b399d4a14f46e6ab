//! Which ids were seen before, in bounded memory.
//!
//! An id is remembered as 64 bits of hash: 8.8 million ids (MS MARCO passages) take about 80 MB, and the chance that any two of
//! them collide is one in 400,000. Past [`MOST`] ids new ones are no longer remembered, and their number is reported.

use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hasher};

use ahash::RandomState;

/// Ids remembered: about 300 MB.
const MOST: u64 = 28_000_000;
/// Many small tables grow one by one; a single one would need half as much again while it grows.
const TABLES: usize = 256;

/// The ids of one run.
pub struct Seen {
    hasher: RandomState,
    tables: Vec<HashSet<u64, BuildHasherDefault<Same>>>,
    count: u64,
    unchecked: u64,
}

impl Default for Seen {
    fn default() -> Self {
        // Fixed keys: the same input gives the same output, always.
        let hasher = RandomState::with_seeds(0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344);
        Seen { hasher, tables: vec![HashSet::default(); TABLES], count: 0, unchecked: 0 }
    }
}

impl Seen {
    /// Whether `id` was given before; remembers it.
    pub fn again(&mut self, id: &str) -> bool {
        let hash = self.hasher.hash_one(id);
        let table = &mut self.tables[(hash >> 32) as usize % TABLES];
        if self.count >= MOST {
            let again = table.contains(&hash);
            self.unchecked += u64::from(!again);
            return again;
        }
        let new = table.insert(hash);
        self.count += u64::from(new);
        !new
    }

    /// Ids that came too late to be remembered.
    pub fn unchecked(&self) -> u64 {
        self.unchecked
    }
}

/// The values are hashes already.
#[derive(Clone, Default)]
struct Same(u64);

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |h, &b| h.rotate_left(8) ^ u64::from(b));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_exactly_the_repeated_ids() {
        let mut seen = Seen::default();
        for i in 0..50_000 {
            assert!(!seen.again(&i.to_string()));
        }
        assert!(seen.again("49999") && seen.again("0"));
        assert!(!seen.again("50000"));
        assert_eq!(seen.unchecked(), 0);
    }
}
