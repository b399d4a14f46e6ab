//! [`Collective`] between GPUs: tensors of the GPU go through NCCL, on the GPU's own queue; messages and what lies on the host as the
//! ranks of the host do it, over TCP or MPI.

use std::sync::Arc;

use super::{Collective, Team};
use crate::device::ring::{Ring, Together};
use crate::device::{Device, Tensor};
use crate::error::Result;

/// The ranks and their GPUs.
pub struct Nccl {
    host: Team,
    ring: Ring,
}

/// The ranks of `host` whose tensors are on `device`: through NCCL where all of them have it. `warn` gets a line where not.
///
/// # Errors
/// The failure of a rank, or of NCCL.
pub fn team(host: &Team, device: Device, warn: &mut dyn FnMut(String)) -> Result<Team> {
    let Device::Gpu(gpu) = device else { return Ok(host.clone()) };
    let possible = Ring::is_possible(gpu);
    let own = possible.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let all = host.exchange(own.as_bytes())?;
    if let Some((rank, why)) = all.iter().enumerate().find(|(_, why)| !why.is_empty()) {
        let why = String::from_utf8_lossy(why);
        warn(format!("rank {rank}: gradients go through the memory of the host, slowly: {why}"));
        return Ok(host.clone());
    }
    let own = if host.rank() == 0 { Ring::id(gpu)? } else { Vec::new() };
    let id = host.tell(&own)?;
    let ring = Ring::new(gpu, &id, host.rank(), host.size())?;
    Ok(Team::new(Arc::new(Nccl { host: host.clone(), ring })))
}

impl Nccl {
    fn run(&self, what: Together, all: &Tensor) -> Result<()> {
        if all.device().is_gpu() {
            return self.ring.run(what, all);
        }
        match what {
            Together::AllReduce => self.host.all_reduce(all),
            Together::AllGather => self.host.all_gather(all),
            Together::ReduceScatter => self.host.reduce_scatter(all),
            Together::Broadcast => self.host.broadcast(all),
        }
    }
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn size(&self) -> usize {
        self.host.size()
    }

    fn exchange(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.host.exchange(own)
    }

    fn joined(&self, own: &[u8], join: &dyn Fn(Vec<Vec<u8>>) -> Vec<u8>) -> Result<Vec<u8>> {
        self.host.joined(own, join)
    }

    fn all_reduce(&self, all: &Tensor) -> Result<()> {
        self.run(Together::AllReduce, all)
    }

    fn overlaps(&self) -> bool {
        true
    }

    fn begin_all_reduce(&self, all: &Tensor) -> Result<()> {
        if all.device().is_gpu() { self.ring.begin_sum(all) } else { self.host.all_reduce(all) }
    }

    fn finish(&self) -> Result<()> {
        self.ring.finish()
    }

    fn all_gather(&self, all: &Tensor) -> Result<()> {
        self.run(Together::AllGather, all)
    }

    fn reduce_scatter(&self, all: &Tensor) -> Result<()> {
        self.run(Together::ReduceScatter, all)
    }

    fn broadcast(&self, all: &Tensor) -> Result<()> {
        self.run(Together::Broadcast, all)
    }

    fn end(&self) -> Result<()> {
        self.host.end()
    }
}
