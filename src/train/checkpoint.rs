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
use sha2::{Digest, Sha256};

use crate::error::{Error, IoContext, Result};
use crate::train::disk::{CHUNK, Disk, File};
use crate::train::{Arena, Engine, ParamInfo};

/// Version of the layout of a checkpoint folder.
pub const FORMAT: u32 = 1;

const MANIFEST: &str = "manifest.json";
const STATE: &str = "state.json";
const ARENAS: [(Arena, &str); 3] = [
    (Arena::Weights, "weights.safetensors"),
    (Arena::Moment1, "moment1.safetensors"),
    (Arena::Moment2, "moment2.safetensors"),
];

/// Largest `state.json`, `manifest.json` or tensor header that is read.
const SMALL: u64 = 16 << 20;

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
    /// The lowest held-out loss.
    pub best: Option<Best>,
    /// Step of the last evaluation.
    pub evaluated: Option<u64>,
    /// The settings that make two runs the same, as text.
    pub settings: BTreeMap<String, String>,
    /// Version of the engine that wrote this.
    pub engine: String,
}

/// The lowest held-out loss so far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// Step it was reached at.
    pub step: u64,
    /// For people to read.
    pub loss: f64,
    /// IEEE bits of the loss in hex; decimal text need not give the same number back.
    pub loss_bits: String,
}

impl Best {
    /// `loss` at `step`.
    pub fn new(step: u64, loss: f64) -> Self {
        Best { step, loss, loss_bits: bits(loss) }
    }

    /// Whether `loss` is lower than this.
    pub fn beaten_by(&self, loss: f64) -> bool {
        let best = u64::from_str_radix(&self.loss_bits, 16).map_or(self.loss, f64::from_bits);
        loss < best
    }
}

/// IEEE bits in hex, as `metrics.jsonl` and checkpoints hold them.
pub fn bits(x: f64) -> String {
    format!("{:016x}", x.to_bits())
}

/// Writes a checkpoint into the existing empty folder `dir` and makes every file of it durable.
pub fn write(disk: &Disk, dir: &Path, state: &State, engine: &dyn Engine) -> Result<()> {
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

    let mut manifest = Map::new();
    manifest.insert("format".into(), json!(FORMAT));
    manifest.insert("files".into(), Value::Object(files));
    let digest = digest_of(&manifest);
    manifest.insert("sha256".into(), json!(digest));
    let mut out = Hashed::create(disk, &dir.join(MANIFEST))?;
    out.put(&json_bytes(&Value::Object(manifest)))?;
    out.finish().map(drop)
}

fn unwritable(dir: &Path, e: &serde_json::Error) -> Error {
    Error::refused(format!("the state cannot be written as JSON: {e}"))
        .path(dir.join(STATE))
        .remedy("report this as a defect")
}

fn json_bytes(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

fn digest_of(manifest: &Map<String, Value>) -> String {
    hex(&Sha256::digest(Value::Object(manifest.clone()).to_string()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
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

/// A file whose size and digest are taken while it is written.
struct Hashed {
    file: File,
    size: u64,
    sha: Sha256,
}

impl Hashed {
    fn create(disk: &Disk, path: &Path) -> Result<Self> {
        Ok(Hashed { file: disk.create(path)?, size: 0, sha: Sha256::new() })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.size += bytes.len() as u64;
        self.sha.update(bytes);
        self.file.put(bytes)
    }

    fn finish(mut self) -> Result<Value> {
        self.file.sync()?;
        Ok(json!({ "bytes": self.size, "sha256": hex(&self.sha.finalize()) }))
    }
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
    Good(Checkpoint),
    /// Something is missing or has changed; says what and where.
    Damaged(Error),
}

impl Checkpoint {
    /// Opens a checkpoint and checks every digest. An error is one of the system, or a checkpoint of another version of the
    /// engine: neither is damage, and neither is a reason to fall back to an older checkpoint.
    pub fn open(disk: &Disk, dir: &Path) -> Result<Opened> {
        match Self::open_checked(disk, dir) {
            Ok(checkpoint) => Ok(Opened::Good(checkpoint)),
            Err(Trouble::Damage(e)) => Ok(Opened::Damaged(e)),
            Err(Trouble::Other(e)) => Err(e),
        }
    }

    fn open_checked(disk: &Disk, dir: &Path) -> std::result::Result<Self, Trouble> {
        let manifest = read_manifest(disk, &dir.join(MANIFEST))?;
        for (name, entry) in &manifest {
            check_file(disk, &dir.join(name), entry)?;
        }
        let path = dir.join(STATE);
        if !manifest.contains_key(STATE) || ARENAS.iter().any(|(_, name)| !manifest.contains_key(*name)) {
            return Err(damage(&dir.join(MANIFEST), "does not list every file of a checkpoint"));
        }
        let state = disk.read_small(&path, SMALL)?;
        let state =
            serde_json::from_slice(&state).map_err(|e| damage(&path, format!("not the state of a run: {e}")))?;
        Ok(Checkpoint { dir: dir.to_path_buf(), state })
    }

    /// Puts weights and moments into `engine`, whose parameters must be the same in name and shape.
    pub fn restore(&self, disk: &Disk, engine: &mut dyn Engine) -> Result<()> {
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
    dir.join(MANIFEST).is_file() && dir.join(STATE).is_file()
}

/// Checks every digest of a checkpoint.
pub fn verify(dir: &Path) -> Result<State> {
    match Checkpoint::open(&Disk::default(), dir)? {
        Opened::Good(checkpoint) => Ok(checkpoint.state),
        Opened::Damaged(e) => Err(e),
    }
}

/// Why a checkpoint did not open: something wrong with its bytes, or something else.
enum Trouble {
    Damage(Error),
    Other(Error),
}

impl From<Error> for Trouble {
    fn from(e: Error) -> Self {
        Trouble::Other(e)
    }
}

fn damage(path: &Path, cause: impl Into<String>) -> Trouble {
    Trouble::Damage(damaged(path, cause))
}

fn damaged(path: &Path, cause: impl Into<String>) -> Error {
    Error::refused(cause).path(path).remedy("the checkpoint is damaged; use another one")
}

fn missing(path: &Path) -> Option<Trouble> {
    (!path.exists()).then(|| damage(path, "missing"))
}

fn read_manifest(disk: &Disk, path: &Path) -> std::result::Result<Map<String, Value>, Trouble> {
    if let Some(trouble) = missing(path) {
        return Err(trouble);
    }
    let bytes = match disk.read_small(path, SMALL) {
        Err(e) if e.kind() == crate::error::Kind::Refused => return Err(Trouble::Damage(e)),
        other => other?,
    };
    let mut manifest: Map<String, Value> =
        serde_json::from_slice(&bytes).map_err(|e| damage(path, format!("not a manifest: {e}")))?;
    let canonical = json_bytes(&Value::Object(manifest.clone())) == bytes;
    let digest = manifest.shift_remove("sha256");
    if digest.as_ref().and_then(Value::as_str) != Some(&digest_of(&manifest)) {
        return Err(damage(path, "its own digest does not hold"));
    }
    let format = manifest.get("format").and_then(Value::as_u64);
    if format != Some(u64::from(FORMAT)) {
        let cause = format!("checkpoint format {}, this engine reads format {FORMAT}", format.unwrap_or(0));
        return Err(Trouble::Other(Error::refused(cause).path(path).remedy("use the engine that wrote it")));
    }
    match manifest.shift_remove("files") {
        // The digest is of the content; white space outside it must not change either.
        Some(Value::Object(files)) if canonical => Ok(files),
        _ => Err(damage(path, "not as this engine writes it")),
    }
}

fn check_file(disk: &Disk, path: &Path, entry: &Value) -> std::result::Result<(), Trouble> {
    if let Some(trouble) = missing(path) {
        return Err(trouble);
    }
    let mut file = disk.open(path)?;
    let (size, expected) = (file.size()?, entry["bytes"].as_u64());
    if Some(size) != expected {
        return Err(damage(path, format!("{size} bytes, the manifest says {}", expected.unwrap_or(0))));
    }
    let mut sha = Sha256::new();
    let mut buffer = vec![0; CHUNK.min(size as usize + 1)];
    loop {
        let n = file.read(&mut buffer).at(path, "cannot read")?;
        if n == 0 {
            break;
        }
        sha.update(&buffer[..n]);
    }
    if entry["sha256"].as_str() == Some(&hex(&sha.finalize())) {
        Ok(())
    } else {
        Err(damage(path, "its digest does not hold"))
    }
}

/// Fills the parameters' places of `arena` from a safetensors file.
fn read_tensors(disk: &Disk, path: &Path, parameters: &[ParamInfo], arena: &mut [f32]) -> Result<()> {
    let mut file = disk.open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length).at(path, "cannot read")?;
    let size = u64::from_le_bytes(length);
    if size > SMALL {
        return Err(damaged(path, format!("a header of {size} bytes")));
    }
    let mut header = vec![0; size as usize];
    file.read_exact(&mut header).at(path, "cannot read")?;
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|e| damaged(path, format!("not safetensors: {e}")))?;

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
        let place = arena.get_mut(p.offset..p.offset + p.elements()).ok_or_else(|| damaged(path, "arena too short"))?;
        file.read_exact(bytemuck::cast_slice_mut(place)).at(path, "cannot read")?;
    }
    Ok(())
}

const OTHER_MODEL: &str = "this checkpoint belongs to another model; give the settings it was trained with";
