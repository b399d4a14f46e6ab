//! Sample order, held-out split, and the cut into steps and ranks.

use std::collections::HashSet;

use retromae_engine::data::corpus::Corpus;
use retromae_engine::data::order::{BatchSize, Batching, Order, Part, Plan, StepPlan};

use super::common::corpus;

fn batching(size: BatchSize, accumulation: u64, ranks: u64) -> Batching {
    Batching { size, accumulation, ranks, max_length: 128 }
}

fn plan(texts: u64, size: BatchSize, accumulation: u64, ranks: u64, end: u64) -> Plan {
    Plan::new(Order::new(4, texts, 0).unwrap(), Part::Train, batching(size, accumulation, ranks), end).unwrap()
}

fn all_steps(plan: &Plan, corpus: &dyn Corpus, mut cursor: u64) -> Vec<StepPlan> {
    let mut steps = Vec::new();
    while let Some(step) = plan.step(corpus, cursor).unwrap() {
        assert!(step.next > cursor);
        cursor = step.next;
        steps.push(step);
    }
    steps
}

#[test]
fn the_split_is_exact_and_every_epoch_is_a_new_order_of_the_rest() {
    for (texts, held_out) in [(1, 0), (2, 1), (10, 3), (1000, 100), (37_584, 500)] {
        let order = Order::new(7, texts, held_out).unwrap();
        let eval: HashSet<u64> = (0..held_out).map(|i| order.text(Part::HeldOut, i)).collect();
        assert_eq!(eval.len() as u64, held_out);
        let train = texts - held_out;
        assert_eq!((order.texts(Part::Train), order.texts(Part::HeldOut)), (train, held_out));
        let epoch = |e: u64| (e * train..(e + 1) * train).map(|i| order.text(Part::Train, i)).collect::<Vec<_>>();
        let (first, second) = (epoch(0), epoch(1));
        for epoch in [&first, &second] {
            let distinct: HashSet<u64> = epoch.iter().copied().collect();
            assert_eq!(distinct.len() as u64, train);
            assert!(distinct.is_disjoint(&eval) && distinct.iter().all(|&text| text < texts));
        }
        if train >= 900 {
            assert!(first.iter().zip(&second).filter(|(a, b)| a == b).count() < 20);
        }
    }
}

#[test]
fn the_split_does_not_depend_on_the_epoch_and_grows_by_addition() {
    let (small, large) = (Order::new(7, 1000, 50).unwrap(), Order::new(7, 1000, 80).unwrap());
    assert!((0..50).all(|i| small.text(Part::HeldOut, i) == large.text(Part::HeldOut, i)));
    let other = Order::new(8, 1000, 50).unwrap();
    assert!((0..50).filter(|&i| small.text(Part::HeldOut, i) == other.text(Part::HeldOut, i)).count() < 5);
}

#[test]
fn batches_by_sequences_cover_every_sample_once_and_end_with_a_smaller_step() {
    let corpus = corpus([10; 10]);
    let plan = plan(10, BatchSize::Sequences(3), 2, 1, 20);
    let steps = all_steps(&plan, &corpus, 0);
    assert_eq!(steps[0], StepPlan { micro: vec![0..3, 3..6], next: 6 });
    assert_eq!(steps[3], StepPlan { micro: vec![18..20, 20..20], next: 20 });
    assert_eq!(plan.steps(&corpus, 0).unwrap(), 4);
    assert_eq!(plan.steps(&corpus, 18).unwrap(), 1);
    assert_eq!(plan.steps(&corpus, 20).unwrap(), 0);
    assert_eq!(plan.step(&corpus, 20).unwrap(), None);
}

#[test]
fn batches_by_tokens_are_full_but_never_over() {
    let lengths: Vec<usize> = (0..50).map(|i| 2 + 37 * i % 200).collect();
    let corpus = corpus(lengths.iter().copied());
    let plan = plan(50, BatchSize::Tokens(300), 2, 2, 130);
    let tokens_of = |sample: u64| lengths[plan.order().text(Part::Train, sample) as usize].min(128);
    let steps = all_steps(&plan, &corpus, 0);
    let mut at = 0;
    for step in &steps {
        assert_eq!(step.micro.len(), 4);
        for micro in &step.micro {
            assert_eq!(micro.start, at);
            at = micro.end;
            let tokens: usize = micro.clone().map(tokens_of).sum();
            assert!(tokens <= 300, "{tokens} tokens");
            assert!(at == 130 || tokens + tokens_of(at) > 300, "sample {at} would have fitted");
        }
        assert_eq!(step.next, at);
    }
    assert_eq!(at, 130);
    assert_eq!(plan.steps(&corpus, 0).unwrap(), steps.len() as u64);
}

#[test]
fn resuming_at_any_step_gives_the_steps_that_would_have_come() {
    let corpus = corpus((0..40).map(|i| 2 + 13 * i % 120));
    for size in [BatchSize::Sequences(3), BatchSize::Tokens(256)] {
        let plan = plan(40, size, 2, 1, 100);
        let steps = all_steps(&plan, &corpus, 0);
        for (i, step) in steps.iter().enumerate() {
            assert_eq!(all_steps(&plan, &corpus, step.next), steps[i + 1..]);
        }
    }
}

#[test]
fn ranks_share_the_micro_batches_that_one_rank_would_accumulate() {
    let corpus = corpus((0..40).map(|i| 2 + 13 * i % 120));
    for size in [BatchSize::Sequences(3), BatchSize::Tokens(256)] {
        let alone = all_steps(&plan(40, size, 4, 1, 100), &corpus, 0);
        for (accumulation, ranks) in [(1, 4), (2, 2)] {
            assert_eq!(all_steps(&plan(40, size, accumulation, ranks, 100), &corpus, 0), alone);
        }
        for step in &alone {
            let shared = plan(40, size, 2, 2, 100);
            for rank in 0..2 {
                let own: Vec<_> = shared.micro(&corpus, step, rank as u64, false).unwrap();
                let expected = [rank, rank + 2].map(|i| step.micro[i].clone());
                assert_eq!([0, 1].map(|i| own[i].neighbours()), expected);
                assert!(
                    own.iter().all(|micro| micro.own.is_empty() || micro.own == micro.neighbours().collect::<Vec<_>>())
                );
                assert_eq!(own[1].round, step.micro[2].start..step.micro[3].end);
            }
        }
    }
}

#[test]
fn ranks_get_equal_shares_of_texts_and_about_equal_ones_of_tokens() {
    let corpus = corpus((0..400).map(|i| 2 + (i * i * 31 + 17 * i) % 120));
    for ranks in [2u64, 3, 8] {
        let plan = plan(400, BatchSize::Sequences(8), 2, ranks, 1000);
        let (mut widest, mut neighbours) = (0, 0);
        for step in all_steps(&plan, &corpus, 0) {
            let shares: Vec<_> = (0..ranks).map(|rank| plan.micro(&corpus, &step, rank, true).unwrap()).collect();
            for (turn, round) in step.micro.chunks(ranks as usize).enumerate() {
                let mut all: Vec<u64> = shares.iter().flat_map(|share| share[turn].own.clone()).collect();
                all.sort_unstable();
                assert_eq!(all, (round[0].start..round[round.len() - 1].end).collect::<Vec<_>>());
                let sizes: Vec<usize> = shares.iter().map(|share| share[turn].own.len()).collect();
                assert!(
                    sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1 && sizes.iter().all(|n| *n <= 8)
                );
                let tokens = |samples: &mut dyn Iterator<Item = u64>| -> usize {
                    samples.map(|sample| corpus.length(plan.order().text(Part::Train, sample)).unwrap()).sum()
                };
                let spread = |of: Vec<usize>| of.iter().max().unwrap() - of.iter().min().unwrap();
                if all.len() as u64 == 8 * ranks {
                    let dealt = shares.iter().map(|share| tokens(&mut share[turn].own.iter().copied())).collect();
                    widest += spread(dealt);
                    neighbours += spread(round.iter().map(|part| tokens(&mut part.clone())).collect());
                }
            }
        }
        assert!(widest * 5 < neighbours, "{ranks} ranks: {widest} of {neighbours}");
    }
}

#[test]
fn settings_without_steps_are_refused() {
    assert!(Order::new(1, 0, 0).unwrap_err().to_string().contains("no texts"));
    assert!(Order::new(1, 5, 5).unwrap_err().to_string().contains("leave none to train on"));
    let refused = |batching, part, end| Plan::new(Order::new(1, 10, 2).unwrap(), part, batching, end).unwrap_err();
    let good = batching(BatchSize::Sequences(4), 1, 1);
    for (bad, message) in [
        (Batching { size: BatchSize::Sequences(0), ..good }, "the batch size is 0"),
        (Batching { size: BatchSize::Tokens(127), ..good }, "127 tokens per batch do not hold one text of 128 tokens"),
        (Batching { accumulation: 0, ..good }, "accumulated micro-batches is 0"),
        (Batching { ranks: 0, ..good }, "ranks is 0"),
        (Batching { max_length: 1, ..good }, "texts cannot be cut to 1 tokens"),
        (Batching { max_length: 65_536, ..good }, "texts cannot be cut to 65536 tokens"),
    ] {
        let error = refused(bad, Part::Train, 8);
        assert!(error.to_string().contains(message), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
    assert!(refused(good, Part::HeldOut, 3).to_string().contains("evaluation on 3 of 2 held-out texts"));
}

#[test]
fn epochs_may_be_fractions() {
    let order = Order::new(1, 110, 10).unwrap();
    assert_eq!([order.samples(1.0), order.samples(2.5), order.samples(0.004)], [100, 250, 0]);
}
