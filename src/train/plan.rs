//! What a run will do, worked out before it costs anything: `train --dry-run` and the header of every run.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::error::Result;
use crate::ops::pool::Pooling;
use crate::train::biencoder::DistillLoss;
use crate::train::progress::{bytes, count};
use crate::train::settings::{Objective, Settings};
use crate::train::{About, Batches};

/// Settings and what they lead to with this model and this data.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The settings.
    pub settings: Settings,
    /// The model, the data and the device.
    pub about: About,
    /// Steps of the whole run.
    pub total: u64,
    /// What must be equal for a run to be continued: [`Settings::identity`].
    pub identity: BTreeMap<String, String>,
}

impl Plan {
    /// The plan of `settings`.
    pub fn new<B>(mut settings: Settings, about: About, batches: &dyn Batches<Batch = B>) -> Result<Plan> {
        let total = match (settings.steps, settings.epochs) {
            (Some(steps), _) => steps,
            (None, epochs) => batches.steps_of(epochs.unwrap_or(1.0))?,
        };
        settings.eval_size = Some(about.held_out);
        let identity = settings.identity(&about, total)?;
        Ok(Plan { settings, about, total, identity })
    }

    /// Bytes of one checkpoint: weights and two moments in fp32.
    pub fn checkpoint_bytes(&self) -> u64 {
        12 * self.about.parameters
    }

    /// Bytes the run needs on disk at its fullest: the checkpoints kept, the one being written, the exported model.
    pub fn disk_bytes(&self) -> u64 {
        self.checkpoint_bytes() * (self.settings.keep as u64 + 1 + u64::from(self.settings.keeps_best()))
            + 4 * self.about.parameters
    }

    /// Tokens the run will see, about.
    pub fn tokens_seen(&self) -> u64 {
        let (about, s) = (&self.about, &self.settings);
        let mean = about.tokens as f64 / about.texts.max(1) as f64;
        let per_micro = match s.tokens_per_batch {
            // A batch by tokens ends before the text that does not fit: half a text is left free on average.
            Some(tokens) => (f64::from(tokens) - 0.5 * mean).max(mean),
            None => mean * f64::from(s.batch_size.unwrap_or(1)),
        };
        let by_steps = self.total as f64 * per_micro * f64::from(s.accumulate) * s.share.ranks as f64;
        s.epochs.map_or(by_steps, |epochs| about.tokens as f64 * epochs) as u64
    }

    /// One line for each fact, as a run prints them before its first step.
    pub fn to_text(&self) -> String {
        let (a, s) = (&self.about, &self.settings);
        let objective = match s.objective {
            Objective::Retromae => format!(
                "RetroMAE, encoder mask {} %, decoder mask {} %",
                100.0 * s.encoder_mask_probability,
                100.0 * s.decoder_mask_probability
            ),
            Objective::Dupmae => format!(
                "DupMAE, encoder mask {} %, decoder mask {} %, {} × bag of words",
                100.0 * s.encoder_mask_probability,
                100.0 * s.decoder_mask_probability,
                s.bow_loss_weight
            ),
            Objective::Mlm => format!("masked language modelling, mask {} %", 100.0 * s.encoder_mask_probability),
            Objective::Contrastive => contrastive(s),
            Objective::CrossEncoder => format!(
                "cross-encoder, softmax over each query's group, pairs of up to {} tokens",
                s.max_length.unwrap_or_default()
            ),
        };
        let (text, tuned) = (if s.objective.is_fine_tuning() { "queries" } else { "texts" }, s.group_size);
        let mut batch = match (s.tokens_per_batch, tuned) {
            (Some(tokens), _) => format!("up to {tokens} tokens"),
            (None, None) => format!("{} {text}", s.batch_size.unwrap_or(1)),
            (None, Some(1)) => format!("{} queries with a passage each", s.batch_size.unwrap_or(1)),
            (None, Some(group)) => format!("{} queries with {group} passages each", s.batch_size.unwrap_or(1)),
        };
        if s.accumulate > 1 {
            batch += &format!(" × {} micro-batches", s.accumulate);
        }
        if s.share.ranks > 1 {
            batch += &format!(" × {} ranks", s.share.ranks);
        }
        let schedule = s.schedule(self.total);
        [
            format!("model      {}, {} parameters", a.model, count(a.parameters as f64)),
            format!("objective  {objective}"),
            format!(
                "data       {}; {} {text} with {} tokens to train on, {} {text} held out",
                a.data,
                a.texts,
                count(a.tokens as f64),
                a.held_out
            ),
            format!("batch      {batch}"),
            format!("steps      {}, about {} tokens", self.total, count(self.tokens_seen() as f64)),
            format!(
                "rate       {:e} after {} steps of warm-up, {}",
                s.learning_rate,
                schedule.warmup,
                s.schedule.words()
            ),
            format!("device     {}, {}", a.device, a.precision),
            format!("memory     {}", bytes(a.memory)),
            format!("disk       {} a checkpoint, {} in all", bytes(self.checkpoint_bytes()), bytes(self.disk_bytes())),
        ]
        .join("\n")
    }

    /// One line when the file system of `out` has less room than the run needs.
    pub fn room(&self, out: &Path) -> Option<String> {
        let existing =
            out.ancestors().map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p }).find(|p| p.exists())?;
        let stat = rustix::fs::statvfs(existing).ok()?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        (free < self.disk_bytes()).then(|| {
            format!(
                "{}: {} free, the run needs about {}; free space or lower --keep",
                existing.display(),
                bytes(free),
                bytes(self.disk_bytes())
            )
        })
    }

    /// The same facts as one JSON object.
    pub fn to_json(&self) -> Value {
        json!({
            "parameters": self.about.parameters,
            "texts": self.about.texts,
            "tokens": self.about.tokens,
            "held_out": self.about.held_out,
            "steps": self.total,
            "tokens_seen": self.tokens_seen(),
            "memory_bytes": self.about.memory,
            "checkpoint_bytes": self.checkpoint_bytes(),
            "disk_bytes": self.disk_bytes(),
        })
    }
}

/// The objective of a bi-encoder in words.
fn contrastive(s: &Settings) -> String {
    let mut words = format!(
        "bi-encoder, {} pooling{}{}{}, temperature {}, queries of up to {} tokens, passages of up to {}",
        if s.pooling == Some(Pooling::Mean) { "mean" } else { "[CLS]" },
        s.projection.map(|width| format!(", projected to {width}")).unwrap_or_default(),
        s.lexical_top_k.map(|k| format!(", and the {k} largest words of a text")).unwrap_or_default(),
        if s.normalize == Some(true) { ", normalised" } else { "" },
        s.temperature.unwrap_or(1.0),
        s.query_length.unwrap_or_default(),
        s.passage_length.unwrap_or_default(),
    );
    if let (Some(loss), Some(weight)) = (s.distill_loss, s.contrastive_loss_weight) {
        let loss = if loss == DistillLoss::Kl { "Kullback-Leibler" } else { "MarginMSE" };
        words += &format!("; {loss} to the teacher's scores, contrastive loss × {weight}");
    }
    words
}
