//! Data-parallel training: many processes, the ranks, that share every step of one run.
//!
//! A step's samples are those of one rank with as many micro-batches as all ranks have together; each rank works on its own, and sums
//! over ranks make of it what one rank would have found: losses and gradients are scaled by counts over all ranks. Sums are taken in
//! the order of the ranks, so that a run repeats bit by bit on the same number of ranks.
//!
//! [`Collective`] is what ranks do together: [`Alone`], one process; [`tcp`], processes over plain TCP, for tests and machines without a
//! GPU; `mpi`, a feature, the processes of mpirun; [`nccl`], GPUs.
//!
//! - [`launch`]: which rank this process is, from what the launcher left in the environment; [`workers`]: a launcher of our own
//! - [`rendezvous`]: how ranks find rank 0; [`links`]: heartbeats, and the end of all ranks when one fails; [`wire`]: the bytes
//! - `terms`: the numbers that are summed
//! - [`agreement`]: whether all ranks have the same settings, data and weights

pub mod agreement;
pub mod launch;
pub mod links;
#[cfg(feature = "mpi")]
pub mod mpi;
pub mod nccl;
pub mod rendezvous;
pub mod tcp;
mod terms;
pub mod wire;
pub mod workers;

use std::sync::Arc;

use crate::device::Tensor;
use crate::error::Result;

/// What ranks do together. Every rank must call the same methods in the same order, with tensors of equal type and length.
pub trait Collective: Send + Sync {
    /// The number of this process, from 0.
    fn rank(&self) -> usize;

    /// Processes.
    fn size(&self) -> usize;

    /// Small messages: those of all ranks, in their order.
    ///
    /// # Errors
    /// The failure of a rank, which is that of all.
    fn exchange(&self, own: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// What `join` makes of the messages of all ranks, which a rank need not be sent.
    ///
    /// # Errors
    /// As [`Collective::exchange`].
    fn joined(&self, own: &[u8], join: &dyn Fn(Vec<Vec<u8>>) -> Vec<u8>) -> Result<Vec<u8>> {
        Ok(join(self.exchange(own)?))
    }

    /// The message of rank 0.
    ///
    /// # Errors
    /// As [`Collective::exchange`].
    fn tell(&self, own: &[u8]) -> Result<Vec<u8>> {
        let own: &[u8] = if self.rank() == 0 { own } else { &[] };
        Ok(self.exchange(own)?.swap_remove(0))
    }

    /// Returns when every rank has come here.
    ///
    /// # Errors
    /// As [`Collective::exchange`].
    fn barrier(&self) -> Result<()> {
        self.exchange(&[]).map(drop)
    }

    /// Every rank's tensor becomes the sum of all.
    ///
    /// # Errors
    /// As [`Collective::exchange`].
    fn all_reduce(&self, all: &Tensor) -> Result<()>;

    /// Whether sums that were begun go on beside what the rank computes, so that it is worth beginning them early.
    fn overlaps(&self) -> bool {
        false
    }

    /// Begins [`Collective::all_reduce`] behind the work queued so far. Until [`Collective::finish`] `all` is left alone, and no other
    /// method is called.
    ///
    /// # Errors
    /// As [`Collective::exchange`].
    fn begin_all_reduce(&self, all: &Tensor) -> Result<()> {
        self.all_reduce(all)
    }

    /// What is computed from now on comes behind all sums that were begun.
    ///
    /// # Errors
    /// As [`Collective::exchange`].
    fn finish(&self) -> Result<()> {
        Ok(())
    }

    /// `all` is one part a rank, in their order; each rank's own part comes to all.
    ///
    /// # Errors
    /// As [`Collective::exchange`].
    fn all_gather(&self, all: &Tensor) -> Result<()>;

    /// `all` is one part a rank, in their order; each rank's own part becomes the sum of that part over all ranks. The other parts are
    /// left as they happen to be.
    ///
    /// # Errors
    /// As [`Collective::exchange`].
    fn reduce_scatter(&self, all: &Tensor) -> Result<()>;

    /// Every rank's tensor becomes that of rank 0.
    ///
    /// # Errors
    /// As [`Collective::exchange`].
    fn broadcast(&self, all: &Tensor) -> Result<()>;

    /// The last that ranks do together, when all have done their work.
    ///
    /// # Errors
    /// As [`Collective::exchange`].
    fn end(&self) -> Result<()> {
        Ok(())
    }
}

/// One process.
pub struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn exchange(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![own.to_vec()])
    }

    fn all_reduce(&self, _: &Tensor) -> Result<()> {
        Ok(())
    }

    fn all_gather(&self, _: &Tensor) -> Result<()> {
        Ok(())
    }

    fn reduce_scatter(&self, _: &Tensor) -> Result<()> {
        Ok(())
    }

    fn broadcast(&self, _: &Tensor) -> Result<()> {
        Ok(())
    }
}

/// The ranks of a run, as a step needs them.
#[derive(Clone)]
pub struct Team(Arc<dyn Collective>);

impl Default for Team {
    fn default() -> Self {
        Team(Arc::new(Alone))
    }
}

impl Team {
    /// The ranks of a collective.
    pub fn new(collective: Arc<dyn Collective>) -> Self {
        Team(collective)
    }

    /// Whether this process has others beside it.
    pub fn is_shared(&self) -> bool {
        self.0.size() > 1
    }

    /// Sums over all ranks.
    ///
    /// # Errors
    /// The failure of a rank.
    pub fn totals<const N: usize>(&self, own: [usize; N]) -> Result<[usize; N]> {
        if !self.is_shared() {
            return Ok(own);
        }
        let own = own.map(|n| n as u64);
        let total = |all: &[Vec<u8>], i| all.iter().map(|one| number::<u64>(one, i)).sum();
        let join = |all: Vec<Vec<u8>>| {
            let totals: [u64; N] = std::array::from_fn(|i| total(&all, i));
            bytemuck::cast_slice(&totals).to_vec()
        };
        let totals = self.0.joined(bytemuck::cast_slice(&own), &join)?;
        Ok(std::array::from_fn(|i| number::<u64>(&totals, i) as usize))
    }

    /// Sums over all ranks of `own`, in their order, and the ranks whose own numbers, or `norm`, are not all finite.
    ///
    /// # Errors
    /// The failure of a rank.
    pub fn sums<const N: usize>(&self, own: [f64; N], norm: f64) -> Result<([f64; N], Vec<usize>)> {
        let own: Vec<f64> = own.into_iter().chain([norm]).collect();
        let finite = |one: &[u8]| (0..=N).all(|i| number::<f64>(one, i).is_finite());
        let join = |all: Vec<Vec<u8>>| {
            let sums: [f64; N] = std::array::from_fn(|i| all.iter().map(|one| number::<f64>(one, i)).sum());
            let bad = all.iter().enumerate().filter(|(_, one)| !finite(one)).map(|(rank, _)| rank as u64);
            sums.iter().flat_map(|sum| sum.to_ne_bytes()).chain(bad.flat_map(u64::to_ne_bytes)).collect()
        };
        let joint = self.0.joined(bytemuck::cast_slice(&own), &join)?;
        let sums = std::array::from_fn(|i| number::<f64>(&joint, i));
        Ok((sums, (N..joint.len() / 8).map(|i| number::<u64>(&joint, i) as usize).collect()))
    }
}

impl std::ops::Deref for Team {
    type Target = dyn Collective;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

/// Number `i` of a message of numbers.
fn number<T: bytemuck::Pod + Default>(message: &[u8], i: usize) -> T {
    let size = size_of::<T>();
    message.get(i * size..(i + 1) * size).map_or_else(T::default, bytemuck::pod_read_unaligned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_is_the_sum_of_itself() -> Result<()> {
        let team = Team::default();
        assert!(!team.is_shared());
        assert_eq!(team.totals([3, 4])?, [3, 4]);
        assert_eq!(team.sums([0.5, -1.0], 2.0)?, ([0.5, -1.0], vec![]));
        assert_eq!(team.sums([0.5, f64::NAN], 2.0)?.1, [0]);
        assert_eq!(team.sums([0.5, -1.0], f64::INFINITY)?, ([0.5, -1.0], vec![0]));
        assert_eq!(team.tell(b"x")?, b"x");
        team.barrier()
    }
}
