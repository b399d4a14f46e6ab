//! One view over every form a checkpoint comes in: safetensors or `pytorch_model.bin`, whole or in shards, with the enhanced decoder
//! beside it, under the canonical names of [`super::names`].

use super::names::{MLM_BIAS, Meaning, Param, meaning};
use super::safetensors::SafeTensors;
use super::small_file;
use super::tensor_file::{Info, TensorFile};
use super::torch_bin::TorchBin;
use crate::error::{Error, IoContext, Result};
use serde_json::{Map, Value};
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::hash::Hasher;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

/// File of the enhanced decoder, beside the model.
pub const ENHANCED_DECODER: &str = "enhanced_decoder.safetensors";
/// What a model folder's weights may be called, in the order in which they are looked for.
pub const WEIGHT_FILES: [&str; 4] =
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"];
/// Largest index of shards that is read.
const MAX_INDEX: u64 = 16 << 20;

/// The weights of a model, opened and checked but not yet read.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<Box<dyn TensorFile>>,
    tensors: BTreeMap<String, Location>,
    ties: Vec<(String, Location)>,
    unknown: Vec<String>,
}

/// A tensor in one of the files, under the name it has there.
#[derive(Clone, Debug)]
struct Location {
    file: usize,
    name: String,
}

impl Checkpoint {
    /// Opens a model folder, or a file of weights. An `enhanced_decoder.safetensors` beside it is included.
    ///
    /// # Errors
    /// No weights, a malformed or damaged file, or two tensors with one meaning.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let given = path.as_ref();
        let main = if given.is_dir() { find_weights(given)? } else { given.to_path_buf() };
        let mut files = Vec::new();
        if main.extension().is_some_and(|e| e == "json") {
            for shard in shards(&main)? {
                files.push(open_file(&shard)?);
            }
        } else {
            files.push(open_file(&main)?);
        }
        let decoder = main.with_file_name(ENHANCED_DECODER);
        if decoder != main && decoder.is_file() {
            files.push(open_file(&decoder)?);
        }
        Self::assemble(given.to_path_buf(), files)
    }

    fn assemble(path: PathBuf, files: Vec<Box<dyn TensorFile>>) -> Result<Self> {
        let mut tensors: BTreeMap<String, Location> = BTreeMap::new();
        let (mut copies, mut unknown) = (Vec::new(), Vec::new());
        for (file, opened) in files.iter().enumerate() {
            for found in opened.names() {
                let location = Location { file, name: found.to_string() };
                match meaning(found) {
                    Meaning::Param(name) => {
                        if let Some(first) = tensors.insert(name.clone(), location) {
                            let cause = format!(
                                "means {name}, and so does {} of {}",
                                first.name,
                                files[first.file].path().display()
                            );
                            return Err(Error::refused(cause)
                                .path(opened.path())
                                .tensor(found)
                                .remedy("remove one of the two"));
                        }
                    }
                    Meaning::TiedTo(name) => copies.push((name, location)),
                    Meaning::Ignored => {}
                    Meaning::Unknown => unknown.push(found.to_string()),
                }
            }
        }
        // A writer that drops shared tensors may have kept the copy instead of the original.
        let mut ties = Vec::new();
        for (name, location) in copies {
            match tensors.get(&name) {
                Some(_) => ties.push((name, location)),
                None => drop(tensors.insert(name, location)),
            }
        }
        Ok(Checkpoint { path, files, tensors, ties, unknown })
    }

    /// What was opened, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file of weights, or what was opened if there are several.
    pub fn file(&self) -> &Path {
        match &self.files[..] {
            [file] => file.path(),
            _ => &self.path,
        }
    }

    /// The canonical names of all parameters, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Names in the files that mean nothing to the engine.
    pub fn unknown(&self) -> &[String] {
        &self.unknown
    }

    /// Whether the parameter is there.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Whether all of the parameters are there.
    pub fn contains_all(&self, params: &[Param]) -> bool {
        params.iter().all(|p| self.contains(&p.name))
    }

    /// The shape of a parameter; `None` when it is not there.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.info(name).map(|info| info.shape)
    }

    /// Type and shape of a parameter; `None` when it is not there.
    pub fn info(&self, name: &str) -> Option<Info> {
        let at = self.tensors.get(name)?;
        self.files[at.file].info(&at.name)
    }

    /// Checks presence, shape and type of all `params` before anything is read.
    ///
    /// # Errors
    /// The first three of everything that is wrong, and the count.
    pub fn check(&self, params: &[Param]) -> Result<()> {
        let mut errors = Vec::new();
        for param in params {
            let Some(at) = self.tensors.get(&param.name) else {
                errors.push(self.missing(&param.name));
                continue;
            };
            let file = &self.files[at.file];
            let Some(info) = file.info(&at.name) else { continue };
            let cause = if info.shape != param.shape {
                format!("shape {:?} where the configuration wants {:?}", info.shape, param.shape)
            } else if !info.dtype.is_float() {
                format!("element type {} is not a float", info.dtype.name())
            } else {
                continue;
            };
            let remedy = "give the config.json that belongs to these weights";
            errors.push(Error::refused(cause).path(file.path()).tensor(&at.name).remedy(remedy));
        }
        if errors.is_empty() { Ok(()) } else { Err(Error::several(errors)) }
    }

    /// Reads a parameter as f32, whatever float it is stored as.
    ///
    /// Reading the MLM head's bias also checks that an explicit decoder of the head equals what it is tied to, so that an encoder can be
    /// used whatever its head is.
    ///
    /// # Errors
    /// Missing, another shape, not a float, a value that is not finite, or an untied copy.
    pub fn read_f32(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<()> {
        let at = self.locate(name)?;
        self.check_ties(name)?;
        self.files[at.file].read_f32(&at.name, shape, out)
    }

    /// Reads a parameter as f64, whatever float it is stored as.
    ///
    /// # Errors
    /// As [`Checkpoint::read_f32`].
    pub fn read_f64(&self, name: &str, shape: &[usize], out: &mut [f64]) -> Result<()> {
        let at = self.locate(name)?;
        self.check_ties(name)?;
        self.files[at.file].read_f64(&at.name, shape, out)
    }

    fn locate(&self, name: &str) -> Result<&Location> {
        self.tensors.get(name).ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &str) -> Error {
        Error::refused("parameter is missing").path(&self.path).tensor(name).remedy("give a model that has it")
    }

    /// Compares the copies whose equality matters to who reads `name`.
    fn check_ties(&self, name: &str) -> Result<()> {
        for (primary, copy) in &self.ties {
            let file = &self.files[copy.file];
            let of_head =
                meaning(&copy.name) == Meaning::TiedTo(primary.clone()) && copy.name.contains("cls.predictions.");
            let guard = if of_head { MLM_BIAS } else { primary.as_str() };
            if guard != name {
                continue;
            }
            let at = self.locate(primary)?;
            if at.file == copy.file && file.same_memory(&at.name, &copy.name) {
                continue;
            }
            let original = &self.files[at.file];
            if original.info(&at.name) != file.info(&copy.name)
                || digest(original.as_ref(), &at.name)? != digest(file.as_ref(), &copy.name)?
            {
                let cause = format!("differs from {}, which the engine ties it to", at.name);
                let remedy = "the model has an untied head: remove this tensor, or use another model";
                return Err(Error::refused(cause).path(file.path()).tensor(&copy.name).remedy(remedy));
            }
        }
        Ok(())
    }
}

/// A digest of a tensor's bytes: two word-embedding matrices need not be held to be compared.
fn digest(file: &dyn TensorFile, name: &str) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    file.stream(name, &mut |bytes| {
        hasher.write(bytes);
        Ok(())
    })?;
    Ok(hasher.finish())
}

/// The file that holds the weights of the module in `folder`, or names those that do.
pub(super) fn find_weights(folder: &Path) -> Result<PathBuf> {
    let found = WEIGHT_FILES.iter().map(|name| folder.join(name)).find(|path| path.exists());
    found.ok_or_else(|| {
        let cause = format!("no weights: none of {} is there", WEIGHT_FILES.join(", "));
        Error::refused(cause).path(folder).remedy("give a folder that holds a model")
    })
}

/// Opens one file of weights, of either format.
pub(super) fn open_file(path: &Path) -> Result<Box<dyn TensorFile>> {
    // Both PyTorch containers are known by their first bytes; a safetensors file begins with the length of its header.
    let mut magic = [0; 4];
    let meta = std::fs::metadata(path).at(path, "cannot read the weights")?;
    if meta.is_file() {
        let file = File::open(path).at(path, "cannot read the weights")?;
        let mut start = Vec::new();
        file.take(4).read_to_end(&mut start).at(path, "cannot read the weights")?;
        magic[..start.len()].copy_from_slice(&start);
    }
    let named_torch = path.extension().is_some_and(|e| e == "bin" || e == "pt" || e == "pth");
    if named_torch || magic == *b"PK\x03\x04" {
        Ok(Box::new(TorchBin::open(path)?))
    } else {
        Ok(Box::new(SafeTensors::open(path)?))
    }
}

/// The files an index names, which all lie beside it. What they hold is read from them, not from the index.
fn shards(index: &Path) -> Result<Vec<PathBuf>> {
    let refuse = |cause: String| Error::refused(cause).path(index).remedy("get the model again");
    let text = small_file::text(index, MAX_INDEX, "an index of shards")?;
    let map: Map<String, Value> =
        serde_json::from_str(&text).map_err(|e| refuse(format!("malformed index of shards: {e}")))?;
    let Some(map) = map.get("weight_map").and_then(Value::as_object) else {
        return Err(refuse("weight_map is missing".into()));
    };
    let mut names = BTreeSet::new();
    for (tensor, name) in map {
        let plain = name.as_str().filter(|n| {
            let mut parts = Path::new(n).components();
            matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
        });
        // An index must not lead out of its folder.
        names.insert(plain.ok_or_else(|| refuse(format!("{name} is not a file name")).tensor(tensor))?);
    }
    if names.is_empty() {
        return Err(refuse("weight_map is empty".into()));
    }
    Ok(names.into_iter().map(|name| index.with_file_name(name)).collect())
}
