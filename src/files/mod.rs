//! Files that appear whole or not at all, and folders with one writer.
//!
//! Everything the engine leaves on disk goes through here: written under a temporary name in the same folder, flushed to the disk,
//! renamed, and the folder flushed. A process killed at any instant leaves either the old state or the new one; what it left
//! half-written is removed by the next writer of the same name.
//!
//! - [`disk`]: single file operations, which tests can make fail or kill the process at
//! - [`lock`]: one writer to a folder
//! - [`output`]: a folder that gets its name when it is complete
//! - [`sealed`]: JSON that carries its own digest
//! - [`unfinished`]: what has been computed so far of a file that takes long

use std::ffi::OsString;
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

use crate::error::{Error, IoContext, Result};

pub mod disk;
pub mod lock;
pub mod output;
pub mod sealed;
pub mod unfinished;

pub use disk::Disk;
pub use lock::Lock;
pub use output::OutputDir;

/// Writes `path` by `fill`, atomically: temporary file, fsync, rename, fsync of the folder. An existing file is replaced. For
/// folders that other processes may write to as well; the temporary name is this process's own.
pub fn write_atomic(path: &Path, fill: impl FnOnce(&mut BufWriter<disk::File>) -> io::Result<()>) -> Result<()> {
    let temporary = sibling(path, &format!(".tmp-{}", std::process::id()))?;
    let written = Disk::default().replace_by(&temporary, path, fill);
    if written.is_err() {
        // The error that matters is the first one; the temporary file may not even exist.
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

/// Writes a file under its own name and flushes it to the disk; for files inside a folder that is renamed as a whole afterwards.
pub fn write_synced(path: &Path, fill: impl FnOnce(&mut BufWriter<disk::File>) -> io::Result<()>) -> Result<()> {
    Disk::default().write_synced(path, path, fill)
}

/// Whether a file of this name can be written, tried before hours are spent on its content.
pub fn probe(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Err(Error::refused("is a folder").path(path).remedy("name a file"));
    }
    let temporary = sibling(path, &format!(".probe-{}", std::process::id()))?;
    let made = std::fs::File::create(&temporary).map(drop);
    let _ = std::fs::remove_file(&temporary);
    made.at(path, "cannot create")
}

/// Lower-case hexadecimal, as digests are written.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The first 64 bits of a digest in hexadecimal: things are told apart by them, nothing is protected by them.
pub fn hex16(digest: &[u8]) -> String {
    hex(&digest[..digest.len().min(8)])
}

/// `.name<suffix>` beside `path`.
pub(crate) fn sibling(path: &Path, suffix: &str) -> Result<PathBuf> {
    let Some(name) = path.file_name() else {
        return Err(Error::usage("is not a usable output name").path(path).remedy("name a new file or folder"));
    };
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(suffix);
    Ok(path.with_file_name(hidden))
}

/// The folder that `path` lies in.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}
