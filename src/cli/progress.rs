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
        let Ok(mut last) = self.last.lock() else { return };
        if last.elapsed() < PLAIN_EVERY || Instant::now() < *last {
            return;
        }
        *last = Instant::now();
        let share = match self.total {
            Some(total) if consumed > 0 && total > 0 => {
                let left = seconds * total.saturating_sub(consumed) as f64 / consumed as f64;
                format!(", {} %, {left:.0} s left", consumed.min(total) * 100 / total)
            }
            _ => String::new(),
        };
        line(&format!("{}{share}", message()));
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

/// A line on standard error; nobody there to read it is no reason to stop.
pub fn line(message: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{message}");
}
