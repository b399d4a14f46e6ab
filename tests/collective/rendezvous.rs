//! Who comes to a run, who does not, and how the others learn of a rank's end.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use retromae_engine::error::Error;
use retromae_engine::train::collective::Collective;
use retromae_engine::train::collective::links::Links;
use retromae_engine::train::collective::rendezvous::{Patience, meet};
use retromae_engine::train::collective::tcp::Tcp;

use crate::support::{PATIENCE, connect, failure, free_port, place, ranks};

/// A greeting as a rank sends it.
fn greet(stream: &mut TcpStream, rank: usize, size: usize, version: &str) {
    let version = if version.is_empty() { env!("CARGO_PKG_VERSION") } else { version };
    let hello = format!(r#"{{"rank":{rank},"size":{size},"version":"{version}","program":"test"}}"#);
    let mut bytes = b"RETROMA\x01".to_vec();
    bytes.extend((hello.len() as u32).to_le_bytes());
    bytes.push(1);
    bytes.extend(hello.as_bytes());
    stream.write_all(&bytes).unwrap();
}

/// Ranks whose connections `work` has, and ends as it likes.
fn linked<T: Send>(size: usize, work: impl Fn(Links) -> T + Sync) -> Vec<T> {
    let port = free_port();
    let rank = |rank| work(meet(&place(rank, size, port), "test", PATIENCE).unwrap());
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..size).map(|r| scope.spawn(move || rank(r))).collect();
        all.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn strangers_on_the_port_change_nothing() {
    let port = free_port();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..2)
            .map(|rank| {
                scope.spawn(move || {
                    // The strangers come first.
                    std::thread::sleep(Duration::from_millis(300 * rank as u64));
                    let team = Tcp::new(meet(&place(rank, 2, port), "test", PATIENCE).unwrap());
                    let all = team.exchange(&[rank as u8]).unwrap();
                    team.links().leave(None);
                    all
                })
            })
            .collect();
        let mut silent = connect(port);
        let mut http = connect(port);
        http.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut cut = connect(port);
        cut.write_all(b"RETROMA\x01\xff\xff\xff\xff\x01").unwrap();
        let mut json = connect(port);
        json.write_all(b"RETROMA\x01\x02\x00\x00\x00\x01{}").unwrap();
        drop(connect(port));
        for rank in ranks {
            assert_eq!(rank.join().unwrap(), [[0], [1]]);
        }
        for stranger in [&mut silent, &mut http, &mut cut, &mut json] {
            let mut answer = Vec::new();
            // Closed or reset, but never answered.
            let _ = stranger.read_to_end(&mut answer);
            assert!(answer.is_empty());
        }
    });
}

#[test]
fn who_does_not_belong_ends_the_run_with_its_name() {
    let refused = |come: &(dyn Fn(u16) + Sync)| {
        let port = free_port();
        std::thread::scope(|scope| {
            let host = scope.spawn(move || meet(&place(0, 3, port), "test", PATIENCE));
            let other = scope.spawn(move || meet(&place(1, 3, port), "test", PATIENCE));
            std::thread::sleep(Duration::from_millis(200));
            come(port);
            let texts = [host, other].map(|rank| failure(rank.join().unwrap()));
            assert_eq!(texts[0], texts[1]);
            texts[0].clone()
        })
    };
    let stranger = |rank, size, version: &'static str| {
        move |port| {
            let mut stream = connect(port);
            greet(&mut stream, rank, size, version);
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            assert!(String::from_utf8_lossy(&answer).contains(&format!(r#""rank":{rank}"#)));
        }
    };
    assert_eq!(
        refused(&stranger(2, 3, "0.0.7")),
        format!(
            "rank 2: is version 0.0.7 and rank 0 version {}; start the same program on every rank",
            env!("CARGO_PKG_VERSION")
        )
    );
    assert!(
        refused(&stranger(2, 4, "")).starts_with("rank 2: takes there to be 4 ranks, rank 0 3; check the launcher")
    );
    assert!(refused(&stranger(1, 3, "")).starts_with("rank 1: came twice; check the launcher"));
    assert!(refused(&stranger(7, 3, "")).starts_with("rank 7: is not one of 3 ranks; check the launcher"));
    let program = refused(&|port| {
        let text = failure(meet(&place(2, 3, port), "another", PATIENCE));
        assert_eq!(text, "rank 2: is another build of the program than rank 0; start the same program on every rank");
    });
    assert!(program.starts_with("rank 2: is another build"));
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let short = Patience { rendezvous: Duration::from_millis(600), ..PATIENCE };
    let port = free_port();
    let texts = std::thread::scope(|scope| {
        [0, 2]
            .map(|rank| scope.spawn(move || meet(&place(rank, 4, port), "test", short)))
            .map(|r| failure(r.join().unwrap()))
    });
    assert_eq!(
        texts[0],
        "rank 1: did not come within 0.6 s, nor did 1 others; start all 4 ranks; where the launcher's variables are not meant for \
         this run, give --ranks 1 to train alone"
    );
    assert_eq!(texts[0], texts[1]);
    let lonely = failure(meet(&place(1, 2, port), "test", short));
    assert!(lonely.starts_with("rank 0: did not answer at 127.0.0.1:"), "{lonely}");
}

#[test]
fn a_late_rank_is_waited_for() {
    let got = ranks(2, |team| {
        // Longer than the time after which a silent rank has failed.
        if team.rank() == 1 {
            std::thread::sleep(PATIENCE.silence + Duration::from_millis(500));
        }
        team.exchange(&[team.rank() as u8]).map_err(|e| e.to_string())
    });
    assert_eq!(got, [Ok(vec![vec![0], vec![1]]), Ok(vec![vec![0], vec![1]])]);
}

#[test]
fn a_rank_that_breaks_off_ends_all() {
    for culprit in [0, 2] {
        let began = Instant::now();
        let got = linked(4, |links| {
            if links.rank() == culprit {
                drop(links);
                return String::new();
            }
            failure(Tcp::new(links).barrier())
        });
        assert!(began.elapsed() < Duration::from_secs(3));
        for (rank, text) in got.iter().enumerate().filter(|(rank, _)| *rank != culprit) {
            assert!(text.starts_with(&format!("rank {culprit}: its process ended")), "{rank}: {text}");
        }
    }
}

#[test]
fn the_error_of_a_rank_is_that_of_all() {
    let got = linked(3, |links| {
        if links.rank() == 1 {
            let error = Error::refused("the disk is full").path("out").remedy("free space");
            links.leave(Some(&error));
            return error.to_string();
        }
        failure(Tcp::new(links).barrier())
    });
    assert_eq!(got[1], "out: the disk is full; free space");
    assert_eq!([&got[0], &got[2]], ["rank 1: out: the disk is full; free space"; 2]);
}

#[test]
fn a_silent_rank_ends_the_others_and_who_only_computes_is_ended_by_the_hook() {
    let port = free_port();
    let (send, hooked) = channel();
    std::thread::scope(|scope| {
        let host = scope.spawn(move || {
            let links = meet(&place(0, 3, port), "test", PATIENCE).unwrap();
            failure(Tcp::new(links).barrier())
        });
        scope.spawn(move || {
            let links = meet(&place(1, 3, port), "test", PATIENCE).unwrap();
            let (said, text) = channel();
            links.on_failure(move |e| said.send(e.to_string()).unwrap());
            // Computes, and does not look.
            send.send(text.recv_timeout(Duration::from_secs(8)).unwrap()).unwrap();
            drop(links);
        });
        let mut stopped = connect(port);
        greet(&mut stopped, 2, 3, "");
        let began = Instant::now();
        let expected =
            "rank 2: has given no sign of life for 1 s; see whether its machine hangs or its process is stopped";
        let text = host.join().unwrap();
        assert!(text.starts_with(expected), "{text}");
        assert!(began.elapsed() < PATIENCE.silence + Duration::from_secs(2));
        let text = hooked.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(text.starts_with(expected), "{text}");
        drop(stopped);
    });
}
