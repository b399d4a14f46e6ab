//! `pytorch_model.bin`: the form in which checkpoints were published before safetensors.
//!
//! Two containers around the same pickle (see [`super::pickle`]): since torch 1.6 a zip archive with one entry a storage, before that
//! five pickles in a row followed by the storages. Nothing of a storage is read until a tensor of it is asked for.

use super::pickle::{self, Loaded, MAX_PICKLE, Storage, Tensor, Value};
use super::safetensors::{PIECE, open_regular};
use super::tensor_file::{Info, Sink, TensorFile};
use crate::error::{Error, IoContext, Result};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Display;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use zip::{CompressionMethod, ZipArchive};

const AGAIN: &str = "get the file again";
/// A strided view may reach over at most this many times the bytes it selects; anything wider is no model weight.
const MAX_SPREAD: u64 = 64;

/// An open PyTorch checkpoint whose pickle has been interpreted.
#[derive(Debug)]
pub(super) struct TorchBin {
    path: PathBuf,
    tensors: BTreeMap<String, Tensor>,
    storages: Vec<Storage>,
    container: Container,
}

#[derive(Debug)]
enum Container {
    Zip(Mutex<Archive>),
    /// Offset of every storage's first element, by its key.
    Legacy(File, HashMap<String, u64>),
}

#[derive(Debug)]
struct Archive {
    zip: ZipArchive<BufReader<File>>,
    /// `<folder>/data/` inside the archive.
    prefix: String,
    /// Entries whose checksum has been compared.
    verified: HashSet<usize>,
}

impl TorchBin {
    /// Opens a checkpoint of either container.
    ///
    /// # Errors
    /// The file is neither, or its pickle wants anything but tensors.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, length) = open_regular(path)?;
        let mut magic = [0; 4];
        let count = length.min(4) as usize;
        file.read_exact_at(&mut magic[..count], 0).at(path, "cannot read")?;
        match magic {
            [b'P', b'K', 3, 4] => Self::open_zip(path, file),
            [0x80, 2, 0x8a, 10] => Self::open_legacy(path, file, length),
            _ => Err(Error::refused("not a PyTorch checkpoint").path(path).offset(0).remedy(AGAIN)),
        }
    }

    fn open_zip(path: &Path, file: File) -> Result<Self> {
        let damaged = |e: &dyn Display| Error::refused(format!("damaged zip archive: {e}")).path(path).remedy(AGAIN);
        let mut zip = ZipArchive::new(BufReader::new(file)).map_err(|e| damaged(&e))?;
        let roots: Vec<String> =
            zip.file_names().filter_map(|name| Some(name.strip_suffix("data.pkl")?.to_string())).collect();
        let [root] = roots.as_slice() else {
            return Err(damaged(&"it holds no data.pkl, or several"));
        };
        let small = |zip: &mut ZipArchive<_>, name: &str, limit: usize| -> Result<Vec<u8>> {
            let entry = zip.by_name(name).map_err(|e| damaged(&e))?;
            let mut bytes = Vec::new();
            // One byte beyond the limit, so that the checksum of anything shorter is compared.
            entry.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(|e| damaged(&e))?;
            Ok(bytes)
        };
        let order = format!("{root}byteorder");
        if zip.index_for_name(&order).is_some() && small(&mut zip, &order, 16)? != b"little" {
            return Err(Error::refused("written on a big-endian machine")
                .path(path)
                .remedy("convert it to safetensors"));
        }
        let bytes = small(&mut zip, &format!("{root}data.pkl"), MAX_PICKLE)?;
        let loaded = pickle::load(&bytes, path, 0)?;
        let archive = Archive { zip, prefix: format!("{root}data/"), verified: HashSet::new() };
        Self::assemble(path, loaded, Container::Zip(Mutex::new(archive)))
    }

    /// Magic number, protocol version, system facts, state dict, keys of the storages; then for each key its length and elements.
    fn open_legacy(path: &Path, file: File, length: u64) -> Result<Self> {
        let refuse = |cause: &str| Error::refused(cause).path(path).remedy(AGAIN);
        let mut head = vec![0; length.min(MAX_PICKLE as u64) as usize];
        file.read_exact_at(&mut head, 0).at(path, "cannot read")?;
        let mut at = 0;
        let mut next = || -> Result<Loaded> {
            let loaded = pickle::load(&head[at..], path, at as u64)?;
            at += loaded.consumed;
            Ok(loaded)
        };
        if next()?.root != Value::LegacyMagic || next()?.root != Value::Int(1001) {
            return Err(refuse("not a PyTorch checkpoint of a known version"));
        }
        let facts = next()?;
        let little =
            |(key, value): &(Value, Value)| facts.text(*key) == Some("little_endian") && *value == Value::Bool(true);
        if !facts.dicts.first().is_some_and(|dict| dict.iter().any(little)) {
            return Err(refuse("written on a big-endian machine"));
        }
        let loaded = next()?;
        let keys = next()?;
        let Value::Seq(list) = keys.root else { return Err(refuse("the list of storages is missing")) };
        let by_key: HashMap<&str, &Storage> = loaded.storages.iter().map(|s| (s.key.as_str(), s)).collect();
        let (mut offsets, mut offset) = (HashMap::new(), at as u64);
        for key in &keys.seqs[list as usize] {
            let storage = keys
                .text(*key)
                .and_then(|key| by_key.get(key))
                .ok_or_else(|| refuse("an unknown storage is listed"))?;
            let mut count = [0; 8];
            file.read_exact_at(&mut count, offset).at(path, "cannot read the length of a storage")?;
            let held = u64::from_le_bytes(count);
            let end = held.checked_mul(storage.dtype.size() as u64).and_then(|bytes| bytes.checked_add(offset + 8));
            let Some(end) = end.filter(|end| held == storage.length && *end <= length) else {
                return Err(refuse("a storage does not fit the file").offset(offset));
            };
            if offsets.insert(storage.key.clone(), offset + 8).is_some() {
                return Err(refuse("a storage is listed twice").offset(offset));
            }
            offset = end;
        }
        if offset != length {
            return Err(refuse("bytes follow the last storage").offset(offset));
        }
        Self::assemble(path, loaded, Container::Legacy(file, offsets))
    }

    /// Takes the tensors out of the top-level dict.
    fn assemble(path: &Path, loaded: Loaded, container: Container) -> Result<Self> {
        let refuse = |cause: &str| Error::refused(cause).path(path).remedy("save the model's state_dict() alone");
        let Value::Dict(root) = loaded.root else { return Err(refuse("the pickle is not a dict of tensors")) };
        let mut tensors = BTreeMap::new();
        for (key, value) in &loaded.dicts[root as usize] {
            let Some(name) = loaded.text(*key) else { return Err(refuse("a key of the state dict is not a string")) };
            let Value::Tensor(tensor) = value else {
                return Err(refuse("is not a tensor").tensor(name));
            };
            if tensors.insert(name.to_string(), loaded.tensors[*tensor as usize].clone()).is_some() {
                return Err(refuse("is there twice").tensor(name));
            }
        }
        if tensors.is_empty() {
            return Err(refuse("the pickle holds no tensor"));
        }
        Ok(TorchBin { path: path.to_path_buf(), tensors, storages: loaded.storages, container })
    }

    /// Passes `length` bytes of a storage, from `start`, to `sink` in pieces of whole elements.
    fn span(&self, storage: &Storage, start: u64, length: u64, sink: &mut Sink<'_>) -> Result<()> {
        match &self.container {
            Container::Legacy(file, offsets) => {
                let base = offsets.get(&storage.key).ok_or_else(|| self.refuse("its storage is not in the file"))?;
                let mut buffer = vec![0; PIECE.min(length as usize)];
                let mut done = 0;
                while done < length {
                    let count = (length - done).min(PIECE as u64) as usize;
                    file.read_exact_at(&mut buffer[..count], base + start + done).at(&self.path, "cannot read")?;
                    sink(&buffer[..count])?;
                    done += count as u64;
                }
                Ok(())
            }
            Container::Zip(archive) => {
                let mut archive = archive.lock().unwrap_or_else(PoisonError::into_inner);
                self.span_of_entry(&mut archive, storage, start, length, sink)
            }
        }
    }

    fn span_of_entry(
        &self,
        archive: &mut Archive,
        storage: &Storage,
        start: u64,
        length: u64,
        sink: &mut Sink<'_>,
    ) -> Result<()> {
        let damaged = |e: &dyn Display| self.refuse(&format!("its storage is damaged: {e}"));
        let name = format!("{}{}", archive.prefix, storage.key);
        let Some(index) = archive.zip.index_for_name(&name) else {
            return Err(self.refuse(&format!("its storage {name} is not in the archive")));
        };
        let entry = archive.zip.by_index(index).map_err(|e| damaged(&e))?;
        if Some(entry.size()) != storage.length.checked_mul(storage.dtype.size() as u64) {
            return Err(self.refuse(&format!(
                "its storage holds {} bytes instead of {} elements",
                entry.size(),
                storage.length
            )));
        }
        let stored = entry.compression() == CompressionMethod::Stored;
        // Reading an entry to its end compares its checksum; that is done once, whatever number of tensors share it.
        if archive.verified.insert(index) {
            std::io::copy(&mut { entry }, &mut std::io::sink()).map_err(|e| damaged(&e))?;
        } else {
            drop(entry);
        }
        if stored {
            let mut entry = archive.zip.by_index_seek(index).map_err(|e| damaged(&e))?;
            entry.seek(SeekFrom::Start(start)).map_err(|e| damaged(&e))?;
            pass_on(entry, length, sink, &damaged)
        } else {
            let mut entry = archive.zip.by_index(index).map_err(|e| damaged(&e))?;
            std::io::copy(&mut (&mut entry).take(start), &mut std::io::sink()).map_err(|e| damaged(&e))?;
            pass_on(entry, length, sink, &damaged)
        }
    }

    fn refuse(&self, cause: &str) -> Error {
        Error::refused(cause).path(&self.path).remedy(AGAIN)
    }

    /// Elements scattered over a storage: the stretch they lie in is read whole, then picked in order.
    fn stream_strided(&self, tensor: &Tensor, storage: &Storage, elements: u64, sink: &mut Sink<'_>) -> Result<()> {
        let size = storage.dtype.size();
        let reach = tensor.shape.iter().zip(&tensor.stride).map(|(d, s)| (*d as u64 - 1) * s).sum::<u64>() + 1;
        if reach > elements.saturating_mul(MAX_SPREAD) {
            return Err(self.refuse("its elements lie too far apart"));
        }
        let mut stretch = Vec::new();
        self.span(storage, tensor.offset * size as u64, reach * size as u64, &mut |bytes| {
            stretch.extend_from_slice(bytes);
            Ok(())
        })?;
        let mut index = vec![0; tensor.shape.len()];
        let mut out = Vec::with_capacity(PIECE);
        for _ in 0..elements {
            let at = index.iter().zip(&tensor.stride).map(|(i, s)| i * s).sum::<u64>() as usize * size;
            out.extend_from_slice(&stretch[at..at + size]);
            if out.len() >= PIECE {
                sink(&out)?;
                out.clear();
            }
            // Counts up like an odometer, last dimension first.
            for (i, d) in index.iter_mut().zip(&tensor.shape).rev() {
                *i += 1;
                if *i < *d as u64 {
                    break;
                }
                *i = 0;
            }
        }
        sink(&out)
    }
}

impl TensorFile for TorchBin {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<Info> {
        let tensor = self.tensors.get(name)?;
        Some(Info { dtype: self.storages[tensor.storage as usize].dtype, shape: tensor.shape.clone() })
    }

    fn same_memory(&self, a: &str, b: &str) -> bool {
        matches!((self.tensors.get(a), self.tensors.get(b)), (Some(a), Some(b)) if a == b)
    }

    fn stream(&self, name: &str, sink: &mut Sink<'_>) -> Result<()> {
        self.require(name)?;
        let Some(tensor) = self.tensors.get(name) else { return Ok(()) };
        let storage = &self.storages[tensor.storage as usize];
        let size = storage.dtype.size() as u64;
        let elements = tensor.shape.iter().map(|d| *d as u64).product::<u64>();
        let result = if elements == 0 {
            Ok(())
        } else if is_contiguous(tensor) {
            self.span(storage, tensor.offset * size, elements * size, sink)
        } else {
            self.stream_strided(tensor, storage, elements, sink)
        };
        result.map_err(|e| e.tensor(name))
    }
}

/// Whether the elements lie one after another, as row-major reading wants them.
fn is_contiguous(tensor: &Tensor) -> bool {
    let mut expected = 1;
    for (d, s) in tensor.shape.iter().zip(&tensor.stride).rev() {
        if *d != 1 && *s != expected {
            return false;
        }
        expected = expected.saturating_mul(*d as u64);
    }
    true
}

/// Passes the next `length` bytes to `sink` in pieces of whole elements.
fn pass_on(
    mut from: impl Read,
    length: u64,
    sink: &mut Sink<'_>,
    damaged: &dyn Fn(&dyn Display) -> Error,
) -> Result<()> {
    let mut buffer = vec![0; PIECE.min(length as usize)];
    let mut left = length;
    while left > 0 {
        let count = left.min(PIECE as u64) as usize;
        from.read_exact(&mut buffer[..count]).map_err(|e| damaged(&e))?;
        sink(&buffer[..count])?;
        left -= count as u64;
    }
    Ok(())
}
