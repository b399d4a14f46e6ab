//! The activation arenas: all buffers of a step, made from one table before the first step.
//!
//! Matrices of hidden states are of the storage type; statistics, losses and sums over rows are f32 wherever storage is bf16.

use crate::device::{Arena, DType, Device, Tensor};

/// Number of a buffer in the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    index: usize,
    wide: bool,
}

/// The table of buffers, filled by the parts of the graph.
#[derive(Debug, Default)]
pub struct Plan {
    storage: Vec<(String, usize)>,
    wide: Vec<(String, usize)>,
}

impl Plan {
    /// Adds a buffer of `rows × columns` elements of the storage type.
    pub fn add(&mut self, name: impl Into<String>, rows: usize, columns: usize) -> Slot {
        self.storage.push((name.into(), rows * columns));
        Slot { index: self.storage.len() - 1, wide: false }
    }

    /// Adds a buffer of `rows × columns` elements that are not rounded: statistics and sums.
    pub fn add_wide(&mut self, name: impl Into<String>, rows: usize, columns: usize) -> Slot {
        self.wide.push((name.into(), rows * columns));
        Slot { index: self.wide.len() - 1, wide: true }
    }

    /// Elements of the storage type, and others.
    pub fn elements(&self) -> [usize; 2] {
        [&self.storage, &self.wide].map(|list| list.iter().map(|b| b.1).sum())
    }

    /// Bytes of all buffers.
    pub fn bytes(&self, storage: DType) -> usize {
        let [narrow, wide] = self.elements();
        narrow * storage.size() + wide * storage.wide().size()
    }

    /// Name and elements of every buffer, those of the storage type first.
    pub fn table(&self) -> impl Iterator<Item = (&str, usize)> {
        self.storage.iter().chain(&self.wide).map(|(name, len)| (name.as_str(), *len))
    }

    /// Allocates the arenas.
    pub fn allocate(&self, device: Device, storage: DType) -> Activations {
        let arena = |dtype, list: &[(String, usize)]| Arena::zeros(device, dtype, list.iter().map(|b| b.1));
        Activations { storage: arena(storage, &self.storage), wide: arena(storage.wide(), &self.wide) }
    }
}

/// The allocated buffers.
pub struct Activations {
    storage: Arena,
    wide: Arena,
}

impl Activations {
    /// The buffer of `slot`.
    pub fn tensor(&self, slot: Slot) -> &Tensor {
        if slot.wide { self.wide.tensor(slot.index) } else { self.storage.tensor(slot.index) }
    }
}
