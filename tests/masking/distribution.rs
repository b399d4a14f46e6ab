//! The masks' distribution, at fixed seeds: exact where small enough to count, otherwise within five standard deviations.

use std::collections::HashMap;

use retromae_engine::data::masking::{MaskRules, Masker};

use super::common::*;

/// Asserts that a count of successes in `n` trials of probability `p` is within five standard deviations.
fn near(count: usize, n: usize, p: f64, what: &str) {
    let (expected, sd) = (n as f64 * p, (n as f64 * p * (1.0 - p)).sqrt());
    let off = (count as f64 - expected) / sd;
    assert!(off.abs() < 5.0, "{what}: {count} of {n}, expected {expected:.1}: off by {off:.1} standard deviations");
}

#[test]
fn encoder_replaces_80_10_10() {
    let mut masker = Masker::new(&rules(11));
    let (mut n, mut masked, mut random, mut kept) = (0, 0, 0, 0);
    let mut halves = [0, 0];
    for sample in 0..300 {
        let (ids, starts) = text_of_length(512, sample);
        let masks = mask(&mut masker, &ids, &starts, sample);
        for &i in &masks.labels {
            n += 1;
            match masks.encoder_ids[i as usize] {
                MASK => masked += 1,
                id if id == ids[i as usize] => kept += 1,
                id => {
                    random += 1;
                    halves[usize::from(id >= VOCABULARY.size / 2)] += 1;
                }
            }
        }
    }
    assert_eq!(n, masked + random + kept);
    // A random token is the same token or [MASK] once in V.
    let v = f64::from(VOCABULARY.size);
    near(masked, n, 0.8 + 0.1 / v, "[MASK]");
    near(random, n, 0.1 - 0.2 / v, "random token");
    near(kept, n, 0.1 + 0.1 / v, "kept");
    near(halves[0], random, 0.5, "random tokens in the lower half of the vocabulary");
}

#[test]
fn every_position_draws_its_row_uniformly() {
    let mut masker = Masker::new(&rules(12));
    // 256: a power of two, 37: not one.
    for length in [256, 37] {
        let (ids, starts) = text_of_length(length, 0);
        let mut count = vec![0usize; length];
        let mut same_as_before = 0;
        let samples = 400;
        for sample in 0..samples {
            let row = mask(&mut masker, &ids, &starts, sample).row;
            row.iter().for_each(|&r| count[usize::from(r)] += 1);
            same_as_before += row.windows(2).filter(|pair| pair[0] == pair[1]).count();
        }
        let n = samples as usize * length;
        for (row, &count) in count.iter().enumerate() {
            near(count, n, 1.0 / length as f64, &format!("row {row} of {length}"));
        }
        near(same_as_before, samples as usize * (length - 1), 1.0 / length as f64, "neighbours with one row");
    }
}

/// Probability of each set of hidden words, by walking every order of the words.
fn exact_distribution(lengths: &[usize], target: usize) -> HashMap<u32, f64> {
    fn walk(order: &mut Vec<usize>, lengths: &[usize], target: usize, result: &mut HashMap<u32, f64>) {
        if order.len() == lengths.len() {
            let (mut set, mut hidden) = (0, 0);
            for &w in order.iter() {
                if hidden < target && hidden + lengths[w] <= target {
                    set |= 1 << w;
                    hidden += lengths[w];
                }
            }
            *result.entry(set).or_default() += 1.0;
            return;
        }
        for w in 0..lengths.len() {
            if !order.contains(&w) {
                order.push(w);
                walk(order, lengths, target, result);
                order.pop();
            }
        }
    }
    let mut result = HashMap::new();
    walk(&mut Vec::new(), lengths, target, &mut result);
    let all: f64 = result.values().sum();
    result.values_mut().for_each(|p| *p /= all);
    result
}

#[test]
fn sets_of_hidden_words_are_as_likely_as_under_a_full_shuffle() {
    let lengths = [1, 2, 1, 3, 1, 2, 4];
    let (ids, starts) = text_of_words(&lengths);
    let first: Vec<usize> = (0..lengths.len()).map(|w| 1 + lengths[..w].iter().sum::<usize>()).collect();
    // 16 tokens: p = 0.5 hides 8, p = 0.3 hides 5.
    let (decoder, encoder) = (exact_distribution(&lengths, 8), exact_distribution(&lengths, 5));
    let mut masker = Masker::new(&rules(13));
    let (mut decoder_count, mut encoder_count) = (HashMap::new(), HashMap::new());
    let samples = 20_000;
    for sample in 0..samples {
        let masks = mask(&mut masker, &ids, &starts, sample);
        for hidden in &masks.hidden {
            let set = first.iter().enumerate().fold(0u32, |set, (w, &at)| set | u32::from(hidden[at]) << w);
            *decoder_count.entry(set).or_insert(0usize) += 1;
        }
        let set = first
            .iter()
            .enumerate()
            .fold(0u32, |set, (w, &at)| set | u32::from(masks.labels.contains(&(at as u32))) << w);
        *encoder_count.entry(set).or_insert(0usize) += 1;
    }
    for (name, exact, count, n) in [
        ("decoder", decoder, decoder_count, samples as usize * 16),
        ("encoder", encoder, encoder_count, samples as usize),
    ] {
        assert!(count.keys().all(|set| exact.contains_key(set)), "{name}: a set of words that no order gives");
        for (set, p) in &exact {
            near(count.get(set).copied().unwrap_or(0), n, *p, &format!("{name}, words {set:b}"));
        }
    }
}

#[test]
fn words_of_long_texts_are_hidden_equally_often_and_independently() {
    // One draw in two per random word beyond 1,024 words, four below: both kinds.
    for words in [300, 1500] {
        let (ids, starts) = text_of_words(&vec![1; words]);
        let mut masker = Masker::new(&MaskRules::new(14, VOCABULARY, 0.3, Some(0.3)).unwrap());
        let mut count = vec![0usize; ids.len()];
        let (mut both, mut rows, mut hidden_per_row) = (0, 0, 0);
        for sample in 0..20 {
            let masks = mask(&mut masker, &ids, &starts, sample);
            for pair in masks.hidden.windows(2) {
                rows += 1;
                hidden_per_row = pair[0].iter().filter(|&&h| h).count();
                both += pair[0].iter().zip(&pair[1]).filter(|(a, b)| **a && **b).count();
                count.iter_mut().zip(&pair[0]).for_each(|(c, &h)| *c += usize::from(h));
            }
        }
        let p = hidden_per_row as f64 / words as f64;
        for (i, &c) in count[1..=words].iter().enumerate() {
            near(c, rows, p, &format!("word {i} of {words}"));
        }
        near(both, rows * words, p * p, "hidden in two neighbouring rows");
    }
}
