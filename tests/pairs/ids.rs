//! The index of ids.

use std::sync::Arc;

use retromae_engine::Result;
use retromae_engine::data::pairs::ids::{IdIndex, Ids};

use super::support::*;

struct Names(Vec<Option<String>>);

impl Ids for Names {
    fn texts(&self) -> u64 {
        self.0.len() as u64
    }
    fn id(&self, i: u64) -> Result<Option<&str>> {
        Ok(self.0[i as usize].as_deref())
    }
}

fn index(ids: impl IntoIterator<Item = Option<String>>) -> Result<IdIndex> {
    IdIndex::new(Arc::new(Names(ids.into_iter().collect())))
}

#[test]
fn every_id_is_found_and_no_other_although_short_hashes_collide() {
    // Half a million ids: some thirty pairs share their 32 bits of hash.
    let n = 500_000;
    let ids = in_pools(|| {
        let index = index((0..n).map(|i| Some(if i % 2 == 0 { i.to_string() } else { format!("doc-{i}") }))).unwrap();
        assert_eq!((index.len(), index.duplicates()), (n, 0));
        for i in 0..n {
            let (id, other) = (if i % 2 == 0 { i.to_string() } else { format!("doc-{i}") }, format!("doc-{}", i + n));
            assert_eq!(index.find(&id).unwrap(), Some(i as u32), "{id}");
            assert!(i % 2 == 0 || index.find(&other).unwrap().is_none(), "{other}");
        }
        index.bytes()
    });
    assert!(ids < 9 * n, "{ids} bytes");
}

#[test]
fn the_first_of_equal_ids_is_found_and_texts_without_id_are_skipped() {
    let ids = ["a", "b", "a", "", "c", "b", "a"].map(|id| (!id.is_empty()).then(|| id.to_string()));
    let index = index(ids).unwrap();
    assert_eq!((index.len(), index.duplicates()), (3, 3));
    assert_eq!(["a", "b", "c", "", "d"].map(|id| index.find(id).unwrap()), [Some(0), Some(1), Some(4), None, None]);
}

#[test]
fn a_million_equal_ids_do_not_hang() {
    let index = index(std::iter::repeat_n(Some("same".to_string()), 1_000_000)).unwrap();
    assert_eq!((index.find("same").unwrap(), index.duplicates()), (Some(0), 999_999));
}

#[test]
fn texts_without_any_id_are_refused() {
    let error = index([None, None]).err().unwrap().to_string();
    assert!(error.contains("no text has an id"), "{error}");
}

#[test]
fn ids_of_shards_are_found_across_shards() {
    let dir = Dir::new();
    let ids: Vec<String> = (0..5000).map(|i| format!("p{i}")).collect();
    let set = dir.set("set", ids.iter().map(|id| (id.as_str(), vec![9; 20])));
    assert!(set.facts().shards > 1);
    let index = IdIndex::new(set).unwrap();
    for (i, id) in ids.iter().enumerate() {
        assert_eq!(index.find(id).unwrap(), Some(i as u32));
    }
}
