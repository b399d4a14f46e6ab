//! Settings from flags and a file: what stands when nothing is said, what excludes each other, what must be in its range.

use std::path::Path;

use toml::{Table, Value};

use super::{Objective, Settings};
use crate::error::{Error, Kind, Result};
use crate::ops::lexical::MAX_K;
use crate::retrieve::representation::Representation;
use crate::train::biencoder::DistillLoss;
use crate::train::checkpoint::LOSS;

/// Settings of which at most one may be given; the first with its default stands when none is.
const EXCLUSIVE: [(&[&str], Option<Value>); 4] = [
    (&["model", "config-file", "config-name"], None),
    (&["batch-size", "tokens-per-batch"], Some(Value::Integer(32))),
    (&["epochs", "steps"], Some(Value::Float(3.0))),
    (&["warmup-ratio", "warmup-steps"], Some(Value::Float(0.1))),
];

/// Settings of pre-training alone.
const PRETRAINING: [&str; 4] = ["encoder-mask-probability", "decoder-mask-probability", BAGS, "tokens-per-batch"];
/// Those of DupMAE alone.
const BAGS: &str = "bow-loss-weight";
/// With nothing masked there is nothing to predict, with everything nothing to predict from.
const MASKED: &str =
    "must be above 0, where nothing is predicted and the loss is exactly 0, and below 1; published are 0.3 and 0.5";
/// Settings of fine-tuning alone.
const FINE_TUNING: [&str; 23] = [
    "row-format",
    "title-sep",
    "tokenizer",
    "queries",
    "corpus",
    "qrels",
    "qrels-format",
    "least-grade",
    "negatives",
    "ce-margin",
    "per-system",
    "systems",
    "group-size",
    "negatives-depth",
    "query-length",
    "query-prefix",
    "passage-prefix",
    "temperature",
    "dev-queries",
    "dev-qrels",
    "dev-corpus",
    "dev-sample",
    "dev-run",
];
/// Those of a bi-encoder alone.
const BI_ENCODER: [&str; 14] = [
    "cross-device-negatives",
    "passage-length",
    "pooling",
    "representation",
    "lexical-top-k",
    "normalize",
    "untied",
    "projection",
    "duplicates",
    "chunk",
    "missing-teacher",
    "teacher-scores",
    "distill-loss",
    "contrastive-loss-weight",
];
/// Those of pre-training and of a cross-encoder.
const LENGTH: &str = "max-length";
/// Those of a cross-encoder that a bi-encoder lacks, and the other way round.
const RERANKING: &str = "dev-run";
const SEARCHING: [&str; 1] = ["dev-sample"];

/// Whether an objective knows a setting.
pub(super) fn applies(key: &str, objective: Objective) -> bool {
    match objective {
        Objective::Dupmae => !FINE_TUNING.contains(&key) && !BI_ENCODER.contains(&key),
        Objective::Retromae => key != BAGS && applies(key, Objective::Dupmae),
        Objective::Mlm => key != "decoder-mask-probability" && applies(key, Objective::Retromae),
        Objective::Contrastive => !PRETRAINING.contains(&key) && key != LENGTH && key != RERANKING,
        Objective::CrossEncoder => {
            !PRETRAINING.contains(&key) && !BI_ENCODER.contains(&key) && !SEARCHING.contains(&key)
        }
    }
}

/// What stands when nothing is said, where that is the objective's matter.
fn defaults(objective: Objective, table: &Table) -> Vec<(&'static str, Value)> {
    let has = |key: &str| table.contains_key(key);
    let mut all = Vec::new();
    if objective.is_fine_tuning() {
        let negatives = objective == Objective::CrossEncoder || has("negatives") || has("data");
        all.push(("learning-rate", Value::Float(2e-5)));
        all.push(("group-size", Value::Integer(if negatives { 8 } else { 1 })));
        all.push(("negatives-depth", Value::Integer(200)));
        all.push(("eval-size", Value::Integer(0)));
    }
    match objective {
        Objective::Contrastive => {
            all.push(("query-length", Value::Integer(32)));
            all.push(("passage-length", Value::Integer(128)));
        }
        Objective::CrossEncoder => {
            let length = table.get("max-length").and_then(Value::as_integer).unwrap_or(128);
            all.push(("max-length", Value::Integer(length)));
            all.push(("query-length", Value::Integer(length / 2)));
        }
        Objective::Retromae | Objective::Dupmae | Objective::Mlm => {}
    }
    all
}

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
        let objective: Objective = match table.get("objective") {
            Some(value) => {
                value.clone().try_into().map_err(|e| Error::usage(one_line(&e)).remedy("see train --help"))?
            }
            None => Objective::default(),
        };
        if let Some(key) = table.keys().find(|key| !applies(key, objective)) {
            let cause = format!("--{key} means nothing to --objective {}", objective.name());
            return Err(Error::usage(cause).remedy("leave it out, or choose another objective"));
        }
        for (key, value) in defaults(objective, &table) {
            table.entry(key).or_insert(value);
        }
        let settings: Settings = table.try_into().map_err(|e| Error::usage(one_line(&e)).remedy("see train --help"))?;
        settings.check()?;
        Ok(settings)
    }

    /// Refuses values outside their range.
    fn check(&self) -> Result<()> {
        let open_unit = |x: f64| x > 0.0 && x < 1.0;
        let fine_tuning = self.objective.is_fine_tuning();
        let dev = !self.dev_qrels.is_empty();
        let metrics = [LOSS, "mrr@10", "ndcg@10", "recall@100"];
        let checks = [
            (
                "model",
                self.model.is_some() || self.config_file.is_some() || self.config_name.is_some(),
                "give --model, --config-file or --config-name",
            ),
            ("data", fine_tuning || self.data.is_some(), "give --data, the folder that tokenize wrote"),
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
            ("encoder-mask-probability", open_unit(self.encoder_mask_probability), MASKED),
            ("decoder-mask-probability", open_unit(self.decoder_mask_probability), MASKED),
            (
                BAGS,
                self.bow_loss_weight >= 0.0 && self.bow_loss_weight.is_finite(),
                "must be at least 0; 0 leaves the loss in the log and out of the training",
            ),
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
            (
                "best-metric",
                self.best_metric.as_deref().is_none_or(|name| metrics.contains(&name)),
                "must be loss, mrr@10, ndcg@10 or recall@100",
            ),
            (
                "best-metric",
                dev || self.best_metric.as_deref().is_none_or(|name| name == LOSS),
                "is one of a dev set: give --dev-queries and --dev-qrels",
            ),
            ("patience", self.patience != Some(0), "must be at least 1"),
            (
                "patience",
                self.patience.is_none() || dev || self.eval_size != Some(0),
                "counts evaluations: give a dev set, or --eval-size",
            ),
        ];
        let fine_tuning = if fine_tuning { self.fine_tuning_checks() } else { Vec::new() };
        match checks.into_iter().chain(fine_tuning).find(|(_, good, _)| !good) {
            None => Ok(()),
            Some((key, _, rule)) if rule.starts_with("give") => {
                Err(Error::usage(format!("--{key} is missing")).remedy(rule))
            }
            Some((key, _, rule)) => Err(Error::usage(format!("--{key} {rule}")).remedy("see train --help")),
        }
    }

    /// The settings of fine-tuning that are out of their range or lack another one.
    fn fine_tuning_checks(&self) -> Vec<(&'static str, bool, &'static str)> {
        let cross = self.objective == Objective::CrossEncoder;
        let group = self.group_size.unwrap_or(1);
        let (rows, sets) = (self.data.is_some(), self.queries.is_some());
        let positive = |x: Option<f64>| x.is_none_or(|x| x > 0.0 && x.is_finite());
        let dev = !self.dev_qrels.is_empty() || self.dev_queries.is_some();
        let alone = group == 1 && (cross || self.batch_size == Some(1));
        vec![
            (
                "queries",
                rows || sets,
                "give --queries, --corpus and --qrels, or --data with rows of queries and passages",
            ),
            ("queries", !(rows && sets), "and --data exclude each other: rows bring their own queries"),
            ("corpus", rows || self.corpus.is_some(), "give --corpus, the folder of passages that tokenize wrote"),
            (
                "qrels",
                rows || !self.qrels.is_empty() || !self.negatives.is_empty(),
                "give --qrels, or --negatives in a format that names positives, too",
            ),
            ("qrels", !rows || self.qrels.is_empty(), "and --data exclude each other: rows bring their own positives"),
            (
                "negatives",
                !rows || self.negatives.is_empty(),
                "and --data exclude each other: rows bring their own negatives",
            ),
            (
                "teacher-scores",
                !rows || self.teacher_scores.is_empty(),
                "and --data exclude each other: rows bring their own scores",
            ),
            ("group-size", group > 0, "must be at least 1"),
            (
                "group-size",
                !alone,
                "of one passage leaves nothing to tell it from, so that the loss is always 0: raise it, or --batch-size",
            ),
            (
                "distill-loss",
                group > 1 || self.distill_loss != Some(DistillLoss::MarginMse),
                "margin-mse compares margins between passages of a group: raise --group-size above 1",
            ),
            ("negatives-depth", self.negatives_depth != Some(0), "must be at least 1"),
            ("query-length", self.query_length.is_none_or(|n| n >= 3), "must be at least 3: [CLS], one token, [SEP]"),
            (
                "passage-length",
                self.passage_length.is_none_or(|n| n >= 3),
                "must be at least 3: [CLS], one token, [SEP]",
            ),
            ("temperature", positive(self.temperature), "must be positive"),
            ("projection", self.projection != Some(0), "must be at least 1"),
            ("chunk", self.chunk != Some(0), "must be at least 1"),
            (
                "representation",
                self.representation != Some(Representation::Lexical),
                "lexical is not trained alone: choose cls or both",
            ),
            (
                "lexical-top-k",
                self.lexical_top_k.is_none() || self.representation == Some(Representation::Both),
                "belongs to --representation both",
            ),
            (
                "lexical-top-k",
                self.lexical_top_k.is_none_or(|k| (1..=MAX_K).contains(&k)),
                "must be between 1 and 4096",
            ),
            (
                "contrastive-loss-weight",
                self.contrastive_loss_weight.is_none_or(|x| x >= 0.0 && x.is_finite()),
                "must be at least 0",
            ),
            ("ce-margin", self.ce_margin.is_none_or(f64::is_finite), "must be a number"),
            (
                "dev-queries",
                !dev || self.dev_queries.is_some(),
                "give --dev-queries, the queries that --dev-qrels judge",
            ),
            ("dev-qrels", !dev || !self.dev_qrels.is_empty(), "give --dev-qrels, the judgements of --dev-queries"),
            (
                "dev-run",
                !(dev && cross) || self.dev_run.is_some(),
                "give --dev-run, the lists of the dev set's queries that are to be reranked",
            ),
            (
                "dev-corpus",
                !dev || self.dev_corpus.is_some() || self.corpus.is_some(),
                "give --dev-corpus, the passages that the dev set is searched in",
            ),
        ]
    }
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
    use super::super::compare;
    use super::super::identity::FREE;
    use super::*;
    use crate::train::About;

    fn table(text: &str) -> Table {
        toml::from_str(text).unwrap_or_default()
    }

    const LEAST: &str = "model = 'm'\ndata = 'd'\noutput = 'o'\n";

    #[test]
    fn every_setting_that_is_named_here_is_one() {
        let lists = [&FREE[..], &PRETRAINING, &FINE_TUNING, &BI_ENCODER, &SEARCHING, &[LENGTH, RERANKING]];
        for name in lists.into_iter().flatten() {
            let error = toml::from_str::<Settings>(&format!("{name} = {{}}")).err().map(|e| e.to_string());
            let error = error.unwrap_or_default();
            assert!(!error.is_empty() && !error.contains("unknown field"), "{name}: {error}");
        }
    }

    #[test]
    fn objectives_know_their_own_settings_only() -> Result<()> {
        let sets = "queries = 'q'\ncorpus = 'c'\nqrels = ['r']\nmodel = 'm'\noutput = 'o'\n";
        let refused = |text: &str| {
            let error = Settings::resolve(table(text), None).err();
            error.map(|e| e.to_string()).unwrap_or_default()
        };
        let contrastive = Settings::resolve(table(&format!("{sets}objective = 'contrastive'")), None)?;
        assert_eq!((contrastive.group_size, contrastive.learning_rate), (Some(1), 2e-5));
        assert_eq!((contrastive.query_length, contrastive.passage_length), (Some(32), Some(128)));
        let cross = Settings::resolve(table(&format!("{sets}objective = 'cross-encoder'")), None)?;
        assert_eq!((cross.group_size, cross.max_length, cross.query_length), (Some(8), Some(128), Some(64)));
        for settings in [contrastive, cross] {
            assert_eq!(Settings::resolve(table(&settings.to_toml()?), None)?, settings);
        }
        assert_eq!(
            refused(&format!("{LEAST}group-size = 4")),
            "--group-size means nothing to --objective retromae; leave it out, or choose another objective"
        );
        assert_eq!(
            refused(&format!("{LEAST}bow-loss-weight = 0.2")),
            "--bow-loss-weight means nothing to --objective retromae; leave it out, or choose another objective"
        );
        let dupmae = |text: &str| Settings::resolve(table(&format!("{LEAST}objective = 'dupmae'\n{text}")), None);
        assert_eq!(dupmae("bow-loss-weight = 0.2")?.bow_loss_weight, 0.2);
        let about = About::default();
        assert_eq!(dupmae("")?.identity(&about, 9)?.get("bow-loss-weight"), Some(&"0.1".to_string()));
        assert!(!Settings::resolve(table(LEAST), None)?.to_toml()?.contains("bow-loss-weight"));
        let negative = dupmae("bow-loss-weight = -1.0").err().map(|e| e.to_string()).unwrap_or_default();
        assert!(negative.starts_with("--bow-loss-weight must be at least 0"), "{negative}");
        let one = refused(&format!("{sets}objective = 'contrastive'\nbatch-size = 1"));
        assert!(one.starts_with("--group-size of one passage leaves nothing to tell it from"), "{one}");
        let one = refused(&format!("{sets}objective = 'cross-encoder'\ngroup-size = 1"));
        assert!(one.starts_with("--group-size of one passage leaves nothing to tell it from"), "{one}");
        let both = refused(&format!("{sets}data = 'd'\nobjective = 'contrastive'"));
        assert!(both.starts_with("--queries and --data exclude each other"), "{both}");
        Ok(())
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
