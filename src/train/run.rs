//! The loop of a run: evaluate, save, stop, step — each due or not as a pure function of the step and the restored state, so that
//! a run that was killed and resumed does and logs exactly what an undisturbed one does.

use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::error::{Error, Kind, Result};
use crate::eval::metrics::Metric;
use crate::train::checkpoint::{Best, LOSS, State, bits};
use crate::train::collective::{Team, agreement};
use crate::train::metrics::Metrics;
use crate::train::plan::Plan;
use crate::train::progress::{self, Progress};
use crate::train::schedule::Schedule;
use crate::train::settings::Settings;
use crate::train::signals::{self, Stop};
use crate::train::tfevents::Events;
use crate::train::workspace::Workspace;
use crate::train::{Arena, Batches, Engine, EvalPart, StepReport, zero};

/// What a finished run reports.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The state at the end.
    pub state: State,
    /// Loss of the last step of this process; None when there was nothing left to do.
    pub loss: Option<f64>,
    /// Loss of each part on what is held out, at the last evaluation of this process.
    pub held_out: Vec<EvalPart>,
    /// Figures on the dev set, at the last evaluation of this process.
    pub dev: Vec<(Metric, f64)>,
    /// Seconds this process spent in the loop.
    pub seconds: f64,
    /// Steps this process took.
    pub steps: u64,
}

/// A run about to start.
pub struct Run<'a, B> {
    settings: &'a Settings,
    /// At rank 0.
    workspace: Option<Workspace>,
    team: Team,
    engine: &'a mut dyn Engine<Batch = B>,
    batches: &'a mut dyn Batches<Batch = B>,
    stop: &'a Stop,
    progress: &'a mut Progress,
    schedule: Schedule,
    state: State,
    /// Step of the newest checkpoint on disk.
    saved: Option<u64>,
    /// At rank 0.
    metrics: Option<Metrics>,
    events: Option<Events>,
    summary: Summary,
}

impl<'a, B> Run<'a, B> {
    /// Restores what `workspace` found, or starts at step 0. Of the ranks of `team` only rank 0 has a workspace; the others begin with
    /// what it found there.
    pub fn new(
        plan: &'a Plan,
        workspace: Option<Workspace>,
        team: Team,
        engine: &'a mut dyn Engine<Batch = B>,
        batches: &'a mut dyn Batches<Batch = B>,
        stop: &'a Stop,
        progress: &'a mut Progress,
    ) -> Result<Self> {
        let mut state = State::default();
        let start = workspace.as_ref().and_then(|workspace| Some((&workspace.disk, workspace.start.as_ref()?)));
        if let Some((disk, checkpoint)) = start {
            checkpoint.restore(disk, engine)?;
            state = checkpoint.state.clone();
        }
        // Overridden settings are those of the run from here on.
        let settings = &plan.settings;
        (state.settings, state.total_steps, state.seed) = (plan.identity.clone(), plan.total, settings.seed);
        state.engine = env!("CARGO_PKG_VERSION").into();
        state.device = engine.device_name();
        if team.size() > 1 && !state.device.is_empty() {
            state.device = format!("{} × {}", team.size(), state.device);
        }
        let restored = start.map(|_| state.step);
        let (mut saved, mut metrics, mut events) = (None, None, None);
        if let Some(Workspace { out, store, disk, .. }) = &workspace {
            // A checkpoint of another folder is not yet a checkpoint of this one.
            saved = store.list()?.last().map(|(step, _)| *step).filter(|step| Some(*step) == restored);
            metrics = Some(Metrics::open(disk, out, restored)?);
            if settings.tensorboard {
                events = Some(Events::create(disk, out, state.step + 1)?);
            }
        }
        let (restored, saved, state) = agreement::told(&team, (restored, saved, state))?;
        if restored.is_some() {
            batches.seek(state.cursor)?;
            if team.is_shared() {
                agreement::spread(&team, engine)?;
            }
        }
        let summary =
            Summary { state: state.clone(), loss: None, held_out: Vec::new(), dev: Vec::new(), seconds: 0.0, steps: 0 };
        let schedule = settings.schedule(plan.total);
        Ok(Run {
            settings,
            workspace,
            team,
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
    pub fn run(mut self) -> Result<(Summary, Option<Workspace>)> {
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
            let evaluation_due = self.evaluation_due(step, step >= self.state.total_steps);
            let mut stop = agreement::stop(&self.team, self.stop.requested())?;
            if stop.is_none() && self.state.evaluated != Some(step) && evaluation_due {
                self.evaluate()?;
                stop = agreement::stop(&self.team, self.stop.requested())?;
            }
            let patience = self.settings.patience.filter(|most| self.state.since_best >= *most);
            let last = step >= self.state.total_steps || patience.is_some();
            let due = last
                || stop.is_some()
                || (self.settings.keeps_best() && self.state.best.as_ref().is_some_and(|best| best.step == step))
                || (self.settings.save_every > 0 && step > 0 && step.is_multiple_of(self.settings.save_every));
            if due && self.saved != Some(step) {
                self.save()?;
            }
            if let Some(signal) = stop {
                let cause = format!("stopped by {} and saved at step {step}", signals::name(signal));
                return Err(Error::new(Kind::Signal(signal), cause)
                    .path(self.out())
                    .remedy("run the same command to go on"));
            }
            if let Some(most) = patience {
                let times = if most == 1 { "evaluation".into() } else { format!("{most} evaluations in a row") };
                self.progress.say(&format!("step {step}: {times} without a better one, the run ends here"));
            }
            if last {
                return Ok(());
            }
            self.step()?;
        }
    }

    /// The output folder.
    fn out(&self) -> &Path {
        self.settings.output.as_deref().unwrap_or(Path::new(""))
    }

    fn evaluation_due(&self, step: u64, last: bool) -> bool {
        let every = self.settings.eval_every;
        step == 0 || last || (every > 0 && step.is_multiple_of(every))
    }

    fn step(&mut self) -> Result<()> {
        let (waited, cursor) = (self.batches.waited(), self.batches.cursor());
        let micro = self.batches.next()?;
        let lr = self.schedule.lr(self.state.step);
        let next = self.batches.peek();
        let report = self.engine.step_before(&micro, next, self.state.step, lr as f32)?;
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
        let mut texts = Vec::new();
        if report.skipped {
            let own = micro.iter().flat_map(|batch| self.batches.names(batch)).collect();
            texts = agreement::joined(&self.team, own)?;
        }
        if due || report.skipped {
            self.log(&texts, lr, &report, waited.as_secs_f64())?;
        }
        if self.state.skipped_in_a_row >= self.settings.max_skipped {
            return Err(self.diverged(&texts, &report, cursor));
        }
        Ok(())
    }

    fn log(&mut self, texts: &[String], lr: f64, report: &StepReport, waited: f64) -> Result<()> {
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
            line.insert("texts".into(), json!(texts));
        }
        if !report.culprits.is_empty() {
            line.insert("ranks".into(), json!(report.culprits));
        }
        line.insert("tps".into(), json!(rate.round()));
        line.insert("data_wait_s".into(), json!(waited));
        line.insert("mem_gib".into(), json!(resident_gib()));
        self.metrics.as_mut().map_or(Ok(()), |metrics| metrics.write(line))?;
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
                "step {step}: the gradient{} is not finite, nothing was updated ({} in a row)",
                of_ranks(&report.culprits),
                self.state.skipped_in_a_row
            ));
        }
        zero::told(step, report, self.settings).iter().for_each(|line| self.progress.warn(line));
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

    /// Evaluates on what is held out and on the dev set; a signal breaks it off, and the resumed run does it again from its beginning.
    fn evaluate(&mut self) -> Result<()> {
        let step = self.state.step;
        let own = self.held_out()?;
        let Some(mut parts) = agreement::evaluation(&self.team, own)? else { return Ok(()) };
        let Some(dev) = self.judge()? else { return Ok(()) };
        self.state.evaluated = Some(step);
        parts.retain(|part| part.labels > 0);
        if parts.is_empty() && dev.is_empty() {
            return Ok(());
        }
        let loss = (!parts.is_empty()).then(|| parts.iter().map(|part| part.weight * part.loss()).sum());
        self.compare(loss, &dev);
        self.log_evaluation(loss, &parts, &dev)?;
        (self.summary.held_out, self.summary.dev) = (parts, dev);
        Ok(())
    }

    /// Sums over this rank's share of the batches that are held out; none when a signal broke it off.
    fn held_out(&mut self) -> Result<Option<Vec<EvalPart>>> {
        let mut parts = Vec::new();
        for batch in self.batches.held_out().skip(self.team.rank()).step_by(self.team.size()) {
            if self.stop.requested().is_some() {
                return Ok(None);
            }
            self.engine.evaluate(&batch?)?.parts.into_iter().for_each(|part| agreement::add(&mut parts, part));
        }
        Ok(Some(parts))
    }

    /// Figures on the dev set, which rank 0 finds; none when a signal broke it off.
    fn judge(&mut self) -> Result<Option<Vec<(Metric, f64)>>> {
        let (stop, mut found) = (self.stop, None);
        if self.team.rank() == 0 {
            let dev = self.engine.judge(&|| stop.requested().is_none())?;
            found = stop.requested().is_none().then_some(dev);
        }
        let words = |dev: Vec<(Metric, f64)>| dev.iter().map(|(m, x)| (m.to_string(), x.to_bits())).collect::<Vec<_>>();
        let told = agreement::told(&self.team, found.map(words))?;
        let figure = |(name, x): (String, u64)| Ok((name.parse()?, f64::from_bits(x)));
        told.map(|dev| dev.into_iter().map(figure).collect()).transpose()
    }

    /// Whether this evaluation is the best so far.
    fn compare(&mut self, loss: Option<f64>, dev: &[(Metric, f64)]) {
        let metric = self.settings.best_metric(dev);
        let figure = dev.iter().find(|(name, _)| name.to_string() == metric).map(|(_, value)| *value);
        let Some(value) = (if metric == LOSS { loss } else { figure }) else { return };
        let better = |best: &Best| best.metric != metric || best.beaten_by(value);
        if value.is_finite() && self.state.best.as_ref().is_none_or(better) {
            self.state.best = Some(Best::new(self.state.step, &metric, value));
            self.state.since_best = 0;
        } else {
            self.state.since_best += 1;
        }
    }

    fn log_evaluation(&mut self, loss: Option<f64>, parts: &[EvalPart], dev: &[(Metric, f64)]) -> Result<()> {
        let step = self.state.step;
        let (mut line, mut values, mut text) = (self.line("eval"), Vec::new(), format!("step {step}"));
        if let Some(loss) = loss {
            line.insert("loss".into(), json!(loss));
            line.insert("loss_bits".into(), json!(bits(loss)));
            values.push(("eval/loss".to_string(), loss));
            text += &format!("  held-out loss {loss:.4}");
        }
        for part in parts {
            let (short, loss) = (short(part.name), part.loss());
            line.insert(format!("loss_{short}"), json!(loss));
            values.push((format!("eval/loss_{short}"), loss));
            text += &format!("  {} {loss:.4}", part.name);
            if let Some(accuracy) = part.accuracy() {
                line.insert(format!("acc_{short}"), json!(accuracy));
                values.push((format!("eval/acc_{short}"), accuracy));
                text += &format!(" ({:.1} % right)", 100.0 * accuracy);
            }
        }
        for (metric, value) in dev {
            line.insert(metric.to_string(), json!(value));
            values.push((format!("eval/dev/{metric}"), *value));
            text += &format!("  {metric} {value:.4}");
        }
        self.metrics.as_mut().map_or(Ok(()), |metrics| metrics.write(line))?;
        if let Some(events) = &mut self.events {
            events.scalars(step, values.iter().map(|(tag, x)| (tag.as_str(), *x)))?;
        }
        self.progress.say(&text);
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        if self.team.is_shared() {
            let mut weights = Vec::new();
            self.engine.read_arena(Arena::Weights, &mut weights)?;
            agreement::same_weights(&self.team, self.state.step, &weights)?;
        }
        self.saved = Some(self.state.step);
        if let (Some(workspace), Some(metrics)) = (&self.workspace, &mut self.metrics) {
            metrics.sync()?;
            let began = Instant::now();
            let dir = workspace.store.save(&self.state, self.engine)?;
            self.progress.say(&format!("saved {} in {:.1} s", dir.display(), began.elapsed().as_secs_f64()));
            let best = self.state.best.as_ref().filter(|_| self.settings.keeps_best());
            workspace.store.prune(best.map(|best| best.step))?;
        }
        // No rank goes on, or ends, before the checkpoint is safe.
        self.team.barrier()
    }

    fn diverged(&self, names: &[String], report: &StepReport, cursor: u64) -> Error {
        let shown = names.iter().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
        let more = names.len().saturating_sub(8);
        let more = if more > 0 { format!(" and {more} more, all in metrics.jsonl") } else { String::new() };
        let rate = self.settings.learning_rate;
        // One digit of a tenth; no more than what pre-training begins with.
        let lower: f64 = format!("{:.0e}", rate / 10.0).parse().unwrap_or(rate).min(1e-4);
        let remedy = match self.saved {
            Some(step) => format!(
                "the last good checkpoint is that of step {step}; go on from it with a lower rate than {rate:e}: \
                 --learning-rate {lower:e} --override learning-rate"
            ),
            None => {
                format!("nothing was saved yet; start again with a lower rate than {rate:e}: --learning-rate {lower:e}")
            }
        };
        let cause = format!(
            "the gradient{} was not finite in {} steps in a row, up to step {}; the last batch begins at sample {cursor}: {shown}{more}",
            of_ranks(&report.culprits),
            self.state.skipped_in_a_row,
            self.state.step
        );
        Error::refused(cause).path(self.out()).remedy(remedy)
    }
}

/// Whose gradient: that of these ranks, or of all.
fn of_ranks(ranks: &[usize]) -> String {
    match ranks {
        [] => String::new(),
        [one] => format!(" of rank {one}"),
        all => format!(" of ranks {}", all.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")),
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
            let name = if best.metric == LOSS { "best_held_out_loss".into() } else { format!("best_{}", best.metric) };
            json.insert(name, json!(best.value));
            json.insert("best_step".into(), json!(best.step));
        }
        for part in &self.held_out {
            json.insert(format!("held_out_loss_{}", short(part.name)), json!(part.loss()));
            if let Some(accuracy) = part.accuracy() {
                json.insert(format!("held_out_acc_{}", short(part.name)), json!(accuracy));
            }
        }
        for (metric, value) in &self.dev {
            json.insert(metric.to_string(), json!(value));
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
        for part in &self.held_out {
            text += &format!("\nheld-out {}: loss {:.4}", part.name, part.loss());
            if let Some(accuracy) = part.accuracy() {
                text += &format!(", {:.1} % right", 100.0 * accuracy);
            }
        }
        if !self.dev.is_empty() {
            let figures: Vec<String> = self.dev.iter().map(|(metric, value)| format!("{metric} {value:.4}")).collect();
            text += &format!("\ndev set: {}", figures.join(", "));
        }
        if let Some(best) = self.state.best.as_ref().filter(|best| best.metric != LOSS) {
            text += &format!("; best {} {:.4} at step {}", best.metric, best.value, best.step);
        }
        text
    }
}
