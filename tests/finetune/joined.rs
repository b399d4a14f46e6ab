//! Fine-tuning on the joined score: dense embedding and words of the MLM head.

use retromae_engine::data::pairs::batch::ContrastiveBatch;
use retromae_engine::device::{DType, Device};
use retromae_engine::graph::biencoder::Shape;
use retromae_engine::graph::{Dims, StepDropout};
use retromae_engine::ops::pool::Pooling;
use retromae_engine::rng::{Site, Stream};
use retromae_engine::train::biencoder::{BiEncoder, DistillLoss, Distillation, Options, Room};
use retromae_engine::train::updates::Trainable;

use super::golden::gpu;
use super::invariants::{apart, batch, chunks_agree, config, devices_agree, training_agrees};

/// Words of a text.
const K: usize = 7;

fn options(untied: bool, dense: bool) -> Options {
    let shape = match dense {
        true => Shape { pooling: Pooling::Mean, projection: Some(16), normalize: true },
        false => Shape { pooling: Pooling::Cls, projection: None, normalize: false },
    };
    let distillation = Some(Distillation { loss: DistillLoss::MarginMse, contrastive_weight: 0.3 });
    Options { shape, lexical: Some(K), untied, temperature: 2.0, distillation }
}

fn model(device: Device, storage: DType, options: Options, chunk: Option<usize>) -> BiEncoder {
    let room = Room { queries: 5, passages: 10, lengths: [12, 40], chunk };
    let model = BiEncoder::new(device, &config(), options, room, storage).unwrap();
    model.params().load(5, 0.2, |_, _, _| Ok(false)).unwrap();
    model
}

/// Every parameter of a model, by name.
fn weights(model: &BiEncoder) -> Vec<(String, Vec<f32>)> {
    let params = model.params();
    params.parts().iter().map(|part| (part.name.clone(), params.get(part))).collect()
}

/// The loss of a model whose parameters are these.
fn loss(model: &mut BiEncoder, weights: &[(String, Vec<f32>)], batch: &ContrastiveBatch) -> f64 {
    let read = |name: &str, _: &[usize], out: &mut [f32]| {
        let found = weights.iter().find(|(own, _)| own == name).unwrap();
        out.copy_from_slice(&found.1);
        Ok(true)
    };
    model.params().load(5, 0.2, read).unwrap();
    model.evaluate(batch).unwrap().total()
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for (untied, dense) in [(false, false), (true, true)] {
        let mut model = model(Device::Cpu, DType::F64, options(untied, dense), None);
        let mut weights = weights(&model);
        model.gradients(&[batch(1)], StepDropout::OFF).unwrap();
        let exact: Vec<Vec<f32>> = model.params().parts().iter().map(|p| model.params().get_gradient(p)).collect();
        let mut random = Stream::new(1, 0, Site::Init, 0);
        let (mut got, mut expected, mut words) = (Vec::new(), Vec::new(), 0);
        for part in 0..weights.len() {
            for _ in 0..3 {
                let at = random.below(weights[part].1.len() as u32) as usize;
                let x = weights[part].1[at];
                let mut side = |by: f32| {
                    weights[part].1[at] = x + by;
                    (f64::from(weights[part].1[at]), loss(&mut model, &weights, &batch(1)))
                };
                let ((high, above), (low, below)) = (side(2e-4), side(-2e-4));
                weights[part].1[at] = x;
                got.push((above - below) / (high - low));
                expected.push(f64::from(exact[part][at]));
                words += usize::from(weights[part].0.contains("cls.predictions") && exact[part][at] != 0.0);
            }
        }
        assert!(apart(&got, &expected) < 1e-5, "{}", apart(&got, &expected));
        assert!(words > 3, "the head has no gradients");
    }
}

/// A row is the dense embedding and the words that the model itself finds; the loss is that of their inner products.
#[test]
fn the_score_is_that_of_both() {
    let (dense_only, both) = (Options { lexical: None, ..options(false, false) }, options(false, false));
    let mut joined = model(Device::Cpu, DType::F64, Options { distillation: None, ..both }, None);
    let own = weights(&joined);
    let mut dense = model(Device::Cpu, DType::F64, Options { distillation: None, ..dense_only }, None);
    let batch = ContrastiveBatch { teacher: None, hidden: None, ..batch(1) };
    loss(&mut dense, &own, &batch);
    let found = joined.evaluate(&batch).unwrap();
    let (w, v) = (config().hidden_size, Dims::new(&config()).vocabulary);
    let (rows, plain) = (joined.embeddings(&batch), dense.embeddings(&batch));
    for side in 0..2 {
        let texts = if side == 0 { &batch.queries } else { &batch.passages };
        let words = joined.embed(side, texts).unwrap();
        for (s, row) in rows[side].chunks(w + v).enumerate() {
            assert_eq!(row[..w], plain[side][s * w..(s + 1) * w]);
            let mut columns = vec![0.0; v];
            for k in s * K..(s + 1) * K {
                columns[words.ids[k] as usize] += words.weights[k];
            }
            assert_eq!(row[w..], columns, "text {s} of side {side}");
            let length = texts.cu_seqlens[s + 1] - texts.cu_seqlens[s];
            assert_eq!(columns.iter().filter(|x| **x != 0.0).count(), if length == 1 { 0 } else { K });
        }
    }
    let scores = |q: usize| -> Vec<f64> {
        let query = &rows[0][q * (w + v)..(q + 1) * (w + v)];
        let score = |row: &[f32]| query.iter().zip(row).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() / 2.0;
        rows[1].chunks(w + v).map(score).collect()
    };
    let of = |q: usize| {
        let scores = scores(q);
        let top = scores.iter().copied().fold(f64::MIN, f64::max);
        top + scores.iter().map(|s| (s - top).exp()).sum::<f64>().ln() - scores[2 * q]
    };
    let expected: f64 = (0..5).map(of).sum();
    assert!((found.contrastive / expected - 1.0).abs() < 1e-5, "{} and {expected}", found.contrastive);
}

#[test]
fn chunks_change_nothing() {
    for untied in [false, true] {
        chunks_agree(|chunk| model(Device::Cpu, DType::F64, options(untied, true), chunk), &[1, 4]);
    }
}

#[test]
fn a_gpu_computes_what_the_cpu_does() {
    for (untied, chunk) in [(false, None), (true, None), (false, Some(4))] {
        let options = options(untied, !untied);
        devices_agree(model(Device::Cpu, DType::F64, options, None), model(gpu(), DType::F32, options, chunk));
    }
}

/// With all words: which are the largest K is a choice that rounding may change, and small models learn other things then.
#[test]
fn bf16_training_follows_the_cpu() {
    let options = Options { temperature: 20.0, lexical: Some(config().vocab_size), ..options(false, false) };
    training_agrees(|device, storage| model(device, storage, options, None), 3e-4);
}
