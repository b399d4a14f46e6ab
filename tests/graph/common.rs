//! Tiny models and hand-made batches.

use retromae_engine::data::batch::{Bags, DecoderBatch, PretrainBatch, Visibility};
use retromae_engine::device::{DType, Device};
use retromae_engine::graph::params::Params;
use retromae_engine::graph::{Capacity, StepDropout};
use retromae_engine::model::config::{Activation, BertConfig};
use retromae_engine::rng::{Dropout, Site, Stream};
use retromae_engine::train::step::{Objective, Pretrainer};
use retromae_engine::train::updates::Trainable as _;

pub const VOCABULARY: u32 = 41;
pub const CAPACITY: Capacity = Capacity { tokens: 90, sequences: 6, length: 40, encoder_labels: 90 };

/// Two layers of two heads; no width but the hidden one is a multiple of anything.
pub fn config(head_size: usize, hidden_act: Activation) -> BertConfig {
    BertConfig {
        vocab_size: VOCABULARY as usize,
        hidden_size: 2 * head_size,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        intermediate_size: 37,
        hidden_act,
        hidden_dropout_prob: 0.1,
        attention_probs_dropout_prob: 0.1,
        max_position_embeddings: 40,
        type_vocab_size: 2,
        initializer_range: 0.02,
        layer_norm_eps: 1e-12,
        pad_token_id: 0,
        raw: serde_json::Map::new(),
    }
}

/// Weights far from their initial values: biases, γ and β too.
pub fn fill(params: &Params) {
    let fresh = params.load(0, 0.0, |name, _, out| {
        let mut stream = Stream::new(1, 0, Site::Init, name.bytes().fold(7, |h, b| h * 31 % 1_000_003 + u64::from(b)));
        let centre = if name.ends_with("LayerNorm.weight") { 1.0 } else { 0.0 };
        out.fill_with(|| centre + 0.2 * stream.normal());
        Ok(true)
    });
    assert!(fresh.unwrap().is_empty());
}

pub fn model(config: &BertConfig, objective: Objective, dtype: DType) -> Pretrainer {
    let model = Pretrainer::new(Device::Cpu, config, objective, CAPACITY, dtype).unwrap();
    fill(model.params());
    model
}

pub fn small(objective: Objective, dtype: DType) -> Pretrainer {
    model(&config(32, Activation::Gelu), objective, dtype)
}

/// Dropout of hidden states and of attention.
pub fn dropout() -> StepDropout {
    StepDropout { hidden: Dropout::new(5, 3, 0.1), attention: Dropout::new(5, 3, 0.2) }
}

/// Which rows of a text have an encoder label, and which a decoder label.
#[derive(Clone, Copy)]
pub struct Labels {
    pub encoder: fn(usize, usize) -> bool,
    pub decoder: fn(usize, usize) -> bool,
}

/// Every third token inside, and every token inside, as the masks do it.
pub const USUAL: Labels =
    Labels { encoder: |i, n| i > 0 && i + 1 < n && i % 3 == 1, decoder: |i, n| i > 0 && i + 1 < n };

/// Texts of these lengths whose samples are numbered from `first`; a text depends on its sample alone.
pub fn batch(first: u64, lengths: &[usize], labels: Labels) -> PretrainBatch {
    let mut batch = PretrainBatch { cu_seqlens: vec![0], ..Default::default() };
    let mut bags = Bags::new();
    let mut d =
        DecoderBatch { visibility: Visibility { offsets: vec![0], ..Default::default() }, ..Default::default() };
    for (s, &n) in lengths.iter().enumerate() {
        let sample = first + s as u64;
        let mut random = Stream::new(2, 0, Site::Init, sample);
        let start = batch.encoder_ids.len();
        batch.samples.push(sample);
        for i in 0..n {
            let (id, masked) = (random.below(VOCABULARY), random.below(VOCABULARY));
            batch.encoder_ids.push(masked);
            d.ids.push(id);
            if (labels.encoder)(i, n) {
                batch.encoder_label_rows.push((start + i) as u32);
                batch.encoder_label_ids.push(id);
            }
            if (labels.decoder)(i, n) {
                d.label_rows.push((start + i) as u32);
                d.label_ids.push(id);
            }
            d.visibility.row.push((i % 3) as u16);
        }
        for _ in 0..3 {
            let inside = |w: usize| if n - w >= 32 { u32::MAX } else { (1 << (n - w)) - 1 };
            // [CLS] is always seen.
            d.visibility.words.extend((0..n).step_by(32).map(|w| (random.next_u32() | u32::from(w == 0)) & inside(w)));
        }
        d.visibility.offsets.push(d.visibility.words.len() as u32);
        batch.cu_seqlens.push(batch.encoder_ids.len() as u32);
        let mut words = d.ids[(start + 1).min(start + n - 1)..start + n - 1].to_vec();
        let weight = if words.is_empty() { 0.0 } else { 1.0 / words.len() as f32 };
        words.sort_unstable();
        words.dedup();
        bags.push(&words, weight);
    }
    batch.bags = Some(bags);
    batch.decoder = Some(d);
    batch
}

/// All gradients, tensor by tensor, in f64.
pub fn gradients(model: &Pretrainer) -> Vec<(String, Vec<f64>)> {
    let all = all_gradients(model.params());
    let part = |p: &retromae_engine::graph::params::Part| all[p.offset..p.offset + p.elements()].to_vec();
    model.params().parts().iter().map(|p| (p.name.clone(), part(p))).collect()
}

fn all_gradients(params: &Params) -> Vec<f64> {
    let all = params.gradients();
    match all.dtype() {
        DType::F64 => all.to_vec(),
        _ => all.to_vec::<f32>().into_iter().map(f64::from).collect(),
    }
}

/// Each tensor's ‖a − b‖ ≤ tolerance · ‖b‖.
pub fn assert_close(a: &[(String, Vec<f64>)], b: &[(String, Vec<f64>)], tolerance: f64) {
    assert_eq!(a.len(), b.len());
    for ((name, a), (_, b)) in a.iter().zip(b) {
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let difference = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
        let size = norm(&mut b.iter().copied());
        assert!(difference <= tolerance * size, "{name}: differs by {difference:.2e} at norm {size:.2e}");
    }
}
