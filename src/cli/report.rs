//! `report`: one or several runs on a page.

use std::io::Write;
use std::path::PathBuf;

use serde_json::json;

use super::{Global, grouped, say};
use crate::error::{Error, Result};
use crate::files;
use crate::report::{breakdown, page, run::Run};

/// Runs on a page at most: more colours and dashes nobody tells apart.
const MOST: usize = 16;

/// Draw one or several runs on a page: curves, settings, checkpoints, masks
///
/// One HTML file without scripts, which loads nothing from elsewhere. Several runs lie over each other, each with its colour and dash.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Folders that train --output named
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// File to write
    #[arg(long, value_name = "FILE.html")]
    output: PathBuf,
    /// Results of bench step --breakdown --json, to be shown on the same page
    #[arg(long, value_name = "FILE")]
    breakdown: Option<PathBuf>,
    /// Replace the file
    #[arg(long)]
    overwrite: bool,
}

/// Runs the subcommand.
pub fn run(args: Arguments, global: &Global) -> Result<()> {
    if args.runs.len() > MOST {
        let cause = format!("{} runs are more than one page can tell apart", args.runs.len());
        return Err(Error::usage(cause).remedy(format!("give at most {MOST}")));
    }
    if args.output.is_file() && !args.overwrite {
        return Err(Error::refused("the file already exists")
            .path(&args.output)
            .remedy("choose another --output or add --overwrite"));
    }
    files::probe(&args.output)?;
    let breakdowns = args.breakdown.as_deref().map(breakdown::read).transpose()?.unwrap_or_default();
    let runs = Run::read_all(&args.runs)?;
    let html = page::page(&runs, &breakdowns);
    files::write_atomic(&args.output, |out| out.write_all(html.as_bytes()))?;
    global.write_json(&json!({ "output": args.output, "bytes": html.len(), "runs": page::to_json(&runs) }))?;
    let many = if runs.len() == 1 { "1 run".into() } else { format!("{} runs", runs.len()) };
    say(&format!("{many}, {} bytes, written to {}", grouped(html.len() as u64), args.output.display()))
}
