//! Forty short texts, a tokenizer of their words, and a one-layer model's configuration.

use std::path::Path;

const WORDS: [&str; 24] = [
    "the", "package", "library", "file", "of", "and", "a", "network", "server", "client", "tool", "for", "shell",
    "data", "text", "image", "module", "system", "kernel", "driver", "debug", "source", "build", "time",
];

/// Writes `texts.txt`, `tokenizer` and `config.json`.
pub fn write(dir: &Path) {
    let vocabulary: Vec<&str> = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].into_iter().chain(WORDS).collect();
    std::fs::create_dir(dir.join("tokenizer")).unwrap();
    std::fs::write(dir.join("tokenizer/vocab.txt"), vocabulary.join("\n") + "\n").unwrap();
    let texts: Vec<String> = (0..40)
        .map(|i| (0..6 + i % 7).map(|k| WORDS[(i * i + k * 5 + i * k) % WORDS.len()]).collect::<Vec<_>>().join(" "))
        .collect();
    std::fs::write(dir.join("texts.txt"), texts.join("\n") + "\n").unwrap();
    let config = serde_json::json!({
        "model_type": "bert", "vocab_size": vocabulary.len(), "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 128, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 64, "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}
