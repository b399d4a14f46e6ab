//! What a person sees of a run: a progress bar on a terminal, plain lines anywhere else, nothing when quiet.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::train::StepReport;

/// Where the run reports to.
pub struct Progress {
    bar: Option<ProgressBar>,
    lines: Option<Box<dyn Write + Send>>,
    since: Instant,
    tokens: u64,
    steps: u64,
    loss: f64,
    finite: u64,
}

impl Progress {
    /// On stderr: a bar when it is a terminal, else lines; nothing but warnings when `quiet`.
    pub fn stderr(quiet: bool) -> Self {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len}  {msg}  {eta} left") {
                bar.set_style(style);
            }
            bar
        });
        let lines = (!quiet).then(|| Box::new(std::io::stderr()) as Box<dyn Write + Send>);
        Self::new(bar, lines)
    }

    /// Lines to `out`.
    pub fn lines(out: Box<dyn Write + Send>) -> Self {
        Self::new(None, Some(out))
    }

    fn new(bar: Option<ProgressBar>, lines: Option<Box<dyn Write + Send>>) -> Self {
        Progress { bar, lines, since: Instant::now(), tokens: 0, steps: 0, loss: 0.0, finite: 0 }
    }

    /// The loop begins at `step` of `total`.
    pub fn start(&mut self, step: u64, total: u64) {
        self.since = Instant::now();
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(step);
            bar.reset_eta();
        }
    }

    /// A line that stays.
    pub fn say(&mut self, text: &str) {
        match (&self.bar, &mut self.lines) {
            (Some(bar), Some(_)) if !bar.is_hidden() => bar.suspend(|| eprintln!("{text}")),
            // A closed stderr must not end a run.
            (_, Some(out)) => drop(writeln!(out, "{text}")),
            _ => {}
        }
    }

    /// A line that is shown even when quiet.
    pub fn warn(&mut self, text: &str) {
        if self.lines.is_none() {
            drop(writeln!(std::io::stderr(), "warning: {text}"));
        }
        self.say(&format!("warning: {text}"));
    }

    /// Counts a step.
    pub fn step(&mut self, report: &StepReport) {
        self.tokens += report.tokens;
        self.steps += 1;
        if report.loss.is_finite() {
            self.loss += report.loss;
            self.finite += 1;
        }
        if let Some(bar) = &self.bar {
            bar.inc(1);
        }
    }

    /// Tokens a second since the last call of [`Progress::log`].
    pub fn rate(&self) -> f64 {
        self.tokens as f64 / self.since.elapsed().as_secs_f64().max(1e-9)
    }

    /// The log line of step `step`; its loss is the mean since the last one.
    pub fn log(&mut self, step: u64, total: u64, lr: f64, report: &StepReport) {
        let mean = if self.finite == 0 { f64::NAN } else { self.loss / self.finite as f64 };
        let parts: String = report.parts.iter().map(|(name, loss)| format!(" {name} {loss:.3}")).collect();
        let text = format!(
            "loss {mean:.4} (last:{parts})  lr {lr:.2e}  grad {:.3}  {} tok/s",
            report.grad_norm,
            count(self.rate())
        );
        match &self.bar {
            Some(bar) => bar.set_message(text),
            None => {
                let per_step = self.since.elapsed().as_secs_f64() / self.steps.max(1) as f64;
                let left = Duration::from_secs_f64(per_step * (total - step) as f64);
                self.say(&format!("step {step}/{total}  {text}  {} left", human(left)));
            }
        }
        (self.since, self.tokens, self.steps) = (Instant::now(), 0, 0);
        (self.loss, self.finite) = (0.0, 0);
    }

    /// The loop is over.
    pub fn finish(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A duration as people say it.
pub fn human(d: Duration) -> String {
    match d.as_secs() {
        s if s >= 86_400 => format!("{}d {}h", s / 86_400, s % 86_400 / 3600),
        s if s >= 3600 => format!("{}h {:02}m", s / 3600, s % 3600 / 60),
        s if s >= 60 => format!("{}m {:02}s", s / 60, s % 60),
        s => format!("{s}s"),
    }
}

/// A count with three digits and a unit: `12.3k`, `4.56M`.
pub fn count(x: f64) -> String {
    match x {
        x if x >= 1e9 => format!("{:.2}G", x / 1e9),
        x if x >= 1e6 => format!("{:.2}M", x / 1e6),
        x if x >= 1e3 => format!("{:.1}k", x / 1e3),
        x => format!("{x:.0}"),
    }
}

/// Bytes with a binary unit.
pub fn bytes(x: u64) -> String {
    match x as f64 {
        x if x >= 1073741824.0 => format!("{:.2} GiB", x / 1073741824.0),
        x if x >= 1048576.0 => format!("{:.1} MiB", x / 1048576.0),
        x => format!("{:.0} KiB", x / 1024.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_as_people_say_them() {
        let secs = |s| human(Duration::from_secs(s));
        assert_eq!([secs(5), secs(65), secs(3700), secs(90_000)], ["5s", "1m 05s", "1h 01m", "1d 1h"]);
        assert_eq!([count(12.0), count(12_345.0), count(4_560_000.0), count(2e9)], ["12", "12.3k", "4.56M", "2.00G"]);
        assert_eq!([bytes(2048), bytes(3 << 20), bytes(5 << 30)], ["2 KiB", "3.0 MiB", "5.00 GiB"]);
    }
}
