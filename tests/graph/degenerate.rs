//! Batches at the edge of what can come: nothing at all, nothing to predict, the shortest texts.

use retromae_engine::data::batch::PretrainBatch;
use retromae_engine::device::DType;
use retromae_engine::train::step::{Losses, Objective};

use super::common::{Labels, USUAL, batch, dropout, gradients, small};
use retromae_engine::train::updates::Trainable;

const NONE: fn(usize, usize) -> bool = |_, _| false;

/// Runs a step and an evaluation of every objective; everything must be finite, and zero exactly when there is neither label nor bag.
fn check(batch: &PretrainBatch) {
    for objective in [Objective::RetroMae, Objective::DupMae, Objective::Mlm] {
        for dtype in [DType::F32, DType::F64] {
            let mut model = small(objective, dtype);
            let losses: Losses = model.gradients(std::slice::from_ref(batch), dropout()).unwrap();
            let all = gradients(&model);
            assert!(losses.total().is_finite());
            assert!(all.iter().flat_map(|g| &g.1).all(|x| x.is_finite()));
            let labels = losses.encoder_labels + losses.decoder_labels;
            let expected = batch.encoder_label_ids.len()
                + batch.decoder.as_ref().map_or(0, |d| if objective.has_decoder() { d.label_ids.len() } else { 0 });
            let bags = objective == Objective::DupMae && batch.bags.as_ref().is_some_and(|bags| !bags.ids.is_empty());
            let some = labels > 0 || bags;
            assert_eq!(labels, expected);
            assert_eq!(losses.total() > 0.0, some);
            assert_eq!(losses.bow > 0.0, bags);
            assert_eq!(all.iter().flat_map(|g| &g.1).any(|&x| x != 0.0), some);
            assert!(model.evaluate(batch).unwrap().total().is_finite());
        }
    }
}

#[test]
fn no_sequence() {
    check(&batch(0, &[], USUAL));
}

#[test]
fn no_label() {
    check(&batch(0, &[5, 9], Labels { encoder: NONE, decoder: NONE }));
}

#[test]
fn no_encoder_label() {
    check(&batch(0, &[5, 9], Labels { encoder: NONE, ..USUAL }));
}

#[test]
fn no_decoder_label() {
    check(&batch(0, &[5, 9], Labels { decoder: NONE, ..USUAL }));
}

/// [CLS] [SEP] has no label, [CLS] word [SEP] has one; neighbours do.
#[test]
fn texts_without_a_label_among_others() {
    check(&batch(0, &[2, 9, 2, 3, 2], USUAL));
}

#[test]
fn texts_of_one_and_two_tokens_with_labels() {
    let all = Labels { encoder: |_, _| true, decoder: |_, _| true };
    check(&batch(0, &[1, 2], all));
    check(&batch(0, &[1], all));
    check(&batch(0, &[2, 1, 33], all));
}

#[test]
fn every_row_labelled() {
    let all = Labels { encoder: |_, _| true, decoder: |_, _| true };
    check(&batch(0, &[40, 40], all));
}
