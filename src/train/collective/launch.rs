//! Which rank this process is: from what torchrun, Open MPI, PMI or SLURM left in the environment, or from a launcher of our own.

use std::fmt;

use crate::error::{Error, Result};

/// Set for the workers of [`super::workers`] beside torchrun's variables.
pub const OURS: &str = "RETROMAE_WORKER";
/// Ports that stand in for one that nobody named begin here.
const FIRST_PORT: u16 = 20_000;
const PORTS: u32 = 20_000;

/// Who started the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// `--gpus N` or `--ranks N`.
    Ours,
    /// `RANK` and `WORLD_SIZE`.
    Torchrun,
    /// `OMPI_COMM_WORLD_RANK` and `OMPI_COMM_WORLD_SIZE`.
    OpenMpi,
    /// `PMI_RANK` and `PMI_SIZE`.
    Pmi,
    /// `SLURM_PROCID` and `SLURM_NTASKS`.
    Slurm,
}

impl Source {
    /// Whether its ranks work together over MPI: mpirun's, in a program that is built for it.
    pub fn speaks_mpi(self) -> bool {
        cfg!(feature = "mpi") && matches!(self, Source::OpenMpi | Source::Pmi)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Source::Ours => "--gpus or --ranks",
            Source::Torchrun => "RANK and WORLD_SIZE (torchrun)",
            Source::OpenMpi => "OMPI_COMM_WORLD_RANK and _SIZE (Open MPI)",
            Source::Pmi => "PMI_RANK and PMI_SIZE",
            Source::Slurm => "SLURM_PROCID and SLURM_NTASKS",
        })
    }
}

/// A process among others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number.
    pub rank: usize,
    /// Processes in all.
    pub size: usize,
    /// Its number on its machine: which GPU is its own.
    pub local_rank: usize,
    /// Where rank 0 listens; empty when it says so over MPI.
    pub host: String,
    /// On which port; 0 when it says so over MPI.
    pub port: u16,
    /// How this is known.
    pub source: Source,
}

/// The names of a launcher's variables: rank, size, rank on the machine, and processes on it.
struct Names {
    source: Source,
    rank: &'static str,
    size: &'static str,
    local_rank: &'static str,
    /// Differs between two jobs on one machine.
    job: &'static [&'static str],
}

/// Looked at in this order: mpirun inside a SLURM job is known by its own variables.
const LAUNCHERS: [Names; 4] = [
    Names { source: Source::Torchrun, rank: "RANK", size: "WORLD_SIZE", local_rank: "LOCAL_RANK", job: &[] },
    Names {
        source: Source::OpenMpi,
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        job: &["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"],
    },
    Names {
        source: Source::Pmi,
        rank: "PMI_RANK",
        size: "PMI_SIZE",
        local_rank: "MPI_LOCALRANKID",
        job: &["PMI_KVS", "SLURM_JOB_ID"],
    },
    Names {
        source: Source::Slurm,
        rank: "SLURM_PROCID",
        size: "SLURM_NTASKS",
        local_rank: "SLURM_LOCALID",
        job: &["SLURM_JOB_ID"],
    },
];

/// The place of this process by the variables that `env` knows; none when it is alone.
///
/// # Errors
/// Variables that contradict each other, or that do not say where rank 0 is.
pub fn detect(env: &dyn Fn(&str) -> Option<String>) -> Result<Option<Place>> {
    let set = |name: &str| env(name).filter(|value| !value.is_empty());
    let Some(names) = LAUNCHERS.iter().find(|names| {
        // An interactive shell of SLURM has a rank, too, and one process; so has a single process under any launcher.
        set(names.rank).is_some() && set(names.size).is_some_and(|size| size.trim() != "1")
    }) else {
        return Ok(None);
    };
    let number = |name: &str| -> Result<Option<usize>> {
        let parse = |text: String| {
            text.trim().parse().map_err(|_| {
                Error::usage(format!("{name}={text} is no number")).remedy("check the launcher's variables")
            })
        };
        set(name).map(parse).transpose()
    };
    let (rank, size) = (number(names.rank)?.unwrap_or(0), number(names.size)?.unwrap_or(1));
    if rank >= size {
        return Err(Error::usage(format!("{}={rank} and {}={size}: there is no such rank", names.rank, names.size))
            .remedy("check the launcher's variables, or give --ranks 1 to train alone"));
    }
    let source = if set(OURS).is_some() { Source::Ours } else { names.source };
    let over_mpi = source.speaks_mpi() && set("MASTER_ADDR").is_none();
    let known = || if over_mpi { Some(String::new()) } else { guessed_host(names.source, size, &set) };
    let host = match set("MASTER_ADDR").or_else(known) {
        Some(host) => host,
        None => {
            let cause = format!("rank {rank} of {size}, by {}, does not know where rank 0 is", names.source);
            return Err(Error::usage(cause).remedy("set MASTER_ADDR to the machine of rank 0, or give --ranks 1"));
        }
    };
    let port = match number("MASTER_PORT")? {
        None if over_mpi => None,
        // Torchrun's own store listens on the port itself.
        Some(port) if set("TORCHELASTIC_USE_AGENT_STORE").as_deref() == Some("True") => Some(port + 1),
        Some(port) => Some(port),
        None => {
            let job = names.job.iter().find_map(|name| set(name)).unwrap_or_default();
            Some(usize::from(FIRST_PORT) + (crc32c::crc32c(job.as_bytes()) % PORTS) as usize)
        }
    };
    let valid = |port: usize| {
        u16::try_from(port)
            .ok()
            .filter(|port| *port > 0)
            .ok_or_else(|| Error::usage(format!("MASTER_PORT {port} is no port")).remedy("choose one from 1 to 65534"))
    };
    let port = port.map_or(Ok(0), valid)?;
    let local_rank = match number(names.local_rank)? {
        Some(local) => local,
        // Processes of one machine have neighbouring numbers with every launcher that does not say more.
        None => rank,
    };
    Ok(Some(Place { rank, size, local_rank, host, port, source }))
}

/// The machine of rank 0 where the launcher tells it in its own way.
fn guessed_host(source: Source, size: usize, set: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    match source {
        Source::Slurm | Source::Pmi if set("SLURM_JOB_NODELIST").is_some() => {
            first_host(&set("SLURM_STEP_NODELIST").or_else(|| set("SLURM_JOB_NODELIST"))?)
        }
        Source::OpenMpi => {
            let local = set("OMPI_COMM_WORLD_LOCAL_SIZE")?.trim().parse::<usize>().ok()?;
            (local == size).then(|| "127.0.0.1".into())
        }
        _ => None,
    }
}

/// The first machine of a list as SLURM writes it: `gpu[03-07,12],login1` begins with `gpu03`.
fn first_host(list: &str) -> Option<String> {
    let end = list.find([',', '[']).unwrap_or(list.len());
    let prefix = &list[..end];
    let Some(inside) = list[end..].strip_prefix('[') else {
        return (!prefix.is_empty()).then(|| prefix.to_string());
    };
    let (numbers, rest) = inside.split_once(']')?;
    let first = numbers.split([',', '-']).next()?;
    let suffix = &rest[..rest.find(',').unwrap_or(rest.len())];
    Some(format!("{prefix}{first}{suffix}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Option<Place>> {
        detect(&|name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string()))
    }

    fn refused(variables: &[(&str, &str)]) -> String {
        of(variables).err().map(|e| e.to_string()).unwrap_or_default()
    }

    #[test]
    fn every_launcher_is_known_by_its_variables() -> Result<()> {
        let torchrun =
            [("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "7")];
        let expected = Place { rank: 3, size: 8, local_rank: 1, host: "a".into(), port: 7, source: Source::Torchrun };
        assert_eq!(of(&torchrun)?, Some(expected.clone()));
        let agent = [torchrun.as_slice(), &[("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat();
        assert_eq!(of(&agent)?, Some(Place { port: 8, ..expected.clone() }));
        let ours = [torchrun.as_slice(), &[(OURS, "1")]].concat();
        assert_eq!(of(&ours)?, Some(Place { source: Source::Ours, ..expected }));

        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("SLURM_PROCID", "0"),
            ("SLURM_NTASKS", "2"),
        ];
        let asked = Source::OpenMpi.speaks_mpi();
        let place = of(&mpi)?.map(|place| (place.rank, place.size, place.host, place.source));
        assert_eq!(place, Some((1, 2, if asked { "" } else { "127.0.0.1" }.into(), Source::OpenMpi)));
        let far = [mpi.as_slice(), &[("OMPI_COMM_WORLD_LOCAL_SIZE", "1")]].concat();
        assert!(of(&far)?.is_some());
        let far: Vec<_> = mpi.iter().copied().filter(|(name, _)| !name.ends_with("LOCAL_SIZE")).collect();
        match asked {
            false => assert!(refused(&far).contains("does not know where rank 0 is; set MASTER_ADDR")),
            true => assert_eq!(of(&far)?.map(|place| place.port), Some(0)),
        }

        let pmi = [("PMI_RANK", "1"), ("PMI_SIZE", "2"), ("MASTER_ADDR", "n1"), ("MASTER_PORT", "99")];
        assert_eq!(of(&pmi)?.map(|place| (place.rank, place.local_rank, place.source)), Some((1, 1, Source::Pmi)));

        let slurm = [
            ("SLURM_PROCID", "5"),
            ("SLURM_NTASKS", "8"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_JOB_NODELIST", "gpu[03-04],x"),
            ("SLURM_JOB_ID", "4711"),
        ];
        let place = of(&slurm)?.map(|place| (place.rank, place.local_rank, place.host, place.source));
        assert_eq!(place, Some((5, 1, "gpu03".into(), Source::Slurm)));
        Ok(())
    }

    #[test]
    fn one_process_is_alone() -> Result<()> {
        assert_eq!(of(&[])?, None);
        assert_eq!(of(&[("RANK", "0"), ("WORLD_SIZE", "1")])?, None);
        // An interactive shell of SLURM.
        assert_eq!(of(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "1")])?, None);
        assert_eq!(of(&[("SLURM_PROCID", "0")])?, None);
        Ok(())
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(
            refused(&[("RANK", "2"), ("WORLD_SIZE", "2")]).starts_with("RANK=2 and WORLD_SIZE=2: there is no such")
        );
        assert!(refused(&[("RANK", "x"), ("WORLD_SIZE", "2")]).starts_with("RANK=x is no number"));
        let two = [("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a")];
        assert!(refused(&[two.as_slice(), &[("MASTER_PORT", "70000")]].concat()).starts_with("MASTER_PORT 70000"));
    }

    #[test]
    fn the_first_machine_of_a_list() {
        for (list, first) in [
            ("node7", "node7"),
            ("a,b", "a"),
            ("gpu[03-07,12],login", "gpu03"),
            ("n[5]-ib,m", "n5-ib"),
            ("gpu[1,3]", "gpu1"),
        ] {
            assert_eq!(first_host(list).as_deref(), Some(first), "{list}");
        }
        assert_eq!(first_host("gpu[1"), None);
        assert_eq!(first_host(""), None);
    }
}
