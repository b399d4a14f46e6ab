//! Speed and memory of exact search.
//!
//! Writes folders of random unit vectors as `encode` writes them (kept where a folder is named, so that faiss can be given the same rows),
//! searches, writes the run, and tells the time of all of that but the making of the vectors, and the most memory that was resident.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;

use super::{Report, Times, peak_mib};
use crate::data::pairs::runs::RunFormat;
use crate::device::{DType, Device};
use crate::error::{Error, IoContext, Result};
use crate::ops::pool::Pooling;
use crate::ops::topk;
use crate::retrieve::embeddings::{Layout, Meta, Part, Spec};
use crate::retrieve::npy::{Stored, header};
use crate::retrieve::representation::Representation;
use crate::retrieve::search::{Rows, Written, write_run};
use crate::rng::{Site, Stream};
use crate::train::target::Target;

/// What to search, and how often.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Queries, at least 1.
    pub queries: usize,
    /// Rows, at least 1.
    pub rows: usize,
    /// Numbers of a row, at least 1.
    pub width: usize,
    /// Rows on a list, at least 1.
    pub k: usize,
    /// Times that all is searched, at least 1.
    pub repeats: u64,
    /// Where the vectors are kept.
    pub keep: Option<PathBuf>,
}

/// A folder that goes when this does.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // Nobody is left to be told; what stays lies in the folder of temporary files.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Searches several times over.
///
/// # Errors
/// Sizes that the kernels do not have, vectors of another size in the folder, a failure of the device, or a failed write.
pub fn run(settings: &Settings, target: &Target, report: &Report<'_>) -> Result<()> {
    let Settings { queries, rows, width, k, repeats, .. } = *settings;
    // The CPU has no such limits.
    if target.device.is_gpu() {
        topk::Shape { queries: 1, width, k }.check(target.device)?;
    }
    let temporary = std::env::temp_dir().join(format!("retromae-search-{}", std::process::id()));
    let (dir, _removed) = match &settings.keep {
        Some(dir) => (dir.clone(), None),
        None => (temporary.clone(), Some(Temporary(temporary))),
    };
    for (name, seed, count) in [("q", 1, queries), ("d", 2, rows)] {
        let dir = dir.join(name);
        if !dir.join("meta.json").is_file() {
            make(&dir, name, seed, count, width)?;
        }
        let found = Rows::open(std::slice::from_ref(&dir))?;
        if (found.len(), found.widths().0) != (count as u64, width) {
            let cause = format!("holds {} rows of {}, not {count} of {width}", found.len(), found.widths().0);
            return Err(Error::refused(cause).path(dir).remedy("name another folder with --keep"));
        }
    }
    let storage = if target.device.is_gpu() && target.storage == DType::BF16 { DType::F16 } else { DType::F32 };
    let precision = if storage == DType::F16 { "fp16" } else { "fp32" };
    report
        .say(&format!("{queries} queries, {rows} rows of {width}, the best {k}, on {}, {precision}\n", target.words))?;
    report.head(&["search, run written", "median ms", "p10", "p90", "GFLOP/s", "peak MiB"])?;
    let times = Times::new((0..repeats).map(|_| once((target.device, storage), &dir, k)).collect::<Result<_>>()?);
    let (gflops, peak) = (2.0 * (queries * rows) as f64 * width as f64 / times.median() / 1e6, peak_mib());
    let case = format!("{queries} x {rows} x {width}, top {k}");
    let mut line = json!({
        "case": format!("search {case} {precision}"), "queries": queries, "rows": rows, "width": width, "top_k": k, "gflops": gflops,
        "precision": precision, "peak_mib": peak,
    });
    times.describe(&mut line);
    let shown = [0.5, 0.1, 0.9].map(|part| format!("{:.1}", times.at(part)));
    let rest = [format!("{gflops:.0}"), peak.map_or_else(String::new, |mib| mib.to_string())];
    report.case(&[&[case][..], &shown, &rest].concat(), line)
}

/// Milliseconds from closed folders to a written run.
fn once(on: (Device, DType), dir: &Path, k: usize) -> Result<f64> {
    let start = Instant::now();
    let (q, d) = (Rows::open(&[dir.join("q")])?, Rows::open(&[dir.join("d")])?);
    let to = Written { path: &dir.join("run.trec"), format: RunFormat::Trec, tag: "bench" };
    write_run(on, (&q, &d), k, &to, &|_| {})?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// Rows of a file.
const PART: usize = 50_000;

/// A folder of `count` random unit vectors.
fn make(dir: &Path, prefix: &str, seed: u64, count: usize, width: usize) -> Result<()> {
    std::fs::create_dir_all(dir).at(dir, "cannot create")?;
    let (mut parts, mut ids) = (Vec::new(), String::new());
    for first in (0..count).step_by(PART) {
        let rows = PART.min(count - first);
        let mut bytes = header(Stored::F32, rows as u64, width).to_vec();
        for row in first..first + rows {
            let mut stream = Stream::new(seed, 0, Site::Init, row as u64);
            // Sums of uniform numbers: near enough to normal, and cheap.
            let mut draw = || (0..4).map(|_| stream.uniform() - 0.5).sum::<f32>();
            let values: Vec<f32> = (0..width).map(|_| draw()).collect();
            let length = values.iter().map(|x| x * x).sum::<f32>().sqrt();
            bytes.extend(values.iter().flat_map(|x| (x / length).to_le_bytes()));
            ids += &format!("{prefix}{row}\n");
        }
        let file = format!("embeddings-{:05}.npy", parts.len());
        std::fs::write(dir.join(&file), &bytes).at(dir, "cannot write")?;
        parts.push(Part { file, rows: rows as u64, crc: crc32c::crc32c(&bytes) });
    }
    std::fs::write(dir.join("ids.txt"), &ids).at(dir, "cannot write")?;
    let spec = Spec {
        dim: width,
        dtype: Stored::F32,
        representation: Representation::Cls,
        lexical_top_k: 0,
        vocab_size: 0,
        normalized: true,
        pooling: Pooling::Cls,
        prefix: String::new(),
        max_len: 32,
        side: if prefix == "q" { "query" } else { "passage" }.into(),
        model_sha256: "random".into(),
        model: "random".into(),
        computed: "random".into(),
    };
    let meta = Meta::new(Layout::Npy, spec, String::new(), crc32c::crc32c(ids.as_bytes()), parts);
    std::fs::write(dir.join("meta.json"), meta.text()?).at(dir, "cannot write")
}
