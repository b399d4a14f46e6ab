//! What a folder of sentence-transformers says of a model beside its weights: pooling, normalisation, prompts, the longest text.
//!
//! Folders written by any generation of the library are read, and this engine's own. A folder that describes a computation which the
//! engine does not have is refused: its embeddings would be others.

use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value};

use super::export::MANIFEST;
use super::small_file;
use crate::error::{Error, Result};
use crate::ops::pool::Pooling;

/// List of the modules of a SentenceTransformer.
const MODULES: &str = "modules.json";
/// Largest of these files that is read; a manifest lists every file of a large model.
const LARGEST: u64 = 16 << 20;
const ANOTHER: &str = "use a model with mean or CLS pooling, at most one linear Dense, and Normalize";

/// What a folder says; `None` where it says nothing, as that of a plain BERT.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SentenceSettings {
    /// How token states become one embedding.
    pub pooling: Option<Pooling>,
    /// Whether embeddings are scaled to length 1.
    pub normalize: Option<bool>,
    /// Text put before queries and before passages; empty for none.
    pub prompts: [Option<String>; 2],
    /// Longest text, in tokens.
    pub max_seq_length: Option<usize>,
}

impl SentenceSettings {
    /// Reads the settings of the model in `folder`.
    ///
    /// # Errors
    /// A malformed file, or a computation that the engine does not have.
    pub fn read(folder: &Path) -> Result<SentenceSettings> {
        Modules::read(folder).map(|modules| modules.settings)
    }

    /// The settings of queries' and passages' encoders as one: what both compute must agree.
    pub(super) fn joined(self, other: SentenceSettings, path: &Path) -> Result<SentenceSettings> {
        if (self.pooling, self.normalize) != (other.pooling, other.normalize) {
            return Err(Error::refused("pools or normalises otherwise than the encoder of the queries")
                .path(path)
                .remedy("use two encoders of one kind"));
        }
        let ([query, _], [_, passage]) = (self.prompts, other.prompts);
        let max_seq_length = [self.max_seq_length, other.max_seq_length].into_iter().flatten().min();
        Ok(SentenceSettings { prompts: [query, passage], max_seq_length, ..self })
    }
}

/// A folder's settings and where its parts are.
#[derive(Debug)]
pub(super) struct Modules {
    pub settings: SentenceSettings,
    /// Folder of configuration, weights and tokenizer.
    pub transformer: PathBuf,
    /// Folder of the projection.
    pub dense: Option<PathBuf>,
}

impl Modules {
    /// Reads the modules of the model in `folder`; without a list of them it is a plain BERT.
    pub fn read(folder: &Path) -> Result<Modules> {
        let list = folder.join(MODULES);
        let mut modules =
            Modules { settings: SentenceSettings::default(), transformer: folder.to_path_buf(), dense: None };
        if !list.is_file() {
            modules.settings.max_seq_length = max_seq_length(folder, &SAID[1..2])?;
            return Ok(modules);
        }
        let refuse = |cause: String| Err(Error::refused(cause).path(&list).remedy(ANOTHER));
        let text = small_file::text(&list, LARGEST, "a list of modules")?;
        let entries: Vec<Map<String, Value>> =
            serde_json::from_str(&text).map_err(|e| malformed(&list, &format!("not a list of modules: {e}")))?;
        // What may follow what has been seen: another order is another function.
        let mut before = 0;
        for entry in &entries {
            let word = |key: &str| entry.get(key).and_then(Value::as_str);
            let (Some(class), Some(path)) = (word("type"), word("path")) else {
                return Err(malformed(&list, "a module has no type or no path"));
            };
            if Path::new(path).components().any(|c| !matches!(c, Component::Normal(_))) {
                return Err(malformed(&list, &format!("the module {path} lies outside the folder")));
            }
            let (name, place) = (class.rsplit('.').next().unwrap_or(class), folder.join(path));
            let rank = match name {
                "Transformer" => 1,
                "Pooling" => 2,
                "Dense" => 3,
                "Normalize" => 4,
                _ => return refuse(format!("the module {class} is none that the engine has")),
            };
            if rank == before {
                return refuse(format!("there are two modules {name}"));
            }
            if rank < before || (before == 0) != (rank == 1) {
                return refuse(format!("the module {name} is not where the engine can have it"));
            }
            before = rank;
            match rank {
                1 => modules.transformer = if path.is_empty() { folder.to_path_buf() } else { place },
                2 => modules.settings.pooling = Some(pooling(&place.join("config.json"))?),
                3 => modules.dense = Some(place),
                _ => modules.settings.normalize = Some(true),
            }
        }
        if modules.settings.pooling.is_none() {
            return refuse("there is no module Pooling".into());
        }
        modules.settings.normalize.get_or_insert(false);
        modules.settings.prompts = prompts(&folder.join("config_sentence_transformers.json"))?;
        modules.settings.max_seq_length = max_seq_length(&modules.transformer, &SAID)?;
        Ok(modules)
    }
}

/// The keys of a JSON file.
pub(super) fn object(path: &Path) -> Result<Map<String, Value>> {
    let text = small_file::text(path, LARGEST, "a JSON file of a model")?;
    serde_json::from_str(&text).map_err(|e| malformed(path, &format!("not a JSON object: {e}")))
}

fn malformed(path: &Path, cause: &str) -> Error {
    Error::refused(cause).path(path).remedy("get the model again")
}

/// The pooling that `1_Pooling/config.json` describes: one boolean for each kind, or a name, or both.
fn pooling(path: &Path) -> Result<Pooling> {
    let keys = object(path)?;
    let refuse = |cause: String| Err(Error::refused(cause).path(path).remedy(ANOTHER));
    let on = keys.iter().filter(|(_, value)| **value == Value::Bool(true));
    let flags: Vec<&str> = on
        .filter_map(|(key, _)| key.strip_prefix("pooling_mode_"))
        .map(|kind| match kind {
            "cls_token" => "cls",
            "mean_tokens" => "mean",
            other => other,
        })
        .collect();
    let named: Vec<&str> = match keys.get("pooling_mode") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::String(name)) => vec![name],
        Some(Value::Array(list)) => list.iter().map(|name| name.as_str().unwrap_or("?")).collect(),
        Some(other) => return refuse(format!("pooling_mode {other} is no kind of pooling")),
    };
    let mut kinds = flags.clone();
    kinds.extend(named.iter().filter(|name| !flags.contains(name)));
    if keys.get("include_prompt") == Some(&Value::Bool(false)) {
        return refuse("include_prompt is false: prompts are left out of the pooling".into());
    }
    match kinds[..] {
        ["cls"] => Ok(Pooling::Cls),
        ["mean"] => Ok(Pooling::Mean),
        [] => refuse("names no pooling".into()),
        [one] => refuse(format!("the pooling {one} is none that the engine has")),
        _ => refuse(format!("names several poolings: {}", kinds.join(", "))),
    }
}

/// The prompts of queries and of passages, under the names that are in use for them.
fn prompts(path: &Path) -> Result<[Option<String>; 2]> {
    if !path.is_file() {
        return Ok([None, None]);
    }
    let keys = object(path)?;
    let prompts = keys.get("prompts").and_then(Value::as_object);
    let first = |names: &[&str]| {
        let prompt = names.iter().find_map(|name| prompts?.get(*name))?;
        prompt.as_str().map(str::to_string)
    };
    Ok([first(&["query"]), first(&["document", "passage"])])
}

/// Where the longest text may stand: with sentence-transformers, with this engine, and where newer versions of that library leave it.
const SAID: [(&str, &str); 3] = [
    ("sentence_bert_config.json", "max_seq_length"),
    (MANIFEST, "max_seq_length"),
    ("tokenizer_config.json", "model_max_length"),
];

/// The longest text of the encoder in `folder`, from the first of some places that says one.
fn max_seq_length(folder: &Path, places: &[(&str, &str)]) -> Result<Option<usize>> {
    for (name, key) in places {
        let path = folder.join(name);
        if !path.is_file() {
            continue;
        }
        match object(&path)?.get(*key) {
            None | Some(Value::Null) => {}
            // A tokenizer without a limit has one of 1e30.
            Some(Value::Number(n)) if n.as_f64().is_some_and(|n| n >= 1e9) => {}
            Some(value) => match value.as_u64() {
                Some(n @ 1..=0xFF_FFFF) => return Ok(Some(n as usize)),
                _ => return Err(malformed(&path, &format!("{key} {value} is no length"))),
            },
        }
    }
    Ok(None)
}
