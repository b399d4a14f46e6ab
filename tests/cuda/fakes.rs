//! Builds the fake libraries, lays them out as a loader finds them, and runs children on them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use retromae_engine::device::kernels::{KERNELS, NVCC_MISSING};
use tempfile::TempDir;

/// Names the scenario to a child.
pub const SCENARIO: &str = "RETROMAE_CUDA_SCENARIO";

/// Why this build has no kernels for a GPU.
pub const NO_KERNELS: Option<&str> = NVCC_MISSING;

/// What a child finds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Libraries {
    None,
    Driver,
    Both,
    /// Both, and NCCL.
    All,
    /// Both, the driver without one function.
    Lacking,
}

/// What a child said, and the calls that the fakes saw.
pub struct Said {
    pub lines: Vec<String>,
    pub log: Vec<String>,
}

/// Names under which the libraries are looked for. A file that is no library ends the loader's search, so that none of this machine's
/// own is found.
const DRIVER: [&str; 2] = ["libcuda.so", "libcuda.so.1"];
const CUBLASLT: [&str; 5] =
    ["libcublasLt.so", "libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so.11", "libcublasLt.so.10"];

const NCCL: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// Says how many parameters kernels have.
const PARAMETERS: &str = "parameters";

fn tmp() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// The fake, one that lacks a function and calls itself cuBLASLt, and the fake NCCL.
fn fakes() -> &'static [PathBuf; 3] {
    static BUILT: OnceLock<[PathBuf; 3]> = OnceLock::new();
    BUILT.get_or_init(|| {
        let build = |name: &str, source: &str, flags: &[&str]| {
            let output = tmp().join(name);
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda").join(source);
            let mut command = Command::new(env!("RETROMAE_BUILD_CXX"));
            command.args(["-std=c++17", "-O1", "-Wall", "-Wextra", "-fPIC", "-shared"]).args(flags);
            let done = command.arg(source).arg("-o").arg(&output).output().expect("the C++ compiler runs");
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            output
        };
        let lacking = ["-DcuGraphLaunch=cuGraphLaunchThatIsMissing", "-Wl,-soname,libcublasLt.so.13"];
        [
            build("fake-driver.so", "fake_driver.cpp", &[]),
            build("fake-driver-lacking.so", "fake_driver.cpp", &lacking),
            build("fake-nccl.so", "fake_nccl.cpp", &["-ldl"]),
        ]
    })
}

/// A folder for `LD_LIBRARY_PATH`.
fn lay_out(libraries: Libraries) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder for the fakes");
    let put = |names: &[&str], target: Option<&PathBuf>| {
        for path in names.iter().map(|name| folder.path().join(name)) {
            match target {
                Some(target) => std::os::unix::fs::symlink(target, path).expect("a link to the fake"),
                None => std::fs::write(path, "").expect("an empty file"),
            }
        }
    };
    let [fake, lacking, nccl] = fakes();
    let (driver, cublaslt) = match libraries {
        Libraries::None => (None, None),
        Libraries::Driver => (Some(fake), None),
        Libraries::Both | Libraries::All => (Some(fake), Some(fake)),
        Libraries::Lacking => (Some(lacking), Some(fake)),
    };
    put(&DRIVER, driver);
    put(&CUBLASLT, cublaslt);
    put(&NCCL, (libraries == Libraries::All).then_some(nccl));
    let parameters = KERNELS.iter().map(|kernel| format!("{} {}\n", kernel.name, kernel.param_sizes.len()));
    std::fs::write(folder.path().join(PARAMETERS), parameters.collect::<String>()).expect("a file of parameters");
    folder
}

/// A Python environment with cuBLASLt as pip installs it.
pub fn environment_with_cublaslt() -> TempDir {
    let root = tempfile::tempdir().expect("a folder for the environment");
    let folder = root.path().join("lib/python3.12/site-packages/nvidia/cu13/lib");
    std::fs::create_dir_all(&folder).expect("a folder for the environment");
    std::fs::copy(&fakes()[1], folder.join("libcublasLt.so.13")).expect("a copy of the fake");
    root
}

fn run(mut command: Command, libraries: Libraries, variables: &[(&str, &str)], log: &Path) -> Output {
    let folder = lay_out(libraries);
    // Nothing of this machine may be found beside the fakes.
    for name in ["VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_HOME", "CUDA_PATH", "RETROMAE_SYNC"] {
        command.env_remove(name);
    }
    // What is remembered of one child is nothing to the next, unless a test says so.
    let cache = tempfile::tempdir().expect("a folder for what is remembered");
    command.env_remove("RETROMAE_TUNE_PRODUCTS").env("RETROMAE_CACHE", cache.path());
    command.env("FAKE_PARAMETERS", folder.path().join(PARAMETERS));
    command.env("PATH", "").env("HOME", "/nonexistent").env("LD_LIBRARY_PATH", folder.path()).env("FAKE_LOG", log);
    command.envs(variables.iter().copied()).output().expect("the child runs")
}

/// Runs a scenario in a process of its own, whatever the build.
pub fn child_of_any_build(scenario: &str, libraries: Libraries, variables: &[(&str, &str)]) -> Said {
    let folder = tempfile::tempdir().expect("a folder for the log");
    let log = folder.path().join("log");
    let mut command = Command::new(std::env::current_exe().expect("this test's program"));
    command.args(["scenario", "--exact", "--nocapture", "--test-threads=1"]).env(SCENARIO, scenario);
    let done = run(command, libraries, variables, &log);
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success() && !err.contains("panicked"), "{scenario} with {variables:?}: {out}{err}");
    let lines = |text: &str, prefix: &str| {
        text.lines().filter_map(|line| line.split_once(prefix)).map(|(_, said)| said.to_string()).collect()
    };
    let log = std::fs::read_to_string(log).unwrap_or_default();
    Said { lines: lines(&out, "said: "), log: log.lines().map(str::to_string).collect() }
}

/// Runs a scenario. `None` in a build without kernels for a GPU, once it has said so.
pub fn child(scenario: &str, libraries: Libraries, variables: &[(&str, &str)]) -> Option<Said> {
    let said = child_of_any_build(scenario, libraries, variables);
    let Some(why) = NO_KERNELS else { return Some(said) };
    // `auto` says it only to those who have a driver.
    let expected = match (scenario, libraries) {
        ("auto", Libraries::None) => "Cpu".to_string(),
        ("auto", _) => format!("Cpu, running on the CPU: {why}"),
        _ => format!("error: {why}"),
    };
    assert_eq!(said.lines, [expected], "{scenario} in a build without kernels");
    None
}

/// What `retromae-engine doctor` prints.
pub fn doctor(libraries: Libraries, variables: &[(&str, &str)]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_retromae-engine"));
    command.arg("doctor");
    let done = run(command, libraries, variables, Path::new("/dev/null"));
    let err = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success() && err.is_empty(), "{variables:?}: {err}");
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// Exit code and standard error of `retromae-engine step` on a stored case, and the calls that the fakes saw.
pub fn step(libraries: Libraries, variables: &[(&str, &str)]) -> ((Option<i32>, String), String) {
    let folder = tempfile::tempdir().expect("a folder for the output");
    let log = folder.path().join("log");
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/head32/retromae");
    let mut command = Command::new(env!("CARGO_BIN_EXE_retromae-engine"));
    command.args(["step", "--objective", "retromae", "--device", "cuda", "--model"]).arg(case.join("model"));
    command.arg("--batch").arg(case.join("batch.safetensors"));
    command.arg("--output").arg(folder.path().join("gradients.safetensors"));
    let done = run(command, libraries, variables, &log);
    let err = String::from_utf8_lossy(&done.stderr).into_owned();
    ((done.status.code(), err), std::fs::read_to_string(log).unwrap_or_default())
}
