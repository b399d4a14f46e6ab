//! Kernels on the device: machine code, or PTX for the driver's compiler, loaded when a kernel of its file is first launched, and the
//! launch itself.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_int, c_void};
use std::fmt;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute as Attribute, CUjit_option, CUmodule, CUresult};

use super::driver::check;
use super::queue::{Handle, Queue};
use crate::device::gpu::Facts;
use crate::device::launch::{Kernel, Module, Shape};
use crate::error::{Error, Result};

/// Shared memory that a block gets unasked.
const UNASKED: u32 = 48 << 10;

/// The kernels loaded so far.
pub struct Modules {
    capability: (u32, u32),
    gpu: String,
    shared_bytes: u32,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    modules: HashMap<&'static str, Handle<CUmodule>>,
    functions: HashMap<&'static str, Function>,
}

struct Function {
    handle: Handle<CUfunction>,
    /// Shared memory that the kernel declares itself.
    fixed_bytes: u32,
    /// Dynamic shared memory that the driver has been told to allow.
    allowed_bytes: u32,
}

/// A launch in words, put together only when it is told.
struct Told<'a>(&'a Kernel, Shape);

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Told(kernel, Shape { grid: [gx, gy, gz], block: [bx, by, bz], shared_bytes }) = self;
        write!(
            f,
            "kernel {} (grid {gx} x {gy} x {gz}, block {bx} x {by} x {bz}, {shared_bytes} bytes of shared memory)",
            kernel.name
        )
    }
}

impl Modules {
    pub fn new(facts: &Facts) -> Self {
        Modules {
            capability: facts.capability,
            gpu: facts.name.clone(),
            shared_bytes: facts.shared_bytes,
            loaded: Mutex::default(),
        }
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// As for [`crate::device::launch::Launcher::launch`].
    pub unsafe fn launch(&self, queue: &Queue, kernel: &Kernel, shape: Shape, params: &[*const c_void]) -> Result<()> {
        kernel.accepts(shape, params.len())?;
        let stream = queue.enter()?;
        let function = self.prepare(kernel, shape.shared_bytes)?;
        let Shape { grid: [gx, gy, gz], block: [bx, by, bz], shared_bytes } = shape;
        let values = params.as_ptr().cast_mut().cast::<*mut c_void>();
        let none = std::ptr::null_mut();
        // SAFETY: one pointer for each parameter, as just checked, to values that the caller vouches for. The driver copies them before
        // it returns and writes none.
        let code = unsafe { sys::cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared_bytes, stream, values, none) };
        check(code, &Told(kernel, shape))?;
        queue.queued(&Told(kernel, shape))
    }

    /// The kernel, loaded and allowed `dynamic_bytes` of shared memory.
    fn prepare(&self, kernel: &Kernel, dynamic_bytes: u32) -> Result<CUfunction> {
        let Loaded { modules, functions } = &mut *self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let function = match functions.entry(kernel.name) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => {
                let module = match modules.entry(kernel.module.name) {
                    Entry::Occupied(known) => *known.get(),
                    Entry::Vacant(free) => *free.insert(self.load(kernel.module)?),
                };
                free.insert(find(module, kernel)?)
            }
        };
        let wanted = function.fixed_bytes.saturating_add(dynamic_bytes);
        if wanted > self.shared_bytes {
            return Err(Error::device(format!(
                "kernel {} wants {wanted} bytes of shared memory a block, {} has {}",
                kernel.name, self.gpu, self.shared_bytes
            ))
            .remedy("use a model with another head size, another --precision or another GPU"));
        }
        if wanted > UNASKED && dynamic_bytes > function.allowed_bytes {
            let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded and stays so.
            let code = unsafe { sys::cuFuncSetAttribute(function.handle.0, attribute, dynamic_bytes as c_int) };
            check(code, &format_args!("asking for {dynamic_bytes} bytes of shared memory for kernel {}", kernel.name))?;
            function.allowed_bytes = dynamic_bytes;
        }
        Ok(function.handle.0)
    }

    /// Loads a file's kernels. Never unloaded.
    fn load(&self, module: &Module) -> Result<Handle<CUmodule>> {
        // A driver that is older than the compiler may refuse machine code, and does not have to say why in one way.
        if let Some(loaded) = module.machine_code(self.capability).and_then(ready) {
            return Ok(loaded);
        }
        let text =
            module.ptx(self.capability).and_then(|text| CString::new(text).ok()).ok_or_else(super::no_kernels)?;
        let mut log = [0u8; 4096];
        // SAFETY: the text ends with a zero byte.
        let (code, handle) = unsafe { image(text.as_ptr().cast(), &mut log) };
        let what = format!("loading the kernels of {}.cu{}", module.name, shortened(&log));
        check(code, &what).map(|()| handle)
    }
}

/// Machine code, loaded; nothing if the driver refuses it.
fn ready(code: &[u8]) -> Option<Handle<CUmodule>> {
    // The driver reads it as a file that begins at an aligned address.
    let mut aligned = vec![0u64; code.len().div_ceil(8)];
    bytemuck::cast_slice_mut::<u64, u8>(&mut aligned)[..code.len()].copy_from_slice(code);
    // SAFETY: machine code tells its own length.
    let (status, handle) = unsafe { image(aligned.as_ptr().cast(), &mut [0; 1024]) };
    (status == CUresult::CUDA_SUCCESS).then_some(handle)
}

/// Hands machine code or PTX to the driver, whose compiler may write to `log`.
///
/// # Safety
/// `from` points to a whole cubin, or to PTX that ends with a zero byte.
unsafe fn image(from: *const c_void, log: &mut [u8]) -> (CUresult, Handle<CUmodule>) {
    let mut options = [CUjit_option::CU_JIT_ERROR_LOG_BUFFER, CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // Numbers are handed over as pointers.
    let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), std::ptr::without_provenance_mut(log.len() - 1)];
    let (count, mut handle) = (options.len() as u32, std::ptr::null_mut());
    // SAFETY: passed on; the compiler writes no more of its log than it was given room for.
    let code =
        unsafe { sys::cuModuleLoadDataEx(&raw mut handle, from, count, options.as_mut_ptr(), values.as_mut_ptr()) };
    (code, Handle(handle))
}

/// The beginning of the compiler's log, as ` (...)`.
fn shortened(log: &[u8]) -> String {
    let text = log.split(|&byte| byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    let line: Vec<&str> = text.split_whitespace().collect();
    let short: String = line.join(" ").chars().take(200).collect();
    if short.is_empty() { short } else { format!(" ({short})") }
}

fn find(module: Handle<CUmodule>, kernel: &Kernel) -> Result<Function> {
    let name = CString::new(kernel.name).unwrap_or_default();
    let (mut handle, mut fixed_bytes): (_, c_int) = (std::ptr::null_mut(), 0);
    // SAFETY: the module is loaded, the name ends with a zero byte; writes the handle.
    let code = unsafe { sys::cuModuleGetFunction(&raw mut handle, module.0, name.as_ptr()) };
    check(code, &format_args!("finding kernel {}", kernel.name))?;
    let attribute = Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
    // SAFETY: the function was just found; writes the number. Asking also makes a driver that loads kernels one by one load this one.
    let code = unsafe { sys::cuFuncGetAttribute(&raw mut fixed_bytes, attribute, handle) };
    check(code, &format_args!("loading kernel {}", kernel.name))?;
    Ok(Function { handle: Handle(handle), fixed_bytes: fixed_bytes.unsigned_abs(), allowed_bytes: 0 })
}
