//! Sums, gathers and messages of ranks.

use std::time::Instant;

use half::bf16;
use retromae_engine::device::{Device, Tensor};
use retromae_engine::train::collective::{Collective, Team};

use crate::support::{failure, ranks};

/// Numbers of a rank whose sum depends on the order in f32.
pub fn numbers(rank: usize, n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7 + rank * 131) as f32).sin() * 10f32.powi((i % 9) as i32 - 4)).collect()
}

/// Their sum in the order of the ranks.
pub fn sums(size: usize, n: usize) -> Vec<f32> {
    let all: Vec<_> = (0..size).map(|rank| numbers(rank, n)).collect();
    (0..n).map(|i| all[1..].iter().fold(all[0][i], |sum, one| sum + one[i])).collect()
}

pub fn tensor(values: &[f32]) -> Tensor {
    Device::Cpu.tensor(values)
}

#[test]
fn every_rank_gets_the_sum_in_the_order_of_the_ranks() {
    // One element, a few, and more than a frame holds.
    for (size, n) in [(2, 1), (4, 1000), (3, 600_001)] {
        let got = ranks(size, |team| {
            let t = tensor(&numbers(team.rank(), n));
            team.all_reduce(&t).unwrap();
            t.to_vec::<f32>()
        });
        let expected = sums(size, n);
        assert!(got.iter().all(|one| one.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits())), "{size} {n}");
        assert!(got.iter().all(|one| one.len() == n));
    }
}

#[test]
fn other_types_are_summed_too() {
    let got = ranks(3, |team| {
        let (x, y) = (0.1 + team.rank() as f64, bf16::from_f32(1.0 + team.rank() as f32));
        let (wide, narrow) = (Device::Cpu.tensor(&[x, -x]), Device::Cpu.tensor(&[y]));
        team.all_reduce(&wide).unwrap();
        team.all_reduce(&narrow).unwrap();
        (wide.to_vec::<f64>(), narrow.to_vec::<bf16>())
    });
    let sum = 0.1 + 1.1 + 2.1;
    assert!(got.iter().all(|(wide, narrow)| *wide == [sum, -sum] && *narrow == [bf16::from_f32(6.0)]));
}

#[test]
fn parts_are_gathered_and_scattered_in_place() {
    let (size, part) = (4, 5);
    let got = ranks(size, |team| {
        let own = team.rank() * part..(team.rank() + 1) * part;
        let gathered = tensor(&vec![-1.0; size * part]);
        gathered.slice(own.clone()).upload(&numbers(team.rank(), part));
        team.all_gather(&gathered).unwrap();
        let scattered = tensor(&numbers(team.rank(), size * part));
        team.reduce_scatter(&scattered).unwrap();
        (gathered.to_vec::<f32>(), scattered.slice(own).to_vec::<f32>())
    });
    let all: Vec<f32> = (0..size).flat_map(|rank| numbers(rank, part)).collect();
    let sums = sums(size, size * part);
    for (rank, (gathered, scattered)) in got.into_iter().enumerate() {
        assert_eq!(gathered, all, "rank {rank}");
        assert_eq!(scattered, sums[rank * part..(rank + 1) * part], "rank {rank}");
    }
}

#[test]
fn rank_0_is_copied_and_messages_come_in_order() {
    let got = ranks(3, |team| {
        let t = tensor(&numbers(team.rank(), 9));
        team.broadcast(&t).unwrap();
        let own = vec![team.rank() as u8; team.rank() * 700_000];
        let all = team.exchange(&own).unwrap();
        let told = team.tell(format!("from {}", team.rank()).as_bytes()).unwrap();
        team.barrier().unwrap();
        (t.to_vec::<f32>(), all.iter().map(Vec::len).collect::<Vec<_>>(), all[2].iter().all(|b| *b == 2), told)
    });
    assert!(got.iter().all(|one| *one == (numbers(0, 9), vec![0, 700_000, 1_400_000], true, b"from 0".to_vec())));
}

#[test]
fn counts_and_losses_are_those_of_all_ranks() {
    let port_free = |bad: Option<usize>| {
        ranks(3, |team| {
            let own = if bad == Some(team.rank()) { f64::NAN } else { 0.1 * (team.rank() + 1) as f64 };
            let all = team.exchange(&own.to_le_bytes()).unwrap();
            all.iter().map(|one| f64::from_le_bytes(one.as_slice().try_into().unwrap())).collect::<Vec<_>>()
        })
    };
    assert_eq!(port_free(None), vec![vec![0.1, 0.2, 0.1 * 3.0]; 3]);
    assert!(port_free(Some(1)).iter().all(|all| all[1].is_nan() && all[2] == 0.1 * 3.0));
    let alone = Team::default();
    assert_eq!(alone.totals([5]).unwrap(), [5]);
}

#[test]
fn ranks_that_do_different_things_are_told_so() {
    let others = ranks(2, |team| match team.rank() {
        0 => failure(team.all_reduce(&tensor(&[1.0, 2.0]))),
        _ => failure(team.all_gather(&tensor(&[1.0, 2.0]))),
    });
    assert!(others[0].starts_with("rank 1: is not where the other ranks are"), "{others:?}");
    let lengths = ranks(2, |team| match team.rank() {
        0 => failure(team.all_reduce(&tensor(&[1.0, 2.0]))),
        _ => failure(team.all_reduce(&tensor(&[1.0]))),
    });
    assert!(lengths[0].starts_with("rank 1: is not where the other ranks are"), "{lengths:?}");
}

/// Ranks as many as a cluster has, all in this process. How long a message takes is printed (`--nocapture`).
#[test]
fn messages_of_a_hundred_ranks_come_in_order() {
    for size in [64, 128] {
        let rounds = 30;
        let times = ranks(size, |team| {
            team.barrier().unwrap();
            let began = Instant::now();
            for round in 0..rounds {
                let own = (round * size + team.rank()) as u64;
                let all = team.exchange(&own.to_le_bytes()).unwrap();
                let expected = |(rank, one): (usize, &Vec<u8>)| *one == ((round * size + rank) as u64).to_le_bytes();
                assert!(all.len() == size && all.iter().enumerate().all(expected));
            }
            began.elapsed() / rounds as u32
        });
        let sums = ranks(size, |team| {
            let team = Team::new(team.clone());
            let own = if team.rank() == 3 { f64::NAN } else { team.rank() as f64 };
            (team.totals([1, team.rank()]).unwrap(), team.sums([own], 0.0).unwrap().1, team.sums([0.5], 0.0).unwrap().0)
        });
        assert!(sums.iter().all(|one| *one == ([size, size * (size - 1) / 2], vec![3], [0.5 * size as f64])));
        println!("{size} ranks in this process: {} us a message", times[0].as_micros());
    }
}
