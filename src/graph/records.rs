//! Recorded work: on a GPU, work that comes again is queued as one record instead of launch by launch.

use std::collections::HashMap;
use std::hash::Hash;

use crate::device::gpu::Captured;
use crate::device::{Device, trace};

/// Records by what makes pieces of work equal.
pub struct Records<K> {
    /// Nothing yet for work that has run once.
    all: HashMap<K, Option<Box<dyn Captured>>>,
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
        let Device::Gpu(gpu) = device else { return work() };
        if trace::wants_pieces() {
            return work();
        }
        match self.all.get_mut(&key) {
            None => {
                work();
                self.all.insert(key, None);
            }
            Some(record) => {
                if record.is_none() {
                    *record = gpu.capture(&work);
                }
                if let Some(record) = record {
                    gpu.replay(&**record);
                }
            }
        }
    }

    /// Forgets all: constants that the work holds have changed.
    pub fn clear(&mut self) {
        self.all.clear();
    }
}
