//! `verify`: every digest of what this program wrote.

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::data::shard::{self, ShardSet, Verified};
use crate::error::{Error, IoContext, Result};

use super::{Global, grouped, say};

/// Check every digest of what this program wrote: shards so far.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Folders or files
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
}

/// What a path is. Another kind is one more entry here, in [`kind`] and in [`check`].
#[derive(Clone, Copy, Debug)]
enum What {
    Shards,
    ShardFile,
}

/// Runs the subcommand: all paths are checked, whatever is found in the first ones.
pub fn run(args: Arguments, global: &Global) -> Result<()> {
    let mut errors = Vec::new();
    let mut results = Vec::new();
    for path in &args.paths {
        match kind(path).and_then(|what| check(path, what).map(|v| (what, v))) {
            Ok((what, found)) => {
                let name = what.name();
                let size = grouped(found.bytes);
                say(&format!("{}: ok, {name}: {} files, {size} bytes", path.display(), found.files))?;
                results.push(
                    json!({ "path": path, "kind": name, "ok": true, "files": found.files, "bytes": found.bytes }),
                );
            }
            Err(e) => {
                results.push(json!({ "path": path, "ok": false, "error": e.to_string() }));
                errors.push(e);
            }
        }
    }
    global.write_json(&json!(results))?;
    if errors.is_empty() { Ok(()) } else { Err(Error::several(errors)) }
}

impl What {
    fn name(self) -> &'static str {
        match self {
            What::Shards => "shards",
            What::ShardFile => "shard",
        }
    }
}

fn kind(path: &Path) -> Result<What> {
    let meta = std::fs::metadata(path).at(path, "cannot open")?;
    if meta.is_dir() && ShardSet::is_set(path) {
        return Ok(What::Shards);
    }
    if meta.is_file() && path.extension().is_some_and(|e| e == "rms") {
        return Ok(What::ShardFile);
    }
    Err(Error::refused("is nothing that this program wrote, or its description is missing")
        .path(path)
        .remedy("give a folder that tokenize wrote, or one .rms file"))
}

fn check(path: &Path, what: What) -> Result<Verified> {
    match what {
        What::Shards => ShardSet::open(path)?.verify(),
        What::ShardFile => shard::verify_file(path),
    }
}
