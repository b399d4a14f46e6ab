//! [`Collective`] over MPI, between the processes that mpirun has started (feature `mpi`).
//!
//! MPI moves bytes and the order of sums is ours: each rank gets its part from all (`MPI_Alltoall`), sums it in the order of the ranks and
//! gives it to all (`MPI_Allgather`). `MPI_Allreduce` moves no less, and its order is that of the algorithm an installation happens to
//! choose by size and placement; so sums have the same bits on any machines, and those of [`super::tcp`].
//!
//! MPI cannot promise that a run ends: by its standard a rank whose neighbour has died may wait forever, and so it does for one that is
//! stopped. Therefore ranks under mpirun also have the connections of [`super::links`], whose address rank 0 tells over MPI, and a thread
//! of its own speaks MPI: whoever waits for that thread is freed by the failure of a rank, and the thread ends with the process.
//!
//! Every operation begins with what it is and its length, from all to all: ranks that do different things find out, and MPI does not
//! come to abort them.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use ::mpi::Threading;
use ::mpi::datatype::PartitionMut;
use ::mpi::environment::{Universe, initialize_with_threading, processor_name};
use ::mpi::topology::SimpleCommunicator;
use ::mpi::traits::{Communicator, CommunicatorCollectives, Root};

use super::Collective;
use super::launch::Place;
use super::links::Links;
use super::terms::{Term, by_type};
use crate::device::Tensor;
use crate::error::{Error, Result};

/// How often whoever waits for MPI looks for a failure.
const POLL: Duration = Duration::from_millis(5);
/// Bytes that a rank moves at once: bounds memory, and the lengths that MPI counts in 31 bits.
const ROUND: usize = 16 << 20;
/// Bytes of an address, filled up with zeros.
const ADDRESS: usize = 512;

/// Operations, as all ranks must name them.
const EXCHANGE: u64 = 1;
const ALL_REDUCE: u64 = 2;
const ALL_GATHER: u64 = 3;
const REDUCE_SCATTER: u64 = 4;
const BROADCAST: u64 = 5;

/// Something to do with MPI, which is there until the end of the run.
type Work = Box<dyn FnOnce(&mut Option<Universe>) + Send>;

/// MPI as it runs in this process: a thread that does what it is given, in that order.
pub struct World {
    work: Sender<Work>,
}

fn ended() -> Error {
    Error::refused("MPI has ended in this process").remedy("see what it said above this line")
}

impl World {
    /// Starts MPI and asks it for the ranks: their place by the launcher's variables, whose address is now that of rank 0. Called once in
    /// a process, by all of them.
    ///
    /// # Errors
    /// MPI that does not start within `patience` or knows other ranks, and a rank 0 without a name or a free port.
    pub fn start(place: Place, patience: Duration) -> Result<(World, Place)> {
        let (work, given) = channel::<Work>();
        let speak = move || {
            // MPI's threads are all of this one: it is the only one to call it.
            let Some((universe, _)) = initialize_with_threading(Threading::Funneled) else { return };
            let mut universe = Some(universe);
            given.into_iter().for_each(|work: Work| work(&mut universe));
            // The run has not come to a good end, in which the ranks would have ended MPI together: alone it may wait forever.
            std::mem::forget(universe);
        };
        std::thread::Builder::new().name("mpi".into()).spawn(speak).map_err(|e| {
            Error::refused(format!("cannot start a thread for MPI: {e}"))
                .remedy("raise the limit of processes (ulimit -u)")
        })?;
        let (world, began) = (World { work }, Instant::now());
        let late = || match began.elapsed() > patience {
            true => Err(Error::refused(format!(
                "MPI has not brought the ranks together within {} s",
                patience.as_secs_f64()
            ))
            .remedy("see whether all machines of mpirun reach each other")),
            false => Ok(()),
        };
        let place = world.ask(move |world| acquainted(world, place), late)??;
        Ok((world, place))
    }

    /// What `work` gives. Until then `look` may give up.
    fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&SimpleCommunicator) -> T + Send + 'static,
        look: impl Fn() -> Result<()>,
    ) -> Result<T> {
        self.give(move |universe| universe.as_ref().map(|universe| work(&universe.world())), look)?.ok_or_else(ended)
    }

    fn give<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Option<Universe>) -> T + Send + 'static,
        look: impl Fn() -> Result<()>,
    ) -> Result<T> {
        let (send, done) = channel();
        // Whoever has given up does not want it any more.
        let work: Work = Box::new(move |universe| drop(send.send(work(universe))));
        self.work.send(work).map_err(|_| ended())?;
        loop {
            match done.recv_timeout(POLL) {
                Ok(done) => return Ok(done),
                Err(RecvTimeoutError::Timeout) => look()?,
                Err(RecvTimeoutError::Disconnected) => return Err(ended()),
            }
        }
    }
}

fn ranks(world: &SimpleCommunicator) -> (usize, usize) {
    (world.rank().unsigned_abs() as usize, world.size().unsigned_abs() as usize)
}

/// The place of this process as MPI knows it, with the address of rank 0.
fn acquainted(world: &SimpleCommunicator, place: Place) -> Result<Place> {
    let (rank, size) = ranks(world);
    if (rank, size) != (place.rank, place.size) {
        let cause =
            format!("rank {} of {} by {}, but rank {rank} of {size} by MPI", place.rank, place.size, place.source);
        return Err(Error::usage(cause).remedy("build this program with the MPI whose mpirun starts it"));
    }
    let near = world.split_shared(world.rank());
    let mut bytes = [0; ADDRESS];
    if rank == 0 {
        let address = address(&place, near.size() == world.size()).filter(|address| address.len() <= ADDRESS);
        let address = address.unwrap_or_default();
        bytes[..address.len()].copy_from_slice(address.as_bytes());
    }
    world.process_at_rank(0).broadcast_into(&mut bytes[..]);
    let text = String::from_utf8_lossy(&bytes);
    let known = text.trim_end_matches('\0').rsplit_once(':');
    let (host, port) =
        known.and_then(|(host, port)| Some((host.to_string(), port.parse().ok()?))).ok_or_else(|| {
            Error::refused("rank 0: its machine has no name or no free port").remedy("set MASTER_ADDR and MASTER_PORT")
        })?;
    Ok(Place { local_rank: near.rank().unsigned_abs() as usize, host, port, ..place })
}

/// Where rank 0 listens: where the variables say, else at a free port of its machine, by that one's name unless all ranks are on it.
fn address(place: &Place, together: bool) -> Option<String> {
    let port = match place.port {
        0 => TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|listener| listener.local_addr()).ok()?.port(),
        port => port,
    };
    let host = match place.host.as_str() {
        "" if together => "127.0.0.1".into(),
        "" => processor_name().ok()?,
        host => host.to_string(),
    };
    Some(format!("{host}:{port}"))
}

/// The ranks over MPI.
pub struct Mpi {
    world: World,
    links: Arc<Links>,
}

impl Mpi {
    /// Over MPI; `links` tell when a rank has failed.
    pub fn new(world: World, links: Arc<Links>) -> Self {
        Mpi { world, links }
    }

    /// What `work` gives, which gets the lengths that the ranks have named.
    fn run<T: Send + 'static>(
        &self,
        operation: u64,
        bytes: usize,
        work: impl FnOnce(&SimpleCommunicator, &[usize]) -> T + Send + 'static,
    ) -> Result<T> {
        let checked = move |world: &SimpleCommunicator| {
            let mut heads = vec![0; 2 * ranks(world).1];
            world.all_gather_into(&[operation, bytes as u64][..], &mut heads[..]);
            // What rank 0 does is what all should: so all ranks find the same.
            let alike = |one: &[u64]| one[0] == heads[0] && (one[0] == EXCHANGE || one[1] == heads[1]);
            match heads.chunks_exact(2).position(|one| !alike(one)) {
                Some(rank) => Err(rank),
                None => Ok(work(world, &heads.chunks_exact(2).map(|one| one[1] as usize).collect::<Vec<_>>())),
            }
        };
        self.world.ask(checked, || self.links.check())?.map_err(|rank| self.links.out_of_step(rank))
    }

    fn reduced<T: Term>(&self, all: &Tensor) -> Result<()> {
        let mut own: Vec<T> = all.to_vec();
        let sum = move |world: &SimpleCommunicator, _: &[usize]| {
            let (_, size) = ranks(world);
            for piece in own.chunks_mut(at_once::<T>(size) * size) {
                let mut parts = piece.to_vec();
                parts.resize(piece.len().next_multiple_of(size), T::zeroed());
                let sum = summed(world, &parts);
                world.all_gather_into(bytes(&sum), bytes_mut(&mut parts));
                piece.copy_from_slice(&parts[..piece.len()]);
            }
            own
        };
        all.upload(&self.run(ALL_REDUCE, all.len() * size_of::<T>(), sum)?);
        Ok(())
    }

    fn gathered<T: Term>(&self, all: &Tensor) -> Result<()> {
        let part = all.len() / self.size();
        let own: Vec<T> = all.slice(self.rank() * part..(self.rank() + 1) * part).to_vec();
        let gather = move |world: &SimpleCommunicator, _: &[usize]| {
            let (_, size) = ranks(world);
            let mut whole = vec![T::zeroed(); part * size];
            let most = at_once::<T>(size);
            for (i, piece) in own.chunks(most).enumerate() {
                let mut theirs = vec![T::zeroed(); piece.len() * size];
                world.all_gather_into(bytes(piece), bytes_mut(&mut theirs));
                for (whole, theirs) in whole.chunks_exact_mut(part).zip(theirs.chunks_exact(piece.len())) {
                    whole[i * most..][..piece.len()].copy_from_slice(theirs);
                }
            }
            whole
        };
        all.upload(&self.run(ALL_GATHER, all.len() * size_of::<T>(), gather)?);
        Ok(())
    }

    fn scattered<T: Term>(&self, all: &Tensor) -> Result<()> {
        let (part, own) = (all.len() / self.size(), all.to_vec::<T>());
        let sum = move |world: &SimpleCommunicator, _: &[usize]| {
            let (_, size) = ranks(world);
            let mut sums = Vec::with_capacity(part);
            while sums.len() < part {
                let range = sums.len()..part.min(sums.len() + at_once::<T>(size));
                let parts: Vec<T> = own.chunks_exact(part).flat_map(|part| &part[range.clone()]).copied().collect();
                sums.extend(summed(world, &parts));
            }
            sums
        };
        let sums = self.run(REDUCE_SCATTER, all.len() * size_of::<T>(), sum)?;
        all.slice(self.rank() * part..(self.rank() + 1) * part).upload(&sums);
        Ok(())
    }

    fn spread<T: Term>(&self, all: &Tensor) -> Result<()> {
        let mut own: Vec<T> = all.to_vec();
        let spread = move |world: &SimpleCommunicator, _: &[usize]| {
            let pieces = own.chunks_mut(ROUND / size_of::<T>());
            pieces.for_each(|piece| world.process_at_rank(0).broadcast_into(bytes_mut(piece)));
            own
        };
        all.upload(&self.run(BROADCAST, all.len() * size_of::<T>(), spread)?);
        Ok(())
    }
}

fn bytes<T: Term>(all: &[T]) -> &[u8] {
    bytemuck::cast_slice(all)
}

fn bytes_mut<T: Term>(all: &mut [T]) -> &mut [u8] {
    bytemuck::cast_slice_mut(all)
}

/// Elements of one rank that are moved at once.
fn at_once<T>(size: usize) -> usize {
    (ROUND / size_of::<T>() / size).max(1)
}

/// Of `all`, one part a rank, the sum of this rank's part over all ranks, in their order.
fn summed<T: Term>(world: &SimpleCommunicator, all: &[T]) -> Vec<T> {
    let mut theirs = vec![T::zeroed(); all.len()];
    world.all_to_all_into(bytes(all), bytes_mut(&mut theirs));
    let (sum, others) = theirs.split_at_mut(all.len() / ranks(world).1);
    for other in others.chunks_exact(sum.len()) {
        sum.iter_mut().zip(other).for_each(|(sum, x)| *sum = sum.plus(*x));
    }
    sum.to_vec()
}

/// The messages of all ranks, whose lengths these are.
fn gathered(world: &SimpleCommunicator, own: &[u8], lengths: &[usize]) -> Vec<Vec<u8>> {
    let most = at_once::<u8>(lengths.len());
    let mut all: Vec<Vec<u8>> = lengths.iter().map(|length| Vec::with_capacity(*length)).collect();
    for start in (0..lengths.iter().copied().max().unwrap_or(0)).step_by(most) {
        let counts: Vec<usize> = lengths.iter().map(|length| length.saturating_sub(start).min(most)).collect();
        let starts: Vec<usize> = counts.iter().scan(0, |sum, n| Some(std::mem::replace(sum, *sum + n))).collect();
        let mut theirs = vec![0u8; counts.iter().sum()];
        let int = |all: &[usize]| all.iter().map(|n| *n as i32).collect::<Vec<_>>();
        let own = &own[start.min(own.len())..own.len().min(start + most)];
        world.all_gather_varcount_into(own, &mut PartitionMut::new(&mut theirs[..], int(&counts), int(&starts)));
        for (rank, one) in all.iter_mut().enumerate() {
            one.extend(&theirs[starts[rank]..][..counts[rank]]);
        }
    }
    all
}

impl Collective for Mpi {
    fn rank(&self) -> usize {
        self.links.rank()
    }

    fn size(&self) -> usize {
        self.links.size()
    }

    fn exchange(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        let own = own.to_vec();
        self.run(EXCHANGE, own.len(), move |world, lengths| gathered(world, &own, lengths))
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

    fn end(&self) -> Result<()> {
        self.world.give(|universe| drop(universe.take()), || self.links.check())
    }
}
