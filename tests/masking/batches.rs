//! Packed batches and the picture of them.

use std::ops::Range;

use retromae_engine::data::batch::{Bags, Builder, PretrainBatch};
use retromae_engine::data::corpus::{Corpus, MemoryCorpus, Tokens};
use retromae_engine::data::masking::{MaskRules, Masker};
use retromae_engine::data::order::{Order, Part};
use retromae_engine::data::picture::picture;
use retromae_engine::{Error, Result};

use super::common::*;

#[test]
fn a_batch_packs_what_the_masker_gives_for_each_text() {
    let corpus = corpus([40, 2, 7, 300, 512, 3]);
    let order = Order::new(3, 6, 0).unwrap();
    let batch = build(&corpus, 3, 0..6);
    assert_eq!((batch.sequences(), batch.tokens()), (6, 864));
    assert_eq!(batch.samples, [0, 1, 2, 3, 4, 5]);
    assert_eq!(batch.cu_seqlens.last(), Some(&864));
    let mut masker = Masker::new(&rules(3));
    let (mut ids, mut starts) = (Vec::new(), Vec::new());
    let decoder = batch.decoder.as_ref().unwrap();
    assert_eq!(decoder.visibility.offsets.last().copied(), Some(decoder.visibility.words.len() as u32));
    for (s, text) in by_text(&batch).into_iter().enumerate() {
        let (sample, encoder_ids, encoder_labels, decoder_ids, decoder_labels, _, row) = text;
        corpus.read(order.text(Part::Train, sample), &mut ids, &mut starts).unwrap();
        let masks = mask(&mut masker, &ids, &starts, sample);
        assert_eq!(encoder_ids, masks.encoder_ids);
        assert_eq!(encoder_labels, masks.labels.iter().map(|&i| (i, ids[i as usize])).collect::<Vec<_>>());
        assert_eq!(decoder_ids, ids);
        let all_but_borders = (0..ids.len()).filter(|&i| ids[i] != CLS && ids[i] != SEP).map(|i| (i as u32, ids[i]));
        assert_eq!(decoder_labels, all_but_borders.collect::<Vec<_>>());
        assert_eq!(row, masks.row);
        let span = batch.cu_seqlens[s] as usize..batch.cu_seqlens[s + 1] as usize;
        for (i, &row) in masks.row.iter().enumerate() {
            for j in 0..ids.len() {
                let expected = i != j && !masks.hidden[usize::from(row)][j];
                assert_eq!(decoder.visibility.sees(s, span.clone(), i, j), expected, "text {s}: {i} sees {j}");
            }
        }
    }
}

/// Every distinct token of a text but [CLS] and [SEP], weighted with 1 / n of all n of them; texts of special tokens only and of one
/// token, and a text that is cut.
#[test]
fn bags_hold_the_distinct_words_of_the_unmasked_text() {
    let mut corpus = MemoryCorpus::default();
    let texts: [&[u32]; 4] = [&[900, 7, 7, 900, 4999, UNK, 3], &[], &[CLS, SEP], &[42]];
    for words in texts {
        let ids = [&[CLS], words, &[SEP]].concat();
        corpus.push(Tokens { ids: &ids, word_start: &vec![true; ids.len()] });
    }
    let order = Order::new(3, 4, 0).unwrap();
    let build = |rules, length| Builder::new(rules, order.clone(), Part::Train, length).build(&corpus, 0..4).unwrap();
    let batch = build(rules(3).with_bags(), 512);
    let bags = batch.bags.as_ref().unwrap();
    let of = |bags: &Bags, text: u64| {
        let s = (0..4).find(|&s| order.text(Part::Train, s) == text).unwrap() as usize;
        (bags.ids[bags.offsets[s] as usize..bags.offsets[s + 1] as usize].to_vec(), bags.weights[s])
    };
    assert_eq!(of(bags, 0), (vec![3, 7, UNK, 900, 4999], 1.0 / 7.0));
    assert_eq!(of(bags, 1), (vec![], 0.0));
    assert_eq!(of(bags, 2), (vec![], 0.0));
    assert_eq!(of(bags, 3), (vec![42], 1.0));
    assert_eq!(of(build(rules(3).with_bags(), 4).bags.as_ref().unwrap(), 0), (vec![7, 900], 0.5));
    // Nothing else of the batch changes.
    assert_eq!(PretrainBatch { bags: None, ..batch }, build(rules(3), 512));
}

#[test]
fn neither_neighbours_nor_threads_change_a_text() {
    let corpus = corpus((0..48).map(|i| 2 + 11 * i % 300));
    let whole = by_text(&build(&corpus, 5, 0..96));
    for size in [1, 7, 32] {
        let split: Vec<Text> = (0..96u64)
            .step_by(size)
            .flat_map(|at| by_text(&build(&corpus, 5, at..(at + size as u64).min(96))))
            .collect();
        assert!(split == whole, "batches of {size}");
    }
    for threads in [1, 2, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert!(pool.install(|| by_text(&build(&corpus, 5, 0..96))) == whole, "{threads} threads");
    }
    // The second epoch has the same texts under other masks.
    assert!(whole[..48].iter().all(|first| whole[48..].iter().filter(|second| second.3 == first.3).count() >= 1));
    assert!(
        whole[..48]
            .iter()
            .filter(|text| text.1.len() > 20)
            .all(|first| whole[48..].iter().all(|second| second.1 != first.1))
    );
    assert!(by_text(&build(&corpus, 6, 0..96)) != whole, "another seed");
}

#[test]
fn training_and_evaluation_masks_are_unrelated_and_evaluation_repeats() {
    let corpus = corpus([60]);
    let order = Order::new(1, 1, 0).unwrap();
    let batch = |part, order: &Order| Builder::new(rules(1), order.clone(), part, 512).build(&corpus, 0..1).unwrap();
    let (train, eval) = (batch(Part::Train, &order), batch(Part::HeldOut, &order));
    assert_eq!(eval, batch(Part::HeldOut, &order));
    assert_eq!(train.decoder.as_ref().unwrap().ids, eval.decoder.as_ref().unwrap().ids);
    assert_ne!(train.encoder_label_rows, eval.encoder_label_rows);
    assert_ne!(train.decoder.unwrap().visibility, eval.decoder.unwrap().visibility);
}

#[test]
fn plain_mlm_has_the_same_encoder_side_and_no_decoder() {
    let corpus = corpus([30, 60]);
    let order = Order::new(8, 2, 0).unwrap();
    let rules = MaskRules::new(8, VOCABULARY, 0.3, None).unwrap();
    let mlm = Builder::new(rules, order, Part::Train, 512).build(&corpus, 0..2).unwrap();
    let full = build(&corpus, 8, 0..2);
    assert!(mlm.decoder.is_none() && full.decoder.is_some());
    assert_eq!(mlm.encoder_ids, full.encoder_ids);
    assert_eq!(mlm.encoder_label_rows, full.encoder_label_rows);
    assert_eq!(mlm.encoder_label_ids, full.encoder_label_ids);
}

#[test]
fn batches_without_labels_and_without_texts_exist() {
    let corpus = corpus([2, 2]);
    let batch = build(&corpus, 1, 0..2);
    assert_eq!((batch.sequences(), batch.tokens()), (2, 4));
    assert!(batch.encoder_label_rows.is_empty() && batch.decoder.unwrap().label_rows.is_empty());
    let empty = build(&corpus, 1, 1..1);
    assert_eq!((empty.sequences(), empty.tokens(), empty.cu_seqlens), (0, 0, vec![0]));
    assert_eq!(empty.decoder.unwrap().visibility.offsets, [0]);
}

#[test]
fn long_texts_are_cut_and_keep_their_last_token() {
    let corpus = corpus([100]);
    let order = Order::new(1, 1, 0).unwrap();
    let batch = Builder::new(rules(1), order, Part::Train, 33).build(&corpus, 0..1).unwrap();
    let ids = batch.decoder.unwrap().ids;
    let (full, _) = text_of_length(100, 0);
    assert_eq!((&ids[..32], ids[32]), (&full[..32], SEP));
    assert_eq!(batch.encoder_label_rows.iter().max().map(|&row| row < 32), Some(true));
}

/// A corpus whose texts 3 and 5 cannot be read, and whose text 4 is shorter than it says.
struct Damaged(MemoryCorpus);

impl Corpus for Damaged {
    fn texts(&self) -> u64 {
        self.0.texts()
    }
    fn length(&self, i: u64) -> Result<usize> {
        Ok(self.0.length(i)? + usize::from(i == 4))
    }
    fn read(&self, i: u64, ids: &mut Vec<u32>, word_start: &mut Vec<bool>) -> Result<()> {
        if i == 3 || i == 5 {
            return Err(Error::refused(format!("text {i} is damaged")).path("s.rms"));
        }
        self.0.read(i, ids, word_start)
    }
}

#[test]
fn the_first_unreadable_text_in_sample_order_is_reported() {
    let corpus = Damaged(corpus([50; 8]));
    let order = Order::new(2, 8, 0).unwrap();
    let builder = Builder::new(rules(2), order.clone(), Part::Train, 512);
    let first = (0..8).map(|sample| order.text(Part::Train, sample)).find(|text| (3..=5).contains(text)).unwrap();
    for _ in 0..20 {
        let error = builder.build(&corpus, 0..8).unwrap_err().to_string();
        assert!(error.contains(&format!("text {first} ")), "{error}, first bad text {first}");
    }
    let sample_of = |text| (0..8).find(|&sample| order.text(Part::Train, sample) == text).unwrap();
    let short: Range<u64> = sample_of(4)..sample_of(4) + 1;
    assert_eq!(
        builder.build(&corpus, short).unwrap_err().to_string(),
        "text 4 has 50 tokens and not 51; check the data with `verify`"
    );
}

#[test]
fn the_picture_shows_words_labels_and_what_positions_see() {
    let mut corpus = MemoryCorpus::default();
    let (ids, word_start) = text_of_words(&[1, 2, 1, 3, 1, 1, 2, 1, 1, 1, 2, 1, 1]);
    corpus.push(Tokens { ids: &ids, word_start: &word_start });
    let batch = build(&corpus, 9, 0..1);
    let drawn = picture(&batch, 0, &word_start, &VOCABULARY, &[0, 5, 99], 64);
    let lines: Vec<&str> = drawn.lines().collect();
    assert_eq!(lines.len(), 5, "{drawn}");
    let body = |line: &str| line.split("  ").last().unwrap().trim().to_string();
    assert_eq!(body(lines[1]), "C||-||--|||-||||-||S");
    let encoder = body(lines[2]);
    assert_eq!(encoder.chars().filter(|&c| c != '.').count(), batch.encoder_label_rows.len());
    for (i, c) in encoder.chars().enumerate() {
        let labelled = batch.encoder_label_rows.contains(&(i as u32));
        let expected = match batch.encoder_ids[i] {
            _ if !labelled => '.',
            MASK => '#',
            id if id == ids[i] => 'k',
            _ => 'r',
        };
        assert_eq!(c, expected, "token {i}");
    }
    for (line, i) in [(lines[3], 0), (lines[4], 5)] {
        let sees: Vec<char> = body(line).chars().collect();
        assert_eq!(sees[i], 'o');
        assert_eq!(sees.iter().filter(|&&c| c == '#').count() + usize::from(hidden_itself(&batch, i)), 10);
    }
    // Folded, the same characters come in pieces.
    let folded = picture(&batch, 0, &word_start, &VOCABULARY, &[0, 5], 8);
    let piece = |n: usize| folded.lines().filter(|l| l.starts_with("encoder")).nth(n).map(body).unwrap();
    assert_eq!(format!("{}{}{}", piece(0), piece(1), piece(2)), encoder);
}

/// Whether the row that position `i` of the only text uses hides `i` too.
fn hidden_itself(batch: &retromae_engine::data::batch::PretrainBatch, i: usize) -> bool {
    let visibility = &batch.decoder.as_ref().unwrap().visibility;
    visibility.words[usize::from(visibility.row[i])] >> i & 1 == 0
}
