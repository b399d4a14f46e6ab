//! Gradients of the whole graph against central differences of its loss, in f64, with dropout on.

use retromae_engine::device::DType;
use retromae_engine::model::config::Activation;
use retromae_engine::rng::{Site, Stream};
use retromae_engine::train::step::Objective;

use super::common::{USUAL, batch, config, dropout, gradients, model};
use retromae_engine::train::updates::Trainable;

/// Differentiates the loss by the element of largest gradient and two others of every tensor.
fn check(head_size: usize, activation: Activation, objective: Objective) {
    let mut model = model(&config(head_size, activation), objective, DType::F64);
    let batches = [batch(7, &[3, 17, 5], USUAL)];
    let losses = model.gradients(&batches, dropout()).unwrap();
    assert!(losses.encoder_labels > 0 && (objective == Objective::Mlm || losses.decoder_labels > 0));
    let all = gradients(&model);
    let offsets: Vec<usize> = model.params().parts().iter().map(|p| p.offset).collect();
    let mut random = Stream::new(6, 0, Site::Init, head_size as u64);
    for ((name, gradient), offset) in all.iter().zip(offsets) {
        let largest = (0..gradient.len()).max_by(|&a, &b| gradient[a].abs().total_cmp(&gradient[b].abs())).unwrap();
        let n = gradient.len() as u32;
        let (mut error, mut norm) = (0.0, 0.0);
        for at in [largest, random.below(n) as usize, random.below(n) as usize] {
            // Truncation h² f‴/6 and rounding ε L / h are both near 1e-11.
            let h = 1e-5;
            let mut loss = |by: f64| {
                let weights = model.params().weights();
                let old = weights.read::<f64>()[offset + at];
                weights.write::<f64>()[offset + at] = old + by;
                let loss = model.gradients(&batches, dropout()).unwrap().total();
                model.params().weights().write::<f64>()[offset + at] = old;
                loss
            };
            let numeric = (loss(h) - loss(-h)) / (2.0 * h);
            error += (numeric - gradient[at]).powi(2);
            norm += gradient[at].powi(2);
        }
        let (error, norm) = (f64::sqrt(error), f64::sqrt(norm));
        if name.ends_with("self.key.bias") {
            assert_eq!(norm, 0.0, "a constant added to all scores of a row changes nothing");
        }
        assert!(error <= 1e-6 * norm + 1e-9, "{name}: differs by {error:.2e} at norm {norm:.2e}");
    }
}

#[test]
fn retromae_of_every_activation() {
    use Activation::*;
    for activation in [Gelu, GeluTanh, QuickGelu, Relu, Silu] {
        check(32, activation, Objective::RetroMae);
    }
}

#[test]
fn retromae_of_every_head_size() {
    for head_size in [64, 128] {
        check(head_size, Activation::Gelu, Objective::RetroMae);
    }
}

#[test]
fn dupmae() {
    for activation in [Activation::Gelu, Activation::Silu] {
        check(32, activation, Objective::DupMae);
    }
}

#[test]
fn mlm() {
    check(32, Activation::Gelu, Objective::Mlm);
}
