//! The output folder of a run before its first step: the lock, the check that it is this run's, and what to resume from.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::files::disk::Disk;
use crate::files::lock::{self, Lock};
use crate::train::checkpoint::{Checkpoint, Opened};
use crate::train::plan::Plan;
use crate::train::settings::{self, Resume};
use crate::train::store::{self, Store};
use crate::train::{metrics, origin, tfevents};

/// Name of the resolved settings in the output folder.
pub const SETTINGS: &str = "run.toml";

/// Name of the exported model in the output folder.
pub const MODEL: &str = "model";

/// What the output folder of a run may hold; a folder with anything else and no run in it is somebody else's.
const OURS: [&str; 7] = [lock::FILE, ".run.toml.tmp", store::DIR, origin::DIR, metrics::FILE, tfevents::DIR, MODEL];

/// A locked output folder.
pub struct Workspace {
    /// The folder.
    pub out: PathBuf,
    /// Its checkpoints.
    pub store: Store,
    /// The file operations.
    pub disk: Disk,
    /// What the run goes on from.
    pub start: Option<Checkpoint>,
    _lock: Lock,
}

impl Workspace {
    /// Locks the output folder of `plan`, creating it if need be, and decides what to resume from. `overrides` names settings
    /// that may differ from those of the checkpoint. Cheap beside building a model: everything that can be refused is refused here.
    pub fn open(disk: &Disk, plan: &Plan, overrides: &[String], warn: &mut dyn FnMut(String)) -> Result<Workspace> {
        let settings = &plan.settings;
        let out = settings
            .output
            .clone()
            .ok_or_else(|| Error::usage("--output is missing").remedy("give the folder of the run"))?;
        let names = disk.list(&out)?;
        if let Some(name) = names.iter().find(|n| !OURS.contains(&n.as_str()))
            && !names.iter().any(|n| n == SETTINGS)
        {
            let cause = format!("the output folder holds {name} and no run");
            return Err(Error::refused(cause).path(&out).remedy("choose a new or empty folder"));
        }
        disk.create_dir(&out)?;
        let lock = Lock::acquire(&out)?;
        let store = Store::new(disk, &out, settings.keep);
        store.sweep()?;
        disk.sync_dir(&out)?;
        let start = choose(disk, &store, &out, settings.resume(), warn)?;
        if let Some(checkpoint) = &start {
            settings::compare(&plan.identity, &checkpoint.state.settings, overrides, &checkpoint.dir)?;
        }
        let text = settings.to_toml()?;
        if disk.list(&out)?.iter().all(|n| n != SETTINGS)
            || disk.read_small(&out.join(SETTINGS), 1 << 20)? != text.as_bytes()
        {
            disk.replace(&out.join(SETTINGS), text.as_bytes())?;
        }
        Ok(Workspace { out, store, disk: disk.clone(), start, _lock: lock })
    }
}

fn choose(
    disk: &Disk,
    store: &Store,
    out: &Path,
    resume: Resume,
    warn: &mut dyn FnMut(String),
) -> Result<Option<Checkpoint>> {
    match resume {
        Resume::Auto => store.newest(warn),
        Resume::Never => match store.list()?.last() {
            None => Ok(None),
            Some((step, dir)) => {
                Err(Error::refused(format!("the output folder holds a run that was saved at step {step}"))
                    .path(dir)
                    .remedy("leave --resume never out to go on with it, or choose another --output"))
            }
        },
        Resume::From(dir) => {
            let checkpoint = match Checkpoint::open(disk, &dir)? {
                Opened::Good(checkpoint) => *checkpoint,
                Opened::Damaged(e) => return Err(e),
            };
            // Steps after the chosen one would be taken for the newest state of this run if it were killed before its next save.
            match store.list()?.last() {
                Some((step, newer)) if *step > checkpoint.state.step => {
                    Err(Error::refused(format!("{} holds this later checkpoint", out.display())).path(newer).remedy(
                        "move it away to go back, use --resume auto to go on from it, or choose another --output",
                    ))
                }
                _ => Ok(Some(checkpoint)),
            }
        }
    }
}
