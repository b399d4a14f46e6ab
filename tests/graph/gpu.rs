//! The step on a GPU, the emulated one unless `RETROMAE_DEVICE` names a real one: against the CPU, recorded against as it comes,
//! unmoved by what buffers held before.

use retromae_engine::data::batch::PretrainBatch;
use retromae_engine::device::emulator::{Asynchronous, Options};
use retromae_engine::device::trace::{self, Detail, Piece};
use retromae_engine::device::{DType, Device};
use retromae_engine::graph::Capacity;
use retromae_engine::model::config::{Activation, BertConfig};
use retromae_engine::ops::optimizer::AdamW;
use retromae_engine::rng::Dropout;
use retromae_engine::train::step::{Objective, Pretrainer};

use super::common::{CAPACITY, Labels, USUAL, assert_close, batch, config, dropout, fill, gradients};
use retromae_engine::train::updates::Trainable;

/// The device that `RETROMAE_DEVICE` names; one that is named and not there is a failure.
fn gpu() -> Device {
    let name = std::env::var("RETROMAE_DEVICE").unwrap_or_else(|_| "emulator".into());
    Device::open(&name).unwrap_or_else(|e| panic!("RETROMAE_DEVICE={name}: {e}")).0
}

/// As [`config`], with a width of the feed-forward that kernels have.
fn sizes(head_size: usize, hidden_act: Activation) -> BertConfig {
    BertConfig { intermediate_size: 72, ..config(head_size, hidden_act) }
}

fn on(device: Device, config: &BertConfig, objective: Objective, storage: DType) -> Pretrainer {
    let model = Pretrainer::new(device, config, objective, CAPACITY, storage).unwrap();
    fill(model.params());
    model
}

fn small(device: Device, storage: DType) -> Pretrainer {
    on(device, &sizes(32, Activation::Gelu), Objective::RetroMae, storage)
}

/// Bits of weights and moments.
fn bits(model: &Pretrainer) -> Vec<u32> {
    let (first, second) = model.optimizer().moments();
    [model.params().weights(), first, second].iter().flat_map(|t| t.to_vec::<f32>()).map(f32::to_bits).collect()
}

fn gradient_bits(model: &Pretrainer) -> Vec<u32> {
    model.params().gradients().to_vec::<f32>().into_iter().map(f32::to_bits).collect()
}

/// Micro-batches of three sizes, so that work is laid out in more than one way.
fn micro(t: u64) -> Vec<PretrainBatch> {
    match t % 3 {
        0 => vec![batch(10 * t, &[4, 33, 40, 1], USUAL)],
        1 => vec![batch(10 * t, &[17, 2], USUAL), batch(10 * t + 2, &[40, 17, 2, 9, 9], USUAL)],
        _ => vec![batch(10 * t, &[40, 38, 12], USUAL)],
    }
}

/// With dropout, whose masks are the same on both.
#[test]
fn f32_gradients_are_those_of_the_cpu() {
    for objective in [Objective::RetroMae, Objective::DupMae, Objective::Mlm] {
        // With these weights, as far from fresh ones as they are, DupMAE's gradients of the widest are off by more in f32 on the CPU, too.
        let most = if objective == Objective::DupMae { 64 } else { 128 };
        let all = [(32, Activation::Gelu), (64, Activation::Silu), (128, Activation::GeluTanh)];
        for (head_size, act) in all.into_iter().filter(|(head_size, _)| *head_size <= most) {
            let config = sizes(head_size, act);
            let mut cpu = on(Device::Cpu, &config, objective, DType::F64);
            let mut gpu = on(gpu(), &config, objective, DType::F32);
            let micro = micro(1);
            let (a, b) = (cpu.gradients(&micro, dropout()).unwrap(), gpu.gradients(&micro, dropout()).unwrap());
            assert!((a.total() / b.total() - 1.0).abs() < 1e-5, "{} and {}", a.total(), b.total());
            assert_eq!((a.encoder.correct, a.decoder.correct), (b.encoder.correct, b.decoder.correct));
            assert!((a.bow - b.bow).abs() <= 1e-5 * a.bow, "{} and {}", a.bow, b.bow);
            assert_close(&gradients(&gpu), &gradients(&cpu), 1e-4);
        }
    }
}

/// Rows with a label and [CLS] rows are then the same ones: more are laid out for than there are tokens.
#[test]
fn every_row_labelled() {
    let all = Labels { encoder: |_, _| true, decoder: |_, _| true };
    let micro = [batch(0, &[40, 40, 10], all)];
    for objective in [Objective::RetroMae, Objective::DupMae, Objective::Mlm] {
        let config = sizes(32, Activation::Gelu);
        let (mut cpu, mut gpu) =
            (on(Device::Cpu, &config, objective, DType::F64), on(gpu(), &config, objective, DType::F32));
        let (a, b) = (cpu.gradients(&micro, dropout()).unwrap(), gpu.gradients(&micro, dropout()).unwrap());
        assert!((a.total() / b.total() - 1.0).abs() < 1e-5, "{} and {}", a.total(), b.total());
        assert_close(&gradients(&gpu), &gradients(&cpu), 1e-4);
    }
}

#[test]
fn f32_steps_are_those_of_the_cpu() {
    let (mut cpu, mut gpu) = (small(Device::Cpu, DType::F32), small(gpu(), DType::F32));
    for t in 1..=7 {
        let step = |model: &mut Pretrainer| model.step(&micro(t), &AdamW::default(), 1e-3, t, 9).unwrap();
        let (a, b) = (step(&mut cpu), step(&mut gpu));
        assert!((a.losses.total() / b.losses.total() - 1.0).abs() < 1e-4 && !b.skipped, "step {t}");
        assert!((a.grad_norm / b.grad_norm - 1.0).abs() < 1e-3, "step {t}: norms {} and {}", a.grad_norm, b.grad_norm);
    }
}

/// Sixty steps of a model that learns its few texts by heart.
#[test]
fn bf16_training_follows_the_cpu() {
    let texts: Vec<Vec<PretrainBatch>> = (0..3).map(|t| vec![batch(100 + 10 * t, &[33, 12, 20, 25], USUAL)]).collect();
    let run = |mut model: Pretrainer| -> Vec<f64> {
        let step = |t: u64| model.step(&texts[t as usize % 3], &AdamW::default(), 3e-3, t, 9).unwrap().losses.total();
        (1..=60).map(step).collect()
    };
    let fresh = |device, storage| {
        let config = sizes(32, Activation::Gelu);
        let model = Pretrainer::new(device, &config, Objective::RetroMae, CAPACITY, storage).unwrap();
        model.params().load(3, 0.02, |_, _, _| Ok(false)).unwrap();
        model
    };
    let (cpu, gpu) = (run(fresh(Device::Cpu, DType::F32)), run(fresh(gpu(), DType::BF16)));
    let learned = cpu[0] - cpu[59];
    let furthest = cpu.iter().zip(&gpu).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    println!("from {:.3} to {:.3}, bf16 to {:.3}, at most {furthest:.4} apart", cpu[0], cpu[59], gpu[59]);
    assert!(learned > 1.0, "the CPU's loss fell by {learned} only");
    assert!(furthest <= 0.02 * learned, "losses are {furthest} apart where {learned} was learned");
}

/// A record replayed for other batches, between other records, computes what fresh work does.
#[test]
fn replayed_work_equals_fresh_work() {
    let retromae = [DType::F32, DType::BF16].map(|storage| (storage, Objective::RetroMae));
    for (storage, objective) in retromae.into_iter().chain([(DType::BF16, Objective::DupMae)]) {
        let (device, config) = (gpu(), sizes(32, Activation::Gelu));
        let mut used = on(device, &config, objective, storage);
        for t in 1..=9 {
            let losses = used.gradients(&micro(t), dropout()).unwrap();
            let mut fresh = on(device, &config, objective, storage);
            assert_eq!(fresh.gradients(&micro(t), dropout()).unwrap(), losses, "{storage:?}, batch {t}");
            assert!(gradient_bits(&fresh) == gradient_bits(&used), "{storage:?}, batch {t}");
        }
    }
}

/// Steps of other batches, dropout keys and learning rates: recorded ones leave the bits of those that are queued piece by piece.
#[test]
fn replayed_steps_equal_steps_as_they_come() {
    let retromae = [DType::F32, DType::BF16].map(|storage| (storage, Objective::RetroMae));
    for (storage, objective) in
        retromae.into_iter().chain([(DType::BF16, Objective::DupMae), (DType::BF16, Objective::Mlm)])
    {
        let (device, config) = (gpu(), sizes(32, Activation::Gelu));
        let [mut recorded, mut direct] = [(); 2].map(|()| on(device, &config, objective, storage));
        let mut replays = 0;
        for t in 1..=10 {
            let step =
                |model: &mut Pretrainer| model.step(&micro(t), &AdamW::default(), 1e-2 / (1 + t % 4) as f64, t, 9);
            let (a, queued) = trace::record(device, Detail::Queued, || step(&mut recorded)).unwrap();
            let (b, pieces) = trace::record(device, Detail::Pieces, || step(&mut direct)).unwrap();
            let count = |trace: &trace::Trace| trace.pieces.iter().filter(|(_, piece)| *piece == Piece::Replay).count();
            assert_eq!(count(&pieces), 0, "{objective:?} {storage:?}, step {t}");
            replays += count(&queued);
            assert_eq!(a, b, "{objective:?} {storage:?}, step {t}");
            assert!(!a.skipped && bits(&recorded) == bits(&direct), "{objective:?} {storage:?}, step {t}");
        }
        assert!(replays > 6, "{objective:?} {storage:?}: {replays} replays");
    }
}

/// A vocabulary as large as BERT's, so that the texts go through the LM head in several chunks: other ones on the CPU, and after a
/// replay the same ones with other borders.
#[test]
fn dupmae_over_several_chunks() {
    let config = BertConfig { vocab_size: 30_522, num_hidden_layers: 1, ..sizes(32, Activation::Gelu) };
    let capacity = Capacity { tokens: 640, sequences: 40, length: 40, encoder_labels: 640 };
    let model = |device, storage| {
        let model = Pretrainer::new(device, &config, Objective::DupMae, capacity, storage).unwrap();
        fill(model.params());
        model
    };
    let (mut cpu, mut gpu) = (model(Device::Cpu, DType::F64), model(gpu(), DType::F32));
    for first in [1, 2, 3] {
        let texts = 16 + first % 2;
        let lengths: Vec<usize> = (0..texts).map(|i| 40 - (first + 3 * i) % 7).collect();
        let micro = [batch(first as u64, &lengths, USUAL)];
        let (a, b) = (cpu.gradients(&micro, dropout()).unwrap(), gpu.gradients(&micro, dropout()).unwrap());
        assert!((a.total() / b.total() - 1.0).abs() < 1e-5 && (a.bow / b.bow - 1.0).abs() < 1e-5, "batch {first}");
        assert_close(&gradients(&gpu), &gradients(&cpu), 1e-4);
    }
}

/// Whichever batch is made ready while a step is computed, and whatever is computed before its turn, no bit differs.
#[test]
fn a_batch_made_ready_changes_no_bit() {
    for objective in [Objective::RetroMae, Objective::DupMae] {
        let run = |next: &dyn Fn(u64) -> Option<PretrainBatch>| {
            let device = gpu();
            let Device::Gpu(memory) = device else { panic!("{device:?} is no GPU") };
            let mut model = on(device, &sizes(32, Activation::Gelu), objective, DType::BF16);
            let (mut told, mut before) = (Vec::new(), 0);
            for t in 1..=9 {
                before = memory.allocated();
                let (adamw, next) = (AdamW::default(), next(t));
                let done = model.step_before(&micro(t), next.as_ref(), &adamw, 1e-3, (t, 9)).unwrap();
                told.push((done.losses, done.grad_norm));
                if t % 4 == 0 {
                    // The batch that is ready, or another in its place.
                    let held_out = if t == 4 { micro(5) } else { micro(2) };
                    told.push((model.evaluate(&held_out[0]).unwrap(), 0.0));
                }
            }
            assert_eq!(memory.allocated(), before, "a step allocates nothing");
            (told, bits(&model))
        };
        let expected = run(&|_| None);
        for (what, away) in [("the next", 1), ("another", 5), ("the same", 0)] {
            assert!(run(&|t| micro(t + away).into_iter().next()) == expected, "{objective:?}, {what}");
        }
    }
}

/// What a broken step leaves in the buffers is multiplied by zero by no later one.
#[test]
fn a_broken_step_changes_nothing_and_leaves_nothing() {
    for objective in [Objective::RetroMae, Objective::DupMae] {
        broken_step(objective);
    }
}

fn broken_step(objective: Objective) {
    let (device, config) = (gpu(), sizes(32, Activation::Gelu));
    let [mut broken, mut fresh] = [(); 2].map(|()| on(device, &config, objective, DType::BF16));
    let before = bits(&broken);
    let (weights, largest) = (broken.params().weights().to_vec::<f32>(), vec![batch(7, &[40, 40], USUAL)]);
    let mut poisoned = weights.clone();
    poisoned[..64].fill(f32::INFINITY);
    broken.params().weights().upload(&poisoned);
    broken.params().refresh();
    let step =
        |model: &mut Pretrainer, micro: &[PretrainBatch]| model.step(micro, &AdamW::default(), 1e-3, 1, 9).unwrap();
    assert!(step(&mut broken, &largest).skipped, "infinite weights give a gradient that is not finite");
    broken.params().weights().upload(&weights);
    broken.params().refresh();
    assert!(bits(&broken) == before, "a skipped step changes nothing");
    let own = vec![batch(3, &[4, 13, 7], USUAL)];
    assert_eq!(step(&mut broken, &own), step(&mut fresh, &own));
    assert!(bits(&broken) == bits(&fresh));
}

#[test]
fn the_same_steps_give_the_same_bits_in_every_order() {
    for objective in [Objective::RetroMae, Objective::DupMae] {
        in_every_order(objective);
    }
}

fn in_every_order(objective: Objective) {
    let run = |device: Device| {
        let mut model = on(device, &sizes(32, Activation::Gelu), objective, DType::BF16);
        for t in 1..=4 {
            assert!(!model.step(&micro(t), &AdamW::default(), 1e-3, t, 9).unwrap().skipped);
        }
        bits(&model)
    };
    let first = run(gpu());
    assert!(run(gpu()) == first, "a repeated run differs");
    if std::env::var("RETROMAE_DEVICE").is_ok_and(|name| name != "emulator") {
        println!("left out: other orders, which only the emulator can choose");
        return;
    }
    for (seed, asynchronous) in [(1, Asynchronous::Random), (2, Asynchronous::AtIssue)] {
        let options = Options { seed, asynchronous, threads: 1, ..Options::default() };
        assert!(run(Device::emulator(options).unwrap()) == first, "{options:?}");
    }
}

#[test]
fn micro_batches_add_up_to_the_merged_one() {
    let mut model = small(gpu(), DType::F32);
    let merged = model.gradients(&[batch(3, &[4, 33, 7, 20, 5], USUAL)], dropout()).unwrap();
    let expected = gradients(&model);
    let split = [batch(3, &[4, 33], USUAL), batch(5, &[7, 20, 5], USUAL)];
    for _ in 0..3 {
        let losses = model.gradients(&split, dropout()).unwrap();
        assert!((losses.total() / merged.total() - 1.0).abs() < 1e-6);
        assert_close(&gradients(&model), &expected, 2e-6);
    }
}

/// The key of the dropout is read from the device: a replayed step draws new masks.
#[test]
fn replayed_steps_draw_new_dropout() {
    let mut model = small(gpu(), DType::F32);
    let own = [batch(3, &[4, 33, 7], USUAL)];
    let mut loss = |step| {
        let mask = Dropout::new(5, step, 0.1);
        let masks = retromae_engine::graph::StepDropout { hidden: mask, attention: mask };
        model.gradients(&own, masks).unwrap().total()
    };
    let losses: Vec<f64> = [1, 2, 3, 1, 2, 3].map(&mut loss).to_vec();
    assert_eq!(losses[..3], losses[3..]);
    assert!(losses[0] != losses[1] && losses[1] != losses[2]);
}

#[test]
fn what_a_gpu_cannot_hold_or_compute_is_one_line() {
    let device = Device::emulator(Options { memory: 1 << 20, ..Options::default() }).unwrap();
    let refused = |device, config: &BertConfig, capacity| {
        Pretrainer::new(device, config, Objective::RetroMae, capacity, DType::BF16).err().unwrap().to_string()
    };
    let capacity = Capacity { tokens: 4000, sequences: 100, length: 40, encoder_labels: 4000 };
    let line = refused(device, &sizes(32, Activation::Gelu), capacity);
    assert!(line.starts_with("out of memory: ") && line.contains("; use a smaller batch"), "{line}");
    let odd = BertConfig { num_attention_heads: 1, ..sizes(32, Activation::Gelu) };
    let odd = BertConfig { hidden_size: 48, ..odd };
    let line = refused(gpu(), &odd, CAPACITY);
    assert!(line.contains("attention head is 48") && line.contains("--device cpu"), "{line}");
    let line = refused(gpu(), &config(32, Activation::Gelu), CAPACITY);
    assert!(line.contains("intermediate_size is 37"), "{line}");
}
