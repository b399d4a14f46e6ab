//! Ranks that mpirun starts, in a build with the feature `mpi`: what they do together and train, and what becomes of all when one fails.

use std::ffi::OsStr;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use half::bf16;
use retromae_engine::device::Device;
use retromae_engine::train::collective::mpi::{Mpi, World as Started};
use retromae_engine::train::collective::rendezvous::meet;
use retromae_engine::train::collective::{Collective, launch};

use crate::failures::{children, signal, started, wait_for};
use crate::operations::{numbers, sums, tensor};
use crate::runs::{assert_same_bits, assert_same_training, good};
use crate::support::{PATIENCE, failure};
use crate::world::{BINARY, World, stderr};

/// `program` as so many ranks; none where there is no mpirun.
fn mpirun(ranks: usize, program: impl AsRef<OsStr>) -> Option<Command> {
    let version = Command::new("mpirun").arg("--version").output();
    if !version.is_ok_and(|done| String::from_utf8_lossy(&done.stdout).contains("Open MPI")) {
        eprintln!("left out: there is no mpirun of Open MPI (Debian: apt install openmpi-bin)");
        return None;
    }
    let mut command = Command::new("mpirun");
    command.args(["-n", &ranks.to_string(), "--oversubscribe", "--allow-run-as-root"]).arg(program.as_ref());
    Some(command)
}

/// `train` as so many ranks.
fn trained(world: &World, ranks: usize, out: &str, more: &[&str]) -> Option<Command> {
    let mut command = mpirun(ranks, BINARY)?;
    command.args(world.train(out, more).get_args());
    Some(command)
}

/// What ranks say: all lines that are an error, without what mpirun adds.
fn errors(output: &Output) -> Vec<String> {
    stderr(output).lines().filter(|line| line.starts_with("error: ")).map(str::to_string).collect()
}

/// Runs the test of this name as ranks, of which each comes to [`team`].
fn as_ranks(ranks: usize, test: &str) {
    let Some(mut command) = mpirun(ranks, std::env::current_exe().unwrap()) else { return };
    let name = format!("mpi::{test}");
    let done = command.args([name.as_str(), "--exact", "--nocapture", "--test-threads", "1"]).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), stderr(&done));
    assert!(done.status.success() && said.matches("1 passed").count() == ranks, "{said}");
}

/// This process as a rank, if it is one of [`as_ranks`].
fn team() -> Option<(Mpi, impl FnOnce())> {
    let place = launch::detect(&|name| std::env::var(name).ok()).unwrap()?;
    let (world, place) = Started::start(place, PATIENCE.rendezvous).unwrap();
    let links = Arc::new(meet(&place, "test", PATIENCE).unwrap());
    Some((Mpi::new(world, links.clone()), move || links.leave(None)))
}

/// Whether a process has not ended. What mpirun leaves behind is reaped whenever the system comes to it.
fn runs(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.contains('Z') && !line.contains('X'))
}

fn bits(all: &[f32]) -> Vec<u32> {
    all.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn ranks_of_mpirun_do_together_what_ranks_over_tcp_do() {
    let Some((team, leave)) = team() else { return as_ranks(3, "ranks_of_mpirun_do_together_what_ranks_over_tcp_do") };
    let (rank, size) = (team.rank(), team.size());
    assert_eq!(size, 3);
    // One element, more than ranks, and more than is moved at once.
    for n in [1, 1000, 5_000_001] {
        let t = tensor(&numbers(rank, n));
        team.all_reduce(&t).unwrap();
        assert_eq!(bits(&t.to_vec::<f32>()), bits(&sums(size, n)), "{n}");
    }
    for part in [5, 1_500_001] {
        let own = rank * part..(rank + 1) * part;
        let gathered = tensor(&vec![-1.0; size * part]);
        gathered.slice(own.clone()).upload(&numbers(rank, part));
        team.all_gather(&gathered).unwrap();
        let all: Vec<f32> = (0..size).flat_map(|rank| numbers(rank, part)).collect();
        assert_eq!(bits(&gathered.to_vec::<f32>()), bits(&all));
        let scattered = tensor(&numbers(rank, size * part));
        team.reduce_scatter(&scattered).unwrap();
        assert_eq!(bits(&scattered.slice(own.clone()).to_vec::<f32>()), bits(&sums(size, size * part)[own]));
    }
    let (x, y) = (0.1 + rank as f64, bf16::from_f32(1.0 + rank as f32));
    let (wide, narrow) = (Device::Cpu.tensor(&[x, -x]), Device::Cpu.tensor(&[y]));
    team.all_reduce(&wide).unwrap();
    team.all_reduce(&narrow).unwrap();
    let sum = 0.1 + 1.1 + 2.1;
    assert!(wide.to_vec::<f64>() == [sum, -sum] && narrow.to_vec::<bf16>() == [bf16::from_f32(6.0)]);
    let t = tensor(&numbers(rank, 5_000_001));
    team.broadcast(&t).unwrap();
    assert_eq!(bits(&t.to_vec::<f32>()), bits(&numbers(0, 5_000_001)));
    // Nothing, and more than is moved at once.
    let all = team.exchange(&vec![rank as u8; rank * 7_000_000]).unwrap();
    assert!(all.iter().enumerate().all(|(i, one)| one.len() == i * 7_000_000 && one.iter().all(|b| *b == i as u8)));
    assert_eq!(team.tell(format!("from {rank}").as_bytes()).unwrap(), b"from 0");
    team.barrier().unwrap();
    // Ranks that do different things, or have different lengths.
    let one = tensor(&[1.0, 2.0, 3.0]);
    let text = failure(if rank == 1 { team.all_gather(&one) } else { team.all_reduce(&one) });
    assert!(text.starts_with("rank 1: is not where the other ranks are"), "{text}");
    let text = failure(team.broadcast(&one.slice(0..if rank == 2 { 1 } else { 3 })));
    assert!(text.starts_with("rank 2: is not where the other ranks are"), "{text}");
    team.end().unwrap();
    assert!(failure(team.barrier()).starts_with("MPI has ended"));
    leave();
}

#[test]
fn ranks_of_mpirun_train_what_one_rank_and_ranks_over_tcp_train() {
    let world = World::new();
    let run = |out: &str, ranks, more: &[&str]| {
        let mut command = trained(&world, ranks, out, more)?;
        // Nothing but MPI tells where rank 0 is.
        command.env_remove("MASTER_ADDR").env_remove("MASTER_PORT");
        Some(good(&mut command))
    };
    let Some(said) = run("two", 2, &[]) else { return };
    assert!(stderr(&said).contains("(Open MPI), over MPI; rank 0 at 127.0.0.1:"), "{}", stderr(&said));
    run("again", 2, &["-q"]);
    good(&mut world.train("tcp", &["-q", "--ranks", "2"]));
    good(&mut world.train("alone", &["-q", "--batch-size", "8"]));
    let [two, again, tcp, alone] = ["two", "again", "tcp", "alone"].map(|out| world.path(out));
    assert_same_bits(&again, &two);
    assert_same_bits(&tcp, &two);
    assert_same_training(&two, &alone, &[]);
    run("three", 3, &["-q", "--batch-size", "2", "--device", "emulator", "--precision", "fp32", "--steps", "2"]);
    let more = ["-q", "--batch-size", "6", "--device", "emulator", "--precision", "fp32", "--steps", "2"];
    good(&mut world.train("one", &more));
    assert_same_training(&world.path("three"), &world.path("one"), &[]);
}

#[test]
fn a_rank_of_mpirun_that_fails_ends_all_and_is_named() {
    let world = World::new();
    let base = ["-q", "--batch-size", "2", "--steps", "100000", "--eval-every", "0", "--collective-timeout", "1"];
    for (victim, name, words) in [
        (0, "-KILL", "rank 0: its process ended"),
        (2, "-KILL", "rank 2: its process ended"),
        (0, "-STOP", "rank 0: has given no sign of life for 1 s"),
        (1, "-STOP", "rank 1: has given no sign of life for 1 s"),
    ] {
        let name_of_run = format!("out{victim}{name}");
        let Some(mut command) = trained(&world, 3, &name_of_run, &base) else { return };
        let child = started(&mut command);
        wait_for("a checkpoint", || world.path(&name_of_run).join("checkpoints/latest").exists());
        let (ranks, began) = (children(child.id()), Instant::now());
        assert_eq!(ranks.len(), 3);
        signal(ranks[victim], name);
        let done = child.wait_with_output().unwrap();
        assert!(began.elapsed() < Duration::from_secs(10), "{name} {victim}: {:?}", began.elapsed());
        let said = errors(&done);
        assert!(!said.is_empty() && !done.status.success(), "{name} {victim}: {}", stderr(&done));
        assert!(said.iter().all(|line| line.starts_with(&format!("error: {words}"))), "{name} {victim}: {said:?}");
        assert!(ranks.iter().all(|pid| !runs(*pid)), "a rank is left");
    }
    // An error that a rank tells.
    let (out, blocked) = (world.path("blocked"), world.path("blocked/checkpoints"));
    std::fs::create_dir(&out).unwrap();
    std::fs::write(&blocked, "").unwrap();
    let Some(mut command) = trained(&world, 2, "blocked", &["-q"]) else { return };
    let said = errors(&command.output().unwrap());
    assert!(!said.is_empty() && said.iter().all(|line| line.starts_with("error: rank 0: ")), "{said:?}");
}
