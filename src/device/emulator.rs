//! The emulated GPU: the interface of the kernel emulator (`kernels/emulator/api.h`).
//!
//! Device memory is host memory between guard pages, and a launch has run when it returns. The emulator is linked in; naming a library
//! in `RETROMAE_EMULATOR_LIBRARY` puts an instrumented build of it in its place, so that every test can run under the checker and the
//! sanitizers.

use super::launch::{EmulatedKernel, Kernel, Launcher, Shape, TensorLayout, TensorMap};
use crate::error::{Error, Result};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Names an emulator library to use instead of the one that is linked in.
pub const LIBRARY_VARIABLE: &str = "RETROMAE_EMULATOR_LIBRARY";

/// When asynchronous copies and products are performed. All are legal; each finds bugs that the others miss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Asynchronous {
    /// As late as the program allows.
    Late = 0,
    /// When they are issued.
    AtIssue = 1,
    /// Either, at random under the seed.
    Random = 2,
}

/// How launches run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Order in which threads run: 0 round robin, anything else a random schedule that this number names.
    pub seed: u64,
    /// When asynchronous work is performed.
    pub asynchronous: Asynchronous,
    /// Operating system threads that run blocks. Results do not depend on it.
    pub threads: u32,
    /// A launch that takes longer, in milliseconds, fails.
    pub watchdog_ms: u32,
    /// Bytes of device memory.
    pub memory: usize,
    /// Shared memory that a block may ask for, in bytes.
    pub shared_bytes: u32,
}

/// [`Options`] as `api.h` declares them.
#[repr(C)]
struct RawOptions {
    seed: u64,
    asynchronous: Asynchronous,
    threads: u32,
    watchdog_ms: u32,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            seed: 0,
            asynchronous: Asynchronous::Late,
            threads: 2,
            watchdog_ms: 120_000,
            memory: 8 << 30,
            shared_bytes: 227 << 10,
        }
    }
}

#[repr(C)]
struct RawLaunch {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    param_count: u32,
    param_sizes: *const u32,
    params: *const *const c_void,
}

#[repr(C)]
struct RawTensorMap2D {
    base: u64,
    width: u64,
    height: u64,
    row_bytes: u64,
    box_width: u32,
    box_height: u32,
    element_bytes: u32,
    swizzle_128b: u32,
}

macro_rules! api {
    ($($name:ident: fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// The emulator's functions, linked in or from a library.
        #[derive(Clone, Copy)]
        struct Api { $($name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)* }

        mod linked {
            use super::*;
            unsafe extern "C" { $(pub fn $name($(_: $argument),*) $(-> $result)?;)* }
        }

        impl Api {
            const LINKED: Api = Api { $($name: linked::$name,)* };

            /// # Safety
            /// `find` must return the addresses of the functions of `api.h`.
            unsafe fn load(mut find: impl FnMut(&str) -> Result<*mut c_void>) -> Result<Api> {
                // SAFETY: the caller vouches for the addresses, and the signatures are those of api.h.
                Ok(unsafe { Api { $($name: std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) $(-> $result)?>(
                    find(stringify!($name))?),)* } })
            }
        }
    };
}

api! {
    rm_emu_launch: fn(*const EmulatedKernel, *const RawLaunch, *const RawOptions, *mut c_char, usize) -> c_int;
    rm_emu_alloc: fn(usize) -> *mut c_void;
    rm_emu_free: fn(*mut c_void);
    rm_emu_write: fn(*mut c_void, *const c_void, usize);
    rm_emu_read: fn(*mut c_void, *const c_void, usize);
    rm_emu_fill: fn(*mut c_void, c_int, usize);
    rm_emu_tensor_map_2d: fn(*mut TensorMap, *const RawTensorMap2D) -> c_int;
    rm_emu_variant: fn() -> *const c_char;
    rm_emu_ldmatrix_stats: fn(*mut u64, *mut u64);
}

/// A loaded emulator library. Never unloaded: its helper threads run for ever.
struct Library {
    handle: *mut c_void,
    path: PathBuf,
}

// SAFETY: a handle of dlopen may be used from any thread.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    fn open(path: &Path) -> Result<Library> {
        let refused = |cause: String| Error::device(cause).path(path).remedy("build it with the emulator's tests");
        let name = CString::new(path.as_os_str().as_encoded_bytes())
            .map_err(|_| refused("the path holds a zero byte".into()))?;
        // SAFETY: the name is a C string; the library's initialisers are ours.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            // SAFETY: dlerror returns null or a C string that stays valid until this thread's next call.
            let text = unsafe {
                let text = libc::dlerror();
                if text.is_null() { c"unknown cause" } else { CStr::from_ptr(text) }
            };
            return Err(refused(format!("cannot load the emulator: {}", text.to_string_lossy())));
        }
        Ok(Library { handle, path: path.to_path_buf() })
    }

    fn symbol(&self, name: &str) -> Result<*mut c_void> {
        let missing =
            || Error::device(format!("the emulator library has no {name}")).path(&self.path).remedy("build it again");
        let name = CString::new(name).map_err(|_| missing())?;
        // SAFETY: the handle is open and the name a C string.
        let address = unsafe { libc::dlsym(self.handle, name.as_ptr()) };
        if address.is_null() { Err(missing()) } else { Ok(address) }
    }
}

/// The emulated GPU.
#[derive(Clone)]
pub struct Emulator {
    api: Api,
    library: Option<Arc<Library>>,
    options: Options,
}

impl Emulator {
    /// The emulator that is linked in, or the library that `RETROMAE_EMULATOR_LIBRARY` names.
    pub fn new(options: Options) -> Result<Emulator> {
        match std::env::var_os(LIBRARY_VARIABLE) {
            Some(path) => Self::from_library(Path::new(&path), options),
            None => Ok(Emulator { api: Api::LINKED, library: None, options }),
        }
    }

    /// The emulator in the shared library at `path`.
    pub fn from_library(path: &Path, options: Options) -> Result<Emulator> {
        let library = Library::open(path)?;
        // SAFETY: libraries that export these names are built from the same api.h by the emulator's tests.
        let api = unsafe { Api::load(|name| library.symbol(name)) }?;
        Ok(Emulator { api, library: Some(Arc::new(library)), options })
    }

    /// The same device with other options.
    pub fn with(&self, options: Options) -> Emulator {
        Emulator { options, ..self.clone() }
    }

    /// The options of launches.
    pub fn options(&self) -> Options {
        self.options
    }

    /// Which build it is: `plain`, `check` or `asan`.
    pub fn variant(&self) -> &'static str {
        // SAFETY: returns a string literal of a library that is never unloaded.
        unsafe { CStr::from_ptr((self.api.rm_emu_variant)()) }.to_str().unwrap_or("unknown")
    }

    /// `bytes` of device memory, filled with 0xFF (NaN as f32 and bf16).
    pub fn alloc(&self, bytes: usize) -> Result<Memory> {
        let start = self.alloc_at(bytes)? as *mut c_void;
        Ok(Memory { device: self.clone(), start, bytes })
    }

    /// As [`Self::alloc`], its address alone.
    pub(super) fn alloc_at(&self, bytes: usize) -> Result<u64> {
        // SAFETY: any size may be asked for.
        let start = unsafe { (self.api.rm_emu_alloc)(bytes) };
        if start.is_null() {
            return Err(Error::device(format!("out of memory: the emulator cannot map {bytes} bytes"))
                .remedy("use a smaller batch or model"));
        }
        Ok(start as u64)
    }

    /// # Safety
    /// `address` came from [`Self::alloc_at`] and is given back once.
    pub(super) unsafe fn free_at(&self, address: u64) {
        // SAFETY: passed on.
        unsafe { (self.api.rm_emu_free)(address as *mut c_void) };
    }

    /// # Safety
    /// The bytes from `address` on lie inside one allocation.
    pub(super) unsafe fn write_at(&self, address: u64, from: &[u8]) {
        // SAFETY: passed on; a host slice cannot overlap device memory.
        unsafe { (self.api.rm_emu_write)(address as *mut c_void, from.as_ptr().cast(), from.len()) };
    }

    /// # Safety
    /// The bytes from `address` on lie inside one allocation.
    pub(super) unsafe fn read_at(&self, address: u64, to: &mut [u8]) {
        // SAFETY: as in `write_at`.
        unsafe { (self.api.rm_emu_read)(to.as_mut_ptr().cast(), address as *const c_void, to.len()) };
    }

    /// # Safety
    /// The bytes from `address` on lie inside one allocation.
    pub(super) unsafe fn fill_at(&self, address: u64, byte: u8, bytes: usize) {
        // SAFETY: passed on.
        unsafe { (self.api.rm_emu_fill)(address as *mut c_void, c_int::from(byte), bytes) };
    }

    /// Tells the checker that the host has written these bytes.
    ///
    /// # Safety
    /// The bytes from `address` on lie inside one allocation.
    pub(super) unsafe fn written(&self, address: u64, bytes: usize) {
        // SAFETY: passed on: the bytes are copied over themselves.
        unsafe { (self.api.rm_emu_write)(address as *mut c_void, address as *const c_void, bytes) };
    }

    /// Encodes a tensor map, refusing what the driver would refuse.
    pub fn tensor_map(&self, layout: &TensorLayout) -> Result<TensorMap> {
        let mut map = TensorMap::default();
        let raw = RawTensorMap2D {
            base: layout.base,
            width: layout.width,
            height: layout.height,
            row_bytes: layout.row_bytes,
            box_width: layout.box_width,
            box_height: layout.box_height,
            element_bytes: layout.element_bytes,
            swizzle_128b: u32::from(layout.swizzle_128b),
        };
        // SAFETY: both pointers are to live values of the types api.h declares.
        match unsafe { (self.api.rm_emu_tensor_map_2d)(&raw mut map, &raw const raw) } {
            0 => Ok(map),
            _ => Err(Error::device(format!("no tensor map for {layout:?}"))
                .remedy("align base and rows to 16 bytes and keep the box within 256 x 256")),
        }
    }

    /// `ldmatrix` phases since the last call, and how many of them a bank conflict would have replayed on a GPU.
    pub fn ldmatrix_stats(&self) -> (u64, u64) {
        let (mut phases, mut replays) = (0, 0);
        // SAFETY: both pointers are to live integers.
        unsafe { (self.api.rm_emu_ldmatrix_stats)(&raw mut phases, &raw mut replays) };
        (phases, replays)
    }

    fn find(&self, kernel: &Kernel) -> Result<*const EmulatedKernel> {
        match (&self.library, kernel.emulated) {
            (Some(library), _) => Ok(library.symbol(&format!("rm_emu_kernel_{}", kernel.name))?.cast_const().cast()),
            (None, Some(linked)) => Ok(linked),
            (None, None) => Err(Error::device(format!("kernel {} is not linked in", kernel.name))
                .remedy("load the library that holds it")),
        }
    }
}

impl Launcher for Emulator {
    // SAFETY: what callers owe is written at the trait.
    unsafe fn launch(&self, kernel: &Kernel, shape: Shape, params: &[*const c_void]) -> Result<()> {
        kernel.accepts(shape, params.len())?;
        let (wanted, limit) = (shape.shared_bytes, self.options.shared_bytes);
        if wanted > limit {
            let name = kernel.name;
            return Err(Error::device(format!(
                "kernel {name}: {wanted} bytes of dynamic shared memory, the limit is {limit}"
            ))
            .remedy("correct the launch"));
        }
        let launch = RawLaunch {
            grid: shape.grid,
            block: shape.block,
            shared_bytes: shape.shared_bytes,
            param_count: params.len() as u32,
            param_sizes: kernel.param_sizes.as_ptr(),
            params: params.as_ptr(),
        };
        let Options { seed, asynchronous, threads, watchdog_ms, .. } = self.options;
        let options = RawOptions { seed, asynchronous, threads, watchdog_ms };
        let mut error = [0u8; 2048];
        // SAFETY: `find` returns a kernel of this emulator, the launch points to live arrays of `param_count` elements, and the caller
        // vouches for the values behind `params`.
        let code = unsafe {
            (self.api.rm_emu_launch)(
                self.find(kernel)?,
                &raw const launch,
                &raw const options,
                error.as_mut_ptr().cast(),
                error.len(),
            )
        };
        if code == 0 {
            return Ok(());
        }
        let text = CStr::from_bytes_until_nul(&error).unwrap_or_default().to_string_lossy();
        Err(Error::device(text).remedy("this is a bug in the kernel or its launch; report it with the command"))
    }
}

/// Device memory, freed when dropped.
pub struct Memory {
    device: Emulator,
    start: *mut c_void,
    bytes: usize,
}

// SAFETY: the memory belongs to this value alone, and the emulator's functions may be called from any thread.
unsafe impl Send for Memory {}
// SAFETY: shared access only reads.
unsafe impl Sync for Memory {}

impl Memory {
    /// Its address on the device.
    pub fn address(&self) -> u64 {
        self.start as u64
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies `from` to the bytes at `offset`.
    pub fn write(&mut self, offset: usize, from: &[u8]) -> Result<()> {
        self.check(offset, from.len())?;
        // SAFETY: the range is inside this allocation, and a host slice cannot overlap it.
        unsafe { (self.device.api.rm_emu_write)(self.start.byte_add(offset), from.as_ptr().cast(), from.len()) };
        Ok(())
    }

    /// Copies the bytes at `offset` to `to`.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        self.check(offset, to.len())?;
        // SAFETY: as in `write`.
        unsafe { (self.device.api.rm_emu_read)(to.as_mut_ptr().cast(), self.start.byte_add(offset), to.len()) };
        Ok(())
    }

    /// Sets `count` bytes at `offset` to `byte`.
    pub fn fill(&mut self, offset: usize, count: usize, byte: u8) -> Result<()> {
        self.check(offset, count)?;
        // SAFETY: the range is inside this allocation.
        unsafe { (self.device.api.rm_emu_fill)(self.start.byte_add(offset), c_int::from(byte), count) };
        Ok(())
    }

    fn check(&self, offset: usize, count: usize) -> Result<()> {
        if offset.checked_add(count).is_some_and(|end| end <= self.bytes) {
            return Ok(());
        }
        Err(Error::device(format!("copy of {count} bytes at {offset} of a buffer of {} bytes", self.bytes))
            .remedy("correct the sizes"))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `start` came from the same emulator's alloc and is freed once.
        unsafe { (self.device.api.rm_emu_free)(self.start) };
    }
}
