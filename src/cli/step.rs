//! `step`: one forward and backward on exactly the given inputs, for comparison with PyTorch from outside.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde_json::{Map, json};

use super::{Global, Hardware, say};
use crate::data::pairs::texts::TextBatch;
use crate::error::{Error, Result};
use crate::graph::biencoder::Shape;
use crate::graph::params::Params;
use crate::graph::{Capacity, StepDropout};
use crate::model::config::BertConfig;
use crate::model::towers::Towers;
use crate::model::weights::Checkpoint;
use crate::model::{hub, names};
use crate::ops::pool::Pooling;
use crate::train::biencoder::{BiEncoder, DistillLoss, Distillation, Options, Room};
use crate::train::contract::{BatchFile, Outcome, write_gradients};
use crate::train::cross_encoder::Ranker;
use crate::train::step::{self, Pretrainer};
use crate::train::target::Target;
use crate::train::updates::Trainable;

/// Loss and every gradient of one batch, without dropout
///
/// The batch is a safetensors file of integers, padded, with masks of ones and zeros. retromae, dupmae and mlm: encoder_input_ids,
/// encoder_attention_mask, encoder_labels (all [B, L], -100 = no label); retromae and dupmae also decoder_input_ids, decoder_labels
/// ([B, L]) and decoder_attention_mask ([B, L, L], 1 = visible); dupmae also bag_word_weight ([B, V] of floats, 1/n for each distinct
/// token of the n of a text). contrastive: query.input_ids, query.attention_mask [B, L], passage.input_ids,
/// passage.attention_mask [B g, L], those of a query side by side and its positive first, and perhaps teacher_score [B, g]. cross-encoder:
/// input_ids, attention_mask, token_type_ids [B g, L]. The output holds loss, `loss.<part>`, for contrastive the embeddings, and
/// `grad.<parameter>` under checkpoint names.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// What is minimised
    #[arg(long, value_enum)]
    objective: Objective,
    /// Model: a folder, a file of weights, or a name of the Hugging Face hub
    #[arg(long, value_name = "DIR")]
    model: String,
    /// Inputs
    #[arg(long, value_name = "FILE")]
    batch: PathBuf,
    /// Where the losses and gradients go; must not exist
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Passages of a query
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_535))]
    group_size: u32,
    /// What an embedding is made of
    #[arg(long, value_enum, default_value = "cls")]
    pooling: Pooling,
    /// Scale embeddings to length 1
    #[arg(long)]
    normalize: bool,
    /// Train joined embeddings: the dense one, and behind it a column a word, in which stand this many words of a text
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..=4096))]
    lexical_top_k: Option<u32>,
    /// What scores are divided by
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    temperature: f32,
    /// Weight of the contrastive loss beside distillation, where the batch has scores of a teacher
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    contrastive_loss_weight: f64,
    /// How scores are compared with a teacher's
    #[arg(long, value_enum, default_value = "kl")]
    distill_loss: DistillLoss,
    /// Weight of dupmae's bag-of-words loss
    #[arg(long, value_name = "X", default_value_t = step::BOW_LOSS_WEIGHT)]
    bow_loss_weight: f64,
    #[command(flatten)]
    hardware: Hardware,
}

/// What a step can minimise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Objective {
    Retromae,
    Dupmae,
    Mlm,
    Contrastive,
    CrossEncoder,
}

/// Losses by name, as they are printed and written.
type Losses = Vec<(&'static str, f64)>;

/// Runs the subcommand.
pub fn run(args: Arguments, global: &Global) -> Result<()> {
    if args.output.exists() {
        return Err(Error::refused("exists already").path(&args.output).remedy("remove it or choose another --output"));
    }
    if !(args.temperature > 0.0 && args.temperature.is_finite()) {
        let cause = format!("--temperature {}: scores cannot be divided by it", args.temperature);
        return Err(Error::usage(cause).remedy("choose a positive number"));
    }
    if !(args.bow_loss_weight >= 0.0 && args.bow_loss_weight.is_finite()) {
        let cause = format!("--bow-loss-weight {}: no weight of a loss", args.bow_loss_weight);
        return Err(Error::usage(cause).remedy("choose a number that is at least 0"));
    }
    let path = hub::resolve(&args.model)?;
    let target = |config: &BertConfig| -> Result<Target> {
        let target = Target::open(&args.hardware.device, args.hardware.precision)?;
        target.note.iter().for_each(|note| global.note(note));
        if target.device.is_gpu() { crate::graph::check_gpu(config).map(|()| target) } else { Ok(target) }
    };
    let (losses, gradients) = match args.objective {
        Objective::Retromae => pretrain(&args, &path, step::Objective::RetroMae, &target)?,
        Objective::Dupmae => pretrain(&args, &path, step::Objective::DupMae, &target)?,
        Objective::Mlm => pretrain(&args, &path, step::Objective::Mlm, &target)?,
        Objective::Contrastive => contrastive(&args, &path, &target)?,
        Objective::CrossEncoder => cross_encoder(&args, &path, &target)?,
    };
    let width = losses.iter().map(|(name, _)| name.len()).max().unwrap_or(0).max(12);
    for (name, value) in &losses {
        say(&format!("{name:width$}  {value:.7}"))?;
    }
    say(&format!("{gradients} gradients in {}", args.output.display()))?;
    global
        .write_json(&losses.iter().map(|(name, value)| (name.to_string(), json!(value))).collect::<Map<_, _>>().into())
}

/// Opens the device for a model, once its inputs are known to be good.
type Open<'a> = &'a dyn Fn(&BertConfig) -> Result<Target>;

/// Writes the result; gives the number of gradients.
fn write(
    args: &Arguments,
    params: &Params,
    losses: &Losses,
    more: Vec<Outcome>,
    name: impl Fn(&str) -> String,
) -> Result<usize> {
    let outcomes: Vec<_> = losses.iter().map(|(name, value)| Outcome::loss(name, *value)).chain(more).collect();
    write_gradients(&args.output, params, &outcomes, name)?;
    Ok(params.parts().len())
}

fn pretrain(args: &Arguments, path: &Path, objective: step::Objective, open: Open<'_>) -> Result<(Losses, usize)> {
    let (config, weights) = encoder(path)?;
    let mut expected = names::encoder(&config);
    expected.extend(names::mlm_head(&config));
    if objective.has_decoder() {
        expected.extend(names::enhanced_decoder(&config));
    }
    weights.check(&expected)?;
    let batch = BatchFile::open(&args.batch, "")?;
    let (vocabulary, positions) = (config.vocab_size, config.max_position_embeddings);
    let batch = match objective {
        step::Objective::DupMae => batch.dupmae(vocabulary, positions)?,
        _ => batch.pretrain(objective.has_decoder(), vocabulary, positions)?,
    };
    let capacity = Capacity {
        tokens: batch.tokens(),
        sequences: batch.sequences(),
        length: longest(&batch.cu_seqlens),
        encoder_labels: batch.encoder_label_ids.len(),
    };
    let target = open(&config)?;
    let model = Pretrainer::new(target.device, &config, objective, capacity, target.storage)?;
    let mut model = model.with_bow_loss_weight(args.bow_loss_weight);
    model.params().load(0, 0.0, |name, shape, out| weights.read_f32(name, shape, out).map(|()| true))?;
    let done = model.gradients(&[batch], StepDropout::OFF)?;
    let mut losses = vec![("loss", done.total())];
    if objective.has_decoder() {
        losses.extend([("loss.encoder", done.encoder_loss()), ("loss.decoder", done.decoder_loss())]);
    }
    if objective == step::Objective::DupMae {
        losses.push(("loss.bow", done.bow_loss()));
    }
    let gradients = write(args, model.params(), &losses, Vec::new(), str::to_string)?;
    Ok((losses, gradients))
}

fn contrastive(args: &Arguments, path: &Path, open: Open<'_>) -> Result<(Losses, usize)> {
    let towers = Towers::open(path)?;
    let config = &towers.config;
    let batch = BatchFile::open(&args.batch, "")?.contrastive(args.group_size as usize, config)?;
    let lexical = args.lexical_top_k.map(|k| (k as usize).min(config.vocab_size));
    if lexical.is_some() {
        (0..2).try_for_each(|side| towers.require_mlm_head(side))?;
    }
    let options = Options {
        shape: Shape { pooling: args.pooling, projection: towers.projection, normalize: args.normalize },
        lexical,
        untied: towers.untied(),
        temperature: args.temperature,
        distillation: batch
            .teacher
            .is_some()
            .then_some(Distillation { loss: args.distill_loss, contrastive_weight: args.contrastive_loss_weight }),
    };
    let texts = |side: &TextBatch| (side.sequences(), longest(&side.cu_seqlens));
    let ((queries, query_length), (passages, passage_length)) = (texts(&batch.queries), texts(&batch.passages));
    let room = Room { queries, passages, lengths: [query_length, passage_length], chunk: None };
    let target = open(config)?;
    let mut model = BiEncoder::new(target.device, config, options, room, target.storage)?;
    model.params().load(0, 0.0, |name, shape, out| towers.read(name, shape, out))?;
    let done = model.gradients(std::slice::from_ref(&batch), StepDropout::OFF)?;
    let mut losses = vec![("loss", done.total()), ("loss.contrastive", done.contrastive_loss())];
    if batch.teacher.is_some() {
        losses.push(("loss.distill", done.distill_loss()));
    }
    let (width, [q, p]) = (options.width(config), model.embeddings(&batch));
    let more = vec![Outcome::matrix("query_embeddings", q, width), Outcome::matrix("passage_embeddings", p, width)];
    // Bi-encoders are bare encoders, whose parameters have no prefix, unless the MLM head is with them.
    let bare = |name: &str| if lexical.is_some() { name.to_string() } else { name.replacen("bert.", "", 1) };
    let gradients = write(args, model.params(), &losses, more, bare)?;
    Ok((losses, gradients))
}

fn cross_encoder(args: &Arguments, path: &Path, open: Open<'_>) -> Result<(Losses, usize)> {
    let (config, weights) = encoder(path)?;
    let mut expected = names::encoder(&config);
    expected.extend(names::pooler(&config));
    expected.extend(names::classifier(&config, 1));
    weights.check(&expected)?;
    let batch = BatchFile::open(&args.batch, "")?.cross(args.group_size as usize, &config)?;
    let capacity = Capacity {
        tokens: batch.pairs.ids.len(),
        sequences: batch.pairs.sequences(),
        length: longest(&batch.pairs.cu_seqlens),
        encoder_labels: 0,
    };
    let target = open(&config)?;
    let mut model = Ranker::new(target.device, &config, args.temperature, capacity, target.storage)?;
    model.params().load(0, 0.0, |name, shape, out| weights.read_f32(name, shape, out).map(|()| true))?;
    let losses = vec![("loss", model.gradients(&[batch], StepDropout::OFF)?.total())];
    let gradients = write(args, model.params(), &losses, Vec::new(), str::to_string)?;
    Ok((losses, gradients))
}

/// Configuration and weights of a model that is one encoder.
fn encoder(path: &Path) -> Result<(BertConfig, Checkpoint)> {
    let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new("")) };
    Ok((BertConfig::read(folder.join("config.json"))?, Checkpoint::open(path)?))
}

fn longest(cu_seqlens: &[u32]) -> usize {
    cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as usize).max().unwrap_or(0)
}
