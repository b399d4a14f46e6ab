//! Checkpoints of fine-tuned models as the folders that others load, and that this engine reads back bit for bit.

use std::path::Path;

use retromae_engine::Result;
use retromae_engine::data::tokenizer::Tokenizer;
use retromae_engine::device::{DType, Device};
use retromae_engine::files::Disk;
use retromae_engine::graph::Capacity;
use retromae_engine::graph::biencoder::Shape;
use retromae_engine::graph::params::Params;
use retromae_engine::model::config::BertConfig;
use retromae_engine::model::export::verify_export;
use retromae_engine::model::parameters::Parameters;
use retromae_engine::model::reranker::Reranker;
use retromae_engine::model::sentence::SentenceSettings;
use retromae_engine::model::towers::Towers;
use retromae_engine::ops::pool::Pooling;
use retromae_engine::train::biencoder::{BiEncoder, Options, Room};
use retromae_engine::train::checkpoint::State;
use retromae_engine::train::cross_encoder::Ranker;
use retromae_engine::train::export::{Request, export_run};
use retromae_engine::train::origin::{self, About, Origin, Purpose};
use retromae_engine::train::updates::Trainable as _;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::golden::model;

/// A model with poolers: those of the golden ones and a ramp for the rest.
struct WithPoolers;

impl WithPoolers {
    fn value(name: &str, i: usize) -> f32 {
        (i as f32 * 0.37 + name.len() as f32).sin() * 0.1
    }
}

impl Parameters for WithPoolers {
    fn find(&self, name: &str) -> Option<Vec<usize>> {
        name.contains("pooler").then(|| if name.ends_with("bias") { vec![64] } else { vec![64, 64] })
    }

    fn read(&self, name: &str, _: &[usize], out: &mut [f32]) -> Result<bool> {
        out.iter_mut().enumerate().for_each(|(i, x)| *x = Self::value(name, i));
        Ok(self.find(name).is_some())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The folder of a run with one checkpoint of these parameters.
fn run(folder: &Path, params: &Params, config: &BertConfig, purpose: Purpose) {
    let bytes = |values: Vec<f32>| bytemuck::cast_slice::<f32, u8>(&values).to_vec();
    let weights: Vec<_> = params.parts().iter().map(|p| (&p.name, &p.shape, bytes(params.get(p)))).collect();
    let view = |(name, shape, bytes)| {
        let (shape, bytes): (&Vec<usize>, &Vec<u8>) = (shape, bytes);
        (name, TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    };
    let views = weights.iter().map(|(name, shape, bytes)| view((*name, *shape, bytes)));
    let tensors = safetensors::serialize(views, None).unwrap();
    let settings = [("model".to_string(), "a model".to_string()), ("data".to_string(), "some data".to_string())];
    let state = State { step: 7, settings: settings.into(), ..State::default() };
    let state = format!("{:#}\n", serde_json::to_value(&state).unwrap());

    let dir = folder.join("checkpoints/step-00000007");
    std::fs::create_dir_all(&dir).unwrap();
    let mut files = Map::new();
    let names = ["weights.safetensors", "moment1.safetensors", "moment2.safetensors", "state.json"];
    for name in names {
        let bytes = if name == "state.json" { state.as_bytes() } else { &tensors };
        std::fs::write(dir.join(name), bytes).unwrap();
        files.insert(name.into(), json!({ "bytes": bytes.len(), "sha256": hex(&Sha256::digest(bytes)) }));
    }
    let mut manifest = Map::new();
    manifest.insert("format".into(), json!(1));
    manifest.insert("files".into(), Value::Object(files));
    let digest = hex(&Sha256::digest(Value::Object(manifest.clone()).to_string()));
    manifest.insert("sha256".into(), json!(digest));
    std::fs::write(dir.join("manifest.json"), format!("{:#}\n", Value::Object(manifest))).unwrap();

    let vocabulary = folder.with_extension("vocabulary");
    std::fs::create_dir(&vocabulary).unwrap();
    let words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].map(String::from);
    let words: Vec<String> = words.into_iter().chain((5..1003).map(|i| format!("word{i}"))).collect();
    std::fs::write(vocabulary.join("vocab.txt"), words.join("\n") + "\n").unwrap();
    let about = About {
        model: "a model".into(),
        data: "some data".into(),
        base_model: Some("org/base".into()),
        pooler: purpose.keeps_pooler(config, &WithPoolers),
        purpose,
    };
    let tokenizer = Tokenizer::load(&vocabulary).unwrap().files().to_vec();
    let origin = Origin { about, config, tokenizer, weights: Some(&WithPoolers) };
    origin::keep(&Disk::default(), folder, &origin).unwrap();
    origin::verify(&folder.join("origin")).unwrap();
}

fn exported(folder: &Path) -> std::path::PathBuf {
    let out = folder.join("model");
    export_run(&Disk::default(), &Request::new(folder, &out), &mut |line| panic!("{line}")).unwrap();
    verify_export(&out).unwrap();
    out
}

/// Every parameter of the model is in `folder`, with every bit.
fn same(params: &Params, folder: &dyn Parameters) {
    for part in params.parts() {
        assert_eq!(folder.find(&part.name).as_ref(), Some(&part.shape), "{}", part.name);
        let mut read = vec![f32::NAN; part.elements()];
        assert!(folder.read(&part.name, &part.shape, &mut read).unwrap());
        assert!(read == params.get(part), "{}", part.name);
    }
}

/// The poolers of the starting model, passed through.
fn same_poolers(folder: &dyn Parameters, names: &[&str]) {
    for name in names {
        let shape = folder.find(name).unwrap_or_else(|| panic!("{name}"));
        let mut read = vec![0.0; shape.iter().product()];
        assert!(folder.read(name, &shape, &mut read).unwrap());
        assert!(read.iter().enumerate().all(|(i, &x)| x == WithPoolers::value(name, i)), "{name}");
    }
}

fn bi_encoder(case: &str, projection: Option<usize>, pooling: Pooling, normalize: bool) -> (BiEncoder, Towers) {
    let towers = Towers::open(&model(case)).unwrap();
    let options = Options {
        shape: Shape { pooling, projection, normalize },
        lexical: None,
        untied: towers.untied(),
        temperature: 1.0,
        distillation: None,
    };
    let room = Room { queries: 2, passages: 4, lengths: [8, 16], chunk: None };
    let bi = BiEncoder::new(Device::Cpu, &towers.config, options, room, DType::F32).unwrap();
    let fresh = bi.params().load(1, 0.02, |name, shape, out| towers.read(name, shape, out)).unwrap();
    assert!(fresh.iter().all(|name| name.starts_with("linear.")), "{fresh:?}");
    (bi, towers)
}

fn purpose(options: &Options, prompts: [&str; 2], max_length: usize) -> Purpose {
    let Shape { pooling, projection, normalize } = options.shape;
    let prompts = prompts.map(String::from);
    let (lexical, untied) = (options.lexical, options.untied);
    Purpose::BiEncoder { pooling, normalize, projection, lexical, untied, prompts, max_length }
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn one_encoder_for_both_sides() {
    for (projection, pooling, normalize) in
        [(None, Pooling::Cls, false), (Some(24), Pooling::Mean, true), (Some(8), Pooling::Cls, false)]
    {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("run");
        let (bi, towers) = bi_encoder("contrastive", projection, pooling, normalize);
        assert_eq!(towers.settings, SentenceSettings::default());
        run(&folder, bi.params(), &towers.config, purpose(bi.options(), ["query: ", ""], 40));
        let out = exported(&folder);
        let back = Towers::open(&out).unwrap();
        same(bi.params(), &back);
        same_poolers(&back, &["bert.pooler.dense.weight", "bert.pooler.dense.bias"]);
        assert_eq!((back.projection, back.untied(), back.tokenizer()), (projection, false, Some(out.as_path())));
        let expected = SentenceSettings {
            pooling: Some(pooling),
            normalize: Some(normalize),
            prompts: [Some("query: ".into()), Some(String::new())],
            max_seq_length: Some(40),
        };
        assert_eq!(back.settings, expected);
        assert_eq!(SentenceSettings::read(&out).unwrap(), expected);
        assert_eq!(out.join("2_Dense/model.safetensors").is_file(), projection.is_some());
        assert!(!out.join("enhanced_decoder.safetensors").exists());
    }
}

#[test]
fn an_encoder_for_each_side() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("run");
    let (bi, towers) = bi_encoder("untied_projection", Some(32), Pooling::Cls, false);
    run(&folder, bi.params(), &towers.config, purpose(bi.options(), ["", "passage: "], 48));
    let out = exported(&folder);
    let back = Towers::open(&out).unwrap();
    same(bi.params(), &back);
    assert!(back.untied() && back.projection == Some(32));
    assert_eq!(back.settings.prompts, [Some(String::new()), Some("passage: ".into())]);
    let parts = ["query_model", "passage_model"]
        .map(|side| ["weight", "bias"].map(|part| format!("{side}.bert.pooler.dense.{part}")))
        .concat();
    same_poolers(&back, &parts.iter().map(String::as_str).collect::<Vec<_>>());

    // Each side is a model by itself.
    for (side, stem) in [("query_model", "linear_q"), ("passage_model", "linear_p")] {
        let one = Towers::open(&out.join(side)).unwrap();
        assert_eq!((one.projection, one.untied()), (Some(32), false));
        assert!(one.tokenizer().is_some() && one.settings.max_seq_length == Some(48));
        for part in bi.params().parts() {
            let Some(name) = part
                .name
                .strip_prefix(side)
                .map(|n| n[1..].to_string())
                .or_else(|| part.name.strip_prefix(stem).map(|rest| format!("linear{rest}")))
            else {
                continue;
            };
            let mut read = vec![0.0; part.elements()];
            assert!(one.read(&name, &part.shape, &mut read).unwrap(), "{name}");
            assert!(read == bi.params().get(part), "{name}");
        }
        assert!(out.join(side).join("README.md").is_file() && !out.join(side).join("retromae_run.json").exists());
    }
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("model/query_model\")") && card.contains("model/passage_model\")"), "{card}");
    // One manifest for both: a changed bit of either side is found, a changed card is not one.
    let path = out.join("passage_model/2_Dense/model.safetensors");
    let good = std::fs::read(&path).unwrap();
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bad).unwrap();
    let error = verify_export(&out).unwrap_err().to_string();
    assert!(error.contains("passage_model/2_Dense/model.safetensors"), "{error}");
    std::fs::write(&path, good).unwrap();
    std::fs::write(out.join("query_model/README.md"), "my own words").unwrap();
    verify_export(&out).unwrap();
    let listed = json_of(&out.join("retromae_run.json"));
    assert!(listed["files"].as_object().unwrap().contains_key("query_model/model.safetensors"));
    std::fs::remove_dir_all(out.join("query_model")).unwrap();
    let error = Towers::open(&out).unwrap_err().to_string();
    assert!(error.contains("and no query_model; give a folder with both"), "{error}");
}

#[test]
fn a_reranker() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("run");
    let given = Reranker::open(&model("cross_encoder")).unwrap();
    assert_eq!((given.max_length, &given.note, given.tokenizer()), (None, &None, None));
    let capacity = Capacity { tokens: 32, sequences: 2, length: 16, encoder_labels: 0 };
    let ranker = Ranker::new(Device::Cpu, &given.config, 1.0, capacity, DType::F32).unwrap();
    let fresh = ranker.params().load(0, 0.0, |name, shape, out| given.read(name, shape, out)).unwrap();
    assert_eq!(fresh, Vec::<String>::new());
    run(&folder, ranker.params(), &given.config, Purpose::CrossEncoder { max_length: 33 });
    let out = exported(&folder);
    let back = Reranker::open(&out).unwrap();
    same(ranker.params(), &back);
    assert_eq!((back.max_length, back.note), (Some(33), None));
    assert_eq!(json_of(&out.join("tokenizer_config.json"))["model_max_length"], 33);
    assert!(std::fs::read_to_string(out.join("README.md")).unwrap().contains(", max_length=33)"));

    // What others wrote: an activation is told, several labels are refused.
    let mut config = json_of(&out.join("config.json"));
    config["sentence_transformers"]["activation_fn"] = json!("torch.nn.modules.activation.Sigmoid");
    std::fs::write(out.join("config.json"), config.to_string()).unwrap();
    let note = Reranker::open(&out).unwrap().note.unwrap();
    assert!(note.contains("asks for the activation Sigmoid on scores; they stay the raw logits"), "{note}");
    let error = Reranker::open(&model("contrastive")).unwrap_err().to_string();
    assert!(error.contains("is no cross-encoder: there is no classifier; give"), "{error}");
}

#[test]
fn origins_of_older_runs_stay_readable() {
    let old = r#"{"model":"m","data":"d","base_model":null,"pooler":true}"#;
    let about: About = serde_json::from_str(old).unwrap();
    assert_eq!((about.purpose, about.pooler), (Purpose::Pretrain, true));
    let purpose = Purpose::CrossEncoder { max_length: 128 };
    assert_eq!(serde_json::to_string(&purpose).unwrap(), r#"{"cross-encoder":{"max-length":128}}"#);
    let purpose = Purpose::BiEncoder {
        pooling: Pooling::Mean,
        normalize: true,
        projection: Some(8),
        lexical: None,
        untied: false,
        prompts: ["q".into(), "p".into()],
        max_length: 128,
    };
    let text = serde_json::to_string(&purpose).unwrap();
    assert!(text.contains(r#""pooling":"mean""#) && text.contains(r#""max-length":128"#), "{text}");
    assert_eq!(serde_json::from_str::<Purpose>(&text).unwrap(), purpose);
}
