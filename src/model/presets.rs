//! Configurations by name, for training from scratch (`--config-name`): the sizes Google and Microsoft published.

use super::config::{Activation, BertConfig};
use crate::error::{Error, Result};
use serde_json::{Map, json};

/// Name, layers, hidden size, heads. The feed-forward layers are four times the hidden size in all of them.
const PRESETS: [(&str, usize, usize, usize); 7] = [
    ("bert-tiny", 2, 128, 2),
    ("bert-mini", 4, 256, 4),
    ("bert-small", 4, 512, 8),
    ("bert-medium", 8, 512, 8),
    ("bert-base", 12, 768, 12),
    ("bert-large", 24, 1024, 16),
    ("minilm-l6", 6, 384, 12),
];

/// The names [`preset`] knows, smallest first within a family.
pub fn names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|p| p.0)
}

/// The configuration with this name; `vocab_size` is that of bert-base-uncased and is to be replaced by the tokenizer's.
///
/// # Errors
/// An unknown name, with the known ones.
pub fn preset(name: &str) -> Result<BertConfig> {
    let plain = name.strip_suffix("-uncased").unwrap_or(name);
    let Some(&(_, layers, hidden, heads)) = PRESETS.iter().find(|p| p.0 == plain) else {
        let known = names().collect::<Vec<_>>().join(", ");
        return Err(
            Error::usage(format!("no configuration is called {name:?}")).remedy(format!("choose one of {known}"))
        );
    };
    let mut config = BertConfig {
        vocab_size: 30522,
        hidden_size: hidden,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        intermediate_size: 4 * hidden,
        hidden_act: Activation::Gelu,
        hidden_dropout_prob: 0.1,
        attention_probs_dropout_prob: 0.1,
        max_position_embeddings: 512,
        type_vocab_size: 2,
        initializer_range: 0.02,
        layer_norm_eps: 1e-12,
        pad_token_id: 0,
        raw: Map::new(),
    };
    config.raw.insert("architectures".into(), json!(["BertForMaskedLM"]));
    config.raw = config.to_map();
    Ok(config)
}
