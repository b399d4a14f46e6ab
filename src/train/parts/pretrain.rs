//! [`Job`] of the pre-training objectives: shards of text, and an encoder with its heads.

use std::fmt::Display;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::data::corpus::Corpus;
use crate::data::masking::{LONGEST_TEXT, MaskRules};
use crate::data::pairs::files::same_tokenizer;
use crate::data::shard::ShardSet;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::files::hex16;
use crate::graph::{Capacity, check_gpu};
use crate::model::config::BertConfig;
use crate::model::digest::{self, Parts};
use crate::model::names;
use crate::model::parameters::Parameters;
use crate::model::weights::Checkpoint;
use crate::train::batches::CorpusBatches;
use crate::train::origin::Purpose;
use crate::train::parts::{Facts, Job, configuration, fit, keep_origin, tell_fresh, words};
use crate::train::plan::Plan;
use crate::train::room::{Knob, Memory};
use crate::train::settings::Settings;
use crate::train::step::{self, Pretrainer};
use crate::train::target::Target;
use crate::train::trainer::Trainer;
use crate::train::updates::Trainable;
use crate::train::workspace::Workspace;
use crate::train::{About, Batches};

/// Data and model of a pre-training run.
pub struct Pretraining {
    facts: Facts,
    batches: CorpusBatches,
    objective: step::Objective,
    target: Target,
    config: BertConfig,
    weights: Option<Checkpoint>,
    capacity: Capacity,
    shards: Arc<ShardSet>,
}

impl Pretraining {
    /// Opens what `settings` name and checks that it fits together.
    ///
    /// # Errors
    /// What is missing, damaged, or does not belong together.
    pub fn open(settings: &Settings, objective: step::Objective) -> Result<Self> {
        let target = Target::open(&settings.device, settings.precision)?;
        let data = settings
            .data
            .clone()
            .ok_or_else(|| Error::usage("--data is missing").remedy("give the folder of shards"))?;
        let shards = Arc::new(ShardSet::open(&data)?);
        let facts = shards.facts().clone();
        let mut notes: Vec<String> = target.note.clone().into_iter().collect();
        let (config, start) = configuration(settings, facts.vocab_size as usize)?;
        fit(&config, facts.vocab_size as usize, &data, &mut notes)?;
        if let Some(folder) = start.folder.as_deref().filter(|folder| Tokenizer::is_at(folder)) {
            same_tokenizer((&Tokenizer::load(folder)?, folder), &shards, &mut notes)?;
        }
        let max_length = max_length(settings, &config, facts.longest as usize, &mut notes);
        let weights = start.weights.as_deref().map(Checkpoint::open).transpose()?;
        if let Some(weights) = &weights {
            weights.check(&names::encoder(&config))?;
        }

        let decoder = objective.has_decoder().then_some(settings.decoder_mask_probability);
        let rules = MaskRules::new(settings.seed, facts.vocabulary(), settings.encoder_mask_probability, decoder)?;
        let rules = if objective == step::Objective::DupMae { rules.with_bags() } else { rules };
        let named = shards.clone();
        let names = Box::new(move |text| named.id(text).ok().flatten().map(str::to_string));
        let batches = CorpusBatches::new(shards.clone(), settings, rules, max_length, 1, names)?;

        let capacity = capacity(settings, max_length);
        let device = target.device;
        if device.is_gpu() {
            check_gpu(&config)?;
        }
        let footprint = Pretrainer::footprint(device, &config, objective, capacity, target.storage);
        let texts = batches.texts();
        let about = About {
            model: words(&start.words, &config),
            model_fingerprint: digest::of(start.weights.as_deref(), &config, Parts::All)?,
            parameters: footprint.parameters as u64,
            data: format!("{} sequences, {} tokens", facts.sequences, facts.tokens),
            data_fingerprint: hex16(&Sha256::digest(shards.description()?)),
            texts,
            tokens: (facts.tokens as f64 * texts as f64 / shards.texts().max(1) as f64) as u64,
            held_out: batches.held_out_count(),
            device: target.words.clone(),
            precision: target.precision().into(),
            memory: super::bytes(footprint),
        };
        let settings = settings.clone();
        let facts = Facts { settings, about, notes };
        Ok(Pretraining { facts, batches, objective, target, config, weights, capacity, shards })
    }
}

impl Job for Pretraining {
    type Model = Pretrainer;
    type Batches = CorpusBatches;

    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn batches(&mut self) -> &mut CorpusBatches {
        &mut self.batches
    }

    fn memory(&self) -> Option<Memory> {
        Memory::of(self.target.device)
    }

    fn knobs(&self) -> Vec<Knob<'_>> {
        let settings = &self.facts.settings;
        let bytes = |settings: &Settings, length: usize| {
            let target = &self.target;
            let capacity = capacity(settings, length);
            super::bytes(Pretrainer::footprint(target.device, &self.config, self.objective, capacity, target.storage))
        };
        let length = self.capacity.length;
        let (flag, now) = match settings.tokens_per_batch {
            Some(tokens) => ("--tokens-per-batch", tokens),
            None => ("--batch-size", settings.batch_size.unwrap_or(1)),
        };
        let batch = Knob::batch(flag, u64::from(now), settings.accumulate, move |n| {
            let mut other = settings.clone();
            let size =
                if other.tokens_per_batch.is_some() { &mut other.tokens_per_batch } else { &mut other.batch_size };
            *size = Some(n as u32);
            bytes(&other, length)
        });
        let shorter = Knob::new("--max-length", (length as u64, 3), move |n| bytes(settings, n as usize));
        // A batch by tokens holds as many of them whatever their texts are.
        if settings.tokens_per_batch.is_some() { vec![batch] } else { vec![batch, shorter] }
    }

    fn keep_origin(&self, plan: &Plan, workspace: &Workspace) -> Result<()> {
        let weights = self.weights.as_ref().map(|weights| weights as &dyn Parameters);
        keep_origin((plan, workspace), &self.config, Purpose::Pretrain, self.shards.read_files()?, weights)
    }

    fn engine(&mut self, say: &mut dyn FnMut(String)) -> Result<Trainer<Pretrainer>> {
        let (device, storage) = (self.target.device, self.target.storage);
        let model = Pretrainer::new(device, &self.config, self.objective, self.capacity, storage)?
            .with_bow_loss_weight(self.facts.settings.bow_loss_weight);
        let fresh =
            model.params().load(self.facts.settings.seed, self.config.initializer_range, |name, shape, out| {
                self.weights.as_ref().map_or(Ok(false), |weights| weights.read(name, shape, out))
            })?;
        let path = self.weights.as_ref().map(|weights| weights.path().display());
        tell_fresh(path.as_ref().map(|path| path as &dyn Display), &fresh, say);
        Ok(Trainer::new(model, &self.facts.settings, None))
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
