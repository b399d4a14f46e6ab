//! Every knob of a training run with its default, the file `run.toml` that holds them, and which of them make two runs the same.
//!
//! The keys of the file are the names of the command-line flags. A flag wins over the file; of a pair that excludes each other
//! (`steps` and `epochs`, say) a flag also puts the file's other half out of force.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::error::{Error, Kind, Result};
use crate::train::About;
use crate::train::schedule::{Decay, Schedule};

/// What is minimised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// RetroMAE: masked language modelling in the encoder, enhanced decoding from its [CLS] (arXiv:2205.12035).
    #[default]
    Retromae,
    /// Masked language modelling alone: the baseline.
    Mlm,
}

/// Arithmetic of the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// bf16 on a GPU, fp32 on the CPU.
    #[default]
    Auto,
    /// fp32 throughout.
    Fp32,
    /// bf16 storage and products, fp32 sums and master weights.
    Bf16,
}

/// What a checkpoint folder is resumed from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// The newest good checkpoint of the output folder, or from the start when there is none.
    #[default]
    Auto,
    /// Nothing: the output folder must not hold a run.
    Never,
    /// This checkpoint.
    From(PathBuf),
}

/// The resolved settings of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Settings {
    /// What is minimised.
    pub objective: Objective,
    /// Folder, file or cached hub name of the model to start from.
    pub model: Option<String>,
    /// `config.json` of a model to start from scratch.
    pub config_file: Option<PathBuf>,
    /// Name of a standard size to start from scratch.
    pub config_name: Option<String>,
    /// Folder that `tokenize` wrote.
    pub data: Option<PathBuf>,
    /// Folder of the run.
    pub output: Option<PathBuf>,
    /// `auto`, `never` or a checkpoint folder.
    pub resume: String,
    /// Texts of a micro-batch.
    pub batch_size: Option<u32>,
    /// Tokens of a micro-batch, in place of `batch_size`.
    pub tokens_per_batch: Option<u32>,
    /// Micro-batches of a step.
    pub accumulate: u32,
    /// Longer texts are cut to this many tokens.
    pub max_length: Option<u32>,
    /// Passes over the data.
    pub epochs: Option<f64>,
    /// Steps, in place of `epochs`.
    pub steps: Option<u64>,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// How the learning rate falls.
    pub schedule: Decay,
    /// Part of the steps that warms up.
    pub warmup_ratio: Option<f64>,
    /// Steps of warm-up, in place of `warmup_ratio`.
    pub warmup_steps: Option<u64>,
    /// Weight decay of AdamW, on all but biases and LayerNorm.
    pub weight_decay: f64,
    /// β₁ of AdamW.
    pub beta1: f64,
    /// β₂ of AdamW.
    pub beta2: f64,
    /// ε of AdamW.
    pub epsilon: f64,
    /// Norm the gradient is clipped to; 0 turns clipping off.
    pub clip: f64,
    /// Part of a text's tokens the encoder has to predict.
    pub encoder_mask_probability: f64,
    /// Part of a text's tokens hidden from each position of the enhanced decoder.
    pub decoder_mask_probability: f64,
    /// Seed of all randomness.
    pub seed: u64,
    /// Arithmetic.
    pub precision: Precision,
    /// `auto`, `cpu`, `cuda` or `emulator`.
    pub device: String,
    /// Threads of the CPU; all cores when absent.
    pub threads: Option<usize>,
    /// Texts held out for evaluation; 1 % of the data, at most 1,000, when absent. 0 holds out none.
    pub eval_size: Option<u64>,
    /// Steps between evaluations; 0 evaluates only at the start and at the end.
    pub eval_every: u64,
    /// Steps between log lines.
    pub log_every: u64,
    /// Steps between checkpoints; 0 saves only at the end and when stopped.
    pub save_every: u64,
    /// Checkpoints kept.
    pub keep: usize,
    /// Steps in a row with a gradient that is not finite, after which the run stops.
    pub max_skipped: u64,
    /// Whether TensorBoard events are written.
    pub tensorboard: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            objective: Objective::default(),
            model: None,
            config_file: None,
            config_name: None,
            data: None,
            output: None,
            resume: "auto".into(),
            batch_size: None,
            tokens_per_batch: None,
            accumulate: 1,
            max_length: None,
            epochs: None,
            steps: None,
            learning_rate: 1e-4,
            schedule: Decay::default(),
            warmup_ratio: None,
            warmup_steps: None,
            weight_decay: 0.01,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            clip: 1.0,
            encoder_mask_probability: 0.3,
            decoder_mask_probability: 0.5,
            seed: 42,
            precision: Precision::default(),
            device: "auto".into(),
            threads: None,
            eval_size: None,
            eval_every: 500,
            log_every: 10,
            save_every: 500,
            keep: 3,
            max_skipped: 10,
            tensorboard: true,
        }
    }
}

/// Settings of which at most one may be given; the first with its default stands when none is.
const EXCLUSIVE: [(&[&str], Option<Value>); 4] = [
    (&["model", "config-file", "config-name"], None),
    (&["batch-size", "tokens-per-batch"], Some(Value::Integer(32))),
    (&["epochs", "steps"], Some(Value::Float(3.0))),
    (&["warmup-ratio", "warmup-steps"], Some(Value::Float(0.1))),
];

/// Settings that may change between a run and its continuation. `model`, `data` and `precision` are here because what they lead to
/// is compared instead of how they are written: see [`Settings::identity`].
const FREE: [&str; 17] = [
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
    /// The settings of the flags given on the command line over those of a configuration file.
    pub fn resolve(flags: Table, file: Option<&Path>) -> Result<Settings> {
        let mut table = Table::new();
        if let Some(path) = file {
            table = read_file(path)?;
        }
        for (group, _) in &EXCLUSIVE {
            if group.iter().any(|key| flags.contains_key(*key)) {
                group.iter().for_each(|key| drop(table.remove(*key)));
            }
        }
        table.extend(flags);
        for (group, default) in EXCLUSIVE {
            match (group.iter().filter(|key| table.contains_key(**key)).count(), default) {
                (0, Some(value)) => drop(table.insert(group[0].to_string(), value)),
                (0 | 1, _) => {}
                _ => {
                    let names: Vec<String> = group.iter().map(|k| format!("--{k}")).collect();
                    return Err(Error::usage(format!("more than one of {} is set", names.join(", ")))
                        .remedy("give one of them"));
                }
            }
        }
        let settings: Settings = table.try_into().map_err(|e| Error::usage(one_line(&e)).remedy("see train --help"))?;
        settings.check()?;
        Ok(settings)
    }

    /// Refuses values outside their range.
    fn check(&self) -> Result<()> {
        let open_unit = |x: f64| x > 0.0 && x < 1.0;
        let checks = [
            (
                "model",
                self.model.is_some() || self.config_file.is_some() || self.config_name.is_some(),
                "give --model, --config-file or --config-name",
            ),
            ("data", self.data.is_some(), "give --data, the folder that tokenize wrote"),
            ("output", self.output.is_some(), "give --output, the folder of the run"),
            ("batch-size", self.batch_size != Some(0), "must be at least 1"),
            ("tokens-per-batch", self.tokens_per_batch != Some(0), "must be at least 1"),
            ("accumulate", self.accumulate > 0, "must be at least 1"),
            ("max-length", self.max_length.is_none_or(|n| n >= 3), "must be at least 3: [CLS], one token, [SEP]"),
            ("epochs", self.epochs.is_none_or(|x| x > 0.0 && x.is_finite()), "must be positive"),
            ("steps", self.steps != Some(0), "must be at least 1"),
            ("learning-rate", self.learning_rate > 0.0 && self.learning_rate.is_finite(), "must be positive"),
            ("warmup-ratio", self.warmup_ratio.is_none_or(|x| (0.0..=1.0).contains(&x)), "must be between 0 and 1"),
            ("weight-decay", (0.0..1.0).contains(&self.weight_decay), "must be at least 0 and below 1"),
            ("beta1", (0.0..1.0).contains(&self.beta1), "must be at least 0 and below 1"),
            ("beta2", (0.0..1.0).contains(&self.beta2), "must be at least 0 and below 1"),
            ("epsilon", self.epsilon > 0.0 && self.epsilon.is_finite(), "must be positive"),
            ("clip", self.clip >= 0.0 && self.clip.is_finite(), "must be positive, or 0 for no clipping"),
            ("encoder-mask-probability", open_unit(self.encoder_mask_probability), "must lie between 0 and 1"),
            ("decoder-mask-probability", open_unit(self.decoder_mask_probability), "must lie between 0 and 1"),
            (
                "device",
                ["auto", "cpu", "cuda", "emulator"].contains(&&*self.device),
                "must be auto, cpu, cuda or emulator",
            ),
            ("seed", i64::try_from(self.seed).is_ok(), "must be below 2^63"),
            ("threads", self.threads != Some(0), "must be at least 1"),
            ("log-every", self.log_every > 0, "must be at least 1"),
            ("keep", self.keep > 0, "must be at least 1"),
            ("max-skipped", self.max_skipped > 0, "must be at least 1"),
        ];
        match checks.iter().find(|(_, good, _)| !good) {
            None => Ok(()),
            Some((key, _, rule)) if rule.starts_with("give") => {
                Err(Error::usage(format!("--{key} is missing")).remedy(*rule))
            }
            Some((key, _, rule)) => Err(Error::usage(format!("--{key} {rule}")).remedy("see train --help")),
        }
    }

    /// `resume`, parsed.
    pub fn resume(&self) -> Resume {
        match self.resume.as_str() {
            "auto" => Resume::Auto,
            "never" => Resume::Never,
            path => Resume::From(path.into()),
        }
    }

    /// The learning rate of a run of `total` steps.
    pub fn schedule(&self, total: u64) -> Schedule {
        let ratio = self.warmup_ratio.unwrap_or(0.0);
        let warmup = self.warmup_steps.unwrap_or_else(|| (total as f64 * ratio).ceil() as u64);
        Schedule { peak: self.learning_rate, warmup, total, decay: self.schedule }
    }

    /// What must be equal for two runs to be the same, as text by setting name. `total` is the number of steps, in which `epochs`
    /// is contained; the warm-up in steps contains `warmup-ratio`.
    pub fn identity(&self, about: &About, total: u64) -> Result<BTreeMap<String, String>> {
        let table = Table::try_from(self).map_err(|e| unwritable(&e))?;
        let mut identity: BTreeMap<String, String> = table
            .into_iter()
            .filter(|(key, _)| !FREE.contains(&key.as_str()))
            .map(|(key, value)| (key, value.to_string()))
            .collect();
        identity.insert("steps".into(), total.to_string());
        identity.insert("warmup-steps".into(), self.schedule(total).warmup.to_string());
        identity.insert("model".into(), format!("{} [{}]", about.model, about.model_fingerprint));
        identity.insert("data".into(), format!("{} [{}]", about.data, about.data_fingerprint));
        identity.insert("precision".into(), about.precision.clone());
        identity.insert("eval-size".into(), about.held_out.to_string());
        Ok(identity)
    }

    /// The settings as a configuration file that repeats the run.
    pub fn to_toml(&self) -> Result<String> {
        let body = toml::to_string(self).map_err(|e| unwritable(&e))?;
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

/// Reads a configuration file, refusing unknown keys and wrong types with their line.
fn read_file(path: &Path) -> Result<Table> {
    let bytes = crate::files::disk::Disk::default().read_small(path, 1 << 20)?;
    let text = String::from_utf8(bytes)
        .map_err(|_| Error::refused("not UTF-8").path(path).remedy("write the file as UTF-8"))?;
    let refuse = |e: &toml::de::Error| {
        let error = Error::new(Kind::Refused, one_line(e))
            .path(path)
            .remedy("keys are the names of the flags; see train --help");
        match e.span() {
            Some(span) => error.line(1 + text[..span.start.min(text.len())].matches('\n').count() as u64),
            None => error,
        }
    };
    toml::from_str::<Settings>(&text).map_err(|e| refuse(&e))?;
    toml::from_str(&text).map_err(|e| refuse(&e))
}

fn one_line(e: &toml::de::Error) -> String {
    e.message().split('\n').next().unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> Table {
        toml::from_str(text).unwrap_or_default()
    }

    const LEAST: &str = "model = 'm'\ndata = 'd'\noutput = 'o'\n";

    #[test]
    fn every_free_setting_is_a_setting() {
        let all = "config-file = 'a'\nconfig-name = 'a'\nmodel = 'm'\ndata = 'd'\noutput = 'o'\n\
                   threads = 1\nepochs = 1.0\nwarmup-ratio = 0.1";
        let settings: Option<Settings> = toml::from_str(all).ok();
        let keys = settings.and_then(|s| Table::try_from(s).ok()).unwrap_or_default();
        for name in FREE {
            assert!(keys.contains_key(name), "{name}");
        }
    }

    #[test]
    fn resolved_settings_survive_their_file() -> Result<()> {
        let settings = Settings::resolve(table(&format!("{LEAST}learning-rate = 0.1\nsteps = 7")), None)?;
        let again = Settings::resolve(table(&settings.to_toml()?), None)?;
        assert_eq!(settings, again);
        assert_eq!((again.steps, again.epochs, again.batch_size, again.learning_rate), (Some(7), None, Some(32), 0.1));
        Ok(())
    }

    #[test]
    fn identity_is_what_settings_lead_to() -> Result<()> {
        let about = About::default();
        let ratio = Settings::resolve(table(&format!("{LEAST}epochs = 2\nwarmup-ratio = 0.1")), None)?;
        let steps = Settings::resolve(
            table(&format!("{LEAST}steps = 100\nwarmup-steps = 10\nlog-every = 3\nresume = 'never'")),
            None,
        )?;
        assert_eq!(ratio.identity(&about, 100)?, steps.identity(&about, 100)?);
        let other = Settings { learning_rate: 2e-4, ..steps };
        let error = compare(&other.identity(&about, 100)?, &ratio.identity(&about, 100)?, &[], Path::new("c"));
        let error = error.err().map(|e| e.to_string()).unwrap_or_default();
        assert_eq!(
            error,
            "c: learning-rate was 0.0001 and is now 0.0002; \
             give the old value, or --override learning-rate to change it, or another --output"
        );
        compare(&other.identity(&about, 100)?, &ratio.identity(&about, 100)?, &["learning-rate".into()], Path::new("c"))
    }
}
