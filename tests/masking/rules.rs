//! The rules, exactly.

use retromae_engine::data::masking::{LONGEST_TEXT, MaskRules, Masker, target};

use super::common::*;

/// The words of a text as ranges of positions.
fn words(ids: &[u32], starts: &[bool]) -> Vec<std::ops::Range<usize>> {
    let mut words: Vec<std::ops::Range<usize>> = Vec::new();
    for i in 0..ids.len() {
        if ids[i] == CLS || ids[i] == SEP {
            continue;
        }
        match words.last_mut() {
            Some(word) if word.end == i && !starts[i] => word.end += 1,
            _ => words.push(i..i + 1),
        }
    }
    words
}

/// Whether these hidden tokens can be the end of a walk: whole words only, at most `target`, and no word left out that would still fit.
fn check_hidden(hidden: &[bool], words: &[std::ops::Range<usize>], target: usize, case: &str) {
    let count = hidden.iter().filter(|&&h| h).count();
    assert!(count <= target, "{case}: {count} hidden of {target}");
    let in_words: usize = words.iter().map(|w| w.len()).sum();
    let mut whole = 0;
    for word in words {
        let hidden_in_word = hidden[word.clone()].iter().filter(|&&h| h).count();
        assert!(hidden_in_word == 0 || hidden_in_word == word.len(), "{case}: word {word:?} is split");
        whole += hidden_in_word;
        assert!(hidden_in_word > 0 || count + word.len() > target, "{case}: word {word:?} would have fitted");
    }
    assert_eq!(whole, count, "{case}: [CLS] or [SEP] hidden");
    if words.iter().all(|w| w.len() == 1) {
        assert_eq!(count, target.min(in_words), "{case}");
    }
}

#[test]
fn target_rounds_half_to_even_and_is_held_between_1_and_512() {
    // Python: min(512, max(1, int(round(n * p)))).
    let cases = [
        (512, 0.3, 154),
        (512, 0.5, 256),
        (5, 0.5, 2),
        (7, 0.5, 4),
        (15, 0.3, 4),
        (5, 0.3, 2),
        (25, 0.3, 8),
        (35, 0.3, 10),
        (45, 0.3, 14),
        (1, 0.3, 1),
        (0, 0.3, 1),
        (3, 0.0, 1),
        (4000, 0.3, 512),
        (600, 1.0, 512),
        (10, 0.15, 2),
        (30, 0.15, 4),
        (50, 0.15, 8),
    ];
    for (length, p, expected) in cases {
        assert_eq!(target(length, p), expected, "{length} × {p}");
    }
}

#[test]
fn masks_hide_whole_words_up_to_the_target() {
    let mut masker = Masker::new(&rules(1));
    // 31–33 and 63–65: borders of a word of bits; 257: more positions than rows; 600, 1100, 1500: beyond the pool, and either shuffle.
    for length in [2, 3, 4, 5, 10, 31, 32, 33, 63, 64, 65, 100, 255, 256, 257, 511, 512, 600, 1100, 1500] {
        for sample in 0..4 {
            let (ids, starts) = text_of_length(length, sample);
            let (words, case) = (words(&ids, &starts), format!("length {length} sample {sample}"));
            let masks = mask(&mut masker, &ids, &starts, sample);
            assert_eq!(masks.hidden.len(), length.min(256), "{case}");
            assert!(masks.row.iter().all(|&r| usize::from(r) < masks.hidden.len()), "{case}");
            for hidden in &masks.hidden {
                check_hidden(hidden, &words, target(length, 0.5), &case);
            }
            let mut labelled = vec![false; length];
            masks.labels.iter().for_each(|&i| labelled[i as usize] = true);
            check_hidden(&labelled, &words, target(length, 0.3), &case);
            assert!(masks.labels.is_sorted(), "{case}");
            for i in 0..length {
                let kept = masks.encoder_ids[i] == ids[i];
                assert!(kept || labelled[i], "{case}: token {i} changed without a label");
                assert!(masks.encoder_ids[i] < VOCABULARY.size, "{case}");
            }
        }
    }
}

#[test]
fn a_word_longer_than_the_target_is_skipped() {
    let mut masker = Masker::new(&rules(2));
    // 12 tokens: the encoder hides round(3.6) = 4 and the decoder 6, so the word of 9 never fits and the single token always does.
    let (ids, starts) = text_of_words(&[9, 1]);
    for sample in 0..50 {
        let masks = mask(&mut masker, &ids, &starts, sample);
        assert_eq!(masks.labels, [10]);
        assert!(masks.hidden.iter().all(|row| (0..12).all(|j| row[j] == (j == 10))));
    }
    // One word that is all of the text: nothing can be hidden, so there are no labels.
    let (ids, starts) = text_of_words(&[30]);
    let masks = mask(&mut masker, &ids, &starts, 0);
    assert!(masks.labels.is_empty() && masks.encoder_ids == ids);
    assert!(masks.hidden.iter().flatten().all(|&h| !h));
}

#[test]
fn words_of_more_tokens_than_a_word_has_bits_are_hidden_whole() {
    let mut masker = Masker::new(&rules(3));
    let (ids, starts) = text_of_words(&[1, 31, 32, 33, 1, 64, 65, 100, 1]);
    let words = words(&ids, &starts);
    let mut hidden_long = 0;
    for sample in 0..20 {
        let masks = mask(&mut masker, &ids, &starts, sample);
        for hidden in &masks.hidden {
            check_hidden(hidden, &words, target(ids.len(), 0.5), "long words");
            hidden_long += usize::from(hidden[words[7].start]);
        }
    }
    assert!(hidden_long > 100, "the word of 100 tokens was hidden {hidden_long} times");
}

#[test]
fn a_continuation_at_the_start_of_a_text_or_behind_sep_begins_a_word() {
    let mut masker = Masker::new(&MaskRules::new(4, VOCABULARY, 0.5, Some(0.5)).unwrap());
    // A block cut inside a word begins with a continuation; a title may be set off by [SEP].
    let ids = [CLS, 300, 301, SEP, 302, 303, 304, SEP];
    let starts = [true, false, true, true, false, true, false, true];
    let words = words(&ids, &starts);
    assert_eq!(words, [1..2, 2..3, 4..5, 5..7]);
    let mut seen = [false; 8];
    for sample in 0..100 {
        let masks = mask(&mut masker, &ids, &starts, sample);
        for hidden in &masks.hidden {
            check_hidden(hidden, &words, 4, "inner [SEP]");
            seen.iter_mut().zip(hidden).for_each(|(s, h)| *s |= h);
        }
    }
    assert_eq!(seen, [false, true, true, false, true, true, true, false]);
}

#[test]
fn unknown_and_other_special_tokens_are_hidden_but_carry_no_encoder_label() {
    let mut masker = Masker::new(&MaskRules::new(5, VOCABULARY, 1.0, Some(1.0)).unwrap());
    let ids = [CLS, 300, UNK, 301, MASK, 0, 302, SEP];
    let masks = mask(&mut masker, &ids, &[true; 8], 0);
    assert_eq!(masks.labels, [1, 3, 6]);
    for i in [0, 2, 4, 5, 7] {
        assert_eq!(masks.encoder_ids[i], ids[i]);
    }
    let all_words = [false, true, true, true, true, true, true, false];
    assert!(masks.hidden.iter().all(|row| row[..] == all_words));
}

#[test]
fn texts_without_words_and_empty_texts_have_no_labels() {
    let mut masker = Masker::new(&rules(6));
    for ids in [&[CLS, SEP][..], &[CLS], &[]] {
        let masks = mask(&mut masker, ids, &vec![true; ids.len()], 0);
        assert!(masks.labels.is_empty() && masks.encoder_ids == ids);
        assert_eq!(masks.hidden.len(), ids.len());
        assert!(masks.hidden.iter().flatten().all(|&h| !h));
    }
}

#[test]
fn the_longest_text_is_masked() {
    let mut masker = Masker::new(&rules(7));
    let (ids, starts) = text_of_length(LONGEST_TEXT, 0);
    let masks = mask(&mut masker, &ids, &starts, 0);
    assert_eq!(masks.labels.len(), 512);
    assert!(masks.hidden.iter().all(|row| row.iter().filter(|&&h| h).count() == 512));
    assert!(masks.labels[511] > 60_000, "the walk reaches the end of the text");
}

#[test]
fn probabilities_outside_0_to_1_are_refused() {
    for (encoder, decoder) in [(1.5, None), (-0.1, None), (f64::NAN, None), (0.3, Some(2.0)), (0.3, Some(f64::NAN))] {
        let error = MaskRules::new(1, VOCABULARY, encoder, decoder).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("mask probability"), "{error}");
    }
}
