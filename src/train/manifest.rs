//! The manifest of a folder of files: size and SHA-256 of each, and of itself, so that no changed bit goes unnoticed.

use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::error::{Error, IoContext, Kind, Result};
use crate::files::disk::{CHUNK, Disk, File};
use crate::files::hex;

/// Name of the manifest.
pub(super) const FILE: &str = "manifest.json";

/// Largest manifest, or other small file, that is read.
pub(super) const SMALL: u64 = 16 << 20;

/// What a folder with a manifest is, for messages, and the version of its layout.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// "checkpoint"
    pub what: &'static str,
    /// Version.
    pub format: u32,
    /// What to do when something in the folder is damaged.
    pub remedy: &'static str,
}

/// Why a folder did not open: something wrong with its bytes, or something else.
pub(super) enum Trouble {
    Damage(Error),
    Other(Error),
}

impl Trouble {
    /// The error, whichever it is.
    pub fn into_error(self) -> Error {
        match self {
            Trouble::Damage(e) | Trouble::Other(e) => e,
        }
    }
}

impl From<Error> for Trouble {
    fn from(e: Error) -> Self {
        Trouble::Other(e)
    }
}

/// A file whose size and digest are taken while it is written.
pub(super) struct Hashed {
    file: File,
    size: u64,
    sha: Sha256,
}

impl Hashed {
    /// Creates the file.
    pub fn create(disk: &Disk, path: &Path) -> Result<Self> {
        Ok(Hashed { file: disk.create(path)?, size: 0, sha: Sha256::new() })
    }

    /// Appends.
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.size += bytes.len() as u64;
        self.sha.update(bytes);
        self.file.put(bytes)
    }

    /// Makes the file durable; gives its entry in the manifest.
    pub fn finish(mut self) -> Result<Value> {
        self.file.sync()?;
        Ok(json!({ "bytes": self.size, "sha256": hex(&self.sha.finalize()) }))
    }
}

/// Writes the manifest of `dir` with the entries `files`.
pub(super) fn write(disk: &Disk, dir: &Path, layout: Layout, files: Map<String, Value>) -> Result<()> {
    let mut manifest = Map::new();
    manifest.insert("format".into(), json!(layout.format));
    manifest.insert("files".into(), Value::Object(files));
    let digest = digest_of(&manifest);
    manifest.insert("sha256".into(), json!(digest));
    let mut out = Hashed::create(disk, &dir.join(FILE))?;
    out.put(&json_bytes(&Value::Object(manifest)))?;
    out.finish().map(drop)
}

/// Reads the manifest of `dir` and checks every file it lists; gives the entries.
pub(super) fn check(disk: &Disk, dir: &Path, layout: Layout) -> std::result::Result<Map<String, Value>, Trouble> {
    let files = read(disk, &dir.join(FILE), layout)?;
    for (name, entry) in &files {
        check_file(disk, &dir.join(name), entry, layout)?;
    }
    Ok(files)
}

/// Reads the manifest of `dir` and checks the file `name`, which it must list.
pub(super) fn check_one(disk: &Disk, dir: &Path, name: &str, layout: Layout) -> std::result::Result<(), Trouble> {
    match read(disk, &dir.join(FILE), layout)?.get(name) {
        Some(entry) => check_file(disk, &dir.join(name), entry, layout),
        None => Err(layout.damage(&dir.join(FILE), format!("does not list {name}"))),
    }
}

impl Layout {
    /// Something in the folder has changed.
    pub fn damage(self, path: &Path, cause: impl Into<String>) -> Trouble {
        Trouble::Damage(self.damaged(path, cause))
    }

    /// [`Layout::damage`] as an error.
    pub fn damaged(self, path: &Path, cause: impl Into<String>) -> Error {
        Error::refused(cause).path(path).remedy(self.remedy)
    }

    fn missing(self, path: &Path) -> Option<Trouble> {
        (!path.exists()).then(|| self.damage(path, "missing"))
    }
}

fn read(disk: &Disk, path: &Path, layout: Layout) -> std::result::Result<Map<String, Value>, Trouble> {
    if let Some(trouble) = layout.missing(path) {
        return Err(trouble);
    }
    let bytes = match disk.read_small(path, SMALL) {
        Err(e) if e.kind() == Kind::Refused => return Err(Trouble::Damage(e)),
        other => other?,
    };
    let mut manifest: Map<String, Value> =
        serde_json::from_slice(&bytes).map_err(|e| layout.damage(path, format!("not a manifest: {e}")))?;
    let canonical = json_bytes(&Value::Object(manifest.clone())) == bytes;
    let digest = manifest.shift_remove("sha256");
    if digest.as_ref().and_then(Value::as_str) != Some(&digest_of(&manifest)) {
        return Err(layout.damage(path, "its own digest does not hold"));
    }
    let format = manifest.get("format").and_then(Value::as_u64);
    if format != Some(u64::from(layout.format)) {
        let cause =
            format!("{} format {}, this engine reads format {}", layout.what, format.unwrap_or(0), layout.format);
        return Err(Trouble::Other(Error::refused(cause).path(path).remedy("use the engine that wrote it")));
    }
    match manifest.shift_remove("files") {
        // The digest is of the content; white space outside it must not change either.
        Some(Value::Object(files)) if canonical => Ok(files),
        _ => Err(layout.damage(path, "not as this engine writes it")),
    }
}

fn check_file(disk: &Disk, path: &Path, entry: &Value, layout: Layout) -> std::result::Result<(), Trouble> {
    if let Some(trouble) = layout.missing(path) {
        return Err(trouble);
    }
    let mut file = disk.open(path)?;
    let (size, expected) = (file.size()?, entry["bytes"].as_u64());
    if Some(size) != expected {
        return Err(layout.damage(path, format!("{size} bytes, the manifest says {}", expected.unwrap_or(0))));
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
        Err(layout.damage(path, "its digest does not hold"))
    }
}

/// As every JSON file of these folders is written.
pub(super) fn json_bytes(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

fn digest_of(manifest: &Map<String, Value>) -> String {
    hex(&Sha256::digest(Value::Object(manifest.clone()).to_string()))
}
