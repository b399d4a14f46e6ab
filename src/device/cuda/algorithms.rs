//! The algorithms that were found fastest for kinds of product, kept on disk for the processes that follow.
//!
//! One sealed JSON file for each kind of GPU, version of cuBLASLt and size of its workspace: with any of these changed the values mean
//! nothing. It is replaced as a whole, under the lock of its folder and after it has been read again, so that processes at once lose
//! nothing of each other's and agree on what either found. Whatever is wrong with the file costs a search, never a run.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::operation::{Algorithm, Library};
use crate::device::gpu::Facts;
use crate::error::{Error, Kind, Result};
use crate::files::sealed::{self, Sealed};
use crate::files::{self, Disk, Lock};

/// Says whether algorithms are searched.
pub const MODE: &str = "RETROMAE_TUNE_PRODUCTS";

/// Names the folder of the file.
pub const FOLDER: &str = "RETROMAE_CACHE";

/// Of the content. Another is of another version of the engine, which may have searched under other rules.
const FORMAT: u32 = 1;

/// Bytes that a file may have: some 100,000 kinds of product.
const LONGEST: u64 = 32 << 20;

/// Whose algorithms are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Those found before; what is new is searched.
    Auto,
    /// Those found before; what is new gets the library's first proposal.
    Cached,
    /// The library's first proposals.
    Never,
}

impl Mode {
    /// From the environment.
    pub fn of(variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Mode> {
        match variable(MODE).unwrap_or_default().to_str() {
            Some("" | "auto") => Ok(Mode::Auto),
            Some("cached") => Ok(Mode::Cached),
            Some("never") => Ok(Mode::Never),
            _ => Err(Error::usage(format!("{MODE} has a value that is unknown")).remedy("auto, cached and never are")),
        }
    }
}

/// For whom an algorithm is good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    device: String,
    capability: (u32, u32),
    multiprocessors: u32,
    cublaslt: usize,
    workspace: usize,
}

impl Owner {
    /// A GPU with this version of cuBLASLt, as that numbers itself.
    pub fn new(facts: &Facts, cublaslt: usize) -> Self {
        Owner {
            device: facts.name.clone(),
            capability: facts.capability,
            multiprocessors: facts.multiprocessors,
            cublaslt,
            workspace: Library::workspace_bytes(facts),
        }
    }

    fn file_name(&self) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        let device: String = self.device.chars().map(plain).collect();
        let ((major, minor), units, workspace) = (self.capability, self.multiprocessors, self.workspace >> 20);
        format!("products-{device}-sm{major}{minor}-{units}-cublaslt{}-{workspace}mib.json", self.cublaslt)
    }
}

/// An algorithm and how it was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Found {
    /// In hexadecimal.
    algorithm: String,
    /// Microseconds that it took, and that the library's first proposal took.
    us: f64,
    first_us: f64,
}

impl Found {
    fn algorithm(&self) -> Option<Algorithm> {
        let mut algorithm = [0; 8];
        let text = self.algorithm.as_bytes();
        if text.len() != 16 * algorithm.len() {
            return None;
        }
        for (word, digits) in algorithm.iter_mut().zip(text.chunks_exact(16)) {
            *word = u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        }
        Some(algorithm)
    }
}

/// The file.
#[derive(Serialize, Deserialize)]
struct Stored {
    format: u32,
    owner: Owner,
    products: BTreeMap<String, Found>,
}

/// What is known of one GPU's products.
pub struct Algorithms {
    mode: Mode,
    owner: Owner,
    /// Without one nothing is searched: what cannot be remembered could not be repeated.
    file: Option<PathBuf>,
    known: BTreeMap<String, Found>,
    /// Algorithms of the file that the library would not run.
    refused: HashMap<String, Algorithm>,
    /// Whether the file on disk may still be lost in a crash of the machine.
    is_unsettled: bool,
}

/// The folder of the file.
fn folder(variable: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let named = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")));
    named(FOLDER).or_else(|| Some(cache()?.join("retromae-engine")))
}

/// What the file holds: nothing when there is none.
fn read(path: &Path, owner: &Owner) -> Result<BTreeMap<String, Found>> {
    if !path.exists() {
        return Ok(BTreeMap::new());
    }
    let refused = |cause: &str| Error::refused(cause).path(path);
    let text = Disk::default().read_small(path, LONGEST)?;
    let text = match sealed::open(&String::from_utf8_lossy(&text)) {
        Sealed::Whole(text) => text,
        Sealed::Damaged => return Err(refused("damaged: the digest is another")),
        Sealed::Foreign => return Err(refused("not a file of algorithms")),
    };
    let stored: Stored = serde_json::from_str(&text).map_err(|e| refused(&format!("not a file of algorithms: {e}")))?;
    if stored.format != FORMAT || stored.owner != *owner {
        return Err(refused("of another GPU or version"));
    }
    match stored.products.values().all(|found| found.algorithm().is_some()) {
        true => Ok(stored.products),
        false => Err(refused("not a file of algorithms")),
    }
}

/// The file, and how many kinds of product it holds; changes nothing.
pub fn look(owner: &Owner, variable: &dyn Fn(&str) -> Option<OsString>) -> Option<(PathBuf, Result<usize>)> {
    let path = folder(variable)?.join(owner.file_name());
    let count = read(&path, owner).map(|products| products.len());
    Some((path, count))
}

impl Algorithms {
    /// What processes before this one have found, and a line worth telling when something is wrong with it.
    ///
    /// # Errors
    /// A mode that is none.
    pub fn open(owner: Owner, variable: &dyn Fn(&str) -> Option<OsString>) -> Result<(Self, Option<String>)> {
        let mode = Mode::of(variable)?;
        let (known, refused, is_unsettled) = (BTreeMap::new(), HashMap::new(), false);
        let mut opened = Algorithms { mode, owner, file: None, known, refused, is_unsettled };
        if mode == Mode::Never {
            return Ok((opened, None));
        }
        let Some(folder) = folder(variable) else {
            let told = format!("products are not tuned: no folder to remember algorithms in; set {FOLDER} to one");
            return Ok((opened, Some(told)));
        };
        let path = folder.join(opened.owner.file_name());
        let mut told = None;
        match read(&path, &opened.owner) {
            Ok(known) => opened.known = known,
            Err(e) if e.kind() == Kind::Refused && mode == Mode::Auto => {
                told = Some(format!("products are tuned anew: {}", e.remedy("the file is replaced")));
            }
            Err(e) => return Ok((opened, Some(format!("products are not tuned: {e}")))),
        }
        if mode == Mode::Cached {
            return Ok((opened, told));
        }
        match Disk::default().create_dir(&folder).and_then(|()| files::probe(&path)) {
            Ok(()) => opened.file = Some(path),
            Err(e) => {
                let remedy = format!("set {FOLDER} to a folder that can be written");
                told = Some(format!("new products are not tuned: {}", e.remedy(remedy)));
            }
        }
        Ok((opened, told))
    }

    /// Whether what is not known is searched.
    pub fn may_search(&self) -> bool {
        self.mode == Mode::Auto && self.file.is_some()
    }

    /// The algorithm of a kind of product.
    pub fn find(&self, product: &str) -> Option<Algorithm> {
        let algorithm = self.known.get(product)?.algorithm()?;
        (self.refused.get(product) != Some(&algorithm)).then_some(algorithm)
    }

    /// Has the library refuse the algorithm that is known.
    pub fn refuse(&mut self, product: &str) {
        if let Some(algorithm) = self.known.remove(product).and_then(|found| found.algorithm()) {
            self.refused.insert(product.to_string(), algorithm);
        }
    }

    /// Makes this process the only one that searches, and learns what others have found; not when another searches for longer than
    /// `patience`.
    pub fn claim(&mut self, patience: Duration) -> Option<Lock> {
        let path = self.file.clone()?;
        let (folder, until) = (path.parent()?, Instant::now() + patience);
        let lock = loop {
            match Lock::acquire(folder) {
                Ok(lock) => break lock,
                Err(e) if e.kind() == Kind::Refused && Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(_) => return None,
            }
        };
        // A file that went bad meanwhile is replaced by what this process knows.
        for (product, found) in read(&path, &self.owner).unwrap_or_default() {
            self.known.entry(product).or_insert(found);
        }
        Some(lock)
    }

    /// Writes down what was found. Says whether that was done; if not, nothing is searched any more.
    pub fn remember(&mut self, _held: &Lock, product: &str, algorithm: &Algorithm, us: f64, first_us: f64) -> bool {
        let text = algorithm.iter().map(|word| format!("{word:016x}")).collect();
        self.known.insert(product.to_string(), Found { algorithm: text, us, first_us });
        let written = self.write();
        if written.is_err() {
            self.known.remove(product);
            self.file = None;
        }
        self.is_unsettled |= written.is_ok();
        written.is_ok()
    }

    /// Replaces the file. A process that is killed leaves the old one or the new one.
    fn write(&self) -> Result<()> {
        let Some(path) = &self.file else { return Ok(()) };
        let stored = Stored { format: FORMAT, owner: self.owner.clone(), products: self.known.clone() };
        let text = serde_json::to_string_pretty(&stored).map_err(|e| Error::refused(e.to_string()).path(path))?;
        let disk = Disk::default();
        // Under the folder's lock there is one writer, and what a killed one left is overwritten.
        let temporary = files::sibling(path, ".tmp")?;
        disk.create(&temporary)?
            .write_all(sealed::seal(&text).as_bytes())
            .map_err(|e| Error::io(path, "cannot write", &e))?;
        disk.rename(&temporary, path)
    }

    /// Makes the file durable.
    pub fn settle(&mut self) {
        if let (true, Some(path)) = (std::mem::take(&mut self.is_unsettled), &self.file) {
            let disk = Disk::default();
            // A disk that fails here has a file that may be lost, as any that was lost: its products are searched again.
            let _ = disk.open(path).and_then(|mut file| file.sync()).and_then(|()| disk.sync_dir(files::parent(path)));
        }
    }
}
