//! Writes a model folder that others can load as it stands: transformers (old and new), sentence-transformers (old and new) and
//! text-embeddings-inference, with the enhanced decoder beside it so that pre-training can go on from an export.
//!
//! Which file must hold what, and why, was found out by loading such folders in both generations of those libraries; the constants of
//! `layout` keep those findings. A folder is written beside its final place and renamed: it is whole or not there. Its manifest
//! (`retromae_run.json`) holds size and checksum of every file but the model card, which people edit.
//!
//! Two encoders that differ are two complete folders inside one, named as [`SIDES`] and under one manifest.

mod layout;
pub(crate) mod staging;

use super::card;
use super::config::BertConfig;
use super::element::Dtype;
use super::names::{self, Param};
use super::safetensors::writer::{Spec, Writer};
use super::small_file;
use super::tensor_file::Info;
use super::tokenizer_files;
use super::towers::{PROJECTION, PROJECTIONS, SIDES};
use super::weights::ENHANCED_DECODER;
use crate::error::{Error, IoContext, Result};
use crate::files::Disk;
use serde_json::{Map, Value, json};
use staging::Staging;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

pub use crate::ops::pool::Pooling;

/// Manifest and provenance of an exported folder.
pub const MANIFEST: &str = "retromae_run.json";
const CARD: &str = "README.md";
const DIGEST_KEY: &str = "retromae_engine.digest";
const DIGEST_PREFIX: &str = "crc32c:";
/// Largest manifest that is read.
const MAX_MANIFEST: u64 = 16 << 20;
const AGAIN: &str = "export the model again";

/// What the model is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExportKind {
    /// Pre-trained encoder with its MLM head; also loads as a CLS-pooled sentence encoder.
    MaskedLm,
    /// Sentence encoder.
    BiEncoder {
        /// How token states become one embedding.
        pooling: Pooling,
        /// Whether embeddings are scaled to length 1.
        normalize: bool,
        /// Width of the projection after pooling, where there is one: [`PROJECTION`] among the source's parameters, or [`PROJECTIONS`].
        projection: Option<usize>,
        /// Whether the MLM head goes with it, which lexical representations are made with.
        lexical: bool,
        /// Whether queries and passages have an encoder each; the source has the names of [`SIDES`] before those of its parameters.
        untied: bool,
    },
    /// Reranker with one logit.
    CrossEncoder,
}

/// What to export, and how.
#[derive(Clone, Debug)]
pub struct ExportSpec {
    /// Configuration of the model.
    pub config: BertConfig,
    /// What the model is for.
    pub kind: ExportKind,
    /// Element type of the weights: F32, F16 or BF16.
    pub dtype: Dtype,
    /// Folder (or `tokenizer.json` / `vocab.txt` file) the tokenizer is copied from.
    pub tokenizer: PathBuf,
    /// Longest input, in tokens. Other programs take that of a reranker from the tokenizer, whose files are copied as they are: there
    /// it is written only where they do not say it, and to the model card.
    pub max_seq_length: usize,
    /// Whether the source has the pooler of the model it began from (of each of two encoders), which is then passed on untouched.
    pub pooler: bool,
    /// Whether the source has the enhanced decoder.
    pub enhanced_decoder: bool,
    /// Text put before queries and documents, empty for none.
    pub prompts: [String; 2],
    /// Where the model comes from: written to the manifest and, for strings and numbers, to the model card.
    pub provenance: Map<String, Value>,
    /// Hub name of the model that training began from.
    pub base_model: Option<String>,
    /// Largest file of weights; beyond it they are split.
    pub max_shard_bytes: u64,
    /// Whether an earlier export of the same name is replaced.
    pub replace: bool,
}

impl ExportSpec {
    /// The usual choices: f32, the longest input the model takes, no pooler, no enhanced decoder, no prompts, 5 GB a file.
    pub fn new(config: BertConfig, kind: ExportKind, tokenizer: impl Into<PathBuf>) -> Self {
        ExportSpec {
            max_seq_length: config.max_position_embeddings,
            config,
            kind,
            dtype: Dtype::F32,
            tokenizer: tokenizer.into(),
            pooler: false,
            enhanced_decoder: false,
            prompts: [String::new(), String::new()],
            provenance: Map::new(),
            base_model: None,
            max_shard_bytes: 5_000_000_000,
            replace: false,
        }
    }

    /// The parameters that go into the weights of the model, or of either encoder, under canonical names.
    pub fn params(&self) -> Vec<Param> {
        let mut params = names::encoder(&self.config);
        let cross = self.kind == ExportKind::CrossEncoder;
        if self.pooler || cross {
            params.extend(names::pooler(&self.config));
        }
        if self.has_mlm_head() {
            params.extend(names::mlm_head(&self.config));
        }
        if cross {
            params.extend(names::classifier(&self.config, 1));
        }
        params
    }

    /// Whether the MLM head is part of the weights, which then have the names that it comes with.
    pub(super) fn has_mlm_head(&self) -> bool {
        matches!(self.kind, ExportKind::MaskedLm | ExportKind::BiEncoder { lexical: true, .. })
    }

    /// The encoders of the folder.
    fn sides(&self) -> Vec<Side> {
        match self.kind {
            ExportKind::BiEncoder { untied: true, .. } => {
                let side =
                    |i: usize| Side { folder: SIDES[i], prefix: format!("{}.", SIDES[i]), projection: PROJECTIONS[i] };
                (0..SIDES.len()).map(side).collect()
            }
            _ => vec![Side { folder: "", prefix: String::new(), projection: PROJECTION }],
        }
    }

    fn check(&self) -> Result<()> {
        self.config.check()?;
        if !matches!(self.dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16) {
            return Err(Error::usage(format!("weights cannot be exported as {}", self.dtype.name()))
                .remedy("use f32, bf16 or f16"));
        }
        let longest = self.config.max_position_embeddings;
        if self.max_seq_length == 0 || self.max_seq_length > longest {
            let cause = format!("a longest input of {} tokens does not fit {longest} positions", self.max_seq_length);
            return Err(Error::usage(cause).remedy(format!("choose 1 to {longest}")));
        }
        Ok(())
    }
}

/// One of the encoders of a folder.
struct Side {
    /// Its folder inside the exported one; empty for that itself.
    folder: &'static str,
    /// What stands before the names of its parameters in the source.
    prefix: String,
    /// What the source calls its projection.
    projection: &'static str,
}

/// Hands out the parameter with this name, canonical but for the side before it, as f32: replaces the contents of the vector.
pub type Source<'a> = dyn FnMut(&str, &mut Vec<f32>) -> Result<()> + 'a;

/// Writes the folder `target`. One tensor is held at a time.
///
/// # Errors
/// The target exists, the tokenizer is missing, a value is not finite, the source or the system fails; nothing is left behind.
pub fn export(spec: &ExportSpec, target: impl AsRef<Path>, source: &mut Source<'_>) -> Result<()> {
    export_on(&Disk::default(), spec, target.as_ref(), source)
}

/// [`export`] on this disk.
///
/// # Errors
/// As [`export`].
pub fn export_on(disk: &Disk, spec: &ExportSpec, target: &Path, source: &mut Source<'_>) -> Result<()> {
    spec.check()?;
    let mut staging = Staging::begin(disk, target, spec.replace, MANIFEST)?;
    for side in spec.sides() {
        staging.enter(side.folder);
        write_model(spec, &side, &mut staging, source)?;
        staging.write(CARD, card::render(spec, &target.join(side.folder)).as_bytes())?;
    }
    staging.enter("");
    if spec.enhanced_decoder {
        // f32 whatever the model's type: only this engine reads it, to train on.
        let named = names::enhanced_decoder(&spec.config).into_iter().map(|p| (p.name.clone(), p)).collect();
        write_file(&mut staging, ENHANCED_DECODER, Dtype::F32, named, source)?;
    }
    if !staging.has(CARD) {
        staging.write(CARD, card::of_two(spec, target).as_bytes())?;
    }
    let manifest = manifest(spec, &staging, target)?;
    staging.write(MANIFEST, manifest.as_bytes())?;
    staging.commit()
}

/// Everything of one encoder.
fn write_model(spec: &ExportSpec, side: &Side, staging: &mut Staging, source: &mut Source<'_>) -> Result<()> {
    let text = pretty(&Value::Object(layout::config(spec)));
    staging.write("config.json", text.as_bytes())?;
    let longest = match spec.kind {
        ExportKind::CrossEncoder => spec.max_seq_length,
        _ => spec.config.max_position_embeddings,
    };
    tokenizer_files::write(&spec.tokenizer, longest, staging)?;
    for (name, contents) in layout::sentence_transformer_files(spec) {
        staging.write(name, pretty(&contents).as_bytes())?;
    }
    write_weights(spec, side, staging, source)?;
    if let ExportKind::BiEncoder { projection: Some(width), .. } = spec.kind {
        write_dense(spec, (side.projection, width), staging, source)?;
    }
    Ok(())
}

/// The weights of an encoder, in one file or several.
fn write_weights(spec: &ExportSpec, side: &Side, staging: &mut Staging, source: &mut Source<'_>) -> Result<()> {
    let params = spec.params();
    let named = |p: &Param| Param { name: format!("{}{}", side.prefix, p.name), shape: p.shape.clone() };
    let bare = matches!(spec.kind, ExportKind::BiEncoder { .. }) && !spec.has_mlm_head();
    let file_name = |p: &Param| if bare { names::without_prefix(&p.name).to_string() } else { p.name.clone() };
    let mut shards: Vec<Vec<(String, Param)>> = vec![Vec::new()];
    let (mut held, mut total) = (0, 0);
    for param in &params {
        let bytes = (param.len() * spec.dtype.size()) as u64;
        if held > 0 && held + bytes > spec.max_shard_bytes {
            shards.push(Vec::new());
            held = 0;
        }
        held += bytes;
        total += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push((file_name(param), named(param)));
        }
    }
    let count = shards.len();
    if count == 1 {
        return write_file(staging, "model.safetensors", spec.dtype, shards.remove(0), source);
    }
    let mut weight_map = Map::new();
    for (i, shard) in shards.into_iter().enumerate() {
        let name = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
        weight_map.extend(shard.iter().map(|(tensor, _)| (tensor.clone(), json!(name))));
        write_file(staging, &name, spec.dtype, shard, source)?;
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    staging.write("model.safetensors.index.json", pretty(&index).as_bytes())
}

/// One safetensors file; each parameter, named as the source has it, comes with the name it has in the file.
fn write_file(
    staging: &mut Staging,
    relative: &str,
    dtype: Dtype,
    params: Vec<(String, Param)>,
    source: &mut Source<'_>,
) -> Result<()> {
    let specs = params
        .iter()
        .map(|(name, p)| Spec { name: name.clone(), info: Info { dtype, shape: p.shape.clone() } })
        .collect();
    let mut writer = Writer::create_on(staging.disk(), &staging.place(relative)?, specs, &[])?;
    let mut values = Vec::new();
    for (name, param) in params {
        source(&param.name, &mut values)?;
        writer.write_f32(&name, &values)?;
    }
    let written = writer.finish()?;
    staging.record(relative, written);
    Ok(())
}

fn write_dense(
    spec: &ExportSpec,
    (projection, width): (&str, usize),
    staging: &mut Staging,
    source: &mut Source<'_>,
) -> Result<()> {
    let parts = [("weight", vec![width, spec.config.hidden_size]), ("bias", vec![width])];
    let named = |(part, shape)| (format!("linear.{part}"), Param { name: format!("{projection}.{part}"), shape });
    write_file(staging, "2_Dense/model.safetensors", spec.dtype, parts.map(named).into(), source)
}

/// The manifest with its own digest filled in.
fn manifest(spec: &ExportSpec, staging: &Staging, target: &Path) -> Result<String> {
    let files: Map<String, Value> = staging
        .files()
        .iter()
        .filter(|(name, _)| Path::new(name).file_name().is_none_or(|n| n != CARD))
        .map(|(name, w)| (name.clone(), json!({"size": w.size, "crc32c": format!("{:08x}", w.crc32c)})))
        .collect();
    let text = pretty(&json!({
        "engine": "retromae-engine",
        "version": env!("CARGO_PKG_VERSION"),
        "kind": layout::kind_name(&spec.kind),
        "base_model": spec.base_model,
        "max_seq_length": spec.max_seq_length,
        "provenance": spec.provenance,
        "files": files,
        DIGEST_KEY: format!("{DIGEST_PREFIX}00000000"),
    }));
    let at = digits(&text).ok_or_else(|| {
        Error::refused(format!("the provenance has a key {DIGEST_KEY}"))
            .path(target)
            .remedy("give the key another name")
    })?;
    let digest = format!("{:08x}", crc32c::crc32c(text.as_bytes()));
    Ok(format!("{}{digest}{}", &text[..at], &text[at + 8..]))
}

/// Where the eight digits of a manifest's digest begin, if there is exactly one.
fn digits(text: &str) -> Option<usize> {
    let marker = format!("\"{DIGEST_KEY}\": \"{DIGEST_PREFIX}");
    let mut found = text.match_indices(&marker);
    let at = found.next()?.0 + marker.len();
    (found.next().is_none() && text.get(at..at + 8).is_some()).then_some(at)
}

/// Checks every file of an exported folder against its manifest. Files that others added are left alone.
///
/// # Errors
/// The first three of everything that is wrong, and the count.
pub fn verify_export(folder: impl AsRef<Path>) -> Result<()> {
    let folder = folder.as_ref();
    let path = folder.join(MANIFEST);
    let refuse = |cause: &str| Error::refused(cause).path(&path).remedy(AGAIN);
    let text = small_file::text(&path, MAX_MANIFEST, "the manifest of an export")?;
    let at = digits(&text).ok_or_else(|| refuse("its digest is missing"))?;
    let blank = format!("{}00000000{}", &text[..at], &text[at + 8..]);
    if text[at..at + 8] != format!("{:08x}", crc32c::crc32c(blank.as_bytes())) {
        return Err(refuse("does not match its digest"));
    }
    let manifest: Map<String, Value> = serde_json::from_str(&text).map_err(|e| refuse(&format!("not JSON: {e}")))?;
    let Some(files) = manifest.get("files").and_then(Value::as_object) else { return Err(refuse("lists no files")) };
    let mut errors = Vec::new();
    for (name, entry) in files {
        if Path::new(name).components().any(|c| !matches!(c, Component::Normal(_))) {
            return Err(refuse(&format!("lists {name}, which lies outside the folder")));
        }
        let expected = (entry.get("size").and_then(Value::as_u64), entry.get("crc32c").and_then(Value::as_str));
        let (Some(size), Some(crc)) = expected else { return Err(refuse(&format!("has no digest of {name}"))) };
        if let Err(e) = verify_file(&folder.join(name), size, crc) {
            errors.push(e);
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(Error::several(errors)) }
}

fn verify_file(path: &Path, size: u64, crc: &str) -> Result<()> {
    let mut file = std::fs::File::open(path).at(path, "cannot read")?;
    let (mut buffer, mut actual, mut length) = (vec![0; 1 << 20], 0, 0);
    loop {
        let count = file.read(&mut buffer).at(path, "cannot read")?;
        if count == 0 {
            break;
        }
        actual = crc32c::crc32c_append(actual, &buffer[..count]);
        length += count as u64;
    }
    let cause = if length != size {
        format!("{length} bytes instead of {size}")
    } else if crc != format!("{actual:08x}") {
        "the contents changed since the export".to_string()
    } else {
        return Ok(());
    };
    Err(Error::refused(cause).path(path).remedy(AGAIN))
}

/// Indented JSON with a final newline, as the files of the hub look.
pub(super) fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}
