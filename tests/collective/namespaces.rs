//! Ranks with a network between them: two network namespaces of Linux, joined by a pair of virtual Ethernet devices.

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::failures::{rank, started, wait_for};
use crate::runs::{assert_same_bits, assert_same_training, good};
use crate::world::{World, stderr};

const PORT: u16 = 29_500;

/// Two namespaces, each with an end of a cable; gone when this is dropped.
struct Network {
    names: [String; 2],
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let done = Command::new("ip").args(arguments).output().map_err(|e| format!("ip (Debian: iproute2): {e}"))?;
    match done.status.success() {
        true => Ok(()),
        false => Err(format!("ip {}: {}", arguments.join(" "), stderr(&done).trim())),
    }
}

impl Network {
    /// The namespaces; none where this process may not make them, which it says.
    fn new(test: &str) -> Option<Network> {
        let names = [0, 1].map(|i| format!("retromae-{}-{test}-{i}", std::process::id()));
        // Dropped, it takes away what was made before something failed.
        let network = Network { names };
        match network.made() {
            Ok(()) => Some(network),
            Err(e) => {
                eprintln!("left out: no network namespaces here: {e}");
                None
            }
        }
    }

    fn made(&self) -> Result<(), String> {
        let [a, b] = &self.names;
        ip(&["netns", "add", a])?;
        ip(&["netns", "add", b])?;
        ip(&["-n", a, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", b])?;
        for (i, name) in self.names.iter().enumerate() {
            ip(&["-n", name, "addr", "add", &format!("{}/24", address(i)), "dev", "cable"])?;
            ip(&["-n", name, "link", "set", "cable", "up"])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
        }
        Ok(())
    }

    /// Rank `i` of two, in its namespace.
    fn rank(&self, i: usize, command: &Command) -> Command {
        let mut inside = Command::new("ip");
        inside.args(["netns", "exec", &self.names[i]]).arg(command.get_program()).args(command.get_args());
        let mut inside = rank(inside, i, 2, PORT);
        inside.env("MASTER_ADDR", address(0)).env("LOCAL_RANK", "0");
        inside
    }

    /// What both ranks end with.
    fn run(&self, command: &Command) -> [Output; 2] {
        [0, 1].map(|i| started(&mut self.rank(i, command))).map(|child| child.wait_with_output().unwrap())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.names {
            // With its namespace the cable goes, too.
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}

fn address(i: usize) -> String {
    format!("10.77.0.{}", i + 1)
}

#[test]
fn ranks_with_a_network_between_them_train_what_one_rank_trains() {
    let Some(network) = Network::new("same") else { return };
    let world = World::new();
    for out in ["two", "again"] {
        for done in network.run(&world.train(out, &["-q"])) {
            assert!(done.status.success(), "{}", stderr(&done));
        }
    }
    good(&mut world.train("near", &["-q", "--ranks", "2"]));
    good(&mut world.train("alone", &["-q", "--batch-size", "8"]));
    let [two, again, near, alone] = ["two", "again", "near", "alone"].map(|out| world.path(out));
    assert_same_bits(&again, &two);
    assert_same_bits(&near, &two);
    assert_same_training(&two, &alone, &[]);
}

#[test]
fn a_cable_that_is_cut_ends_all_ranks_with_one_line() {
    let Some(network) = Network::new("cut") else { return };
    let world = World::new();
    let long = ["-q", "--steps", "100000", "--save-every", "20", "--eval-every", "0", "--collective-timeout", "1"];
    // The end of rank 0, and that of rank 1.
    for cut in [0, 1] {
        let out = format!("out{cut}");
        let command = world.train(&out, &long);
        let both = [0, 1].map(|i| started(&mut network.rank(i, &command)));
        wait_for("a checkpoint", || Path::new(&world.path(&out)).join("checkpoints/latest").exists());
        ip(&["-n", &network.names[cut], "link", "set", "cable", "down"]).unwrap();
        let began = Instant::now();
        for (own, child) in both.into_iter().enumerate() {
            let done = child.wait_with_output().unwrap();
            // Neither can know on which side the cable is cut.
            let (text, words) =
                (stderr(&done), format!("error: rank {}: has given no sign of life for 1 s; ", 1 - own));
            assert!(text.starts_with(&words) && text.lines().count() == 1, "{text}");
            assert_eq!(done.status.code(), Some(1));
        }
        // The timeout and five seconds.
        assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
        ip(&["-n", &network.names[cut], "link", "set", "cable", "up"]).unwrap();
    }
}
