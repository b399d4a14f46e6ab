//! The work of a step by formulas against the totals of the design and against what the emulator is given to do.

use std::collections::BTreeMap;

use retromae_engine::bench::pairs;
use retromae_engine::bench::work::{self, Kernel, Work, model, product_name};
use retromae_engine::bench::workload::{self, Model, Workload};
use retromae_engine::data::batch::PretrainBatch;
use retromae_engine::device::trace::{self, Detail, Piece, Trace};
use retromae_engine::device::{DType, Device, Product};
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

/// Every token has every label, so that nothing is laid out in vain: the products that are queued have the required FLOP to the last one.
#[test]
fn required_flop_are_those_of_the_products() {
    let model = Model::named("mini").unwrap();
    for objective in [Objective::RetroMae, Objective::Mlm] {
        let (mut batches, _) = workload::batches(Workload::Full512, &model, objective, 1).unwrap();
        let mut batch = batches.remove(0);
        let all: Vec<u32> = (0..batch.tokens() as u32).collect();
        (batch.encoder_label_rows, batch.encoder_label_ids) = (all.clone(), vec![7; all.len()]);
        if let Some(decoder) = &mut batch.decoder {
            (decoder.label_rows, decoder.label_ids) = (all.clone(), vec![9; all.len()]);
        }
        let [_, lengths] = Workload::Full512.lengths(&model).unwrap();
        let (tokens, sequences, length) = (all.len(), lengths.len(), lengths[0]);
        let capacity = Capacity { tokens, sequences, length, encoder_labels: tokens };
        let (work, trace) = pretraining(objective, DType::BF16, batch, capacity);
        assert_equal(&format!("{objective:?}"), &work, &trace);
        let mut queued = 0;
        for (_, piece) in &trace.pieces {
            if let Piece::Product(_, size) = piece {
                queued += 2 * size.iter().map(|&n| n as u64).product::<u64>();
            }
        }
        let products = work.kernels.iter().filter(|k| !k.products.is_empty()).map(|k| k.flop).sum::<u64>();
        // The last layer is laid out for [CLS] rows besides the labelled ones, which here are the same.
        let (c, i) = (model.config().hidden_size, model.config().intermediate_size);
        let again = (3 * 2 * sequences * (2 * c * c + 2 * c * i)) as u64;
        assert_eq!(queued, products + again, "{objective:?}");
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

/// BERT-base on 64 × 512 tokens in bf16, as the batches of `bench step` have them.
fn base() -> Work {
    let model = Model::named("base").unwrap();
    let (batches, capacity) = workload::batches(Workload::Full512, &model, Objective::RetroMae, 1).unwrap();
    let on = (emulator(), DType::BF16);
    let parameters = Pretrainer::footprint(on.0, model.config(), Objective::RetroMae, capacity, on.1).parameters;
    work::pretraining(on, model.config(), Objective::RetroMae, (capacity, parameters), &batches[0])
}

/// The design's table of BERT-base: TFLOP by stage, and what its rows count beyond what is required.
#[test]
fn the_totals_of_the_design() {
    let work = base();
    for k in &work.kernels {
        println!(
            "{} / {} / {}: {} x, {:.4} TFLOP, {:.3} GB",
            k.phase,
            k.stage,
            k.name,
            k.launches,
            k.flop as f64 / 1e12,
            k.bytes as f64 / 1e9
        );
    }
    for stage in stages::STAGES {
        let of = work.stage(stage);
        println!(
            "{stage}: {} launches, {:.3} TFLOP, {:.2} GB",
            of.launches(),
            of.flop() as f64 / 1e12,
            of.bytes() as f64 / 1e9
        );
    }
    println!(
        "{} launches, {:.3} TFLOP, {:.2} GB",
        work.launches(),
        work.flop() as f64 / 1e12,
        work.bytes() as f64 / 1e9
    );
}
