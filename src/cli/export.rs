//! `export`: a checkpoint of a run as a model folder that others load.

use std::path::PathBuf;

use clap::ValueEnum;
use serde_json::json;

use super::{Global, progress, say};
use crate::error::Result;
use crate::files::Disk;
use crate::model::element::Dtype;
use crate::train::export::{Request, export_run};

/// Make a checkpoint of a run a model that transformers and sentence-transformers load
///
/// Needs nothing but the folder of the run, and may be given while the run goes on. The folder written also holds the enhanced
/// decoder, so that `train --model` goes on from it with all weights.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Folder of the run: the --output of train
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// Folder to write; must not exist
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Checkpoint to export [default: the newest good one of the run]
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// Type of the stored weights; the enhanced decoder stays f32
    #[arg(long, value_enum, default_value_t = Stored::F32)]
    dtype: Stored,
    /// Split the weights into files of at most this many bytes
    #[arg(long, value_name = "N", default_value_t = 5_000_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    max_shard_bytes: u64,
    /// Replace an earlier export
    #[arg(long)]
    overwrite: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Stored {
    F32,
    Bf16,
    F16,
}

/// Runs the subcommand.
pub fn run(args: Arguments, global: &Global) -> Result<()> {
    let request = Request {
        run: args.run,
        output: args.output,
        checkpoint: args.checkpoint,
        dtype: match args.dtype {
            Stored::F32 => Dtype::F32,
            Stored::Bf16 => Dtype::Bf16,
            Stored::F16 => Dtype::F16,
        },
        max_shard_bytes: args.max_shard_bytes,
        overwrite: args.overwrite,
    };
    let checkpoint = export_run(&Disk::default(), &request, &mut |line| progress::line(&format!("warning: {line}")))?;
    say(&format!("model: {} (step {})", request.output.display(), checkpoint.state.step))?;
    global.write_json(&json!({
        "model": request.output,
        "checkpoint": checkpoint.dir,
        "step": checkpoint.state.step,
        "dtype": request.dtype.name(),
    }))
}
