//! [`Job`] of a bi-encoder: pairs, and one or two encoders.

use std::borrow::Cow;
use std::fmt::Display;

use super::pairs::{self, PairData};
use super::{Facts, Job, configuration, fit, keep_origin, tell_fresh, words};
use crate::data::order::Share;
use crate::data::pairs::batch::ContrastiveBuilder;
use crate::data::pairs::texts::{TextRules, Texts};
use crate::error::{Error, Result};
use crate::graph::biencoder::Shape;
use crate::graph::check_gpu;
use crate::model::config::BertConfig;
use crate::model::digest::{self, Parts};
use crate::model::hub;
use crate::model::parameters::Parameters;
use crate::model::towers::{PROJECTION, PROJECTIONS, SIDES, Towers};
use crate::retrieve::model::LEXICAL_TOP_K;
use crate::train::biencoder::{BiEncoder, Distillation, Options, Room};
use crate::train::dev::{DevSearch, DevSet};
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

/// Weight of the contrastive loss beside distillation, as published.
const CONTRASTIVE_WEIGHT: f64 = 1e-4;
/// What scores are divided by when nothing is said: dot products, and cosines.
const TEMPERATURES: [f64; 2] = [1.0, 0.05];

/// Data and model of a bi-encoder's run.
pub struct BiEncoderJob {
    facts: Facts,
    batches: PairBatches<ContrastiveBuilder>,
    target: Target,
    config: BertConfig,
    start: Option<Start>,
    options: Options,
    room: Room,
    /// Whose passages are candidates.
    share: Share,
    data: PairData,
    dev: Option<DevSearch>,
}

impl BiEncoderJob {
    /// Opens what `settings` name and checks that it fits together.
    ///
    /// # Errors
    /// What is missing, damaged, or does not belong together.
    pub fn open(settings: &Settings) -> Result<Self> {
        let mut settings = settings.clone();
        let target = Target::open(&settings.device, settings.precision)?;
        let mut notes: Vec<String> = target.note.clone().into_iter().collect();
        let path = settings.model.as_deref().map(hub::resolve).transpose()?;
        let towers = path.as_deref().map(Towers::open).transpose()?;
        let data = PairData::open(&settings, towers.as_ref().and_then(Towers::tokenizer), &mut notes)?;
        let vocabulary = data.tokenizer.vocab_size() as usize;
        let (config, mut kind) = match &towers {
            Some(towers) => (towers.config.clone(), "BERT".to_string()),
            None => configuration(&settings, vocabulary).map(|(config, start)| (config, start.words))?,
        };
        let named = settings.queries.clone().or(settings.data.clone()).unwrap_or_default();
        fit(&config, vocabulary, &named, &mut notes)?;

        let options = options(&mut settings, towers.as_ref(), &data)?;
        let rules = [
            data.rules("queries", settings.query_length, settings.query_prefix.as_deref(), &config, &mut notes)?,
            data.rules("passages", settings.passage_length, settings.passage_prefix.as_deref(), &config, &mut notes)?,
        ];
        (settings.query_length, settings.passage_length) = (Some(rules[0].max_length), Some(rules[1].max_length));
        let [queries, passages] = rules.clone();
        let duplicates = settings.duplicates.unwrap_or_default();
        let builder = ContrastiveBuilder::new(settings.seed, data.pairs.clone(), queries, passages, duplicates)?;
        let builder = builder.hold_out(settings.eval_size.unwrap_or(0))?.across(settings.across());
        let batches = PairBatches::new(builder, &settings)?;
        let dev = match DevSet::open(&settings)? {
            Some(dev) => Some(open_dev(dev, &settings, &rules, &data, &mut notes)?),
            None => None,
        };

        let queries = settings.batch_size.unwrap_or(32) as usize;
        let room = Room {
            queries,
            passages: queries * settings.group_size.unwrap_or(1),
            lengths: rules.each_ref().map(|rules| rules.max_length),
            chunk: settings.chunk,
        };
        if target.device.is_gpu() {
            check_gpu(&config)?;
        }
        let [queries, passages] = batches.builder().texts();
        let tokens = pairs::tokens(batches.builder().groups(), |query, members| {
            let own = queries.length(query)?;
            members.iter().try_fold(own, |sum, &passage| Ok(sum + passages.length(passage)?))
        })?;
        let share = if settings.across() { settings.share } else { Share::default() };
        let footprint = BiEncoder::footprint_among((target.device, target.storage), &config, &options, (room, share));
        if options.untied {
            kind += " for queries, one for passages";
        }
        let about = About {
            model: words(&kind, &config),
            model_fingerprint: digest::of(path.as_deref(), &config, Parts::Inference)?,
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
        let start = towers.map(Start);
        Ok(BiEncoderJob { facts, batches, target, config, start, options, room, share, data, dev })
    }
}

/// What is trained: by the settings, else as the model's folder says. Fills the settings in.
fn options(settings: &mut Settings, towers: Option<&Towers>, data: &PairData) -> Result<Options> {
    let own = towers.map(|towers| towers.settings.clone()).unwrap_or_default();
    let projection = match (settings.projection, towers.and_then(|towers| towers.projection)) {
        (Some(asked), Some(has)) if asked != has => {
            return Err(Error::usage(format!("--projection {asked}: the model has a projection to {has}"))
                .remedy("leave it out, or start from a model without one"));
        }
        (asked, has) => asked.or(has),
    };
    let pooling = settings.pooling.or(own.pooling).unwrap_or_default();
    let normalize = settings.normalize.or(own.normalize).unwrap_or(false);
    let untied = match (settings.untied, towers.is_some_and(Towers::untied)) {
        (Some(false), true) => {
            return Err(Error::usage("--untied false: the model has an encoder each for queries and passages")
                .remedy("leave it out, or give one of the two as --model"));
        }
        (asked, has) => asked.unwrap_or(false) || has,
    };
    let temperature = settings.temperature.unwrap_or(TEMPERATURES[usize::from(normalize)]);
    let [query, passage] = own.prompts;
    settings.query_prefix = settings.query_prefix.take().or(query);
    settings.passage_prefix = settings.passage_prefix.take().or(passage);
    (settings.pooling, settings.normalize, settings.untied) = (Some(pooling), Some(normalize), Some(untied));
    (settings.temperature, settings.projection) = (Some(temperature), projection);
    let distillation = if data.pairs.has_scores() {
        let loss = settings.distill_loss.unwrap_or_default();
        let contrastive_weight = settings.contrastive_loss_weight.unwrap_or(CONTRASTIVE_WEIGHT);
        (settings.distill_loss, settings.contrastive_loss_weight) = (Some(loss), Some(contrastive_weight));
        Some(Distillation { loss, contrastive_weight })
    } else {
        let given = [settings.distill_loss.is_some(), settings.contrastive_loss_weight.is_some()];
        if let Some(at) = given.iter().position(|given| *given) {
            let name = ["--distill-loss", "--contrastive-loss-weight"][at];
            return Err(Error::usage(format!("{name}: there are no scores of a teacher"))
                .remedy("give --teacher-scores, or rows with scores"));
        }
        None
    };
    let shape = Shape { pooling, projection, normalize };
    // What is the same as nothing said is not kept.
    settings.representation = settings.representation.filter(|r| r.lexical());
    let lexical = settings.representation.map(|_| settings.lexical_top_k.unwrap_or(LEXICAL_TOP_K));
    settings.lexical_top_k = lexical;
    if let (Some(k), Some(towers)) = (lexical, towers) {
        (0..if towers.untied() { 2 } else { 1 }).try_for_each(|side| towers.require_mlm_head(side))?;
        let words = towers.config.vocab_size;
        if k > words {
            return Err(Error::usage(format!("--lexical-top-k {k}: the model has {words} words"))
                .remedy(format!("choose 1 to {words}")));
        }
    }
    Ok(Options { shape, lexical, untied, temperature: temperature as f32, distillation })
}

fn open_dev(
    mut dev: DevSet,
    settings: &Settings,
    rules: &[TextRules; 2],
    data: &PairData,
    notes: &mut Vec<String>,
) -> Result<DevSearch> {
    notes.append(&mut dev.notes);
    data.same_tokenizer(&[&dev.queries, &dev.passages], notes)?;
    let [queries, passages] = rules.clone();
    let (queries, passages) = (Texts::new(dev.queries.clone(), queries)?, Texts::new(dev.passages.clone(), passages)?);
    let all = passages.texts();
    let dev = dev.search(settings, queries, passages);
    if (dev.searched() as u64) < all {
        notes.push(format!(
            "the dev set is searched among {} of {all} passages, its judged ones and random others; --dev-sample 0 takes all",
            dev.searched()
        ));
    }
    Ok(dev)
}

impl Job for BiEncoderJob {
    type Model = BiEncoder;
    type Batches = PairBatches<ContrastiveBuilder>;

    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn batches(&mut self) -> &mut PairBatches<ContrastiveBuilder> {
        &mut self.batches
    }

    fn memory(&self) -> Option<Memory> {
        Memory::of(self.target.device)
    }

    fn knobs(&self) -> Vec<Knob<'_>> {
        let (room, group) = (self.room, self.facts.settings.group_size.unwrap_or(1));
        let bytes = |room: Room| {
            let on = (self.target.device, self.target.storage);
            super::bytes(BiEncoder::footprint_among(on, &self.config, &self.options, (room, self.share)))
        };
        let chunk = room.chunk.unwrap_or(room.passages) as u64;
        vec![
            Knob::new("--chunk", (chunk, 1), move |n| bytes(Room { chunk: Some(n as usize), ..room })),
            Knob::new("--batch-size", (room.queries as u64, if group > 1 { 1 } else { 2 }), move |n| {
                bytes(Room { queries: n as usize, passages: n as usize * group, ..room })
            }),
            Knob::new("--passage-length", (room.lengths[1] as u64, 3), move |n| {
                bytes(Room { lengths: [room.lengths[0], n as usize], ..room })
            }),
        ]
    }

    fn keep_origin(&self, plan: &Plan, workspace: &Workspace) -> Result<()> {
        let text = |prefix: &Option<String>| prefix.clone().unwrap_or_default();
        let purpose = Purpose::BiEncoder {
            pooling: self.options.shape.pooling,
            normalize: self.options.shape.normalize,
            projection: self.options.shape.projection,
            lexical: self.options.lexical,
            untied: self.options.untied,
            prompts: [text(&self.facts.settings.query_prefix), text(&self.facts.settings.passage_prefix)],
            max_length: self.room.lengths[0].max(self.room.lengths[1]),
        };
        let tokenizer = self.data.tokenizer_files();
        let weights = self.start.as_ref().map(|start| start as &dyn Parameters);
        keep_origin((plan, workspace), &self.config, purpose, tokenizer, weights)
    }

    fn engine(&mut self, say: &mut dyn FnMut(String)) -> Result<Trainer<BiEncoder>> {
        let (device, storage) = (self.target.device, self.target.storage);
        let model = BiEncoder::among(device, &self.config, self.options, (self.room, self.share), storage)?;
        let fresh =
            model.params().load(self.facts.settings.seed, self.config.initializer_range, |name, shape, out| {
                self.start.as_ref().map_or(Ok(false), |start| start.read(name, shape, out))
            })?;
        let model_name = self.facts.settings.model.as_ref().map(|name| name as &dyn Display);
        tell_fresh(model_name, &fresh, say);
        let judge = self.dev.take().map(|dev| Box::new(dev) as Box<dyn Judge<BiEncoder>>);
        Ok(Trainer::new(model, &self.facts.settings, judge))
    }
}

/// The model that a run begins from. Both sides begin with the same weights where it has one encoder and two are trained.
struct Start(Towers);

impl Start {
    /// What the folder calls a parameter.
    fn own<'n>(&self, name: &'n str) -> Cow<'n, str> {
        if self.0.untied() {
            return name.into();
        }
        if let Some(bare) = SIDES.iter().find_map(|side| name.strip_prefix(side)?.strip_prefix('.')) {
            return bare.into();
        }
        match PROJECTIONS.iter().find_map(|own| name.strip_prefix(own)) {
            Some(part) => format!("{PROJECTION}{part}").into(),
            None => name.into(),
        }
    }
}

impl Parameters for Start {
    fn find(&self, name: &str) -> Option<Vec<usize>> {
        self.0.find(&self.own(name))
    }

    fn read(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<bool> {
        self.0.read(&self.own(name), shape, out)
    }
}
