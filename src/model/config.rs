//! `config.json` of a BERT model: read strictly, because a wrong size or an unsupported variant must stop a run before it starts.

use super::small_file;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Largest `config.json` that is read; real ones are a few kilobytes, label lists a few hundred.
const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// Largest value of any size key: far beyond real models, and small enough that products of two never wrap.
const MAX_SIZE: u64 = 1 << 24;
/// Most layers accepted: tables are built for every layer, so the number itself must not be able to exhaust memory.
const MAX_LAYERS: usize = 1000;

/// Activation of the feed-forward layers, as named by `hidden_act`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Exact GELU, x·Φ(x): `gelu`, `gelu_python`.
    Gelu,
    /// Tanh approximation: `gelu_new`, `gelu_fast`, `gelu_pytorch_tanh`, `gelu_accurate`.
    GeluTanh,
    /// `quick_gelu`: x·σ(1.702 x).
    QuickGelu,
    /// `relu`.
    Relu,
    /// `silu`, `swish`.
    Silu,
}

impl Activation {
    /// The activation that `hidden_act` names, if the engine has it.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "gelu" | "gelu_python" => Activation::Gelu,
            "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" | "gelu_accurate" => Activation::GeluTanh,
            "quick_gelu" => Activation::QuickGelu,
            "relu" => Activation::Relu,
            "silu" | "swish" => Activation::Silu,
            _ => return None,
        })
    }

    /// The name written to `hidden_act`.
    pub fn name(self) -> &'static str {
        match self {
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu_new",
            Activation::QuickGelu => "quick_gelu",
            Activation::Relu => "relu",
            Activation::Silu => "silu",
        }
    }
}

/// A BERT configuration. Keys the engine does not know are kept in `raw` and written back.
#[derive(Clone, Debug, PartialEq)]
pub struct BertConfig {
    /// V.
    pub vocab_size: usize,
    /// C.
    pub hidden_size: usize,
    /// Layers of the encoder.
    pub num_hidden_layers: usize,
    /// H; C must be a multiple of it.
    pub num_attention_heads: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Activation of the feed-forward layers and of the MLM head.
    pub hidden_act: Activation,
    /// Dropout of hidden states.
    pub hidden_dropout_prob: f32,
    /// Dropout of attention probabilities.
    pub attention_probs_dropout_prob: f32,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Token types.
    pub type_vocab_size: usize,
    /// Standard deviation of fresh weights.
    pub initializer_range: f32,
    /// ε of LayerNorm.
    pub layer_norm_eps: f32,
    /// Id of `[PAD]`.
    pub pad_token_id: u32,
    /// The whole file, unknown keys included.
    pub raw: Map<String, Value>,
}

impl BertConfig {
    /// Reads a `config.json`, or the one inside a folder.
    ///
    /// # Errors
    /// One line naming the key when the file is not a BERT the engine can compute.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let mut path = path.as_ref().to_path_buf();
        if path.is_dir() {
            path.push("config.json");
        }
        let text = small_file::text(&path, MAX_CONFIG_BYTES, "a model configuration")?;
        let raw: Map<String, Value> = serde_json::from_str(&text).map_err(|e| {
            let error = Error::refused(format!("not a JSON object: {e}")).path(&path).remedy(CHECK);
            if e.line() > 0 { error.line(e.line() as u64) } else { error }
        })?;
        Self::from_map(raw).map_err(|e| e.path(&path))
    }

    /// Interprets the keys of a `config.json`.
    ///
    /// # Errors
    /// As [`BertConfig::read`], without the path.
    pub fn from_map(raw: Map<String, Value>) -> Result<Self> {
        refuse_variants(&raw)?;
        let hidden_act = match raw.get("hidden_act") {
            None => Activation::Gelu,
            Some(value) => value.as_str().and_then(Activation::parse).ok_or_else(|| {
                let known = "gelu, gelu_new, gelu_pytorch_tanh, quick_gelu, relu and silu";
                Error::refused(format!("hidden_act {value} is unknown")).remedy(format!("the engine has {known}"))
            })?,
        };
        let config = BertConfig {
            vocab_size: size(&raw, "vocab_size", None)?,
            hidden_size: size(&raw, "hidden_size", None)?,
            num_hidden_layers: size(&raw, "num_hidden_layers", None)?,
            num_attention_heads: size(&raw, "num_attention_heads", None)?,
            intermediate_size: size(&raw, "intermediate_size", None)?,
            hidden_act,
            hidden_dropout_prob: number(&raw, "hidden_dropout_prob", 0.1)?,
            attention_probs_dropout_prob: number(&raw, "attention_probs_dropout_prob", 0.1)?,
            max_position_embeddings: size(&raw, "max_position_embeddings", None)?,
            type_vocab_size: size(&raw, "type_vocab_size", Some(2))?,
            initializer_range: number(&raw, "initializer_range", 0.02)?,
            layer_norm_eps: number(&raw, "layer_norm_eps", 1e-12)?,
            pad_token_id: match raw.get("pad_token_id") {
                None | Some(Value::Null) => 0,
                Some(value) => value
                    .as_u64()
                    .and_then(|id| u32::try_from(id).ok())
                    .ok_or_else(|| Error::refused(format!("pad_token_id {value} is not a token id")).remedy(CHECK))?,
            },
            raw,
        };
        config.check()?;
        Ok(config)
    }

    /// Width of one attention head, D = C / H.
    pub fn head_size(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Refuses sizes that do not fit together.
    ///
    /// # Errors
    /// The first rule that is broken, with the keys and values.
    pub fn check(&self) -> Result<()> {
        let refuse = |cause: String| Err(Error::refused(cause).remedy(CHECK));
        for (key, value) in self.sizes() {
            if value == 0 || value as u64 > MAX_SIZE {
                return refuse(format!("{key} {value} is outside 1..={MAX_SIZE}"));
            }
        }
        if self.num_hidden_layers > MAX_LAYERS {
            return refuse(format!("num_hidden_layers {} is more than {MAX_LAYERS}", self.num_hidden_layers));
        }
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        if hidden % heads != 0 {
            return refuse(format!("hidden_size {hidden} is not a multiple of num_attention_heads {heads}"));
        }
        let head = hidden / heads;
        if !(32..=128).contains(&head) || !head.is_multiple_of(16) {
            let cause =
                format!("head size {head} (hidden_size {hidden} / num_attention_heads {heads}) is not supported");
            return Err(Error::refused(cause).remedy("use a head size of 32 to 128 that is a multiple of 16"));
        }
        for (key, p) in [
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
        ] {
            if !(0.0..1.0).contains(&p) {
                return refuse(format!("{key} {p} is not in [0, 1)"));
            }
        }
        if !(self.layer_norm_eps > 0.0 && self.layer_norm_eps < 1.0) {
            return refuse(format!("layer_norm_eps {} is not in (0, 1)", self.layer_norm_eps));
        }
        if !(self.initializer_range > 0.0 && self.initializer_range < 10.0) {
            return refuse(format!("initializer_range {} is not in (0, 10)", self.initializer_range));
        }
        if self.pad_token_id as usize >= self.vocab_size {
            return refuse(format!("pad_token_id {} is not below vocab_size {}", self.pad_token_id, self.vocab_size));
        }
        Ok(())
    }

    /// The keys of `config.json`: the values of the fields over everything else the source file had.
    pub fn to_map(&self) -> Map<String, Value> {
        let mut map = self.raw.clone();
        map.insert("model_type".into(), json!("bert"));
        for (key, value) in self.sizes() {
            map.insert(key.into(), json!(value));
        }
        if map.get("hidden_act").and_then(Value::as_str).and_then(Activation::parse) != Some(self.hidden_act) {
            map.insert("hidden_act".into(), json!(self.hidden_act.name()));
        }
        for (key, value) in [
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
            ("initializer_range", self.initializer_range),
            ("layer_norm_eps", self.layer_norm_eps),
        ] {
            // Where the source's decimal means the same f32, its spelling stays.
            if map.get(key).and_then(Value::as_f64).map(|v| v as f32) != Some(value) {
                map.insert(key.into(), shortest(value));
            }
        }
        map.insert("pad_token_id".into(), json!(self.pad_token_id));
        map.entry("position_embedding_type").or_insert(json!("absolute"));
        map
    }

    fn sizes(&self) -> [(&'static str, usize); 7] {
        [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("type_vocab_size", self.type_vocab_size),
        ]
    }
}

const CHECK: &str = "check the model's config.json";

/// Everything that calls itself BERT and computes something else.
fn refuse_variants(raw: &Map<String, Value>) -> Result<()> {
    let refuse = |cause: String| Err(Error::refused(cause).remedy("choose a plain BERT encoder"));
    match raw.get("model_type") {
        Some(Value::String(name)) if name == "bert" => {}
        Some(other) => return refuse(format!("model_type is {other}, not \"bert\"")),
        // The first BERT configurations had no model_type.
        None => {
            for name in raw.get("architectures").and_then(Value::as_array).into_iter().flatten() {
                if !name.as_str().is_some_and(|n| n.starts_with("Bert")) {
                    return refuse(format!("architecture {name} is not BERT"));
                }
            }
        }
    }
    if let Some(value) = raw.get("position_embedding_type").filter(|v| !v.is_null())
        && value.as_str() != Some("absolute")
    {
        return refuse(format!("position_embedding_type {value} is not \"absolute\""));
    }
    for key in ["is_decoder", "add_cross_attention", "is_encoder_decoder"] {
        if raw.get(key) == Some(&Value::Bool(true)) {
            return refuse(format!("{key} is true"));
        }
    }
    if raw.get("pruned_heads").and_then(Value::as_object).is_some_and(|heads| !heads.is_empty()) {
        return refuse("pruned_heads is not empty".into());
    }
    Ok(())
}

fn size(raw: &Map<String, Value>, key: &str, default: Option<usize>) -> Result<usize> {
    match (raw.get(key), default) {
        (None, Some(default)) => Ok(default),
        (None, None) => Err(Error::refused(format!("{key} is missing")).remedy(CHECK)),
        (Some(value), _) => match value.as_u64() {
            Some(n) if (1..=MAX_SIZE).contains(&n) => Ok(n as usize),
            _ => Err(Error::refused(format!("{key} {value} is not a whole number in 1..={MAX_SIZE}")).remedy(CHECK)),
        },
    }
}

fn number(raw: &Map<String, Value>, key: &str, default: f32) -> Result<f32> {
    match raw.get(key) {
        None => Ok(default),
        Some(value) => match value.as_f64() {
            Some(x) if (x as f32).is_finite() => Ok(x as f32),
            _ => Err(Error::refused(format!("{key} {value} is not a number")).remedy(CHECK)),
        },
    }
}

/// The shortest decimal that reads back as the same f32, so that 0.1 is written as 0.1.
fn shortest(value: f32) -> Value {
    match format!("{value:e}").parse::<f64>() {
        Ok(x) => json!(x),
        Err(_) => json!(value),
    }
}
