//! Files that appear whole or not at all, and folders with one writer.
//!
//! Everything the engine leaves on disk goes through here: written under a temporary name in the same folder, flushed to the disk,
//! renamed, and the folder flushed. A process killed at any instant leaves either the old state or the new one; what it left
//! half-written is removed by the next writer of the same name.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::error::{Error, IoContext, Result};

/// Writes `path` by `fill`, atomically: temporary file, fsync, rename, fsync of the folder. An existing file is replaced.
pub fn write_atomic(path: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>) -> Result<()> {
    let tmp = sibling(path, &format!(".tmp-{}", std::process::id()))?;
    let written =
        fill_file(&tmp, path, fill).and_then(|()| fs::rename(&tmp, path).at(path, "cannot rename to this name"));
    if written.is_err() {
        // The error that matters is the first one; the temporary file may not even exist.
        let _ = fs::remove_file(&tmp);
    }
    written?;
    sync_dir(parent(path))
}

/// Writes a file under its own name and flushes it to the disk; for files inside a folder that is renamed as a whole afterwards.
pub fn write_synced(path: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>) -> Result<()> {
    fill_file(path, path, fill)
}

/// Creates `real`, fills and flushes it; errors speak of `named`.
fn fill_file(real: &Path, named: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>) -> Result<()> {
    let mut writer = BufWriter::with_capacity(1 << 20, File::create(real).at(named, "cannot create")?);
    fill(&mut writer).at(named, "cannot write")?;
    let file = writer.into_inner().map_err(std::io::IntoInnerError::into_error).at(named, "cannot write")?;
    file.sync_all().at(named, "cannot flush to the disk")
}

/// Flushes a folder's entries to the disk.
pub fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|d| d.sync_all()).at(path, "cannot flush the folder to the disk")
}

/// An exclusive lock on a folder; released when dropped or when the process dies.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Locks `dir`, or says which process holds it.
    pub fn acquire(dir: &Path) -> Result<Lock> {
        let path = dir.join(".lock");
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .at(&path, "cannot create the lock file")?;
        if let Err(e) = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            if e != rustix::io::Errno::WOULDBLOCK {
                return Err(Error::io(&path, "cannot lock", &e.into()));
            }
            let holder = fs::read_to_string(&path).unwrap_or_default();
            let holder = holder.trim();
            let who = if holder.is_empty() { "another process".into() } else { format!("process {holder}") };
            return Err(Error::refused(format!("{who} is writing here"))
                .path(dir)
                .remedy("wait for it, stop it, or choose another folder"));
        }
        let pid = format!("{}\n", std::process::id());
        file.set_len(0).and_then(|()| file.write_all(pid.as_bytes())).at(&path, "cannot write the lock file")?;
        Ok(Lock { _file: file })
    }
}

/// A folder being made: written beside its final place, and put there whole by [`commit`](OutputDir::commit).
///
/// Dropped without commit, it removes what was written.
#[derive(Debug)]
pub struct OutputDir {
    staging: PathBuf,
    target: PathBuf,
    replace: bool,
    lock: Option<Lock>,
}

impl OutputDir {
    /// Starts `target`. A folder that exists and is not empty is refused, unless `overwrite` is given and the folder holds a
    /// file named `marker`: only what the engine itself wrote is ever deleted.
    pub fn create(target: &Path, overwrite: bool, marker: &str) -> Result<OutputDir> {
        let replace = check_target(target, overwrite, marker)?;
        let folder = parent(target);
        fs::create_dir_all(folder).at(folder, "cannot create the folder")?;
        let staging = sibling(target, ".tmp")?;
        let lock = claim(&staging)?;
        // A killed run's leftovers; its lock is ours now.
        for entry in fs::read_dir(&staging).at(&staging, "cannot list")? {
            let path = entry.at(&staging, "cannot list")?.path();
            if path.file_name().is_some_and(|n| n != ".lock") {
                remove(&path)?;
            }
        }
        Ok(OutputDir { staging, target: target.to_path_buf(), replace, lock: Some(lock) })
    }

    /// Where to write. Every file must be flushed ([`write_synced`]) before [`commit`](OutputDir::commit).
    pub fn path(&self) -> &Path {
        &self.staging
    }

    /// Puts the folder in its final place.
    pub fn commit(mut self) -> Result<()> {
        sync_dir(&self.staging)?;
        let old = sibling(&self.target, &format!(".old-{}", std::process::id()))?;
        if self.replace {
            fs::rename(&self.target, &old).at(&self.target, "cannot move the old folder away")?;
        }
        if let Err(e) = fs::rename(&self.staging, &self.target) {
            if self.replace {
                let _ = fs::rename(&old, &self.target);
            }
            return Err(match e.kind() {
                std::io::ErrorKind::DirectoryNotEmpty | std::io::ErrorKind::AlreadyExists => exists(&self.target),
                _ => Error::io(&self.target, "cannot rename the finished folder to this name", &e),
            });
        }
        // Only now, in its final place, may the lock file go: without it another process would take the staging folder for its own.
        self.lock = None;
        let lock_file = self.target.join(".lock");
        fs::remove_file(&lock_file).at(&lock_file, "cannot remove")?;
        sync_dir(parent(&self.target))?;
        if self.replace { remove(&old) } else { Ok(()) }
    }
}

impl Drop for OutputDir {
    fn drop(&mut self) {
        if self.lock.is_some() {
            // Best effort: the next writer of the same name removes what is left.
            let _ = fs::remove_dir_all(&self.staging);
        }
    }
}

/// Whether an old folder is to be replaced; an error when that is not allowed.
fn check_target(target: &Path, overwrite: bool, marker: &str) -> Result<bool> {
    let meta = match fs::symlink_metadata(target) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(Error::io(target, "cannot look at", &e)),
    };
    if !meta.is_dir() {
        return Err(Error::refused("exists and is not a folder").path(target).remedy("choose another --output"));
    }
    if fs::read_dir(target).at(target, "cannot list")?.next().is_none() {
        return Ok(false);
    }
    match (overwrite, target.join(marker).is_file()) {
        (true, true) => Ok(true),
        (true, false) => {
            Err(Error::refused(format!("is not replaced: it holds no {marker}, so this program did not write it"))
                .path(target)
                .remedy("choose another --output or remove the folder yourself"))
        }
        (false, _) => Err(exists(target)),
    }
}

fn exists(target: &Path) -> Error {
    Error::refused("the output folder already exists").path(target).remedy("choose another --output or add --overwrite")
}

/// Creates and locks the staging folder. The one locked must still be the one of that name: its owner may have just renamed it.
fn claim(staging: &Path) -> Result<Lock> {
    for _ in 0..16 {
        match fs::create_dir(staging) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::io(staging, "cannot create the folder", &e));
            }
            _ => {}
        }
        let lock = match Lock::acquire(staging) {
            Err(_) if !staging.exists() => continue,
            other => other?,
        };
        let named = fs::metadata(staging.join(".lock")).map(|m| (m.dev(), m.ino())).ok();
        let held = lock._file.metadata().map(|m| (m.dev(), m.ino())).ok();
        if named.is_some() && named == held {
            return Ok(lock);
        }
    }
    Err(Error::refused("another process keeps writing here")
        .path(staging)
        .remedy("wait for it or choose another folder"))
}

fn remove(path: &Path) -> Result<()> {
    let is_dir = fs::symlink_metadata(path).at(path, "cannot look at")?.is_dir();
    if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) }.at(path, "cannot remove")
}

/// `.name<suffix>` beside `path`.
fn sibling(path: &Path, suffix: &str) -> Result<PathBuf> {
    let Some(name) = path.file_name() else {
        return Err(Error::usage("is not a usable output name").path(path).remedy("name a new file or folder"));
    };
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(suffix);
    Ok(path.with_file_name(hidden))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}
