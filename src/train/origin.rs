//! What a run keeps of its beginning, so that its checkpoints can be exported when the data and the starting model are gone.
//!
//! ```text
//! origin/
//!   config.json  pooler.safetensors     the model's configuration; the pooler it came with, where the objective does not train it
//!   tokenizer.json  vocab.txt  …        the tokenizer of the data, byte for byte
//!   origin.json  manifest.json          [`About`]; size and SHA-256 of the files above, and of itself
//! ```

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::files::{Disk, OutputDir};
use crate::model::config::BertConfig;
use crate::model::element::Dtype;
use crate::model::names::{self, Param};
use crate::model::parameters::Parameters;
use crate::model::safetensors::SafeTensors;
use crate::model::safetensors::writer::{Spec, Writer};
use crate::model::tensor_file::Info;
use crate::model::towers::SIDES;
use crate::ops::pool::Pooling;
use crate::train::manifest::{self, Hashed, Layout, SMALL, Trouble, json_bytes};

/// Name of the folder in the output folder of a run.
pub const DIR: &str = "origin";

/// The pooler of the starting model.
const POOLER: &str = "pooler.safetensors";
const CONFIG: &str = "config.json";
const ABOUT: &str = "origin.json";
const LAYOUT: Layout =
    Layout { what: "origin", format: 1, remedy: "give the train command of the run again, which restores it" };

/// What the model of a run is for, with all that its export needs to know.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case", deny_unknown_fields)]
pub enum Purpose {
    /// An encoder to train further, with its MLM head.
    #[default]
    Pretrain,
    /// Embeddings of queries and passages.
    BiEncoder {
        /// How token states become one embedding.
        pooling: Pooling,
        /// Whether embeddings are scaled to length 1.
        normalize: bool,
        /// Width of the projection after pooling, where there is one.
        projection: Option<usize>,
        /// Words that a text keeps, where the lexical representation was trained, too.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lexical: Option<usize>,
        /// Whether queries and passages have an encoder each.
        untied: bool,
        /// Text put before queries and passages, empty for none.
        prompts: [String; 2],
        /// Longest text, in tokens.
        max_length: usize,
    },
    /// Scores of pairs of query and passage.
    CrossEncoder {
        /// Longest pair, in tokens.
        max_length: usize,
    },
}

impl Purpose {
    /// The poolers of the starting model that are passed on untouched, under the engine's names: one, one of each of two encoders, or
    /// none where the pooler is trained.
    pub fn poolers(&self, config: &BertConfig) -> Vec<Param> {
        match self {
            Purpose::CrossEncoder { .. } => Vec::new(),
            Purpose::BiEncoder { untied: true, .. } => {
                let of = |side: &str| {
                    let prefixed = |p: Param| Param { name: format!("{side}.{}", p.name), shape: p.shape };
                    names::pooler(config).into_iter().map(prefixed).collect::<Vec<_>>()
                };
                SIDES.into_iter().flat_map(of).collect()
            }
            _ => names::pooler(config),
        }
    }

    /// Whether `weights` have all the [`Purpose::poolers`], and there are some: then they are kept.
    pub fn keeps_pooler(&self, config: &BertConfig, weights: &dyn Parameters) -> bool {
        let poolers = self.poolers(config);
        !poolers.is_empty() && weights.has_all(&poolers)
    }
}

/// What the run began from, in words.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// Model and its digest, as checkpoints name it among their settings.
    pub model: String,
    /// Data and its digest, as checkpoints name it among their settings.
    pub data: String,
    /// Hub name of the starting model.
    pub base_model: Option<String>,
    /// Whether the starting model had a pooler, which is then kept: [`Purpose::keeps_pooler`].
    pub pooler: bool,
    /// What the model is for.
    #[serde(default)]
    pub purpose: Purpose,
}

/// What [`keep`] writes.
pub struct Origin<'a> {
    /// In words.
    pub about: About,
    /// The model's configuration.
    pub config: &'a BertConfig,
    /// Files of the tokenizer by name.
    pub tokenizer: Vec<(String, Vec<u8>)>,
    /// The starting model.
    pub weights: Option<&'a dyn Parameters>,
}

/// A kept origin whose every byte was checked.
#[derive(Debug)]
pub struct Kept {
    /// The folder: also that of the tokenizer.
    pub dir: PathBuf,
    /// In words.
    pub about: About,
    /// The model's configuration.
    pub config: BertConfig,
    /// The pooler of the starting model, or those of its two encoders, under the engine's names.
    pub pooler: Option<SafeTensors>,
}

/// Writes the origin into the output folder `out` of a run, unless it is there and whole. Only for the holder of the lock.
pub fn keep(disk: &Disk, out: &Path, origin: &Origin<'_>) -> Result<()> {
    let dir = out.join(DIR);
    match read(disk, &dir) {
        Ok((about, _)) if about == origin.about => return Ok(()),
        Err(Trouble::Other(e)) => return Err(e),
        // Missing, damaged, or of other data and named in --override.
        Ok(_) | Err(Trouble::Damage(_)) => {}
    }
    if dir.is_dir() && !dir.join(manifest::FILE).is_file() {
        // The marker of a folder that may be replaced; in a locked folder of a run nobody else wrote this one.
        disk.remove(&dir)?;
    }
    let folder = OutputDir::create_on(disk, &dir, true, manifest::FILE)?;
    let mut files = Map::new();
    let mut write = |name: &str, bytes: &[u8]| -> Result<()> {
        let mut out = Hashed::create(disk, &folder.path().join(name))?;
        out.put(bytes)?;
        files.insert(name.to_string(), out.finish()?);
        Ok(())
    };
    for (name, bytes) in &origin.tokenizer {
        write(name, bytes)?;
    }
    write(CONFIG, &json_bytes(&Value::Object(origin.config.to_map())))?;
    let about = serde_json::to_value(&origin.about).map_err(|e| {
        Error::refused(format!("cannot be written as JSON: {e}"))
            .path(dir.join(ABOUT))
            .remedy("report this as a defect")
    })?;
    write(ABOUT, &json_bytes(&about))?;
    manifest::write(disk, folder.path(), LAYOUT, files)?;
    if let Some(weights) = origin.weights.filter(|_| origin.about.pooler) {
        write_pooler(disk, &folder.path().join(POOLER), &origin.about.purpose.poolers(origin.config), weights)?;
    }
    folder.commit()
}

/// The pooler in a safetensors file with a digest of its own.
fn write_pooler(disk: &Disk, path: &Path, params: &[Param], weights: &dyn Parameters) -> Result<()> {
    let spec = |p: &Param| Spec { name: p.name.clone(), info: Info { dtype: Dtype::F32, shape: p.shape.clone() } };
    let mut writer = Writer::create_on(disk, path, params.iter().map(spec).collect(), &[])?;
    let mut values = Vec::new();
    for p in params {
        values.resize(p.len(), 0.0);
        if !weights.read(&p.name, &p.shape, &mut values)? {
            return Err(Error::refused("the starting model has no such parameter")
                .path(path)
                .tensor(&p.name)
                .remedy("report this as a defect"));
        }
        writer.write_f32(&p.name, &values)?;
    }
    writer.finish().map(drop)
}

fn read(disk: &Disk, dir: &Path) -> std::result::Result<(About, Map<String, Value>), Trouble> {
    let files = manifest::check(disk, dir, LAYOUT)?;
    let path = dir.join(ABOUT);
    if !files.contains_key(ABOUT) || !files.contains_key(CONFIG) {
        return Err(LAYOUT.damage(&dir.join(manifest::FILE), "does not list every file of an origin"));
    }
    let about = serde_json::from_slice(&disk.read_small(&path, SMALL)?)
        .map_err(|e| LAYOUT.damage(&path, format!("not the origin of a run: {e}")))?;
    Ok((about, files))
}

/// Opens the origin of the run in `out`, every digest checked.
pub fn open(disk: &Disk, out: &Path) -> Result<Kept> {
    open_dir(disk, &out.join(DIR))
}

fn open_dir(disk: &Disk, dir: &Path) -> Result<Kept> {
    let (about, _) = read(disk, dir).map_err(Trouble::into_error)?;
    let config = BertConfig::read(dir.join(CONFIG))?;
    let pooler = if about.pooler { Some(SafeTensors::open(dir.join(POOLER))?) } else { None };
    Ok(Kept { dir: dir.to_path_buf(), about, config, pooler })
}

/// Checks every digest of the origin in `dir`.
pub fn verify(dir: &Path) -> Result<()> {
    open_dir(&Disk::default(), dir).map(drop)
}
