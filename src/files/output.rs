//! A folder being made: written beside its final place under a name with a leading dot, and put there whole.
//!
//! Who writes is told by a lock inside the folder being made. Where an older folder is replaced the two change names in one system
//! call, so that at no instant the name is missing; a file system that cannot do that gets two renames.

use std::fs;
use std::path::{Path, PathBuf};

use super::disk::Disk;
use super::lock::{self, Lock};
use super::{parent, sibling};
use crate::error::{Error, IoContext, Result};

/// A folder being made: written beside its final place, and put there whole by [`commit`](OutputDir::commit).
///
/// Dropped without commit, it removes what was written.
#[derive(Debug)]
pub struct OutputDir {
    staging: PathBuf,
    target: PathBuf,
    /// File that marks a folder as the engine's own.
    marker: String,
    /// Whether an older folder is to be replaced.
    replaces: bool,
    disk: Disk,
    lock: Option<Lock>,
}

impl OutputDir {
    /// Starts `target`. A folder that exists and is not empty is refused, unless `overwrite` is given and the folder holds a
    /// file named `marker`: only what the engine itself wrote is ever deleted.
    pub fn create(target: &Path, overwrite: bool, marker: &str) -> Result<OutputDir> {
        Self::create_on(&Disk::default(), target, overwrite, marker)
    }

    /// [`create`](OutputDir::create) on this disk.
    pub fn create_on(disk: &Disk, target: &Path, overwrite: bool, marker: &str) -> Result<OutputDir> {
        let replaces = check_target(target, overwrite, marker)?;
        disk.create_dir(parent(target))?;
        let staging = sibling(target, ".tmp")?;
        let lock = claim(disk, &staging)?;
        // A killed run's leftovers; its lock is ours now.
        for name in fs::read_dir(&staging).at(&staging, "cannot list")? {
            let path = name.at(&staging, "cannot list")?.path();
            if path.file_name().is_some_and(|n| n != lock::FILE) {
                disk.remove(&path)?;
            }
        }
        let (marker, disk) = (marker.to_string(), disk.clone());
        Ok(OutputDir { staging, target: target.to_path_buf(), marker, replaces, disk, lock: Some(lock) })
    }

    /// Where to write. Every file must be flushed ([`write_synced`](super::write_synced)) before [`commit`](OutputDir::commit).
    pub fn path(&self) -> &Path {
        &self.staging
    }

    /// The disk to write through.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Puts the folder in its final place.
    pub fn commit(mut self) -> Result<()> {
        self.disk.sync_dir(&self.staging)?;
        let old_lock = if self.replaces { Some(self.replace()?) } else { self.appear().map(|()| None)? };
        // Only now, in its final place, may the lock file go: without it another process would take the staging folder for its own.
        self.lock = None;
        self.disk.remove(&self.target.join(lock::FILE))?;
        self.disk.sync_dir(parent(&self.target))?;
        self.remove_old()?;
        drop(old_lock);
        Ok(())
    }

    /// Takes a free name.
    fn appear(&mut self) -> Result<()> {
        self.disk.rename(&self.staging, &self.target).map_err(|e| {
            // Somebody else's folder may have taken the name meanwhile.
            let taken = fs::read_dir(&self.target).is_ok_and(|mut entries| entries.next().is_some());
            if taken { exists(&self.target) } else { e }
        })
    }

    /// Takes the name of the old folder, which gets a name under which it is removed. Gives the lock of the old folder.
    fn replace(&mut self) -> Result<Lock> {
        // The old folder may bear the staging name for a moment: nobody may take it for a dead writer's and use it.
        let old_lock = Lock::acquire(&self.target)?;
        let replaced = self.change_places();
        if replaced.is_err() && self.lock.is_some() {
            let _ = fs::remove_file(self.target.join(lock::FILE));
        }
        replaced.map(|()| old_lock)
    }

    fn change_places(&mut self) -> Result<()> {
        let old = sibling(&self.target, &format!("{OLD}{}", std::process::id()))?;
        self.disk.remove(&old)?;
        if self.disk.exchange(&self.staging, &self.target)? {
            // What has the staging name now is not ours to remove by that name.
            self.lock = None;
            return self.disk.rename(&self.staging, &old);
        }
        self.disk.rename(&self.target, &old)?;
        self.disk.rename(&self.staging, &self.target).inspect_err(|_| {
            // The old folder is better than none; the error that matters is the first one.
            let _ = fs::rename(&old, &self.target);
        })
    }

    /// Removes the replaced folder, and those of writers that were killed in this very place.
    fn remove_old(&self) -> Result<()> {
        let prefix = sibling(&self.target, OLD)?;
        let Some(prefix) = prefix.file_name().and_then(|n| n.to_str()) else { return Ok(()) };
        let folder = parent(&self.target);
        for name in self.disk.list(folder)? {
            let of_writer = name.strip_prefix(prefix).is_some_and(|pid| pid.parse::<u32>().is_ok());
            let path = folder.join(&name);
            if of_writer && (path.join(&self.marker).is_file() || path.join(lock::FILE).is_file()) {
                self.disk.remove(&path)?;
            }
        }
        Ok(())
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

/// What follows the name of a folder that was replaced and is being removed; the writer's process id comes after it.
const OLD: &str = ".old-";

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

/// Creates and locks a folder that its holder may rename or remove: the one locked must still be the one of that name.
pub(super) fn claim(disk: &Disk, staging: &Path) -> Result<Lock> {
    for _ in 0..16 {
        disk.create_dir(staging)?;
        let lock = match Lock::acquire(staging) {
            Err(_) if !staging.exists() => continue,
            other => other?,
        };
        if lock.is_of(staging) {
            return Ok(lock);
        }
    }
    Err(Error::refused("another process keeps writing here")
        .path(staging)
        .remedy("wait for it or choose another folder"))
}
