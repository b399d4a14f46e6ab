//! `encode`: texts to embeddings.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::progress::Rows;
use super::tokenize::{DocSep, FormatArg};
use super::{Global, Hardware, grouped, say};
use crate::data::shard::{ShardSet, TitleSep};
use crate::data::source;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::files::Disk;
use crate::model::hub;
use crate::ops::pool::Pooling;
use crate::retrieve::embedder::Kind;
use crate::retrieve::embeddings::Layout;
use crate::retrieve::encode;
use crate::retrieve::model::{LEXICAL_TOP_K, Model, Overrides, Reading, Texts};
use crate::retrieve::npy::Stored;
use crate::retrieve::representation::Representation;
use crate::train::collective::launch;
use crate::train::target::Target;

/// Turn texts into embeddings
///
/// Reads folders of token shards, or raw text as tokenize does: plain text, JSON lines, tab-separated columns, BEIR folders, Parquet.
/// Rows are in the order of the input; of documents with one id the first stays; a document without text gets the embedding of an
/// empty one. Interrupted, the same command goes on where it was.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    /// Folders of token shards, or files, folders and globs of text, or - for standard input
    #[arg(long, required = true, num_args = 1.., value_name = "PATH")]
    input: Vec<String>,
    /// Folder to make
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Replace embeddings that are there
    #[arg(long)]
    overwrite: bool,
    /// What the texts are: chooses the encoder of a model that has two, and the prompt
    #[arg(long, value_enum, default_value = "passage")]
    kind: Kind,
    /// Longest text in tokens, `[CLS]` and `[SEP]` included [default: what the model says]
    #[arg(long, value_name = "N", alias = "max_length", value_parser = clap::value_parser!(u32).range(3..=65_535))]
    max_length: Option<u32>,
    /// Text put before every text [default: the model's prompt for the kind]
    #[arg(long, value_name = "TEXT")]
    prefix: Option<String>,
    /// What joins title and text of raw documents; none leaves titles out
    #[arg(long, value_enum, default_value = "space")]
    title_sep: TitleSep,
    /// What raw input is
    #[arg(long, value_enum, default_value = "auto")]
    input_format: FormatArg,
    /// What separates documents of plain text
    #[arg(long, value_enum, default_value = "line")]
    doc_sep: DocSep,
    #[command(flatten)]
    kept: RepresentationArgs,
    /// Files to write: npy for this program and numpy, faiss-flat for faiss.read_index, retromae for the published code, pyserini for npy
    /// and JSON lines of the lexical embeddings beside
    #[arg(long, value_enum, default_value = "npy")]
    format: Layout,
    /// Type of the stored numbers
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Stored,
    /// Rows of a file, after each of which an interrupted run can go on [default: 128 MiB of rows]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    shard_rows: Option<u64>,
    /// Encode part I of N of the texts of token shards, from 0, for as many processes or machines; or `rank`: as a launcher's variables say
    /// (torchrun, srun, mpirun), into the folder part-I-of-N of the output. `search --corpus` takes the parts' folders in their order
    #[arg(long, value_name = "I/N|rank", value_parser = Shard::parse)]
    shard: Option<Shard>,
    #[command(flatten)]
    hardware: Hardware,
}

/// A part of the texts.
#[derive(Clone, Copy, Debug)]
enum Shard {
    /// This one of so many.
    Part(u64, u64),
    /// That of the rank.
    Rank,
}

impl Shard {
    fn parse(text: &str) -> std::result::Result<Shard, String> {
        if text == "rank" {
            return Ok(Shard::Rank);
        }
        let numbers = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        let part = numbers.filter(|(i, n)| i < n).map(|(i, n)| Shard::Part(i, n));
        part.ok_or_else(|| "give I/N with I from 0 to N - 1, or rank".into())
    }

    /// Part and parts, and the folder to write: of a rank one inside `output`.
    fn resolve(self, output: &Path) -> Result<(u64, u64, PathBuf)> {
        match self {
            Shard::Part(i, n) => Ok((i, n, output.into())),
            Shard::Rank => {
                let place = launch::detect(&|name| std::env::var(name).ok())?.ok_or_else(|| {
                    Error::usage("--shard rank: there are no launcher's variables")
                        .remedy("start it with torchrun, srun or mpirun, or give I/N")
                })?;
                Device::choose_cuda(place.local_rank);
                let name = format!("part-{:04}-of-{:04}", place.rank, place.size);
                Ok((place.rank as u64, place.size as u64, output.join(name)))
            }
        }
    }
}

/// What is kept of a text.
#[derive(Debug, clap::Args)]
pub struct RepresentationArgs {
    /// What is kept of a text: cls the dense embedding, pooled as the model says; lexical the tokens to which the MLM head gives most
    #[arg(long, value_enum, default_value = "cls")]
    pub representation: Representation,
    /// Tokens of a lexical embedding
    #[arg(long, value_name = "K", default_value_t = LEXICAL_TOP_K as u32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub lexical_top_k: u32,
}

/// The model that embeds.
#[derive(Debug, clap::Args)]
pub struct ModelArgs {
    /// Model: a folder, a file of weights, or a name of the Hugging Face hub
    #[arg(long, value_name = "DIR")]
    pub model: String,
    /// Tokenizer, where the model's folder has none
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,
    /// What an embedding is made of [default: what the model says, else cls]
    #[arg(long, value_enum)]
    pooling: Option<Pooling>,
    /// Scale embeddings to length 1 [default: what the model says, else not]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    normalize: Option<bool>,
    /// Tokens that go through the model at once [default: by device]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(16..))]
    batch_tokens: Option<u32>,
}

impl ModelArgs {
    /// Opens it.
    pub fn open(&self, global: &Global) -> Result<Model> {
        let overrides = Overrides {
            tokenizer: self.tokenizer.clone(),
            pooling: self.pooling,
            normalize: self.normalize,
            batch_tokens: self.batch_tokens.map(|n| n as usize),
        };
        let model = Model::open(&self.model, &hub::resolve(&self.model)?, &overrides)?;
        model.note.iter().for_each(|note| global.note(note));
        Ok(model)
    }
}

impl Hardware {
    /// Opens the device, and tells what is worth telling of it.
    pub fn open(&self, global: &Global) -> Result<Target> {
        let target = Target::open(&self.device, self.precision)?;
        target.note.iter().for_each(|note| global.note(note));
        Ok(target)
    }
}

/// Runs the subcommand.
pub fn run(args: Arguments, global: &Global) -> Result<()> {
    let (part, parts, output) = match args.shard {
        Some(shard) => shard.resolve(&args.output)?,
        None => (0, 1, args.output.clone()),
    };
    let model = args.model.open(global)?;
    let target = args.hardware.open(global)?;
    let on = (target.device, target.storage);
    let texts = Texts {
        max_length: args.max_length.map(|n| n as usize),
        prefix: args.prefix.clone(),
        stored: args.dtype,
        layout: args.format,
        shard_rows: args.shard_rows,
        overwrite: args.overwrite,
        representation: args.kept.representation,
        lexical_top_k: args.kept.lexical_top_k as usize,
        ..Texts::new(args.kind)
    };
    if (args.format, args.dtype) == (Layout::FaissFlat, Stored::F16) {
        return Err(Error::usage("faiss's flat index holds f32").remedy("leave --dtype out"));
    }
    let job = model.job(on, &texts)?;
    let shards = args.input.iter().filter(|input| ShardSet::is_set(Path::new(input))).count();
    let source = match shards {
        0 => {
            let inputs = source::expand(&args.input)?;
            let (format, blank_lines) = (args.input_format.format(), args.doc_sep == DocSep::Blank);
            model.documents(&job, inputs, Reading { title_sep: args.title_sep, format, blank_lines, only: None })?
        }
        n if n == args.input.len() => model.shards(&job, &args.input.iter().map(PathBuf::from).collect::<Vec<_>>())?,
        _ => return Err(Error::usage("--input names token shards and other files").remedy("encode them one by one")),
    };
    let source = if args.shard.is_some() { source.part(part, parts)? } else { source };
    let mut embedder = model.embedder(on, args.kind, &job)?;
    let progress = Rows::start(global.quiet, "texts");
    let done = encode::run(&Disk::default(), source, &mut embedder, &job, &output, &|at| {
        progress.update(at.rows, at.total);
    });
    progress.finish();
    let done = done?;
    let new = done.rows - done.resumed;
    let rate = new as f64 / done.seconds.max(1e-9);
    global.write_json(&json!({
        "rows": done.rows, "resumed": done.resumed, "dim": job.spec.dim, "tokens": done.tokens, "empty": done.counts.empty,
        "truncated": done.counts.truncated, "duplicates": done.counts.duplicates, "seconds": done.seconds,
        "representation": job.spec.representation, "lexical_top_k": job.spec.lexical_top_k,
        "texts_per_second": rate, "model_sha256": job.spec.model_sha256, "output": output,
    }))?;
    let counts = [
        ("rows", done.rows),
        ("resumed", done.resumed),
        ("tokens", done.tokens),
        ("empty", done.counts.empty),
        ("truncated", done.counts.truncated),
        ("duplicates", done.counts.duplicates),
    ];
    let lines: Vec<String> = counts.iter().map(|(name, n)| format!("{name:<11}{:>15}", grouped(*n))).collect();
    let (output, seconds) = (output.display(), done.seconds);
    let wide = match (job.spec.dim, job.spec.lexical_top_k) {
        (dim, 0) => format!("{dim} wide"),
        (0, k) => format!("{k} tokens each"),
        (dim, k) => format!("{dim} wide and {k} tokens each"),
    };
    say(&format!("{}\n{wide}, written to {output} in {seconds:.1} s, {rate:.1} texts/s", lines.join("\n")))
}
