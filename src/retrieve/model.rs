//! A bi-encoder with its tokenizer, as its folder says and the user overrules, ready to embed queries or passages.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ahash::AHashSet;

use super::embedder::{self, Embedder, Kind};
use super::embeddings::{Layout, Spec};
use super::encode::Job;
use super::encode::source::ShardTexts;
use super::npy::Stored;
use super::representation::Representation;
use crate::data::pairs::files::check_sets;
use crate::data::shard::{ShardSet, TitleSep};
use crate::data::source::{Format, Input};
use crate::data::tokenize::stream::{StreamOptions, TextStream};
use crate::data::tokenizer::Tokenizer;
use crate::device::{DType, Device, cpu};
use crate::error::{Error, Result};
use crate::files::hex;
use crate::graph::biencoder::Shape;
use crate::model::digest;
use crate::model::towers::Towers;
use crate::ops::lexical::{MAX_K, MAX_VOCABULARY};
use crate::retrieve::encode::source::Source;

/// What the user says of a model; what is not said is as in its folder.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// Tokenizer's folder or file.
    pub tokenizer: Option<PathBuf>,
    /// What embeddings are made of.
    pub pooling: Option<crate::ops::pool::Pooling>,
    /// Whether embeddings are scaled to length 1.
    pub normalize: Option<bool>,
    /// Tokens through the model at once.
    pub batch_tokens: Option<usize>,
}

/// How texts of one kind are embedded and stored.
#[derive(Clone, Debug)]
pub struct Texts {
    /// Queries or passages.
    pub kind: Kind,
    /// Longest text in tokens; none: what the folder says, else what the model can take.
    pub max_length: Option<usize>,
    /// Text put before every text; none: the folder's prompt.
    pub prefix: Option<String>,
    /// Type of the stored numbers.
    pub stored: Stored,
    /// How the files are laid out.
    pub layout: Layout,
    /// Rows of a file.
    pub shard_rows: Option<u64>,
    /// Replaces embeddings that are there.
    pub overwrite: bool,
    /// What of a text is kept.
    pub representation: Representation,
    /// Tokens of a lexical embedding.
    pub lexical_top_k: usize,
}

/// Tokens of a lexical embedding unless another number is asked for.
pub const LEXICAL_TOP_K: usize = 128;

impl Texts {
    /// As the model's folder says, in f32.
    pub fn new(kind: Kind) -> Texts {
        Texts {
            kind,
            max_length: None,
            prefix: None,
            stored: Stored::F32,
            layout: Layout::Npy,
            shard_rows: None,
            overwrite: false,
            representation: Representation::Cls,
            lexical_top_k: LEXICAL_TOP_K,
        }
    }
}

/// How raw text is read.
#[derive(Clone, Debug)]
pub struct Reading {
    /// How titles are joined.
    pub title_sep: TitleSep,
    /// Overrules the detection of formats.
    pub format: Option<Format>,
    /// Plain text is separated by blank lines.
    pub blank_lines: bool,
    /// Documents with other ids are passed over.
    pub only: Option<AHashSet<String>>,
}

/// An opened model.
pub struct Model {
    name: String,
    path: PathBuf,
    towers: Towers,
    tokenizer: Option<Arc<Tokenizer>>,
    digest: String,
    shape: Shape,
    batch_tokens: Option<usize>,
    /// A line worth telling.
    pub note: Option<String>,
}

impl Model {
    /// Opens the model at `path`, which the user called `name`.
    ///
    /// # Errors
    /// A folder that is no bi-encoder, or a tokenizer that is not its own.
    pub fn open(name: &str, path: &Path, overrides: &Overrides) -> Result<Model> {
        let towers = Towers::open(path)?;
        let tokenizer = match overrides.tokenizer.as_deref().or_else(|| towers.tokenizer()) {
            Some(path) => {
                let tokenizer = Tokenizer::load(path)?;
                if tokenizer.vocab_size() as usize > towers.config.vocab_size {
                    let (has, size) = (tokenizer.vocab_size(), towers.config.vocab_size);
                    return Err(Error::refused(format!("has {has} tokens where the model has {size}"))
                        .path(path)
                        .remedy("give the model's own tokenizer"));
                }
                Some(Arc::new(tokenizer))
            }
            None => None,
        };
        let settings = &towers.settings;
        let said = overrides.pooling.or(settings.pooling);
        let shape = Shape {
            pooling: said.unwrap_or_default(),
            projection: towers.projection,
            normalize: overrides.normalize.or(settings.normalize).unwrap_or(false),
        };
        let note = said.is_none().then(|| {
            format!("{name} does not say how it pools: the state of [CLS] is taken (--pooling mean takes the mean)")
        });
        let digest = digest::of(Some(path), &towers.config, digest::Parts::Inference)?;
        let (name, path, batch_tokens) = (name.to_string(), path.to_path_buf(), overrides.batch_tokens);
        Ok(Model { name, path, towers, tokenizer, digest, shape, batch_tokens, note })
    }

    /// Whether queries and passages have an encoder each.
    pub fn untied(&self) -> bool {
        self.towers.untied()
    }

    fn tokenizer(&self) -> Result<&Arc<Tokenizer>> {
        self.tokenizer
            .as_ref()
            .ok_or_else(|| Error::refused("holds no tokenizer").path(&self.path).remedy("name one with --tokenizer"))
    }

    /// What encoding `texts` on a device comes to.
    ///
    /// # Errors
    /// A length that the model cannot take, or that the prefix fills; lexical embeddings of a model without an MLM head.
    pub fn job(&self, (device, storage): (Device, DType), texts: &Texts) -> Result<Job> {
        let (config, settings, tokenizer) = (&self.towers.config, &self.towers.settings, self.tokenizer()?);
        let most = config.max_position_embeddings;
        let (representation, k) = (texts.representation, texts.lexical_top_k);
        match texts.layout {
            Layout::Pyserini if !representation.lexical() => {
                return Err(Error::usage("--format pyserini holds lexical embeddings")
                    .remedy("add --representation lexical or both"));
            }
            Layout::FaissFlat | Layout::Retromae if representation.lexical() => {
                return Err(Error::usage("this --format holds dense embeddings alone")
                    .remedy("use --format npy or pyserini, or --representation cls"));
            }
            _ => {}
        }
        if representation.lexical() {
            self.towers.require_mlm_head(texts.kind.side())?;
            if config.vocab_size > MAX_VOCABULARY {
                let cause = format!("{} tokens; lexical embeddings have at most {MAX_VOCABULARY}", config.vocab_size);
                return Err(Error::refused(cause).path(&self.path).remedy("use --representation cls"));
            }
            // Beyond the tokenizer's last id a vocabulary has rows that mean nothing.
            let words = tokenizer.vocab_size() as usize;
            if k == 0 || k > MAX_K.min(words) {
                return Err(Error::usage(format!("the {k} largest of {words} tokens"))
                    .remedy(format!("choose --lexical-top-k 1 to {}", MAX_K.min(words))));
            }
        }
        let max_len = texts.max_length.unwrap_or_else(|| settings.max_seq_length.unwrap_or(most).min(most));
        if max_len > most {
            return Err(Error::usage(format!("texts of {max_len} tokens; the model takes {most}"))
                .remedy(format!("choose --max-length {most} or less")));
        }
        let own = settings.prompts[texts.kind.side()].clone().unwrap_or_default();
        let prefix = texts.prefix.clone().unwrap_or(own);
        let tokens = tokenizer.ids(&prefix)?;
        if max_len < tokens.len() + 3 {
            let cause =
                format!("{max_len} tokens leave no room beside [CLS], [SEP] and {} of the prefix", tokens.len());
            return Err(Error::usage(cause).remedy(format!("choose a length of {} or more", tokens.len() + 3)));
        }
        let arithmetic = if storage == DType::BF16 || cpu::bf16_products() { "bf16" } else { "fp32" };
        let spec = Spec {
            representation,
            lexical_top_k: if representation.lexical() { k } else { 0 },
            vocab_size: if representation.lexical() { config.vocab_size } else { 0 },
            dim: if representation.dense() { self.shape.width(config) } else { 0 },
            dtype: texts.stored,
            normalized: self.shape.normalize,
            pooling: self.shape.pooling,
            prefix,
            max_len,
            side: texts.kind.name().to_string(),
            model_sha256: self.digest.clone(),
            model: self.name.clone(),
            computed: format!("{arithmetic} on {}", if device.is_gpu() { "a GPU" } else { "a CPU" }),
        };
        Ok(Job {
            spec,
            prefix: tokens,
            special: tokenizer.special(),
            layout: texts.layout,
            shard_rows: texts.shard_rows,
            overwrite: texts.overwrite,
            tokenizer: tokenizer.clone(),
        })
    }

    /// The documents of `inputs`, for `job`.
    ///
    /// # Errors
    /// A model without a tokenizer.
    pub fn documents(&self, job: &Job, inputs: Vec<Input>, reading: Reading) -> Result<Source> {
        let Reading { title_sep, format, blank_lines, only } = reading;
        let options = StreamOptions { title_sep, tokens: room(job), format, blank_lines, only };
        Ok(Source::Texts(Box::new(TextStream::new(inputs, self.tokenizer()?.clone(), options))))
    }

    /// The texts of the sets of shards in `dirs`, for `job`.
    ///
    /// # Errors
    /// Shards of another tokenizer, or of blocks.
    pub fn shards(&self, job: &Job, dirs: &[PathBuf]) -> Result<Source> {
        let shards = ShardTexts::open(dirs, room(job))?;
        let fingerprint = hex(&self.tokenizer()?.fingerprint());
        check_sets(&shards.sets().iter().collect::<Vec<&ShardSet>>(), Some(&fingerprint))?;
        Ok(Source::Shards(shards))
    }

    /// The encoder of queries or passages, for `job`.
    ///
    /// # Errors
    /// As [`Embedder::new`].
    pub fn embedder(&self, target: (Device, DType), kind: Kind, job: &Job) -> Result<Embedder> {
        let capacity = embedder::capacity(target.0, &self.towers.config, job.spec.max_len, self.batch_tokens);
        let kept = (job.spec.representation, job.spec.lexical_top_k);
        Embedder::new(target, &self.towers, self.shape, kind, capacity, kept)
    }
}

/// Tokens kept of a text beside `[CLS]`, `[SEP]` and the prefix.
fn room(job: &Job) -> usize {
    job.spec.max_len - 2 - job.prefix.len()
}
