//! [`Collective`] over plain TCP: everything goes through rank 0, which sums in the order of the ranks. Obvious, not fast; for tests, for
//! machines without a GPU, and for the small messages of any run.

use std::sync::Arc;
use std::time::Duration;

use super::Collective;
use super::links::Links;
use super::terms::{Term, by_type};
use super::wire::CHUNK;
use crate::device::Tensor;
use crate::error::Result;

/// Operations, as both sides of a message must name them.
const EXCHANGE: u8 = 1;
const ALL_REDUCE: u8 = 2;
const ALL_GATHER: u8 = 3;
const REDUCE_SCATTER: u8 = 4;
const BROADCAST: u8 = 5;
const JOINED: u8 = 6;
/// Longest message that is received whole.
const LONGEST: usize = 1 << 40;

/// The ranks over their connections.
pub struct Tcp {
    links: Arc<Links>,
}

impl Tcp {
    /// Over these connections.
    pub fn new(links: impl Into<Arc<Links>>) -> Self {
        Tcp { links: links.into() }
    }

    /// The connections.
    pub fn links(&self) -> &Links {
        &self.links
    }

    fn others(&self) -> std::ops::Range<usize> {
        1..self.links.size()
    }

    fn message(&self, to: usize, operation: u8, bytes: &[u8]) -> Result<()> {
        self.links.spread(to..to + 1, operation, bytes)
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

    /// At rank 0, the messages of all ranks.
    fn collected(&self, operation: u8, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        let others = self.others().map(|rank| self.whole(rank, operation, None));
        std::iter::once(Ok(own.to_vec())).chain(others).collect()
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
        self.links.spread(self.others(), ALL_GATHER, &bytes)?;
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
            return self.links.spread(self.others(), BROADCAST, bytemuck::cast_slice(&own));
        }
        let bytes = self.whole(0, BROADCAST, Some(all.len() * size_of::<T>()))?;
        all.upload::<T>(&bytemuck::pod_collect_to_vec(&bytes));
        Ok(())
    }
}

/// Messages in one, each behind its length.
fn packed(all: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(all.iter().map(|one| 8 + one.len()).sum());
    for one in all {
        bytes.extend((one.len() as u64).to_le_bytes());
        bytes.extend(one);
    }
    bytes
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
        let all = self.collected(EXCHANGE, own)?;
        // One message a rank, not one for each of all ranks.
        self.links.spread(self.others(), EXCHANGE, &packed(&all))?;
        Ok(all)
    }

    fn joined(&self, own: &[u8], join: &dyn Fn(Vec<Vec<u8>>) -> Vec<u8>) -> Result<Vec<u8>> {
        if self.links.rank() > 0 {
            self.message(0, JOINED, own)?;
            return self.whole(0, JOINED, None);
        }
        let joint = join(self.collected(JOINED, own)?);
        self.links.spread(self.others(), JOINED, &joint)?;
        Ok(joint)
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
