//! What the settings of a run name, brought together: the data, the model's configuration, its weights.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::data::corpus::Corpus;
use crate::data::masking::{LONGEST_TEXT, MaskRules};
use crate::data::shard::{META, ShardSet};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, IoContext, Result};
use crate::graph::{Capacity, check_gpu};
use crate::model::config::BertConfig;
use crate::model::parameters::Parameters;
use crate::model::weights::Checkpoint;
use crate::model::{hub, names, presets};
use crate::train::batches::CorpusBatches;
use crate::train::origin::{self, Origin, Purpose};
use crate::train::plan::Plan;
use crate::train::pretrain::PretrainEngine;
use crate::train::settings::{Objective, Settings};
use crate::train::step::Pretrainer;
use crate::train::target::Target;
use crate::train::workspace::Workspace;
use crate::train::{About, Batches};

/// Data and model of a run, opened and checked but not yet allocated.
pub struct Parts {
    /// What they are, in words and figures.
    pub about: About,
    /// The batches.
    pub batches: CorpusBatches,
    /// Lines worth telling a person.
    pub notes: Vec<String>,
    target: Target,
    config: BertConfig,
    weights: Option<Checkpoint>,
    capacity: Capacity,
    shards: Arc<ShardSet>,
}

impl Parts {
    /// Opens what `settings` name and checks that it fits together.
    pub fn open(settings: &Settings) -> Result<Parts> {
        let target = Target::open(&settings.device, settings.precision)?;
        let data = settings
            .data
            .clone()
            .ok_or_else(|| Error::usage("--data is missing").remedy("give the folder of shards"))?;
        let shards = Arc::new(ShardSet::open(&data)?);
        let facts = shards.facts().clone();
        let mut notes: Vec<String> = target.note.clone().into_iter().collect();
        let (mut config, start) = configuration(settings, facts.vocab_size as usize)?;
        fit(&mut config, facts.vocab_size as usize, &data, &mut notes)?;
        if let Some(folder) = start.folder.as_deref().filter(|folder| Tokenizer::is_at(folder)) {
            same_tokenizer(folder, &shards, &mut notes)?;
        }
        let max_length = max_length(settings, &config, facts.longest as usize, &mut notes);
        let weights = start.weights.as_deref().map(Checkpoint::open).transpose()?;
        if let Some(weights) = &weights {
            weights.check(&names::encoder(&config))?;
        }

        let decoder = (settings.objective == Objective::Retromae).then_some(settings.decoder_mask_probability);
        let rules = MaskRules::new(settings.seed, facts.vocabulary(), settings.encoder_mask_probability, decoder)?;
        let named = shards.clone();
        let names = Box::new(move |text| named.id(text).ok().flatten().map(str::to_string));
        let batches = CorpusBatches::new(shards.clone(), settings, rules, max_length, 1, names)?;

        let capacity = capacity(settings, max_length);
        let (device, objective) = (target.device, settings.objective.into());
        if device.is_gpu() {
            check_gpu(&config)?;
        }
        let footprint = Pretrainer::footprint(device, &config, objective, capacity, target.storage);
        let texts = batches.texts();
        let about = About {
            model: format!(
                "{}, {} layers of width {}, {} heads, {} tokens",
                start.words,
                config.num_hidden_layers,
                config.hidden_size,
                config.num_attention_heads,
                config.vocab_size
            ),
            model_fingerprint: fingerprint(&config, start.weights.as_deref())?,
            parameters: footprint.parameters as u64,
            data: format!("{} sequences, {} tokens", facts.sequences, facts.tokens),
            data_fingerprint: short_digest(&std::fs::read(data.join(META)).at(data.join(META), "cannot read")?),
            texts,
            tokens: (facts.tokens as f64 * texts as f64 / shards.texts().max(1) as f64) as u64,
            held_out: batches.held_out_count(),
            device: target.words.clone(),
            precision: target.precision().into(),
            memory: (footprint.parameter_bytes + footprint.activation_bytes) as u64,
        };
        Ok(Parts { about, batches, notes, target, config, weights, capacity, shards })
    }

    /// Allocates the model and loads or initialises its weights. Says in one line which parameters start fresh beside loaded ones.
    pub fn engine(&self, settings: &Settings, say: &mut dyn FnMut(String)) -> Result<PretrainEngine> {
        let (device, storage, objective) = (self.target.device, self.target.storage, settings.objective.into());
        let model = Pretrainer::new(device, &self.config, objective, self.capacity, storage)?;
        let fresh =
            model.params().load(settings.seed, self.config.initializer_range, |name, shape, out| {
                match &self.weights {
                    Some(weights) if weights.contains(name) => weights.read_f32(name, shape, out).map(|()| true),
                    _ => Ok(false),
                }
            })?;
        if let (Some(weights), Some(first)) = (&self.weights, fresh.first()) {
            say(format!(
                "{}: {} parameters are not in it and start fresh: {first}, …",
                weights.path().display(),
                fresh.len()
            ));
        }
        Ok(PretrainEngine::new(model, settings))
    }

    /// Keeps in the output folder of `workspace` what its checkpoints need to be exported by themselves.
    pub fn keep_origin(&self, plan: &Plan, workspace: &Workspace) -> Result<()> {
        let of = |key: &str| plan.identity.get(key).cloned().unwrap_or_default();
        let name = plan.settings.model.clone();
        let about = origin::About {
            model: of("model"),
            data: of("data"),
            base_model: name.filter(|name| hub::is_hub_name(name) && !Path::new(name).exists()),
            pooler: self.weights.as_ref().is_some_and(|w| Purpose::Pretrain.keeps_pooler(&self.config, w)),
            purpose: Purpose::Pretrain,
        };
        let tokenizer = self.shards.read_files()?;
        let origin = Origin {
            about,
            config: &self.config,
            tokenizer,
            weights: self.weights.as_ref().map(|w| w as &dyn Parameters),
        };
        origin::keep(&workspace.disk, &workspace.out, &origin)
    }
}

/// Where a model comes from.
struct Start {
    words: String,
    /// Folder or file of its weights; None from scratch.
    weights: Option<PathBuf>,
    /// Folder of the model, which may hold its tokenizer.
    folder: Option<PathBuf>,
}

fn configuration(settings: &Settings, vocabulary: usize) -> Result<(BertConfig, Start)> {
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
fn fit(config: &mut BertConfig, vocabulary: usize, data: &Path, notes: &mut Vec<String>) -> Result<()> {
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

/// Refuses data whose token ids mean other tokens to the model in `folder` than to the tokenizer that made them.
fn same_tokenizer(folder: &Path, shards: &ShardSet, notes: &mut Vec<String>) -> Result<()> {
    let of_model = Tokenizer::load(folder)?;
    let of_data = Tokenizer::load(shards.dir())?;
    if of_model.fingerprint() == of_data.fingerprint() {
        return Ok(());
    }
    match of_data.first_difference(&of_model, of_data.vocab_size()) {
        Some((id, data, model)) => {
            let cause = format!(
                "made with another tokenizer than that of {}: token {id} is {data:?} in the data and {model:?} in the model",
                folder.display()
            );
            let remedy = format!("tokenize with --tokenizer {}", folder.display());
            Err(Error::refused(cause).path(shards.dir()).remedy(remedy))
        }
        None => {
            notes.push(format!(
                "{} and {}: the tokenizers have the same tokens but treat text differently, as in lower-casing",
                shards.dir().display(),
                folder.display()
            ));
            Ok(())
        }
    }
}

fn max_length(settings: &Settings, config: &BertConfig, longest: usize, notes: &mut Vec<String>) -> usize {
    let asked = settings.max_length.map_or(longest, |n| longest.min(n as usize));
    let most = config.max_position_embeddings.min(LONGEST_TEXT);
    if asked > most {
        notes.push(format!("texts of up to {asked} tokens are cut to the {most} positions of the model"));
    }
    asked.min(most)
}

/// The largest batch that can come up.
fn capacity(settings: &Settings, length: usize) -> Capacity {
    let (tokens, sequences) = match (settings.tokens_per_batch, settings.batch_size) {
        // A text has at least [CLS] and [SEP].
        (Some(tokens), _) => (tokens as usize, (tokens as usize / 2).max(1)),
        (None, texts) => (texts.unwrap_or(1) as usize * length, texts.unwrap_or(1) as usize),
    };
    // A text of L tokens has round(L p) labels, at least one: at most L p + 1.
    let labels = (tokens as f64 * settings.encoder_mask_probability).ceil() as usize + sequences;
    Capacity { tokens, sequences, length, encoder_labels: labels.min(tokens) }
}

/// Digest of the configuration and of the weights the run starts from.
fn fingerprint(config: &BertConfig, weights: Option<&Path>) -> Result<String> {
    let mut sha = Sha256::new();
    sha.update(serde_json::Value::Object(config.to_map()).to_string());
    let mut files = Vec::new();
    match weights {
        Some(folder) if folder.is_dir() => {
            for entry in std::fs::read_dir(folder).at(folder, "cannot list the folder")? {
                files.push(entry.at(folder, "cannot list the folder")?.path());
            }
            files.retain(|path| path.extension().is_some_and(|e| e == "safetensors" || e == "bin"));
            files.sort();
        }
        Some(file) => files.push(file.to_path_buf()),
        None => {}
    }
    for path in files {
        let mut file = std::fs::File::open(&path).at(&path, "cannot open")?;
        std::io::copy(&mut file, &mut sha).at(&path, "cannot read")?;
    }
    Ok(hex16(&sha.finalize()))
}

fn short_digest(bytes: &[u8]) -> String {
    hex16(&Sha256::digest(bytes))
}

/// The first 64 bits: two runs are told apart by them, nothing is protected by them.
fn hex16(digest: &[u8]) -> String {
    digest.iter().take(8).map(|b| format!("{b:02x}")).collect()
}
