//! cuBLASLt: where it is found, and whether it goes with the driver.

use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};

use cudarc::cublaslt::sys;

use super::driver::cuda_version;
use crate::error::{Error, Result};

/// Every function in use, as for the driver's: looked for before cudarc does.
const SYMBOLS: [&str; 13] = [
    "cublasLtGetVersion",
    "cublasLtCreate",
    "cublasLtMatmul",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmulAlgoCheck",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatmulPreferenceDestroy",
];

/// The oldest version that will do, as it numbers itself.
const OLDEST: usize = 120_000;

/// Loads cuBLASLt for a driver of this version; gives its own version as it numbers itself. The loader's choice comes first, then what
/// pip, conda and the CUDA toolkit install.
pub fn load(driver: u32) -> Result<usize> {
    let preloaded = if is_found_by_loader() { None } else { Some(preload(driver)) };
    if let Some(found) = preloaded
        && !is_found_by_loader()
    {
        let cause = match found {
            Ok(()) => "cuBLASLt, the library for matrix products, is not there".to_string(),
            Err(told) => format!("cuBLASLt, the library for matrix products, cannot be loaded: {told}"),
        };
        return Err(Error::device(cause).remedy(format!("{} in the active Python environment, or {PUT}", pip(driver))));
    }
    for name in SYMBOLS {
        // SAFETY: the symbol is looked up and not called.
        if unsafe { sys::culib().get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_err() {
            return Err(
                Error::device(format!("the cuBLASLt that was found has no function {name}")).remedy(pip(driver))
            );
        }
    }
    // SAFETY: takes and changes nothing.
    let version = unsafe { sys::cublasLtGetVersion() };
    let told = in_words(version);
    if version < OLDEST {
        return Err(Error::device(format!("cuBLASLt {told} is older than {}", in_words(OLDEST))).remedy(pip(driver)));
    }
    let major = (version / 10_000) as u32;
    if major > driver / 1000 {
        let cause = format!("cuBLASLt {told} needs a driver of CUDA {major}, this one is of {}", cuda_version(driver));
        return Err(Error::device(cause).remedy(format!("update the NVIDIA driver, or {}", pip(driver))));
    }
    Ok(version)
}

const PUT: &str = "put the folder of libcublasLt.so on LD_LIBRARY_PATH";

/// How to get one that goes with the driver.
fn pip(driver: u32) -> &'static str {
    if driver < 13_000 { "pip install nvidia-cublas-cu12" } else { "pip install nvidia-cublas" }
}

/// `13.1.0` of 130100.
pub fn in_words(version: usize) -> String {
    // Before CUDA 12 it counted the major version in thousands.
    let unit = if version < 100_000 { 1000 } else { 10_000 };
    format!("{}.{}.{}", version / unit, version % unit / 100, version % 100)
}

fn is_found_by_loader() -> bool {
    // SAFETY: loads and unloads the library; NVIDIA's initialisers may run at any time.
    unsafe { sys::is_culib_present() }
}

/// Loads the first cuBLASLt in the usual places under its full path. The loader then answers with it when it is asked for the name that
/// the library gives itself, which is how cudarc asks. Fails with what the loader said of the last one that was there.
fn preload(driver: u32) -> std::result::Result<(), String> {
    let names = ["libcublasLt.so.13", "libcublasLt.so.12"];
    let names = if driver < 13_000 { &names[1..] } else { &names[..] };
    let mut told = Ok(());
    for folder in folders(|name| std::env::var_os(name)) {
        for path in names.iter().map(|name| folder.join(name)).filter(|path| path.is_file()) {
            match open(&path) {
                Ok(()) => return Ok(()),
                Err(e) => told = Err(e),
            }
        }
    }
    told
}

fn open(path: &Path) -> std::result::Result<(), String> {
    let name = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| e.to_string())?;
    // SAFETY: the name is a C string. The library is never unloaded.
    if !unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL) }.is_null() {
        return Ok(());
    }
    // SAFETY: dlerror returns null or a C string that stays valid until this thread's next call.
    let text = unsafe {
        let text = libc::dlerror();
        if text.is_null() { c"unknown cause" } else { CStr::from_ptr(text) }
    };
    Err(text.to_string_lossy().into_owned())
}

/// Folders that may hold the library: of the active Python environment, of the Python whose folder of programs is on the path, and of
/// the CUDA toolkit.
pub fn folders(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> Vec<PathBuf> {
    let named = |name: &str| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let mut roots: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(named).collect();
    let programs = variable("PATH").unwrap_or_default();
    roots.extend(std::env::split_paths(&programs).filter(|p| p.ends_with("bin")).filter_map(|mut bin| {
        bin.pop();
        (!bin.as_os_str().is_empty()).then_some(bin)
    }));
    roots.extend(named("HOME").map(|home| home.join(".local")));
    roots.extend(["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(named));
    roots.push("/usr/local/cuda".into());
    let mut found: Vec<PathBuf> = Vec::new();
    for root in roots {
        let lib = root.join("lib");
        let pythons = std::fs::read_dir(&lib).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut pythons: Vec<PathBuf> =
            pythons.filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python"))).collect();
        pythons.sort();
        for packages in pythons.iter().flat_map(|p| [p.join("site-packages"), p.join("dist-packages")]) {
            found.extend(["cu13", "cublas", "nccl"].map(|part| packages.join("nvidia").join(part).join("lib")));
        }
        found.extend([lib, root.join("lib64")]);
    }
    found.retain(|folder| folder.is_dir());
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_function_in_use_is_looked_for() {
        let sources = [include_str!("library.rs"), include_str!("operation.rs"), include_str!("descriptors.rs")];
        let names = sources.iter().flat_map(|text| text.split("sys::cublasLt").skip(1));
        let mut names: Vec<&str> = names.filter_map(|rest| rest.split_once('(').map(|(name, _)| name)).collect();
        names.retain(|name| name.chars().all(char::is_alphanumeric));
        assert!(names.len() > 10, "{names:?}");
        let listed = |name: &str| SYMBOLS.iter().any(|s| s.strip_prefix("cublasLt") == Some(name));
        let forgotten: Vec<&&str> = names.iter().filter(|name| !listed(name)).collect();
        assert!(forgotten.is_empty(), "not in SYMBOLS: {forgotten:?}");
    }

    #[test]
    fn versions_in_words() {
        assert_eq!([130_100, 120_804, 11_402].map(in_words), ["13.1.0", "12.8.4", "11.4.2"]);
    }

    #[test]
    fn libraries_of_pip_are_found_beside_the_active_python() {
        let root = tempfile::tempdir().expect("a folder for the test");
        let lib = root.path().join("lib/python3.12/site-packages/nvidia/cu13/lib");
        std::fs::create_dir_all(&lib).expect("a folder for the test");
        std::fs::create_dir_all(root.path().join("bin")).expect("a folder for the test");
        let programs = root.path().join("bin").into_os_string();
        for (name, value) in [("VIRTUAL_ENV", root.path().as_os_str()), ("PATH", programs.as_os_str())] {
            let found = folders(|asked| (asked == name).then(|| value.to_os_string()));
            assert_eq!(found.first(), Some(&lib), "{name}");
        }
    }
}
