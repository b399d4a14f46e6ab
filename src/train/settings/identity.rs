//! Which settings make two runs the same, and the check that a resumed run is the one it was.

use std::collections::BTreeMap;
use std::path::Path;

use toml::Table;

use super::resolve::applies;
use super::{Objective, Settings};
use crate::error::{Error, Result};
use crate::train::About;

/// Settings that may change between a run and its continuation. `model`, `data` and `precision` are here because what they lead to
/// is compared instead of how they are written: see [`Settings::identity`].
pub(super) const FREE: [&str; 32] = [
    "cross-device-negatives",
    "best-metric",
    "corpus",
    "dev-corpus",
    "dev-qrels",
    "dev-queries",
    "dev-run",
    "dev-sample",
    "keep-best",
    "negatives",
    "patience",
    "qrels",
    "queries",
    "teacher-scores",
    "tokenizer",
    "config-file",
    "config-name",
    "data",
    "device",
    "eval-every",
    "keep",
    "log-every",
    "max-skipped",
    "model",
    "output",
    "precision",
    "resume",
    "save-every",
    "tensorboard",
    "threads",
    "epochs",
    "warmup-ratio",
];

impl Settings {
    /// What must be equal for two runs to be the same, as text by setting name. `total` is the number of steps, in which `epochs`
    /// is contained; the warm-up in steps contains `warmup-ratio`.
    pub fn identity(&self, about: &About, total: u64) -> Result<BTreeMap<String, String>> {
        let mut identity: BTreeMap<String, String> = self
            .table()?
            .into_iter()
            .filter(|(key, _)| !FREE.contains(&key.as_str()))
            .map(|(key, value)| (key, value.to_string()))
            .collect();
        let (batch, accumulate) = self.step_shape();
        identity.insert("accumulate".into(), accumulate.to_string());
        if let Some(batch) = batch {
            identity.insert("batch-size".into(), batch.to_string());
        }
        identity.insert("steps".into(), total.to_string());
        identity.insert("warmup-steps".into(), self.schedule(total).warmup.to_string());
        identity.insert("model".into(), format!("{} [{}]", about.model, about.model_fingerprint));
        identity.insert("data".into(), format!("{} [{}]", about.data, about.data_fingerprint));
        identity.insert("precision".into(), about.precision.clone());
        identity.insert("eval-size".into(), about.held_out.to_string());
        Ok(identity)
    }

    /// What a step works on, however many ranks and micro-batches share it: how many texts belong together, and how many such batches
    /// there are. Only a bi-encoder's texts depend on which others are in the batch.
    fn step_shape(&self) -> (Option<u64>, u64) {
        let (accumulate, ranks) = (u64::from(self.accumulate), self.share.ranks);
        match self.batch_size.map(u64::from) {
            Some(batch) if self.objective != Objective::Contrastive => (Some(batch * accumulate * ranks), 1),
            Some(batch) if self.across() => (Some(batch * ranks), accumulate),
            batch => (batch, accumulate * ranks),
        }
    }

    /// The settings that the objective knows.
    fn table(&self) -> Result<Table> {
        let mut table = Table::try_from(self).map_err(|e| unwritable(&e))?;
        table.retain(|key, _| applies(key, self.objective));
        Ok(table)
    }

    /// The settings as a configuration file that repeats the run.
    pub fn to_toml(&self) -> Result<String> {
        let body = toml::to_string(&self.table()?).map_err(|e| unwritable(&e))?;
        let version = env!("CARGO_PKG_VERSION");
        Ok(format!("# Resolved by retromae-engine {version}; `train --config` with this file repeats the run.\n{body}"))
    }
}

fn unwritable(e: &toml::ser::Error) -> Error {
    Error::refused(format!("the settings cannot be written: {e}")).remedy("check paths and numbers in them")
}

/// Refuses settings that differ from those of a checkpoint and are not named in `overrides`. `current` and `saved` are
/// [`Settings::identity`]; a setting that one of them lacks (another version of the engine wrote it) counts as `unset`.
pub fn compare(
    current: &BTreeMap<String, String>,
    saved: &BTreeMap<String, String>,
    overrides: &[String],
    checkpoint: &Path,
) -> Result<()> {
    let mut known: Vec<&String> = current.keys().chain(saved.keys()).collect();
    known.sort();
    known.dedup();
    if let Some(name) = overrides.iter().find(|name| !known.contains(name)) {
        let names: Vec<&str> = known.iter().map(|s| s.as_str()).collect();
        return Err(Error::usage(format!("--override {name}: no such setting"))
            .remedy(format!("the settings are {}", names.join(", "))));
    }
    let text = |map: &BTreeMap<String, String>, key: &str| map.get(key).cloned().unwrap_or_else(|| "unset".into());
    let changed: Vec<Error> = known
        .into_iter()
        .filter(|key| current.get(*key) != saved.get(*key) && !overrides.contains(key))
        .map(|key| {
            Error::refused(format!("{key} was {} and is now {}", text(saved, key), text(current, key)))
                .path(checkpoint)
                .remedy(format!("give the old value, or --override {key} to change it, or another --output"))
        })
        .collect();
    if changed.is_empty() { Ok(()) } else { Err(Error::several(changed)) }
}
