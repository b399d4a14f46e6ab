//! The activation arenas: all buffers of a step, made from one table before the first step.
//!
//! Matrices of hidden states are of the storage type; statistics, losses and sums over rows are f32 wherever storage is bf16.
//!
//! Without a backward nothing is kept of a layer once the next one is done: layers take turns with two sets of buffers, and gradients
//! have none.

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
    forward_only: bool,
}

impl Plan {
    /// For work without a backward: buffers of equal name are one, and those of gradients are empty.
    pub fn forward_only() -> Self {
        Plan { forward_only: true, ..Plan::default() }
    }

    /// What the buffers of layer `i` of `stem` are called.
    pub fn layer(&self, stem: &str, i: usize) -> String {
        // A layer reads what the one before it wrote, so two sets are enough.
        format!("{stem}.{}", if self.forward_only { i % 2 } else { i })
    }

    /// Adds a buffer of `rows × columns` elements of the storage type that only a backward uses.
    pub fn add_gradient(&mut self, name: impl Into<String>, rows: usize, columns: usize) -> Slot {
        self.add(name, if self.forward_only { 0 } else { rows }, columns)
    }

    /// [`Self::add_gradient`] of elements that are not rounded.
    pub fn add_wide_gradient(&mut self, name: impl Into<String>, rows: usize, columns: usize) -> Slot {
        self.add_wide(name, if self.forward_only { 0 } else { rows }, columns)
    }

    /// Adds a buffer of `rows × columns` elements of the storage type.
    pub fn add(&mut self, name: impl Into<String>, rows: usize, columns: usize) -> Slot {
        let index = Self::put(&mut self.storage, self.forward_only, name.into(), rows * columns);
        Slot { index, wide: false }
    }

    /// Adds a buffer of `rows × columns` elements that are not rounded: statistics and sums.
    pub fn add_wide(&mut self, name: impl Into<String>, rows: usize, columns: usize) -> Slot {
        let index = Self::put(&mut self.wide, self.forward_only, name.into(), rows * columns);
        Slot { index, wide: true }
    }

    fn put(list: &mut Vec<(String, usize)>, again: bool, name: String, len: usize) -> usize {
        if let Some(index) = list.iter().position(|buffer| again && buffer.0 == name) {
            list[index].1 = list[index].1.max(len);
            return index;
        }
        list.push((name, len));
        list.len() - 1
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
