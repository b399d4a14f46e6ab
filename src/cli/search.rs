//! `search`: embeddings to ranked lists.

use std::path::PathBuf;

use clap::ValueEnum;
use serde_json::json;

use super::progress::Rows as Progress;
use super::train::ranks::{Flags, Member, Part};
use super::{Global, grouped, say};
use crate::data::pairs::runs::RunFormat;
use crate::device::{DType, Device};
use crate::error::{Error, Result};
use crate::ops::topk::Shape;
use crate::retrieve::merged::{self, Ranks};
use crate::retrieve::representation::Representation;
use crate::retrieve::search::{Rows, Written, on_cpu, write_run};
use crate::train::settings;
use crate::train::target::Target;

/// Find the best passages of every query, exactly
///
/// Inner products of all queries with all passages, in f32; of embeddings that are dense and lexical, the sum of both products. The order
/// of equal scores is that of the corpus. In TREC's form the second of two equal scores is written as the next smaller number, so that
/// trec_eval sees the same order. On a GPU embeddings stored as f16 are multiplied as they are, by tensor cores, others in f32; --precision
/// fp16 rounds those to f16. Lexical embeddings are searched on the CPU. Several ranks each search every Nth folder of the corpus, which
/// need not be there on the others, and rank 0 writes the run: that of a search over the whole.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Folders of the queries' embeddings
    #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
    queries: Vec<PathBuf>,
    /// Folders of the passages' embeddings
    #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
    corpus: Vec<PathBuf>,
    /// Passages on a list
    #[arg(long, default_value_t = 1000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    top_k: u32,
    /// File to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Form of the file
    #[arg(long, value_enum, default_value = "trec")]
    format: FormatArg,
    /// Name of the run, in TREC's form
    #[arg(long, default_value = "retromae-engine", value_name = "NAME", value_parser = tag)]
    tag: String,
    /// Device: auto takes a GPU where there is one; emulator runs the GPU's kernels on the CPU, for tests
    #[arg(long, default_value = "auto", value_parser = ["auto", "cpu", "cuda", "emulator"])]
    device: String,
    /// What is multiplied: auto is fp16 on a GPU where all embeddings are stored as f16, else fp32; sums are fp32
    #[arg(long, value_enum, default_value = "auto")]
    precision: Precision,
    #[command(flatten)]
    ranks: Flags,
}

/// What embeddings are multiplied as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Precision {
    /// What they are stored as, on a GPU; fp32 on the CPU.
    Auto,
    /// fp32.
    Fp32,
    /// fp16, to which others are rounded.
    Fp16,
}

/// Form of a run that is written.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum FormatArg {
    /// qid Q0 docid rank score tag
    Trec,
    /// qid, pid, rank
    Msmarco,
    /// qid, docid, score
    Tevatron,
}

impl FormatArg {
    /// The library's name for it.
    pub fn format(self) -> RunFormat {
        match self {
            FormatArg::Trec => RunFormat::Trec,
            FormatArg::Msmarco => RunFormat::Msmarco,
            FormatArg::Tevatron => RunFormat::Tevatron,
        }
    }
}

fn tag(text: &str) -> std::result::Result<String, String> {
    match !text.is_empty() && text.chars().all(|c| !c.is_whitespace() && !c.is_control()) {
        true => Ok(text.to_string()),
        false => Err("a tag is one word".into()),
    }
}

/// Where the `k` best of these embeddings, dense ones of this width, are searched for: on the device, or, where a GPU cannot and was not
/// asked for by name, on the CPU, which is told.
pub fn searching(
    global: &Global,
    (device, named): (Device, &str),
    (kept, width): (Representation, usize),
    k: usize,
) -> Result<Device> {
    let able = if kept.lexical() { on_cpu(device, kept) } else { Shape { queries: 1, width, k }.check(device) };
    match able {
        Err(e) if device.is_gpu() && named != "auto" => Err(e),
        Err(e) if device.is_gpu() => {
            global.note(&format!("searching on the CPU: {e}"));
            Ok(Device::Cpu)
        }
        // What is above the limit of the ops, the search on the CPU keeps too.
        _ => Ok(device),
    }
}

/// Runs the subcommand.
pub fn run(mut args: Arguments, global: &Global) -> Result<()> {
    if args.ranks.gpus.is_some() && args.device == "auto" {
        args.device = "cuda".into();
    }
    let member = match args.ranks.part()? {
        Part::Launcher(n) => {
            merged::enough(args.corpus.len(), n)?;
            return args.ranks.launch(n, global.threads());
        }
        Part::Rank(place) => args.ranks.meet(&place)?,
        Part::Alone => Member::default(),
    };
    let result = searched(&args, global, &member);
    member.leave(result)
}

fn searched(args: &Arguments, global: &Global, member: &Member) -> Result<()> {
    let (share, team) = (member.share(), member.team());
    let exchange = |own: &[u8]| team.exchange(own);
    let (rank, size) = (share.rank as usize, share.ranks as usize);
    let ranks = Ranks { rank, size, folders: args.corpus.len(), exchange: &exchange };
    let numbers = ranks.own()?;
    let own: Vec<PathBuf> = numbers.iter().map(|&i| args.corpus[i].clone()).collect();
    let (queries, corpus) = (Rows::open(&args.queries)?, Rows::open(&own)?);
    for (rows, side) in [(&queries, "query"), (&corpus, "passage")] {
        for folder in rows.folders().iter().filter(|folder| folder.meta().spec.side != side) {
            let kind = &folder.meta().spec.side;
            global.note(&format!("warning: {}: was encoded with --kind {kind}", folder.dir().display()));
        }
    }
    let target = Target::open(&args.device, settings::Precision::Fp32)?;
    target.note.iter().for_each(|note| global.note(note));
    let k = args.top_k as usize;
    let kept = (corpus.representation(), corpus.widths().0);
    let device = searching(global, (target.device, &args.device), kept, k)?;
    // Rounded vectors change the order of near ones: only who asks for it gets them.
    let storage = match args.precision {
        Precision::Fp16 if !device.is_gpu() => {
            return Err(
                Error::usage("--precision fp16: the CPU computes in fp32").remedy("leave --precision out or use fp32")
            );
        }
        Precision::Fp16 => DType::F16,
        Precision::Auto if device.is_gpu() && queries.are_f16() && corpus.are_f16() => DType::F16,
        _ => DType::F32,
    };
    let total = queries.len();
    let progress = Progress::start(global.quiet || !member.is_first(), "queries");
    let to = Written { path: &args.output, format: args.format.format(), tag: &args.tag };
    let watch = |queries| progress.update(queries, Some(total));
    let done = match ranks.size {
        1 => write_run((device, storage), (&queries, &corpus), k, &to, &watch),
        _ => merged::write_run((device, storage), (&queries, &corpus, &numbers), k, &to, &ranks, &watch),
    };
    progress.finish();
    let done = done?;
    if !member.is_first() {
        return Ok(());
    }
    global.write_json(&json!({
        "queries": done.queries, "passages": done.rows, "hits": done.hits, "nudged": done.nudged, "seconds": done.seconds,
        "precision": if storage == DType::F16 { "fp16" } else { "fp32" }, "output": args.output,
    }))?;
    let counts = [("queries", done.queries), ("passages", done.rows), ("hits", done.hits), ("nudged", done.nudged)];
    let lines: Vec<String> = counts.iter().map(|(name, n)| format!("{name:<11}{:>15}", grouped(*n))).collect();
    say(&format!("{}\nwritten to {} in {:.1} s", lines.join("\n"), args.output.display(), done.seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::emulator::Options;
    use crate::ops::topk::MAX_K;

    #[test]
    fn a_gpu_that_cannot_search_is_left_aside_unless_it_was_named() {
        let global = Global { threads: None, seed: None, json: None, quiet: true, verbose: false };
        let gpu = Device::emulator(Options::default()).unwrap();
        let kept = |representation, device, named, width, k| {
            searching(&global, (device, named), (representation, width), k).map(Device::is_gpu)
        };
        let on = |device, named, width, k| kept(Representation::Cls, device, named, width, k);
        assert!(on(gpu, "auto", 8, MAX_K).unwrap() && on(gpu, "cuda", 8, MAX_K).unwrap());
        // The CPU has no such limits.
        for (width, k) in [(8, MAX_K + 1), (12, 1)] {
            assert!(!on(gpu, "auto", width, k).unwrap() && !on(Device::Cpu, "cpu", width, k).unwrap());
            let refused = on(gpu, "cuda", width, k).unwrap_err().to_string();
            assert!(refused.contains("on a GPU; ") && refused.ends_with("--device cpu"), "{refused}");
        }
        let both = |device, named| kept(Representation::Both, device, named, 8, 1);
        assert!(!both(gpu, "auto").unwrap() && !both(Device::Cpu, "cpu").unwrap());
        assert!(both(gpu, "cuda").unwrap_err().to_string().ends_with("searched on the CPU; use --device cpu"));
    }
}
