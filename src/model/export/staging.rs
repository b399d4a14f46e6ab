//! A folder that appears at once and whole, or not at all: written beside its final place, made durable, then renamed.

use crate::error::{Error, IoContext, Result};
use crate::model::safetensors::writer::Written;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// A folder being written.
#[derive(Debug)]
pub(crate) struct Staging {
    temporary: PathBuf,
    target: PathBuf,
    /// Size and checksum of every file, by its path below the folder.
    files: BTreeMap<String, Written>,
    committed: bool,
}

impl Staging {
    /// Begins the folder `target`. An existing folder is only replaced when `replace` is set and it holds the file `ours`.
    pub fn begin(target: &Path, replace: bool, ours: &str) -> Result<Self> {
        let refuse = |cause: &str| Err(Error::refused(cause).path(target).remedy("choose another folder"));
        let Some(name) = target.file_name() else { return refuse("has no name to write under") };
        if let Ok(meta) = fs::symlink_metadata(target) {
            if !meta.is_dir() {
                return refuse("exists and is not a folder");
            }
            let empty = fs::read_dir(target).at(target, "cannot read")?.next().is_none();
            if !empty && !target.join(ours).is_file() {
                return refuse("exists and was not written by this engine");
            }
            if !empty && !replace {
                return Err(Error::refused("exists already")
                    .path(target)
                    .remedy("choose another folder, or ask to replace it"));
            }
        }
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(".retromae-tmp");
        let temporary = target.with_file_name(hidden);
        if temporary.exists() {
            // Left by a run that was killed while writing.
            fs::remove_dir_all(&temporary).at(&temporary, "cannot remove")?;
        }
        fs::create_dir_all(&temporary).at(&temporary, "cannot create")?;
        Ok(Staging { temporary, target: target.to_path_buf(), files: BTreeMap::new(), committed: false })
    }

    /// Where a file is to be written by someone else, who then calls [`Staging::record`].
    pub fn place(&self, relative: &str) -> Result<PathBuf> {
        let path = self.temporary.join(relative);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).at(folder, "cannot create")?;
        }
        Ok(path)
    }

    /// Notes a file that was written to its [`Staging::place`].
    pub fn record(&mut self, relative: &str, written: Written) {
        self.files.insert(relative.to_string(), written);
    }

    /// Writes a small file.
    pub fn write(&mut self, relative: &str, bytes: &[u8]) -> Result<()> {
        let path = self.place(relative)?;
        let mut file = OpenOptions::new().write(true).create_new(true).open(&path).at(&path, "cannot create")?;
        file.write_all(bytes).at(&path, "cannot write")?;
        file.sync_all().at(&path, "cannot make durable")?;
        self.record(relative, Written { size: bytes.len() as u64, crc32c: crc32c::crc32c(bytes) });
        Ok(())
    }

    /// Copies a file byte for byte.
    pub fn copy(&mut self, source: &Path, relative: &str) -> Result<()> {
        let path = self.place(relative)?;
        let mut from = File::open(source).at(source, "cannot read")?;
        let mut to = OpenOptions::new().write(true).create_new(true).open(&path).at(&path, "cannot create")?;
        let mut written = Written { size: 0, crc32c: 0 };
        let mut buffer = vec![0; 1 << 18];
        loop {
            let count = from.read(&mut buffer).at(source, "cannot read")?;
            if count == 0 {
                break;
            }
            to.write_all(&buffer[..count]).at(&path, "cannot write")?;
            written.crc32c = crc32c::crc32c_append(written.crc32c, &buffer[..count]);
            written.size += count as u64;
        }
        to.sync_all().at(&path, "cannot make durable")?;
        self.record(relative, written);
        Ok(())
    }

    /// Whether a file of that name has been written.
    pub fn has(&self, relative: &str) -> bool {
        self.files.contains_key(relative)
    }

    /// Every file so far.
    pub fn files(&self) -> &BTreeMap<String, Written> {
        &self.files
    }

    /// Makes the folder durable and gives it its name.
    pub fn commit(mut self) -> Result<()> {
        for folder in self.files.keys().filter_map(|name| Path::new(name).parent()) {
            sync_folder(&self.temporary.join(folder))?;
        }
        sync_folder(&self.temporary)?;
        // An empty folder is replaced by rename itself; a full one changes places with the new one, so that there is always one.
        let replaces = fs::read_dir(&self.target).is_ok_and(|mut entries| entries.next().is_some());
        if replaces {
            match renameat_with(CWD, &self.temporary, CWD, &self.target, RenameFlags::EXCHANGE) {
                Ok(()) => {}
                // Some network file systems cannot exchange.
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                    fs::remove_dir_all(&self.target).at(&self.target, "cannot replace")?;
                    fs::rename(&self.temporary, &self.target).at(&self.target, "cannot rename into place")?;
                }
                Err(e) => return Err(Error::io(&self.target, "cannot replace", &e.into())),
            }
        } else {
            fs::rename(&self.temporary, &self.target).at(&self.target, "cannot rename into place")?;
        }
        self.committed = true;
        let parent = self.target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        sync_folder(parent)?;
        if replaces && self.temporary.exists() {
            fs::remove_dir_all(&self.temporary).at(&self.temporary, "cannot remove the replaced folder")?;
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.committed {
            // The error that led here is the one to report; what is left over is removed by the next attempt.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

fn sync_folder(path: &Path) -> Result<()> {
    File::open(path).and_then(|folder| folder.sync_all()).at(path, "cannot make durable")
}
