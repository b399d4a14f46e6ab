//! One checkpoint: a folder that holds the whole state of a run and can tell whether any bit of it has changed.
//!
//! ```text
//! step-00000100/
//!   weights.safetensors moment1.safetensors moment2.safetensors   fp32, one tensor per parameter under its checkpoint name
//!   state.json                                                    [`State`]
//!   manifest.json                                                 size and SHA-256 of the files above, and of itself
//! ```
//!
//! Tensors are stored by name and without the padding of the arenas: a later version may lay its arenas out differently, and
//! other tools can open the files.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{Error, IoContext, Result};
use crate::files::Disk;
use crate::train::manifest::{self, Hashed, Layout, SMALL, Trouble, json_bytes};
use crate::train::{Arena, Arenas, ParamInfo};

/// Version of the layout of a checkpoint folder.
pub const FORMAT: u32 = 1;

const LAYOUT: Layout =
    Layout { what: "checkpoint", format: FORMAT, remedy: "the checkpoint is damaged; use another one" };
/// The weights of a checkpoint, under checkpoint names: a model that other tools can open.
pub(super) const WEIGHTS: &str = "weights.safetensors";
const STATE: &str = "state.json";
const ARENAS: [(Arena, &str); 3] =
    [(Arena::Weights, WEIGHTS), (Arena::Moment1, "moment1.safetensors"), (Arena::Moment2, "moment2.safetensors")];

/// Everything of a run but the tensors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Samples consumed: the position in the data.
    pub cursor: u64,
    /// Seed of all randomness, which is a pure function of it and of `step` and `cursor`.
    pub seed: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Texts seen, repeats counted.
    pub sequences: u64,
    /// Steps skipped for a gradient that was not finite.
    pub skipped: u64,
    /// How many of them are the last steps.
    pub skipped_in_a_row: u64,
    /// The best evaluation.
    pub best: Option<Best>,
    /// Evaluations since that one.
    #[serde(default)]
    pub since_best: u64,
    /// Step of the last evaluation.
    pub evaluated: Option<u64>,
    /// The settings that make two runs the same, as text.
    pub settings: BTreeMap<String, String>,
    /// Version of the engine that wrote this.
    pub engine: String,
    /// What computed it: the GPU or processor, after their number where there were several.
    #[serde(default)]
    pub device: String,
}

/// The best evaluation so far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// Step it was reached at.
    pub step: u64,
    /// What is compared: `loss`, of the held-out texts, the lower the better; or a metric of the dev set, the higher the better.
    #[serde(default = "loss")]
    pub metric: String,
    /// For people to read.
    #[serde(alias = "loss")]
    pub value: f64,
    /// IEEE bits of the value in hex; decimal text need not give the same number back.
    #[serde(alias = "loss_bits")]
    pub value_bits: String,
}

/// [`Best::metric`] of the held-out loss.
pub const LOSS: &str = "loss";

fn loss() -> String {
    LOSS.into()
}

impl Best {
    /// `value` of `metric` at `step`.
    pub fn new(step: u64, metric: &str, value: f64) -> Self {
        Best { step, metric: metric.into(), value, value_bits: bits(value) }
    }

    /// Whether `value` is better than this.
    pub fn beaten_by(&self, value: f64) -> bool {
        let best = u64::from_str_radix(&self.value_bits, 16).map_or(self.value, f64::from_bits);
        if self.metric == LOSS { value < best } else { value > best }
    }
}

/// IEEE bits in hex, as `metrics.jsonl` and checkpoints hold them.
pub fn bits(x: f64) -> String {
    format!("{:016x}", x.to_bits())
}

/// Writes a checkpoint into the existing empty folder `dir` and makes every file of it durable.
pub fn write(disk: &Disk, dir: &Path, state: &State, engine: &dyn Arenas) -> Result<()> {
    let mut files = Map::new();
    let parameters = engine.parameters();
    let mut arena = Vec::new();
    for (which, name) in ARENAS {
        engine.read_arena(which, &mut arena)?;
        let mut out = Hashed::create(disk, &dir.join(name))?;
        write_tensors(&mut out, &parameters, &arena)?;
        files.insert(name.to_string(), out.finish()?);
    }
    let mut out = Hashed::create(disk, &dir.join(STATE))?;
    out.put(&json_bytes(&serde_json::to_value(state).map_err(|e| unwritable(dir, &e))?))?;
    files.insert(STATE.to_string(), out.finish()?);

    manifest::write(disk, dir, LAYOUT, files)
}

fn unwritable(dir: &Path, e: &serde_json::Error) -> Error {
    Error::refused(format!("the state cannot be written as JSON: {e}"))
        .path(dir.join(STATE))
        .remedy("report this as a defect")
}

fn write_tensors(out: &mut Hashed, parameters: &[ParamInfo], arena: &[f32]) -> Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut at = 0u64;
    for p in parameters {
        let end = at + 4 * p.elements() as u64;
        header.insert(p.name.clone(), json!({ "dtype": "F32", "shape": p.shape, "data_offsets": [at, end] }));
        at = end;
    }
    let mut header = Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    out.put(&(header.len() as u64).to_le_bytes())?;
    out.put(header.as_bytes())?;
    parameters.iter().try_for_each(|p| out.put(bytemuck::cast_slice(slice(arena, p)?)))
}

/// The parameter's elements of an arena.
fn slice<'a>(arena: &'a [f32], p: &ParamInfo) -> Result<&'a [f32]> {
    arena.get(p.offset..p.offset + p.elements()).ok_or_else(|| {
        Error::refused(format!("{} lies outside its arena of {} elements", p.name, arena.len()))
            .remedy("report this as a defect")
    })
}

/// A checkpoint whose every byte was checked.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// Its folder.
    pub dir: PathBuf,
    /// Its state.
    pub state: State,
}

/// Whether a checkpoint can be used.
#[derive(Debug)]
pub enum Opened {
    /// Every digest holds.
    Good(Box<Checkpoint>),
    /// Something is missing or has changed; says what and where.
    Damaged(Error),
}

impl Checkpoint {
    /// Opens a checkpoint and checks every digest. An error is one of the system, or a checkpoint of another version of the
    /// engine: neither is damage, and neither is a reason to fall back to an older checkpoint.
    pub fn open(disk: &Disk, dir: &Path) -> Result<Opened> {
        match Self::open_checked(disk, dir) {
            Ok(checkpoint) => Ok(Opened::Good(Box::new(checkpoint))),
            Err(Trouble::Damage(e)) => Ok(Opened::Damaged(e)),
            Err(Trouble::Other(e)) => Err(e),
        }
    }

    fn open_checked(disk: &Disk, dir: &Path) -> std::result::Result<Self, Trouble> {
        let files = manifest::check(disk, dir, LAYOUT)?;
        let path = dir.join(STATE);
        if !files.contains_key(STATE) || ARENAS.iter().any(|(_, name)| !files.contains_key(*name)) {
            return Err(LAYOUT.damage(&dir.join(manifest::FILE), "does not list every file of a checkpoint"));
        }
        let state = disk.read_small(&path, SMALL)?;
        let state =
            serde_json::from_slice(&state).map_err(|e| LAYOUT.damage(&path, format!("not the state of a run: {e}")))?;
        Ok(Checkpoint { dir: dir.to_path_buf(), state })
    }

    /// Puts weights and moments into `engine`, whose parameters must be the same in name and shape.
    pub fn restore(&self, disk: &Disk, engine: &mut dyn Arenas) -> Result<()> {
        let parameters = engine.parameters();
        let mut arena = Vec::new();
        for (which, name) in ARENAS {
            // Padding keeps what the engine put there.
            engine.read_arena(which, &mut arena)?;
            read_tensors(disk, &self.dir.join(name), &parameters, &mut arena)?;
            engine.write_arena(which, &arena)?;
        }
        Ok(())
    }
}

/// Whether `dir` looks like a checkpoint folder.
pub fn is_checkpoint(dir: &Path) -> bool {
    dir.join(manifest::FILE).is_file() && dir.join(STATE).is_file()
}

/// Checks every digest of a checkpoint.
pub fn verify(dir: &Path) -> Result<State> {
    match Checkpoint::open(&Disk::default(), dir)? {
        Opened::Good(checkpoint) => Ok(checkpoint.state),
        Opened::Damaged(e) => Err(e),
    }
}

/// The state of a checkpoint, its digest checked, and none of its tensors read: for those who only look.
pub fn glance(disk: &Disk, dir: &Path) -> Result<State> {
    let state =
        manifest::check_one(disk, dir, STATE, LAYOUT).and_then(|()| Ok(disk.read_small(&dir.join(STATE), SMALL)?));
    let state = state.map_err(Trouble::into_error)?;
    serde_json::from_slice(&state).map_err(|e| LAYOUT.damaged(&dir.join(STATE), format!("not the state of a run: {e}")))
}

/// Fills the parameters' places of `arena` from a safetensors file.
fn read_tensors(disk: &Disk, path: &Path, parameters: &[ParamInfo], arena: &mut [f32]) -> Result<()> {
    let mut file = disk.open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length).at(path, "cannot read")?;
    let size = u64::from_le_bytes(length);
    if size > SMALL {
        return Err(LAYOUT.damaged(path, format!("a header of {size} bytes")));
    }
    let mut header = vec![0; size as usize];
    file.read_exact(&mut header).at(path, "cannot read")?;
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|e| LAYOUT.damaged(path, format!("not safetensors: {e}")))?;

    let stored = metadata.tensors();
    if let Some(name) = stored.keys().find(|name| !parameters.iter().any(|p| p.name == **name)) {
        return Err(Error::refused("the model has no such parameter").path(path).tensor(name).remedy(OTHER_MODEL));
    }
    for p in parameters {
        let info =
            stored.get(&p.name).filter(|info| info.dtype == Dtype::F32 && info.shape == p.shape).ok_or_else(|| {
                Error::refused(format!("not stored as fp32 of shape {:?}", p.shape))
                    .path(path)
                    .tensor(&p.name)
                    .remedy(OTHER_MODEL)
            })?;
        file.seek(SeekFrom::Start(8 + size + info.data_offsets.0 as u64)).at(path, "cannot seek")?;
        let place =
            arena.get_mut(p.offset..p.offset + p.elements()).ok_or_else(|| LAYOUT.damaged(path, "arena too short"))?;
        file.read_exact(bytemuck::cast_slice_mut(place)).at(path, "cannot read")?;
    }
    Ok(())
}

const OTHER_MODEL: &str = "this checkpoint belongs to another model; give the settings it was trained with";
