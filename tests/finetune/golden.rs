//! The golden cases of bi-encoders and cross-encoders.

use std::path::{Path, PathBuf};

use retromae_engine::data::pairs::batch::ContrastiveBatch;
use retromae_engine::device::{DType, Device};
use retromae_engine::graph::biencoder::Shape;
use retromae_engine::graph::params::Params;
use retromae_engine::graph::{Capacity, StepDropout};
use retromae_engine::model::config::BertConfig;
use retromae_engine::model::weights::Checkpoint;
use retromae_engine::ops::pool::Pooling;
use retromae_engine::train::biencoder::{BiEncoder, DistillLoss, Distillation, Options, Room};
use retromae_engine::train::contract::BatchFile;
use retromae_engine::train::cross_encoder::Ranker;
use retromae_engine::train::updates::Trainable;
use safetensors::SafeTensors;
use serde_json::Value;

/// The device that `RETROMAE_DEVICE` names, the emulator unless it does. A device that is named and not there is a failure.
pub fn gpu() -> Device {
    let name = std::env::var("RETROMAE_DEVICE").unwrap_or_else(|_| "emulator".into());
    Device::open(&name).unwrap_or_else(|e| panic!("RETROMAE_DEVICE={name}: {e}")).0
}

/// The model of a golden case.
pub fn model(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/head32").join(case).join("model")
}

/// A golden case: its options and what must come out.
struct Golden {
    dir: PathBuf,
    options: Value,
    expected: Vec<u8>,
}

impl Golden {
    fn open(name: &str) -> Golden {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/head32").join(name);
        let options = serde_json::from_slice(&std::fs::read(dir.join("case.json")).unwrap()).unwrap();
        let expected = std::fs::read(dir.join("expected.safetensors")).unwrap();
        Golden { dir, options, expected }
    }

    fn config(&self) -> BertConfig {
        let of = |sub: &str| self.dir.join("model").join(sub).join("config.json");
        BertConfig::read([of("query_model"), of("")].into_iter().find(|p| p.is_file()).unwrap()).unwrap()
    }

    fn group(&self) -> usize {
        self.options["group_size"].as_u64().unwrap() as usize
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(&self.expected).unwrap();
        let view = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        view.data().chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()
    }

    /// Number of expected gradients.
    fn gradients(&self) -> usize {
        let file = SafeTensors::deserialize(&self.expected).unwrap();
        file.names().iter().filter(|name| name.starts_with("grad.")).count()
    }

    /// Errors of a plain bf16 computation, written by tests/python/plain_bf16.py.
    fn plain(&self) -> serde_json::Map<String, Value> {
        serde_json::from_slice(&std::fs::read(self.dir.join("plain_bf16.json")).unwrap()).unwrap()
    }
}

fn norm(x: impl IntoIterator<Item = f64>) -> f64 {
    x.into_iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// ‖x − reference‖ / ‖reference‖. Some gradients are zero in exact arithmetic, where something added to all scores of a query changes
/// nothing: biases of keys, and what shifts all passages alike. The reference is rounding noise there, and the difference is taken in
/// parts of `whole`, the norm of the whole gradient.
fn error(name: &str, x: &[f32], reference: &[f32], whole: f64) -> f64 {
    assert_eq!(x.len(), reference.len(), "{name}");
    let difference = norm(x.iter().zip(reference).map(|(&x, &r)| f64::from(x) - f64::from(r)));
    let size = norm(reference.iter().map(|&r| f64::from(r)));
    difference / if size < 1e-12 * whole { whole } else { size }
}

/// Compares everything; `allowed` is what a name may be off.
fn compare(golden: &Golden, params: &Params, losses: &[(&str, f64)], allowed: impl Fn(&str) -> f64) {
    for (name, value) in losses {
        let expected = f64::from(golden.floats(name)[0]);
        let off = (value / expected - 1.0).abs();
        assert!(off <= allowed(name), "{name}: {value} instead of {expected}");
    }
    let mut most = 0.0f64;
    let file = SafeTensors::deserialize(&golden.expected).unwrap();
    let gradients = file.names().into_iter().filter(|name| name.starts_with("grad."));
    let whole = norm(gradients.flat_map(|name| golden.floats(name)).map(f64::from));
    for part in params.parts() {
        // The golden files use the names of bare encoders where a bi-encoder is one.
        let is_bi = golden.options["objective"] == "contrastive";
        let bare = if is_bi { part.name.replacen("bert.", "", 1) } else { part.name.clone() };
        let name = format!("grad.{bare}");
        let off = error(&name, &params.get_gradient(part), &golden.floats(&name), whole);
        assert!(off <= allowed(&name), "{name}: error {off:.2e}, allowed {:.2e}", allowed(&name));
        most = most.max(off / allowed(&name));
    }
    assert_eq!(params.parts().len(), golden.gradients());
    println!("{}: gradients use at most {:.0} % of what is allowed", golden.dir.display(), 100.0 * most);
}

fn fixed(loss: f64, gradient: f64) -> impl Fn(&str) -> f64 {
    move |name| if name.starts_with("loss") { loss } else { gradient }
}

/// Twice the error of a plain bf16 computation; the worst loss stands for all, for a single number may come out well by chance.
fn twice_plain(golden: &Golden) -> impl Fn(&str) -> f64 {
    let plain = golden.plain();
    let losses = plain.iter().filter(|(name, _)| name.starts_with("loss")).map(|(_, e)| e.as_f64().unwrap());
    let worst = losses.fold(0.0, f64::max);
    move |name| match name {
        _ if name.starts_with("loss") => 2.0 * worst,
        _ if name.ends_with("self.key.bias") => 1e-12,
        _ => 2.0 * plain[name].as_f64().unwrap_or_else(|| panic!("no plain error of {name}")),
    }
}

/// The model and the batch of a bi-encoder's case.
fn bi_encoder(golden: &Golden, device: Device, storage: DType, chunk: Option<usize>) -> (BiEncoder, ContrastiveBatch) {
    let (config, o) = (golden.config(), &golden.options);
    let batch = BatchFile::open(&golden.dir.join("batch.safetensors"), "").unwrap();
    let batch = batch.contrastive(golden.group(), &config).unwrap();
    let options = Options {
        shape: Shape {
            pooling: if o["pooling"] == "mean" { Pooling::Mean } else { Pooling::Cls },
            projection: o["projection_dim"].as_u64().map(|n| n as usize),
            normalize: o["normalize"] == true,
        },
        lexical: None,
        untied: o["untied"] == true,
        temperature: o["temperature"].as_f64().unwrap_or(1.0) as f32,
        distillation: (o["teacher"] == true).then(|| Distillation {
            loss: DistillLoss::Kl,
            contrastive_weight: o["contrastive_loss_weight"].as_f64().unwrap(),
        }),
    };
    let room =
        Room { queries: batch.queries.samples.len(), passages: batch.passages.samples.len(), lengths: [16, 48], chunk };
    let model = BiEncoder::new(device, &config, options, room, storage).unwrap();
    let folder = golden.dir.join("model");
    let open = |sub: &str| Checkpoint::open(folder.join(sub)).unwrap();
    let poolers = std::fs::read(folder.join("pooler.safetensors")).ok();
    let fresh = model.params().load(0, 0.0, |name, shape, out| {
        for side in ["query_model", "passage_model"] {
            if let Some(bare) = name.strip_prefix(&format!("{side}.")) {
                return open(side).read_f32(bare, shape, out).map(|()| true);
            }
        }
        if name.starts_with("linear_") {
            let file = SafeTensors::deserialize(poolers.as_ref().unwrap()).unwrap();
            let view = file.tensor(name).unwrap();
            let values = view.data().chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap()));
            out.iter_mut().zip(values).for_each(|(to, from)| *to = from);
            return Ok(true);
        }
        open("").read_f32(name, shape, out).map(|()| true)
    });
    assert_eq!(fresh.unwrap(), Vec::<String>::new());
    (model, batch)
}

fn check(name: &str, device: Device, storage: DType, chunk: Option<usize>, allowed: impl Fn(&str) -> f64) {
    let golden = Golden::open(name);
    let (mut model, batch) = bi_encoder(&golden, device, storage, chunk);
    let losses = model.gradients(std::slice::from_ref(&batch), StepDropout::OFF).unwrap();
    if storage != DType::BF16 {
        let [q, p] = model.embeddings(&batch);
        for (name, x) in [("query_embeddings", q), ("passage_embeddings", p)] {
            let off = error(name, &x, &golden.floats(name), 0.0);
            assert!(off <= 1e-5, "{name}: error {off:.2e}");
        }
    }
    let mut named = vec![("loss", losses.total()), ("loss.contrastive", losses.contrastive_loss())];
    if golden.options["teacher"] == true {
        named.push(("loss.distill", losses.distill_loss()));
    }
    compare(&golden, model.params(), &named, allowed);
}

fn check_cross(device: Device, storage: DType, allowed: impl Fn(&str) -> f64) {
    let golden = Golden::open("cross_encoder");
    let config = golden.config();
    let batch = BatchFile::open(&golden.dir.join("batch.safetensors"), "").unwrap();
    let batch = batch.cross(golden.group(), &config).unwrap();
    let (tokens, sequences) = (batch.pairs.ids.len(), batch.pairs.samples.len());
    let capacity = Capacity { tokens, sequences, length: 48, encoder_labels: 0 };
    let mut model = Ranker::new(device, &config, 1.0, capacity, storage).unwrap();
    let weights = Checkpoint::open(golden.dir.join("model")).unwrap();
    let fresh = model.params().load(0, 0.0, |name, shape, out| weights.read_f32(name, shape, out).map(|()| true));
    assert_eq!(fresh.unwrap(), Vec::<String>::new());
    let losses = model.gradients(std::slice::from_ref(&batch), StepDropout::OFF).unwrap();
    compare(&golden, model.params(), &[("loss", losses.total())], allowed);
    // The scores are those that the loss is made of.
    for _ in 0..3 {
        let scores = model.scores(&batch.pairs).unwrap();
        let loss = |group: &[f32]| {
            let sum: f64 = group.iter().map(|&s| f64::from(s - group[0]).exp()).sum();
            sum.ln()
        };
        let mean = scores.chunks(golden.group()).map(loss).sum::<f64>() / losses.queries as f64;
        assert!((mean / losses.total() - 1.0).abs() < 1e-5, "{mean} and {}", losses.total());
    }
}

#[test]
fn cross_encoders() {
    check_cross(Device::Cpu, DType::F32, fixed(1e-5, 1e-4));
    check_cross(Device::Cpu, DType::F64, fixed(2e-7, 2e-6));
    check_cross(gpu(), DType::F32, fixed(1e-5, 1e-4));
    check_cross(gpu(), DType::BF16, twice_plain(&Golden::open("cross_encoder")));
}

const CASES: [&str; 4] = ["contrastive", "contrastive_mean_normalized", "untied_projection", "distill"];

#[test]
fn bi_encoders_on_the_cpu() {
    for case in CASES {
        check(case, Device::Cpu, DType::F32, None, fixed(1e-5, 1e-4));
        check(case, Device::Cpu, DType::F64, None, fixed(2e-7, 2e-6));
    }
}

/// Chunks of any size, also one that divides neither side, give the golden gradients.
#[test]
fn bi_encoders_in_chunks() {
    for case in CASES {
        for chunk in [1, 3, 7, 100] {
            check(case, Device::Cpu, DType::F64, Some(chunk), fixed(2e-7, 2e-6));
        }
    }
}

#[test]
fn bi_encoders_on_a_gpu_in_f32() {
    for case in CASES {
        check(case, gpu(), DType::F32, None, fixed(1e-5, 1e-4));
        check(case, gpu(), DType::F32, Some(4), fixed(1e-5, 1e-4));
    }
}

#[test]
fn bi_encoders_on_a_gpu_in_bf16() {
    for case in CASES {
        check(case, gpu(), DType::BF16, None, twice_plain(&Golden::open(case)));
    }
}
