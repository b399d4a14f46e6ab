//! How the ranks of a run find each other: rank 0 listens, the others come and say who they are.
//!
//! Whoever does not begin as a rank does is sent away and changes nothing. A rank of another program, or with a number that is taken
//! or cannot be, ends the run for all with one line that names it.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::launch::Place;
use super::links::Links;
use super::wire::{self, Failure, Hello, MAGIC, Tag};
use crate::error::{Error, Result};

/// How long someone who comes may take to say who it is.
const GREETING: Duration = Duration::from_secs(5);
/// How often rank 0 looks who has come, and a rank whether rank 0 listens.
const POLL: Duration = Duration::from_millis(20);

/// How long ranks wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For all ranks to come.
    pub rendezvous: Duration,
    /// For a sign of life of a rank that has come.
    pub silence: Duration,
}

/// Brings the ranks together.
///
/// # Errors
/// A rank that does not come, or that does not belong to the others.
pub fn meet(place: &Place, program: &str, patience: Patience) -> Result<Links> {
    let hello = Hello {
        rank: place.rank,
        size: place.size,
        version: env!("CARGO_PKG_VERSION").into(),
        program: program.into(),
    };
    let streams = match place.rank {
        0 => host(listener(place)?, &hello, patience)?,
        _ => vec![(0, join(place, &hello, patience)?)],
    };
    Links::new(place.rank, place.size, streams, patience.silence)
}

/// Listens where the others look for rank 0.
fn listener(place: &Place) -> Result<TcpListener> {
    let refused = |e: &io::Error| {
        let remedy = match e.kind() {
            io::ErrorKind::AddrInUse => "another program has this port: set MASTER_PORT to a free one",
            _ => "set MASTER_ADDR and MASTER_PORT to an address of this machine",
        };
        let cause = format!("rank 0 cannot listen on {}:{}: {e}", place.host, place.port);
        Error::refused(cause).remedy(remedy)
    };
    let began = Instant::now();
    loop {
        match TcpListener::bind((place.host.as_str(), place.port)) {
            Ok(listener) => return Ok(listener),
            // A port that was just given back may take a moment.
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && began.elapsed() < Duration::from_secs(2) => {
                std::thread::sleep(POLL);
            }
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => return Err(refused(&e)),
            // The name may be that of a service in front of this machine.
            Err(_) => {
                let any = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
                return TcpListener::bind((any, place.port))
                    .or_else(|_| TcpListener::bind(("0.0.0.0", place.port)))
                    .map_err(|e| refused(&e));
            }
        }
    }
}

/// What the greeting of one who came says; nothing of one who is no rank.
fn greeting(mut stream: TcpStream, came: &Sender<(TcpStream, Hello)>) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(GREETING))?;
    stream.set_write_timeout(Some(GREETING))?;
    let mut magic = [0; MAGIC.len()];
    stream.read_exact(&mut magic)?;
    if magic != MAGIC {
        return Err(wire::invalid("no rank"));
    }
    match wire::read_greeting(&mut stream)? {
        (Tag::Hello, payload) => {
            let hello = wire::parse(&payload)?;
            // When nobody listens any more the connection closes.
            let _ = came.send((stream, hello));
            Ok(())
        }
        _ => Err(wire::invalid("no greeting")),
    }
}

/// Why a rank cannot take part, if it cannot.
fn objection(own: &Hello, other: &Hello, taken: bool) -> Option<Failure> {
    let (cause, remedy) = if other.version != own.version {
        (format!("is version {} and rank 0 version {}", other.version, own.version), SAME_PROGRAM)
    } else if other.program != own.program {
        ("is another build of the program than rank 0".to_string(), SAME_PROGRAM)
    } else if other.size != own.size {
        (format!("takes there to be {} ranks, rank 0 {}", other.size, own.size), "check the launcher's variables")
    } else if other.rank == 0 || other.rank >= own.size {
        (format!("is not one of {} ranks", own.size), "check the launcher's variables")
    } else if taken {
        ("came twice".to_string(), "check the launcher's variables, and that no other run has the same MASTER_PORT")
    } else {
        return None;
    };
    Some(Failure::new(other.rank, cause, remedy))
}

const SAME_PROGRAM: &str = "start the same program on every rank";

/// Rank 0: waits for the others.
fn host(listener: TcpListener, own: &Hello, patience: Patience) -> Result<Vec<(usize, TcpStream)>> {
    let (send, came) = channel();
    let mut streams: Vec<Option<TcpStream>> = (0..own.size).map(|_| None).collect();
    let give_up = Instant::now() + patience.rendezvous;
    listener
        .set_nonblocking(true)
        .map_err(|e| Error::refused(format!("rank 0 cannot listen: {e}")).remedy("run again"))?;
    let failure = loop {
        let missing: Vec<usize> = (1..own.size).filter(|rank| streams[*rank].is_none()).collect();
        let Some(first) = missing.first() else { break None };
        if Instant::now() > give_up {
            break Some(absent(*first, &missing, own.size, patience));
        }
        if let Ok((stream, _)) = listener.accept() {
            let send = send.clone();
            // Someone who says nothing must not keep the others waiting. Without a thread it is sent away, and comes again if it is one.
            let _ = std::thread::Builder::new().name("greeting".into()).spawn(move || greeting(stream, &send));
            continue;
        }
        match came.recv_timeout(POLL) {
            Ok((mut stream, hello)) => {
                let taken = streams.get(hello.rank).is_some_and(Option::is_some);
                if let Some(failure) = objection(own, &hello, taken) {
                    let _ = refuse(&mut stream, &failure);
                    break Some(failure);
                }
                streams[hello.rank] = Some(stream);
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
    };
    let mut all: Vec<(usize, TcpStream)> =
        streams.into_iter().enumerate().filter_map(|(rank, stream)| Some((rank, stream?))).collect();
    for (rank, stream) in &mut all {
        let told = match &failure {
            Some(failure) => refuse(stream, failure),
            None => stream.write_all(&MAGIC).and_then(|()| wire::write(stream, Tag::Welcome, &[])),
        };
        if let (Err(e), None) = (told, &failure) {
            let cause = format!("left before the run began: {e}");
            return Err(Failure::new(*rank, cause, "see what it said").to_error());
        }
    }
    failure.map_or(Ok(all), |failure| Err(failure.to_error()))
}

/// The ranks that did not come.
fn absent(first: usize, missing: &[usize], size: usize, patience: Patience) -> Failure {
    let others = match missing.len() {
        1 => String::new(),
        n => format!(", nor did {} others", n - 1),
    };
    let cause = format!("did not come within {} s{others}", patience.rendezvous.as_secs_f64());
    let remedy = format!(
        "start all {size} ranks; where the launcher's variables are not meant for this run, give --ranks 1 to train alone"
    );
    Failure::new(first, cause, remedy)
}

/// Every other rank: comes to rank 0, and waits until all have come.
fn join(place: &Place, own: &Hello, patience: Patience) -> Result<TcpStream> {
    let give_up = Instant::now() + patience.rendezvous;
    let unreachable = |why: &str| {
        let address = format!("{}:{}", place.host, place.port);
        let cause = format!("did not answer at {address} within {} s: {why}", patience.rendezvous.as_secs_f64());
        let failure = Failure::new(0, cause, "check MASTER_ADDR and MASTER_PORT, and that rank 0 was started");
        failure.to_error()
    };
    let mut stream = loop {
        match connect(place) {
            Ok(stream) => break stream,
            Err(e) if Instant::now() > give_up => return Err(unreachable(&e.to_string())),
            Err(_) => std::thread::sleep(POLL),
        }
    };
    // A little longer than rank 0 waits, which knows who is missing.
    let left = give_up.saturating_duration_since(Instant::now()) + patience.silence;
    let mut greet = || -> io::Result<(Tag, Vec<u8>)> {
        stream.set_write_timeout(Some(GREETING))?;
        stream.set_read_timeout(Some(left))?;
        stream.write_all(&MAGIC)?;
        wire::write_json(&mut stream, Tag::Hello, own)?;
        answer(&stream)
    };
    match greet() {
        Ok((Tag::Welcome, _)) => Ok(stream),
        Ok((Tag::Failed, payload)) => match wire::parse::<Failure>(&payload) {
            Ok(failure) => Err(failure.to_error()),
            Err(e) => Err(unreachable(&e.to_string())),
        },
        Ok(_) => Err(unreachable("what answers there is no rank 0")),
        Err(e) if e.kind() == io::ErrorKind::InvalidData => Err(unreachable("what answers there is no rank 0")),
        Err(e) => Err(unreachable(&e.to_string())),
    }
}

/// What rank 0 answers.
fn answer(mut stream: &TcpStream) -> io::Result<(Tag, Vec<u8>)> {
    let mut magic = [0; MAGIC.len()];
    stream.read_exact(&mut magic)?;
    if magic != MAGIC {
        return Err(wire::invalid("no rank 0"));
    }
    wire::read_greeting(&mut stream)
}

/// Refuses one who came, or all who have come.
fn refuse(stream: &mut TcpStream, failure: &Failure) -> io::Result<()> {
    stream.write_all(&MAGIC)?;
    wire::write_json(stream, Tag::Failed, failure)
}

fn connect(place: &Place) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in (place.host.as_str(), place.port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, Duration::from_secs(2)) {
            Ok(stream) => return Ok(stream),
            Err(e) => last = e,
        }
    }
    Err(last)
}
