//! Losses and gradients of the whole graph against the golden cases, on the CPU and on a GPU: the emulated one, or with
//! `RETROMAE_DEVICE=cuda` a real one.

use std::path::{Path, PathBuf};

use retromae_engine::device::{DType, Device};
use retromae_engine::graph::{Capacity, StepDropout};
use retromae_engine::model::config::{Activation, BertConfig};
use retromae_engine::ops::optimizer::AdamW;
use retromae_engine::train::contract::BatchFile;
use retromae_engine::train::step::{Objective, Pretrainer};
use retromae_engine::train::updates::Trainable;
use safetensors::SafeTensors;

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

fn floats(t: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let view = t.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    view.data().chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()
}

/// ‖x − reference‖ / ‖reference‖. The key bias is the one tensor whose gradient is zero in exact arithmetic: there the reference is
/// rounding noise of f64 (below 1e-15) and the difference itself must be as small.
fn relative_error(name: &str, x: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(x.len(), reference.len());
    if name.ends_with("self.key.bias") {
        let largest = x.iter().chain(reference).fold(0.0f32, |a, x| a.max(x.abs()));
        return if largest < 1e-12 { 0.0 } else { f64::from(largest) };
    }
    let (mut difference, mut norm) = (0.0, 0.0);
    for (&x, &r) in x.iter().zip(reference) {
        difference += (f64::from(x) - f64::from(r)).powi(2);
        norm += f64::from(r).powi(2);
    }
    (difference / norm).sqrt()
}

fn config(case: &Path) -> BertConfig {
    let raw: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&std::fs::read(case.join("model/config.json")).unwrap()).unwrap();
    let n = |k: &str| raw[k].as_u64().unwrap() as usize;
    BertConfig {
        vocab_size: n("vocab_size"),
        hidden_size: n("hidden_size"),
        num_hidden_layers: n("num_hidden_layers"),
        num_attention_heads: n("num_attention_heads"),
        intermediate_size: n("intermediate_size"),
        hidden_act: Activation::Gelu,
        hidden_dropout_prob: 0.0,
        attention_probs_dropout_prob: 0.0,
        max_position_embeddings: n("max_position_embeddings"),
        type_vocab_size: n("type_vocab_size"),
        initializer_range: 0.02,
        layer_norm_eps: 1e-12,
        pad_token_id: 0,
        raw,
    }
}

/// The device that `RETROMAE_DEVICE` names, the emulator unless it does. A device that is named and not there is a failure.
fn gpu() -> Device {
    let name = std::env::var("RETROMAE_DEVICE").unwrap_or_else(|_| "emulator".into());
    Device::open(&name).unwrap_or_else(|e| panic!("RETROMAE_DEVICE={name}: {e}")).0
}

fn model(case: &Path, objective: Objective, device: Device, dtype: DType) -> Pretrainer {
    let config = config(case);
    let capacity = Capacity { tokens: 5 * 80, sequences: 5, length: 80, encoder_labels: 400 };
    let model = Pretrainer::new(device, &config, objective, capacity, dtype).unwrap();
    let files: Vec<Vec<u8>> = ["model/model.safetensors", "model/enhanced_decoder.safetensors"]
        .iter()
        .filter_map(|f| std::fs::read(case.join(f)).ok())
        .collect();
    let files: Vec<SafeTensors<'_>> = files.iter().map(|f| SafeTensors::deserialize(f).unwrap()).collect();
    let fresh = model.params().load(0, 0.02, |name, _, out| {
        let Some(file) = files.iter().find(|f| f.tensor(name).is_ok()) else { return Ok(false) };
        out.copy_from_slice(&floats(file, name));
        Ok(true)
    });
    assert_eq!(fresh.unwrap(), Vec::<String>::new());
    model
}

/// How far losses and gradients may be off.
enum Tolerance {
    /// Relative errors of every loss and of every gradient.
    Fixed(f64, f64),
    /// Twice the error of a plain bf16 computation of the same case, which tests/python/plain_bf16.py wrote. A loss is one number that
    /// may come out well by chance, so the worst of the case's losses stands for all.
    TwicePlain,
}

impl Tolerance {
    fn of(&self, case: &Path) -> impl Fn(&str) -> f64 {
        let plain: serde_json::Map<String, serde_json::Value> = match self {
            Tolerance::Fixed(..) => Default::default(),
            Tolerance::TwicePlain => {
                serde_json::from_slice(&std::fs::read(case.join("plain_bf16.json")).unwrap()).unwrap()
            }
        };
        let losses = plain.iter().filter(|(name, _)| name.starts_with("loss")).map(|(_, e)| e.as_f64().unwrap());
        let (fixed, worst) = (
            match self {
                Tolerance::Fixed(l, g) => Some((*l, *g)),
                Tolerance::TwicePlain => None,
            },
            losses.fold(0.0, f64::max),
        );
        move |name| match (fixed, name.starts_with("loss")) {
            (Some((loss, _)), true) => loss,
            (Some((_, gradient)), false) => gradient,
            (None, true) => 2.0 * worst,
            // Zero in exact arithmetic, and exactly zero here.
            (None, false) if name.ends_with("self.key.bias") => 1e-12,
            (None, false) => 2.0 * plain[name].as_f64().unwrap(),
        }
    }
}

fn check(case: &str, objective: Objective, device: Device, dtype: DType, tolerance: Tolerance) {
    let case = golden(case);
    let tolerance = tolerance.of(&case);
    let mut model = model(&case, objective, device, dtype);
    let path = case.join("batch.safetensors");
    let c = model.config().clone();
    let (file, vocabulary, positions) = (BatchFile::open(&path, "").unwrap(), c.vocab_size, c.max_position_embeddings);
    let batch = match objective {
        Objective::DupMae => file.dupmae(vocabulary, positions),
        _ => file.pretrain(objective.has_decoder(), vocabulary, positions),
    };
    let batch = batch.unwrap();
    let losses = model.gradients(&[batch], StepDropout::OFF).unwrap();
    let expected = std::fs::read(case.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&expected).unwrap();
    let loss = |name: &str, value: f64| {
        let reference = f64::from(floats(&expected, name)[0]);
        let error = ((value - reference) / reference).abs();
        assert!(error <= tolerance(name), "{name}: {value} instead of {reference}");
    };
    loss("loss", losses.total());
    if objective.has_decoder() {
        loss("loss.encoder", losses.encoder_loss());
        loss("loss.decoder", losses.decoder_loss());
    }
    if objective == Objective::DupMae {
        loss("loss.bow", losses.bow_loss());
    }
    let (mut compared, mut most) = (0, 0.0f64);
    for part in model.params().parts() {
        let name = format!("grad.{}", part.name);
        let error = relative_error(&part.name, &model.params().get_gradient(part), &floats(&expected, &name));
        assert!(error <= tolerance(&name), "{name}: error {error:.2e}, allowed {:.2e}", tolerance(&name));
        (compared, most) = (compared + 1, most.max(error / tolerance(&name)));
    }
    println!("{}: {dtype:?} gradients use at most {:.0} % of what is allowed", case.display(), 100.0 * most);
    assert_eq!(compared, expected.names().iter().filter(|n| n.starts_with("grad.")).count());
}

#[test]
fn golden_retromae_head32() {
    check("head32/retromae", Objective::RetroMae, Device::Cpu, DType::F32, Tolerance::Fixed(1e-5, 1e-4));
}

#[test]
fn golden_retromae_head64() {
    check("head64/retromae", Objective::RetroMae, Device::Cpu, DType::F32, Tolerance::Fixed(1e-5, 1e-4));
}

#[test]
fn golden_mlm_head32() {
    check("head32/mlm", Objective::Mlm, Device::Cpu, DType::F32, Tolerance::Fixed(1e-5, 1e-4));
}

#[test]
fn golden_dupmae_head32() {
    check("head32/dupmae", Objective::DupMae, Device::Cpu, DType::F32, Tolerance::Fixed(1e-5, 1e-4));
}

#[test]
fn golden_in_f64_is_exact_to_the_files_precision() {
    check("head32/retromae", Objective::RetroMae, Device::Cpu, DType::F64, Tolerance::Fixed(2e-7, 2e-6));
    check("head32/dupmae", Objective::DupMae, Device::Cpu, DType::F64, Tolerance::Fixed(2e-7, 2e-6));
    check("head32/mlm", Objective::Mlm, Device::Cpu, DType::F64, Tolerance::Fixed(2e-7, 2e-6));
}

#[test]
fn golden_on_a_gpu_in_f32() {
    check("head32/retromae", Objective::RetroMae, gpu(), DType::F32, Tolerance::Fixed(1e-5, 1e-4));
    check("head64/retromae", Objective::RetroMae, gpu(), DType::F32, Tolerance::Fixed(1e-5, 1e-4));
    check("head32/mlm", Objective::Mlm, gpu(), DType::F32, Tolerance::Fixed(1e-5, 1e-4));
    check("head32/dupmae", Objective::DupMae, gpu(), DType::F32, Tolerance::Fixed(1e-5, 1e-4));
}

#[test]
fn golden_on_a_gpu_in_bf16() {
    check("head32/retromae", Objective::RetroMae, gpu(), DType::BF16, Tolerance::TwicePlain);
    check("head64/retromae", Objective::RetroMae, gpu(), DType::BF16, Tolerance::TwicePlain);
    check("head32/mlm", Objective::Mlm, gpu(), DType::BF16, Tolerance::TwicePlain);
    check("head32/dupmae", Objective::DupMae, gpu(), DType::BF16, Tolerance::TwicePlain);
}

#[test]
fn golden_trajectory() {
    trajectory(Device::Cpu);
}

#[test]
fn golden_trajectory_on_a_gpu() {
    trajectory(gpu());
}

fn trajectory(device: Device) {
    let case = golden("head32/trajectory");
    let mut model = model(&case, Objective::RetroMae, device, DType::F32);
    let c = model.config().clone();
    let path = case.join("batch.safetensors");
    let expected = std::fs::read(case.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&expected).unwrap();
    let [losses, norms, lrs] = ["losses", "grad_norms", "lrs"].map(|n| floats(&expected, n));
    for step in 0..25 {
        let prefix = format!("{}.", step % 5);
        let batch = BatchFile::open(&path, &prefix).unwrap();
        let batch = batch.pretrain(true, c.vocab_size, c.max_position_embeddings).unwrap();
        let out = model.step(&[batch], &AdamW::default(), f64::from(lrs[step]), step as u64 + 1, 0).unwrap();
        let error = (out.losses.total() / f64::from(losses[step]) - 1.0).abs();
        assert!(error <= 1e-5, "step {step}: loss {} instead of {}", out.losses.total(), losses[step]);
        let error = (out.grad_norm / f64::from(norms[step]) - 1.0).abs();
        assert!(error <= 1e-4, "step {step}: norm {} instead of {}", out.grad_norm, norms[step]);
    }
    for part in model.params().parts() {
        let error =
            relative_error(&part.name, &model.params().get(part), &floats(&expected, &format!("final.{}", part.name)));
        assert!(error <= 1e-4, "final.{}: error {error:.2e}", part.name);
    }
}
