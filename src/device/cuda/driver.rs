//! The NVIDIA driver: whether it is there and new enough, which GPU it has, and its failures in words.

use std::ffi::{CStr, c_int};
use std::fmt::Display;
use std::panic::{self, AssertUnwindSafe};

use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute as Attribute, CUresult};

use crate::device::gpu::Facts;
use crate::error::{Error, Result};

/// The oldest driver that will do, as the driver numbers itself.
const OLDEST: u32 = 12_000;

/// What tells the version and puts failures into words.
const FIRST_SYMBOLS: [&str; 2] = ["cuDriverGetVersion", "cuGetErrorString"];

/// Every other driver function in use. cudarc looks a function up when it is first called and panics when it is missing, so they are
/// looked for beforehand. All exist in a driver of CUDA 12.0; a test compares the list with the calls.
const SYMBOLS: [&str; 38] = [
    "cuInit",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuCtxSetCurrent",
    "cuStreamCreate",
    "cuStreamCreateWithPriority",
    "cuStreamWaitEvent",
    "cuStreamSynchronize",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventElapsedTime",
    "cuEventDestroy_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemsetD8Async",
    "cuMemsetD2D8Async",
    "cuModuleLoadDataEx",
    "cuModuleGetFunction",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
    "cuTensorMapEncodeTiled",
];

/// Whether there is a driver library at all.
pub fn is_present() -> bool {
    // SAFETY: loads and unloads the library; NVIDIA's initialisers may run at any time.
    unsafe { sys::is_culib_present() }
}

/// Loads and initialises the driver; gives its version as it numbers itself, 13000 for CUDA 13.0.
pub fn load() -> Result<u32> {
    if !is_present() {
        return Err(Error::device("there is no NVIDIA driver (libcuda.so.1)")
            .remedy("install one, or let everything run on the CPU: --device cpu"));
    }
    need(&FIRST_SYMBOLS)?;
    let mut version: c_int = 0;
    // SAFETY: writes the integer it is given; may be called before cuInit.
    check(unsafe { sys::cuDriverGetVersion(&raw mut version) }, &"asking for the driver's version")?;
    let version = version.unsigned_abs();
    if version < OLDEST {
        let (is, needed) = (cuda_version(version), cuda_version(OLDEST));
        return Err(
            Error::device(format!("the NVIDIA driver is one of CUDA {is}, older than {needed}")).remedy(UPDATE_DRIVER)
        );
    }
    need(&SYMBOLS)?;
    // SAFETY: may be called any number of times.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_ERROR_NO_DEVICE => Err(no_gpu()),
        code => check(code, &"initialising the NVIDIA driver").map(|()| version),
    }
}

const UPDATE_DRIVER: &str = "update the NVIDIA driver";

fn no_gpu() -> Error {
    Error::device("the NVIDIA driver finds no GPU").remedy(
        "see what nvidia-smi says, CUDA_VISIBLE_DEVICES and, in a container, whether it was started with --gpus all",
    )
}

/// Refuses a driver that lacks one of these functions.
fn need(symbols: &[&str]) -> Result<()> {
    for name in symbols {
        // SAFETY: the symbol is looked up and not called.
        if unsafe { sys::culib().get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_err() {
            return Err(Error::device(format!("the NVIDIA driver has no function {name}")).remedy(UPDATE_DRIVER));
        }
    }
    Ok(())
}

/// `13.0` of 13000.
pub fn cuda_version(version: u32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// How many GPUs there are, none being an error.
pub fn count() -> Result<usize> {
    let mut count: c_int = 0;
    // SAFETY: writes the integer it is given.
    check(unsafe { sys::cuDeviceGetCount(&raw mut count) }, &"counting GPUs")?;
    usize::try_from(count).ok().filter(|&n| n > 0).ok_or_else(no_gpu)
}

/// The GPU of this number and what it is. Refuses one that the kernels do not run on.
pub fn gpu(ordinal: usize, version: u32) -> Result<(CUdevice, Facts)> {
    if ordinal >= count()? {
        return Err(Error::device(format!("there is no GPU {ordinal}")).remedy("see what nvidia-smi lists"));
    }
    let mut device: CUdevice = 0;
    // SAFETY: writes the handle it is given.
    check(unsafe { sys::cuDeviceGet(&raw mut device, ordinal as c_int) }, &"finding the GPU")?;
    let attribute = |which: Attribute| -> Result<u32> {
        let mut value: c_int = 0;
        // SAFETY: writes the integer it is given; the device exists.
        check(unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) }, &"asking what the GPU is")?;
        Ok(value.unsigned_abs())
    };
    let mut name = [0u8; 256];
    // SAFETY: writes at most the bytes of `name`.
    let code = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as c_int - 1, device) };
    check(code, &"asking for the GPU's name")?;
    let name = CStr::from_bytes_until_nul(&name).unwrap_or_default().to_string_lossy().trim().to_string();
    let mut memory = 0usize;
    // SAFETY: writes the integer it is given.
    check(unsafe { sys::cuDeviceTotalMem_v2(&raw mut memory, device) }, &"asking for the GPU's memory")?;
    let capability = (
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    if capability < (8, 0) {
        let (major, minor) = capability;
        let cause = format!("{name} has compute capability {major}.{minor}, and the kernels need 8.0 or newer");
        return Err(Error::device(cause).remedy("use a GPU from Ampere on, or --device cpu"));
    }
    let facts = Facts {
        name,
        capability,
        warpgroups: Facts::has_warpgroups(capability),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        memory: memory as u64,
        software: format!("driver CUDA {}", cuda_version(version)),
    };
    Ok((device, facts))
}

/// The result of a driver function as ours; `what` says what was being done.
pub fn check(code: CUresult, what: &dyn Display) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(failure(code, what)) }
}

/// The error of a failed driver function.
#[cold]
fn failure(code: CUresult, what: &dyn Display) -> Error {
    let mut text = std::ptr::null();
    // SAFETY: points `text` to a string that is never freed, or leaves it null.
    let text = unsafe {
        let known = sys::cuGetErrorString(code, &raw mut text) == CUresult::CUDA_SUCCESS && !text.is_null();
        if known { CStr::from_ptr(text).to_string_lossy() } else { "unknown".into() }
    };
    // The enumeration's names are the driver's own.
    Error::device(format!("{what}: {code:?} ({text})")).remedy(remedy(code))
}

/// Whether the code tells of work queued earlier, of which any call may be the one that hears.
fn is_late(code: CUresult) -> bool {
    use CUresult as C;
    matches!(
        code,
        C::CUDA_ERROR_ILLEGAL_ADDRESS
            | C::CUDA_ERROR_LAUNCH_TIMEOUT
            | C::CUDA_ERROR_ASSERT
            | C::CUDA_ERROR_HARDWARE_STACK_ERROR
            | C::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | C::CUDA_ERROR_MISALIGNED_ADDRESS
            | C::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | C::CUDA_ERROR_INVALID_PC
            | C::CUDA_ERROR_LAUNCH_FAILED
    )
}

/// What to do about work that failed after it was queued.
pub const SYNCHRONISE: &str =
    "this may be of work queued before: run again with RETROMAE_SYNC=1, which names the kernel at fault, and report it";

fn remedy(code: CUresult) -> &'static str {
    use CUresult as C;
    match code {
        _ if is_late(code) => SYNCHRONISE,
        C::CUDA_ERROR_OUT_OF_MEMORY => {
            "close other programs on the GPU (nvidia-smi lists them), or use a smaller batch"
        }
        C::CUDA_ERROR_DEVICE_UNAVAILABLE => "another process has the GPU to itself; nvidia-smi lists it",
        C::CUDA_ERROR_STUB_LIBRARY => "take the CUDA toolkit's folder of stubs off LD_LIBRARY_PATH",
        C::CUDA_ERROR_SYSTEM_NOT_READY => "start the system's services for the GPU (nvidia-fabricmanager)",
        C::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH | C::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            "driver library and kernel module differ: restart the machine, or take CUDA's compat folder off LD_LIBRARY_PATH"
        }
        C::CUDA_ERROR_UNKNOWN | C::CUDA_ERROR_OPERATING_SYSTEM | C::CUDA_ERROR_NOT_INITIALIZED => {
            "see whether nvidia-smi works; if not, restart the machine or its driver"
        }
        C::CUDA_ERROR_ECC_UNCORRECTABLE | C::CUDA_ERROR_NVLINK_UNCORRECTABLE | C::CUDA_ERROR_CONTAINED => {
            "the GPU has a fault; see nvidia-smi -q, and reset or replace it"
        }
        C::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
        | C::CUDA_ERROR_JIT_COMPILER_NOT_FOUND
        | C::CUDA_ERROR_NO_BINARY_FOR_GPU => UPDATE_DRIVER,
        C::CUDA_ERROR_JIT_COMPILATION_DISABLED => "unset CUDA_DISABLE_PTX_JIT",
        _ => "report this with the command",
    }
}

/// Runs `f`, which may meet a panic of cudarc's: that becomes an error, and nothing is printed.
pub fn guarded<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let done = panic::catch_unwind(AssertUnwindSafe(f));
    panic::set_hook(hook);
    done.unwrap_or_else(|payload| {
        let said = payload.downcast_ref::<String>().map(String::as_str);
        let said = said.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("unknown cause");
        Err(Error::device(format!("cannot use the NVIDIA driver: {said}")).remedy(UPDATE_DRIVER))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_driver_function_in_use_is_looked_for() {
        let sources = [
            include_str!("driver.rs"),
            include_str!("queue.rs"),
            include_str!("modules.rs"),
            include_str!("staging.rs"),
            include_str!("products.rs"),
            include_str!("tuning.rs"),
            include_str!("../cuda.rs"),
        ];
        let mut used: Vec<&str> = sources
            .iter()
            .flat_map(|text| text.split("sys::cu").skip(1))
            .filter_map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next())
            .filter(|name| name.starts_with(char::is_uppercase))
            .collect();
        used.sort_unstable();
        used.dedup();
        let listed = |name: &str| FIRST_SYMBOLS.iter().chain(&SYMBOLS).any(|s| s.strip_prefix("cu") == Some(name));
        assert!(used.len() > 30, "{used:?}");
        let forgotten: Vec<&&str> = used.iter().filter(|name| !listed(name)).collect();
        assert!(forgotten.is_empty(), "not in SYMBOLS: {forgotten:?}");
    }

    #[test]
    fn a_panic_becomes_one_line() {
        let e = guarded::<()>(|| panic!("Missing symbol {}", "cuX")).unwrap_err();
        assert_eq!(e.to_string(), "cannot use the NVIDIA driver: Missing symbol cuX; update the NVIDIA driver");
    }
}
