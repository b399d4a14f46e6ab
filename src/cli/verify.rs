//! `verify`: every digest of what this program wrote.

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::data::shard::{self, ShardSet, Verified};
use crate::error::{Error, IoContext, Result};
use crate::files::disk::Disk;
use crate::model::export;
use crate::retrieve::embeddings::{Embeddings, Meta as EmbeddingsMeta};
use crate::retrieve::encode;
use crate::train::store::{self, Store};
use crate::train::{checkpoint, origin, workspace};

use super::{Global, grouped, say};

/// Check every digest of what this program wrote: shards, embeddings, checkpoints, exported models, and the folder of a run.
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
    Checkpoint,
    Model,
    Origin,
    Run,
    Embeddings,
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
            What::Checkpoint => "checkpoint",
            What::Model => "exported model",
            What::Origin => "origin of a run",
            What::Run => "run",
            What::Embeddings => "embeddings",
        }
    }
}

fn kind(path: &Path) -> Result<What> {
    let meta = std::fs::metadata(path).at(path, "cannot open")?;
    if meta.is_dir() && ShardSet::is_set(path) {
        return Ok(What::Shards);
    }
    if meta.is_dir() && (EmbeddingsMeta::is_at(path) || encode::is_begun(path)) {
        return Ok(What::Embeddings);
    }
    if meta.is_dir() && checkpoint::is_checkpoint(path) {
        return Ok(What::Checkpoint);
    }
    if meta.is_dir() && path.join(export::MANIFEST).is_file() {
        return Ok(What::Model);
    }
    if meta.is_dir() && path.join(store::DIR).is_dir() {
        return Ok(What::Run);
    }
    if meta.is_file() && path.extension().is_some_and(|e| e == "rms") {
        return Ok(What::ShardFile);
    }
    Err(Error::refused("is nothing that this program wrote, or its description is missing")
        .path(path)
        .remedy("give a folder that tokenize, train, export or encode wrote, or one .rms file"))
}

fn check(path: &Path, what: What) -> Result<Verified> {
    match what {
        What::Shards => ShardSet::open(path)?.verify(),
        What::ShardFile => shard::verify_file(path),
        What::Checkpoint => checkpoint::verify(path).and_then(|_| sizes(path)),
        What::Model => export::verify_export(path).and_then(|()| sizes(path)),
        What::Origin => origin::verify(path).and_then(|()| sizes(path)),
        What::Run => run_folder(path),
        What::Embeddings => Embeddings::open(path)?.verify(),
    }
}

/// Every checkpoint of a run, what it keeps of its beginning, and the model it exported.
fn run_folder(path: &Path) -> Result<Verified> {
    let mut parts: Vec<(PathBuf, What)> =
        Store::new(&Disk::default(), path, 1).list()?.into_iter().map(|(_, dir)| (dir, What::Checkpoint)).collect();
    for (name, what) in [(origin::DIR, What::Origin), (workspace::MODEL, What::Model)] {
        if path.join(name).is_dir() {
            parts.push((path.join(name), what));
        }
    }
    let mut all = Verified { files: 0, bytes: 0 };
    let mut errors = Vec::new();
    for (part, what) in parts {
        match check(&part, what) {
            Ok(found) => all = Verified { files: all.files + found.files, bytes: all.bytes + found.bytes },
            Err(e) => errors.push(e),
        }
    }
    if errors.is_empty() { Ok(all) } else { Err(Error::several(errors)) }
}

/// Number and size of the files below a folder.
fn sizes(dir: &Path) -> Result<Verified> {
    let mut all = Verified { files: 0, bytes: 0 };
    for entry in std::fs::read_dir(dir).at(dir, "cannot list the folder")? {
        let path = entry.at(dir, "cannot list the folder")?.path();
        let meta = std::fs::metadata(&path).at(&path, "cannot read the size")?;
        let found = if meta.is_dir() { sizes(&path)? } else { Verified { files: 1, bytes: meta.len() } };
        all = Verified { files: all.files + found.files, bytes: all.bytes + found.bytes };
    }
    Ok(all)
}
