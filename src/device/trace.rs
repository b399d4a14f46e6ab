//! What a step queues, piece by piece, under the names that the code around it gives: for the breakdown of a step by time, and for
//! tests that count launches.
//!
//! [`phase`] and [`stage`] name the work that follows while their guard lives. [`record`] listens to the thread that calls it. Where
//! nobody listens, a guard or a piece of work costs the reading of one flag of the thread; work that is replayed costs nothing at all.

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::ops::Range;
use std::time::Instant;

use super::gpu::Event;
use super::{Device, Product};
use crate::error::Result;

/// Whose work it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Label {
    /// Part of the step, as `forward`; empty outside of all.
    pub phase: &'static str,
    /// Part of the model and kind of work, as `attention, forward`; empty outside of all.
    pub stage: &'static str,
}

/// One piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Piece {
    /// The host, from the beginning until the first other piece.
    Host,
    /// A kernel.
    Kernel(&'static str),
    /// A matrix product with its sizes, those of the output first.
    Product(Product, [usize; 3]),
    /// Bytes that are set.
    Fill(usize),
    /// Bytes that go to the device.
    Upload(usize),
    /// Bytes that come from it, when all work has ended.
    Download(usize),
    /// Recorded work, all of it.
    Replay,
    /// An op of the CPU: its module and function.
    Op(&'static str, &'static str),
}

impl Piece {
    /// Whether the device does something for it that is more than a copy to or from the host.
    pub fn is_launch(&self) -> bool {
        !matches!(self, Piece::Host | Piece::Upload(_) | Piece::Download(_) | Piece::Replay)
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// What is queued as it is: recorded work is one piece.
    Queued,
    /// Every piece, without times. Work is queued as it comes and not replayed; so it is below, too.
    Pieces,
    /// Times of pieces with the same label that follow each other.
    StageTimes,
    /// The time of every piece.
    PieceTimes,
}

/// Pieces of a trace that were timed together.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Whose they are.
    pub label: Label,
    /// Which.
    pub pieces: Range<usize>,
    /// From the first of them to the first of the next segment.
    pub milliseconds: f64,
}

/// What was queued.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// In order.
    pub pieces: Vec<(Label, Piece)>,
    /// One after the other, without gaps; none where no times were asked for.
    pub segments: Vec<Segment>,
}

impl Trace {
    /// Milliseconds from the beginning to the end.
    pub fn milliseconds(&self) -> f64 {
        self.segments.iter().map(|segment| segment.milliseconds).sum()
    }
}

/// A point in time: of the GPU's queue, or of the host.
enum Mark {
    Gpu(Box<dyn Event>),
    Host(Instant),
}

impl Mark {
    fn now(device: Device) -> Result<Mark> {
        match device {
            Device::Gpu(gpu) => gpu.event().map(Mark::Gpu),
            Device::Cpu => Ok(Mark::Host(Instant::now())),
        }
    }

    fn since(&self, earlier: &Mark) -> Result<f64> {
        match (self, earlier) {
            (Mark::Gpu(this), Mark::Gpu(earlier)) => this.since(&**earlier),
            (Mark::Host(this), Mark::Host(earlier)) => Ok(this.duration_since(*earlier).as_secs_f64() * 1e3),
            // Marks of one listener are of its device.
            _ => Ok(f64::NAN),
        }
    }
}

struct Listener {
    device: Device,
    detail: Detail,
    pieces: Vec<(Label, Piece)>,
    /// First piece and beginning of each segment.
    marks: Vec<(usize, Result<Mark>)>,
}

impl Listener {
    fn hear(&mut self, label: Label, piece: Piece) {
        let begins = match self.detail {
            Detail::Queued | Detail::Pieces => false,
            Detail::StageTimes => self.pieces.last().is_none_or(|last| last.0 != label),
            Detail::PieceTimes => true,
        };
        if begins {
            self.marks.push((self.pieces.len(), Mark::now(self.device)));
        }
        self.pieces.push((label, piece));
    }

    fn end(mut self) -> Result<Trace> {
        if self.marks.is_empty() {
            return Ok(Trace { pieces: self.pieces, segments: Vec::new() });
        }
        self.marks.push((self.pieces.len(), Mark::now(self.device)));
        let marks = self.marks.into_iter().map(|(first, mark)| Ok((first, mark?))).collect::<Result<Vec<_>>>()?;
        let segment = |pair: &[(usize, Mark)]| {
            let (label, pieces) = (self.pieces[pair[0].0].0, pair[0].0..pair[1].0);
            Ok(Segment { label, pieces, milliseconds: pair[1].1.since(&pair[0].1)? })
        };
        let segments = marks.windows(2).map(segment).collect::<Result<_>>()?;
        Ok(Trace { pieces: self.pieces, segments })
    }
}

/// Whether somebody listens.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Off,
    Queued,
    Direct,
}

thread_local! {
    static STATE: Cell<State> = const { Cell::new(State::Off) };
    static LABEL: Cell<Label> = const { Cell::new(Label { phase: "", stage: "" }) };
    static LISTENER: RefCell<Option<Listener>> = const { RefCell::new(None) };
}

/// Names the work of this thread until it is dropped.
#[must_use = "the name is gone when this is dropped"]
pub struct Scope {
    /// The name before, where somebody listens.
    before: Option<Label>,
    /// Of one thread.
    thread: PhantomData<*const ()>,
}

impl Scope {
    fn new(change: impl FnOnce(Label) -> Label) -> Scope {
        let on = STATE.get() != State::Off;
        Scope { before: on.then(|| LABEL.replace(change(LABEL.get()))), thread: PhantomData }
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            LABEL.set(before);
        }
    }
}

/// Work that follows belongs to this part of the step.
pub fn phase(phase: &'static str) -> Scope {
    Scope::new(|label| Label { phase, ..label })
}

/// Work that follows belongs to this stage.
pub fn stage(stage: &'static str) -> Scope {
    Scope::new(|label| Label { stage, ..label })
}

/// A piece of work is about to be queued, or done.
pub(super) fn piece(piece: impl FnOnce() -> Piece) {
    if STATE.get() != State::Off {
        hear(piece());
    }
}

/// An op of the CPU is about to be done.
pub fn op(module: &'static str, function: &'static str) {
    piece(|| Piece::Op(module.rsplit("::").next().unwrap_or(module), function));
}

/// Whether work must be queued as it comes, since somebody asks for its pieces.
pub fn wants_pieces() -> bool {
    STATE.get() == State::Direct
}

#[cold]
fn hear(piece: Piece) {
    LISTENER.with_borrow_mut(|listener| {
        if let Some(listener) = listener {
            listener.hear(LABEL.get(), piece);
        }
    });
}

/// Ends listening also where the work panics.
struct Listening;

impl Listening {
    fn begin(device: Device, detail: Detail) -> Listening {
        LABEL.set(Label::default());
        LISTENER.set(Some(Listener { device, detail, pieces: Vec::new(), marks: Vec::new() }));
        STATE.set(if detail == Detail::Queued { State::Queued } else { State::Direct });
        hear(Piece::Host);
        Listening
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        STATE.set(State::Off);
        LISTENER.set(None);
    }
}

/// Does `work` and tells what it queued on `device`, by this thread. Times are between events on the GPU's queue, on the CPU those of a
/// clock.
///
/// # Errors
/// A failure of the work, or of the GPU.
pub fn record<R>(device: Device, detail: Detail, work: impl FnOnce() -> Result<R>) -> Result<(R, Trace)> {
    let listening = Listening::begin(device, detail);
    let done = work()?;
    STATE.set(State::Off);
    let trace = LISTENER.take().map_or_else(|| Ok(Trace::default()), Listener::end)?;
    drop(listening);
    Ok((done, trace))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clear(len: usize) {
        piece(|| Piece::Fill(len));
    }

    #[test]
    fn names_nest_and_end_with_their_guards() {
        let of = |detail| {
            let work = || {
                let _forward = phase("forward");
                clear(1);
                {
                    let _attention = stage("attention");
                    clear(2);
                    clear(3);
                }
                clear(4);
                Ok(())
            };
            record(Device::Cpu, detail, work).unwrap().1
        };
        let all = of(Detail::PieceTimes);
        let labels: Vec<(&str, &str)> = all.pieces.iter().map(|(label, _)| (label.phase, label.stage)).collect();
        let forward = ("forward", "");
        assert_eq!(labels, [("", ""), forward, ("forward", "attention"), ("forward", "attention"), forward]);
        assert_eq!(all.pieces[3].1, Piece::Fill(3));
        assert_eq!(all.segments.len(), 5);
        let stages = of(Detail::StageTimes).segments;
        let pieces: Vec<Range<usize>> = stages.iter().map(|segment| segment.pieces.clone()).collect();
        assert_eq!(pieces, [0..1, 1..2, 2..4, 4..5]);
        assert!(stages.iter().all(|segment| segment.milliseconds >= 0.0));
        assert!(of(Detail::Pieces).segments.is_empty());
    }

    #[test]
    fn nobody_hears_what_is_done_before_or_after() {
        clear(1);
        let (heard, trace) = record(Device::Cpu, Detail::Pieces, || Ok(wants_pieces())).unwrap();
        clear(2);
        assert!(heard && !wants_pieces());
        assert_eq!(trace.pieces, [(Label::default(), Piece::Host)]);
        let failed = record(Device::Cpu, Detail::Pieces, || Err::<(), _>(crate::Error::device("broken")));
        assert!(failed.is_err() && !wants_pieces());
    }
}
