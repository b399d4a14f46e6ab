//! The one queue of work: a context made current on whichever thread calls, a stream, and events on it; and a branch of the queue, a
//! second stream for work that runs beside it.

use std::any::Any;
use std::ffi::c_int;
use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdeviceptr, CUevent, CUgraphExec, CUresult, CUstream};

use super::driver::check;
use crate::device::gpu::{Captured, Event};
use crate::error::{Error, Result};

/// A handle of the driver's or of cuBLASLt's.
#[derive(Clone, Copy)]
pub struct Handle<T>(pub T);

// SAFETY: the driver and cuBLASLt let any thread use any handle of a context that is current on it.
unsafe impl<T> Send for Handle<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Handle<T> {}

/// `cuEventElapsedTime`. cudarc's bindings of CUDA 13 know only the `_v2` of it, which drivers of CUDA 12 lack.
type ElapsedTime = unsafe extern "C" fn(*mut f32, CUevent, CUevent) -> CUresult;

/// Context and stream of one GPU, for as long as the process lives.
pub struct Queue {
    context: Handle<CUcontext>,
    stream: Handle<CUstream>,
    elapsed_time: ElapsedTime,
    is_recording: AtomicBool,
    /// Whether all work is waited for when it is queued (`RETROMAE_SYNC=1`).
    pub synchronous: bool,
}

impl Queue {
    /// The device's primary context, which libraries in the process share, and a stream of our own that does not wait for theirs.
    pub fn new(device: CUdevice) -> Result<Queue> {
        let (mut context, mut stream) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the driver is initialised and writes the handle. It is never released.
        check(unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) }, &"opening the GPU")?;
        // SAFETY: the context lives as long as the process.
        check(unsafe { sys::cuCtxSetCurrent(context) }, &"opening the GPU")?;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; writes the handle.
        check(unsafe { sys::cuStreamCreate(&raw mut stream, flags) }, &"opening the GPU's queue")?;
        // SAFETY: the signature is that of the driver's manual, and the library is never unloaded.
        let elapsed_time = unsafe { sys::culib().get::<ElapsedTime>(b"cuEventElapsedTime\0") };
        let elapsed_time = *elapsed_time.map_err(|e| Error::device(format!("the NVIDIA driver: {e}")))?;
        let synchronous = std::env::var_os("RETROMAE_SYNC").is_some_and(|v| !v.is_empty() && v != "0");
        Ok(Queue {
            context: Handle(context),
            stream: Handle(stream),
            elapsed_time,
            is_recording: AtomicBool::new(false),
            synchronous,
        })
    }

    /// The stream, with the context made current on this thread.
    pub fn enter(&self) -> Result<CUstream> {
        // SAFETY: the context lives as long as the process.
        check(unsafe { sys::cuCtxSetCurrent(self.context.0) }, &"switching to the GPU")?;
        Ok(self.stream.0)
    }

    /// Whether what is queued is recorded and not run.
    pub fn is_recording(&self) -> bool {
        self.is_recording.load(Ordering::Relaxed)
    }

    /// Waits for all work; `what` is what failed if that fails.
    pub fn wait(&self, what: &dyn Display) -> Result<()> {
        let stream = self.enter()?;
        // SAFETY: our stream.
        check(unsafe { sys::cuStreamSynchronize(stream) }, what)
    }

    /// Waits for `what`, just queued, if all work is waited for.
    pub fn queued(&self, what: &dyn Display) -> Result<()> {
        if !self.synchronous {
            return Ok(());
        }
        self.wait(what).map_err(|e| e.remedy("this is a defect of the engine; report it with the command"))
    }

    /// Queues setting bytes.
    ///
    /// # Safety
    /// The bytes from `at` on lie inside one allocation.
    pub unsafe fn fill(&self, at: CUdeviceptr, bytes: usize, byte: u8) -> Result<()> {
        let stream = self.enter()?;
        // SAFETY: passed on.
        check(unsafe { sys::cuMemsetD8Async(at, byte, bytes, stream) }, &"filling memory")?;
        self.queued(&"filling memory")
    }

    /// An event that has happened, until it is recorded.
    pub fn event(self: &Arc<Self>) -> Result<Moment> {
        self.enter()?;
        let mut event = std::ptr::null_mut();
        // SAFETY: writes the handle.
        check(unsafe { sys::cuEventCreate(&raw mut event, 0) }, &"making an event")?;
        Ok(Moment { event: Handle(event), queue: self.clone() })
    }
}

/// A second stream that forks from the queue and joins it again, as often as one likes.
pub struct Branch {
    stream: Handle<CUstream>,
    /// Recorded on the queue where the branch forks from it, and on the branch where it joins it.
    forked: Moment,
    joined: Moment,
    queue: Arc<Queue>,
}

/// The driver takes the highest priority it has for any that is higher. Work of a branch is short and awaited by other machines, and
/// so comes first where a multiprocessor is free.
const FIRST: c_int = -5;

impl Branch {
    /// Nothing on it yet.
    pub fn new(queue: &Arc<Queue>) -> Result<Branch> {
        queue.enter()?;
        let (mut stream, flags) = (std::ptr::null_mut(), sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32);
        // SAFETY: the context is current; writes the handle. It lives as long as the process.
        let code = unsafe { sys::cuStreamCreateWithPriority(&raw mut stream, flags, FIRST) };
        check(code, &"opening a second queue of the GPU")?;
        Ok(Branch { stream: Handle(stream), forked: queue.event()?, joined: queue.event()?, queue: queue.clone() })
    }

    /// The stream, behind all that was queued so far.
    pub fn fork(&self) -> Result<CUstream> {
        self.forked.record()?;
        self.forked.before(self.stream.0)?;
        Ok(self.stream.0)
    }

    /// Puts what is queued from now on behind all that is on the branch.
    pub fn join(&self) -> Result<()> {
        let stream = self.queue.enter()?;
        self.joined.record_on(self.stream.0)?;
        self.joined.before(stream)
    }

    /// Waits for `what`, just put on the branch, if all work is waited for.
    pub fn queued(&self, what: &dyn Display) -> Result<()> {
        if self.queue.synchronous {
            self.queue.enter()?;
            // SAFETY: our stream.
            check(unsafe { sys::cuStreamSynchronize(self.stream.0) }, what)?;
        }
        Ok(())
    }
}

/// Zeroed device memory for a moment.
pub struct Room {
    address: CUdeviceptr,
    queue: Arc<Queue>,
}

impl Room {
    /// Takes `bytes`, if there are so many free.
    pub fn take(queue: &Arc<Queue>, bytes: usize) -> Result<Option<Room>> {
        queue.enter()?;
        let mut address = 0;
        // SAFETY: the context is current; writes the address.
        let code = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) };
        if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Ok(None);
        }
        check(code, &format_args!("allocating {bytes} bytes"))?;
        let room = Room { address, queue: queue.clone() };
        // SAFETY: just allocated.
        unsafe { queue.fill(address, bytes, 0) }?;
        Ok(Some(room))
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // Work on it may still be queued. If the queue has failed nothing runs any more.
        let _ = self.queue.wait(&"giving memory back");
        // SAFETY: taken by `take`, given back once.
        let _ = unsafe { sys::cuMemFree_v2(self.address) };
    }
}

/// An event on the queue.
pub struct Moment {
    event: Handle<CUevent>,
    queue: Arc<Queue>,
}

impl Moment {
    /// Marks this point of the queue.
    pub fn record(&self) -> Result<()> {
        let stream = self.queue.enter()?;
        self.record_on(stream)
    }

    /// Marks this point of a stream.
    fn record_on(&self, stream: CUstream) -> Result<()> {
        // SAFETY: both handles are alive and of one context.
        check(unsafe { sys::cuEventRecord(self.event.0, stream) }, &"marking a point of the queue")
    }

    /// Puts what is queued on `stream` from now on behind the marked point.
    fn before(&self, stream: CUstream) -> Result<()> {
        // SAFETY: both handles are alive and of one context; 0 is the only flag there is.
        check(unsafe { sys::cuStreamWaitEvent(stream, self.event.0, 0) }, &"ordering two queues")
    }

    /// Waits until the queue has come to the marked point; `what` is what failed if that fails.
    pub fn wait(&self, what: &dyn Display) -> Result<()> {
        self.queue.enter()?;
        // SAFETY: the event is alive.
        check(unsafe { sys::cuEventSynchronize(self.event.0) }, what)
    }

    /// Time from `earlier`. Waits for this one.
    pub fn microseconds_since(&self, earlier: &Moment) -> Result<f64> {
        self.wait(&"measuring time")?;
        let mut milliseconds = 0f32;
        // SAFETY: both events are alive and have happened; writes the number.
        let code = unsafe { (self.queue.elapsed_time)(&raw mut milliseconds, earlier.event.0, self.event.0) };
        check(code, &"measuring time")?;
        Ok(f64::from(milliseconds) * 1e3)
    }
}

impl Event for Moment {
    fn since(&self, earlier: &dyn Event) -> Result<f64> {
        let Some(earlier) = earlier.as_any().downcast_ref::<Moment>() else {
            return Err(Error::device("the time between events of two devices").remedy("report this as a defect"));
        };
        self.microseconds_since(earlier).map(|us| us / 1e3)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        // A failure here is one of the context, which the next call tells.
        if self.queue.enter().is_ok() {
            // SAFETY: destroyed once; the driver keeps what queued work still needs.
            let _ = unsafe { sys::cuEventDestroy_v2(self.event.0) };
        }
    }
}

/// Starts to record what is queued.
pub fn begin_capture(queue: &Queue) -> Result<()> {
    // Relaxed: a kernel or an algorithm of cuBLASLt that is used for the first time loads its code, which the stricter modes forbid
    // while any stream records. What they guard against, work that slips past the record, the backend refuses itself.
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    let stream = queue.enter()?;
    // SAFETY: our stream.
    check(unsafe { sys::cuStreamBeginCapture_v2(stream, mode) }, &"beginning a capture")?;
    queue.is_recording.store(true, Ordering::Relaxed);
    Ok(())
}

/// Ends recording, whatever happened meanwhile, and makes the record ready to run.
pub fn end_capture(queue: &Arc<Queue>) -> Result<Graph> {
    queue.is_recording.store(false, Ordering::Relaxed);
    let stream = queue.enter()?;
    let (mut graph, mut ready) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: our stream; writes the handle, null when the capture has failed.
    let ended = check(unsafe { sys::cuStreamEndCapture(stream, &raw mut graph) }, &"ending a capture");
    if graph.is_null() {
        let nothing = || Error::device("a capture recorded nothing").remedy("report this as a defect");
        return Err(ended.err().unwrap_or_else(nothing));
    }
    let made = ended.and_then(|()| {
        // SAFETY: the graph is alive; writes the handle.
        let code = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut ready, graph, 0) };
        check(code, &"preparing a captured step")
    });
    // SAFETY: destroyed once; what was made of it stands alone.
    let _ = unsafe { sys::cuGraphDestroy(graph) };
    made.map(|()| Graph { ready: Handle(ready), queue: queue.clone() })
}

/// A record that is ready to run.
pub struct Graph {
    ready: Handle<CUgraphExec>,
    queue: Arc<Queue>,
}

impl Captured for Graph {
    fn replay(&self) -> Result<()> {
        let stream = self.queue.enter()?;
        // SAFETY: the graph is alive, and the memory it works on is up to who captured it.
        check(unsafe { sys::cuGraphLaunch(self.ready.0, stream) }, &"replaying a captured step")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.queue.enter().is_ok() {
            // SAFETY: destroyed once; the driver lets a run in progress finish.
            let _ = unsafe { sys::cuGraphExecDestroy(self.ready.0) };
        }
    }
}
