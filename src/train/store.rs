//! The folder of checkpoints of a run: saving in the commit order, pruning, and finding the newest good one.
//!
//! A name `step-…` only ever stands for a checkpoint that was complete and durable before it got that name. What is being written
//! or removed has a name with a leading dot, and is swept away by the next run.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::files::disk::Disk;
use crate::train::Arenas;
use crate::train::checkpoint::{self, Checkpoint, Opened, State};

/// Name of the folder of checkpoints in the output folder.
pub const DIR: &str = "checkpoints";

const MARKER: &str = "latest";
const PREFIX: &str = "step-";

/// Damaged checkpoints, newest first, each with what is wrong.
pub type Damaged = Vec<(PathBuf, Error)>;

/// The checkpoints of one output folder.
pub struct Store {
    disk: Disk,
    dir: PathBuf,
    keep: usize,
}

impl Store {
    /// The store of output folder `out`, keeping the newest `keep` checkpoints (at least one).
    pub fn new(disk: &Disk, out: &Path, keep: usize) -> Self {
        Store { disk: disk.clone(), dir: out.join(DIR), keep: keep.max(1) }
    }

    /// Creates the folder and removes what an interrupted save or prune left. Only for the holder of the lock.
    pub fn sweep(&self) -> Result<()> {
        self.disk.create_dir(&self.dir)?;
        for name in self.disk.list(&self.dir)? {
            if name.starts_with('.') {
                self.disk.remove(&self.dir.join(name))?;
            }
        }
        Ok(())
    }

    /// Steps and folders of the checkpoints, oldest first.
    pub fn list(&self) -> Result<Vec<(u64, PathBuf)>> {
        let mut found: Vec<_> = self
            .disk
            .list(&self.dir)?
            .into_iter()
            .filter_map(|name| Some((name.strip_prefix(PREFIX)?.parse().ok()?, self.dir.join(&name))))
            .collect();
        found.sort();
        Ok(found)
    }

    /// The newest good checkpoint. Newer ones that are damaged are moved aside, each with one line to `warn`. None when none was
    /// ever saved; refused when there were some and none is good.
    pub fn newest(&self, warn: &mut dyn FnMut(String)) -> Result<Option<Checkpoint>> {
        let (found, damaged) = self.look()?;
        if let Some(checkpoint) = &found {
            for (dir, error) in damaged {
                warn(format!("{error}; resuming from {} instead", checkpoint.dir.display()));
                self.set_aside(&dir)?;
            }
        }
        Ok(found)
    }

    /// As [`Store::newest`], changing nothing: the newest good checkpoint, and the damaged ones after it.
    pub fn look(&self) -> Result<(Option<Checkpoint>, Damaged)> {
        let mut bad: Damaged = Vec::new();
        for (_, dir) in self.list()?.into_iter().rev() {
            match Checkpoint::open(&self.disk, &dir)? {
                Opened::Good(checkpoint) => return Ok((Some(*checkpoint), bad)),
                Opened::Damaged(error) => bad.push((dir, error)),
            }
        }
        let marker = self.dir.join(MARKER);
        if !bad.is_empty() {
            let remedy = "no checkpoint of this run is good; restore one, or start again in another --output";
            return Err(Error::several(bad.into_iter().map(|(_, error)| error).collect()).remedy(remedy));
        }
        if marker.exists() {
            let remedy = "restore the checkpoints, or start again in another --output";
            return Err(Error::refused("checkpoints were saved here and all of them are gone")
                .path(&marker)
                .remedy(remedy));
        }
        Ok((None, bad))
    }

    fn set_aside(&self, dir: &Path) -> Result<()> {
        let Some(name) = dir.file_name().and_then(|n| n.to_str()) else { return Ok(()) };
        let aside = self.dir.join(format!("damaged-{name}"));
        self.disk.remove(&aside)?;
        self.disk.rename(dir, &aside)?;
        self.disk.sync_dir(&self.dir)
    }

    /// Saves a checkpoint, then points the marker at it. When this returns, the checkpoint outlives a power cut.
    pub fn save(&self, state: &State, engine: &dyn Arenas) -> Result<PathBuf> {
        let name = format!("{PREFIX}{:08}", state.step);
        let (temporary, fin) = (self.dir.join(format!(".tmp-{name}")), self.dir.join(&name));
        self.disk.remove(&temporary)?;
        self.disk.create_dir(&temporary)?;
        if let Err(e) =
            checkpoint::write(&self.disk, &temporary, state, engine).and_then(|()| self.disk.sync_dir(&temporary))
        {
            // Gives the space of a full disk back; the error that matters is the first one.
            let _ = self.disk.remove(&temporary);
            return Err(e);
        }
        self.disk.rename(&temporary, &fin)?;
        self.disk.sync_dir(&self.dir)?;
        self.disk.replace(&self.dir.join(MARKER), format!("{name}\n").as_bytes())?;
        Ok(fin)
    }

    /// Where the checkpoint of `step` is, if it is there.
    pub fn at(&self, step: u64) -> Result<Option<PathBuf>> {
        Ok(self.list()?.into_iter().find(|(at, _)| *at == step).map(|(_, dir)| dir))
    }

    /// Removes the oldest checkpoints beyond the number to keep, but for that of step `best`. The marker already points at the newest.
    pub fn prune(&self, best: Option<u64>) -> Result<()> {
        let all = self.list()?;
        for (step, dir) in all[..all.len().saturating_sub(self.keep)].iter().filter(|(step, _)| Some(*step) != best) {
            // Renamed first: a half-removed folder must never look like a checkpoint.
            let trash = self.dir.join(format!(".trash-{step}"));
            self.disk.remove(&trash)?;
            self.disk.rename(dir, &trash)?;
            self.disk.sync_dir(&self.dir)?;
            self.disk.remove(&trash)?;
        }
        Ok(())
    }
}
