//! The bytes between two ranks: a greeting, then frames `[u32 length][u8 kind][payload]`, little endian.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::error::{Error, Kind};

/// What both sides of a connection begin with: whoever sends anything else is no rank.
pub(super) const MAGIC: [u8; 8] = *b"RETROMA\x01";
/// Longest frame of a rank, and longest of one that is not yet known to be a rank.
const LONGEST: usize = 4 << 20;
const LONGEST_GREETING: usize = 4096;
/// Bytes of a message in one frame.
pub(super) const CHUNK: usize = 1 << 20;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tag {
    /// A [`Hello`].
    Hello = 1,
    /// All ranks have come.
    Welcome = 2,
    /// A sign of life.
    Beat = 3,
    /// The beginning of a message: which operation, and how many bytes follow.
    Begin = 4,
    /// Bytes of a message.
    Data = 5,
    /// A [`Failure`].
    Failed = 6,
    /// This rank has finished its work.
    Bye = 7,
}

impl Tag {
    fn of(byte: u8) -> Option<Tag> {
        [Tag::Hello, Tag::Welcome, Tag::Beat, Tag::Begin, Tag::Data, Tag::Failed, Tag::Bye]
            .into_iter()
            .find(|tag| *tag as u8 == byte)
    }
}

/// Who comes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Its number.
    pub rank: usize,
    /// How many ranks it takes there to be.
    pub size: usize,
    /// Version of the engine.
    pub version: String,
    /// Digest of the program's file.
    pub program: String,
}

/// Why a run of many ranks ends: which rank failed, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The rank.
    pub rank: usize,
    /// The cause, with file and place.
    pub cause: String,
    /// What to do.
    pub remedy: String,
    /// The exit code.
    pub code: i32,
}

impl Failure {
    /// Of a rank.
    pub fn new(rank: usize, cause: impl Into<String>, remedy: impl Into<String>) -> Self {
        Failure { rank, cause: cause.into(), remedy: remedy.into(), code: 1 }
    }

    /// The error that `rank` ended with.
    pub fn of(rank: usize, error: &Error) -> Self {
        let (text, remedy) = (error.to_string(), error.advice());
        let cause = text.strip_suffix(remedy).map_or(text.as_str(), |cause| cause.trim_end_matches("; "));
        // An error that names a rank is that rank's, whoever found it.
        let named = cause.strip_prefix("rank ").and_then(|rest| rest.split_once(": "));
        let named = named.and_then(|(number, cause)| Some((number.parse().ok()?, cause)));
        let (rank, cause) = named.unwrap_or((rank, cause));
        Failure { rank, cause: cause.into(), remedy: remedy.into(), code: error.exit_code() }
    }

    /// For the other ranks.
    pub fn to_error(&self) -> Error {
        let kind = match self.code {
            2 => Kind::Usage,
            code if code > 128 => Kind::Signal(code - 128),
            _ => Kind::Refused,
        };
        Error::new(kind, format!("rank {}: {}", self.rank, self.cause)).remedy(self.remedy.clone())
    }
}

/// Adds a frame to others.
fn add(frames: &mut Vec<u8>, tag: Tag, payload: &[u8]) {
    frames.reserve(5 + payload.len());
    frames.extend((payload.len() as u32).to_le_bytes());
    frames.push(tag as u8);
    frames.extend(payload);
}

/// Writes a frame in one piece.
pub(super) fn write(to: &mut impl Write, tag: Tag, payload: &[u8]) -> io::Result<()> {
    let mut frame = Vec::new();
    add(&mut frame, tag, payload);
    to.write_all(&frame)
}

/// The frame that begins a message of `bytes` bytes for operation `operation`.
pub(super) fn begin(operation: u8, bytes: usize) -> Vec<u8> {
    [&[operation][..], &(bytes as u64).to_le_bytes()].concat()
}

/// The frames of a whole message.
pub(super) fn message(operation: u8, bytes: &[u8]) -> Vec<u8> {
    let mut frames = Vec::new();
    add(&mut frames, Tag::Begin, &begin(operation, bytes.len()));
    bytes.chunks(CHUNK).for_each(|chunk| add(&mut frames, Tag::Data, chunk));
    frames
}

/// Writes a frame of JSON.
pub(super) fn write_json(to: &mut impl Write, tag: Tag, value: &impl Serialize) -> io::Result<()> {
    write(to, tag, &serde_json::to_vec(value)?)
}

/// Reads a frame of a rank.
pub(super) fn read(from: &mut impl Read) -> io::Result<(Tag, Vec<u8>)> {
    read_up_to(from, LONGEST)
}

/// Reads a frame of someone who may be no rank.
pub(super) fn read_greeting(from: &mut impl Read) -> io::Result<(Tag, Vec<u8>)> {
    read_up_to(from, LONGEST_GREETING)
}

fn read_up_to(from: &mut impl Read, most: usize) -> io::Result<(Tag, Vec<u8>)> {
    let mut head = [0; 5];
    from.read_exact(&mut head)?;
    let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let tag = Tag::of(head[4]).filter(|_| length <= most).ok_or_else(|| invalid("no frame of a rank"))?;
    let mut payload = vec![0; length];
    from.read_exact(&mut payload)?;
    Ok((tag, payload))
}

/// The value in a frame of JSON.
pub(super) fn parse<T: DeserializeOwned>(payload: &[u8]) -> io::Result<T> {
    serde_json::from_slice(payload).map_err(|_| invalid("no message of a rank"))
}

/// Bytes that no rank sends.
pub(super) fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_as_written_and_garbage_is_refused() -> io::Result<()> {
        let mut bytes = Vec::new();
        write(&mut bytes, Tag::Data, b"abc")?;
        write(&mut bytes, Tag::Beat, b"")?;
        let mut from = bytes.as_slice();
        assert_eq!(read(&mut from)?, (Tag::Data, b"abc".to_vec()));
        assert_eq!(read(&mut from)?, (Tag::Beat, Vec::new()));
        assert!(read(&mut from).is_err());
        for garbage in [b"GET / HTTP/1.1\r\n\r\n".as_slice(), &[0; 64], &[255; 64]] {
            assert!(read(&mut &*garbage).is_err());
            assert!(read_greeting(&mut &*garbage).is_err());
        }
        let long = [(LONGEST_GREETING as u32 + 1).to_le_bytes().as_slice(), &[1], &[0; 8192]].concat();
        assert!(read_greeting(&mut long.as_slice()).is_err());
        Ok(())
    }

    #[test]
    fn a_failure_names_its_rank_and_keeps_cause_remedy_and_code() {
        let error = Error::refused("too short").path("a.tsv").line(3).remedy("fix it");
        let failure = Failure::of(2, &error);
        assert_eq!(failure.to_error().to_string(), "rank 2: a.tsv:3: too short; fix it");
        assert_eq!(Failure::of(1, &failure.to_error()), failure);
        assert_eq!(Failure::of(1, &Error::usage("no")).to_error().exit_code(), 2);
        assert_eq!(Failure::of(1, &Error::usage("no")).to_error().to_string(), "rank 1: no");
        assert_eq!(Failure::of(1, &Error::new(Kind::Signal(15), "x")).to_error().exit_code(), 143);
    }
}
