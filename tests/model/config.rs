//! `config.json`: what is read, what is refused, what is written back.

use crate::{golden, line};
use retromae_engine::model::config::{Activation, BertConfig};
use retromae_engine::model::presets;
use serde_json::{Map, Value, json};

fn tiny() -> Map<String, Value> {
    let value = json!({"model_type": "bert", "vocab_size": 1003, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 256, "max_position_embeddings": 51, "their_key": [1, {"a": null}]});
    value.as_object().unwrap().clone()
}

fn with(key: &str, value: Value) -> String {
    let mut map = tiny();
    map.insert(key.into(), value);
    line(BertConfig::from_map(map))
}

#[test]
fn reads_a_published_configuration() {
    let config = BertConfig::read(golden("head32/retromae/model")).unwrap();
    assert_eq!((config.vocab_size, config.hidden_size, config.num_hidden_layers), (1003, 64, 2));
    assert_eq!((config.head_size(), config.max_position_embeddings), (32, 51));
    assert_eq!((config.hidden_act, config.layer_norm_eps), (Activation::Gelu, 1e-12));
}

#[test]
fn writes_unknown_keys_back_and_decimals_as_they_were() {
    let mut config = BertConfig::from_map(tiny()).unwrap();
    config.hidden_dropout_prob = 0.15;
    let map = config.to_map();
    assert_eq!(map["their_key"], json!([1, {"a": null}]));
    assert_eq!(map["hidden_dropout_prob"].to_string(), "0.15");
    assert_eq!(map["layer_norm_eps"].to_string(), "1e-12");
    let again = BertConfig::from_map(map).unwrap();
    assert_eq!((again.hidden_dropout_prob, again.layer_norm_eps), (0.15, 1e-12));
}

#[test]
fn refuses_what_is_not_a_plain_bert() {
    assert!(with("model_type", json!("roberta")).contains("roberta"));
    assert!(with("position_embedding_type", json!("relative_key")).contains("relative_key"));
    assert!(with("is_decoder", json!(true)).contains("is_decoder"));
    assert!(with("hidden_act", json!("mish")).contains("mish"));
    assert!(with("hidden_act", json!(3)).contains("hidden_act 3"));
}

#[test]
fn refuses_sizes_that_cannot_be_computed() {
    assert!(with("hidden_size", json!(65)).contains("not a multiple of num_attention_heads 2"));
    assert!(with("num_attention_heads", json!(4)).contains("head size 16"));
    assert!(with("hidden_size", json!(512)).contains("head size 256"));
    assert!(with("hidden_size", json!(80)).contains("head size 40"));
    for key in ["vocab_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings", "type_vocab_size"] {
        for bad in [json!(0), json!(-1), json!(1.5), json!("7"), json!(u64::MAX), json!(null)] {
            assert!(with(key, bad.clone()).contains(key), "{key} {bad}");
        }
    }
    assert!(with("num_hidden_layers", json!(100_000)).contains("num_hidden_layers"));
    assert!(with("hidden_dropout_prob", json!(1.0)).contains("hidden_dropout_prob"));
    assert!(with("layer_norm_eps", json!(0.0)).contains("layer_norm_eps"));
    assert!(with("pad_token_id", json!(1003)).contains("pad_token_id"));
    let mut map = tiny();
    map.remove("hidden_size");
    assert!(line(BertConfig::from_map(map)).contains("hidden_size is missing"));
}

#[test]
fn a_malformed_file_is_named_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    std::fs::write(&path, "{\n \"vocab_size\": }").unwrap();
    assert!(line(BertConfig::read(folder.path())).contains("config.json:2: not a JSON object"));
    std::fs::write(&path, "[".repeat(100_000)).unwrap();
    line(BertConfig::read(&path));
    std::fs::write(&path, [0xff, 0xfe]).unwrap();
    line(BertConfig::read(&path));
    assert!(line(BertConfig::read(folder.path().join("absent"))).contains("absent"));
}

#[test]
fn presets_are_valid_and_as_published() {
    let sizes: Vec<_> = presets::names()
        .map(|name| {
            let config = presets::preset(name).unwrap();
            config.check().unwrap();
            assert_eq!(config, BertConfig::from_map(config.raw.clone()).unwrap());
            (name, config.num_hidden_layers, config.hidden_size, config.head_size())
        })
        .collect();
    assert!(sizes.contains(&("bert-base", 12, 768, 64)) && sizes.contains(&("minilm-l6", 6, 384, 32)));
    assert_eq!(presets::preset("bert-base-uncased").unwrap().hidden_size, 768);
    assert!(line(presets::preset("bert-giant")).contains("bert-tiny, bert-mini"));
}
