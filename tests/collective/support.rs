//! Ranks as threads of the test, over the real connections.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use retromae_engine::Result;
use retromae_engine::train::collective::launch::{Place, Source};
use retromae_engine::train::collective::rendezvous::{Patience, meet};
use retromae_engine::train::collective::tcp::Tcp;

/// Times short enough for a test.
pub const PATIENCE: Patience = Patience { rendezvous: Duration::from_secs(10), silence: Duration::from_secs(1) };

/// Rank `rank` of `size` ranks on this machine.
pub fn place(rank: usize, size: usize, port: u16) -> Place {
    Place { rank, size, local_rank: rank, host: "127.0.0.1".into(), port, source: Source::Torchrun }
}

/// A port that is free now, and that no connection is given by chance: below those which the system chooses from.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id() * 61;
    (0..20_000)
        .map(|_| 10_000 + ((first + NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000) as u16)
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .unwrap()
}

/// A connection to rank 0, as soon as it listens.
pub fn connect(port: u16) -> TcpStream {
    (0..500)
        .find_map(|_| {
            TcpStream::connect(("127.0.0.1", port)).ok().or_else(|| {
                std::thread::sleep(Duration::from_millis(10));
                None
            })
        })
        .unwrap()
}

/// What every rank's `work` gives, in the order of the ranks.
pub fn ranks<T: Send>(size: usize, work: impl Fn(&Arc<Tcp>) -> T + Sync) -> Vec<T> {
    let port = free_port();
    let rank = |rank| {
        let links = meet(&place(rank, size, port), "test", PATIENCE).unwrap();
        let tcp = Arc::new(Tcp::new(links));
        let result = work(&tcp);
        tcp.links().leave(None);
        result
    };
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..size).map(|r| scope.spawn(move || rank(r))).collect();
        all.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The message of a failure.
#[track_caller]
pub fn failure<T>(result: Result<T>) -> String {
    result.err().expect("a failure").to_string()
}
