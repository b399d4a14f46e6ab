//! Folders of sentence-transformers, read: every form of their files, and what the engine does not compute is refused.

use std::path::{Path, PathBuf};

use retromae_engine::model::export::{Pooling, export};
use retromae_engine::model::parameters::Parameters;
use retromae_engine::model::sentence::SentenceSettings;
use retromae_engine::model::towers::Towers;
use serde_json::{Value, json};

use crate::export::{bi_encoder, either, source, spec, untied};
use crate::{golden, line};

/// An exported bi-encoder to take apart: mean pooling, a projection of 16, normalised.
fn exported(dir: &Path) -> PathBuf {
    let out = dir.join("out");
    export(&spec(bi_encoder(Pooling::Mean, true, true), dir), &out, &mut source).unwrap();
    out
}

fn write(path: PathBuf, value: Value) {
    std::fs::write(path, value.to_string()).unwrap();
}

fn module(path: &str, class: &str) -> Value {
    json!({"idx": 0, "name": "0", "path": path, "type": class})
}

/// The usual modules, with what newer versions call them.
fn modules(more: &[(&str, &str)]) -> Value {
    let mut all = vec![
        module("", "sentence_transformers.base.modules.transformer.Transformer"),
        module("1_Pooling", "sentence_transformers.models.Pooling"),
    ];
    all.extend(more.iter().map(|(path, class)| module(path, &format!("sentence_transformers.models.{class}"))));
    Value::Array(all)
}

#[test]
fn poolings_of_every_generation() {
    let dir = tempfile::tempdir().unwrap();
    let out = exported(dir.path());
    let path = out.join("1_Pooling/config.json");
    let old = |cls: bool, mean: bool, max: bool| {
        json!({"word_embedding_dimension": 64, "pooling_mode_cls_token": cls, "pooling_mode_mean_tokens": mean,
               "pooling_mode_max_tokens": max, "pooling_mode_mean_sqrt_len_tokens": false})
    };
    for (config, expected) in [
        (old(true, false, false), Pooling::Cls),
        (old(false, true, false), Pooling::Mean),
        (json!({"embedding_dimension": 64, "pooling_mode": "mean", "include_prompt": true}), Pooling::Mean),
        (json!({"embedding_dimension": 64, "pooling_mode": ["cls"]}), Pooling::Cls),
        (json!({"pooling_mode_cls_token": true, "pooling_mode": "cls"}), Pooling::Cls),
    ] {
        write(path.clone(), config);
        assert_eq!(SentenceSettings::read(&out).unwrap().pooling, Some(expected));
    }
    for (config, expected) in [
        (old(true, true, false), "names several poolings: cls, mean"),
        (old(false, false, true), "the pooling max_tokens is none that the engine has"),
        (old(false, false, false), "names no pooling"),
        (json!({"pooling_mode": "lasttoken"}), "the pooling lasttoken is none"),
        (json!({"pooling_mode": "cls", "pooling_mode_mean_tokens": true}), "several poolings: mean, cls"),
        (json!({"pooling_mode": ["mean", "max"]}), "several poolings: mean, max"),
        (json!({"pooling_mode": 3}), "pooling_mode 3 is no kind of pooling"),
        (json!({"pooling_mode": "mean", "include_prompt": false}), "include_prompt is false"),
        (json!([]), "not a JSON object"),
    ] {
        write(path.clone(), config);
        let text = line(Towers::open(&out));
        assert!(text.contains("1_Pooling/config.json: ") && text.contains(expected), "{text}");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(line(Towers::open(&out)).contains("1_Pooling/config.json: cannot read"));
}

#[test]
fn modules_that_the_engine_has_not() {
    let dir = tempfile::tempdir().unwrap();
    let out = exported(dir.path());
    let dense = ("2_Dense", "Dense");
    for (list, expected) in [
        (modules(&[dense, ("3_Dense", "Dense")]), "there are two modules Dense"),
        (modules(&[("2_LSTM", "LSTM")]), "the module sentence_transformers.models.LSTM is none that the engine has"),
        (modules(&[("2_Normalize", "Normalize"), dense]), "the module Dense is not where the engine can have it"),
        (json!([module("1_Pooling", "a.Pooling")]), "the module Pooling is not where"),
        (json!([module("", "a.Transformer")]), "there is no module Pooling"),
        (json!([module("../elsewhere", "a.Transformer")]), "the module ../elsewhere lies outside the folder"),
        (json!([{"type": "a.Transformer"}]), "a module has no type or no path"),
        (json!({}), "not a list of modules"),
    ] {
        write(out.join("modules.json"), list);
        let text = line(Towers::open(&out));
        assert!(text.contains("modules.json: ") && text.contains(expected), "{text}");
    }
    write(out.join("modules.json"), modules(&[dense]));
    assert_eq!(Towers::open(&out).unwrap().settings.normalize, Some(false));
    write(out.join("modules.json"), modules(&[]));
    assert_eq!(Towers::open(&out).unwrap().projection, None);
}

#[test]
fn projections() {
    let dir = tempfile::tempdir().unwrap();
    let out = exported(dir.path());
    let towers = Towers::open(&out).unwrap();
    assert_eq!((towers.projection, towers.find("linear.weight")), (Some(16), Some(vec![16, 64])));
    let path = out.join("2_Dense/config.json");
    let with = |key: &str, value: Value| {
        let mut config = json!({"in_features": 64, "out_features": 16, "bias": true,
                                "activation_function": "torch.nn.modules.linear.Identity"});
        config[key] = value;
        config
    };
    write(path.clone(), with("bias", json!(false)));
    let mut bias = [f32::NAN; 16];
    assert!(Towers::open(&out).unwrap().read("linear.bias", &[16], &mut bias).unwrap());
    assert_eq!(bias, [0.0; 16], "a Dense without a bias has one of zeros");
    for (config, expected) in [
        (with("activation_function", json!("torch.nn.modules.activation.Tanh")), "modules.activation.Tanh\" is none"),
        (with("activation_function", json!(7)), "the activation function 7 is none"),
        (with("module_input_name", json!("token_embeddings")), "module_input_name is \"token_embeddings\""),
    ] {
        write(path.clone(), config);
        let text = line(Towers::open(&out));
        assert!(text.contains("2_Dense/config.json: ") && text.contains(expected), "{text}");
    }
    write(path, with("activation_function", Value::Null));
    Towers::open(&out).unwrap();
    std::fs::copy(golden("head32/untied_projection/model/pooler.safetensors"), out.join("pooler.safetensors")).unwrap();
    assert!(line(Towers::open(&out)).contains("has a Dense module and pooler.safetensors"));
    std::fs::remove_file(out.join("pooler.safetensors")).unwrap();
    std::fs::copy(golden("head32/cross_encoder/model/model.safetensors"), out.join("2_Dense/model.safetensors"))
        .unwrap();
    assert!(line(Towers::open(&out)).contains("#linear.weight: tensor is missing"));
    std::fs::remove_file(out.join("2_Dense/model.safetensors")).unwrap();
    assert!(line(Towers::open(&out)).contains("2_Dense: no weights"));
}

#[test]
fn prompts_and_lengths() {
    let dir = tempfile::tempdir().unwrap();
    let out = exported(dir.path());
    let path = out.join("config_sentence_transformers.json");
    for (config, expected) in [
        (json!({"prompts": {"query": "q: ", "document": "d: ", "passage": "p: "}}), [Some("q: "), Some("d: ")]),
        (json!({"prompts": {"passage": "p: "}}), [None, Some("p: ")]),
        (json!({"prompts": null}), [None, None]),
        (json!({}), [None, None]),
    ] {
        write(path.clone(), config);
        assert_eq!(Towers::open(&out).unwrap().settings.prompts, expected.map(|p| p.map(String::from)));
    }
    std::fs::remove_file(path).unwrap();
    assert_eq!(Towers::open(&out).unwrap().settings.prompts, [None, None]);

    let path = out.join("sentence_bert_config.json");
    write(path.clone(), json!({"max_seq_length": 17}));
    assert_eq!(Towers::open(&out).unwrap().settings.max_seq_length, Some(17));
    write(path.clone(), json!({"max_seq_length": -1}));
    assert!(line(Towers::open(&out)).contains("sentence_bert_config.json: max_seq_length -1 is no length"));
    // Newer versions leave it out; this engine's manifest has it, too.
    write(path, json!({"do_lower_case": false}));
    assert_eq!(Towers::open(&out).unwrap().settings.max_seq_length, Some(51));
    std::fs::remove_file(out.join("retromae_run.json")).unwrap();
    for (said, expected) in [(json!(40), Some(40)), (json!(1e30), None), (Value::Null, None)] {
        write(out.join("tokenizer_config.json"), json!({"model_max_length": said}));
        assert_eq!(Towers::open(&out).unwrap().settings.max_seq_length, expected);
    }
}

/// The first versions had the encoder in a folder of its own; a plain BERT says nothing.
#[test]
fn old_layouts_and_plain_models() {
    let dir = tempfile::tempdir().unwrap();
    let out = exported(dir.path());
    std::fs::create_dir(out.join("0_Transformer")).unwrap();
    for name in ["config.json", "model.safetensors", "vocab.txt", "sentence_bert_config.json"] {
        std::fs::rename(out.join(name), out.join("0_Transformer").join(name)).unwrap();
    }
    let list = json!([
        module("0_Transformer", "sentence_transformers.models.Transformer"),
        module("1_Pooling", "sentence_transformers.models.Pooling"),
    ]);
    write(out.join("modules.json"), list);
    let towers = Towers::open(&out).unwrap();
    assert!(towers.find("bert.embeddings.LayerNorm.bias").is_some() && towers.settings.max_seq_length == Some(51));

    let plain = Towers::open(&golden("head32/retromae/model")).unwrap();
    assert_eq!((plain.settings.clone(), plain.tokenizer()), (SentenceSettings::default(), None));
    let file = Towers::open(&golden("head32/retromae/model/model.safetensors")).unwrap();
    assert_eq!(file.find("bert.embeddings.LayerNorm.bias"), Some(vec![64]));
}

#[test]
fn two_sides_that_do_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("two");
    export(&untied(dir.path()), &out, &mut either).unwrap();
    assert_eq!(Towers::open(&out).unwrap().projection, Some(16));
    write(out.join("passage_model/modules.json"), modules(&[("2_Dense", "Dense"), ("3_Normalize", "Normalize")]));
    let text = line(Towers::open(&out));
    assert!(text.contains("passage_model: pools or normalises otherwise than the encoder of the queries"), "{text}");
    write(out.join("passage_model/modules.json"), modules(&[]));
    let text = line(Towers::open(&out));
    assert!(text.contains("one of the encoders has a projection and the other has none"), "{text}");
}
