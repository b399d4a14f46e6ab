//! Exported folders: what is in them, that they come whole or not at all, and that damage is found.

use crate::{golden, line};
use retromae_engine::Result;
use retromae_engine::error::Error;
use retromae_engine::model::config::BertConfig;
use retromae_engine::model::element::Dtype;
use retromae_engine::model::export::{ExportKind, ExportSpec, MANIFEST, Pooling, export, verify_export};
use retromae_engine::model::names;
use retromae_engine::model::weights::Checkpoint;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// A vocabulary of 1,003 word pieces, the size of the golden models'.
pub fn vocabulary(folder: &Path) -> PathBuf {
    let mut lines: Vec<String> = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].map(String::from).to_vec();
    for c in 'a'..='z' {
        lines.extend([c.to_string(), format!("##{c}")]);
    }
    lines.extend((0..1003 - lines.len()).map(|i| format!("word{i}")));
    let path = folder.join("vocab.txt");
    std::fs::write(&path, lines.join("\n") + "\n").unwrap();
    path
}

/// Hands out the golden pre-trained model, and for what it lacks a ramp.
pub fn source(name: &str, out: &mut Vec<f32>) -> Result<()> {
    let checkpoint = Checkpoint::open(golden("head32/retromae/model"))?;
    let shape = checkpoint.shape(name).unwrap_or_else(|| match name {
        "bert.pooler.dense.weight" => vec![64, 64],
        "bert.pooler.dense.bias" => vec![64],
        "classifier.weight" => vec![1, 64],
        "classifier.bias" => vec![1],
        "linear.weight" | "linear_q.weight" | "linear_p.weight" => vec![16, 64],
        "linear.bias" | "linear_q.bias" | "linear_p.bias" => vec![16],
        other => panic!("{other} was asked for"),
    });
    out.clear();
    out.resize(shape.iter().product(), 0.0);
    if checkpoint.contains(name) {
        return checkpoint.read_f32(name, &shape, out);
    }
    out.iter_mut().enumerate().for_each(|(i, v)| *v = (i as f32 * 0.37).sin() * 0.1);
    Ok(())
}

pub fn spec(kind: ExportKind, folder: &Path) -> ExportSpec {
    let config = BertConfig::read(golden("head32/retromae/model")).unwrap();
    let mut spec = ExportSpec::new(config, kind, vocabulary(folder));
    spec.enhanced_decoder = spec.kind == ExportKind::MaskedLm;
    spec.provenance.insert("objective".into(), json!("retromae"));
    spec.provenance.insert("steps".into(), json!(1000));
    spec
}

pub fn bi_encoder(pooling: Pooling, normalize: bool, dense: bool) -> ExportKind {
    ExportKind::BiEncoder { pooling, normalize, projection: dense.then_some(16), lexical: false, untied: false }
}

/// Two encoders with their poolers, mean pooling and a projection of 16 each.
pub fn untied(folder: &Path) -> ExportSpec {
    let (pooling, normalize, projection) = (Pooling::Mean, false, Some(16));
    ExportSpec {
        pooler: true,
        ..spec(ExportKind::BiEncoder { pooling, normalize, projection, lexical: false, untied: true }, folder)
    }
}

/// [`source`] of either of two encoders.
pub fn either(name: &str, out: &mut Vec<f32>) -> Result<()> {
    source(name.split_once("_model.").map_or(name, |(_, bare)| bare), out)
}

fn json_of(path: PathBuf) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_pretrained_model_reads_back_with_its_decoder() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let spec = spec(ExportKind::MaskedLm, folder.path());
    export(&spec, &out, &mut source).unwrap();
    verify_export(&out).unwrap();
    let expected = [
        "1_Pooling",
        "README.md",
        "config.json",
        "config_sentence_transformers.json",
        "enhanced_decoder.safetensors",
        "model.safetensors",
        "modules.json",
        "retromae_run.json",
        "sentence_bert_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ];
    assert_eq!(names_in(&out), expected);
    assert_eq!(names_in(folder.path()), ["out", "vocab.txt"], "nothing temporary is left");
    let (before, after) = (Checkpoint::open(golden("head32/retromae/model")).unwrap(), Checkpoint::open(&out).unwrap());
    assert_eq!(before.names().collect::<Vec<_>>(), after.names().collect::<Vec<_>>());
    for name in before.names() {
        let shape = before.shape(name).unwrap();
        let (mut a, mut b) = (vec![0.0; shape.iter().product()], vec![0.0; shape.iter().product()]);
        before.read_f32(name, &shape, &mut a).unwrap();
        after.read_f32(name, &shape, &mut b).unwrap();
        assert_eq!(a, b, "{name}");
    }
    let config = json_of(out.join("config.json"));
    assert_eq!((&config["torch_dtype"], &config["dtype"]), (&json!("float32"), &json!("float32")));
    assert_eq!((&config["architectures"], &config["use_cache"]), (&json!(["BertForMaskedLM"]), &json!(true)));
    assert_eq!(std::fs::read(out.join("vocab.txt")).unwrap(), std::fs::read(&spec.tokenizer).unwrap());
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.starts_with("---\n") && card.contains("| steps | 1000 |"), "{card}");
}

#[test]
fn a_bi_encoder_has_bare_names_and_its_modules() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let mut spec = spec(bi_encoder(Pooling::Mean, true, true), folder.path());
    spec.pooler = true;
    export(&spec, &out, &mut source).unwrap();
    verify_export(&out).unwrap();
    let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
    let names = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert!(names.names().iter().all(|n| ["embeddings.", "encoder.", "pooler."].iter().any(|p| n.starts_with(p))));
    let modules = json_of(out.join("modules.json"));
    let paths: Vec<&str> = modules.as_array().unwrap().iter().map(|m| m["path"].as_str().unwrap()).collect();
    assert_eq!(paths, ["", "1_Pooling", "2_Dense", "3_Normalize"]);
    let pooling = json_of(out.join("1_Pooling/config.json"));
    assert_eq!((&pooling["pooling_mode"], &pooling["pooling_mode_cls_token"]), (&json!("mean"), &json!(false)));
    assert_eq!(json_of(out.join("2_Dense/config.json"))["out_features"], 16);
    assert_eq!(json_of(out.join("config_sentence_transformers.json"))["similarity_fn_name"], "cosine");
}

#[test]
fn a_reranker_has_its_pooler_and_states_its_activation_twice() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    export(&spec(ExportKind::CrossEncoder, folder.path()), &out, &mut source).unwrap();
    verify_export(&out).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert_eq!(checkpoint.shape("classifier.weight").unwrap(), [1, 64]);
    assert!(checkpoint.contains("bert.pooler.dense.bias") && !checkpoint.contains("cls.predictions.bias"));
    let config = json_of(out.join("config.json"));
    assert_eq!(config["sentence_transformers"]["activation_fn"], config["sbert_ce_default_activation_function"]);
    assert!(!out.join("modules.json").exists());
}

#[test]
fn large_models_are_split_and_half_precision_is_rounded() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let mut spec = spec(ExportKind::MaskedLm, folder.path());
    spec.max_shard_bytes = 100_000;
    spec.dtype = Dtype::Bf16;
    export(&spec, &out, &mut source).unwrap();
    verify_export(&out).unwrap();
    let index = json_of(out.join("model.safetensors.index.json"));
    let shards = names_in(&out).iter().filter(|n| n.starts_with("model-")).count();
    assert!(shards > 2 && out.join(format!("model-00001-of-{shards:05}.safetensors")).exists());
    assert_eq!(index["metadata"]["total_size"], spec.params().iter().map(|p| p.len() * 2).sum::<usize>());
    let checkpoint = Checkpoint::open(&out).unwrap();
    checkpoint.check(&spec.params()).unwrap();
    let (mut exact, mut rounded) = (Vec::new(), vec![0.0; 64]);
    source("bert.embeddings.LayerNorm.bias", &mut exact).unwrap();
    checkpoint.read_f32("bert.embeddings.LayerNorm.bias", &[64], &mut rounded).unwrap();
    assert!(exact.iter().zip(&rounded).all(|(a, b)| half::bf16::from_f32(*a).to_f32() == *b));
    assert_eq!(json_of(out.join("config.json"))["dtype"], "bfloat16");
}

#[test]
fn a_failing_export_leaves_nothing_and_an_existing_folder_alone() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let mut spec = spec(ExportKind::MaskedLm, folder.path());
    let mut failing = |name: &str, values: &mut Vec<f32>| {
        if name == "cls.predictions.bias" {
            Err(Error::refused("stopped").remedy("go on"))
        } else {
            source(name, values)
        }
    };
    assert!(line(export(&spec, &out, &mut failing)).contains("stopped"));
    let mut poisoned = |name: &str, values: &mut Vec<f32>| {
        source(name, values)?;
        values[0] = f32::NAN;
        Ok(())
    };
    assert!(line(export(&spec, &out, &mut poisoned)).contains("NaN"));
    assert_eq!(names_in(folder.path()), ["vocab.txt"]);

    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("mine.txt"), "precious").unwrap();
    spec.replace = true;
    assert!(line(export(&spec, &out, &mut source)).contains("holds no retromae_run.json"));
    std::fs::remove_file(out.join("mine.txt")).unwrap();
    export(&spec, &out, &mut source).unwrap();
    spec.replace = false;
    assert!(line(export(&spec, &out, &mut source)).contains("already exists"));
    spec.replace = true;
    spec.kind = ExportKind::CrossEncoder;
    spec.enhanced_decoder = false;
    export(&spec, &out, &mut source).unwrap();
    verify_export(&out).unwrap();
    assert!(!out.join("enhanced_decoder.safetensors").exists() && names_in(folder.path()) == ["out", "vocab.txt"]);
    spec.dtype = Dtype::I64;
    line(export(&spec, folder.path().join("other"), &mut source));
}

#[test]
fn damage_to_any_file_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    export(&spec(ExportKind::MaskedLm, folder.path()), &out, &mut source).unwrap();
    for name in
        ["config.json", "model.safetensors", "enhanced_decoder.safetensors", "tokenizer.json", "1_Pooling/config.json"]
    {
        let good = std::fs::read(out.join(name)).unwrap();
        let mut bad = good.clone();
        bad[good.len() / 2] ^= 4;
        std::fs::write(out.join(name), &bad).unwrap();
        assert!(line(verify_export(&out)).contains(name));
        std::fs::remove_file(out.join(name)).unwrap();
        assert!(line(verify_export(&out)).contains(name));
        std::fs::write(out.join(name), &good).unwrap();
    }
    let manifest = std::fs::read(out.join(MANIFEST)).unwrap();
    for bit in (0..manifest.len()).map(|i| i * 8 + i * 5 % 8) {
        let mut bad = manifest.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(out.join(MANIFEST), &bad).unwrap();
        assert!(verify_export(&out).is_err(), "bit {bit}");
    }
    std::fs::write(out.join(MANIFEST), &manifest).unwrap();
    std::fs::write(out.join("README.md"), "my own words").unwrap();
    verify_export(&out).unwrap();
}

#[test]
fn a_derived_tokenizer_equals_one_built_from_the_vocabulary() {
    use tokenizers::Tokenizer;
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let first = spec(ExportKind::MaskedLm, folder.path());
    export(&first, &out, &mut source).unwrap();
    let tokenizer = Tokenizer::from_file(out.join("tokenizer.json")).unwrap();
    let encoding = tokenizer.encode("Word7 Ábc!", true).unwrap();
    assert_eq!(encoding.get_tokens(), ["[CLS]", "word7", "a", "##b", "##c", "[UNK]", "[SEP]"]);
    let pair = tokenizer.encode(("a", "b"), true).unwrap();
    assert_eq!(pair.get_type_ids(), [0, 0, 0, 1, 1]);

    // The other way: vocab.txt from tokenizer.json alone.
    let mut second = first.clone();
    second.tokenizer = folder.path().join("alone/tokenizer.json");
    std::fs::create_dir(folder.path().join("alone")).unwrap();
    std::fs::copy(out.join("tokenizer.json"), &second.tokenizer).unwrap();
    let again = folder.path().join("again");
    export(&second, &again, &mut source).unwrap();
    for name in ["vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        assert_eq!(std::fs::read(out.join(name)).unwrap(), std::fs::read(again.join(name)).unwrap(), "{name}");
    }
    second.tokenizer = folder.path().join("absent");
    assert!(line(export(&second, folder.path().join("third"), &mut source)).contains("cannot open the tokenizer"));
}

#[test]
fn the_parameters_of_each_kind_are_those_of_its_class() {
    let folder = tempfile::tempdir().unwrap();
    let count = |kind, pooler| {
        let mut spec = spec(kind, folder.path());
        spec.pooler = pooler;
        spec.params().len()
    };
    let config = BertConfig::read(golden("head32/retromae/model")).unwrap();
    let encoder = names::encoder(&config).len();
    assert_eq!(count(ExportKind::MaskedLm, false), encoder + 5);
    assert_eq!(count(ExportKind::MaskedLm, true), encoder + 7);
    assert_eq!(count(bi_encoder(Pooling::Cls, false, false), false), encoder);
    assert_eq!(count(ExportKind::CrossEncoder, false), encoder + 4);
}
