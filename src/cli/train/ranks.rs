//! The ranks of `train` and `search`: workers that this program starts, or a place among processes that another launcher has started.

use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use crate::data::order::Share;
use crate::device::{Device, on_exhausted};
use crate::error::{Error, IoContext, Kind, Result};
use crate::train::collective::launch::{self, Place, Source};
use crate::train::collective::links::{GRACE, Links};
#[cfg(feature = "mpi")]
use crate::train::collective::mpi;
use crate::train::collective::rendezvous::{self, Patience};
use crate::train::collective::tcp::Tcp;
use crate::train::collective::wire::Failure;
use crate::train::collective::{Team, nccl, workers};
use crate::train::signals::Stop;

/// Longest time that can be asked for.
const LONGEST: f64 = 86_400.0;

/// Flags of work that several processes share.
#[derive(Debug, Args)]
#[command(next_help_heading = "Many devices")]
pub(in crate::cli) struct Flags {
    /// Use this many GPUs of this machine, a process each, which share the work. Without this flag, torchrun's, Open MPI's, PMI's
    /// or SLURM's variables tell whether there are other processes
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024), conflicts_with = "ranks")]
    pub gpus: Option<u32>,
    /// The same with N processes on any device; 1: alone, whatever the launcher's variables say
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub ranks: Option<u32>,
    /// Seconds without a sign of life after which a process has failed
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    collective_timeout: f64,
    /// Seconds to wait for all processes to start
    #[arg(long, value_name = "SECONDS", default_value_t = 120.0)]
    rendezvous_timeout: f64,
}

/// How this process takes part.
pub(in crate::cli) enum Part {
    /// It trains by itself.
    Alone,
    /// It starts this many workers and waits for them.
    Launcher(usize),
    /// It is a rank.
    Rank(Place),
}

impl Flags {
    /// How this process takes part.
    pub fn part(&self) -> Result<Part> {
        let env = |name: &str| std::env::var(name).ok();
        let worker = env(launch::OURS).is_some();
        match (self.gpus.or(self.ranks), worker) {
            (Some(1), _) => Ok(Part::Alone),
            (Some(n), false) => match launch::detect(&env)? {
                None => Ok(Part::Launcher(n as usize)),
                Some(place) => {
                    let cause = format!("--gpus or --ranks {n}, and {} processes by {}", place.size, place.source);
                    Err(Error::usage(cause).remedy("leave the flag out: the processes are started already"))
                }
            },
            _ => Ok(launch::detect(&env)?.map_or(Part::Alone, Part::Rank)),
        }
    }

    fn patience(&self) -> Result<Patience> {
        let time = |name: &str, seconds: f64| match seconds > 0.0 && seconds <= LONGEST {
            true => Ok(Duration::from_secs_f64(seconds)),
            false => Err(Error::usage(format!("--{name} {seconds}")).remedy(format!("choose seconds up to {LONGEST}"))),
        };
        Ok(Patience {
            rendezvous: time("rendezvous-timeout", self.rendezvous_timeout)?,
            silence: time("collective-timeout", self.collective_timeout)?,
        })
    }

    /// Meets the other ranks.
    pub fn meet(&self, place: &Place) -> Result<Member> {
        if place.source == Source::Ours {
            workers::end_with_launcher();
        }
        let (patience, place) = (self.patience()?, place.clone());
        #[cfg(feature = "mpi")]
        let (world, place) = match place.source.speaks_mpi() {
            true => mpi::World::start(place, patience.rendezvous).map(|(world, place)| (Some(world), place))?,
            false => (None, place),
        };
        Device::choose_cuda(place.local_rank);
        let links = Arc::new(rendezvous::meet(&place, &program()?, patience)?);
        // mpirun kills all ranks a second after the first has failed.
        let mpirun = matches!(place.source, Source::OpenMpi | Source::Pmi);
        links.on_failure_after(if mpirun { GRACE / 4 } else { GRACE }, |error| {
            // The main thread computes, or waits for what will not come.
            let _ = writeln!(std::io::stderr(), "error: {error}");
            signal_hook::low_level::exit(error.exit_code());
        });
        let own = Arc::downgrade(&links);
        on_exhausted(move |error| {
            let error = match own.upgrade() {
                Some(links) => told(&links, error),
                None => error,
            };
            let _ = writeln!(std::io::stderr(), "error: {error}");
            signal_hook::low_level::exit(error.exit_code());
        });
        #[cfg(feature = "mpi")]
        if let Some(world) = world {
            let team = Team::new(Arc::new(mpi::Mpi::new(world, links.clone())));
            return Ok(Member { links: Some(links), team, place: Some(place) });
        }
        let team = Team::new(Arc::new(Tcp::new(links.clone())));
        Ok(Member { links: Some(links), team, place: Some(place) })
    }

    /// Starts workers, and ends as they do: rank 0 has said what there is to say.
    pub fn launch(&self, ranks: usize, threads: usize) -> Result<()> {
        self.patience()?;
        let stop = Stop::install()?;
        let arguments: Vec<_> = std::env::args_os().skip(1).collect();
        match workers::run(ranks, &arguments, threads, &stop)?.code() {
            Some(0) => Ok(()),
            code => std::process::exit(code.unwrap_or(1)),
        }
    }
}

/// Whether a run was stopped in an orderly way, which all ranks agree on.
fn stopped(error: &Error) -> bool {
    matches!(error.kind(), Kind::Signal(_))
}

/// Leaves the other ranks with an error of this one; gives what ended the run, which names its rank.
fn told(links: &Links, error: Error) -> Error {
    // What another rank failed with is the cause of whatever went wrong here since.
    match (stopped(&error), links.check()) {
        (true, _) => {
            links.leave(None);
            error
        }
        (false, theirs) => {
            let error = theirs.err().unwrap_or(error);
            links.leave(Some(&error));
            Failure::of(links.rank(), &error).to_error()
        }
    }
}

/// A digest of this program, by which ranks know that they are the same.
fn program() -> Result<String> {
    let path = Path::new("/proc/self/exe");
    let mut file = std::fs::File::open(path).at(path, "cannot read this program")?;
    let (mut digest, mut buffer) = (0, vec![0; 1 << 20]);
    loop {
        let n = file.read(&mut buffer).at(path, "cannot read this program")?;
        if n == 0 {
            return Ok(format!("{digest:08x}"));
        }
        digest = crc32c::crc32c_append(digest, &buffer[..n]);
    }
}

/// This process among the ranks of the run.
#[derive(Default)]
pub(in crate::cli) struct Member {
    links: Option<Arc<Links>>,
    team: Team,
    place: Option<Place>,
}

impl Member {
    /// The ranks.
    pub fn team(&self) -> Team {
        self.team.clone()
    }

    /// The ranks for tensors on `device`.
    pub fn team_on(&self, device: Device, warn: &mut dyn FnMut(String)) -> Result<Team> {
        if self.team.is_shared() { nccl::team(&self.team, device, warn) } else { Ok(self.team.clone()) }
    }

    /// Which of them this is.
    pub fn share(&self) -> Share {
        let of = |place: &Place| Share { rank: place.rank as u64, ranks: place.size as u64 };
        self.place.as_ref().map_or_else(Share::default, of)
    }

    /// Whether this is rank 0, which alone writes and reports.
    pub fn is_first(&self) -> bool {
        self.share().rank == 0
    }

    /// How it is known that there are others, in a line.
    pub fn words(&self) -> Option<String> {
        let place = self.place.as_ref()?;
        let how = if place.source.speaks_mpi() { ", over MPI" } else { "" };
        Some(format!("ranks      {} by {}{how}; rank 0 at {}:{}", place.size, place.source, place.host, place.port))
    }

    /// Ends the run with the others: tells them an error of this rank, which then names it.
    pub fn leave<T>(self, result: Result<T>) -> Result<T> {
        let Some(links) = self.links else { return result };
        // Ranks that were stopped have done their work, too.
        let result = match result {
            Err(e) if !stopped(&e) => Err(e),
            orderly => self.team.end().and(orderly),
        };
        result.inspect(|_| links.leave(None)).map_err(|e| told(&links, e))
    }
}
