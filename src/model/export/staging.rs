//! An exported folder while it is written: every file is made durable and its size and checksum noted for the manifest.
//! [`OutputDir`] makes the folder appear at once and whole, or not at all.

use crate::error::Result;
use crate::files::{Disk, OutputDir};
use crate::model::safetensors::writer::Written;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A folder being written.
#[derive(Debug)]
pub(crate) struct Staging {
    folder: OutputDir,
    /// Size and checksum of every file, by its path below the folder.
    files: BTreeMap<String, Written>,
    /// What stands before the names that the methods take: empty, or a folder and `/`.
    inside: String,
}

impl Staging {
    /// Begins the folder `target`. An existing folder is only replaced when `replace` is set and it holds the file `ours`.
    pub fn begin(disk: &Disk, target: &Path, replace: bool, ours: &str) -> Result<Self> {
        Ok(Staging {
            folder: OutputDir::create_on(disk, target, replace, ours)?,
            files: BTreeMap::new(),
            inside: String::new(),
        })
    }

    /// From now on names are those of files in `folder` below the folder being written; empty for that itself.
    pub fn enter(&mut self, folder: &str) {
        self.inside = if folder.is_empty() { String::new() } else { format!("{folder}/") };
    }

    fn full(&self, relative: &str) -> String {
        format!("{}{relative}", self.inside)
    }

    /// The disk to write through.
    pub fn disk(&self) -> &Disk {
        self.folder.disk()
    }

    /// Where a file is to be written by someone else, who then calls [`Staging::record`].
    pub fn place(&self, relative: &str) -> Result<PathBuf> {
        let path = self.folder.path().join(self.full(relative));
        if let Some(folder) = path.parent() {
            self.disk().create_dir(folder)?;
        }
        Ok(path)
    }

    /// Notes a file that was written to its [`Staging::place`].
    pub fn record(&mut self, relative: &str, written: Written) {
        self.files.insert(self.full(relative), written);
    }

    /// Writes a small file.
    pub fn write(&mut self, relative: &str, bytes: &[u8]) -> Result<()> {
        let path = self.place(relative)?;
        let mut file = self.disk().create_new(&path)?;
        file.put(bytes)?;
        file.sync()?;
        self.record(relative, Written { size: bytes.len() as u64, crc32c: crc32c::crc32c(bytes) });
        Ok(())
    }

    /// Whether a file of that name has been written.
    pub fn has(&self, relative: &str) -> bool {
        self.files.contains_key(&self.full(relative))
    }

    /// Every file so far, by its path below the folder being written.
    pub fn files(&self) -> &BTreeMap<String, Written> {
        &self.files
    }

    /// Makes the folder durable and gives it its name.
    pub fn commit(self) -> Result<()> {
        for folder in self.files.keys().filter_map(|name| Path::new(name).parent()) {
            self.disk().sync_dir(&self.folder.path().join(folder))?;
        }
        self.folder.commit()
    }
}
