//! `doctor`: what this machine offers, a line each, with what it means for a run.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{Global, say};
use crate::device::{self, Finding, cpu};
use crate::error::Result;
use crate::model::hub;
use crate::train::room::Memory;

/// Tell what this machine offers the engine, and what each part means
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Folder whose disk is looked at
    #[arg(long, default_value = ".", value_name = "DIR")]
    output: PathBuf,
}

/// Runs the subcommand. Nothing found missing is an error: everything runs on a CPU alone.
pub fn run(args: Arguments, global: &Global) -> Result<()> {
    let mut findings = vec![processor(global.threads()), vectors(), memory()];
    findings.extend(device::findings());
    findings.extend([disk(&args.output), cache()]);
    for f in &findings {
        let mark = if f.good { "ok" } else { "--" };
        say(&format!("{mark}  {:<12} {}\n    {:<12} {}", f.what, f.found, "", f.meaning))?;
    }
    let all: Vec<_> = findings
        .iter()
        .map(|f| json!({ "what": f.what, "ok": f.good, "found": f.found, "meaning": f.meaning }))
        .collect();
    global.write_json(&json!({ "version": env!("CARGO_PKG_VERSION"), "findings": all }))
}

fn finding(what: &'static str, good: bool, found: impl Into<String>, meaning: impl Into<String>) -> Finding {
    Finding { what, good, found: found.into(), meaning: meaning.into() }
}

fn processor(threads: usize) -> Finding {
    finding("processor", true, format!("{}, {threads} threads", cpu::processor()), "--threads sets how many are used")
}

fn vectors() -> Finding {
    #[cfg(target_arch = "x86_64")]
    let (fast, name) = match (is_x86_feature_detected!("avx512f"), is_x86_feature_detected!("avx2")) {
        (true, _) => (true, "AVX-512"),
        (false, true) => (is_x86_feature_detected!("fma"), "AVX2"),
        _ => (false, "SSE2"),
    };
    #[cfg(not(target_arch = "x86_64"))]
    let (fast, name) = (true, "the baseline of this architecture");
    let meaning = if fast {
        "products and loops use it"
    } else {
        "training on this CPU is several times slower than on one with AVX2"
    };
    finding("vectors", fast, name, meaning)
}

fn memory() -> Finding {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    match Memory::of_machine() {
        Some(Memory { all, free: Some(free), .. }) => finding(
            "memory",
            true,
            format!("{:.1} GiB, {:.1} GiB available", gib(all), gib(free)),
            "train --dry-run says how much a run needs",
        ),
        _ => finding("memory", false, "unknown", "this system does not tell"),
    }
}

fn disk(folder: &Path) -> Finding {
    let existing = folder.ancestors().find(|p| p.exists()).unwrap_or(Path::new("."));
    match rustix::fs::statvfs(existing) {
        Ok(stat) => {
            let free = stat.f_bavail as f64 * stat.f_frsize as f64 / f64::from(1 << 30);
            let meaning = "a checkpoint takes 12 bytes a parameter, 1.4 GiB for BERT-base; --keep says how many stay";
            finding("disk", free > 5.0, format!("{free:.1} GiB free at {}", existing.display()), meaning)
        }
        Err(e) => {
            finding("disk", false, format!("{}: {e}", existing.display()), "give a folder of the disk to be used")
        }
    }
}

fn cache() -> Finding {
    let folder = hub::cache_folder(|name| std::env::var_os(name));
    let there = folder.is_dir();
    let meaning = "models in it can be named as on the hub: --model org/name";
    finding(
        "model cache",
        there,
        format!("{}{}", folder.display(), if there { "" } else { " (does not exist)" }),
        meaning,
    )
}
