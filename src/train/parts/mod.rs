//! What the settings of a run name, brought together: the data, the model's configuration, its weights.

pub mod biencoder;
mod pairs;
pub mod pretrain;
pub mod ranker;

use std::fmt::Display;
use std::path::{Path, PathBuf};

use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::config::BertConfig;
use crate::model::parameters::Parameters;
use crate::model::{hub, presets};
use crate::train::origin::{self, Origin, Purpose};
use crate::train::plan::Plan;
use crate::train::room::{Knob, Memory};
use crate::train::settings::Settings;
use crate::train::step::Footprint;
use crate::train::trainer::Trainer;
use crate::train::updates::Trainable;
use crate::train::workspace::Workspace;
use crate::train::{About, Batches};

/// A job in words and figures.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The settings, with what the model decides filled in.
    pub settings: Settings,
    /// Data and model.
    pub about: About,
    /// Lines worth telling a person.
    pub notes: Vec<String>,
}

/// Data and model of a run, opened and checked but not yet allocated.
pub trait Job {
    /// What is trained.
    type Model: Trainable;
    /// What it is trained on.
    type Batches: Batches<Batch = <Self::Model as Trainable>::Batch>;

    /// What is known before it costs anything.
    fn facts(&self) -> &Facts;

    /// The batches.
    fn batches(&mut self) -> &mut Self::Batches;

    /// The memory of the device, where that is known.
    fn memory(&self) -> Option<Memory>;

    /// Settings that make the run take less memory, the first to try first.
    fn knobs(&self) -> Vec<Knob<'_>>;

    /// Keeps in the output folder of `workspace` what its checkpoints need to be exported by themselves.
    ///
    /// # Errors
    /// A failure of the system.
    fn keep_origin(&self, plan: &Plan, workspace: &Workspace) -> Result<()>;

    /// Allocates the model and loads or initialises its weights. Says in one line which parameters start fresh beside loaded ones.
    ///
    /// # Errors
    /// Not enough memory, or weights that do not fit.
    fn engine(&mut self, say: &mut dyn FnMut(String)) -> Result<Trainer<Self::Model>>;
}

/// Keeps the origin of a run of the model `config`, for its purpose.
fn keep_origin(
    (plan, workspace): (&Plan, &Workspace),
    config: &BertConfig,
    purpose: Purpose,
    tokenizer: Vec<(String, Vec<u8>)>,
    weights: Option<&dyn Parameters>,
) -> Result<()> {
    let of = |key: &str| plan.identity.get(key).cloned().unwrap_or_default();
    let name = plan.settings.model.clone();
    let about = origin::About {
        model: of("model"),
        data: of("data"),
        base_model: name.filter(|name| hub::is_hub_name(name) && !Path::new(name).exists()),
        pooler: weights.is_some_and(|weights| purpose.keeps_pooler(config, weights)),
        purpose,
    };
    origin::keep(&workspace.disk, &workspace.out, &Origin { about, config, tokenizer, weights })
}

/// What a run takes of memory.
fn bytes(footprint: Footprint) -> u64 {
    (footprint.parameter_bytes + footprint.activation_bytes) as u64
}

/// A model in words.
fn words(kind: &str, config: &BertConfig) -> String {
    format!(
        "{kind}, {} layers of width {}, {} heads, {} tokens",
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.vocab_size
    )
}

/// One line about parameters that start fresh beside those that the model in `from` has.
fn tell_fresh(from: Option<&dyn Display>, fresh: &[String], say: &mut dyn FnMut(String)) {
    if let (Some(from), Some(first)) = (from, fresh.first()) {
        say(format!("{from}: {} parameters are not in it and start fresh: {first}, …", fresh.len()));
    }
}

/// Where a model comes from.
pub(super) struct Start {
    pub words: String,
    /// Folder or file of its weights; None from scratch.
    pub weights: Option<PathBuf>,
    /// Folder of the model, which may hold its tokenizer.
    pub folder: Option<PathBuf>,
}

impl Start {
    /// The folder of the model's tokenizer, where it came with one.
    pub fn tokenizer(&self) -> Option<&Path> {
        self.folder.as_deref().filter(|folder| Tokenizer::is_at(folder))
    }
}

pub(super) fn configuration(settings: &Settings, vocabulary: usize) -> Result<(BertConfig, Start)> {
    if let Some(name) = &settings.model {
        let path = hub::resolve(name)?;
        let folder =
            if path.is_dir() { path.clone() } else { path.parent().map(Path::to_path_buf).unwrap_or_default() };
        let config = BertConfig::read(folder.join("config.json"))?;
        return Ok((config, Start { words: "BERT".into(), weights: Some(path), folder: Some(folder) }));
    }
    let config = match (&settings.config_file, &settings.config_name) {
        (Some(path), _) => BertConfig::read(path)?,
        (None, Some(name)) => BertConfig { vocab_size: vocabulary, ..presets::preset(name)? },
        (None, None) => {
            return Err(Error::usage("--model is missing").remedy("give --model, --config-file or --config-name"));
        }
    };
    Ok((config, Start { words: "BERT from scratch".into(), weights: None, folder: None }))
}

/// Refuses a model whose vocabulary lacks tokens of the data.
pub(super) fn fit(config: &BertConfig, vocabulary: usize, data: &Path, notes: &mut Vec<String>) -> Result<()> {
    if config.vocab_size < vocabulary {
        let cause = format!("the tokens are of a vocabulary of {vocabulary}, the model has {}", config.vocab_size);
        return Err(Error::refused(cause).path(data).remedy("tokenize with the tokenizer of the model"));
    }
    if config.vocab_size > vocabulary {
        let spare = config.vocab_size - vocabulary;
        notes.push(format!(
            "the model has {spare} tokens more than the tokenizer of the data; is it the same tokenizer?"
        ));
    }
    Ok(())
}
