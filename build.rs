//! Builds the kernels twice: with nvcc to PTX that is embedded in the binary, and with the host C++ compiler against the kernel
//! emulator. From the kernels' signatures it generates the typed launch stubs of `src/device/kernels.rs`.
//!
//! Everything is compiled in parallel and only when its content changed. Without nvcc the build succeeds and says so in one line.

#[path = "build/emulator.rs"]
mod emulator;
#[path = "build/jobs.rs"]
mod jobs;
#[path = "build/nvcc.rs"]
mod nvcc;
#[path = "build/signatures.rs"]
mod signatures;
#[path = "build/stubs.rs"]
mod stubs;
#[path = "build/text.rs"]
mod text;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The emulator that is linked into the crate: fast, for every test run.
const PLAIN: emulator::Flags = emulator::Flags { all: &["-O2"], kernels: &[] };

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // Cargo shows a failed build script's whole output, so the first line must say what is wrong.
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    for path in ["build.rs", "build", "kernels"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let root = PathBuf::from(env("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(env("OUT_DIR")?);
    let parallel = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    let sources = jobs::files(&root.join("kernels"), &["cu"])?;
    let headers = jobs::Digest::of_files(&jobs::files(&root.join("kernels"), &["cuh", "h"])?)?;

    let compiler =
        cc::Build::new().cpp(true).cargo_warnings(false).try_get_compiler().map_err(|e| {
            format!("no C++ compiler for the kernel emulator ({e}); install g++ or clang++, or set CXX")
        })?;
    let cxx = emulator::Compiler { path: compiler.path().to_path_buf(), avx2: can_use_avx2() };
    // The emulator's tests build instrumented variants with the same compiler.
    println!("cargo::rustc-env=RETROMAE_BUILD_CXX={}", cxx.path.display());
    println!("cargo::rustc-env=RETROMAE_BUILD_AVX2={}", u8::from(cxx.avx2));

    let kernels = read_signatures(&cxx, &sources, headers, &out, parallel)?;
    link_emulator(&cxx, &root, &sources, headers, &out, parallel)?;
    let ptx = match nvcc::Toolkit::find()? {
        Some(toolkit) => Some(toolkit.compile(&sources, headers, &kernels, &out, parallel)?),
        None => {
            println!("cargo::warning={}", nvcc::MISSING);
            None
        }
    };
    nvcc::rerun_when_it_may_appear(ptx.is_none());
    let generated = stubs::generate(&kernels, ptx.as_ref(), nvcc::MISSING)?;
    text::write_if_changed(&out.join("kernels.rs"), &generated)
}

/// Preprocesses each source, so that macros may generate entry points, and parses the result.
fn read_signatures(
    cxx: &emulator::Compiler,
    sources: &[PathBuf],
    headers: jobs::Digest,
    out: &Path,
    parallel: usize,
) -> Result<Vec<signatures::Unit>, String> {
    let folder = jobs::folder(&out.join("signatures"))?;
    let list: Vec<jobs::Job> = sources
        .iter()
        .map(|source| {
            let output = folder.join(jobs::stem(source)).with_extension("i");
            jobs::Job::new(
                source,
                headers,
                output,
                |command, output| {
                    command
                        .args(["-x", "c++", "-std=c++17", "-E", "-P", "-DRM_SIGNATURES", "-o"])
                        .arg(output)
                        .arg(source);
                },
                &cxx.path,
            )
        })
        .collect::<Result<_, _>>()?;
    jobs::run(&list, parallel)?;
    let units: Vec<signatures::Unit> = sources
        .iter()
        .zip(&list)
        .map(|(source, job)| signatures::Unit::parse(&jobs::stem(source), &text::read(&job.output)?))
        .collect::<Result<_, _>>()?;
    signatures::check_unique(&units)?;
    Ok(units)
}

fn link_emulator(
    cxx: &emulator::Compiler,
    root: &Path,
    sources: &[PathBuf],
    headers: jobs::Digest,
    out: &Path,
    parallel: usize,
) -> Result<(), String> {
    let objects = emulator::compile(cxx, &PLAIN, root, sources, headers, &out.join("emulator"), parallel)?;
    let mut archive = cc::Build::new();
    archive.cpp(true).cargo_warnings(false);
    for object in &objects {
        archive.object(object);
    }
    archive.try_compile("retromae_kernels").map_err(|e| format!("cannot archive the kernel emulator: {e}"))
}

/// Whether the machine the emulator will run on has AVX2 and FMA: only known when building for the host itself.
fn can_use_avx2() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let native = std::env::var_os("HOST") == std::env::var_os("TARGET");
        native && std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

fn env(name: &str) -> Result<String, String> {
    std::env::var(name).map_err(|_| format!("{name} is not set; run this through cargo"))
}
