//! Ranks whose GPUs are connected by NCCL: on the fake driver and a fake NCCL, each rank a process.

use std::sync::Arc;
use std::time::Duration;

use retromae_engine::Result;
use retromae_engine::device::Device;
use retromae_engine::train::collective::rendezvous::{Patience, meet};
use retromae_engine::train::collective::tcp::Tcp;
use retromae_engine::train::collective::{Team, launch, nccl};

use crate::fakes::{Libraries, Said, child, doctor};
use crate::shared_steps;

/// What a child does as a rank.
pub fn scenario(name: &str, device: Device) -> Result<String> {
    let place = launch::detect(&|name| std::env::var(name).ok())?.expect("a rank");
    let patience = Patience { rendezvous: Duration::from_secs(20), silence: Duration::from_secs(5) };
    let links = meet(&place, "test", patience)?;
    links.on_failure(|e| {
        println!("said: error: {e}");
        std::process::exit(0);
    });
    let tcp = Arc::new(Tcp::new(links));
    let done = match name {
        "ranks" => together(&tcp, device),
        "beside" => shared_steps::beside(&tcp, device),
        _ => shared_steps::steps(&tcp, device, name == "too early"),
    };
    tcp.links().leave(done.as_ref().err());
    done
}

fn together(tcp: &Arc<Tcp>, device: Device) -> Result<String> {
    let mut told = String::new();
    let team = nccl::team(&Team::new(tcp.clone()), device, &mut |line| told = line)?;
    let r = team.rank() as f32;
    let of = |values: &[f32]| device.tensor(values);
    let (sum, all, parts, first) =
        (of(&[1.0 + r, 0.5]), of(&[r, r + 10.0]), of(&[1.0, 2.0 + r, 3.0, 4.0 + r]), of(&[r + 7.0]));
    team.all_reduce(&sum)?;
    team.all_gather(&all)?;
    team.reduce_scatter(&parts)?;
    team.broadcast(&first)?;
    // What is on the host goes another way.
    let host = Device::Cpu.tensor(&[r]);
    team.all_reduce(&host)?;
    let own = parts.slice(2 * team.rank()..2 * team.rank() + 2);
    let all = [sum, all, own, first, host].map(|t| t.to_vec::<f32>());
    device.check()?;
    Ok(format!("{all:?} {told}"))
}

/// Both ranks; none in a build without kernels for a GPU.
fn both(libraries: [Libraries; 2], failing: [&str; 2]) -> Option<[Said; 2]> {
    both_of("ranks", libraries, failing, &[])
}

/// The same in another scenario, on fakes that are told more.
pub fn both_of(
    scenario: &str,
    libraries: [Libraries; 2],
    failing: [&str; 2],
    more: &[(&str, &str)],
) -> Option<[Said; 2]> {
    let port = std::net::TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    let port = port.expect("a free port").port().to_string();
    let folder = tempfile::tempdir().expect("a folder for the ranks");
    let meeting = folder.path().to_str().expect("a path in UTF-8");
    let rank = |rank: usize| {
        let number = rank.to_string();
        let mut variables = vec![("RANK", number.as_str()), ("LOCAL_RANK", number.as_str()), ("WORLD_SIZE", "2")];
        variables.extend([
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", port.as_str()),
            ("FAKE_GPUS", "2"),
            ("FAKE_RANKS", meeting),
        ]);
        variables.extend((!failing[rank].is_empty()).then_some(("FAKE_FAIL", failing[rank])));
        variables.extend(more);
        child(scenario, libraries[rank], &variables)
    };
    std::thread::scope(|scope| {
        let first = scope.spawn(|| rank(0));
        let second = rank(1);
        Some([first.join().expect("rank 0")?, second?])
    })
}

#[test]
fn gpus_work_together_through_nccl() {
    let Some(said) = both([Libraries::All; 2], [""; 2]) else { return };
    for (rank, Said { lines, log }) in said.iter().enumerate() {
        let own = ["[2.0, 5.0]", "[6.0, 9.0]"][rank];
        assert_eq!(*lines, [format!("[[3.0, 1.0], [0.0, 11.0], {own}, [7.0], [1.0]] ")]);
        let calls: Vec<&str> = log.iter().map(String::as_str).filter(|line| line.starts_with("nccl")).collect();
        let id: &[&str] = if rank == 0 { &["ncclGetUniqueId"] } else { &[] };
        let work = ["ncclCommInitRank", "ncclAllReduce", "ncclAllGather", "ncclReduceScatter", "ncclBroadcast"];
        assert_eq!(calls, [id, &work].concat());
        assert!(
            log.iter().any(|line| line.starts_with("cuDeviceGet ") && line.ends_with(&rank.to_string())),
            "{log:?}"
        );
    }
}

#[test]
fn without_nccl_at_one_rank_all_go_through_the_host() {
    let Some(said) = both([Libraries::All, Libraries::Both], [""; 2]) else { return };
    for (rank, Said { lines, log }) in said.iter().enumerate() {
        let own = ["[2.0, 5.0]", "[6.0, 9.0]"][rank];
        let warning = "rank 1: gradients go through the memory of the host, slowly: NCCL (libnccl.so.2) is not there; pip install";
        assert!(
            lines[0].starts_with(&format!("[[3.0, 1.0], [0.0, 11.0], {own}, [7.0], [1.0]] {warning}")),
            "{lines:?}"
        );
        assert!(!log.iter().any(|line| line.starts_with("nccl")));
    }
}

#[test]
fn a_failure_of_nccl_is_that_of_all_ranks_and_names_one() {
    let cases = [
        (["", "ncclAllReduce:5"], "a sum over ranks: NCCL error 5 (fake failure)", 1),
        (["ncclGetUniqueId:3", ""], "making an id for the ranks: NCCL error 3 (fake failure)", 0),
        (["", "ncclCommInitRank:2"], "connecting the GPUs of all ranks: NCCL error 2 (fake failure)", 1),
    ];
    for (failing, cause, culprit) in cases {
        let Some(said) = both([Libraries::All; 2], failing) else { return };
        let remedy = "run again with NCCL_DEBUG=WARN, which says more";
        assert_eq!(said[culprit].lines, [format!("error: {cause}; {remedy}")]);
        assert_eq!(said[1 - culprit].lines, [format!("error: rank {culprit}: {cause}; {remedy}")]);
    }
}

#[test]
fn doctor_tells_whether_gpus_can_be_connected() {
    let line = |libraries| {
        let told = doctor(libraries, &[]);
        told.lines().find(|line| line.contains("NCCL")).unwrap_or_default().to_string()
    };
    assert_eq!(line(Libraries::All), format!("ok  {:<12} libnccl.so.2", "NCCL"));
    assert!(line(Libraries::Both).starts_with("--  NCCL"));
}
