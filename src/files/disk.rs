//! Every file operation that must survive faults, in one place.
//!
//! Checkpoints, settings, logs and exported models are written through [`Disk`], for two reasons: the commit order (write a
//! temporary file → fsync it → fsync its folder → rename → fsync the parent) is then written down once, and the reliability
//! tests can fail or kill the process at each single operation through [`Disk::with_hook`].

use std::fs;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, RenameFlags, renameat_with};

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

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("hooked", &self.hook.is_some()).finish()
    }
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

    /// Creates `path`, which must not exist.
    pub fn create_new(&self, path: &Path) -> Result<File> {
        self.before(Op::Create, path)
            .and_then(|()| fs::File::create_new(path))
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

    /// Lets two folders change names at once. False, and nothing done, where the file system cannot do that.
    pub fn exchange(&self, one: &Path, other: &Path) -> Result<bool> {
        use rustix::io::Errno;
        self.before(Op::Rename, other).at(other, "cannot rename to this name")?;
        match renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(true),
            Err(Errno::INVAL | Errno::NOSYS | Errno::XDEV | Errno::OPNOTSUPP) => Ok(false),
            Err(e) => Err(crate::Error::io(other, "cannot rename to this name", &e.into())),
        }
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

    /// Replaces `path` by `bytes` in the commit order: a reader sees the old file or the new one, never a part. For folders with
    /// one writer, whose next holder sweeps away the temporary file of a killed one.
    pub fn replace(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        self.replace_by(&super::sibling(path, ".tmp")?, path, |w| w.write_all(bytes))
    }

    /// The commit order for a single file: `temporary`, in the folder of `path`, is filled, made durable and renamed.
    pub(crate) fn replace_by(
        &self,
        temporary: &Path,
        path: &Path,
        fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
    ) -> Result<()> {
        let folder = super::parent(path);
        self.write_synced(temporary, path, fill)?;
        self.sync_dir(folder)?;
        self.rename(temporary, path)?;
        self.sync_dir(folder)
    }

    /// Creates `real`, fills it and makes it durable; errors speak of `named`.
    pub(super) fn write_synced(
        &self,
        real: &Path,
        named: &Path,
        fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
    ) -> Result<()> {
        let mut file = self.create(real).map_err(|e| e.path(named))?;
        file.path = named.to_path_buf();
        let mut writer = BufWriter::with_capacity(CHUNK, file);
        fill(&mut writer).at(named, "cannot write")?;
        writer.into_inner().map_err(io::IntoInnerError::into_error).at(named, "cannot write")?.sync()
    }
}

/// An open file of a [`Disk`].
#[derive(Debug)]
pub struct File {
    inner: fs::File,
    path: PathBuf,
    disk: Disk,
}

impl File {
    /// Writes all of `bytes`, in pieces of at most [`CHUNK`].
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_all(bytes).at(&self.path, "cannot write")
    }

    /// Overwrites bytes that were written before, without moving the end.
    pub fn put_at(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        self.disk
            .before(Op::Write, &self.path)
            .and_then(|()| self.inner.write_all_at(bytes, offset))
            .at(&self.path, "cannot write")
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

impl Write for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let chunk = &bytes[..bytes.len().min(CHUNK)];
        self.disk.before(Op::Write, &self.path)?;
        self.inner.write_all(chunk)?;
        Ok(chunk.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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
