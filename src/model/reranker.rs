//! The model folder of a cross-encoder: `BertForSequenceClassification` with one label, from this engine or from others.
//!
//! Scores are the raw logits, whatever activation sentence-transformers is told to put on them: a sigmoid does not change the order.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::config::BertConfig;
use super::export::MANIFEST;
use super::names;
use super::parameters::Parameters;
use super::sentence::object;
use super::weights::Checkpoint;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};

const CLASSIFIER: &str = "classifier.weight";

/// An opened and checked folder.
#[derive(Debug)]
pub struct Reranker {
    /// The configuration.
    pub config: BertConfig,
    /// Longest pair in tokens, where the folder says one: at most the positions of the model.
    pub max_length: Option<usize>,
    /// A line worth telling: what the folder wants done to scores and the engine does not do.
    pub note: Option<String>,
    folder: PathBuf,
    weights: Checkpoint,
}

impl Reranker {
    /// Opens `path`: a folder, or a file of weights with its configuration beside it.
    ///
    /// # Errors
    /// No classifier, one of several labels, or weights that do not fit the configuration.
    pub fn open(path: &Path) -> Result<Reranker> {
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new("")) };
        let config = BertConfig::read(folder.join("config.json"))?;
        let weights = Checkpoint::open(path)?;
        match weights.shape(CLASSIFIER).as_deref() {
            Some([1, _]) => {}
            Some(shape) => {
                let labels = shape.first().copied().unwrap_or(0);
                return Err(Error::refused(format!("the classifier has {labels} labels where a reranker has one"))
                    .path(path)
                    .remedy("use a cross-encoder trained to give one score"));
            }
            None => {
                return Err(Error::refused("is no cross-encoder: there is no classifier")
                    .path(path)
                    .remedy("give a model trained with --objective cross-encoder"));
            }
        }
        let mut params = names::encoder(&config);
        params.extend(names::pooler(&config));
        params.extend(names::classifier(&config, 1));
        weights.check(&params)?;
        if config.type_vocab_size < 2 {
            return Err(Error::refused("the model has one token type, and pairs have two")
                .path(folder.join("config.json"))
                .remedy("use another cross-encoder"));
        }
        let max_length = max_length(folder)?.map(|n| n.min(config.max_position_embeddings));
        let note = activation(&config).map(|name| {
            format!("{}: asks for the activation {name} on scores; they stay the raw logits", folder.display())
        });
        Ok(Reranker { config, max_length, note, folder: folder.to_path_buf(), weights })
    }

    /// The folder of the model's tokenizer, where it came with one.
    pub fn tokenizer(&self) -> Option<&Path> {
        Some(self.folder.as_path()).filter(|folder| Tokenizer::is_at(folder))
    }
}

impl Parameters for Reranker {
    fn find(&self, name: &str) -> Option<Vec<usize>> {
        self.weights.find(name)
    }

    fn read(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<bool> {
        self.weights.read(name, shape, out)
    }
}

/// The longest pair: what this engine noted, else what the tokenizer is told.
fn max_length(folder: &Path) -> Result<Option<usize>> {
    for (name, key) in [(MANIFEST, "max_seq_length"), ("tokenizer_config.json", "model_max_length")] {
        let path = folder.join(name);
        // Without a limit of its own a tokenizer has 1e30 there, which is no integer.
        if path.is_file()
            && let Some(n) = object(&path)?.get(key).and_then(Value::as_u64).filter(|&n| n > 0)
        {
            return Ok(usize::try_from(n).ok());
        }
    }
    Ok(None)
}

/// The activation that the configuration asks for, unless it is none.
fn activation(config: &BertConfig) -> Option<String> {
    let new = config.raw.get("sentence_transformers").and_then(|keys| keys.get("activation_fn"));
    let class = new.or(config.raw.get("sbert_ce_default_activation_function"))?.as_str()?;
    let name = class.rsplit('.').next().unwrap_or(class);
    (name != "Identity").then(|| name.to_string())
}
