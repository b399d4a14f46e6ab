//! Progress on standard error: a bar on a terminal, a plain line every ten seconds elsewhere.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::grouped;

/// Time between plain lines.
const PLAIN_EVERY: Duration = Duration::from_secs(10);

/// Progress over a number of bytes, or of whatever is counted, known or not.
pub struct Progress {
    bar: Option<ProgressBar>,
    total: Option<u64>,
    started: Instant,
    last: Mutex<Instant>,
}

impl Progress {
    /// Starts; `quiet` shows nothing.
    pub fn start(total: Option<u64>, quiet: bool) -> Progress {
        let now = Instant::now();
        let terminal = std::io::stderr().is_terminal();
        let bar = (!quiet && terminal).then(|| {
            let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
            let template =
                if total.is_some() { "{bar:30} {percent:>3} % {msg}, {eta} left" } else { "{spinner} {msg}" };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar
        });
        // Quiet: the next line is due in a century.
        let last = if quiet { now + Duration::from_secs(100 * 365 * 86_400) } else { now };
        Progress { bar, total, started: now, last: Mutex::new(last) }
    }

    /// `consumed` of the total bytes are done; `documents` and `text` bytes came out of them.
    pub fn update(&self, consumed: u64, documents: u64, text: u64) {
        self.tell(consumed, |seconds| {
            format!("{} documents, {:.1} MB/s", grouped(documents), text as f64 / 1e6 / seconds)
        });
    }

    /// `consumed` of the total is done; `words` says more about it, from the seconds since the start.
    pub fn tell(&self, consumed: u64, words: impl Fn(f64) -> String) {
        let seconds = self.started.elapsed().as_secs_f64();
        let message = || words(seconds.max(1e-3));
        if let Some(bar) = &self.bar {
            bar.set_position(consumed);
            bar.set_message(message());
            return;
        }
        if !self.is_due() {
            return;
        }
        let share = match self.total {
            Some(total) if consumed > 0 && total > 0 => {
                let left = seconds * total.saturating_sub(consumed) as f64 / consumed as f64;
                format!(", {} %, {left:.0} s left", consumed.min(total) * 100 / total)
            }
            _ => String::new(),
        };
        line(&format!("{}{share}", message()));
    }

    /// Shows a message, at the bar or every ten seconds as a line.
    fn say(&self, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(message.to_string());
            bar.tick();
        } else if self.is_due() {
            line(message);
        }
    }

    /// Whether it is time for a plain line.
    fn is_due(&self) -> bool {
        let Ok(mut last) = self.last.lock() else { return false };
        let due = Instant::now() >= *last && last.elapsed() >= PLAIN_EVERY;
        if due {
            *last = Instant::now();
        }
        due
    }

    /// A line above the bar.
    pub fn note(&self, message: &str) {
        match &self.bar {
            Some(bar) => bar.println(message),
            None => line(message),
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Progress over a number of rows, known or not.
pub struct Rows {
    inner: Progress,
    what: &'static str,
    /// Rows at the first update: those that an earlier run had done say nothing of the speed.
    first: Mutex<Option<u64>>,
}

impl Rows {
    /// Starts; `what` the rows are called.
    pub fn start(quiet: bool, what: &'static str) -> Rows {
        Rows { inner: Progress::start(None, quiet), what, first: Mutex::new(None) }
    }

    /// `rows` of `total` are done.
    pub fn update(&self, rows: u64, total: Option<u64>) {
        let Ok(mut first) = self.first.lock() else { return };
        let new = rows.saturating_sub(*first.get_or_insert(rows));
        let rate = new as f64 / self.inner.started.elapsed().as_secs_f64().max(1e-3);
        let of = total.map(|total| format!(" of {}", grouped(total))).unwrap_or_default();
        self.inner.say(&format!("{}{of} {}, {rate:.1} a second", grouped(rows), self.what));
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.inner.finish();
    }
}

/// A line on standard error; nobody there to read it is no reason to stop.
pub fn line(message: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{message}");
}
