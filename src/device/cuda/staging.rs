//! Copies between host and device, through pages that the driver has locked.
//!
//! Uploads are packed one behind the other into the current of two pieces. When it is full an event is recorded behind its last copy,
//! and the other piece is used once its own event has happened. So the small inputs of a step are queued without waiting for the step
//! before, and a big upload fills one piece while the other is being copied. A step's results are copied before the inputs of the next
//! are queued and waited for after that.

use std::sync::Arc;

use cudarc::driver::sys::{self, CUdeviceptr};

use super::driver::check;
use super::queue::{Moment, Queue};
use crate::error::{Error, Result};

/// Bytes of a piece at first, and at most: an upload that is longer goes in parts.
const SMALLEST: usize = 16 << 20;
const LARGEST: usize = 64 << 20;

/// Where each upload begins in its piece, in bytes.
const ALIGNMENT: usize = 64;

/// Bytes of a download that is begun and waited for later: the results of a step.
const RESULTS: usize = 4096;

/// The pages for both directions.
pub struct Staging {
    queue: Arc<Queue>,
    up: [Piece; 2],
    /// The piece that uploads go to.
    current: usize,
    down: Piece,
    /// For a download that is begun, whose end the event of the piece marks.
    begun: Piece,
}

/// Host memory that the device reads and writes.
struct Piece {
    start: *mut u8,
    bytes: usize,
    used: usize,
    /// Recorded behind the copies out of a full piece.
    behind: Option<Moment>,
    is_pending: bool,
}

// SAFETY: the memory belongs to this value alone.
unsafe impl Send for Piece {}

impl Piece {
    const NONE: Piece = Piece { start: std::ptr::null_mut(), bytes: 0, used: 0, behind: None, is_pending: false };

    /// Marks the end of the copies out of this piece.
    fn close(&mut self, queue: &Arc<Queue>) -> Result<()> {
        if self.used > 0 {
            if self.behind.is_none() {
                self.behind = Some(queue.event()?);
            }
            if let Some(event) = &self.behind {
                event.record()?;
            }
            self.is_pending = true;
        }
        Ok(())
    }

    /// Makes the whole piece free again, with room for `bytes`; a new one has at least `least`.
    fn open(&mut self, bytes: usize, least: usize) -> Result<()> {
        if let Some(event) = self.behind.as_ref().filter(|_| self.is_pending) {
            event.wait(&"copying to the GPU")?;
        }
        (self.is_pending, self.used) = (false, 0);
        if self.bytes >= bytes {
            return Ok(());
        }
        self.release();
        let size = bytes.next_power_of_two().clamp(least, LARGEST);
        let mut start = std::ptr::null_mut();
        // SAFETY: writes the address.
        check(
            unsafe { sys::cuMemHostAlloc(&raw mut start, size, 0) },
            &format_args!("locking {} KiB of pages", size >> 10),
        )
        .map_err(|e| e.remedy("free host memory, or raise the limit of locked memory (ulimit -l)"))?;
        (self.start, self.bytes) = (start.cast(), size);
        Ok(())
    }

    fn release(&mut self) {
        if !self.start.is_null() {
            // SAFETY: allocated by `open`, and no copy is under way: its event has been waited for.
            let _ = unsafe { sys::cuMemFreeHost(self.start.cast()) };
            (self.start, self.bytes) = (std::ptr::null_mut(), 0);
        }
    }
}

impl Staging {
    pub fn new(queue: Arc<Queue>) -> Self {
        Staging { queue, up: [Piece::NONE; 2], current: 0, down: Piece::NONE, begun: Piece::NONE }
    }

    /// Queues a copy to the device.
    ///
    /// # Safety
    /// The bytes from `to` on belong to one allocation.
    pub unsafe fn upload(&mut self, to: CUdeviceptr, from: &[u8]) -> Result<()> {
        let stream = self.queue.enter()?;
        for (i, part) in from.chunks(LARGEST).enumerate() {
            let at = to + (i * LARGEST) as u64;
            let piece = self.room(part.len())?;
            // SAFETY: `room` found this many bytes behind those in use.
            let start = unsafe { piece.start.add(piece.used) };
            // SAFETY: as above, and a slice of the caller's cannot overlap the piece.
            unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), start, part.len()) };
            // SAFETY: the caller vouches for the target; the piece is left alone until its event has happened.
            let code = unsafe { sys::cuMemcpyHtoDAsync_v2(at, start.cast(), part.len(), stream) };
            check(code, &"copying to the GPU")?;
            piece.used = (piece.used + part.len()).next_multiple_of(ALIGNMENT).min(piece.bytes);
        }
        self.queue.queued(&"copying to the GPU")
    }

    /// A piece with room for `bytes`.
    fn room(&mut self, bytes: usize) -> Result<&mut Piece> {
        let piece = &mut self.up[self.current];
        if piece.bytes - piece.used < bytes {
            piece.close(&self.queue)?;
            self.current = 1 - self.current;
            self.up[self.current].open(bytes, SMALLEST)?;
        }
        Ok(&mut self.up[self.current])
    }

    /// Queues a copy from the device whose content [`Self::end_download`] gives.
    ///
    /// # Safety
    /// The bytes from `from` on belong to one allocation.
    pub unsafe fn begin_download(&mut self, from: CUdeviceptr, bytes: usize) -> Result<()> {
        if bytes > RESULTS {
            let cause = format!("a download of {bytes} bytes that is to be waited for later");
            return Err(Error::device(cause).remedy("report this as a defect"));
        }
        let stream = self.queue.enter()?;
        self.begun.open(RESULTS, RESULTS)?;
        // SAFETY: the caller vouches for the source, and `open` made room.
        let code = unsafe { sys::cuMemcpyDtoHAsync_v2(self.begun.start.cast(), from, bytes, stream) };
        check(code, &"copying from the GPU")?;
        self.begun.used = bytes;
        self.begun.close(&self.queue)
    }

    /// Waits for the copy that was begun.
    pub fn end_download(&mut self, to: &mut [u8]) -> Result<()> {
        let begun = self.begun.behind.as_ref().filter(|_| self.begun.is_pending && self.begun.used == to.len());
        let Some(event) = begun else {
            let cause = "the end of a download that was not begun";
            return Err(Error::device(cause).remedy("report this as a defect"));
        };
        event.wait(&"copying from the GPU")?;
        self.begun.is_pending = false;
        // SAFETY: the copy of this many bytes is done, and a slice of the caller's cannot overlap the piece.
        unsafe { std::ptr::copy_nonoverlapping(self.begun.start, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    /// Waits for all work and copies from the device.
    ///
    /// # Safety
    /// The bytes from `from` on belong to one allocation.
    pub unsafe fn download(&mut self, from: CUdeviceptr, to: &mut [u8]) -> Result<()> {
        let stream = self.queue.enter()?;
        self.down.open(to.len().min(LARGEST), SMALLEST)?;
        for (i, part) in to.chunks_mut(LARGEST).enumerate() {
            let at = from + (i * LARGEST) as u64;
            // SAFETY: the caller vouches for the source, and `open` made room for a part.
            let code = unsafe { sys::cuMemcpyDtoHAsync_v2(self.down.start.cast(), at, part.len(), stream) };
            check(code, &"copying from the GPU")?;
            self.queue.wait(&"copying from the GPU")?;
            // SAFETY: the copy is done, and a slice of the caller's cannot overlap the piece.
            unsafe { std::ptr::copy_nonoverlapping(self.down.start, part.as_mut_ptr(), part.len()) };
        }
        Ok(())
    }
}
