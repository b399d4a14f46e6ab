//! Compiles the kernel emulator and kernels with the host C++ compiler. Used by build.rs for the plain variant that is linked into the
//! crate, and by the emulator's tests for the instrumented ones.

use super::jobs::{self, Digest, Job};
use std::path::{Path, PathBuf};

/// The host C++ compiler.
pub struct Compiler {
    pub path: PathBuf,
    pub avx2: bool,
}

/// How the emulator is built.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// Fast: every test run.
    Plain,
    /// Kernels report their memory accesses to the emulator's race and initialisation checker.
    #[allow(dead_code)] // only the tests build the instrumented variants
    Check,
    /// AddressSanitizer and UndefinedBehaviorSanitizer.
    #[allow(dead_code)] // as above
    Asan,
}

impl Variant {
    fn flags(self) -> &'static [&'static str] {
        match self {
            Variant::Plain => &["-O2"],
            Variant::Check => &["-O2", "-g", "-DEMU_CHECK=1"],
            Variant::Asan => &["-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer"],
        }
    }

    /// What kernels get on top: the emulator itself plays tricks that the sanitizers would report.
    fn kernel_flags(self) -> &'static [&'static str] {
        match self {
            Variant::Plain => &[],
            Variant::Check => &["-fsanitize=thread"],
            Variant::Asan => &["-fsanitize=undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"],
        }
    }
}

/// Compiles the emulator and `kernels` (.cu files) into `out`; returns the object files.
pub fn compile(
    cxx: &Compiler,
    variant: Variant,
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
                command.args(["-Wno-unknown-pragmas", "-Wno-psabi"]).args(variant.flags());
                // Reports name `kernels/<op>.cu`, wherever the sources lie.
                command.arg(format!("-ffile-prefix-map={}/=", root.display()));
                if cxx.avx2 {
                    command.args(["-mavx2", "-mfma"]);
                }
                if is_kernel {
                    command.args(variant.kernel_flags());
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
