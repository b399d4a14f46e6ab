//! The model folder of a bi-encoder: an encoder for both sides, or one each in `query_model` and `passage_model`, and projections in
//! `pooler.safetensors`, as the published trainer writes them.

use std::path::Path;

use super::config::BertConfig;
use super::names;
use super::safetensors::SafeTensors;
use super::tensor_file::TensorFile;
use super::weights::Checkpoint;
use crate::error::{Error, Result};

/// Folders of the encoders where there are two, in the engine's order; their parameters' names begin with these.
pub const SIDES: [&str; 2] = ["query_model", "passage_model"];
/// Names of the projections of two encoders, and of the one that both sides share.
pub const PROJECTIONS: [&str; 2] = ["linear_q", "linear_p"];
/// See [`PROJECTIONS`].
pub const PROJECTION: &str = "linear";
const POOLER: &str = "pooler.safetensors";

/// An opened and checked folder.
#[derive(Debug)]
pub struct Towers {
    /// The configuration, equal on both sides.
    pub config: BertConfig,
    /// Width of the projections, where there are some.
    pub projection: Option<usize>,
    /// One, or those of [`SIDES`].
    encoders: Vec<Checkpoint>,
    pooler: Option<SafeTensors>,
}

impl Towers {
    /// Opens `path`: the folder of a bi-encoder, or a single encoder's folder or file of weights.
    pub fn open(path: &Path) -> Result<Towers> {
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
        let sides: Vec<_> = SIDES.iter().map(|side| folder.join(side)).filter(|side| side.is_dir()).collect();
        let (configs, encoders): (Vec<_>, Vec<_>) = match sides.len() {
            0 => (vec![folder.join("config.json")], vec![Checkpoint::open(path)?]),
            1 => {
                let other = SIDES.iter().find(|side| !folder.join(side).is_dir()).unwrap_or(&SIDES[0]);
                return Err(Error::refused(format!("there is {} and no {other}", sides[0].display()))
                    .path(folder)
                    .remedy("give a folder with both, or with one encoder"));
            }
            _ => (
                sides.iter().map(|side| side.join("config.json")).collect(),
                sides.iter().map(Checkpoint::open).collect::<Result<_>>()?,
            ),
        };
        let config = BertConfig::read(&configs[0])?;
        for other in &configs[1..] {
            if names::encoder(&BertConfig::read(other)?) != names::encoder(&config) {
                return Err(Error::refused(format!("differs in size from {}", configs[0].display()))
                    .path(other)
                    .remedy("use two encoders of one size"));
            }
        }
        encoders.iter().try_for_each(|weights| weights.check(&names::encoder(&config)))?;
        let pooler = folder.join(POOLER);
        let pooler = if pooler.is_file() { Some(SafeTensors::open(&pooler)?) } else { None };
        let untied = encoders.len() == 2;
        let projection = pooler.as_ref().map(|file| projection(file, &config, untied)).transpose()?;
        Ok(Towers { config, projection, encoders, pooler })
    }

    /// Whether queries and passages have an encoder each.
    pub fn untied(&self) -> bool {
        self.encoders.len() == 2
    }

    /// Reads the parameter that the engine calls `name`; false when the folder has none of that name.
    pub fn read(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<bool> {
        if let Some(pooler) = self.pooler.as_ref().filter(|pooler| pooler.info(name).is_some()) {
            return pooler.read_f32(name, shape, out).map(|()| true);
        }
        let side = SIDES.iter().position(|side| name.starts_with(side)).unwrap_or(0);
        let bare = SIDES.iter().find_map(|side| name.strip_prefix(side)?.strip_prefix('.')).unwrap_or(name);
        match self.encoders.get(side).filter(|weights| weights.contains(bare)) {
            Some(weights) => weights.read_f32(bare, shape, out).map(|()| true),
            None => Ok(false),
        }
    }
}

/// Width of the projections in `file`, which must all be there and of one shape.
fn projection(file: &SafeTensors, config: &BertConfig, untied: bool) -> Result<usize> {
    let stems: &[&str] = if untied { &PROJECTIONS } else { &[PROJECTION] };
    let first = file.require(&format!("{}.weight", stems[0]))?.shape;
    for stem in stems {
        for (part, expected) in [("weight", first.clone()), ("bias", first[..1].to_vec())] {
            let name = format!("{stem}.{part}");
            let shape = file.require(&name)?.shape;
            if shape != expected || first.len() != 2 || first[1] != config.hidden_size {
                let cause = format!("has shape {shape:?}; a projection of this model is [N, {}]", config.hidden_size);
                return Err(Error::refused(cause).path(file.path()).tensor(name).remedy("give the model's own pooler"));
            }
        }
    }
    Ok(first[0])
}
