//! One writer to a folder: an exclusive `flock` whose holder is known by its process id.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::error::{Error, IoContext, Result};

/// Name of the lock file in the folder. In the folder of a run it stays when the run ends: removing it would race with the next
/// holder.
pub const FILE: &str = ".lock";

/// An exclusive lock on a folder; given back when this is dropped or the process ends in any way.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing the file is not enough: a child that another thread has just forked holds a copy until its exec.
        let _ = self.file.unlock();
    }
}

impl Lock {
    /// Takes the lock of `dir`, or says which process holds it.
    pub fn acquire(dir: &Path) -> Result<Lock> {
        let path = dir.join(FILE);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .at(&path, "cannot open the lock file")?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(held(dir, &mut file)),
            Err(TryLockError::Error(e)) => return Err(Error::io(&path, "cannot lock", &e)),
        }
        // The id is for the message only; the lock itself is what excludes. Blanks cover a longer id of an earlier holder, so
        // that the file never has to be emptied first and another process never reads nothing.
        file.write_all(format!("{:<20}\n", std::process::id()).as_bytes()).at(&path, "cannot write the lock file")?;
        Ok(Lock { file })
    }

    /// Whether the lock file of `dir` is the one held: a folder may have been renamed since.
    pub(super) fn is_of(&self, dir: &Path) -> bool {
        let named = std::fs::metadata(dir.join(FILE)).map(|m| (m.dev(), m.ino())).ok();
        named.is_some() && named == self.file.metadata().map(|m| (m.dev(), m.ino())).ok()
    }
}

/// The process of this machine that holds the lock of `dir`, if one does. Only looks: taking the lock to find out could refuse a run
/// that begins at this instant.
pub fn holder(dir: &Path) -> Option<u32> {
    let pid = written(&mut File::open(dir.join(FILE)).ok()?)?;
    match std::fs::read_to_string("/proc/locks") {
        Ok(locks) => locks.lines().any(|line| is_write_lock(line, pid)).then_some(pid),
        // Without that list a process of this id is all there is to go by.
        Err(_) => Path::new("/proc").join(pid.to_string()).exists().then_some(pid),
    }
}

/// Whether a line of `/proc/locks` is an exclusive `flock` of process `pid`: `1: FLOCK  ADVISORY  WRITE 15620 fe:00:6086670 0 EOF`.
fn is_write_lock(line: &str, pid: u32) -> bool {
    let fields: Vec<&str> = line.split_whitespace().collect();
    matches!(fields.as_slice(), [_, "FLOCK", _, "WRITE", owner, ..] if owner.parse() == Ok(pid))
}

/// The process id in a lock file.
fn written(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).and_then(|_| file.take(64).read_to_string(&mut text)).ok()?;
    text.trim().parse().ok()
}

fn held(dir: &Path, file: &mut File) -> Error {
    let holder = written(file).map_or("another process".to_string(), |pid| format!("process {pid}"));
    Error::refused(format!("{holder} is writing to this output folder"))
        .path(dir)
        .remedy("wait for it, stop it, or choose another --output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_holder_is_told_the_first_ones_pid() -> Result<()> {
        let dir = tempfile::tempdir().at("temporary folder", "cannot create")?;
        let first = Lock::acquire(dir.path())?;
        let refused = Lock::acquire(dir.path()).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(refused.contains(&format!("process {} is writing", std::process::id())), "{refused}");
        assert!(first.is_of(dir.path()));
        assert_eq!(holder(dir.path()), Some(std::process::id()));
        drop(first);
        Lock::acquire(dir.path()).map(drop)
    }
}
