//! A step that ranks share, on the model itself: a rank whose numbers are not finite is named, and nobody updates.

use std::sync::Arc;

use retromae_engine::data::batch::{Builder, PretrainBatch};
use retromae_engine::data::corpus::{MemoryCorpus, Tokens};
use retromae_engine::data::masking::{MaskRules, Vocabulary};
use retromae_engine::data::order::{Order, Part};
use retromae_engine::device::{DType, Device};
use retromae_engine::graph::Capacity;
use retromae_engine::model::config::{Activation, BertConfig};
use retromae_engine::ops::optimizer::AdamW;
use retromae_engine::train::collective::tcp::Tcp;
use retromae_engine::train::collective::{Collective, Team};
use retromae_engine::train::step::{Objective, Pretrainer};
use retromae_engine::train::updates::Trainable;

use crate::support::ranks;

/// A model of a few numbers.
pub fn config(layers: usize) -> BertConfig {
    BertConfig {
        vocab_size: 40,
        hidden_size: 32,
        num_hidden_layers: layers,
        num_attention_heads: 1,
        intermediate_size: 32,
        hidden_act: Activation::Gelu,
        hidden_dropout_prob: 0.1,
        attention_probs_dropout_prob: 0.1,
        max_position_embeddings: 16,
        type_vocab_size: 2,
        initializer_range: 0.02,
        layer_norm_eps: 1e-12,
        pad_token_id: 0,
        raw: serde_json::Map::new(),
    }
}

/// The batch of some of eight texts.
pub fn batch(objective: Objective, samples: std::ops::Range<u64>) -> PretrainBatch {
    let mut corpus = MemoryCorpus::default();
    for text in 0..8u32 {
        let mut ids = vec![1];
        ids.extend((0..5 + text).map(|i| 5 + (text * 13 + i * 7) % 35));
        ids.push(2);
        corpus.push(Tokens { ids: &ids, word_start: &vec![true; ids.len()] });
    }
    let vocabulary = Vocabulary { size: 40, cls: 1, sep: 2, pad: 0, mask: 4, unk: Some(3) };
    let rules = MaskRules::new(3, vocabulary, 0.3, objective.has_decoder().then_some(0.5)).unwrap();
    let rules = if objective == Objective::DupMae { rules.with_bags() } else { rules };
    Builder::new(rules, Order::new(3, 8, 0).unwrap(), Part::Train, 16).build(&corpus, samples).unwrap()
}

fn model() -> Pretrainer {
    let capacity = Capacity { tokens: 128, sequences: 8, length: 16, encoder_labels: 128 };
    let model = Pretrainer::new(Device::Cpu, &config(1), Objective::Mlm, capacity, DType::F32).unwrap();
    model.params().load(3, 0.02, |_, _, _| Ok(false)).unwrap();
    model
}

/// A step of a rank on its texts, of which rank `bad` spoils its weights before; what came out, and whether the weights changed.
fn step(tcp: &Arc<Tcp>, bad: Option<usize>) -> (f64, bool, Vec<usize>, bool) {
    let mut model = model();
    model.optimizer_mut().join(Team::new(tcp.clone()));
    if bad == Some(tcp.rank()) {
        let part = model.params().parts()[0].clone();
        model.params().set(&part, &vec![f32::NAN; part.elements()]);
    }
    let before = model.params().weights().to_vec::<f32>();
    let first = 4 * tcp.rank() as u64;
    let done = model.step(&[batch(Objective::Mlm, first..first + 4)], &AdamW::default(), 0.01, 1, 3).unwrap();
    let bits = |all: Vec<f32>| all.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let changed = bits(model.params().weights().to_vec()) != bits(before);
    (done.grad_norm, done.skipped, model.optimizer().culprits().to_vec(), changed)
}

#[test]
fn a_rank_without_finite_numbers_is_named_and_nobody_updates() {
    let good = ranks(2, |tcp| step(tcp, None));
    assert_eq!(good[0], good[1]);
    assert!(good[0].0 > 0.0 && !good[0].1 && good[0].2.is_empty() && good[0].3, "{good:?}");
    let mut alone = model();
    let done = alone.step(&[batch(Objective::Mlm, 0..8)], &AdamW::default(), 0.01, 1, 3).unwrap();
    assert!((done.grad_norm / good[0].0 - 1.0).abs() < 1e-5, "{} {}", done.grad_norm, good[0].0);
    for (norm, skipped, culprits, changed) in ranks(2, |tcp| step(tcp, Some(1))) {
        assert!(!norm.is_finite() && skipped && culprits == [1] && !changed, "{norm} {skipped} {culprits:?} {changed}");
    }
}
