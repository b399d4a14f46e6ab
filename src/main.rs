//! Parse, dispatch, print the error once.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Parser;
use clap::error::ErrorKind;

use retromae_engine::cli::{self, Cli};
use retromae_engine::device::on_exhausted;

fn main() -> ExitCode {
    // A file size limit is then a failed write, with a message, and not a signal that kills. Nothing is lost if this fails.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::new(AtomicBool::new(false)));
    // Tensors are taken anywhere in a run, and what has no memory cannot go on.
    on_exhausted(|e| {
        complain(&e.to_string());
        std::process::exit(e.exit_code());
    });
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    match cli::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            complain(&e.to_string());
            ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(1))
        }
    }
}

/// Help and version as they are; everything else as one line.
fn usage(e: &clap::Error) -> ExitCode {
    match e.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A closed standard output is no failure.
            let _ = e.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = e.print();
            ExitCode::from(2)
        }
        _ => {
            let text = e.to_string();
            let told = text.lines().take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
            let told: Vec<&str> = told.map(str::trim).filter(|line| !line.is_empty()).collect();
            let told = told.join(" ");
            complain(&format!("{}; see --help", told.strip_prefix("error: ").unwrap_or(&told)));
            ExitCode::from(2)
        }
    }
}

/// The one line on standard error; if even that is closed there is nobody to tell.
fn complain(message: &str) {
    let _ = writeln!(std::io::stderr(), "error: {message}");
}
