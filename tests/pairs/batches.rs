//! Packed batches: tokens, names, candidates, and that threads change nothing.

use std::sync::Arc;

use retromae_engine::data::corpus::{Corpus, MemoryCorpus};
use retromae_engine::data::loader::Ahead;
use retromae_engine::data::order::{BatchSize, Batching, Part, Plan};
use retromae_engine::data::pairs::batch::{ContrastiveBatch, ContrastiveBuilder, CrossBuilder, Duplicates, PairTexts};
use retromae_engine::data::pairs::texts::{TextRules, Texts};
use retromae_engine::data::pairs::{MissingScore, Pairs, PairsSettings};
use retromae_engine::rng::{Site, Stream};

use super::support::*;

/// Random queries and passages of which many are equal, each query with some positives and negatives.
fn world(seed: u64, group: usize) -> (Arc<Pairs>, Arc<MemoryCorpus>) {
    let mut random = Stream::new(seed, 0, Site::Init, 0);
    let passages = corpus((0..200).map(|_| {
        let (token, length) = (100 + random.below(120), 1 + random.below(30) as usize);
        vec![token; if token < 180 { 3 } else { length }]
    }));
    let list = |random: &mut Stream, n: u32| (0..n).map(|_| random.below(200)).collect::<Vec<u32>>();
    let lists: Vec<(Vec<u32>, Vec<u32>)> = (0..50)
        .map(|_| {
            let (positives, negatives) = (1 + random.below(4), random.below(12));
            (list(&mut random, positives), list(&mut random, negatives))
        })
        .collect();
    let lists: Vec<Lists<'_>> = lists.iter().map(|(p, n)| (p.as_slice(), n.as_slice())).collect();
    let settings = PairsSettings { group, depth: 8, missing_score: MissingScore::Error };
    (Arc::new(pairs(&lists, passages.clone(), settings).unwrap()), passages)
}

fn builder(pairs: &Arc<Pairs>, duplicates: Duplicates) -> ContrastiveBuilder {
    ContrastiveBuilder::new(4, pairs.clone(), TextRules::new(8), TextRules::new(16), duplicates).unwrap()
}

/// Text `i` as it is cut, by hand.
fn cut(corpus: &dyn Corpus, i: u32, rules: &TextRules) -> Vec<u32> {
    let (mut ids, mut starts) = (Vec::new(), Vec::new());
    corpus.read(u64::from(i), &mut ids, &mut starts).unwrap();
    let inner = [rules.prefix.as_slice(), &ids[1..ids.len() - 1]].concat();
    bordered(inner[..inner.len().min(rules.max_length - 2)].to_vec())
}

fn sequence(batch: &retromae_engine::data::pairs::texts::TextBatch, s: usize) -> &[u32] {
    &batch.ids[batch.cu_seqlens[s] as usize..batch.cu_seqlens[s + 1] as usize]
}

#[test]
fn a_batch_holds_the_texts_of_its_groups_under_their_names() {
    let (pairs, passages) = world(1, 3);
    let builder = builder(&pairs, Duplicates::Mask);
    let batch = builder.build(45..61).unwrap();
    assert_eq!((batch.queries.sequences(), batch.passages.sequences(), batch.group), (16, 48, 3));
    for (b, sample) in (45..61u64).enumerate() {
        let group = builder.groups().group(sample).unwrap();
        assert_eq!((batch.rows[b], batch.targets[b]), (group.row, 3 * b as u32));
        assert_eq!(batch.queries.samples[b], sample << 16);
        assert_eq!(sequence(&batch.queries, b), cut(&*pairs.queries().corpus, group.query, &TextRules::new(8)));
        for (m, &passage) in group.passages.iter().enumerate() {
            let s = 3 * b + m;
            assert_eq!((batch.members[s], batch.passages.samples[s]), (passage, sample << 16 | (m as u64 + 1)));
            assert_eq!(sequence(&batch.passages, s), cut(&*passages, passage, &TextRules::new(16)));
        }
    }
    assert_eq!(batch.passages.types, vec![0; batch.passages.tokens()]);
    assert_eq!(batch.teacher, None);
}

/// The bits by their definition: every query against every passage, texts compared token by token.
fn brute_force(pairs: &Pairs, passages: &dyn Corpus, batch: &ContrastiveBatch) -> Vec<u32> {
    let (words, text) = (batch.members.len().div_ceil(32), |p| cut(passages, p, &TextRules::new(16)));
    let mut bits = vec![0; batch.rows.len() * words];
    for (b, &row) in batch.rows.iter().enumerate() {
        for (p, &passage) in batch.members.iter().enumerate() {
            let positives = pairs.positives(row as usize);
            let same = positives.iter().any(|&positive| text(positive) == text(passage));
            let no_candidate = pairs.is_positive(row as usize, passage) || same;
            if no_candidate && p != batch.targets[b] as usize {
                bits[b * words + p / 32] |= 1u32 << (p % 32);
            }
        }
    }
    bits
}

#[test]
fn hidden_bits_equal_their_definition() {
    let (mut hidden, mut none) = (0, 0);
    for (seed, group) in [(1, 3), (2, 1), (3, 8), (4, 5)] {
        let (pairs, passages) = world(seed, group);
        let builder = builder(&pairs, Duplicates::Mask);
        for (first, size) in [(0, 1), (3, 2), (0, 11), (40, 32)] {
            let batch = builder.build(first..first + size).unwrap();
            let expected = brute_force(&pairs, &*passages, &batch);
            hidden += expected.iter().map(|w| w.count_ones()).sum::<u32>();
            let any = expected.iter().any(|&w| w != 0);
            none += u32::from(!any);
            assert_eq!(batch.hidden, any.then_some(expected), "seed {seed}, {size} samples from {first}");
        }
    }
    assert!(hidden > 50 && none >= 4, "{hidden} bits, {none} batches without");
}

#[test]
fn duplicates_may_be_kept() {
    let (pairs, _) = world(3, 8);
    let (masked, kept) = (builder(&pairs, Duplicates::Mask), builder(&pairs, Duplicates::Keep));
    let (masked, kept) = (masked.build(0..32).unwrap(), kept.build(0..32).unwrap());
    assert!(masked.hidden.is_some());
    assert_eq!(kept, ContrastiveBatch { hidden: None, ..masked });
}

#[test]
fn threads_and_what_was_built_before_change_nothing() {
    let (pairs, _) = world(5, 4);
    let cross = CrossBuilder::new(4, pairs.clone(), TextRules::new(6), vec![], 20).unwrap();
    let built = in_pools(|| {
        let fresh = builder(&pairs, Duplicates::Mask);
        fresh.build(7..19).unwrap();
        (fresh.build(40..60).unwrap(), cross.build(40..60).unwrap())
    });
    assert_eq!(built.0, builder(&pairs, Duplicates::Mask).build(40..60).unwrap());
}

#[test]
fn prefixes_come_after_cls_and_texts_are_cut_before_their_last_token() {
    let texts = corpus([vec![10, 11, 12, 13, 14, 15], vec![20]]);
    let check = |max_length, prefix: &[u32], expected: [&[u32]; 2]| {
        let texts = Texts::new(texts.clone(), TextRules { max_length, prefix: prefix.to_vec() }).unwrap();
        let batch = texts.pack(&[(9, 0), (8, 1)]).unwrap();
        assert_eq!([sequence(&batch, 0), sequence(&batch, 1)], expected);
        assert_eq!((batch.samples, texts.length(1).unwrap()), (vec![9, 8], expected[1].len()));
    };
    check(8, &[], [&[CLS, 10, 11, 12, 13, 14, 15, SEP], &[CLS, 20, SEP]]);
    check(7, &[], [&[CLS, 10, 11, 12, 13, 14, SEP], &[CLS, 20, SEP]]);
    check(3, &[], [&[CLS, 10, SEP], &[CLS, 20, SEP]]);
    check(6, &[7, 8], [&[CLS, 7, 8, 10, 11, SEP], &[CLS, 7, 8, 20, SEP]]);
    check(5, &[7, 8], [&[CLS, 7, 8, 10, SEP], &[CLS, 7, 8, 20, SEP]]);
    for (max_length, prefix) in [(2, vec![]), (4, vec![7, 8]), (100_000, vec![])] {
        let error = Texts::new(texts.clone(), TextRules { max_length, prefix }).err().unwrap().to_string();
        assert!(error.contains("choose a length from"), "{error}");
    }
}

#[test]
fn pairs_cut_the_passage_alone_and_the_query_at_its_own_limit() {
    let queries = corpus([vec![10, 11, 12, 13, 14], vec![15]]);
    let passages = corpus([vec![20, 21, 22, 23, 24, 25], vec![26]]);
    let query = TextRules { max_length: 5, prefix: vec![7] };
    let pack = |prefix: &[u32], max_length| {
        let texts = PairTexts::new(queries.clone(), passages.clone(), query.clone(), prefix.to_vec(), max_length);
        texts.unwrap().pack(&[(1, 0, 0), (2, 0, 1), (3, 1, 0)]).unwrap()
    };
    let batch = pack(&[], 9);
    assert_eq!(sequence(&batch, 0), [CLS, 7, 10, 11, SEP, 20, 21, 22, SEP]);
    assert_eq!(sequence(&batch, 1), [CLS, 7, 10, 11, SEP, 26, SEP]);
    assert_eq!(sequence(&batch, 2), [CLS, 7, 15, SEP, 20, 21, 22, 23, SEP]);
    let types: Vec<u32> =
        [(5, 4), (5, 2), (4, 5)].into_iter().flat_map(|(a, b)| [vec![0; a], vec![1; b]].concat()).collect();
    assert_eq!(batch.types, types);
    assert_eq!(batch.samples, [1, 2, 3]);
    let batch = pack(&[8], 100);
    assert_eq!(sequence(&batch, 0), [CLS, 7, 10, 11, SEP, 8, 20, 21, 22, 23, 24, 25, SEP]);
    let error = PairTexts::new(queries, passages, query, vec![8], 7).err().unwrap().to_string();
    assert_eq!(
        error,
        "pairs of 7 tokens do not hold a query of 5 and a passage; raise the length to 8, or lower that of queries"
    );
}

#[test]
fn cross_batches_hold_the_groups_of_contrastive_ones() {
    let (pairs, passages) = world(6, 4);
    let cross = CrossBuilder::new(4, pairs.clone(), TextRules::new(8), vec![], 40).unwrap().build(0..20).unwrap();
    let apart = ContrastiveBuilder::new(4, pairs, TextRules::new(8), TextRules::new(40), Duplicates::Mask).unwrap();
    let apart = apart.build(0..20).unwrap();
    assert_eq!(
        (&cross.rows, &cross.members, &cross.pairs.samples),
        (&apart.rows, &apart.members, &apart.passages.samples)
    );
    for s in 0..80 {
        let query = sequence(&apart.queries, s / 4);
        let passage = &cut(&*passages, cross.members[s], &TextRules::new(100))[1..];
        assert_eq!(sequence(&cross.pairs, s), [query, passage].concat());
    }
}

#[test]
fn the_loader_gives_the_builders_batches() {
    let (pairs, _) = world(7, 3);
    let builder = builder(&pairs, Duplicates::Mask);
    let plan = |size| {
        let batching = Batching { size, accumulation: 2, ranks: 1, max_length: 16 };
        Plan::new(builder.groups().order().clone(), Part::Train, batching, 70).unwrap()
    };
    let ahead = |plan, cursor| Ahead { plan, cursor, rank: 0, even: false, steps: 2, threads: 2 };
    let load = |cursor| {
        let loader = builder.clone().load(ahead(plan(BatchSize::Sequences(8)), cursor)).unwrap();
        loader.collect::<retromae_engine::Result<Vec<_>>>().unwrap()
    };
    let steps = load(0);
    assert_eq!(steps.iter().map(|s| s.next).collect::<Vec<_>>(), [16, 32, 48, 64, 70]);
    assert_eq!(steps[4].micro[0], builder.build(64..70).unwrap());
    assert_eq!(steps[4].micro[1].queries.sequences(), 0);
    assert_eq!(steps[1].micro[1], builder.build(24..32).unwrap());
    assert_eq!(load(32), steps[2..]);
    let error = builder.clone().load(ahead(plan(BatchSize::Tokens(4096)), 0)).err().unwrap().to_string();
    assert!(error.contains("not counted in tokens; choose a number of queries"), "{error}");
}

#[test]
fn an_error_names_the_first_sample_that_has_it() {
    let lists: [Lists<'_>; 3] = [(&[0], &[]), (&[1, 2, 3, 4], &[]), (&[0, 1, 2, 3, 4], &[])];
    let settings = PairsSettings { group: 3, depth: 8, missing_score: MissingScore::Error };
    let pairs = Arc::new(pairs(&lists, distinct(6, 1000, 4), settings).unwrap());
    let builder = builder(&pairs, Duplicates::Mask);
    let order = builder.groups().order().clone();
    let message = in_pools(|| builder.build(0..3).unwrap_err().to_string());
    let first = (0..3).map(|s| order.text(Part::Train, s)).find(|&row| row > 0).unwrap();
    let has = [0, 2, 1][first as usize];
    if has < 2 {
        assert!(message.starts_with(&format!("query text {first} has only {has} passages")), "{message}");
    } else {
        assert!(message.starts_with("query text 2 has only 1 passages"), "{message}");
    }
}
