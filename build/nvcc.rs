//! Finds nvcc, compiles the kernels to PTX, and has ptxas check the result and report what it costs.

use super::jobs::{self, Digest, Job};
use super::signatures::Unit;
use super::text;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the build and `--device cuda` say when there is no nvcc.
pub const MISSING: &str = "built without nvcc, so GPU kernels are left out; install it \
    (pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-runtime==13.0.*' \
    'nvidia-cuda-cccl==13.0.*', or the CUDA toolkit), set NVCC to its path, and build again";

/// Targets: every GPU from Ampere on (newer ones through the driver's compiler), and Hopper with its own instructions.
pub const TARGETS: [&str; 2] = ["80", "90a"];

/// nvcc 13 marks its PTX as version 9.0, which drivers of CUDA 12 refuse. The kernels use nothing newer than 8.0 (wgmma), and ptxas
/// would refuse the relabelled file if they did.
const PTX_VERSION: &str = "8.0";

/// Files by unit, in the order of [`TARGETS`].
pub struct Ptx {
    /// PTX.
    pub files: Vec<[PathBuf; TARGETS.len()]>,
    /// Machine code of it.
    pub binaries: Vec<[PathBuf; TARGETS.len()]>,
    pub report: PathBuf,
}

/// A CUDA compiler: nvcc and the ptxas beside it.
pub struct Toolkit {
    nvcc: PathBuf,
    ptxas: PathBuf,
    includes: Vec<PathBuf>,
}

/// Asks cargo to run the build script again when the places to look for nvcc change.
pub fn rerun_when_it_may_appear(missing: bool) {
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    if missing {
        println!("cargo::rerun-if-env-changed=PATH");
    }
}

impl Toolkit {
    /// `NVCC`, `CUDA_HOME`, `PATH`, `/usr/local/cuda`, then the wheel of the active Python. A wrong `NVCC` is an error: whoever set it
    /// wants GPU kernels.
    pub fn find() -> Result<Option<Toolkit>, String> {
        let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let path: Vec<PathBuf> =
            std::env::var_os("PATH").map(|p| std::env::split_paths(&p).collect()).unwrap_or_default();
        if let Some(nvcc) = var("NVCC") {
            let places = std::iter::once(nvcc.clone()).chain(path.iter().map(|folder| folder.join(&nvcc)));
            let found = places.into_iter().find_map(|place| Toolkit::at(&place));
            return found.map(Some).ok_or_else(|| {
                format!("NVCC={} is no nvcc with ptxas beside it; correct or unset it", nvcc.display())
            });
        }
        let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(var).map(|home| home.join("bin"));
        let folders = homes.chain(path).chain(std::iter::once(PathBuf::from("/usr/local/cuda/bin")));
        let candidates = folders.map(|folder| folder.join("nvcc")).chain(std::iter::once_with(wheels).flatten());
        Ok(candidates.into_iter().find_map(|nvcc| Toolkit::at(&nvcc)))
    }

    fn at(nvcc: &Path) -> Option<Toolkit> {
        let real = nvcc.canonicalize().ok().filter(|p| p.is_file())?;
        // Distributions link nvcc into a folder of its own and leave ptxas beside the link.
        let ptxas =
            [real.parent()?, nvcc.parent()?].map(|folder| folder.join("ptxas")).into_iter().find(|p| p.is_file())?;
        // Wheels of CUDA 12 keep each component's headers apart.
        let includes = match real.parent()?.parent()?.parent() {
            Some(nvidia) if nvidia.ends_with("nvidia") => std::fs::read_dir(nvidia)
                .map(|entries| entries.flatten().map(|e| e.path().join("include")).filter(|p| p.is_dir()).collect())
                .unwrap_or_default(),
            _ => Vec::new(),
        };
        Some(Toolkit { nvcc: real, ptxas, includes })
    }

    /// Compiles every unit for every target; fails on any warning of nvcc or ptxas, and on spills in kernels exported as hot.
    pub fn compile(
        &self,
        sources: &[PathBuf],
        headers: Digest,
        units: &[Unit],
        out: &Path,
        parallel: usize,
    ) -> Result<Ptx, String> {
        let folder = jobs::folder(&out.join("ptx"))?;
        let named = |source: &Path, target: &str, suffix: &str| {
            folder.join(format!("{}.sm_{target}{suffix}", jobs::stem(source)))
        };
        let pairs = || sources.iter().flat_map(|source| TARGETS.map(|target| (source, target)));
        let compile: Vec<Job> = pairs()
            .map(|(source, target)| self.nvcc_job(source, headers, target, named(source, target, ".raw")))
            .collect::<Result<_, _>>()?;
        jobs::run(&compile, parallel)?;

        for ((source, target), job) in pairs().zip(&compile) {
            text::write_if_changed(&named(source, target, ".ptx"), &relabel(&text::read(&job.output)?))?;
        }
        let assemble: Vec<Job> = pairs()
            .map(|(source, target)| {
                self.ptxas_job(&named(source, target, ".ptx"), headers, target, named(source, target, ".cubin"))
            })
            .collect::<Result<_, _>>()?;
        jobs::run(&assemble, parallel)?;

        let report = out.join("kernels-report.txt");
        let logs: Vec<(&str, String)> = pairs()
            .zip(&assemble)
            .map(|((_, target), job)| Ok((target, text::read(&jobs::append(&job.output, ".log"))?)))
            .collect::<Result<_, String>>()?;
        text::write_if_changed(&report, &resources(&logs, units)?)?;
        let of = |suffix: &str| sources.iter().map(|s| TARGETS.map(|t| named(s, t, suffix))).collect();
        Ok(Ptx { files: of(".ptx"), binaries: of(".cubin"), report })
    }

    fn nvcc_job(&self, source: &Path, headers: Digest, target: &str, output: PathBuf) -> Result<Job, String> {
        Job::new(
            source,
            headers,
            output,
            |command, output| {
                command
                    .args(["-ptx", "-O3", "-std=c++17", "-Werror", "all-warnings"])
                    .arg(format!("-arch=compute_{target}"));
                for include in &self.includes {
                    command.arg("-I").arg(include);
                }
                command.arg(source).arg("-o").arg(output);
            },
            &self.nvcc,
        )
    }

    fn ptxas_job(&self, ptx: &Path, headers: Digest, target: &str, output: PathBuf) -> Result<Job, String> {
        Job::new(
            ptx,
            headers,
            output,
            |command, output| {
                command.args(["-v", "-O3", "-Werror"]).arg(format!("-arch=sm_{target}")).arg(ptx).arg("-o").arg(output);
            },
            &self.ptxas,
        )
    }
}

/// nvcc of the `nvidia-cuda-nvcc` wheel, wherever the active Python keeps it.
fn wheels() -> Vec<PathBuf> {
    let script = "import nvidia\nfor p in nvidia.__path__: print(p)";
    let mut pythons: Vec<PathBuf> =
        std::env::var_os("VIRTUAL_ENV").map(|v| Path::new(&v).join("bin/python")).into_iter().collect();
    pythons.extend(["python3".into(), "python".into()]);
    let mut found = Vec::new();
    for python in pythons {
        let Ok(done) = Command::new(python).args(["-c", script]).output() else { continue };
        for folder in String::from_utf8_lossy(&done.stdout).lines().map(PathBuf::from) {
            found.extend(["cu13/bin/nvcc", "cuda_nvcc/bin/nvcc"].map(|tail| folder.join(tail)));
        }
    }
    found
}

fn relabel(ptx: &str) -> String {
    let mut done = false;
    ptx.split_inclusive('\n')
        .map(|line| match line.starts_with(".version") && !std::mem::replace(&mut done, true) {
            true => format!(".version {PTX_VERSION}\n"),
            false => line.to_string(),
        })
        .collect()
}

/// What one kernel costs on one target.
#[derive(Default)]
struct Usage {
    kernel: String,
    target: String,
    registers: u32,
    stack: u32,
    spill_bytes: u32,
    shared: u32,
}

/// Reads ptxas' logs into a table, one line a kernel and target.
fn resources(logs: &[(&str, String)], units: &[Unit]) -> Result<String, String> {
    let mut rows: Vec<Usage> = Vec::new();
    for (target, log) in logs {
        for line in log.lines() {
            if line.contains("warning") {
                return Err(format!("ptxas: {line}"));
            }
            if let Some(rest) = line.split("Compiling entry function '").nth(1) {
                let kernel = rest.split('\'').next().unwrap_or_default().to_string();
                rows.push(Usage { kernel, target: target.to_string(), ..Usage::default() });
            }
            let Some(row) = rows.last_mut() else { continue };
            if line.contains("bytes stack frame") {
                row.stack = number_before(line, "bytes stack frame");
                row.spill_bytes = number_before(line, "bytes spill stores") + number_before(line, "bytes spill loads");
            }
            if line.contains(" registers") {
                row.registers = number_before(line, "registers");
                row.shared = number_before(line, "bytes smem");
            }
        }
    }
    rows.sort_by(|a, b| (&a.kernel, &a.target).cmp(&(&b.kernel, &b.target)));
    let hot: Vec<&str> = units.iter().flat_map(|u| &u.kernels).filter(|k| k.hot).map(|k| k.name.as_str()).collect();
    let spilling: Vec<String> = rows
        .iter()
        .filter(|r| r.spill_bytes > 0 && hot.contains(&r.kernel.as_str()))
        .map(|r| format!("{} (sm_{}: {} bytes)", r.kernel, r.target, r.spill_bytes))
        .collect();
    if !spilling.is_empty() {
        return Err(format!(
            "registers spill in hot kernels: {}; shrink their tiles or raise their launch bounds",
            spilling.join(", ")
        ));
    }
    let mut table =
        format!("{:<44} {:>7} {:>9} {:>6} {:>6} {:>7}\n", "kernel", "target", "registers", "stack", "spills", "static");
    for r in rows {
        table += &format!(
            "{:<44} {:>7} {:>9} {:>6} {:>6} {:>7}\n",
            r.kernel,
            format!("sm_{}", r.target),
            r.registers,
            r.stack,
            r.spill_bytes,
            r.shared
        );
    }
    Ok(table)
}

/// The number in front of `unit` in a line like "0 bytes stack frame, 8 bytes spill stores"; 0 when the unit is not there.
fn number_before(line: &str, unit: &str) -> u32 {
    let Some(end) = line.find(unit) else { return 0 };
    line[..end].split_whitespace().last().and_then(|n| n.parse().ok()).unwrap_or(0)
}
