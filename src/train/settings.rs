//! Every knob of a training run with its default, the file `run.toml` that holds them, and which of them make two runs the same.
//!
//! The keys of the file are the names of the command-line flags. A flag wins over the file; of a pair that excludes each other
//! (`steps` and `epochs`, say) a flag also puts the file's other half out of force.

mod identity;
mod resolve;

use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::data::order::Share;
use crate::data::pairs::MissingScore;
use crate::data::pairs::batch::Duplicates;
use crate::data::pairs::qrels::QrelsFormat;
use crate::data::pairs::rows::RowFormat;
use crate::data::shard::TitleSep;
use crate::eval::metrics::Metric;
use crate::ops::pool::Pooling;
use crate::retrieve::representation::Representation;
use crate::train::biencoder::DistillLoss;
use crate::train::checkpoint::LOSS;
use crate::train::schedule::{Decay, Schedule};
use crate::train::step::BOW_LOSS_WEIGHT;

pub use identity::compare;

/// What is minimised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// RetroMAE: masked language modelling in the encoder, enhanced decoding from its `[CLS]` (arXiv:2205.12035).
    #[default]
    Retromae,
    /// DupMAE: the same with a normalised decoder query, and a bag-of-words loss (arXiv:2211.08769).
    Dupmae,
    /// Masked language modelling alone: the baseline.
    Mlm,
    /// A bi-encoder: the positive against every other passage of the batch, and a teacher's scores.
    Contrastive,
    /// A cross-encoder: the positive against the other passages of its query's group.
    CrossEncoder,
}

impl Objective {
    /// The name in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Objective::Retromae => "retromae",
            Objective::Dupmae => "dupmae",
            Objective::Mlm => "mlm",
            Objective::Contrastive => "contrastive",
            Objective::CrossEncoder => "cross-encoder",
        }
    }

    /// Whether it learns from queries and passages, not from texts alone.
    pub fn is_fine_tuning(self) -> bool {
        matches!(self, Objective::Contrastive | Objective::CrossEncoder)
    }
}

/// Arithmetic of the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// bf16 on a GPU, fp32 on the CPU.
    #[default]
    Auto,
    /// fp32 throughout.
    Fp32,
    /// bf16 products, fp32 sums and master weights; on a GPU bf16 storage too.
    Bf16,
}

/// What a checkpoint folder is resumed from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// The newest good checkpoint of the output folder, or from the start when there is none.
    #[default]
    Auto,
    /// Nothing: the output folder must not hold a run.
    Never,
    /// This checkpoint.
    From(PathBuf),
}

/// The resolved settings of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Settings {
    /// What is minimised.
    pub objective: Objective,
    /// Folder, file or cached hub name of the model to start from.
    pub model: Option<String>,
    /// `config.json` of a model to start from scratch.
    pub config_file: Option<PathBuf>,
    /// Name of a standard size to start from scratch.
    pub config_name: Option<String>,
    /// Folder that `tokenize` wrote.
    pub data: Option<PathBuf>,
    /// Folder of the run.
    pub output: Option<PathBuf>,
    /// `auto`, `never` or a checkpoint folder.
    pub resume: String,
    /// Texts of a micro-batch.
    pub batch_size: Option<u32>,
    /// Tokens of a micro-batch, in place of `batch_size`.
    pub tokens_per_batch: Option<u32>,
    /// Micro-batches of a step.
    pub accumulate: u32,
    /// Longer texts are cut to this many tokens.
    pub max_length: Option<u32>,
    /// Passes over the data.
    pub epochs: Option<f64>,
    /// Steps, in place of `epochs`.
    pub steps: Option<u64>,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// How the learning rate falls.
    pub schedule: Decay,
    /// Part of the steps that warms up.
    pub warmup_ratio: Option<f64>,
    /// Steps of warm-up, in place of `warmup_ratio`.
    pub warmup_steps: Option<u64>,
    /// Weight decay of AdamW, on all but biases and LayerNorm.
    pub weight_decay: f64,
    /// β₁ of AdamW.
    pub beta1: f64,
    /// β₂ of AdamW.
    pub beta2: f64,
    /// ε of AdamW.
    pub epsilon: f64,
    /// Norm the gradient is clipped to; 0 turns clipping off.
    pub clip: f64,
    /// Part of a text's tokens the encoder has to predict.
    pub encoder_mask_probability: f64,
    /// Part of a text's tokens hidden from each position of the enhanced decoder.
    pub decoder_mask_probability: f64,
    /// Weight of DupMAE's bag-of-words loss.
    pub bow_loss_weight: f64,
    /// Seed of all randomness.
    pub seed: u64,
    /// Arithmetic.
    pub precision: Precision,
    /// `auto`, `cpu`, `cuda` or `emulator`.
    pub device: String,
    /// Threads of the CPU; all cores when absent.
    pub threads: Option<usize>,
    /// Texts held out for evaluation; 1 % of the data, at most 1,000, when absent. 0 holds out none.
    pub eval_size: Option<u64>,
    /// Steps between evaluations; 0 evaluates only at the start and at the end.
    pub eval_every: u64,
    /// Steps between log lines.
    pub log_every: u64,
    /// Steps between checkpoints; 0 saves only at the end and when stopped.
    pub save_every: u64,
    /// Checkpoints kept.
    pub keep: usize,
    /// Steps in a row with a gradient that is not finite, after which the run stops.
    pub max_skipped: u64,
    /// Whether TensorBoard events are written.
    pub tensorboard: bool,
    /// Rows that bring queries and passages are in `data`; of which format. Found by the first row when absent.
    pub row_format: Option<RowFormat>,
    /// How titles of rows are joined to their texts.
    pub title_sep: Option<TitleSep>,
    /// Tokenizer for `data` and prefixes, where it does not lie beside the model.
    pub tokenizer: Option<PathBuf>,
    /// Folder of queries that `tokenize` wrote.
    pub queries: Option<PathBuf>,
    /// Folder of passages that `tokenize` wrote.
    pub corpus: Option<PathBuf>,
    /// Files of judgements.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub qrels: Vec<String>,
    /// Their format; found by the first line when absent.
    pub qrels_format: Option<QrelsFormat>,
    /// The lowest grade of a positive.
    pub least_grade: Option<i32>,
    /// Files of hard negatives.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub negatives: Vec<String>,
    /// Negatives by system: least distance to the lowest positive, of the cross-encoder's scores.
    pub ce_margin: Option<f64>,
    /// Negatives by system: how many of each.
    pub per_system: Option<usize>,
    /// Negatives by system: which systems; all when empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub systems: Vec<String>,
    /// Files of a teacher's scores.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub teacher_scores: Vec<String>,
    /// What happens to passages that the teacher did not score.
    pub missing_teacher: Option<MissingScore>,
    /// Passages of a query in a step, the positive among them.
    pub group_size: Option<usize>,
    /// Negatives are drawn from this many of the best ranked.
    pub negatives_depth: Option<usize>,
    /// Queries are cut to this many tokens.
    pub query_length: Option<usize>,
    /// Passages are cut to this many tokens.
    pub passage_length: Option<usize>,
    /// Text put before every query.
    pub query_prefix: Option<String>,
    /// Text put before every passage.
    pub passage_prefix: Option<String>,
    /// What an embedding is made of; that of the model when absent, else `[CLS]`.
    pub pooling: Option<Pooling>,
    /// What of a text is kept; the dense embedding alone when absent.
    pub representation: Option<Representation>,
    /// Words that a text keeps of a lexical representation.
    pub lexical_top_k: Option<usize>,
    /// Whether embeddings are scaled to length 1; as the model's own when absent, else not.
    pub normalize: Option<bool>,
    /// What scores are divided by.
    pub temperature: Option<f64>,
    /// Whether queries and passages have an encoder each.
    pub untied: Option<bool>,
    /// Width of a projection after pooling.
    pub projection: Option<usize>,
    /// What happens to passages of a batch that are positives of another query of it.
    pub duplicates: Option<Duplicates>,
    /// Whether the passages of all ranks are candidates of every query.
    pub cross_device_negatives: Option<bool>,
    /// Texts whose activations exist at a time.
    pub chunk: Option<usize>,
    /// How scores are compared with a teacher's.
    pub distill_loss: Option<DistillLoss>,
    /// Weight of the contrastive loss beside distillation.
    pub contrastive_loss_weight: Option<f64>,
    /// Folder of the dev set's queries that `tokenize` wrote.
    pub dev_queries: Option<PathBuf>,
    /// Files of the dev set's judgements.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dev_qrels: Vec<String>,
    /// Folder of the passages that the dev set is searched in; `corpus` when absent.
    pub dev_corpus: Option<PathBuf>,
    /// Passages of that corpus that are searched, the judged ones and random others; 0: all.
    pub dev_sample: Option<usize>,
    /// Run of the dev set's queries that a cross-encoder reranks.
    pub dev_run: Option<PathBuf>,
    /// What makes an evaluation the best: a metric of the dev set, or `loss`.
    pub best_metric: Option<String>,
    /// Evaluations in a row without a better one, after which the run ends.
    pub patience: Option<u64>,
    /// Whether the checkpoint of the best evaluation is kept and exported; when absent, with a dev set.
    pub keep_best: Option<bool>,
    /// The ranks that share the run: known from how it was started.
    #[serde(skip)]
    pub share: Share,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            objective: Objective::default(),
            model: None,
            config_file: None,
            config_name: None,
            data: None,
            output: None,
            resume: "auto".into(),
            batch_size: None,
            tokens_per_batch: None,
            accumulate: 1,
            max_length: None,
            epochs: None,
            steps: None,
            learning_rate: 1e-4,
            schedule: Decay::default(),
            warmup_ratio: None,
            warmup_steps: None,
            weight_decay: 0.01,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            clip: 1.0,
            encoder_mask_probability: 0.3,
            decoder_mask_probability: 0.5,
            bow_loss_weight: BOW_LOSS_WEIGHT,
            seed: 42,
            precision: Precision::default(),
            device: "auto".into(),
            threads: None,
            eval_size: None,
            eval_every: 500,
            log_every: 10,
            save_every: 500,
            keep: 3,
            max_skipped: 10,
            tensorboard: true,
            row_format: None,
            title_sep: None,
            tokenizer: None,
            queries: None,
            corpus: None,
            qrels: Vec::new(),
            qrels_format: None,
            least_grade: None,
            negatives: Vec::new(),
            ce_margin: None,
            per_system: None,
            systems: Vec::new(),
            teacher_scores: Vec::new(),
            missing_teacher: None,
            group_size: None,
            negatives_depth: None,
            query_length: None,
            passage_length: None,
            query_prefix: None,
            passage_prefix: None,
            pooling: None,
            representation: None,
            lexical_top_k: None,
            normalize: None,
            temperature: None,
            untied: None,
            projection: None,
            duplicates: None,
            cross_device_negatives: None,
            chunk: None,
            distill_loss: None,
            contrastive_loss_weight: None,
            dev_queries: None,
            dev_qrels: Vec::new(),
            dev_corpus: None,
            dev_sample: None,
            dev_run: None,
            best_metric: None,
            patience: None,
            keep_best: None,
            share: Share::default(),
        }
    }
}

impl Settings {
    /// `resume`, parsed.
    pub fn resume(&self) -> Resume {
        match self.resume.as_str() {
            "auto" => Resume::Auto,
            "never" => Resume::Never,
            path => Resume::From(path.into()),
        }
    }

    /// The learning rate of a run of `total` steps.
    pub fn schedule(&self, total: u64) -> Schedule {
        let ratio = self.warmup_ratio.unwrap_or(0.0);
        let warmup = self.warmup_steps.unwrap_or_else(|| (total as f64 * ratio).ceil() as u64);
        Schedule { peak: self.learning_rate, warmup, total, decay: self.schedule }
    }

    /// What makes an evaluation the best, of the figures `dev` and the held-out loss.
    pub fn best_metric(&self, dev: &[(Metric, f64)]) -> String {
        let first = || dev.first().map_or_else(|| LOSS.to_string(), |(metric, _)| metric.to_string());
        self.best_metric.clone().unwrap_or_else(first)
    }

    /// Whether the passages of other ranks are candidates.
    pub fn across(&self) -> bool {
        self.cross_device_negatives.unwrap_or(false) && self.share.ranks > 1
    }

    /// Whether the checkpoint of the best evaluation is kept and exported.
    pub fn keeps_best(&self) -> bool {
        self.keep_best.unwrap_or(!self.dev_qrels.is_empty())
    }
}
