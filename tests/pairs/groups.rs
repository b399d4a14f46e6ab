//! The passages of a query: distribution over epochs, and what never happens.

use std::collections::HashMap;
use std::sync::Arc;

use retromae_engine::data::corpus::MemoryCorpus;
use retromae_engine::data::pairs::groups::{Group, Groups};
use retromae_engine::data::pairs::texts::{TextRules, Texts};
use retromae_engine::data::pairs::{Draft, MissingScore, PairsSettings};

use super::support::*;

fn settings(group: usize, depth: usize) -> PairsSettings {
    PairsSettings { group, depth, missing_score: MissingScore::Error }
}

fn groups(lists: &[Lists<'_>], passages: Arc<MemoryCorpus>, settings: PairsSettings, seed: u64) -> Groups {
    let texts = Arc::new(Texts::new(passages.clone(), TextRules::new(16)).unwrap());
    Groups::new(seed, Arc::new(pairs(lists, passages, settings).unwrap()), texts).unwrap()
}

/// How often each passage came in the groups of query 0, as positive and as another.
fn counts(groups: &Groups, rows: u64, epochs: u64) -> [HashMap<u32, u32>; 2] {
    let mut counts = [HashMap::new(), HashMap::new()];
    for sample in 0..rows * epochs {
        let group = groups.group(sample).unwrap();
        if group.row == 0 {
            *counts[0].entry(group.passages[0]).or_default() += 1;
            group.passages[1..].iter().for_each(|&p| *counts[1].entry(p).or_default() += 1);
        }
    }
    counts
}

#[test]
fn positives_and_negatives_come_about_equally_often() {
    let negatives: Vec<u32> = (10..40).collect();
    let groups = groups(&[(&[3, 1, 7], &negatives), (&[2], &[])], distinct(60, 1000, 4), settings(5, 20), 1);
    let [positives, others] = counts(&groups, 2, 3000);
    assert_eq!(positives.len(), 3);
    for p in [1, 3, 7] {
        // 3000 draws of a third: standard deviation 26.
        assert!((900..1100).contains(&positives[&p]), "{positives:?}");
    }
    // 4 of the 20 best of 30: 600 each, standard deviation 22.
    assert_eq!(others.len(), 20, "{others:?}");
    for n in 10..30 {
        assert!((510..690).contains(&others[&n]), "{n}: {others:?}");
    }
}

#[test]
fn a_group_repeats_nothing_and_holds_no_other_positive() {
    let lists: Vec<(Vec<u32>, Vec<u32>)> =
        (0..20).map(|q| ((q..q + 1 + q % 4).collect(), (30..30 + 5 * q).collect())).collect();
    let lists: Vec<Lists<'_>> = lists.iter().map(|(p, n)| (p.as_slice(), n.as_slice())).collect();
    let groups = groups(&lists, distinct(150, 1000, 4), settings(12, 40), 5);
    for sample in 0..20 * 30 {
        let group = groups.group(sample).unwrap();
        let row = group.row as usize;
        let pairs = groups.pairs();
        assert_eq!(group.passages.len(), 12);
        assert!(pairs.is_positive(row, group.passages[0]));
        assert!(group.passages[1..].iter().all(|&p| !pairs.is_positive(row, p)));
        let mut sorted = group.passages.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), 12, "{group:?}");
        // As many as there are come from the list.
        let (listed, best) = (pairs.negatives(row), pairs.negatives(row).len().min(40));
        let from_list = group.passages[1..].iter().filter(|p| listed[..best].contains(p)).count();
        assert!(from_list >= best.min(11), "{group:?}");
    }
}

#[test]
fn every_query_comes_once_an_epoch_and_groups_depend_on_seed_epoch_and_sample_alone() {
    let lists: Vec<Lists<'_>> = vec![(&[0, 1], &[5, 6, 7, 8]); 9];
    let make = |seed| groups(&lists, distinct(20, 1000, 4), settings(3, 4), seed);
    let all = |groups: &Groups| (0..27).map(|s| groups.group(s).unwrap()).collect::<Vec<Group>>();
    let first = all(&make(1));
    assert_eq!(first, all(&make(1)));
    assert_ne!(first, all(&make(2)));
    for epoch in first.chunks(9) {
        let mut rows: Vec<u32> = epoch.iter().map(|g| g.row).collect();
        rows.sort_unstable();
        assert_eq!(rows, (0..9).collect::<Vec<_>>());
    }
    let of_row = |epoch: usize| first[9 * epoch..][..9].iter().find(|g| g.row == 4).unwrap();
    assert!((0..3).any(|e| of_row(e).passages != of_row(0).passages), "epochs differ");
    // From the middle, backwards, alone: the same.
    assert_eq!(make(1).group(13).unwrap(), first[13]);
}

#[test]
fn texts_equal_to_a_positive_or_to_each_other_are_not_taken() {
    // Passages 0 to 9, each five times: i, i + 10, …; the positive 0 has equals 10, 20, 30, 40.
    let passages = corpus((0..50).map(|i| vec![100 + i % 10; 3]));
    let groups = groups(&[(&[0], &[10, 1, 11, 2, 12, 20]), (&[3, 4], &[])], passages, settings(7, 100), 3);
    for sample in 0..200 {
        let group = groups.group(sample).unwrap();
        let mut texts: Vec<u32> = group.passages.iter().map(|p| p % 10).collect();
        texts.sort_unstable();
        texts.dedup();
        assert_eq!(texts.len(), 7, "{group:?}");
        if group.row == 1 {
            assert!(group.passages[1..].iter().all(|p| ![3, 4].contains(&(p % 10))), "{group:?}");
        }
    }
}

#[test]
fn texts_that_differ_only_behind_the_cut_are_equal() {
    let passages = corpus([vec![7; 20], [vec![7; 14], vec![8; 6]].concat(), vec![9; 3], vec![10; 3]]);
    // 16 tokens: [CLS], 14 of the text, [SEP].
    let groups = groups(&[(&[0], &[1, 2])], passages, settings(3, 10), 3);
    for sample in 0..20 {
        assert!(!groups.group(sample).unwrap().passages.contains(&1));
    }
}

#[test]
fn a_corpus_just_large_enough_is_used_up_and_one_too_small_is_refused() {
    let lists: [Lists<'_>; 1] = [(&[0, 1], &[])];
    let five = groups(&lists, distinct(5, 1000, 4), settings(4, 10), 3);
    for sample in 0..50 {
        let mut others = five.group(sample).unwrap().passages[1..].to_vec();
        others.sort_unstable();
        assert_eq!(others, [2, 3, 4]);
    }
    let error = groups(&lists, distinct(5, 1000, 4), settings(5, 10), 3).group(0).unwrap_err().to_string();
    assert_eq!(
        error,
        "query text 0 has only 3 passages of different text that are none of its positives; its group takes 4; \
         choose smaller groups or give the whole corpus"
    );
    // All texts equal: no hang.
    let same = groups(&[(&[0], &[1, 2])], corpus((0..3000).map(|_| vec![7; 3])), settings(2, 10), 3);
    assert!(same.group(0).unwrap_err().to_string().contains("has only 0 passages of different text"));
}

#[test]
fn random_passages_are_spread_over_the_corpus() {
    let groups = groups(&[(&[0], &[])], distinct(100, 1000, 4), settings(2, 10), 9);
    let [_, others] = counts(&groups, 1, 9900);
    assert_eq!(others.len(), 99);
    assert!(others.values().all(|n| (50..160).contains(n)), "{others:?}");
}

#[test]
fn scores_follow_their_passages_and_equal_texts_fill_where_only_they_are_scored() {
    let mut draft = Draft::new(10);
    draft.positive(0, 0);
    draft.positive(0, 1);
    for n in [2, 3, 4] {
        draft.negative(0, n);
    }
    (0..5).for_each(|p| draft.score(0, p, 10.0 - p as f32));
    // 4 has the text of 0.
    let passages = corpus([5, 6, 7, 8, 5, 9].map(|t| vec![t; 3]));
    let pairs = draft.finish(side(distinct(1, 10, 3)), side(passages.clone()), settings(4, 10)).unwrap();
    let texts = Arc::new(Texts::new(passages, TextRules::new(16)).unwrap());
    let groups = Groups::new(3, Arc::new(pairs), texts).unwrap();
    for sample in 0..50 {
        let group = groups.group(sample).unwrap();
        assert!(group.passages.len() == 4 && group.passages[0] < 2 && group.passages[3] == 4, "{group:?}");
        let expected: Vec<f32> = group.passages.iter().map(|&p| 10.0 - p as f32).collect();
        assert_eq!(group.scores.unwrap(), expected);
    }
}
