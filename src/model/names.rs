//! Parameter names. The engine uses one spelling, that of `BertForMaskedLM` checkpoints (`bert.…`, `cls.predictions.…`) plus
//! `c_head.…` for RetroMAE's enhanced decoder; every other spelling found in published files is translated here and nowhere else.

use super::config::BertConfig;

/// The word embeddings, `[V, C]`; the MLM head projects with the same matrix.
pub const WORD_EMBEDDINGS: &str = "bert.embeddings.word_embeddings.weight";
/// The bias of the MLM head, `[V]`.
pub const MLM_BIAS: &str = "cls.predictions.bias";

/// A parameter that a model must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Canonical name.
    pub name: String,
    /// Shape, row-major; linear weights are `[out, in]`.
    pub shape: Vec<usize>,
}

impl Param {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a name found in a checkpoint stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// A parameter, under its canonical name.
    Param(String),
    /// A second copy of the parameter with this canonical name; both must be equal.
    TiedTo(String),
    /// Carries nothing the engine uses: position ids, the next-sentence head.
    Ignored,
    /// Not a name of a BERT model.
    Unknown,
}

/// Translates a name found in a checkpoint.
///
/// Accepts the names of `BertModel` (no prefix), `BertFor…` (`bert.`), TensorFlow's `gamma`/`beta`, the explicit decoder of the MLM
/// head, and what RetroMAE's own trainer saves when it stores the whole module (`lm.…`, `decoder_embeddings.…`, `c_head.…`).
pub fn meaning(found: &str) -> Meaning {
    let name = found.strip_prefix("module.").unwrap_or(found);
    let name = name.strip_prefix("lm.").unwrap_or(name);
    if name.ends_with("position_ids") || name.starts_with("cls.seq_relationship.") {
        return Meaning::Ignored;
    }
    let name = match name.strip_suffix("LayerNorm.gamma") {
        Some(stem) => format!("{stem}LayerNorm.weight"),
        None => match name.strip_suffix("LayerNorm.beta") {
            Some(stem) => format!("{stem}LayerNorm.bias"),
            None => name.to_string(),
        },
    };
    match name.as_str() {
        "cls.predictions.decoder.weight" => return Meaning::TiedTo(WORD_EMBEDDINGS.into()),
        "cls.predictions.decoder.bias" => return Meaning::TiedTo(MLM_BIAS.into()),
        _ => {}
    }
    if let Some(rest) = name.strip_prefix("decoder_embeddings.") {
        return Meaning::TiedTo(format!("bert.embeddings.{rest}"));
    }
    if ["embeddings.", "encoder.layer.", "pooler.dense."].iter().any(|p| name.starts_with(p)) {
        return Meaning::Param(format!("bert.{name}"));
    }
    if ["bert.", "cls.predictions.", "classifier.", "c_head."].iter().any(|p| name.starts_with(p)) {
        return Meaning::Param(name);
    }
    Meaning::Unknown
}

/// The name a bare `BertModel` has for a parameter: no `bert.` prefix.
pub fn without_prefix(canonical: &str) -> &str {
    canonical.strip_prefix("bert.").unwrap_or(canonical)
}

/// Embeddings and layers, in the order of the forward pass.
pub fn encoder(config: &BertConfig) -> Vec<Param> {
    let c = config.hidden_size;
    let mut table = Table(Vec::new());
    table.add(WORD_EMBEDDINGS, &[config.vocab_size, c]);
    table.add("bert.embeddings.position_embeddings.weight", &[config.max_position_embeddings, c]);
    table.add("bert.embeddings.token_type_embeddings.weight", &[config.type_vocab_size, c]);
    table.vectors("bert.embeddings.LayerNorm", c);
    for i in 0..config.num_hidden_layers {
        table.layer(&format!("bert.encoder.layer.{i}"), config);
    }
    table.0
}

/// The MLM head, without the projection that is tied to the word embeddings.
pub fn mlm_head(config: &BertConfig) -> Vec<Param> {
    let c = config.hidden_size;
    let mut table = Table(Vec::new());
    table.linear("cls.predictions.transform.dense", c, c);
    table.vectors("cls.predictions.transform.LayerNorm", c);
    table.add(MLM_BIAS, &[config.vocab_size]);
    table.0
}

/// RetroMAE's enhanced decoder: one layer below `c_head.`.
pub fn enhanced_decoder(config: &BertConfig) -> Vec<Param> {
    let mut table = Table(Vec::new());
    table.layer("c_head", config);
    table.0
}

/// The pooler of `BertModel`.
pub fn pooler(config: &BertConfig) -> Vec<Param> {
    let mut table = Table(Vec::new());
    table.linear("bert.pooler.dense", config.hidden_size, config.hidden_size);
    table.0
}

/// The classifier of `BertForSequenceClassification` with this many labels.
pub fn classifier(config: &BertConfig, labels: usize) -> Vec<Param> {
    let mut table = Table(Vec::new());
    table.linear("classifier", labels, config.hidden_size);
    table.0
}

struct Table(Vec<Param>);

impl Table {
    fn add(&mut self, name: impl Into<String>, shape: &[usize]) {
        self.0.push(Param { name: name.into(), shape: shape.to_vec() });
    }

    fn vectors(&mut self, stem: &str, width: usize) {
        self.add(format!("{stem}.weight"), &[width]);
        self.add(format!("{stem}.bias"), &[width]);
    }

    fn linear(&mut self, stem: &str, out: usize, input: usize) {
        self.add(format!("{stem}.weight"), &[out, input]);
        self.add(format!("{stem}.bias"), &[out]);
    }

    fn layer(&mut self, stem: &str, config: &BertConfig) {
        let (c, wide) = (config.hidden_size, config.intermediate_size);
        for part in ["query", "key", "value"] {
            self.linear(&format!("{stem}.attention.self.{part}"), c, c);
        }
        self.linear(&format!("{stem}.attention.output.dense"), c, c);
        self.vectors(&format!("{stem}.attention.output.LayerNorm"), c);
        self.linear(&format!("{stem}.intermediate.dense"), wide, c);
        self.linear(&format!("{stem}.output.dense"), c, wide);
        self.vectors(&format!("{stem}.output.LayerNorm"), c);
    }
}
