//! Recorded work: on a GPU, work that comes again is queued as one record instead of launch by launch, or as several where something
//! that cannot be recorded comes between them.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::Hash;

use super::params::Entries;
use crate::device::gpu::{Captured, Gpu};
use crate::device::{Device, trace};
use crate::error::Result;

/// Records by what makes pieces of work equal.
pub struct Records<K> {
    /// Nothing yet for work that has run once.
    all: HashMap<K, Option<Record>>,
}

/// Work in one piece, or cut where gradients became complete.
struct Record {
    pieces: Vec<(Box<dyn Captured>, Entries)>,
    last: Box<dyn Captured>,
}

impl<K> Default for Records<K> {
    fn default() -> Self {
        Records { all: HashMap::new() }
    }
}

impl<K: Hash + Eq> Records<K> {
    /// Does `work`, which is equal for equal keys: on the CPU at once; on a GPU it is queued as it comes the first time, when kernels
    /// are loaded and temporary memory finds its size, recorded the second time, and replayed from then on.
    /// As it comes, too, where its pieces are asked for ([`trace::record`]).
    pub fn run(&mut self, device: Device, key: K, work: impl Fn()) {
        // Nothing to be done between pieces, nothing that can fail.
        let _ = self.run_in_pieces(device, key, |_| work(), |_| Ok(()));
    }

    /// The same for work that calls what it is given where the gradients of some entries are complete. Each time, also of a replay,
    /// `complete` is then done behind the work so far and before what follows, and is not recorded.
    ///
    /// # Errors
    /// The first that `complete` gave; it is then not called again.
    pub fn run_in_pieces(
        &mut self,
        device: Device,
        key: K,
        work: impl Fn(&dyn Fn(&Entries)),
        complete: impl Fn(&Entries) -> Result<()>,
    ) -> Result<()> {
        let directly = || {
            let done = RefCell::new(Ok(()));
            work(&|entries| {
                let mut done = done.borrow_mut();
                if done.is_ok() {
                    *done = complete(entries);
                }
            });
            done.into_inner()
        };
        let Device::Gpu(gpu) = device else { return directly() };
        if trace::wants_pieces() {
            return directly();
        }
        match self.all.get_mut(&key) {
            None => {
                directly()?;
                self.all.insert(key, None);
            }
            Some(record) => {
                if record.is_none() {
                    *record = Record::new(gpu, work);
                }
                if let Some(record) = record {
                    record.replay(gpu, complete)?;
                }
            }
        }
        Ok(())
    }

    /// Forgets all: constants that the work holds have changed.
    pub fn clear(&mut self) {
        self.all.clear();
    }
}

impl Record {
    fn new(gpu: &Gpu, work: impl Fn(&dyn Fn(&Entries))) -> Option<Record> {
        let pieces = RefCell::new(Vec::new());
        let last = gpu.capture(|| {
            work(&|entries| {
                if let Some(piece) = gpu.cut() {
                    pieces.borrow_mut().push((piece, entries.clone()));
                }
            });
        })?;
        Some(Record { pieces: pieces.into_inner(), last })
    }

    fn replay(&self, gpu: &Gpu, complete: impl Fn(&Entries) -> Result<()>) -> Result<()> {
        for (piece, entries) in &self.pieces {
            gpu.replay(&**piece);
            complete(entries)?;
        }
        gpu.replay(&*self.last);
        Ok(())
    }
}
