//! The flags of `train` that only fine-tuning knows.

use std::path::PathBuf;

use clap::Args;
use clap::builder::BoolishValueParser;
use serde::Serialize;

use crate::data::pairs::MissingScore;
use crate::data::pairs::batch::Duplicates;
use crate::data::pairs::qrels::QrelsFormat;
use crate::data::pairs::rows::RowFormat;
use crate::data::shard::TitleSep;
use crate::ops::pool::Pooling;
use crate::retrieve::representation::Representation;
use crate::train::biencoder::DistillLoss;

/// Settings given on the command line; what is absent comes from the configuration file or has its default.
#[derive(Debug, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = "Fine-tuning")]
pub(super) struct Flags {
    /// Queries: a folder that tokenize wrote
    #[arg(long, value_name = "DIR")]
    queries: Option<PathBuf>,
    /// Passages: a folder that tokenize wrote
    #[arg(long, value_name = "DIR")]
    corpus: Option<PathBuf>,
    /// Which passages answer which queries: RetroMAE's lists, TREC's, MS MARCO's or BEIR's judgements; several files
    #[arg(long, value_name = "FILE", num_args = 1..)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    qrels: Vec<String>,
    /// Format of the judgements, where the first line does not tell
    #[arg(long, value_enum)]
    qrels_format: Option<QrelsFormat>,
    /// Lowest grade of a passage that answers its query [default: 1]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    least_grade: Option<i32>,
    /// Hard negatives: lists by query, triples, or sentence-transformers' negatives by system; several files
    #[arg(long, value_name = "FILE", num_args = 1..)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    negatives: Vec<String>,
    /// Negatives by system: take those whose cross-encoder score is this far below that of the lowest positive [default: 3]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    ce_margin: Option<f64>,
    /// Negatives by system: take this many of each [default: all]
    #[arg(long, value_name = "N")]
    per_system: Option<usize>,
    /// Negatives by system: take those of these systems [default: all]
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    systems: Vec<String>,
    /// A teacher's scores of queries and passages, which are then learned from; several files
    #[arg(long, value_name = "FILE", num_args = 1..)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    teacher_scores: Vec<String>,
    /// What happens to passages that the teacher did not score [default: error]
    #[arg(long, value_enum)]
    missing_teacher: Option<MissingScore>,
    /// Format of the rows in --data, where the first one does not tell
    #[arg(long, value_enum)]
    row_format: Option<RowFormat>,
    /// What joins title and text of rows [default: space]
    #[arg(long, value_enum)]
    title_sep: Option<TitleSep>,
    /// Tokenizer, where it does not lie beside the model
    #[arg(long, value_name = "DIR|FILE")]
    tokenizer: Option<PathBuf>,
    /// Passages of a query in a step: its positive and hard negatives, filled up with random passages [default: 8 with --negatives or
    /// --data, or for a cross-encoder; else 1: the other passages of the batch alone]
    #[arg(long, value_name = "N")]
    group_size: Option<usize>,
    /// Draw negatives from this many of the best ranked [default: 200]
    #[arg(long, value_name = "N")]
    negatives_depth: Option<usize>,
    /// Cut queries to this many tokens [default: 32; cross-encoder: half of --max-length]
    #[arg(long, value_name = "N")]
    query_length: Option<usize>,
    /// Cut passages to this many tokens [default: 128]
    #[arg(long, value_name = "N")]
    passage_length: Option<usize>,
    /// Text put before every query [default: that of the model]
    #[arg(long, value_name = "TEXT")]
    query_prefix: Option<String>,
    /// Text put before every passage [default: that of the model]
    #[arg(long, value_name = "TEXT")]
    passage_prefix: Option<String>,
    /// What an embedding is made of [default: that of the model, else cls]
    #[arg(long, value_enum)]
    pooling: Option<Pooling>,
    /// What of a text is trained: cls, its dense embedding, or both, the words of the MLM head beside it, scores added [default: cls]
    #[arg(long, value_enum)]
    representation: Option<Representation>,
    /// Keep this many words of a text [default: 128]
    #[arg(long, value_name = "K")]
    lexical_top_k: Option<usize>,
    /// Scale embeddings to length 1 [default: as the model does, else false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    normalize: Option<bool>,
    /// What scores are divided by [default: 1, or 0.05 where embeddings have length 1]
    #[arg(long, value_name = "X")]
    temperature: Option<f64>,
    /// Train an encoder each for queries and passages [default: as the model has]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    untied: Option<bool>,
    /// Project embeddings to this width [default: as the model does]
    #[arg(long, value_name = "N")]
    projection: Option<usize>,
    /// What happens to passages of a batch that answer another of its queries, too [default: mask]
    #[arg(long, value_enum)]
    duplicates: Option<Duplicates>,
    /// Many devices: every query against the passages of all of them, as in one batch of all [default: those of its own device]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    cross_device_negatives: Option<bool>,
    /// Keep the activations of this many texts at a time, so that large batches need little memory [default: all]
    #[arg(long, value_name = "N")]
    chunk: Option<usize>,
    /// How scores are compared with a teacher's [default: kl]
    #[arg(long, value_enum)]
    distill_loss: Option<DistillLoss>,
    /// Weight of the contrastive loss beside a teacher's [default: 1e-4]
    #[arg(long, value_name = "X")]
    contrastive_loss_weight: Option<f64>,
    /// Dev set: its queries, a folder that tokenize wrote
    #[arg(long, value_name = "DIR")]
    dev_queries: Option<PathBuf>,
    /// Dev set: its judgements; several files
    #[arg(long, value_name = "FILE", num_args = 1..)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    dev_qrels: Vec<String>,
    /// Dev set: its passages, a folder that tokenize wrote [default: --corpus]
    #[arg(long, value_name = "DIR")]
    dev_corpus: Option<PathBuf>,
    /// Dev set: search this many passages, the judged ones and random others; 0: all [default: 100000]
    #[arg(long, value_name = "N")]
    dev_sample: Option<usize>,
    /// Dev set of a cross-encoder: the lists that it reranks, a run
    #[arg(long, value_name = "RUN")]
    dev_run: Option<PathBuf>,
}
