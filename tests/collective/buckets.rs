//! Buckets of gradients whose sums are begun during the backward: none before its gradients are complete, each once, and what comes of it
//! is what sums behind the backward give.

use std::sync::{Arc, Mutex};

use retromae_engine::Result;
use retromae_engine::data::batch::PretrainBatch;
use retromae_engine::data::pairs::batch::{ContrastiveBatch, CrossBatch};
use retromae_engine::data::pairs::texts::TextBatch;
use retromae_engine::device::{DType, Device, Tensor, emulator};
use retromae_engine::graph::Capacity;
use retromae_engine::graph::biencoder::Shape;
use retromae_engine::model::config::BertConfig;
use retromae_engine::ops::optimizer::AdamW;
use retromae_engine::ops::pool::Pooling;
use retromae_engine::train::biencoder::{BiEncoder, Options, Room};
use retromae_engine::train::collective::{Collective, Team};
use retromae_engine::train::cross_encoder::Ranker;
use retromae_engine::train::step::{Objective, Pretrainer};
use retromae_engine::train::updates::Trainable;

use crate::steps;

/// One of two ranks, the other of which does the very same. A sum that is begun is only noted: it is taken where all are awaited, if
/// until then nobody has written to what it is of.
struct Twin {
    overlaps: bool,
    /// All gradients.
    all: Tensor,
    begun: Mutex<Vec<(Tensor, Vec<f32>)>>,
    /// All gradients when the first sum was begun.
    first: Mutex<Vec<f32>>,
    seen: Mutex<Seen>,
}

/// What a twin saw of some steps.
#[derive(Clone, Debug, Default, PartialEq)]
struct Seen {
    /// Lengths of the sums of each step.
    sums: Vec<Vec<usize>>,
    /// Sums that were begun before their gradients were complete.
    too_early: usize,
    /// Steps that computed gradients after they had begun to sum others.
    overlapped: usize,
    /// Messages before sums that were begun were awaited.
    between: usize,
}

impl Collective for Twin {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        2
    }

    fn exchange(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.seen.lock().unwrap().between += usize::from(!self.begun.lock().unwrap().is_empty());
        Ok(vec![own.to_vec(); 2])
    }

    fn all_reduce(&self, all: &Tensor) -> Result<()> {
        all.upload(&all.to_vec::<f32>().into_iter().map(|x| x + x).collect::<Vec<_>>());
        Ok(())
    }

    fn overlaps(&self) -> bool {
        self.overlaps
    }

    fn begin_all_reduce(&self, all: &Tensor) -> Result<()> {
        let mut begun = self.begun.lock().unwrap();
        if begun.is_empty() {
            *self.first.lock().unwrap() = self.all.to_vec();
        }
        begun.push((all.clone(), all.to_vec()));
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        let (begun, mut seen) = (std::mem::take(&mut *self.begun.lock().unwrap()), self.seen.lock().unwrap());
        seen.overlapped += usize::from(self.all.to_vec::<f32>() != *self.first.lock().unwrap());
        seen.sums.push(begun.iter().map(|(all, _)| all.len()).collect());
        for (all, then) in begun {
            seen.too_early += usize::from(all.to_vec::<f32>() != then);
            self.all_reduce(&all)?;
        }
        Ok(())
    }

    fn all_gather(&self, _: &Tensor) -> Result<()> {
        panic!("not in these steps")
    }

    fn reduce_scatter(&self, _: &Tensor) -> Result<()> {
        panic!("not in these steps")
    }

    fn broadcast(&self, _: &Tensor) -> Result<()> {
        panic!("not in these steps")
    }
}

/// How a model is trained.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Behind,
    Beside,
    /// Everything is called complete before the backward has begun.
    TooEarly,
}

/// Trains a new model: three steps of a batch each, recorded on a GPU and replayed, and one of two. Bits of weights and norms.
fn train<T: Trainable>(model: impl Fn() -> T, batch: impl Fn(u64) -> T::Batch, how: How) -> (Vec<u64>, Seen) {
    let mut model = model();
    model.params().load(3, 0.1, |_, _, _| Ok(false)).unwrap();
    let twin = Arc::new(Twin {
        overlaps: how != How::Behind,
        all: model.params().gradients().clone(),
        begun: Mutex::default(),
        first: Mutex::default(),
        seen: Mutex::default(),
    });
    model.optimizer_mut().join(Team::new(twin.clone()));
    model.optimizer_mut().cut(1);
    let mut bits = Vec::new();
    for t in 1..=4 {
        if how == How::TooEarly {
            model.optimizer().complete(model.params(), &(0..model.params().entries())).unwrap();
        }
        let micro: Vec<_> = (0..t.max(3) - 2).map(&batch).collect();
        bits.push(model.step(&micro, &AdamW::default(), 0.01, t, 5).unwrap().grad_norm.to_bits());
    }
    let ranges = model.optimizer().buckets();
    bits.extend(model.params().weights().to_vec::<f32>().into_iter().map(|x| u64::from(x.to_bits())));
    model.device().check().unwrap();
    let seen = twin.seen.lock().unwrap().clone();
    // Each bucket once a step, in their order, and together everything.
    let lengths: Vec<usize> = ranges.iter().map(|range| range.len()).collect();
    assert!(seen.sums.len() == 4 && seen.sums.iter().all(|sums| *sums == lengths), "{:?}", seen.sums);
    assert_eq!(lengths.iter().sum::<usize>(), model.params().gradients().len());
    assert!(ranges.len() > 3, "{ranges:?}");
    (bits, seen)
}

#[track_caller]
fn check<T: Trainable>(model: impl Fn() -> T, batch: impl Fn(u64) -> T::Batch) {
    let (behind, seen) = train(&model, &batch, How::Behind);
    assert_eq!((seen.too_early, seen.overlapped, seen.between), (0, 0, 0));
    let (beside, seen) = train(&model, &batch, How::Beside);
    assert_eq!((seen.too_early, seen.overlapped, seen.between), (0, 4, 0));
    assert!(behind == beside, "sums beside the backward give other numbers than behind it");
    // This test can fail.
    let (wrong, seen) = train(&model, &batch, How::TooEarly);
    assert!(seen.too_early >= 4 && seen.between > 0 && wrong.len() == behind.len(), "{seen:?}");
}

fn config() -> BertConfig {
    steps::config(3)
}

fn pretrainer(device: Device, objective: Objective) -> impl Fn() -> Pretrainer {
    let capacity = Capacity { tokens: 128, sequences: 8, length: 16, encoder_labels: 128 };
    move || Pretrainer::new(device, &config(), objective, capacity, DType::F32).unwrap()
}

/// Texts of these lengths.
fn texts(first: u64, lengths: &[usize], name: impl Fn(u64) -> u64) -> TextBatch {
    let mut t = TextBatch { cu_seqlens: vec![0], ..Default::default() };
    for (i, &n) in (0..).zip(lengths) {
        t.samples.push(name(first + i));
        t.ids.extend((0..n as u64).map(|at| 5 + ((first + i) * 13 + at * 7) as u32 % 35));
        t.types.extend(vec![0; n]);
        t.cu_seqlens.push(t.ids.len() as u32);
    }
    t
}

fn pairs(first: u64) -> ContrastiveBatch {
    ContrastiveBatch {
        queries: texts(first, &[3, 5, 4], |i| i << 16),
        passages: texts(first, &[9, 4, 7, 12, 3, 5], |i| i << 16 | 1),
        group: 2,
        across: None,
        targets: vec![0, 2, 4],
        hidden: None,
        teacher: None,
        rows: (0..3).collect(),
        members: (0..6).collect(),
    }
}

fn bi_encoder(device: Device, untied: bool, chunk: Option<usize>) -> impl Fn() -> BiEncoder {
    let shape = Shape { pooling: Pooling::Mean, projection: Some(16), normalize: true };
    let options = Options { shape, lexical: None, untied, temperature: 0.1, distillation: None };
    let room = Room { queries: 3, passages: 6, lengths: [8, 16], chunk };
    move || BiEncoder::new(device, &config(), options, room, DType::F32).unwrap()
}

fn ranked(first: u64) -> CrossBatch {
    let pairs = texts(first, &[9, 4, 7, 12], |i| i << 16);
    CrossBatch { pairs, group: 2, teacher: None, rows: (0..2).collect(), members: (0..4).collect() }
}

fn texts_of(objective: Objective) -> impl Fn(u64) -> PretrainBatch {
    move |i| steps::batch(objective, 4 * i..4 * i + 4)
}

#[test]
fn no_bucket_of_pre_training_is_summed_before_it_is_complete() {
    for objective in [Objective::Mlm, Objective::RetroMae, Objective::DupMae] {
        check(pretrainer(Device::Cpu, objective), texts_of(objective));
    }
}

#[test]
fn none_of_fine_tuning_either_whatever_the_towers_and_chunks() {
    for (untied, chunk) in [(false, None), (false, Some(2)), (true, None), (true, Some(2))] {
        check(bi_encoder(Device::Cpu, untied, chunk), |i| pairs(9 * i));
    }
    let capacity = Capacity { tokens: 64, sequences: 4, length: 16, encoder_labels: 0 };
    check(|| Ranker::new(Device::Cpu, &config(), 1.0, capacity, DType::F32).unwrap(), |i| ranked(4 * i));
}

/// Where the work between sums is recorded and replayed.
#[test]
fn none_of_recorded_work() {
    let device = Device::emulator(emulator::Options::default()).unwrap();
    check(pretrainer(device, Objective::RetroMae), texts_of(Objective::RetroMae));
    check(bi_encoder(device, true, Some(4)), |i| pairs(9 * i));
}
