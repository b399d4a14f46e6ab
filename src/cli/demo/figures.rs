//! What the demo shows at its end: the loss on held-out text over the run, beside what the frequencies of the tokens alone would give.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::data::order::{Order, Part};
use crate::data::shard::{ShardSet, Text};
use crate::error::{Error, IoContext, Result};
use crate::train::progress::{count, human};

/// Loss and share of right predictions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    pub loss: f64,
    pub accuracy: f64,
}

/// One evaluation on the held-out texts.
#[derive(Clone, Debug, PartialEq)]
struct Evaluation {
    step: u64,
    encoder: Score,
    decoder: Score,
    /// Loss of the bags of words, where there is one.
    bow: Option<f64>,
}

/// The figures of a finished run.
#[derive(Clone, Debug)]
pub struct Figures {
    metrics: PathBuf,
    evaluations: Vec<Evaluation>,
    /// Score of the best prediction that ignores the text.
    unigram: Score,
    tokens: u64,
    tokens_per_second: f64,
}

impl Figures {
    /// Reads the metrics of the run in `run`, which kept `held_out` texts of `shards` for evaluation under `seed`.
    pub fn gather(run: &Path, shards: &ShardSet, seed: u64, held_out: u64) -> Result<Figures> {
        let metrics = run.join("metrics.jsonl");
        let text = std::fs::read_to_string(&metrics).at(&metrics, "cannot read")?;
        let mut figures = Figures {
            metrics,
            evaluations: Vec::new(),
            unigram: unigram(shards, &Order::new(seed, shards.len(), held_out)?)?,
            tokens: 0,
            tokens_per_second: 0.0,
        };
        let mut seconds = 0.0;
        for (i, line) in text.lines().enumerate() {
            figures.add(line, &mut seconds).ok_or_else(|| {
                Error::refused("is not a line of metrics")
                    .path(&figures.metrics)
                    .line(i as u64 + 1)
                    .remedy("remove the demo's folder and run it again")
            })?;
        }
        figures.tokens_per_second = figures.tokens as f64 / f64::max(seconds, 1e-9);
        Ok(figures)
    }

    /// Takes in one line of metrics.
    fn add(&mut self, line: &str, seconds: &mut f64) -> Option<()> {
        let line: Value = serde_json::from_str(line).ok()?;
        let number = |key: &str| line[key].as_f64();
        match line["split"].as_str()? {
            "eval" => self.evaluations.push(Evaluation {
                step: line["step"].as_u64()?,
                encoder: Score { loss: number("loss_enc")?, accuracy: number("acc_enc")? },
                decoder: Score { loss: number("loss_dec")?, accuracy: number("acc_dec")? },
                bow: number("loss_bow"),
            }),
            _ => {
                // Rates are those since the line before, so the mean is right for a run that was stopped in between, too.
                let tokens = line["tokens"].as_u64()?;
                *seconds += tokens.saturating_sub(self.tokens) as f64 / f64::max(number("tps")?, 1.0);
                self.tokens = tokens;
            }
        }
        Some(())
    }

    /// Refuses a run that has not learned: a loss that did not fall, or, of a `whole` demo, a decoder that knows no more than
    /// the frequencies.
    pub fn check(&self, whole: bool) -> Result<()> {
        let refuse = |cause: String| {
            let remedy = "report this as a defect, with what the subcommand doctor prints";
            Err(Error::refused(cause).path(&self.metrics).remedy(remedy))
        };
        let (Some(first), Some(last)) = (self.evaluations.first(), self.evaluations.last()) else {
            return refuse("no evaluation was recorded".into());
        };
        for (name, first, last) in [("encoder", first.encoder, last.encoder), ("decoder", first.decoder, last.decoder)]
        {
            if !(last.loss < first.loss) {
                return refuse(format!(
                    "the held-out {name} loss did not fall: {:.4} before, {:.4} after",
                    first.loss, last.loss
                ));
            }
            if whole && !(last.loss < self.unigram.loss) {
                return refuse(format!(
                    "the held-out {name} loss is {:.4}, no lower than the {:.4} of frequencies alone",
                    last.loss, self.unigram.loss
                ));
            }
        }
        Ok(())
    }

    /// As a table, for people; the whole demo took `seconds`.
    pub fn to_text(&self, seconds: f64) -> String {
        let bags = self.evaluations.iter().any(|e| e.bow.is_some());
        let head = format!(
            "{:<18} {:>12} {:>9} {:>14} {:>9}{}",
            "held-out texts",
            "encoder loss",
            "right",
            "decoder loss",
            "right",
            if bags { "  bag-of-words loss" } else { "" }
        );
        let row = |name: &str, encoder: Score, decoder: Score, bow: Option<f64>| {
            let right = |score: Score| format!("{:.1} %", 100.0 * score.accuracy);
            format!(
                "{name:<18} {:>12.4} {:>9} {:>14.4} {:>9}{}",
                encoder.loss,
                right(encoder),
                decoder.loss,
                right(decoder),
                bow.map_or_else(String::new, |loss| format!(" {loss:>18.4}"))
            )
        };
        let rows = self.evaluations.iter().map(|e| row(&format!("step {}", e.step), e.encoder, e.decoder, e.bow));
        let mut lines: Vec<String> = std::iter::once(head).chain(rows).collect();
        lines.push(row("frequencies alone", self.unigram, self.unigram, None));
        lines.push(format!(
            "\n{} in all; trained on {} tokens, {} tokens/s",
            human(std::time::Duration::from_secs_f64(seconds)),
            count(self.tokens as f64),
            count(self.tokens_per_second)
        ));
        lines.join("\n")
    }

    /// As JSON.
    pub fn to_json(&self) -> Value {
        let held_out: Vec<Value> = self
            .evaluations
            .iter()
            .map(|e| {
                let mut value = json!({
                    "step": e.step,
                    "encoder_loss": e.encoder.loss, "encoder_accuracy": e.encoder.accuracy,
                    "decoder_loss": e.decoder.loss, "decoder_accuracy": e.decoder.accuracy,
                });
                if let Some(loss) = e.bow {
                    value["bow_loss"] = json!(loss);
                }
                value
            })
            .collect();
        json!({
            "held_out": held_out,
            "unigram": { "loss": self.unigram.loss, "accuracy": self.unigram.accuracy },
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
        })
    }
}

/// Predicting every token of the held-out texts by how often it occurs in the texts trained on, one added to every count.
fn unigram(shards: &ShardSet, order: &Order) -> Result<Score> {
    let mut counts = vec![1u64; shards.facts().vocab_size as usize];
    for sample in 0..order.texts(Part::Train) {
        inner(shards.text(order.text(Part::Train, sample))?).for_each(|token| counts[token as usize] += 1);
    }
    let total: u64 = counts.iter().sum();
    let most = counts.iter().enumerate().max_by_key(|(_, n)| **n).map(|(token, _)| token as u32);
    let (mut loss, mut right, mut tokens) = (0.0, 0u64, 0u64);
    for sample in 0..order.texts(Part::HeldOut) {
        for token in inner(shards.text(order.text(Part::HeldOut, sample))?) {
            loss -= (counts[token as usize] as f64 / total as f64).ln();
            right += u64::from(Some(token) == most);
            tokens += 1;
        }
    }
    let tokens = tokens.max(1) as f64;
    Ok(Score { loss: loss / tokens, accuracy: right as f64 / tokens })
}

/// The tokens of a text without `[CLS]` and `[SEP]`: those the decoder predicts.
fn inner(text: Text<'_>) -> impl Iterator<Item = u32> + use<'_> {
    (1..text.len().saturating_sub(1)).map(move |i| text.token(i))
}
