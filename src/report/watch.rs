//! A run in a few lines for a terminal, as wide as it is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::history::{Follower, History, Series};
use super::html::{figure, whole};
use super::run::{self, Facts, Status};
use crate::error::{Error, Result};
use crate::train::checkpoint::LOSS;
use crate::train::progress::{count, human};

/// Characters of a sparkline, low to high.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Logged steps whose time tells how fast the run is now.
const RECENT: usize = 20;

/// A run that is looked at again and again.
#[derive(Debug)]
pub struct Watched {
    dir: PathBuf,
    name: String,
    follower: Follower,
    facts: Facts,
}

/// Marks what is to stand out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ink {
    Plain,
    Good,
    Bad,
    Soft,
}

impl Watched {
    /// Of the run in `dir`.
    ///
    /// # Errors
    /// No run there, damaged metrics, or a failure of the system.
    pub fn open(dir: &Path) -> Result<Watched> {
        let facts = Facts::read(dir)?;
        let mut watched = Watched { dir: dir.to_path_buf(), name: run::name(dir), follower: Follower::new(dir), facts };
        watched.follower.poll()?;
        // A run that is just beginning has its settings before its first line.
        if !watched.follower.exists && watched.facts.settings.is_empty() {
            return Err(Error::refused("no run is there")
                .path(dir)
                .remedy("give the folder that train --output named"));
        }
        Ok(watched)
    }

    /// Looks again; says whether anything changed.
    ///
    /// # Errors
    /// Damaged metrics, or a failure of the system.
    pub fn look(&mut self) -> Result<bool> {
        let changed = self.follower.poll()?;
        let before = (self.facts.status, self.facts.checkpoints.len());
        self.facts = Facts::read(&self.dir)?;
        Ok(changed || before != (self.facts.status, self.facts.checkpoints.len()))
    }

    /// Whether nothing more is to come.
    pub fn finished(&self) -> bool {
        self.facts.status == Status::Finished
    }

    /// The state in lines of at most `width` characters, with the terminal's colours if `colored`.
    pub fn lines(&self, width: usize, colored: bool) -> Vec<String> {
        let (history, width) = (&self.follower.history, width.max(16));
        let (status, ink) = match self.facts.status {
            Status::Running(pid) => (format!("running, process {pid}"), Ink::Good),
            Status::Finished => ("finished".into(), Ink::Good),
            Status::Stopped => ("no process of this machine is at it".into(), Ink::Bad),
        };
        let mut lines = vec![
            (format!("{}  {}", self.name, self.facts.objective()), Ink::Plain),
            (status, ink),
            (self.progress(), Ink::Plain),
        ];
        if let Some((_, loss)) = History::newest(&history.train, "loss") {
            lines.push((format!("loss {}{}", figure(*loss), parts(&history.train)), Ink::Plain));
            let all: Vec<f64> = history.train.get("loss").into_iter().flatten().map(|point| point.1).collect();
            lines.push((sparkline(&all, width.min(60)), Ink::Good));
            lines.push((self.rates(), Ink::Soft));
        }
        lines.extend(self.evaluation().map(|line| (line, Ink::Plain)));
        if let Some(best) = self.facts.best() {
            let name = if best.metric == LOSS { "held-out loss" } else { &best.metric };
            lines.push((format!("best {name} {} at step {}", figure(best.value), best.step), Ink::Plain));
        }
        if let Some(saved) = self.facts.checkpoints.last() {
            lines.push((format!("newest checkpoint {}", saved.name), Ink::Soft));
        }
        if let Some(last) = history.skipped.last() {
            lines.push((format!("skipped steps {}, the last {}", history.skipped.len(), last.step), Ink::Bad));
        }
        let ink = |ink| if colored { ink } else { Ink::Plain };
        let folded =
            lines.into_iter().flat_map(|(line, of)| folded(&line, width).into_iter().map(move |piece| (piece, of)));
        folded.map(|(line, of)| painted(&line, width, ink(of))).collect()
    }

    /// The newest figures in one line, for output that is no terminal.
    pub fn line(&self) -> String {
        let history = &self.follower.history;
        let loss =
            History::newest(&history.train, "loss").map_or(String::new(), |(_, x)| format!("  loss {}", figure(*x)));
        let held_out = self.evaluation().next().map_or(String::new(), |line| format!("  {line}"));
        let stopped = if self.facts.status == Status::Stopped { "  (no process of this machine is at it)" } else { "" };
        format!("{}{loss}{}{held_out}{stopped}", self.progress(), parts(&history.train))
    }

    fn progress(&self) -> String {
        let Some(last) = self.follower.history.last else { return "no step logged yet".into() };
        match run::total(&self.facts, &self.follower.history) {
            Some(total) if total > 0 => {
                let share = 100.0 * last.step as f64 / total as f64;
                let left = self.left(total).map(|left| format!("  {} left", human(left))).unwrap_or_default();
                format!("step {}/{}  {share:.1} %{left}", whole(last.step as f64), whole(total as f64))
            }
            _ => format!("step {}", whole(last.step as f64)),
        }
    }

    /// Time to the last step, by the rate and the tokens of the newest logged steps.
    fn left(&self, total: u64) -> Option<Duration> {
        let history = &self.follower.history;
        let (Status::Running(_), Some(last)) = (self.facts.status, history.last) else { return None };
        let rates = history.train.get("tps")?;
        let recent = &rates[rates.len().saturating_sub(RECENT)..];
        let rate = recent.iter().map(|point| point.1).sum::<f64>() / recent.len().max(1) as f64;
        let tokens = last.tokens as f64 / last.step.max(1) as f64;
        let seconds = total.saturating_sub(last.step) as f64 * tokens / rate;
        (seconds.is_finite() && seconds < 1e10).then(|| Duration::from_secs_f64(seconds))
    }

    fn rates(&self) -> String {
        let train = &self.follower.history.train;
        let of = |name: &str| History::newest(train, name).map(|point| point.1);
        let mut told = Vec::new();
        told.extend(of("tps").map(|x| format!("{} tokens/s", count(x))));
        told.extend(of("lr").map(|x| format!("lr {x:.2e}")));
        told.extend(of("grad_norm").map(|x| format!("gradient {}", figure(x))));
        told.join("  ")
    }

    /// The newest evaluation: what is held out, and the dev set.
    fn evaluation(&self) -> impl Iterator<Item = String> {
        let eval = &self.follower.history.eval;
        let held_out = History::newest(eval, "loss")
            .map(|(step, loss)| format!("held out, step {step}: loss {}{}", figure(*loss), parts(eval)));
        let dev: Vec<String> = eval
            .iter()
            .filter(|(name, _)| !name.starts_with("loss") && !name.starts_with("acc_"))
            .filter_map(|(name, series)| Some(format!("{name} {}", figure(series.last()?.1))))
            .collect();
        let dev = (!dev.is_empty()).then(|| format!("dev set: {}", dev.join("  ")));
        held_out.into_iter().chain(dev)
    }
}

/// The newest parts of a loss, where it has several.
fn parts(series: &BTreeMap<String, Series>) -> String {
    let all: Vec<String> = series
        .iter()
        .filter_map(|(name, points)| Some(format!("{} {}", name.strip_prefix("loss_")?, figure(points.last()?.1))))
        .collect();
    if all.len() < 2 { String::new() } else { format!(" ({})", all.join(", ")) }
}

/// Figures as a line of `width` bars at most, each the mean of a piece of them; what is not finite is a blank.
pub fn sparkline(figures: &[f64], width: usize) -> String {
    let every = figures.len().div_ceil(width.max(1)).max(1);
    let means: Vec<Option<f64>> = figures
        .chunks(every)
        .map(|piece| {
            let finite: Vec<f64> = piece.iter().copied().filter(|x| x.is_finite()).collect();
            (!finite.is_empty()).then(|| finite.iter().sum::<f64>() / finite.len() as f64)
        })
        .collect();
    let of = |pick: fn(f64, f64) -> f64, from| means.iter().flatten().copied().fold(from, pick);
    let (low, high) = (of(f64::min, f64::INFINITY), of(f64::max, f64::NEG_INFINITY));
    let bar = |mean: &Option<f64>| match mean {
        Some(x) if high > low => BARS[(((x - low) / (high - low)) * 7.0).round() as usize],
        Some(_) => BARS[3],
        None => ' ',
    };
    means.iter().map(bar).collect()
}

/// A line in pieces that fit, between figures that two blanks keep apart.
fn folded(line: &str, width: usize) -> Vec<String> {
    let mut pieces: Vec<String> = Vec::new();
    for part in line.split("  ") {
        match pieces.last_mut().filter(|last| last.chars().count() + 2 + part.chars().count() <= width) {
            Some(last) => *last = format!("{last}  {part}"),
            None => pieces.push(part.to_string()),
        }
    }
    pieces
}

/// A line of at most `width` characters; none of them moves the cursor.
fn painted(line: &str, width: usize, ink: Ink) -> String {
    let line: String = line.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    let line = super::html::shortened(&line, width);
    match ink {
        Ink::Plain => line,
        Ink::Good => format!("\u{1b}[36m{line}\u{1b}[0m"),
        Ink::Bad => format!("\u{1b}[33m{line}\u{1b}[0m"),
        Ink::Soft => format!("\u{1b}[2m{line}\u{1b}[0m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sparkline_is_as_wide_as_there_is_room() {
        assert_eq!(sparkline(&[8.0, 4.0, 1.0], 10), "█▄▁");
        let many: Vec<f64> = (0..1000).map(f64::from).collect();
        let line = sparkline(&many, 20);
        assert_eq!((line.chars().count(), line.chars().next(), line.chars().last()), (20, Some('▁'), Some('█')));
        assert_eq!(sparkline(&[1.0, f64::NAN, 1.0], 10), "▄ ▄");
        assert_eq!(sparkline(&[], 10), "");
    }

    #[test]
    fn narrow_terminals_get_more_lines() {
        let line = "3.7k tokens/s  lr 1.30e-6  gradient 1.5199";
        assert_eq!(folded(line, 80), [line]);
        assert_eq!(folded(line, 30), ["3.7k tokens/s  lr 1.30e-6", "gradient 1.5199"]);
        assert_eq!(folded(line, 16), ["3.7k tokens/s", "lr 1.30e-6", "gradient 1.5199"]);
    }

    #[test]
    fn nothing_of_a_name_steers_the_terminal() {
        assert_eq!(painted("a\u{1b}[2Jb", 20, Ink::Plain), "a\u{fffd}[2Jb");
        assert_eq!(painted("abcdef", 4, Ink::Bad), "\u{1b}[33mabc…\u{1b}[0m");
    }
}
