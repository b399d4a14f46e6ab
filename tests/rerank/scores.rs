//! The scorer itself: the golden case, the trained model's own scores, neighbours, memory.

use std::path::Path;
use std::sync::Arc;

use retromae_engine::data::pairs::batch::PairTexts;
use retromae_engine::data::pairs::texts::{TextBatch, TextRules};
use retromae_engine::device::{DType, Device};
use retromae_engine::graph::Capacity;
use retromae_engine::graph::activations::Plan;
use retromae_engine::graph::cross_encoder::CrossEncoder;
use retromae_engine::graph::params::Table;
use retromae_engine::model::parameters::Parameters;
use retromae_engine::model::presets::preset;
use retromae_engine::model::reranker::Reranker;
use retromae_engine::retrieve::scorer::Scorer;
use retromae_engine::train::contract::BatchFile;
use retromae_engine::train::cross_encoder::Ranker;
use retromae_engine::train::updates::Trainable as _;
use safetensors::SafeTensors;

use crate::world::{PASSAGES, QUERIES, World, golden};

/// The device that `RETROMAE_DEVICE` names, the emulator unless it does.
fn gpu() -> Device {
    let name = std::env::var("RETROMAE_DEVICE").unwrap_or_else(|_| "emulator".into());
    Device::open(&name).unwrap_or_else(|e| panic!("RETROMAE_DEVICE={name}: {e}")).0
}

pub fn scorer(model: &Path, device: Device, storage: DType, capacity: Capacity) -> Scorer {
    let model = Reranker::open(model).unwrap();
    let scorer = Scorer::new(device, &model.config, capacity, storage).unwrap();
    let fresh = scorer.params().load(0, 0.0, |name, shape, out| model.read(name, shape, out)).unwrap();
    assert_eq!(fresh, Vec::<String>::new());
    scorer
}

/// The texts of a world.
pub fn texts(world: &World, max_length: usize) -> PairTexts {
    let query = TextRules::new(max_length / 2);
    PairTexts::new(world.set("queries"), world.set("passages"), query, Vec::new(), max_length).unwrap()
}

fn norm(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn the_golden_case() {
    let dir = golden("cross_encoder");
    let model = Reranker::open(&dir.join("model")).unwrap();
    let batch = BatchFile::open(&dir.join("batch.safetensors"), "").unwrap().cross(4, &model.config).unwrap();
    let pairs = batch.pairs.sequences();
    let capacity = Capacity { tokens: batch.pairs.tokens(), sequences: pairs, length: 48, encoder_labels: 0 };
    let mut trained = Ranker::new(Device::Cpu, &model.config, 1.0, capacity, DType::F32).unwrap();
    trained.params().load(0, 0.0, |name, shape, out| model.read(name, shape, out)).unwrap();
    let expected = trained.scores(&batch.pairs).unwrap();
    let scores = scorer(&dir.join("model"), Device::Cpu, DType::F32, capacity).scores(&batch.pairs).unwrap();
    assert_eq!(scores, expected, "forward alone is the forward of training");

    // The expected loss is that of these scores.
    let file = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let loss = f32::from_le_bytes(file.tensor("loss").unwrap().data()[..4].try_into().unwrap());
    let of = |group: &[f32]| group.iter().map(|&s| f64::from(s - group[0]).exp()).sum::<f64>().ln();
    let mean = scores.chunks(4).map(of).sum::<f64>() / (pairs / 4) as f64;
    assert!((mean / f64::from(loss) - 1.0).abs() < 1e-5, "{mean} and {loss}");

    let size = norm(scores.iter().map(|&s| f64::from(s)));
    let mut on_gpu = scorer(&dir.join("model"), gpu(), DType::F32, capacity);
    // Queued one by one, recorded, replayed.
    for _ in 0..3 {
        let again = on_gpu.scores(&batch.pairs).unwrap();
        let off = norm(again.iter().zip(&scores).map(|(&a, &b)| f64::from(a) - f64::from(b))) / size;
        assert!(off < 1e-5, "error {off:.1e} on the GPU");
    }
    let half = scorer(&dir.join("model"), gpu(), DType::BF16, capacity).scores(&batch.pairs).unwrap();
    let off = norm(half.iter().zip(&scores).map(|(&a, &b)| f64::from(a) - f64::from(b))) / size;
    assert!(off < 0.1, "error {off:.1e} in bf16");
}

/// On the CPU a pair has the same bits alone, among others, at any place and with any number of threads.
#[test]
fn a_score_does_not_depend_on_its_neighbours() {
    let world = World::new();
    let texts = texts(&world, 48);
    let all: Vec<(u64, u32, u32)> = (0..QUERIES as u32)
        .flat_map(|q| (0..PASSAGES as u32).map(move |p| (0, q, p)))
        .filter(|(_, q, p)| (q * 7 + p) % 5 == 0)
        .collect();
    let capacity = Capacity { tokens: 48 * all.len(), sequences: all.len(), length: 48, encoder_labels: 0 };
    let mut scorer = scorer(&world.path("model"), Device::Cpu, DType::F32, capacity);
    let mut score = |pairs: &[(u64, u32, u32)]| scorer.scores(&texts.pack(pairs).unwrap()).unwrap();
    let together = score(&all);
    for (at, pair) in all.iter().enumerate() {
        assert_eq!(score(&[*pair])[0].to_bits(), together[at].to_bits(), "pair {at} alone");
    }
    let backwards: Vec<_> = all.iter().rev().copied().collect();
    let mut turned = score(&backwards);
    turned.reverse();
    assert_eq!(turned, together);
    for size in [3, 17] {
        assert_eq!(all.chunks(size).flat_map(&mut score).collect::<Vec<_>>(), together, "in batches of {size}");
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let batch: TextBatch = texts.pack(&all).unwrap();
    assert_eq!(pool.install(|| scorer.scores(&batch).unwrap()), together);
    let one: Arc<_> = world.set("passages");
    assert_eq!(one.len() as usize, PASSAGES);
}

/// Without a backward the buffers of twelve layers are those of two.
#[test]
fn forward_alone_needs_little_memory() {
    let config = preset("bert-base").unwrap();
    let capacity = Capacity { tokens: 4096, sequences: 64, length: 512, encoder_labels: 0 };
    let bytes = |mut plan: Plan| {
        CrossEncoder::new(&mut Table::default(), &mut plan, &config, capacity);
        plan.bytes(DType::BF16)
    };
    let (training, scoring) = (bytes(Plan::default()), bytes(Plan::forward_only()));
    assert!(5 * scoring < training, "{scoring} bytes, in training {training}");
}
