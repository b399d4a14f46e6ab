//! Compiles the kernel emulator and kernels with the host C++ compiler. Used by build.rs for the plain build that is linked into the
//! crate, and by the emulator's tests for the instrumented ones.

use super::jobs::{self, Digest, Job};
use std::path::{Path, PathBuf};

/// The host C++ compiler.
pub struct Compiler {
    pub path: PathBuf,
    pub avx2: bool,
}

/// Compiler flags of one build of the emulator.
pub struct Flags {
    pub all: &'static [&'static str],
    /// What kernels get on top: the emulator itself plays tricks that sanitizers would report.
    pub kernels: &'static [&'static str],
}

/// Compiles the emulator and `kernels` (.cu files) into `out`; returns the object files.
pub fn compile(
    cxx: &Compiler,
    flags: &Flags,
    root: &Path,
    kernels: &[PathBuf],
    headers: Digest,
    out: &Path,
    parallel: usize,
) -> Result<Vec<PathBuf>, String> {
    jobs::folder(out)?;
    let runtime = jobs::files(&root.join("kernels/emulator"), &["cpp"])?;
    let include = root.join("kernels");
    let job = |source: &PathBuf, is_kernel: bool| {
        let name = format!("{}{}.o", if is_kernel { "kernel_" } else { "" }, jobs::stem(source));
        Job::new(
            source,
            headers,
            out.join(name),
            |command, output| {
                command.args(["-x", "c++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]);
                // No contraction: every build of the emulator, on every host, computes the same bits.
                command.args(["-Wno-unknown-pragmas", "-Wno-psabi", "-ffp-contract=off"]).args(flags.all);
                // Reports name `kernels/<op>.cu`, wherever the sources lie.
                command.arg(format!("-ffile-prefix-map={}/=", root.display()));
                if cxx.avx2 {
                    command.args(["-mavx2", "-mfma"]);
                }
                if is_kernel {
                    command.args(flags.kernels);
                }
                command.arg("-I").arg(&include).arg("-c").arg(source).arg("-o").arg(output);
            },
            &cxx.path,
        )
    };
    // Kernels first: they take longest.
    let list: Vec<Job> =
        kernels.iter().map(|k| job(k, true)).chain(runtime.iter().map(|r| job(r, false))).collect::<Result<_, _>>()?;
    jobs::run(&list, parallel)?;
    Ok(list.into_iter().map(|j| j.output).collect())
}
