//! Builds of the emulator as shared libraries, each with all kernels and the planted bugs: plain, with the race checker, and with the
//! address and undefined-behaviour sanitizers. They lie in `target/tmp/emulator-<name>.so`, are rebuilt only when a source changed, and
//! any test of the engine runs on one when `RETROMAE_EMULATOR_LIBRARY` names it.

use crate::build_emulator::{self, Compiler, Flags};
use crate::jobs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// One instrumented build.
struct Build {
    name: &'static str,
    flags: Flags,
    link: &'static [&'static str],
    path: OnceLock<PathBuf>,
}

// The one build whose warnings are errors: the others' optimisers see other code.
static PLAIN: Build =
    Build { name: "plain", flags: Flags { all: &["-O2", "-Werror"], kernels: &[] }, link: &[], path: OnceLock::new() };

static CHECK: Build = Build {
    name: "check",
    // -g: reports name the line.
    flags: Flags { all: &["-O2", "-g", "-DEMU_CHECK=1"], kernels: &["-fsanitize=thread"] },
    link: &[],
    path: OnceLock::new(),
};

static ASAN: Build = Build {
    name: "asan",
    flags: Flags {
        all: &["-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer"],
        kernels: &["-fsanitize=undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"],
    },
    link: &["-fsanitize=address,undefined"],
    path: OnceLock::new(),
};

/// The uninstrumented build with the planted bugs in it.
pub fn plain() -> &'static Path {
    PLAIN.build()
}

/// The build with the race and initialisation checker.
pub fn check() -> &'static Path {
    CHECK.build()
}

/// The build with sanitizers; a process that loads it needs [`preload`].
pub fn asan() -> &'static Path {
    ASAN.build()
}

/// The sanitizers' run-time library, which must come first in a process.
pub fn preload() -> PathBuf {
    let printed = Command::new(compiler().path).arg("-print-file-name=libasan.so").output().expect("the compiler runs");
    PathBuf::from(String::from_utf8_lossy(&printed.stdout).trim())
}

fn compiler() -> Compiler {
    Compiler { path: env!("RETROMAE_BUILD_CXX").into(), avx2: env!("RETROMAE_BUILD_AVX2") == "1" }
}

impl Build {
    fn build(&'static self) -> &'static Path {
        self.path.get_or_init(|| {
            self.compile_and_link().unwrap_or_else(|e| panic!("the {} build of the emulator: {e}", self.name))
        })
    }

    fn compile_and_link(&self) -> Result<PathBuf, String> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("emulator-{}", self.name));
        let mut kernels = jobs::files(&root.join("kernels"), &["cu"])?;
        kernels.extend(jobs::files(&root.join("tests/emulator"), &["cu"])?);
        let headers = jobs::Digest::of_files(&jobs::files(&root.join("kernels"), &["cuh", "h"])?)?;
        let parallel = std::thread::available_parallelism().map_or(1, |n| n.get());
        let cxx = compiler();
        let objects = build_emulator::compile(&cxx, &self.flags, root, &kernels, headers, &folder, parallel)?;
        // The digest of the objects decides whether to link again.
        let list = folder.join("objects");
        let digests = jobs::Digest::of_files(&objects)?;
        std::fs::write(&list, format!("{objects:?}")).map_err(|e| format!("{}: cannot write: {e}", list.display()))?;
        let library = jobs::append(&folder, ".so");
        let link = jobs::Job::new(
            &list,
            digests,
            library,
            |command, output| {
                command
                    .args(["-shared", "-Wl,-Bsymbolic", "-Wl,-z,now", "-pthread"])
                    .args(self.link)
                    .args(&objects)
                    .arg("-o")
                    .arg(output);
            },
            &cxx.path,
        )?;
        jobs::run(std::slice::from_ref(&link), 1)?;
        Ok(link.output)
    }
}
