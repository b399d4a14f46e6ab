//! `watch`: a run in the terminal while it goes on.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use console::Term;

use super::{Global, say};
use crate::error::{Error, IoContext, Kind, Result};
use crate::report::watch::Watched;
use crate::train::signals::{self, Stop};

/// Time between two looks at the signals.
const NAP: Duration = Duration::from_millis(50);
/// Width of output that is no terminal.
const PLAIN: usize = 100;

/// Show a run while it goes on: steps, losses, rates, evaluations
///
/// Follows the run also over interruptions and ends when it has finished, or with Ctrl-C. Where the output is no terminal, a line whenever
/// something new was logged.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Folder that train --output named
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Show the state and end
    #[arg(long)]
    once: bool,
    /// Seconds between two looks
    #[arg(long, default_value_t = 1.0, value_name = "X")]
    interval: f64,
}

/// Runs the subcommand.
pub fn run(args: Arguments, _: &Global) -> Result<()> {
    if !(0.05..=3600.0).contains(&args.interval) {
        return Err(Error::usage(format!("--interval {}: not between 0.05 and 3600", args.interval))
            .remedy("choose one of a second or so"));
    }
    let term = Term::stdout();
    let terminal = std::io::stdout().is_terminal();
    let colored = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let width = || if terminal { usize::from(term.size().1) } else { PLAIN };
    let mut watched = Watched::open(&args.run)?;
    if args.once {
        return say(&watched.lines(width(), colored).join("\n"));
    }
    let stop = Stop::install()?;
    let (mut drawn, mut changed, mut told) = (0, true, String::new());
    loop {
        // A terminal may have become narrower, and the time that is left shorter.
        if terminal {
            let lines = watched.lines(width().saturating_sub(1), colored);
            term.clear_last_lines(drawn).at("<stdout>", "cannot write")?;
            say(&lines.join("\n"))?;
            drawn = lines.len();
        } else if changed && watched.line() != told {
            told = watched.line();
            say(&told)?;
        }
        if watched.finished() {
            return Ok(());
        }
        let until = Instant::now() + Duration::from_secs_f64(args.interval);
        while Instant::now() < until {
            if let Some(signal) = stop.requested() {
                let cause = format!("watching was stopped by {}", signals::name(signal));
                let remedy = "the run itself goes on where it was going on";
                return Err(Error::new(Kind::Signal(signal), cause).path(&args.run).remedy(remedy));
            }
            std::thread::sleep(NAP);
        }
        changed = watched.look()?;
    }
}
