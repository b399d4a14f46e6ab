//! NCCL: GPUs of several processes that work together, on the queue of each, or on a branch of it: sums of gradients run beside the
//! backward pass that still computes others.
//!
//! Never inside a capture: whether an operation of NCCL is captured must be the same at all ranks (its manual, "Using NCCL with CUDA
//! Graphs"), and a rank replays a record where another, with a batch of other sizes, still queues piece by piece.
//!
//! Its functions are looked up here and not by cudarc, which asks for names of the library that no installation has (`libnccl.so.13`; it
//! is `libnccl.so.2` everywhere) and reads results as an enumeration, which newer versions extend.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, OnceLock};

use libloading::Library;

use super::library;
use super::queue::{Branch, Handle, Queue};
use crate::device::DType;
use crate::device::ring::{Side, Together};
use crate::error::{Error, Result};

/// Where the loader finds it.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// `ncclSuccess` and `ncclSum`.
const SUCCESS: c_int = 0;
const SUM: c_int = 0;
const PIP: &str =
    "pip install nvidia-nccl-cu13 (nvidia-nccl-cu12 for a driver of CUDA 12) in the active Python environment";

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId {
    internal: [c_char; 128],
}

type Comm = *mut c_void;
/// From, to, elements, type, operation or root, ranks, stream. `ncclAllGather` lacks the fifth.
type Reduce = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
type Gather = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, *mut c_void) -> c_int;

/// The functions in use.
struct Nccl {
    unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    init: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    all_reduce: Reduce,
    all_gather: Gather,
    reduce_scatter: Reduce,
    broadcast: Reduce,
    _library: Library,
}

/// The library, loaded once.
fn nccl() -> Result<&'static Nccl> {
    static LOADED: OnceLock<Result<Nccl>> = OnceLock::new();
    LOADED.get_or_init(load).as_ref().map_err(Clone::clone)
}

fn load() -> Result<Nccl> {
    let in_folders = library::folders(|name| std::env::var_os(name)).into_iter().map(|folder| folder.join(NAMES[0]));
    let names = NAMES.iter().map(std::path::PathBuf::from).chain(in_folders.filter(|path| path.is_file()));
    let mut told = Error::device("NCCL (libnccl.so.2) is not there").remedy(PIP);
    for name in names {
        // SAFETY: NVIDIA's initialisers may run at any time.
        match unsafe { Library::new(&name) } {
            Ok(library) => return functions(library),
            Err(e) if name.is_absolute() => told = Error::device(format!("NCCL cannot be loaded: {e}")).remedy(PIP),
            Err(_) => {}
        }
    }
    Err(told)
}

fn functions(library: Library) -> Result<Nccl> {
    macro_rules! find {
        ($name:literal) => {
            // SAFETY: the signature is that of NCCL's manual.
            match unsafe { library.get(concat!($name, "\0").as_bytes()) } {
                Ok(function) => *function,
                Err(_) => {
                    return Err(Error::device(concat!("the NCCL that was found has no function ", $name)).remedy(PIP));
                }
            }
        };
    }
    Ok(Nccl {
        unique_id: find!("ncclGetUniqueId"),
        init: find!("ncclCommInitRank"),
        error: find!("ncclGetErrorString"),
        all_reduce: find!("ncclAllReduce"),
        all_gather: find!("ncclAllGather"),
        reduce_scatter: find!("ncclReduceScatter"),
        broadcast: find!("ncclBroadcast"),
        _library: library,
    })
}

impl Nccl {
    fn check(&self, code: c_int, what: &str) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: gives null or a string that is never freed.
        let text = unsafe {
            let text = (self.error)(code);
            if text.is_null() { c"unknown" } else { CStr::from_ptr(text) }
        };
        Err(Error::device(format!("{what}: NCCL error {code} ({})", text.to_string_lossy()))
            .remedy("run again with NCCL_DEBUG=WARN, which says more"))
    }
}

/// Whether NCCL is there.
pub fn is_possible() -> Result<()> {
    nccl().map(drop)
}

/// What all ranks need to find each other: rank 0 asks for it and gives it to the others.
pub fn id() -> Result<Vec<u8>> {
    let nccl = nccl()?;
    let mut id = UniqueId { internal: [0; 128] };
    // SAFETY: writes the 128 bytes.
    nccl.check(unsafe { (nccl.unique_id)(&raw mut id) }, "making an id for the ranks")?;
    Ok(id.internal.iter().map(|c| c.to_ne_bytes()[0]).collect())
}

/// The GPUs of all ranks, from this one's side, for as long as the process lives: at its end NCCL's threads end with it.
pub struct Ranks {
    nccl: &'static Nccl,
    comm: Handle<Comm>,
    queue: Arc<Queue>,
    branch: Branch,
    rank: usize,
    size: usize,
}

impl Ranks {
    /// Connects; returns when every rank has come.
    pub fn new(queue: &Arc<Queue>, id: &[u8], rank: usize, size: usize) -> Result<Ranks> {
        let nccl = nccl()?;
        let wrong = || Error::device("a wrong id or number of a rank").remedy("report this as a defect");
        let bytes: [u8; 128] = id.try_into().map_err(|_| wrong())?;
        let (number, count) =
            (c_int::try_from(rank).map_err(|_| wrong())?, c_int::try_from(size).map_err(|_| wrong())?);
        let id = UniqueId { internal: bytes.map(|b| c_char::from_ne_bytes([b])) };
        let mut comm: Comm = std::ptr::null_mut();
        let branch = Branch::new(queue)?;
        queue.enter()?;
        // SAFETY: the context of the GPU is current; writes the handle.
        nccl.check(unsafe { (nccl.init)(&raw mut comm, count, id, number) }, "connecting the GPUs of all ranks")?;
        Ok(Ranks { nccl, comm: Handle(comm), queue: queue.clone(), branch, rank, size })
    }
}

/// NCCL's number of a type.
fn kind(dtype: DType) -> Result<c_int> {
    match dtype {
        DType::U32 => Ok(3),
        DType::U64 => Ok(5),
        DType::F16 => Ok(6),
        DType::F32 => Ok(7),
        DType::F64 => Ok(8),
        DType::BF16 => Ok(9),
        DType::U16 => Err(Error::device("NCCL knows no u16").remedy("report this as a defect")),
    }
}

impl Side for Ranks {
    // SAFETY: what callers owe is written at the trait.
    unsafe fn run(&self, what: Together, at: u64, elements: usize, dtype: DType) -> Result<()> {
        let (stream, kind, comm) = (self.queue.enter()?.cast(), kind(dtype)?, self.comm.0);
        let part = elements / self.size;
        let (all, own) = (at as *mut c_void, (at + (self.rank * part * dtype.size()) as u64) as *mut c_void);
        let n = self.nccl;
        // SAFETY: the stream and the ranks are alive, the range is the caller's promise, and all of these work in place.
        let code = unsafe {
            match what {
                Together::AllReduce => (n.all_reduce)(all, all, elements, kind, SUM, comm, stream),
                Together::AllGather => (n.all_gather)(own, all, part, kind, comm, stream),
                Together::ReduceScatter => (n.reduce_scatter)(all, own, part, kind, SUM, comm, stream),
                Together::Broadcast => (n.broadcast)(all, all, elements, kind, 0, comm, stream),
            }
        };
        let name = what.name();
        n.check(code, name)?;
        self.queue.queued(&name)
    }

    // SAFETY: what callers owe is written at the trait.
    unsafe fn begin_sum(&self, at: u64, elements: usize, dtype: DType) -> Result<()> {
        let (kind, name, all) = (kind(dtype)?, Together::AllReduce.name(), at as *mut c_void);
        if self.queue.is_recording() {
            return Err(Error::device(format!("{name} while a capture is open")).remedy("report this as a defect"));
        }
        let stream = self.branch.fork()?.cast();
        // SAFETY: the stream and the ranks are alive, and the range is the caller's promise.
        let code = unsafe { (self.nccl.all_reduce)(all, all, elements, kind, SUM, self.comm.0, stream) };
        self.nccl.check(code, name)?;
        self.branch.queued(&name)
    }

    fn finish(&self) -> Result<()> {
        self.branch.join()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_those_of_the_manual() {
        let known = [DType::U32, DType::U64, DType::F16, DType::F32, DType::F64, DType::BF16];
        assert_eq!(known.map(|dtype| kind(dtype).unwrap_or(-1)), [3, 5, 6, 7, 8, 9]);
        assert!(kind(DType::U16).is_err());
    }
}
