//! Speed of a pre-training step on the CPU: `cargo bench --bench step [-- WORKLOAD]`.
//!
//! The workloads of the PyTorch baselines for CPUs: a model of MiniLM's size (6 layers, 384 wide, vocabulary 30,522), dropout 0.1,
//! 30 % of the tokens masked, clipping and AdamW inside the time. `full512`: 16 texts of 128 tokens. `passages`: 2,048 tokens in
//! texts of log-normal length (median 75, σ 0.45, 8 to 150). Batches are ready beforehand, as they are in the baselines.

use std::time::Instant;

use retromae_engine::data::batch::{Builder, PretrainBatch};
use retromae_engine::data::corpus::{MemoryCorpus, Tokens};
use retromae_engine::data::masking::{MaskRules, Vocabulary};
use retromae_engine::data::order::{Order, Part};
use retromae_engine::device::{DType, Device};
use retromae_engine::graph::Capacity;
use retromae_engine::model::config::{Activation, BertConfig};
use retromae_engine::ops::optimizer::AdamW;
use retromae_engine::rng::{Site, Stream};
use retromae_engine::train::step::{Objective, Pretrainer};

const VOCABULARY: Vocabulary = Vocabulary { size: 30_522, cls: 101, sep: 102, pad: 0, mask: 103, unk: Some(100) };
const STEPS: usize = 12;

fn minilm() -> BertConfig {
    BertConfig {
        vocab_size: 30_522,
        hidden_size: 384,
        num_hidden_layers: 6,
        num_attention_heads: 12,
        intermediate_size: 1536,
        hidden_act: Activation::Gelu,
        hidden_dropout_prob: 0.1,
        attention_probs_dropout_prob: 0.1,
        max_position_embeddings: 512,
        type_vocab_size: 2,
        initializer_range: 0.02,
        layer_norm_eps: 1e-12,
        pad_token_id: 0,
        raw: Default::default(),
    }
}

/// Lengths of the texts of a workload, the same multiset every time.
fn lengths(workload: &str) -> Vec<usize> {
    if workload == "full512" {
        return vec![128; 16];
    }
    let mut stream = Stream::new(1234, 0, Site::Init, 0);
    let (mut out, mut left) = (Vec::new(), 2048usize);
    while left > 0 {
        let drawn = (75.0 * f64::from(stream.normal() * 0.45).exp()).round().clamp(8.0, 150.0) as usize;
        let n = if drawn + 8 <= left {
            drawn
        } else if left <= 150 {
            left
        } else {
            left / 2
        };
        out.push(n);
        left -= n;
    }
    out
}

fn batches(workload: &str) -> retromae_engine::Result<Vec<PretrainBatch>> {
    let lengths = lengths(workload);
    let mut corpus = MemoryCorpus::default();
    for text in 0..lengths.len() * STEPS {
        let length = lengths[text % lengths.len()];
        let mut random = Stream::new(1, 1, Site::Init, text as u64);
        let mut ids: Vec<u32> = (0..length).map(|_| 1000 + random.below(29_000)).collect();
        (ids[0], ids[length - 1]) = (VOCABULARY.cls, VOCABULARY.sep);
        corpus.push(Tokens { ids: &ids, word_start: &vec![true; length] });
    }
    let texts = lengths.len() as u64;
    let order = Order::new(7, texts * STEPS as u64, 0)?;
    let builder = Builder::new(MaskRules::new(7, VOCABULARY, 0.3, Some(0.5))?, order, Part::Train, 512);
    // Steps may mix the lengths of the workload; the tokens of all steps together are those of STEPS times the workload.
    (0..STEPS as u64).map(|step| builder.build(&corpus, step * texts..(step + 1) * texts)).collect()
}

fn run(workload: &str) -> retromae_engine::Result<()> {
    let batches = batches(workload)?;
    let largest = |f: &dyn Fn(&PretrainBatch) -> usize| batches.iter().map(f).max().unwrap_or(0);
    let capacity = Capacity {
        tokens: largest(&|b| b.tokens()),
        sequences: largest(&|b| b.sequences()),
        length: 150,
        encoder_labels: largest(&|b| b.encoder_label_ids.len()),
    };
    let mut model = Pretrainer::new(Device::Cpu, &minilm(), Objective::RetroMae, capacity, DType::F32);
    model.params().load(1, 0.02, |_, _, _| Ok(false))?;
    let mut rates = Vec::new();
    for (step, batch) in batches.iter().enumerate() {
        let start = Instant::now();
        let out = model.step(std::slice::from_ref(batch), &AdamW::default(), 1e-4, step as u64 + 1, 7);
        let seconds = start.elapsed().as_secs_f64();
        if step > 1 {
            rates.push((batch.tokens() as f64 / seconds, seconds * 1e3));
        }
        assert!(out.losses.total().is_finite());
    }
    rates.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (median, best) = (rates[rates.len() / 2], rates[rates.len() - 1]);
    println!("| {workload} | {:.0} ms | {:.0} tokens/s | {:.0} tokens/s |", median.1, median.0, best.0);
    Ok(())
}

fn main() -> retromae_engine::Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    println!(
        "| workload, {} threads | median step | median | best |\n| --- | --- | --- | --- |",
        rayon::current_num_threads()
    );
    for workload in ["full512", "passages"] {
        if wanted.is_empty() || wanted.iter().any(|w| w == workload) {
            run(workload)?;
        }
    }
    Ok(())
}
