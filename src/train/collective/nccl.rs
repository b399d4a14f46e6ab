//! [`Collective`] between GPUs: tensors of the GPU go through NCCL, on the GPU's own queue; messages and what lies on the host through TCP.

use std::sync::Arc;

use super::{Collective, Team};
use crate::device::ring::{Ring, Together};
use crate::device::{Device, Tensor};
use crate::error::Result;
use crate::train::collective::tcp::Tcp;

/// The ranks and their GPUs.
pub struct Nccl {
    tcp: Arc<Tcp>,
    ring: Ring,
}

/// The ranks of `tcp` whose tensors are on `device`: through NCCL where all of them have it. `warn` gets a line where not.
///
/// # Errors
/// The failure of a rank, or of NCCL.
pub fn team(tcp: &Arc<Tcp>, device: Device, warn: &mut dyn FnMut(String)) -> Result<Team> {
    let plain = Team::new(tcp.clone());
    let Device::Gpu(gpu) = device else { return Ok(plain) };
    let possible = Ring::is_possible(gpu);
    let own = possible.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let all = plain.exchange(own.as_bytes())?;
    if let Some((rank, why)) = all.iter().enumerate().find(|(_, why)| !why.is_empty()) {
        let why = String::from_utf8_lossy(why);
        warn(format!("rank {rank}: gradients go through the memory of the host, slowly: {why}"));
        return Ok(plain);
    }
    let own = if plain.rank() == 0 { Ring::id(gpu)? } else { Vec::new() };
    let id = plain.tell(&own)?;
    let ring = Ring::new(gpu, &id, plain.rank(), plain.size())?;
    Ok(Team::new(Arc::new(Nccl { tcp: tcp.clone(), ring })))
}

impl Nccl {
    fn run(&self, what: Together, all: &Tensor) -> Result<()> {
        if all.device().is_gpu() {
            return self.ring.run(what, all);
        }
        match what {
            Together::AllReduce => self.tcp.all_reduce(all),
            Together::AllGather => self.tcp.all_gather(all),
            Together::ReduceScatter => self.tcp.reduce_scatter(all),
            Together::Broadcast => self.tcp.broadcast(all),
        }
    }
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.tcp.rank()
    }

    fn size(&self) -> usize {
        self.tcp.size()
    }

    fn exchange(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.tcp.exchange(own)
    }

    fn all_reduce(&self, all: &Tensor) -> Result<()> {
        self.run(Together::AllReduce, all)
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
}
