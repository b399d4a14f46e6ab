//! The work of a step by formulas against the totals of the design and against what the emulator is given to do.

use std::collections::BTreeMap;

use retromae_engine::bench::pairs;
use retromae_engine::bench::work::{self, Kernel, Work, model, product_name};
use retromae_engine::bench::workload::{self, Model, Workload};
use retromae_engine::data::batch::PretrainBatch;
use retromae_engine::device::trace::{self, Detail, Piece, Trace};
use retromae_engine::device::{DType, Device};
use retromae_engine::graph::biencoder::Shape;
use retromae_engine::graph::{Capacity, stages};
use retromae_engine::ops::optimizer::AdamW;
use retromae_engine::ops::pool::Pooling;
use retromae_engine::train::biencoder::{BiEncoder, Options};
use retromae_engine::train::step::{Objective, Pretrainer};
use retromae_engine::train::updates::Trainable;

/// Launches and sizes of products by phase, stage and name.
type Counted = BTreeMap<(&'static str, &'static str, String), (usize, Vec<(String, [usize; 3])>)>;

fn of_work(work: &Work) -> Counted {
    let sizes = |k: &Kernel| {
        let mut sizes: Vec<_> = k.products.iter().map(|(p, size)| (product_name(*p), *size)).collect();
        sizes.sort();
        sizes
    };
    work.kernels.iter().map(|k| ((k.phase, k.stage, k.name.clone()), (k.launches, sizes(k)))).collect()
}

fn of_trace(trace: &Trace) -> Counted {
    let mut counted = Counted::new();
    for (label, piece) in trace.pieces.iter().filter(|(_, piece)| piece.is_launch()) {
        let (name, size) = match piece {
            Piece::Kernel(name) => (name.to_string(), None),
            Piece::Product(product, size) => (product_name(*product), Some(*size)),
            Piece::Fill(_) => ("fill".to_string(), None),
            other => panic!("{other:?} is no launch"),
        };
        let entry = counted.entry((label.phase, label.stage, name.clone())).or_default();
        entry.0 += 1;
        entry.1.extend(size.map(|size| (name, size)));
    }
    counted.values_mut().for_each(|(_, sizes)| sizes.sort());
    counted
}

/// One step, piece by piece; the first one sizes temporary memory.
fn traced<T: Trainable>(device: Device, trainer: &mut T, batch: T::Batch) -> Trace {
    let range = trainer.config().initializer_range;
    trainer.params().load(1, range, |_, _, _| Ok(false)).unwrap();
    let micro = [batch];
    let mut step = |t| trainer.step(&micro, &AdamW::default(), 1e-5, t, 7);
    step(1).unwrap();
    let (outcome, trace) = trace::record(device, Detail::Pieces, || step(2)).unwrap();
    assert!(!outcome.skipped);
    trace
}

#[track_caller]
fn assert_equal(name: &str, work: &Work, trace: &Trace) {
    let (expected, queued) = (of_work(work), of_trace(trace));
    for (key, value) in &queued {
        assert_eq!(expected.get(key), Some(value), "{name}: {key:?}: the formulas left, what is queued right");
    }
    for key in expected.keys() {
        assert!(queued.contains_key(key), "{name}: {key:?} is never queued");
    }
    let launches = trace.pieces.iter().filter(|(_, piece)| piece.is_launch()).count();
    assert_eq!(work.launches(), launches, "{name}");
}

fn emulator() -> Device {
    Device::open("emulator").unwrap().0
}

fn pretraining(objective: Objective, storage: DType, batch: PretrainBatch, capacity: Capacity) -> (Work, Trace) {
    let (device, model) = (emulator(), Model::named("mini").unwrap());
    let config = model.config();
    let mut trainer = Pretrainer::new(device, config, objective, capacity, storage).unwrap();
    let parameters = Pretrainer::footprint(device, config, objective, capacity, storage).parameters;
    let work = work::pretraining((device, storage), config, objective, (capacity, parameters), &batch);
    (work, traced(device, &mut trainer, batch))
}

#[test]
fn a_step_of_pretraining_queues_what_the_formulas_say() {
    let model = Model::named("mini").unwrap();
    for objective in [Objective::RetroMae, Objective::DupMae, Objective::Mlm] {
        for (storage, workload) in [(DType::BF16, Workload::Passages), (DType::F32, Workload::Full512)] {
            let (mut batches, capacity) = workload::batches(workload, &model, objective, 1).unwrap();
            let (work, trace) = pretraining(objective, storage, batches.remove(0), capacity);
            assert_equal(&format!("{objective:?} {storage:?}"), &work, &trace);
        }
    }
}

/// Every token but the first and the last of a text has every label and the decoder is laid out for these, so that next to nothing is in
/// vain: the products that are queued have the required FLOP to the last one.
#[test]
fn required_flop_are_those_of_the_products() {
    let model = Model::named("mini").unwrap();
    for objective in [Objective::RetroMae, Objective::Mlm] {
        let (mut batches, _) = workload::batches(Workload::Full512, &model, objective, 1).unwrap();
        let mut batch = batches.remove(0);
        let [_, lengths] = Workload::Full512.lengths(&model).unwrap();
        let (tokens, sequences, length) = (batch.tokens(), lengths.len(), lengths[0]);
        let all: Vec<u32> = (0..tokens as u32).collect();
        let inner: Vec<u32> =
            all.iter().copied().filter(|row| ![0, length - 1].contains(&(*row as usize % length))).collect();
        (batch.encoder_label_ids, batch.encoder_label_rows) = (vec![7; inner.len()], inner.clone());
        if let Some(decoder) = &mut batch.decoder {
            (decoder.label_ids, decoder.label_rows) = (vec![9; tokens], all);
        }
        let capacity = Capacity { tokens, sequences, length, encoder_labels: inner.len() };
        let (work, trace) = pretraining(objective, DType::BF16, batch, capacity);
        assert_equal(&format!("{objective:?}"), &work, &trace);
        let mut queued = 0;
        for (_, piece) in &trace.pieces {
            if let Piece::Product(_, size) = piece {
                queued += 2 * size.iter().map(|&n| n as u64).product::<u64>();
            }
        }
        let products = work.kernels.iter().filter(|k| !k.products.is_empty()).map(|k| k.flop).sum::<u64>();
        // The last layer has room for [CLS] rows, which MLM alone does not need.
        let (c, i) = (model.config().hidden_size, model.config().intermediate_size);
        let in_vain = if objective == Objective::Mlm { 3 * 2 * sequences * (2 * c * c + 2 * c * i) } else { 0 };
        assert_eq!(queued, products + in_vain as u64, "{objective:?}");
    }
}

#[test]
fn a_step_of_fine_tuning_queues_what_the_formulas_say() {
    let (device, model) = (emulator(), Model::named("mini").unwrap());
    let config = model.config();
    let (mut batches, room) = pairs::batches(&model, 1).unwrap();
    let shape = Shape { pooling: Pooling::Cls, projection: None, normalize: false };
    let options = Options { shape, lexical: None, untied: false, temperature: 1.0, distillation: None };
    let mut trainer = BiEncoder::new(device, config, options, room, DType::BF16).unwrap();
    let parameters = BiEncoder::footprint((device, DType::BF16), config, &options, room).parameters;
    let (sides, capacity) = ([room.queries, room.passages], trainer.capacity(0));
    let work = work::fine_tuning((device, DType::BF16), config, (capacity, sides, parameters), &batches[0]);
    assert_equal("contrastive", &work, &traced(device, &mut trainer, batches.remove(0)));
}

/// BERT-base on 64 × 512 tokens in bf16, a batch of `bench step`: its work, its rows with labels, and the step as everybody counts it.
fn base() -> (Work, [u64; 2], u64) {
    let (model, objective) = (Model::named("base").unwrap(), Objective::RetroMae);
    let (batches, capacity) = workload::batches(Workload::Full512, &model, objective, 1).unwrap();
    let (on, config, batch) = ((emulator(), DType::BF16), model.config(), &batches[0]);
    let parameters = Pretrainer::footprint(on.0, config, objective, capacity, on.1).parameters;
    let labels = [batch.encoder_label_ids.len(), batch.decoder.as_ref().map_or(0, |d| d.label_ids.len())];
    let everybody = model::pretraining(config, objective, [512; 64], labels[0], labels[1]);
    let work = work::pretraining(on, config, objective, (capacity, parameters), batch);
    (work, labels.map(|n| n as u64), everybody)
}

/// Sizes of BERT-base and of the batch.
const C: u64 = 768;
const I: u64 = 4 * C;
const V: u64 = 30_528;
const TEXTS: u64 = 64;
const L: u64 = 512;
const T: u64 = TEXTS * L;

/// What the design tells of this step: 25.5 TFLOP in all after the savings, and stage by stage before those of the last layer.
#[test]
fn the_totals_of_the_design() {
    let (work, [masked, labelled], _) = base();
    let needed = masked + TEXTS;
    let near = |what: &str, flop: u64, tera: f64, within: f64| {
        let is = flop as f64 / 1e12;
        assert!((is - tera).abs() <= within, "{what}: {is:.3} TFLOP, {tera} in the design");
    };
    near("all", work.flop(), 25.5, 0.05);
    let of = |stage| work.stage(stage).flop();
    // The design's row has twelve whole layers; the last one's queries, output projection and feed-forward are for the needed rows only.
    let saved = 3 * (T - needed) * (4 * C * C + 4 * C * I);
    near("encoder GEMMs", of(stages::ENCODER_PRODUCTS) + saved, 16.7, 0.05);
    near("encoder GEMMs, required", of(stages::ENCODER_PRODUCTS), 15.9, 0.05);
    // So it is with attention, and the decoder attends from labelled rows only.
    let saved = 4 * C * L * (2 * T - needed - labelled);
    near("attention, forward", of(stages::ATTENTION_FORWARD) + saved, 0.67, 0.005);
    near("attention, backward", of(stages::ATTENTION_BACKWARD) + saved * 5 / 2, 1.68, 0.01);
    near("decoder GEMMs", of(stages::DECODER_PRODUCTS), 1.3, 0.05);
    near("decoder LM head", of(stages::LM_HEAD), 4.7, 0.05);
    near("encoder MLM head", of(stages::MLM_HEAD), 1.4, 0.05);
    for stage in [stages::ROWS, stages::OPTIMIZER] {
        assert_eq!(of(stage), 0, "{stage} is bytes only");
    }
    // Bytes: the design moves the heads' weight and its gradient once a product, here every chunk of 512 rows does (23 GB more).
    // Without that the sum is that of the design, whose terms it does not list, within 3 %.
    let again = (masked.div_ceil(512) + labelled.div_ceil(512) - 2) * 12 * V * C;
    let left = (work.bytes() - again) as f64 / 1e9;
    println!("{:.3} TFLOP, {:.1} GB, {left:.1} with one chunk", work.flop() as f64 / 1e12, work.bytes() as f64 / 1e9);
    assert!((left / 74.0 - 1.0).abs() < 0.03, "{left:.1} GB, 74 in the design");
}

/// The two counts of FLOP differ by what the engine saves, by scores that are computed again and by words that do not exist: exactly.
#[test]
fn both_counts_differ_by_what_is_saved() {
    let (work, [masked, labelled], everybody) = base();
    let needed = masked + TEXTS;
    let last_layer = 3 * (T - needed) * (4 * C * C + 4 * C * I);
    let queries_by_parts = 3 * 2 * C * C * (T - L - TEXTS);
    let unlabelled = 3 * (T - labelled) * (2 * C * C + 4 * C * I);
    let no_words = 3 * 2 * C * (V - 30_522) * (masked + labelled);
    let attention_again = 14 * C * L * (11 * T + needed + labelled) - 3 * 4 * C * L * 13 * T;
    assert_eq!(work.flop() + last_layer + queries_by_parts + unlabelled, everybody + attention_again + no_words);
}
