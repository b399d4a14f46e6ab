//! A task's result in the form of MTEB, so that tools that read its results read these. MTEB itself did not run, and the file says so:
//! `mteb_version` is null.

use serde_json::{Map, Value, json};

use super::metrics::{Evaluation, Metric};

/// What a result is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// MTEB's name of the task, as `SciFact`.
    pub name: String,
    /// Split of the judgements.
    pub split: String,
    /// Revision of the data set, where it has one.
    pub revision: String,
}

/// The JSON of one task.
pub fn result(task: &Task, evaluation: &Evaluation, seconds: f64) -> Value {
    let mut scores = Map::new();
    for (metric, mean) in evaluation.metrics.iter().zip(&evaluation.means) {
        let name = match metric {
            Metric::Mrr(k) => format!("mrr_at_{k}"),
            Metric::Recall(k) => format!("recall_at_{k}"),
            Metric::Ndcg(k) => format!("ndcg_at_{k}"),
            Metric::Precision(k) => format!("precision_at_{k}"),
            Metric::Map => "map".to_string(),
        };
        scores.insert(name, json!(mean));
    }
    if let Some(main) = evaluation.mean(Metric::Ndcg(10)).or(evaluation.means.first().copied()) {
        scores.insert("main_score".into(), json!(main));
    }
    scores.insert("hf_subset".into(), json!("default"));
    scores.insert("languages".into(), json!(["eng-Latn"]));
    json!({
        "dataset_revision": task.revision,
        "task_name": task.name,
        "mteb_version": null,
        "scores": { &task.split: [scores] },
        "evaluation_time": seconds,
        "kg_co2_emissions": null,
    })
}
