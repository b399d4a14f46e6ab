//! How a step is cut into batches, and that it repeats.

use retromae_engine::device::DType;
use retromae_engine::ops::optimizer::AdamW;
use retromae_engine::train::step::{Losses, Objective, Pretrainer};

use super::common::{USUAL, assert_close, batch, dropout, gradients, small};
use retromae_engine::train::updates::Trainable;

fn pool<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}

fn assert_equal_losses(a: &Losses, b: &Losses) {
    assert_eq!((a.encoder_labels, a.decoder_labels), (b.encoder_labels, b.decoder_labels));
    assert_eq!((a.encoder.correct, a.decoder.correct), (b.encoder.correct, b.decoder.correct));
    assert_eq!(a.bow_texts, b.bow_texts);
    assert!((a.bow - b.bow).abs() <= 1e-12 * b.bow, "{} and {}", a.bow, b.bow);
    assert!((a.total() / b.total() - 1.0).abs() <= 1e-12, "{} and {}", a.total(), b.total());
}

#[test]
fn two_micro_batches_equal_the_merged_one() {
    for objective in [Objective::RetroMae, Objective::DupMae, Objective::Mlm] {
        let mut model = small(objective, DType::F64);
        // Different numbers of labels and longest texts, so that a mean of means would show.
        let merged = model.gradients(&[batch(3, &[4, 33, 7, 20, 5], USUAL)], dropout()).unwrap();
        let expected = gradients(&model);
        let split = model.gradients(&[batch(3, &[4, 33], USUAL), batch(5, &[7, 20, 5], USUAL)], dropout()).unwrap();
        assert_equal_losses(&split, &merged);
        assert_close(&gradients(&model), &expected, 1e-12);
    }
}

#[test]
fn evaluation_is_training_without_dropout() {
    for objective in [Objective::RetroMae, Objective::DupMae] {
        let mut model = small(objective, DType::F32);
        let batch = batch(3, &[4, 33, 7], USUAL);
        let evaluated = model.evaluate(&batch).unwrap();
        let trained = model.gradients(&[batch], retromae_engine::graph::StepDropout::OFF).unwrap();
        assert_eq!(evaluated, trained);
    }
}

/// Weights and moments after three steps, as bits.
fn train(model: &mut Pretrainer) -> Vec<u32> {
    for t in 1..=3 {
        let micro = [batch(10 * t, &[4, 33], USUAL), batch(10 * t + 2, &[40, 17, 2], USUAL)];
        let outcome = model.step(&micro, &AdamW::default(), 1e-3, t, 9).unwrap();
        assert!(!outcome.skipped && outcome.losses.total().is_finite());
    }
    let (first, second) = model.optimizer().moments();
    [model.params().weights(), first, second].iter().flat_map(|t| t.to_vec::<f32>()).map(f32::to_bits).collect()
}

#[test]
fn the_same_steps_give_the_same_bits_on_any_number_of_threads() {
    for objective in [Objective::RetroMae, Objective::DupMae] {
        let run = |threads| pool(threads, || train(&mut small(objective, DType::F32)));
        let first = run(1);
        assert!(run(1) == first, "a repeated run differs");
        assert!(run(2) == first, "two threads differ from one");
    }
}

/// Buffers hold what the last batch left; nothing of it may matter.
#[test]
fn a_batch_does_not_depend_on_the_one_before() {
    let other = batch(50, &[40, 40], USUAL);
    let own = [batch(3, &[4, 33, 7], USUAL)];
    for objective in [Objective::RetroMae, Objective::DupMae] {
        let [mut fresh, mut used] = [(); 2].map(|()| small(objective, DType::F32));
        used.gradients(std::slice::from_ref(&other), dropout()).unwrap();
        assert_eq!(fresh.gradients(&own, dropout()).unwrap(), used.gradients(&own, dropout()).unwrap());
        let bits =
            |m: &Pretrainer| m.params().gradients().to_vec::<f32>().into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert!(bits(&fresh) == bits(&used));
    }
}
