//! `completions` and `man`: what shells and `man` know of the commands, made of their definitions.

use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, say};
use crate::error::{IoContext, Result};
use crate::files;

/// Print what a shell needs to complete commands and options
///
/// bash: retromae-engine completions bash > ~/.local/share/bash-completion/completions/retromae-engine
#[derive(Debug, clap::Args)]
pub struct Completions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Write manual pages, one a command
///
/// retromae-engine man --output ~/.local/share/man/man1, then man retromae-engine-train
#[derive(Debug, clap::Args)]
pub struct Man {
    /// Folder to write to
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
}

/// Runs `completions`.
pub fn completions(args: &Completions) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), env!("CARGO_PKG_NAME"), &mut script);
    say(String::from_utf8_lossy(&script).trim_end())
}

/// Runs `man`.
pub fn man(args: &Man) -> Result<()> {
    std::fs::create_dir_all(&args.output).at(&args.output, "cannot create the folder")?;
    let mut command = Cli::command();
    command.build();
    let mut pages = 1;
    page(&args.output, &command, command.get_name())?;
    for command in command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
        page(&args.output, command, &format!("{}-{}", env!("CARGO_PKG_NAME"), command.get_name()))?;
        pages += 1;
    }
    say(&format!("{pages} pages written to {}", args.output.display()))
}

fn page(folder: &Path, command: &clap::Command, name: &str) -> Result<()> {
    let (path, title) = (folder.join(format!("{name}.1")), name.to_string());
    let page = clap_mangen::Man::new(command.clone().name(title));
    files::write_atomic(&path, |out| page.render(out))
}
