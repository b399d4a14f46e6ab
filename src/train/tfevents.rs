//! TensorBoard event files, written by hand: a record is `u64 length, u32 crc(length), payload, u32 crc(payload)`, the payload a
//! `tensorflow.Event` in protocol-buffer encoding. Only scalars, one text and the session mark are needed.
//!
//! Each process writes a file of its own. One that resumes from step n begins with a session mark at n + 1, at which TensorBoard
//! forgets what an earlier process logged past n.

use std::io::Read;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{IoContext, Result};
use crate::files::disk::{Disk, File};

/// Name of the folder of event files in the output folder.
pub const DIR: &str = "tensorboard";

/// An open event file.
pub struct Events {
    file: File,
}

impl Events {
    /// Creates the event file of this process in `out`, for a run whose next step is `first`.
    pub fn create(disk: &Disk, out: &Path, first: u64) -> Result<Self> {
        let dir = out.join(DIR);
        disk.create_dir(&dir)?;
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = if host.trim().is_empty() { "localhost" } else { host.trim() };
        let name = format!("events.out.tfevents.{}.{host}.{}.0", now() as u64, std::process::id());
        let mut events = Events { file: disk.create(&dir.join(name))? };
        let mut version = Message::default();
        version.double(1, now()).bytes(3, b"brain.Event:2");
        events.record(&version.0)?;
        let mut session = Message::default();
        session.varint(1, 1); // SessionLog.status = START
        let mut event = Message::default();
        event.double(1, now()).varint(2, first).bytes(7, &session.0);
        events.record(&event.0)?;
        Ok(events)
    }

    /// Appends scalars of one step.
    pub fn scalars<'a>(&mut self, step: u64, values: impl IntoIterator<Item = (&'a str, f64)>) -> Result<()> {
        let mut summary = Message::default();
        for (tag, value) in values {
            let mut entry = Message::default();
            entry.bytes(1, tag.as_bytes()).float(2, value as f32);
            summary.bytes(1, &entry.0);
        }
        self.summary(step, &summary)
    }

    /// Appends a text, shown by TensorBoard as Markdown.
    pub fn text(&mut self, step: u64, tag: &str, text: &str) -> Result<()> {
        let [mut plugin, mut metadata, mut dim, mut shape] = [(); 4].map(|()| Message::default());
        plugin.bytes(1, b"text");
        metadata.bytes(1, &plugin.0);
        dim.varint(1, 1);
        shape.bytes(2, &dim.0);
        let mut tensor = Message::default();
        tensor.varint(1, 7).bytes(2, &shape.0).bytes(8, text.as_bytes()); // DT_STRING
        let mut entry = Message::default();
        entry.bytes(1, tag.as_bytes()).bytes(8, &tensor.0).bytes(9, &metadata.0);
        let mut summary = Message::default();
        summary.bytes(1, &entry.0);
        self.summary(step, &summary)
    }

    fn summary(&mut self, step: u64, summary: &Message) -> Result<()> {
        let mut event = Message::default();
        event.double(1, now()).varint(2, step).bytes(5, &summary.0);
        self.record(&event.0)
    }

    /// One write for a whole record, so that a killed process leaves at most one part of a record, at the end.
    fn record(&mut self, payload: &[u8]) -> Result<()> {
        let length = (payload.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(payload.len() + 16);
        record.extend_from_slice(&length);
        record.extend_from_slice(&masked_crc(&length).to_le_bytes());
        record.extend_from_slice(payload);
        record.extend_from_slice(&masked_crc(payload).to_le_bytes());
        self.file.put(&record)
    }
}

/// A process that ran a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Beginning {
    /// When it began, in seconds since 1970.
    pub ts: f64,
    /// The step it went on from; 0 at the start.
    pub step: u64,
}

/// The processes that ran the run in `out`, oldest first, by the first records of their event files. A file that is no event file of the
/// engine tells nothing.
pub fn beginnings(disk: &Disk, out: &Path) -> Result<Vec<Beginning>> {
    let dir = out.join(DIR);
    let mut found = Vec::new();
    for name in disk.list(&dir)?.iter().filter(|name| name.contains(".tfevents.")) {
        let mut head = Vec::new();
        let file = std::fs::File::open(dir.join(name)).at(dir.join(name), "cannot open")?;
        file.take(256).read_to_end(&mut head).at(dir.join(name), "cannot read")?;
        found.extend(beginning(&head));
    }
    found.sort_by(|a: &Beginning, b| a.ts.total_cmp(&b.ts));
    Ok(found)
}

/// Of the session mark, which is the second record: `1: double ts`, `2: varint step`.
fn beginning(head: &[u8]) -> Option<Beginning> {
    let length = |at: usize| Some(u64::from_le_bytes(head.get(at..at + 8)?.try_into().ok()?) as usize);
    let second = length(0)?.checked_add(16)?;
    let end = second.checked_add(12)?.checked_add(length(second)?)?;
    let payload = head.get(second + 12..end)?;
    let [9, rest @ ..] = payload else { return None };
    let ts = f64::from_le_bytes(rest.get(..8)?.try_into().ok()?);
    let [16, rest @ ..] = rest.get(8..)? else { return None };
    let mut first = 0u64;
    for (i, byte) in rest.iter().take(9).enumerate() {
        first |= u64::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return Some(Beginning { ts, step: first.checked_sub(1)? });
        }
    }
    None
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64())
}

/// CRC-32C, rotated and offset as the record format wants it.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A protocol-buffer message under construction: fields are appended by number.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn raw_varint(&mut self, mut x: u64) {
        while x >= 0x80 {
            self.0.push(x as u8 | 0x80);
            x >>= 7;
        }
        self.0.push(x as u8);
    }

    fn varint(&mut self, field: u64, x: u64) -> &mut Self {
        self.raw_varint(field << 3);
        self.raw_varint(x);
        self
    }

    fn double(&mut self, field: u64, x: f64) -> &mut Self {
        self.raw_varint(field << 3 | 1);
        self.0.extend_from_slice(&x.to_le_bytes());
        self
    }

    fn bytes(&mut self, field: u64, x: &[u8]) -> &mut Self {
        self.raw_varint(field << 3 | 2);
        self.raw_varint(x.len() as u64);
        self.0.extend_from_slice(x);
        self
    }

    fn float(&mut self, field: u64, x: f32) -> &mut Self {
        self.raw_varint(field << 3 | 5);
        self.0.extend_from_slice(&x.to_le_bytes());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masked_crc_of_a_known_record() {
        // The length field of the first record TensorFlow writes for `brain.Event:2` (24 bytes): a fixed point of the format.
        assert_eq!(masked_crc(&24u64.to_le_bytes()), 0x224b_7fa3);
    }

    #[test]
    fn fields_are_encoded_as_protocol_buffers() {
        let mut m = Message::default();
        m.varint(2, 300).bytes(1, b"ab").float(2, 1.0);
        assert_eq!(m.0, [0x10, 0xac, 0x02, 0x0a, 2, b'a', b'b', 0x15, 0, 0, 0x80, 0x3f]);
    }
}
