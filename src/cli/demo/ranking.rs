//! How well the demo's encoders rank, beside BM25: the table at the end, and what it must show.

use std::path::Path;

use serde_json::{Map, Value};

use super::commands::{BM25, ENCODERS};
use crate::cli::grouped;
use crate::error::{Error, IoContext, Result};

/// The figures, as `evaluate` names them.
pub const METRICS: [&str; 3] = ["mrr@10", "ndcg@10", "recall@100"];
/// By how much the fine-tuned encoder's MRR@10 must be above those of the others; it is more than 0.3 in practice.
const CLEARLY: f64 = 0.2;

/// The figures of every system, in the order the demo makes them.
#[derive(Clone, Debug)]
pub struct Ranking(Vec<(&'static str, [f64; 3])>);

impl Ranking {
    /// Reads what `evaluate` wrote to the demo's folder.
    pub fn gather(dir: &Path) -> Result<Ranking> {
        let mut found = Vec::new();
        for name in ENCODERS.into_iter().chain([BM25]) {
            let path = dir.join(format!("{name}.json"));
            let text = std::fs::read_to_string(&path).at(&path, "cannot read")?;
            let value: Value = serde_json::from_str(&text).unwrap_or_default();
            let figures = METRICS.map(|metric| value[metric].as_f64().unwrap_or(f64::NAN));
            found.push((name, figures));
        }
        Ok(Ranking(found))
    }

    /// Refuses a `whole` demo whose fine-tuned encoder is not clearly better than those it was made from.
    pub fn check(&self, dir: &Path, whole: bool) -> Result<()> {
        let mrr = |name: &str| self.0.iter().find(|row| row.0 == name).map_or(f64::NAN, |row| row.1[0]);
        let [untrained, pretrained, tuned] = ENCODERS.map(mrr);
        if whole && !(tuned >= untrained + CLEARLY && tuned >= pretrained + CLEARLY) {
            let cause = format!(
                "the fine-tuned encoder is not clearly better: MRR@10 {tuned:.4}, untrained {untrained:.4}, \
                 pre-trained {pretrained:.4}"
            );
            let remedy = "report this as a defect, with what the subcommand doctor prints";
            return Err(Error::refused(cause).path(dir).remedy(remedy));
        }
        Ok(())
    }

    /// As a table, for people.
    pub fn to_text(&self, queries: usize, passages: usize) -> String {
        let head = format!("{:<18} {:>12} {:>9} {:>14}", "retrieval", "MRR@10", "NDCG@10", "Recall@100");
        let rows = self.0.iter().map(|(name, [mrr, ndcg, recall])| {
            let name = if *name == BM25 { "BM25" } else { name };
            format!("{name:<18} {mrr:>12.4} {ndcg:>9.4} {recall:>14.4}")
        });
        let lines: Vec<String> = std::iter::once(head).chain(rows).collect();
        let (queries, passages) = (grouped(queries as u64), grouped(passages as u64));
        format!("{}\n{queries} queries that no training saw, among {passages} passages", lines.join("\n"))
    }

    /// As JSON.
    pub fn to_json(&self) -> Value {
        let row = |figures: [f64; 3]| -> Map<String, Value> {
            METRICS.into_iter().zip(figures).map(|(metric, figure)| (metric.into(), figure.into())).collect()
        };
        self.0.iter().map(|&(name, figures)| (name.to_string(), Value::Object(row(figures)))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranking(mrr: [f64; 3]) -> Ranking {
        let names = ENCODERS.into_iter().zip(mrr).map(|(name, mrr)| (name, [mrr; 3]));
        Ranking(names.chain([(BM25, [0.8; 3])]).collect())
    }

    #[test]
    fn fine_tuning_that_helps_little_fails_the_whole_demo() {
        let dir = Path::new("demo");
        assert!(ranking([0.12, 0.03, 0.45]).check(dir, true).is_ok());
        for mrr in [[0.3, 0.03, 0.45], [0.12, 0.4, 0.45], [0.12, 0.03, 0.2], [0.1, 0.1, f64::NAN]] {
            assert!(ranking(mrr).check(dir, true).is_err(), "{mrr:?}");
            assert!(ranking(mrr).check(dir, false).is_ok(), "{mrr:?}");
        }
    }
}
