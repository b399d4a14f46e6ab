//! The activation arena: one allocation for all buffers of a step, made from one table before the first step.

use crate::device::{Arena, DType, Tensor};

/// Number of a buffer in the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(usize);

/// The table of buffers, filled by the parts of the graph.
#[derive(Debug, Default)]
pub struct Plan {
    buffers: Vec<(String, usize)>,
}

impl Plan {
    /// Adds a buffer of `rows × columns` elements.
    pub fn add(&mut self, name: impl Into<String>, rows: usize, columns: usize) -> Slot {
        self.buffers.push((name.into(), rows * columns));
        Slot(self.buffers.len() - 1)
    }

    /// Elements of all buffers.
    pub fn elements(&self) -> usize {
        self.buffers.iter().map(|b| b.1).sum()
    }

    /// Name and elements of every buffer, in order.
    pub fn table(&self) -> impl Iterator<Item = (&str, usize)> {
        self.buffers.iter().map(|(name, len)| (name.as_str(), *len))
    }

    /// Allocates the arena.
    pub fn allocate(&self, dtype: DType) -> Activations {
        Activations { arena: Arena::zeros(dtype, self.buffers.iter().map(|b| b.1)) }
    }
}

/// The allocated buffers.
pub struct Activations {
    arena: Arena,
}

impl Activations {
    /// The buffer of `slot`.
    pub fn tensor(&self, slot: Slot) -> &Tensor {
        self.arena.tensor(slot.0)
    }
}
