//! What must hold of fine-tuning on any batch.

use retromae_engine::data::pairs::batch::ContrastiveBatch;
use retromae_engine::data::pairs::texts::TextBatch;
use retromae_engine::device::trace::{self, Detail, Piece};
use retromae_engine::device::{DType, Device};
use retromae_engine::graph::StepDropout;
use retromae_engine::graph::biencoder::Shape;
use retromae_engine::model::config::{Activation, BertConfig};
use retromae_engine::ops::optimizer::AdamW;
use retromae_engine::ops::pool::Pooling;
use retromae_engine::rng::{Dropout, Site, Stream};
use retromae_engine::train::biencoder::{BiEncoder, DistillLoss, Distillation, Options, Room};

use super::golden::gpu;
use retromae_engine::train::updates::Trainable;

const VOCABULARY: u32 = 41;

pub(super) fn config() -> BertConfig {
    BertConfig {
        vocab_size: VOCABULARY as usize,
        hidden_size: 64,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        intermediate_size: 72,
        hidden_act: Activation::Gelu,
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

/// Texts of these lengths, each a function of its name alone.
fn texts(lengths: &[usize], name: impl Fn(usize) -> u64) -> TextBatch {
    let mut t = TextBatch { cu_seqlens: vec![0], ..Default::default() };
    for (i, &n) in lengths.iter().enumerate() {
        let mut random = Stream::new(3, 0, Site::Init, name(i));
        t.samples.push(name(i));
        t.ids.extend((0..n).map(|_| random.below(VOCABULARY)));
        t.types.extend(vec![0; n]);
        t.cu_seqlens.push(t.ids.len() as u32);
    }
    t
}

/// Five queries of two passages, some of them hidden from some, scored by a teacher.
pub(super) fn batch(first: u64) -> ContrastiveBatch {
    let queries = texts(&[3, 9, 1, 12, 7], |i| (first + i as u64) << 16);
    let passages = texts(&[20, 5, 33, 8, 40, 2, 17, 28, 3, 11], |i| (first + i as u64 / 2) << 16 | (1 + i as u64 % 2));
    ContrastiveBatch {
        queries,
        passages,
        group: 2,
        across: None,
        targets: vec![0, 2, 4, 6, 8],
        hidden: Some(vec![0b10_0000_1000, 0, 0b1, 0b11_0000_0000, 0]),
        teacher: Some((0..10).map(|i| ((i * 7) % 5) as f32 - 2.0).collect()),
        rows: (0..5).collect(),
        members: (0..10).collect(),
    }
}

fn options(untied: bool) -> Options {
    Options {
        shape: Shape { pooling: Pooling::Mean, projection: Some(16), normalize: true },
        lexical: None,
        untied,
        temperature: 0.1,
        distillation: Some(Distillation { loss: DistillLoss::MarginMse, contrastive_weight: 0.3 }),
    }
}

fn model(device: Device, storage: DType, untied: bool, chunk: Option<usize>) -> BiEncoder {
    let room = Room { queries: 5, passages: 10, lengths: [12, 40], chunk };
    let model = BiEncoder::new(device, &config(), options(untied), room, storage).unwrap();
    model.params().load(5, 0.2, |_, _, _| Ok(false)).unwrap();
    model
}

fn dropout() -> StepDropout {
    StepDropout { hidden: Dropout::new(5, 3, 0.1), attention: Dropout::new(5, 3, 0.2) }
}

fn gradients(model: &mut BiEncoder, micro: &[ContrastiveBatch]) -> (f64, Vec<f64>) {
    let loss = model.gradients(micro, dropout()).unwrap().total();
    let all = model.params().parts().iter().flat_map(|part| model.params().get_gradient(part));
    (loss, all.map(f64::from).collect())
}

pub(super) fn apart(a: &[f64], b: &[f64]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

/// Loss and gradients of a model in chunks of these numbers of texts are those of one that is not divided.
pub(super) fn chunks_agree(model: impl Fn(Option<usize>) -> BiEncoder, chunks: &[usize]) {
    let (loss, whole) = gradients(&mut model(None), &[batch(1)]);
    for &chunk in chunks {
        let (other, parts) = gradients(&mut model(Some(chunk)), &[batch(1)]);
        assert!((other / loss - 1.0).abs() < 1e-12, "{other} and {loss}");
        // Gradients are read as f32.
        assert!(apart(&parts, &whole) < 1e-7, "chunk {chunk}: {}", apart(&parts, &whole));
    }
}

/// Loss and gradients of a model on a GPU, in f32, are those of the same on the CPU, in f64.
pub(super) fn devices_agree(mut on_cpu: BiEncoder, mut on_gpu: BiEncoder) {
    let (loss, exact) = gradients(&mut on_cpu, &[batch(1), batch(9)]);
    // As it comes, recorded, replayed.
    for _ in 0..3 {
        let (other, got) = gradients(&mut on_gpu, &[batch(1), batch(9)]);
        assert!((other / loss - 1.0).abs() < 1e-5, "{other} and {loss}");
        assert!(apart(&got, &exact) < 1e-4, "{}", apart(&got, &exact));
    }
}

/// Thirty steps at this learning rate, in bf16 on a GPU and on the CPU: the losses fall, and alike.
pub(super) fn training_agrees(model: impl Fn(Device, DType) -> BiEncoder, rate: f64) {
    let run = |device, storage| -> Vec<f64> {
        let mut model = model(device, storage);
        let step = |t: u64| model.step(&[batch(t % 2)], &AdamW::default(), rate, t, 9).unwrap().losses.total();
        (1..=30).map(step).collect()
    };
    let (cpu, gpu) = (run(Device::Cpu, DType::F32), run(gpu(), DType::BF16));
    let learned = cpu[0] - cpu[29];
    let furthest = cpu.iter().zip(&gpu).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    println!("from {:.4} to {:.4}, bf16 to {:.4}, at most {furthest:.4} apart", cpu[0], cpu[29], gpu[29]);
    assert!(learned > 0.2 * cpu[0], "the CPU's loss fell from {} by {learned} only", cpu[0]);
    assert!(furthest <= 0.05 * learned, "losses are {furthest} apart where {learned} was learned");
}

/// With dropout, which an embedding anew must draw again.
#[test]
fn chunks_change_nothing() {
    for untied in [false, true] {
        chunks_agree(|chunk| model(Device::Cpu, DType::F64, untied, chunk), &[1, 4, 9]);
    }
}

#[test]
fn a_gpu_computes_what_the_cpu_does() {
    for (untied, chunk) in [(false, None), (true, None), (false, Some(4))] {
        devices_agree(model(Device::Cpu, DType::F64, untied, None), model(gpu(), DType::F32, untied, chunk));
    }
}

#[test]
fn bf16_training_follows_the_cpu() {
    training_agrees(|device, storage| model(device, storage, false, None), 1e-3);
}

/// Devices that have some of the queries each and the passages of all: their losses and gradients add up to those of one batch.
/// Steps of other batches, dropout keys and learning rates, in one chunk and in several: recorded ones leave the bits of those that are
/// queued piece by piece.
#[test]
fn replayed_steps_equal_steps_as_they_come() {
    for (chunk, untied) in [(None, false), (Some(4), true)] {
        let device = gpu();
        let [mut recorded, mut direct] = [(); 2].map(|()| model(device, DType::BF16, untied, chunk));
        let mut replays = 0;
        for t in 1..=6 {
            let step = |model: &mut BiEncoder| {
                let out = model.step(&[batch(10 * t)], &AdamW::default(), 1e-2 / (1 + t % 4) as f64, t, 9)?;
                Ok((out, model.params().weights().to_vec::<f32>().into_iter().map(f32::to_bits).collect::<Vec<_>>()))
            };
            let (a, queued) = trace::record(device, Detail::Queued, || step(&mut recorded)).unwrap();
            let (b, pieces) = trace::record(device, Detail::Pieces, || step(&mut direct)).unwrap();
            let count = |trace: &trace::Trace| trace.pieces.iter().filter(|(_, piece)| *piece == Piece::Replay).count();
            assert_eq!(count(&pieces), 0, "step {t}");
            replays += count(&queued);
            assert!(a == b && !a.0.skipped, "step {t}: {:?} and {:?}", a.0, b.0);
        }
        assert!(replays > 10, "{replays} replays");
    }
}

#[test]
fn queries_of_several_devices_against_the_passages_of_all() {
    for untied in [false, true] {
        let options = Options { distillation: None, ..options(untied) };
        let room = Room { queries: 5, passages: 10, lengths: [12, 40], chunk: None };
        let mut model = BiEncoder::new(Device::Cpu, &config(), options, room, DType::F64).unwrap();
        model.params().load(5, 0.2, |_, _, _| Ok(false)).unwrap();
        let all = ContrastiveBatch { teacher: None, ..batch(1) };
        let (loss, whole) = gradients(&mut model, std::slice::from_ref(&all));
        let of_device = |queries: std::ops::Range<usize>| ContrastiveBatch {
            queries: all.queries.part(queries.clone()),
            targets: all.targets[queries.clone()].to_vec(),
            hidden: all.hidden.as_ref().map(|bits| bits[queries.clone()].to_vec()),
            rows: all.rows[queries].to_vec(),
            ..all.clone()
        };
        let (other, parts) = gradients(&mut model, &[of_device(0..2), of_device(2..3), of_device(3..5)]);
        assert!((other / loss - 1.0).abs() < 1e-12, "{other} and {loss}");
        assert!(apart(&parts, &whole) < 1e-7, "{}", apart(&parts, &whole));
    }
}

/// A query's loss over the passages of a whole batch is not that over its own part of it: negatives count.
#[test]
fn every_passage_of_the_batch_is_a_candidate() {
    let mut model = model(Device::Cpu, DType::F64, false, None);
    let whole = model.evaluate(&batch(1)).unwrap();
    let mut seen = batch(1);
    seen.hidden = Some(vec![0; 5]);
    let more = model.evaluate(&seen).unwrap();
    assert!(more.contrastive > whole.contrastive, "hiding candidates makes the loss smaller");
    seen.hidden = None;
    assert_eq!(model.evaluate(&seen).unwrap(), more, "no bits and bits that hide nothing are the same");
}
