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

fn held(dir: &Path, file: &mut File) -> Error {
    let mut text = String::new();
    let read = file.seek(SeekFrom::Start(0)).and_then(|_| file.take(64).read_to_string(&mut text));
    let holder = match (read, text.trim().parse::<u32>()) {
        (Ok(_), Ok(pid)) => format!("process {pid}"),
        _ => "another process".to_string(),
    };
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
        drop(first);
        Lock::acquire(dir.path()).map(drop)
    }
}
