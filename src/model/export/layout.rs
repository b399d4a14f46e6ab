//! The JSON files of an exported folder: exactly the keys that every generation of the consuming libraries accepts.
//!
//! Adding a key here can break a consumer: `embedding_dimension` in the pooling file is a TypeError in sentence-transformers 3, a missing
//! boolean there is a parse error in text-embeddings-inference, a newer `__version__` than the installed one is a warning.

use super::{ExportKind, ExportSpec, Pooling};
use serde_json::{Map, Value, json};

/// The name of the kind in the manifest.
pub(super) fn kind_name(kind: &ExportKind) -> &'static str {
    match kind {
        ExportKind::MaskedLm => "masked-lm",
        ExportKind::BiEncoder { .. } => "bi-encoder",
        ExportKind::CrossEncoder => "cross-encoder",
    }
}

/// `config.json`.
pub(super) fn config(spec: &ExportSpec) -> Map<String, Value> {
    let mut map = spec.config.to_map();
    let architecture = match spec.kind {
        _ if spec.has_mlm_head() => "BertForMaskedLM",
        ExportKind::MaskedLm | ExportKind::BiEncoder { .. } => "BertModel",
        ExportKind::CrossEncoder => "BertForSequenceClassification",
    };
    map.insert("architectures".into(), json!([architecture]));
    // transformers 4 reads the first key, 5 the second.
    let dtype = spec.dtype.torch_name();
    map.insert("torch_dtype".into(), json!(dtype));
    map.insert("dtype".into(), json!(dtype));
    const OLD_ACTIVATION: &str = "sbert_ce_default_activation_function";
    if spec.kind == ExportKind::CrossEncoder {
        map.insert("id2label".into(), json!({"0": "LABEL_0"}));
        map.insert("label2id".into(), json!({"LABEL_0": 0}));
        // Without the old key sentence-transformers 3 applies a sigmoid, where 4 and later read the new one.
        let identity = "torch.nn.modules.linear.Identity";
        map.insert("sentence_transformers".into(), json!({"activation_fn": identity, "version": "4.0.0"}));
        map.insert(OLD_ACTIVATION.into(), json!(identity));
    } else {
        map.shift_remove("sentence_transformers");
        map.shift_remove(OLD_ACTIVATION);
    }
    map
}

/// The files sentence-transformers needs; none for a cross-encoder, which it recognises by its architecture.
pub(super) fn sentence_transformer_files(spec: &ExportSpec) -> Vec<(&'static str, Value)> {
    let (pooling, normalize, dense) = match spec.kind {
        ExportKind::MaskedLm => (Pooling::Cls, false, None),
        ExportKind::BiEncoder { pooling, normalize, projection, .. } => (pooling, normalize, projection),
        ExportKind::CrossEncoder => return Vec::new(),
    };
    let mut modules = vec![module(0, "", "Transformer"), module(1, "1_Pooling", "Pooling")];
    if dense.is_some() {
        modules.push(module(2, "2_Dense", "Dense"));
    }
    let mut files = Vec::new();
    if normalize {
        let (index, folder) = if dense.is_some() { (3, "3_Normalize") } else { (2, "2_Normalize") };
        modules.push(module(index, folder, "Normalize"));
        // The folder may be absent for the libraries, but not for people who look for it.
        files.push((if dense.is_some() { "3_Normalize/config.json" } else { "2_Normalize/config.json" }, json!({})));
    }
    if let Some(dense) = dense {
        let config = json!({
            "in_features": spec.config.hidden_size,
            "out_features": dense,
            "bias": true,
            "activation_function": "torch.nn.modules.linear.Identity",
        });
        files.push(("2_Dense/config.json", config));
    }
    let cls = pooling == Pooling::Cls;
    files.push(("modules.json", Value::Array(modules)));
    files.push((
        "1_Pooling/config.json",
        json!({
            "word_embedding_dimension": spec.config.hidden_size,
            "pooling_mode_cls_token": cls,
            "pooling_mode_mean_tokens": !cls,
            "pooling_mode_max_tokens": false,
            "pooling_mode_mean_sqrt_len_tokens": false,
            "pooling_mode_weightedmean_tokens": false,
            "pooling_mode_lasttoken": false,
            "include_prompt": true,
            "pooling_mode": if cls { "cls" } else { "mean" },
        }),
    ));
    files.push(("sentence_bert_config.json", json!({"max_seq_length": spec.max_seq_length, "do_lower_case": false})));
    let [query, document] = &spec.prompts;
    files.push((
        "config_sentence_transformers.json",
        json!({
            "__version__": {"sentence_transformers": "3.0.0", "transformers": "4.34.0", "pytorch": "2.0.0"},
            "prompts": {"query": query, "document": document},
            "default_prompt_name": null,
            "similarity_fn_name": if normalize { "cosine" } else { "dot" },
        }),
    ));
    files
}

fn module(index: usize, path: &str, class: &str) -> Value {
    json!({"idx": index, "name": index.to_string(), "path": path, "type": format!("sentence_transformers.models.{class}")})
}
