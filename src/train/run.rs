//! The loop of a run: evaluate, save, stop, step — each due or not as a pure function of the step and the restored state, so that
//! a run that was killed and resumed does and logs exactly what an undisturbed one does.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::data::batch::PretrainBatch;
use crate::error::{Error, Kind, Result};
use crate::train::checkpoint::{Best, State, bits};
use crate::train::metrics::Metrics;
use crate::train::plan::Plan;
use crate::train::progress::{self, Progress};
use crate::train::schedule::Schedule;
use crate::train::settings::Settings;
use crate::train::signals::{self, Stop};
use crate::train::tfevents::Events;
use crate::train::workspace::Workspace;
use crate::train::{Batches, Engine, EvalPart, StepReport};

/// What a finished run reports.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The state at the end.
    pub state: State,
    /// Loss of the last step of this process; None when there was nothing left to do.
    pub loss: Option<f64>,
    /// Loss and accuracy of each part on the held-out texts at the last evaluation of this process.
    pub held_out: Vec<(&'static str, f64, f64)>,
    /// Seconds this process spent in the loop.
    pub seconds: f64,
    /// Steps this process took.
    pub steps: u64,
}

/// A run about to start.
pub struct Run<'a> {
    settings: &'a Settings,
    workspace: Workspace,
    engine: &'a mut dyn Engine,
    batches: &'a mut dyn Batches,
    stop: &'a Stop,
    progress: &'a mut Progress,
    schedule: Schedule,
    state: State,
    /// Step of the newest checkpoint on disk.
    saved: Option<u64>,
    metrics: Metrics,
    events: Option<Events>,
    summary: Summary,
}

impl<'a> Run<'a> {
    /// Restores what `workspace` found, or starts at step 0.
    pub fn new(
        plan: &'a Plan,
        workspace: Workspace,
        engine: &'a mut dyn Engine,
        batches: &'a mut dyn Batches,
        stop: &'a Stop,
        progress: &'a mut Progress,
    ) -> Result<Self> {
        let mut state = State::default();
        if let Some(checkpoint) = &workspace.start {
            checkpoint.restore(&workspace.disk, engine)?;
            state = checkpoint.state.clone();
            batches.seek(state.cursor)?;
        }
        // Overridden settings are those of the run from here on.
        let settings = &plan.settings;
        (state.settings, state.total_steps, state.seed) = (plan.identity.clone(), plan.total, settings.seed);
        state.engine = env!("CARGO_PKG_VERSION").into();
        let restored = workspace.start.as_ref().map(|_| state.step);
        // A checkpoint of another folder is not yet a checkpoint of this one.
        let saved = workspace.store.list()?.last().map(|(step, _)| *step).filter(|step| Some(*step) == restored);
        let metrics = Metrics::open(&workspace.disk, &workspace.out, restored)?;
        let mut events = None;
        if settings.tensorboard {
            events = Some(Events::create(&workspace.disk, &workspace.out, state.step + 1)?);
        }
        let summary = Summary { state: state.clone(), loss: None, held_out: Vec::new(), seconds: 0.0, steps: 0 };
        let schedule = settings.schedule(plan.total);
        Ok(Run {
            settings,
            workspace,
            engine,
            batches,
            stop,
            progress,
            schedule,
            state,
            saved,
            metrics,
            events,
            summary,
        })
    }

    /// Runs to the last step, or to the first reason to stop. Gives the workspace back still locked, for what follows the run.
    pub fn run(mut self) -> Result<(Summary, Workspace)> {
        let began = Instant::now();
        if let Some(events) = &mut self.events {
            let settings = self.settings.to_toml()?;
            events.text(self.state.step, "run/settings", &settings.replace('\n', "  \n"))?;
        }
        self.progress.start(self.state.step, self.state.total_steps);
        let result = self.go();
        self.progress.finish();
        result?;
        self.summary.seconds = began.elapsed().as_secs_f64();
        self.summary.state = self.state;
        Ok((self.summary, self.workspace))
    }

    fn go(&mut self) -> Result<()> {
        loop {
            let step = self.state.step;
            let last = step >= self.state.total_steps;
            if self.stop.requested().is_none() && self.state.evaluated != Some(step) && self.evaluation_due(step, last)
            {
                self.evaluate()?;
            }
            let stop = self.stop.requested();
            let due = last
                || stop.is_some()
                || (self.settings.save_every > 0 && step > 0 && step.is_multiple_of(self.settings.save_every));
            if due && self.saved != Some(step) {
                self.save()?;
            }
            if let Some(signal) = stop {
                let cause = format!("stopped by {} and saved at step {step}", signals::name(signal));
                return Err(Error::new(Kind::Signal(signal), cause)
                    .path(&self.workspace.out)
                    .remedy("run the same command to go on"));
            }
            if last {
                return Ok(());
            }
            self.step()?;
        }
    }

    fn evaluation_due(&self, step: u64, last: bool) -> bool {
        let every = self.settings.eval_every;
        step == 0 || last || (every > 0 && step.is_multiple_of(every))
    }

    fn step(&mut self) -> Result<()> {
        let (waited, cursor) = (self.batches.waited(), self.batches.cursor());
        let micro = self.batches.next()?;
        let lr = self.schedule.lr(self.state.step);
        let report = self.engine.step(&micro, self.state.step, lr as f32)?;
        let waited = self.batches.waited() - waited;

        self.state.step += 1;
        self.state.cursor = self.batches.cursor();
        self.state.tokens += report.tokens;
        self.state.sequences += report.sequences;
        if report.skipped {
            self.state.skipped += 1;
            self.state.skipped_in_a_row += 1;
        } else {
            self.state.skipped_in_a_row = 0;
        }
        self.summary.steps += 1;
        self.summary.loss = Some(report.loss);
        self.progress.step(&report);

        let step = self.state.step;
        let due = step == 1 || step == self.state.total_steps || step.is_multiple_of(self.settings.log_every);
        if due || report.skipped {
            self.log(&micro, lr, &report, waited.as_secs_f64())?;
        }
        if self.state.skipped_in_a_row >= self.settings.max_skipped {
            return Err(self.diverged(&micro, cursor));
        }
        Ok(())
    }

    fn log(&mut self, micro: &[PretrainBatch], lr: f64, report: &StepReport, waited: f64) -> Result<()> {
        let step = self.state.step;
        let rate = self.progress.rate();
        let mut line = self.line("train");
        line.insert("loss".into(), json!(report.loss));
        report.parts.iter().for_each(|(name, x)| drop(line.insert(format!("loss_{}", short(name)), json!(x))));
        report.accuracy.iter().for_each(|(name, x)| drop(line.insert(format!("acc_{}", short(name)), json!(x))));
        line.insert("lr".into(), json!(lr));
        line.insert("grad_norm".into(), json!(report.grad_norm));
        line.insert("skipped".into(), json!(report.skipped));
        line.insert("loss_bits".into(), json!(bits(report.loss)));
        line.insert("grad_norm_bits".into(), json!(bits(report.grad_norm)));
        line.insert("labels".into(), json!(report.labels));
        if report.skipped {
            line.insert("texts".into(), json!(self.names(micro)));
        }
        line.insert("tps".into(), json!(rate.round()));
        line.insert("data_wait_s".into(), json!(waited));
        line.insert("mem_gib".into(), json!(resident_gib()));
        self.metrics.write(line)?;
        if let Some(events) = &mut self.events {
            let parts: Vec<_> =
                report.parts.iter().map(|(name, x)| (format!("train/loss_{}", short(name)), *x)).collect();
            let mut values = vec![
                ("train/loss", report.loss),
                ("train/lr", lr),
                ("train/grad_norm", report.grad_norm),
                ("perf/tps", rate),
            ];
            values.extend(parts.iter().map(|(tag, x)| (tag.as_str(), *x)));
            events.scalars(step, values)?;
        }
        if report.skipped {
            self.progress.warn(&format!(
                "step {step}: the gradient is not finite, nothing was updated ({} in a row)",
                self.state.skipped_in_a_row
            ));
        }
        self.progress.log(step, self.state.total_steps, lr, report);
        Ok(())
    }

    /// The fields every line of the metrics begins with.
    fn line(&self, split: &str) -> Map<String, Value> {
        let mut line = Map::new();
        let ts = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64());
        line.insert("ts".into(), json!((ts * 1000.0).round() / 1000.0));
        line.insert("step".into(), json!(self.state.step));
        line.insert("epoch".into(), json!(self.state.cursor as f64 / self.batches.texts().max(1) as f64));
        line.insert("split".into(), json!(split));
        line.insert("tokens".into(), json!(self.state.tokens));
        line
    }

    /// Evaluates on the held-out texts; a signal breaks it off, and the resumed run does it again from its beginning.
    fn evaluate(&mut self) -> Result<()> {
        let step = self.state.step;
        let mut sums: Vec<EvalPart> = Vec::new();
        for batch in self.batches.held_out() {
            if self.stop.requested().is_some() {
                return Ok(());
            }
            for part in self.engine.evaluate(&batch?)?.parts {
                match sums.iter_mut().find(|sum| sum.name == part.name) {
                    Some(sum) => {
                        sum.loss_sum += part.loss_sum;
                        sum.correct += part.correct;
                        sum.labels += part.labels;
                    }
                    None => sums.push(part),
                }
            }
        }
        self.state.evaluated = Some(step);
        let means: Vec<_> = sums
            .iter()
            .filter(|sum| sum.labels > 0)
            .map(|sum| (sum.name, sum.loss_sum / sum.labels as f64, sum.correct as f64 / sum.labels as f64))
            .collect();
        if means.is_empty() {
            return Ok(());
        }
        let loss: f64 = means.iter().map(|(_, loss, _)| loss).sum();
        if loss.is_finite() && self.state.best.as_ref().is_none_or(|best| best.beaten_by(loss)) {
            self.state.best = Some(Best::new(step, loss));
        }
        let mut line = self.line("eval");
        line.insert("loss".into(), json!(loss));
        line.insert("loss_bits".into(), json!(bits(loss)));
        let (mut text, mut values) =
            (format!("step {step}  held-out loss {loss:.4}"), vec![("eval/loss".to_string(), loss)]);
        for (name, loss, accuracy) in &means {
            let short = short(name);
            line.insert(format!("loss_{short}"), json!(loss));
            line.insert(format!("acc_{short}"), json!(accuracy));
            values.extend([(format!("eval/loss_{short}"), *loss), (format!("eval/acc_{short}"), *accuracy)]);
            text += &format!("  {name} {loss:.4} ({:.1} % right)", 100.0 * accuracy);
        }
        self.metrics.write(line)?;
        if let Some(events) = &mut self.events {
            events.scalars(step, values.iter().map(|(tag, x)| (tag.as_str(), *x)))?;
        }
        self.progress.say(&text);
        self.summary.held_out = means;
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        self.metrics.sync()?;
        let began = Instant::now();
        let dir = self.workspace.store.save(&self.state, self.engine)?;
        self.saved = Some(self.state.step);
        self.progress.say(&format!("saved {} in {:.1} s", dir.display(), began.elapsed().as_secs_f64()));
        self.workspace.store.prune()
    }

    /// Ids of the texts of a step.
    fn names(&self, micro: &[PretrainBatch]) -> Vec<String> {
        micro.iter().flat_map(|batch| &batch.samples).map(|sample| self.batches.name(*sample)).collect()
    }

    fn diverged(&self, micro: &[PretrainBatch], cursor: u64) -> Error {
        let names = self.names(micro);
        let shown = names.iter().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
        let more = names.len().saturating_sub(8);
        let more = if more > 0 { format!(" and {more} more, all in metrics.jsonl") } else { String::new() };
        let remedy = match self.saved {
            Some(step) => format!(
                "the last good checkpoint is that of step {step}; go on from it with --override learning-rate and a lower one"
            ),
            None => "nothing was saved yet; start again with a lower learning rate".into(),
        };
        let cause = format!(
            "the gradient was not finite in {} steps in a row, up to step {}; the last batch begins at sample {cursor}: {shown}{more}",
            self.state.skipped_in_a_row, self.state.step
        );
        Error::refused(cause).path(&self.workspace.out).remedy(remedy)
    }
}

/// The name of a part of the loss in metrics: `enc`, `dec`.
fn short(part: &str) -> &str {
    match part {
        "encoder" => "enc",
        "decoder" => "dec",
        other => other,
    }
}

/// Resident memory of the process, or 0 where the system does not tell.
fn resident_gib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib =
        status.lines().find_map(|l| l.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    (kib.unwrap_or(0.0) / 1048.576).round() / 1000.0
}

impl Summary {
    /// As one JSON object.
    pub fn to_json(&self) -> Value {
        let mut json = Map::new();
        json.insert("steps".into(), json!(self.state.step));
        json.insert("tokens".into(), json!(self.state.tokens));
        json.insert("sequences".into(), json!(self.state.sequences));
        json.insert("skipped".into(), json!(self.state.skipped));
        json.insert("loss".into(), json!(self.loss));
        if let Some(best) = &self.state.best {
            json.insert("best_held_out_loss".into(), json!(best.loss));
            json.insert("best_step".into(), json!(best.step));
        }
        for (name, loss, accuracy) in &self.held_out {
            json.insert(format!("held_out_loss_{}", short(name)), json!(loss));
            json.insert(format!("held_out_acc_{}", short(name)), json!(accuracy));
        }
        json.insert("seconds".into(), json!(self.seconds));
        Value::Object(json)
    }

    /// For people.
    pub fn to_text(&self) -> String {
        let state = &self.state;
        let mut text =
            format!("{} steps, {} texts, {} tokens", state.step, state.sequences, progress::count(state.tokens as f64));
        if state.skipped > 0 {
            text += &format!(", {} steps skipped", state.skipped);
        }
        for (name, loss, accuracy) in &self.held_out {
            text += &format!("\nheld-out {name}: loss {loss:.4}, {:.1} % right", 100.0 * accuracy);
        }
        text
    }
}
