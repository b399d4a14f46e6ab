//! `config.json` of a BERT model.

use serde_json::{Map, Value};

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
    /// Id of [PAD].
    pub pad_token_id: u32,
    /// The whole file, unknown keys included.
    pub raw: Map<String, Value>,
}
