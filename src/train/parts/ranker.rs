//! [`Job`] of a cross-encoder: pairs, and an encoder with a score.

use std::fmt::Display;

use super::pairs::{self, PairData};
use super::{Facts, Job, configuration, fit, keep_origin, tell_fresh, words};
use crate::data::pairs::batch::{CrossBuilder, PairTexts};
use crate::error::Result;
use crate::graph::{Capacity, check_gpu};
use crate::model::config::BertConfig;
use crate::model::digest::{self, Parts};
use crate::model::names;
use crate::model::parameters::Parameters;
use crate::model::weights::Checkpoint;
use crate::train::cross_encoder::Ranker;
use crate::train::dev::{DevRerank, DevSet};
use crate::train::origin::Purpose;
use crate::train::pair_batches::PairBatches;
use crate::train::plan::Plan;
use crate::train::room::{Knob, Memory};
use crate::train::settings::Settings;
use crate::train::target::Target;
use crate::train::trainer::{Judge, Trainer};
use crate::train::updates::Trainable;
use crate::train::workspace::Workspace;
use crate::train::{About, Batches};

/// Data and model of a cross-encoder's run.
pub struct RankerJob {
    facts: Facts,
    batches: PairBatches<CrossBuilder>,
    target: Target,
    config: BertConfig,
    weights: Option<Checkpoint>,
    capacity: Capacity,
    data: PairData,
    dev: Option<DevRerank>,
}

impl RankerJob {
    /// Opens what `settings` name and checks that it fits together.
    ///
    /// # Errors
    /// What is missing, damaged, or does not belong together.
    pub fn open(settings: &Settings) -> Result<Self> {
        let mut settings = settings.clone();
        let target = Target::open(&settings.device, settings.precision)?;
        let mut notes: Vec<String> = target.note.clone().into_iter().collect();
        // A model from scratch has as many tokens as the tokenizer, which is known once the data is open.
        let start = settings.model.is_some().then(|| configuration(&settings, 0)).transpose()?;
        let folder = start.as_ref().and_then(|(_, start)| start.tokenizer());
        let data = PairData::open(&settings, folder, &mut notes)?;
        let vocabulary = data.tokenizer.vocab_size() as usize;
        let (config, start) = match start {
            Some(start) => start,
            None => configuration(&settings, vocabulary)?,
        };
        let named = settings.queries.clone().or(settings.data.clone()).unwrap_or_default();
        fit(&config, vocabulary, &named, &mut notes)?;
        let weights = start.weights.as_deref().map(Checkpoint::open).transpose()?;
        if let Some(weights) = &weights {
            weights.check(&names::encoder(&config))?;
        }

        let [mut query, pair] = [
            data.rules("queries", settings.query_length, settings.query_prefix.as_deref(), &config, &mut notes)?,
            data.rules(
                "pairs",
                settings.max_length.map(|n| n as usize),
                settings.passage_prefix.as_deref(),
                &config,
                &mut notes,
            )?,
        ];
        let (length, prefix) = (pair.max_length, pair.prefix);
        if query.max_length + prefix.len() + 2 > length && length < settings.max_length.map_or(0, |n| n as usize) {
            // The model has fewer positions than the lengths were chosen for.
            query.max_length = length / 2;
        }
        (settings.query_length, settings.max_length) = (Some(query.max_length), Some(length as u32));
        let temperature = settings.temperature.unwrap_or(1.0);
        settings.temperature = Some(temperature);
        let builder = CrossBuilder::new(settings.seed, data.pairs.clone(), query.clone(), prefix.clone(), length)?
            .hold_out(settings.eval_size.unwrap_or(0))?;
        let batches = PairBatches::new(builder, &settings)?;
        let dev = match DevSet::open(&settings)? {
            Some(mut dev) => {
                notes.append(&mut dev.notes);
                data.same_tokenizer(&[&dev.queries, &dev.passages], &mut notes)?;
                let (queries, passages) = (dev.queries.clone(), dev.passages.clone());
                Some(dev.rerank(&settings, PairTexts::new(queries, passages, query, prefix, length)?)?)
            }
            None => None,
        };

        let pairs = settings.batch_size.unwrap_or(32) as usize * settings.group_size.unwrap_or(1);
        let capacity = Capacity { tokens: pairs * length, sequences: pairs, length, encoder_labels: 0 };
        if target.device.is_gpu() {
            check_gpu(&config)?;
        }
        let footprint = Ranker::footprint(&config, capacity, target.storage);
        let (groups, texts) = (batches.builder().groups(), batches.builder().texts());
        let tokens = pairs::tokens(groups, |query, members| {
            members.iter().try_fold(0, |sum, &passage| Ok(sum + texts.length(query, passage)?))
        })?;
        let about = About {
            model: words(&start.words, &config),
            model_fingerprint: digest::of(start.weights.as_deref(), &config, Parts::Inference)?,
            parameters: footprint.parameters as u64,
            data: data.words.clone(),
            data_fingerprint: data.fingerprint.clone(),
            texts: batches.texts(),
            tokens,
            held_out: batches.held_out_count(),
            device: target.words.clone(),
            precision: target.precision().into(),
            memory: super::bytes(footprint),
        };
        let facts = Facts { settings, about, notes };
        Ok(RankerJob { facts, batches, target, config, weights, capacity, data, dev })
    }
}

impl Job for RankerJob {
    type Model = Ranker;
    type Batches = PairBatches<CrossBuilder>;

    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn batches(&mut self) -> &mut PairBatches<CrossBuilder> {
        &mut self.batches
    }

    fn memory(&self) -> Option<Memory> {
        Memory::of(self.target.device)
    }

    fn knobs(&self) -> Vec<Knob<'_>> {
        let settings = &self.facts.settings;
        let (queries, group) = (settings.batch_size.unwrap_or(32) as usize, settings.group_size.unwrap_or(1));
        let bytes = move |queries: usize, length: usize| {
            let pairs = queries * group;
            let capacity = Capacity { tokens: pairs * length, sequences: pairs, length, encoder_labels: 0 };
            super::bytes(Ranker::footprint(&self.config, capacity, self.target.storage))
        };
        let length = self.capacity.length;
        vec![
            Knob::batch("--batch-size", queries as u64, settings.accumulate, move |n| bytes(n as usize, length)),
            Knob::new("--max-length", (length as u64, 3), move |n| bytes(queries, n as usize)),
        ]
    }

    fn keep_origin(&self, plan: &Plan, workspace: &Workspace) -> Result<()> {
        let purpose = Purpose::CrossEncoder { max_length: self.capacity.length };
        keep_origin((plan, workspace), &self.config, purpose, self.data.tokenizer_files(), None)
    }

    fn engine(&mut self, say: &mut dyn FnMut(String)) -> Result<Trainer<Ranker>> {
        let temperature = self.facts.settings.temperature.unwrap_or(1.0) as f32;
        let (device, storage) = (self.target.device, self.target.storage);
        let model = Ranker::new(device, &self.config, temperature, self.capacity, storage)?;
        let fresh =
            model.params().load(self.facts.settings.seed, self.config.initializer_range, |name, shape, out| {
                self.weights.as_ref().map_or(Ok(false), |weights| weights.read(name, shape, out))
            })?;
        let path = self.weights.as_ref().map(|weights| weights.path().display());
        tell_fresh(path.as_ref().map(|path| path as &dyn Display), &fresh, say);
        let judge = self.dev.take().map(|dev| Box::new(dev) as Box<dyn Judge<Ranker>>);
        Ok(Trainer::new(model, &self.facts.settings, judge))
    }
}
