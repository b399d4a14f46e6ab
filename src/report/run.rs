//! What a run has left in its folder, as far as a report tells it: metrics, settings, checkpoints, how often it was started.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::history::History;
use crate::error::{IoContext, Result};
use crate::files::{Disk, lock};
use crate::model::config::BertConfig;
use crate::train::checkpoint::{self, Best, State};
use crate::train::origin::{self, About};
use crate::train::settings::Settings;
use crate::train::store::{self, Store};
use crate::train::tfevents::{self, Beginning};
use crate::train::workspace::SETTINGS;

/// Largest file of settings that is read.
const LARGEST: u64 = 1 << 20;

/// A checkpoint on disk.
#[derive(Clone, Debug)]
pub struct Saved {
    /// Name of its folder.
    pub name: String,
    /// Bytes of its files.
    pub bytes: u64,
    /// Its state, or what is wrong with it.
    pub state: std::result::Result<State, String>,
}

/// Whether a run goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// This process of this machine is at it.
    Running(u32),
    /// It reached its last step, or its patience ended.
    Finished,
    /// Neither.
    Stopped,
}

/// What a run keeps beside its metrics. Files that are missing or damaged are left out, and [`Facts::notes`] says so: what there is of a
/// run that went wrong is what one wants to see.
#[derive(Clone, Debug)]
pub struct Facts {
    /// `run.toml`, by key.
    pub settings: BTreeMap<String, String>,
    /// The same as the engine of this version reads it.
    pub parsed: Option<Settings>,
    /// Checkpoints, oldest first.
    pub checkpoints: Vec<Saved>,
    /// What it began from, and the model's configuration.
    pub origin: Option<(About, BertConfig)>,
    /// Processes that ran it, by its TensorBoard files.
    pub beginnings: Vec<Beginning>,
    /// Whether it goes on.
    pub status: Status,
    /// What could not be read.
    pub notes: Vec<String>,
}

/// A run in its folder.
#[derive(Clone, Debug)]
pub struct Run {
    /// The folder.
    pub dir: PathBuf,
    /// What it is called in the report.
    pub name: String,
    /// Its figures.
    pub history: History,
    /// The rest.
    pub facts: Facts,
}

impl Facts {
    /// Reads them, but for [`Facts::origin`].
    ///
    /// # Errors
    /// A failure of the system.
    pub fn read(dir: &Path) -> Result<Facts> {
        let disk = Disk::default();
        let mut notes = Vec::new();
        let (settings, parsed) = settings(&disk, dir, &mut notes);
        let mut checkpoints = Vec::new();
        for (_, dir) in Store::new(&disk, dir, 1).list()? {
            // The run may be removing it at this moment.
            let Some(bytes) = size(&dir) else { continue };
            let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let state = checkpoint::glance(&disk, &dir).map_err(|e| e.to_string());
            checkpoints.push(Saved { name, bytes, state });
        }
        for name in disk.list(&dir.join(store::DIR))?.iter().filter(|name| name.starts_with("damaged-")) {
            notes.push(format!("{name} was found to be damaged and is set aside"));
        }
        let beginnings = tfevents::beginnings(&disk, dir)?;
        let mut facts =
            Facts { settings, parsed, checkpoints, origin: None, beginnings, status: Status::Stopped, notes };
        facts.status = match lock::holder(dir) {
            Some(pid) => Status::Running(pid),
            None if facts.ended() => Status::Finished,
            None => Status::Stopped,
        };
        Ok(facts)
    }

    /// Reads what the run began from, every digest checked: too much for each look at a run that goes on.
    fn read_origin(&mut self, dir: &Path) {
        if dir.join(origin::DIR).is_dir() {
            match origin::open(&Disk::default(), dir) {
                Ok(kept) => self.origin = Some((kept.about, kept.config)),
                Err(e) => self.notes.push(e.to_string()),
            }
        }
    }

    /// The state of the newest checkpoint that can be read.
    pub fn state(&self) -> Option<&State> {
        self.checkpoints.iter().rev().find_map(|saved| saved.state.as_ref().ok())
    }

    /// The best evaluation, as the newest checkpoint has it.
    pub fn best(&self) -> Option<&Best> {
        self.state()?.best.as_ref()
    }

    /// Steps of the whole run, as far as that is written down.
    pub fn total(&self) -> Option<u64> {
        let steps = || self.settings.get("steps")?.parse().ok();
        self.state().map(|state| state.total_steps).filter(|steps| *steps > 0).or_else(steps)
    }

    /// The objective's name.
    pub fn objective(&self) -> &str {
        self.settings.get("objective").map_or("unknown", String::as_str)
    }

    fn ended(&self) -> bool {
        let Some(state) = self.state() else { return false };
        let patience = self.settings.get("patience").and_then(|text| text.parse::<u64>().ok());
        state.step >= state.total_steps || patience.is_some_and(|most| state.since_best >= most)
    }
}

impl Run {
    /// Reads the run in `dir`.
    ///
    /// # Errors
    /// No run there, metrics that are empty or damaged, or a failure of the system.
    pub fn read(dir: &Path) -> Result<Run> {
        let history = History::read(dir)?;
        let mut facts = Facts::read(dir)?;
        facts.read_origin(dir);
        Ok(Run { dir: dir.to_path_buf(), name: name(dir), history, facts })
    }

    /// Reads several runs; those of equal name get their paths for names.
    ///
    /// # Errors
    /// As [`Run::read`].
    pub fn read_all(dirs: &[PathBuf]) -> Result<Vec<Run>> {
        let mut runs = dirs.iter().map(|dir| Run::read(dir)).collect::<Result<Vec<_>>>()?;
        let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
        for run in &mut runs {
            if names.iter().filter(|name| **name == run.name).count() > 1 {
                run.name = run.dir.display().to_string();
            }
        }
        Ok(runs)
    }

    /// Steps of the whole run; of one that says epochs and has saved nothing yet, by the part of them that is done.
    pub fn total(&self) -> Option<u64> {
        total(&self.facts, &self.history)
    }
}

/// Steps of the whole run of `facts` and `history`.
pub fn total(facts: &Facts, history: &History) -> Option<u64> {
    let guess = || {
        let epochs: f64 = facts.settings.get("epochs")?.parse().ok()?;
        let last = history.last.filter(|last| last.epoch > 0.0)?;
        Some((last.step as f64 * epochs / last.epoch).round() as u64)
    };
    facts.total().or_else(guess)
}

/// The folder's name, also of `.`.
pub fn name(dir: &Path) -> String {
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    whole.file_name().map_or_else(|| dir.display().to_string(), |name| name.to_string_lossy().into_owned())
}

fn settings(disk: &Disk, dir: &Path, notes: &mut Vec<String>) -> (BTreeMap<String, String>, Option<Settings>) {
    let path = dir.join(SETTINGS);
    let read = disk.read_small(&path, LARGEST).map_err(|e| e.to_string());
    let text = read.and_then(|bytes| {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        toml::from_str::<Table>(&text).map(|table| (table, toml::from_str(&text).ok())).map_err(|e| {
            let message = e.message().to_string();
            format!("{}: {message}", path.display())
        })
    });
    match text {
        Ok((table, parsed)) => (table.into_iter().map(|(key, value)| (key, plain(&value))).collect(), parsed),
        Err(e) => {
            notes.push(format!("the settings cannot be read: {e}"));
            (BTreeMap::new(), None)
        }
    }
}

/// A setting without the quotes of TOML.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(all) => all.iter().map(plain).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// Bytes of the files of a checkpoint.
fn size(dir: &Path) -> Option<u64> {
    let entries = std::fs::read_dir(dir).at(dir, "cannot list").ok()?;
    Some(entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|meta| meta.len()).sum())
}
