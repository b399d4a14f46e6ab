//! Speed and memory of exact search: `cargo bench --bench search -- [QUERIES ROWS WIDTH K [FOLDER]]`.
//!
//! Writes folders of random unit vectors as `encode` writes them (kept when FOLDER is named, so that faiss can be given the same rows),
//! searches, writes the run, and tells the time of all of that but the making of the vectors, and the most memory that was resident.

use std::path::Path;

use retromae_engine::data::pairs::runs::RunFormat;
use retromae_engine::device::{DType, Device};
use retromae_engine::error::{IoContext, Result};
use retromae_engine::ops::pool::Pooling;
use retromae_engine::retrieve::embeddings::{Layout, Meta, Part, Spec};
use retromae_engine::retrieve::npy::{Stored, header};
use retromae_engine::retrieve::representation::Representation;
use retromae_engine::retrieve::search::{Rows, Written, write_run};
use retromae_engine::rng::{Site, Stream};

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

/// The most memory that was resident, in MiB.
fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib / 1024)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let number = |i: usize, default: usize| arguments.get(i).and_then(|a| a.parse().ok()).unwrap_or(default);
    let [queries, rows, width, k] = [(0, 512), (1, 200_000), (2, 768), (3, 1000)].map(|(i, n)| number(i, n));
    let temporary = std::env::temp_dir().join(format!("retromae-search-{}", std::process::id()));
    let dir = arguments.get(4).map_or(temporary.clone(), std::path::PathBuf::from);
    for (name, seed, count) in [("q", 1, queries), ("d", 2, rows)] {
        if !dir.join(name).join("meta.json").is_file() {
            make(&dir.join(name), name, seed, count, width)?;
        }
    }
    for round in 1..=3 {
        let started = std::time::Instant::now();
        let (q, d) = (Rows::open(&[dir.join("q")])?, Rows::open(&[dir.join("d")])?);
        let to = Written { path: &dir.join("run.trec"), format: RunFormat::Trec, tag: "bench" };
        let done = write_run((Device::Cpu, DType::F32), (&q, &d), k, &to, &|_| {})?;
        let seconds = started.elapsed().as_secs_f64();
        let rate = 2.0 * (done.queries * done.rows) as f64 * width as f64 / seconds / 1e9;
        let peak = peak().map_or_else(|| "unknown".into(), |mib| format!("{mib} MiB"));
        println!(
            "round {round}: {queries} queries, {rows} rows of {width}, k = {k}: {seconds:.2} s, {rate:.0} GFLOP/s, peak {peak}"
        );
    }
    if arguments.len() < 5 {
        std::fs::remove_dir_all(&temporary).at(&temporary, "cannot remove")?;
    }
    Ok(())
}
