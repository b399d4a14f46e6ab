//! Every file operation of a training run, in one place.
//!
//! Checkpoints, the marker, the resolved settings and the logs are written through [`Disk`], for two reasons: the commit order
//! (write a temporary file → fsync it → fsync its folder → rename → fsync the parent) is then written down once, and the
//! reliability tests can fail or kill the process at each single operation through [`Disk::with_hook`].

use std::fs;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use crate::error::{IoContext, Result};

/// One kind of file operation, as a [`Hook`] sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// A folder and its missing parents are created.
    CreateDir,
    /// A file is created, or opened for appending.
    Create,
    /// At most [`CHUNK`] bytes are written.
    Write,
    /// A file is cut to a length.
    Truncate,
    /// `fsync` of a file.
    SyncFile,
    /// `fsync` of a folder.
    SyncDir,
    /// A file or folder gets its final name.
    Rename,
    /// A file or folder is removed.
    Remove,
    /// A folder is listed.
    List,
    /// A file is opened for reading.
    Open,
    /// Bytes are read.
    Read,
}

/// Called before every operation; an error is returned in place of doing it.
pub type Hook = dyn Fn(Op, &Path) -> io::Result<()> + Send + Sync;

/// Largest single write.
pub const CHUNK: usize = 1 << 20;

/// The file system, with an optional hook before every operation.
#[derive(Clone, Default)]
pub struct Disk {
    hook: Option<Arc<Hook>>,
}

impl Disk {
    /// A disk that asks `hook` before every operation: fault injection.
    pub fn with_hook(hook: Arc<Hook>) -> Self {
        Disk { hook: Some(hook) }
    }

    fn before(&self, op: Op, path: &Path) -> io::Result<()> {
        self.hook.as_ref().map_or(Ok(()), |hook| hook(op, path))
    }

    /// Creates a folder and its missing parents; the new entries are made durable by the caller's [`Disk::sync_dir`].
    pub fn create_dir(&self, path: &Path) -> Result<()> {
        self.before(Op::CreateDir, path).and_then(|()| fs::create_dir_all(path)).at(path, "cannot create the folder")
    }

    /// Creates `path`, or empties it.
    pub fn create(&self, path: &Path) -> Result<File> {
        self.before(Op::Create, path)
            .and_then(|()| fs::File::create(path))
            .at(path, "cannot create")
            .map(|inner| self.file(inner, path))
    }

    /// Opens `path` for reading, cutting and appending, creating it if missing.
    pub fn append(&self, path: &Path) -> Result<File> {
        self.before(Op::Create, path)
            .and_then(|()| fs::OpenOptions::new().read(true).append(true).create(true).open(path))
            .at(path, "cannot open for appending")
            .map(|inner| self.file(inner, path))
    }

    /// Opens `path` for reading.
    pub fn open(&self, path: &Path) -> Result<File> {
        self.before(Op::Open, path)
            .and_then(|()| fs::File::open(path))
            .at(path, "cannot open")
            .map(|inner| self.file(inner, path))
    }

    fn file(&self, inner: fs::File, path: &Path) -> File {
        File { inner, path: path.to_path_buf(), disk: self.clone() }
    }

    /// The whole content of a small file, refused above `limit` bytes.
    pub fn read_small(&self, path: &Path, limit: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open(path)?.take(limit + 1).read_to_end(&mut bytes).at(path, "cannot read")?;
        if bytes.len() as u64 > limit {
            return Err(crate::Error::refused(format!("longer than {limit} bytes"))
                .path(path)
                .remedy("this is not the expected file"));
        }
        Ok(bytes)
    }

    /// Makes the entries of a folder durable.
    pub fn sync_dir(&self, path: &Path) -> Result<()> {
        self.before(Op::SyncDir, path)
            .and_then(|()| fs::File::open(path)?.sync_all())
            .at(path, "cannot flush the folder to disk")
    }

    /// Renames within one file system; not durable before [`Disk::sync_dir`] of the parent.
    pub fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.before(Op::Rename, to).and_then(|()| fs::rename(from, to)).at(to, "cannot rename to this name")
    }

    /// Removes a file or a folder with all it holds; nothing to remove is not an error.
    pub fn remove(&self, path: &Path) -> Result<()> {
        let removed = self.before(Op::Remove, path).and_then(|()| match fs::symlink_metadata(path) {
            Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
            Ok(_) => fs::remove_file(path),
            Err(e) => Err(e),
        });
        match removed {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.at(path, "cannot remove"),
        }
    }

    /// Names of the entries of a folder, sorted; an absent folder has none. Names that are not UTF-8 are not ours and are left out.
    pub fn list(&self, path: &Path) -> Result<Vec<String>> {
        let entries = self.before(Op::List, path).and_then(|()| {
            fs::read_dir(path)?.map(|entry| entry.map(|e| e.file_name())).collect::<io::Result<Vec<_>>>()
        });
        let mut names: Vec<String> = match entries {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            other => {
                other.at(path, "cannot list the folder")?.into_iter().filter_map(|n| n.into_string().ok()).collect()
            }
        };
        names.sort();
        Ok(names)
    }

    /// Replaces `name` in `dir` by `bytes` in the commit order: a reader sees the old file or the new one, never a part.
    pub fn replace(&self, dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
        let temporary = dir.join(format!(".{name}.tmp"));
        let mut file = self.create(&temporary)?;
        file.put(bytes)?;
        file.sync()?;
        self.sync_dir(dir)?;
        self.rename(&temporary, &dir.join(name))?;
        self.sync_dir(dir)
    }
}

/// An open file of a [`Disk`].
pub struct File {
    inner: fs::File,
    path: std::path::PathBuf,
    disk: Disk,
}

impl File {
    /// Writes all of `bytes`, in pieces of at most [`CHUNK`].
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        for chunk in bytes.chunks(CHUNK) {
            self.disk
                .before(Op::Write, &self.path)
                .and_then(|()| self.inner.write_all(chunk))
                .at(&self.path, "cannot write")?;
        }
        Ok(())
    }

    /// `fsync`.
    pub fn sync(&mut self) -> Result<()> {
        self.disk
            .before(Op::SyncFile, &self.path)
            .and_then(|()| self.inner.sync_all())
            .at(&self.path, "cannot flush to disk")
    }

    /// Cuts the file to `length` bytes.
    pub fn truncate(&mut self, length: u64) -> Result<()> {
        self.disk
            .before(Op::Truncate, &self.path)
            .and_then(|()| self.inner.set_len(length))
            .at(&self.path, "cannot shorten")
    }

    /// Size in bytes.
    pub fn size(&self) -> Result<u64> {
        self.inner.metadata().map(|m| m.len()).at(&self.path, "cannot read the size")
    }
}

impl Seek for File {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}

impl Read for File {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.disk.before(Op::Read, &self.path)?;
        self.inner.read(buf)
    }
}
