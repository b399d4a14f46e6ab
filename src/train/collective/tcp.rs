//! [`Collective`] over plain TCP: everything goes through rank 0, which sums in the order of the ranks. Obvious, not fast; for tests, for
//! machines without a GPU, and for the small messages of any run.

use std::time::Duration;

use half::bf16;

use super::Collective;
use super::links::Links;
use super::wire::CHUNK;
use crate::device::{DType, Element, Tensor};
use crate::error::{Error, Result};

/// Operations, as both sides of a message must name them.
const EXCHANGE: u8 = 1;
const ALL_REDUCE: u8 = 2;
const ALL_GATHER: u8 = 3;
const REDUCE_SCATTER: u8 = 4;
const BROADCAST: u8 = 5;
/// Longest message that is received whole.
const LONGEST: usize = 1 << 40;

/// The ranks over their connections.
pub struct Tcp {
    links: Links,
}

/// What can be summed.
trait Term: Element {
    fn plus(self, other: Self) -> Self;
}

impl Term for f32 {
    fn plus(self, other: Self) -> Self {
        self + other
    }
}

impl Term for f64 {
    fn plus(self, other: Self) -> Self {
        self + other
    }
}

impl Term for bf16 {
    fn plus(self, other: Self) -> Self {
        bf16::from_f32(self.to_f32() + other.to_f32())
    }
}

/// Calls a generic method for the type of a tensor's elements.
macro_rules! by_type {
    ($tensor:expr, $self:ident.$method:ident($($argument:expr),*)) => {
        match $tensor.dtype() {
            DType::F32 => $self.$method::<f32>($($argument),*),
            DType::F64 => $self.$method::<f64>($($argument),*),
            DType::BF16 => $self.$method::<bf16>($($argument),*),
            other => Err(Error::refused(format!("ranks have no sum of {other:?}")).remedy("report this as a defect")),
        }
    };
}

impl Tcp {
    /// Over these connections.
    pub fn new(links: Links) -> Self {
        Tcp { links }
    }

    /// The connections.
    pub fn links(&self) -> &Links {
        &self.links
    }

    fn others(&self) -> std::ops::Range<usize> {
        1..self.links.size()
    }

    fn message(&self, to: usize, operation: u8, bytes: &[u8]) -> Result<()> {
        self.links.begin(to, operation, bytes.len())?;
        self.links.send(to, bytes)
    }

    /// A whole message; of `length` bytes, where that is known.
    fn whole(&self, from: usize, operation: u8, length: Option<usize>) -> Result<Vec<u8>> {
        let begun = self.links.began(from, operation)?;
        if length.is_some_and(|length| length != begun) || begun > LONGEST {
            return Err(self.links.out_of_step(from));
        }
        let mut bytes = Vec::new();
        while bytes.len() < begun {
            bytes.extend(self.links.receive(from)?);
        }
        Ok(bytes)
    }

    /// At rank 0, the sum of what all ranks have; at the others nothing. `done` gets every piece of it as soon as it is there.
    fn reduce<T: Term>(&self, operation: u8, own: &mut [T], mut done: impl FnMut(&[T]) -> Result<()>) -> Result<()> {
        let bytes = size_of_val(own);
        if self.links.rank() > 0 {
            return self.message(0, operation, bytemuck::cast_slice(own));
        }
        for rank in self.others() {
            if self.links.began(rank, operation)? != bytes {
                return Err(self.links.out_of_step(rank));
            }
        }
        for piece in own.chunks_mut(CHUNK / size_of::<T>()) {
            for rank in self.others() {
                let theirs = self.links.receive(rank)?;
                if theirs.len() != size_of_val(piece) {
                    return Err(self.links.out_of_step(rank));
                }
                let theirs = theirs.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned::<T>);
                piece.iter_mut().zip(theirs).for_each(|(sum, x)| *sum = sum.plus(x));
            }
            done(piece)?;
        }
        Ok(())
    }

    fn reduced<T: Term>(&self, all: &Tensor) -> Result<()> {
        let mut own: Vec<T> = all.to_vec();
        let bytes = size_of_val(own.as_slice());
        if self.links.rank() > 0 {
            self.reduce(ALL_REDUCE, &mut own, |_| Ok(()))?;
            let sum = self.whole(0, ALL_REDUCE, Some(bytes))?;
            all.upload::<T>(&bytemuck::pod_collect_to_vec(&sum));
            return Ok(());
        }
        let mut first = true;
        self.reduce(ALL_REDUCE, &mut own, |piece| {
            for rank in self.others() {
                if first {
                    self.links.begin(rank, ALL_REDUCE, bytes)?;
                }
                self.links.send(rank, bytemuck::cast_slice(piece))?;
            }
            first = false;
            Ok(())
        })?;
        all.upload(&own);
        Ok(())
    }

    fn gathered<T: Term>(&self, all: &Tensor) -> Result<()> {
        let (part, rank) = (all.len() / self.links.size(), self.links.rank());
        if rank > 0 {
            let own: Vec<T> = all.slice(rank * part..(rank + 1) * part).to_vec();
            self.message(0, ALL_GATHER, bytemuck::cast_slice(&own))?;
            let bytes = self.whole(0, ALL_GATHER, Some(all.len() * size_of::<T>()))?;
            all.upload::<T>(&bytemuck::pod_collect_to_vec(&bytes));
            return Ok(());
        }
        let mut bytes: Vec<u8> = bytemuck::pod_collect_to_vec(&all.slice(0..part).to_vec::<T>());
        for rank in self.others() {
            bytes.extend(self.whole(rank, ALL_GATHER, Some(part * size_of::<T>()))?);
        }
        self.others().try_for_each(|rank| self.message(rank, ALL_GATHER, &bytes))?;
        all.upload::<T>(&bytemuck::pod_collect_to_vec(&bytes));
        Ok(())
    }

    fn scattered<T: Term>(&self, all: &Tensor) -> Result<()> {
        let (part, rank) = (all.len() / self.links.size(), self.links.rank());
        let mut sums: Vec<T> = all.to_vec();
        self.reduce(REDUCE_SCATTER, &mut sums, |_| Ok(()))?;
        if rank > 0 {
            let own = self.whole(0, REDUCE_SCATTER, Some(part * size_of::<T>()))?;
            all.slice(rank * part..(rank + 1) * part).upload::<T>(&bytemuck::pod_collect_to_vec(&own));
            return Ok(());
        }
        for rank in self.others() {
            let theirs = &sums[rank * part..(rank + 1) * part];
            self.message(rank, REDUCE_SCATTER, bytemuck::cast_slice(theirs))?;
        }
        all.slice(0..part).upload(&sums[..part]);
        Ok(())
    }

    fn spread<T: Term>(&self, all: &Tensor) -> Result<()> {
        if self.links.rank() == 0 {
            let own: Vec<T> = all.to_vec();
            return self.others().try_for_each(|rank| self.message(rank, BROADCAST, bytemuck::cast_slice(&own)));
        }
        let bytes = self.whole(0, BROADCAST, Some(all.len() * size_of::<T>()))?;
        all.upload::<T>(&bytemuck::pod_collect_to_vec(&bytes));
        Ok(())
    }
}

/// Messages in one, each behind its length.
fn packed(all: &[Vec<u8>]) -> Vec<u8> {
    all.iter().flat_map(|one| (one.len() as u64).to_le_bytes().into_iter().chain(one.iter().copied())).collect()
}

/// The messages that were [`packed`]; none where bytes are missing.
fn unpacked(mut bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut all = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk() {
        let (one, rest) = rest.split_at_checked(u64::from_le_bytes(*length) as usize)?;
        all.push(one.to_vec());
        bytes = rest;
    }
    bytes.is_empty().then_some(all)
}

impl Collective for Tcp {
    fn rank(&self) -> usize {
        self.links.rank()
    }

    fn size(&self) -> usize {
        self.links.size()
    }

    fn exchange(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        if self.links.rank() > 0 {
            self.message(0, EXCHANGE, own)?;
            let all = unpacked(&self.whole(0, EXCHANGE, None)?);
            return all.filter(|all| all.len() == self.size()).ok_or_else(|| self.links.out_of_step(0));
        }
        let mut all = vec![own.to_vec()];
        for rank in self.others() {
            all.push(self.whole(rank, EXCHANGE, None)?);
        }
        // One message a rank, not one for each of all ranks: rank 0 sends them one after the other.
        let packed = packed(&all);
        self.others().try_for_each(|rank| self.message(rank, EXCHANGE, &packed))?;
        Ok(all)
    }

    fn all_reduce(&self, all: &Tensor) -> Result<()> {
        by_type!(all, self.reduced(all))
    }

    fn all_gather(&self, all: &Tensor) -> Result<()> {
        by_type!(all, self.gathered(all))
    }

    fn reduce_scatter(&self, all: &Tensor) -> Result<()> {
        by_type!(all, self.scattered(all))
    }

    fn broadcast(&self, all: &Tensor) -> Result<()> {
        by_type!(all, self.spread(all))
    }
}

/// The rendezvous and heartbeat times of tests and of runs that say nothing.
pub const SILENCE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_messages_come_back_and_cut_ones_do_not() {
        let all = vec![vec![1, 2, 3], vec![], vec![9; 300]];
        let bytes = packed(&all);
        assert_eq!(unpacked(&bytes), Some(all));
        assert_eq!(unpacked(&[]), Some(vec![]));
        let whole = [11, 19];
        assert!((1..bytes.len()).filter(|cut| !whole.contains(cut)).all(|cut| unpacked(&bytes[..cut]).is_none()));
    }
}
