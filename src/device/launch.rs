//! What a kernel launch is made of, whoever carries it out: kernels, grid shapes, device pointers, and the [`Launcher`] that the NVIDIA
//! driver and the emulator both are.

use crate::error::{Error, Result};
use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;

/// A .cu file, compiled once for each target; all `None` when the engine was built without nvcc.
#[derive(Debug)]
pub struct Module {
    /// The file's name without extension.
    pub name: &'static str,
    /// PTX for compute capability 8.0 and everything newer.
    pub ptx_sm80: Option<&'static str>,
    /// The same as machine code for 8.0 to 8.9.
    pub cubin_sm80: Option<&'static [u8]>,
    /// PTX for compute capability 9.0 with Hopper's own instructions.
    pub ptx_sm90a: Option<&'static str>,
    /// The same as machine code.
    pub cubin_sm90a: Option<&'static [u8]>,
}

impl Module {
    /// The machine code that a GPU of this compute capability runs, if it is here.
    pub fn machine_code(&self, capability: (u32, u32)) -> Option<&'static [u8]> {
        match capability {
            (8, _) => self.cubin_sm80,
            (9, 0) => self.cubin_sm90a,
            _ => None,
        }
    }

    /// The PTX from which a driver makes the machine code of any GPU.
    pub fn ptx(&self, capability: (u32, u32)) -> Option<&'static str> {
        if capability == (9, 0) { self.ptx_sm90a } else { self.ptx_sm80 }
    }
}

/// The emulator's description of a kernel, opaque here.
#[repr(C)]
pub struct EmulatedKernel {
    _opaque: [u8; 0],
}

impl fmt::Debug for EmulatedKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EmulatedKernel")
    }
}

/// An `extern "C" __global__` entry point.
#[derive(Debug)]
pub struct Kernel {
    /// Its name in the source.
    pub name: &'static str,
    /// The file it is in.
    pub module: &'static Module,
    /// Bytes of each parameter.
    pub param_sizes: &'static [u32],
    /// Most threads a block may have (`__launch_bounds__`).
    pub max_threads: u32,
    /// The kernel in the emulator that is linked in; `None` for kernels that exist only in a library.
    pub emulated: Option<&'static EmulatedKernel>,
}

impl Kernel {
    /// Refuses another number of parameters, and more threads than a block may have.
    pub(super) fn accepts(&self, shape: Shape, params: usize) -> Result<()> {
        let threads: u64 = shape.block.iter().map(|&n| u64::from(n)).product();
        if params == self.param_sizes.len() && threads <= u64::from(self.max_threads) {
            return Ok(());
        }
        Err(Error::device(format!(
            "kernel {}: {params} parameters and {threads} threads, it takes {} and at most {}",
            self.name,
            self.param_sizes.len(),
            self.max_threads
        ))
        .remedy("correct the launch"))
    }
}

/// Grid, block and dynamic shared memory of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads in x, y and z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
}

impl Shape {
    /// A one-dimensional launch without dynamic shared memory.
    pub fn linear(blocks: u32, threads: u32) -> Self {
        Shape { grid: [blocks, 1, 1], block: [threads, 1, 1], shared_bytes: 0 }
    }

    /// The same with `bytes` of dynamic shared memory.
    pub fn shared(self, bytes: u32) -> Self {
        Shape { shared_bytes: bytes, ..self }
    }
}

/// Where kernels run.
pub trait Launcher {
    /// Queues `kernel`. `params[i]` points to the value of parameter `i`; values are copied before this returns.
    ///
    /// # Safety
    /// `params` must hold one pointer for each parameter of the kernel, to a live value of the size and type it declares, and the
    /// device pointers among the values must be valid for what the kernel does with them.
    unsafe fn launch(&self, kernel: &Kernel, shape: Shape, params: &[*const c_void]) -> Result<()>;
}

macro_rules! pointer {
    ($name:ident, $doc:literal) => {
        #[doc = $doc]
        ///
        /// An address on the device, not one the host may follow. Whether it is still valid is its owner's business.
        #[repr(transparent)]
        pub struct $name<T> {
            address: u64,
            element: PhantomData<*const T>,
        }

        impl<T> $name<T> {
            /// The pointer with this address.
            pub fn new(address: u64) -> Self {
                $name { address, element: PhantomData }
            }

            /// The null pointer, for parameters that a kernel documents as optional.
            pub fn null() -> Self {
                Self::new(0)
            }

            /// The address.
            pub fn address(self) -> u64 {
                self.address
            }

            /// The pointer `elements` further on.
            pub fn offset(self, elements: usize) -> Self {
                Self::new(self.address + (elements * size_of::<T>()) as u64)
            }
        }

        impl<T> Clone for $name<T> {
            fn clone(&self) -> Self {
                *self
            }
        }

        impl<T> Copy for $name<T> {}

        impl<T> fmt::Debug for $name<T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.address)
            }
        }
    };
}

pointer!(ConstPtr, "A device pointer to elements that a kernel only reads.");
pointer!(MutPtr, "A device pointer to elements that a kernel may write.");

impl<T> From<MutPtr<T>> for ConstPtr<T> {
    fn from(p: MutPtr<T>) -> Self {
        ConstPtr::new(p.address)
    }
}

/// A tensor map for TMA (`CUtensorMap`), encoded by the device it is for.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
pub struct TensorMap {
    words: [u64; 16],
}

/// A two-dimensional tensor and the box that one TMA load brings.
#[derive(Clone, Copy, Debug)]
pub struct TensorLayout {
    /// Address of element (0, 0), a multiple of 16.
    pub base: u64,
    /// Elements in a row.
    pub width: u64,
    /// Rows.
    pub height: u64,
    /// Bytes from one row to the next, a multiple of 16.
    pub row_bytes: u64,
    /// Elements in a row of the box.
    pub box_width: u32,
    /// Rows of the box.
    pub box_height: u32,
    /// Bytes of an element: 1, 2 or 4.
    pub element_bytes: u32,
    /// Whether the box is stored with the 128-byte swizzle.
    pub swizzle_128b: bool,
}
