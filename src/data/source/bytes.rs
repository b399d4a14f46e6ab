//! Opening a file or standard input: decompression by its first bytes, byte order mark skipped, consumption counted.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, IoContext, Result};

use super::{Input, LONGEST};

/// Bytes looked at to detect a format.
const HEAD: usize = 16 << 10;

/// An opened input, decompressed.
pub struct Opened {
    /// For messages.
    pub path: PathBuf,
    head: Vec<u8>,
    /// Everything after the head.
    rest: Box<dyn BufRead + Send>,
    /// The file itself, where it is neither compressed nor a pipe.
    plain: Option<File>,
}

impl Opened {
    /// The first bytes.
    pub fn head(&self) -> &[u8] {
        &self.head
    }

    /// All bytes from the first.
    pub fn into_reader(self) -> Box<dyn BufRead + Send> {
        Box::new(Cursor::new(self.head).chain(self.rest))
    }

    /// The same content as a file that can be read at any place: compressed files and pipes are copied to an unnamed one.
    #[cfg(feature = "parquet")]
    pub fn into_file(mut self) -> Result<File> {
        use std::io::Seek;
        if let Some(file) = self.plain.take() {
            return Ok(file);
        }
        let dir = std::env::temp_dir();
        let path = dir.join(format!("retromae-engine-{}-{:p}.parquet", std::process::id(), &raw const self));
        let source = self.path.clone();
        let mut file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .at(&path, "cannot create a temporary file")?;
        std::fs::remove_file(&path).at(&path, "cannot remove the name of a temporary file")?;
        io::copy(&mut self.into_reader(), &mut file).at(&source, "cannot copy to a temporary file")?;
        file.rewind().at(&path, "cannot read a temporary file")?;
        Ok(file)
    }
}

/// Counts bytes read from the disk, for progress.
struct Counting<R> {
    inner: R,
    read: Arc<AtomicU64>,
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.read.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// Opens `input` and looks at its first bytes.
pub fn open(input: &Input, read: Arc<AtomicU64>) -> Result<Opened> {
    let path = input.path.clone();
    let cannot = "cannot read";
    let (raw, file): (Box<dyn Read + Send>, Option<File>) = if input.is_stdin() {
        (Box::new(io::stdin()), None)
    } else {
        let file = File::open(&path).at(&path, "cannot open")?;
        let regular = file.metadata().at(&path, "cannot look at")?.is_file();
        // Its own file offset: whoever wants the file later starts at the beginning.
        let again = if regular { Some(File::open(&path).at(&path, "cannot open")?) } else { None };
        (Box::new(file), again)
    };
    let mut reader = BufReader::with_capacity(1 << 18, Counting { inner: raw, read });
    let magic = take_head(&mut reader, 4).at(&path, cannot)?;
    let (gz, zst) = (magic.starts_with(&[0x1F, 0x8B]), magic == [0x28, 0xB5, 0x2F, 0xFD]);
    let whole = Cursor::new(magic).chain(reader);
    let mut rest: Box<dyn BufRead + Send> = if gz {
        Box::new(BufReader::with_capacity(1 << 18, flate2::bufread::MultiGzDecoder::new(whole)))
    } else if zst {
        let decoder = zstd::stream::read::Decoder::with_buffer(whole).at(&path, cannot)?;
        Box::new(BufReader::with_capacity(1 << 18, decoder))
    } else {
        Box::new(whole)
    };
    let mut head = take_head(&mut rest, HEAD).at(&path, cannot)?;
    if head.starts_with(&[0xFF, 0xFE]) || head.starts_with(&[0xFE, 0xFF]) {
        return Err(Error::refused("is UTF-16").path(&path).remedy("convert it: iconv -f utf-16 -t utf-8"));
    }
    if head.starts_with(&[0xEF, 0xBB, 0xBF]) {
        head.drain(..3);
    }
    Ok(Opened { path, head, rest, plain: file.filter(|_| !gz && !zst) })
}

/// Up to `n` bytes; fewer only at the end.
fn take_head(reader: &mut impl Read, n: usize) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(n);
    reader.take(n as u64).read_to_end(&mut head)?;
    Ok(head)
}

/// Reads lines of bounded length, without their ends.
pub struct Lines {
    /// For messages.
    pub path: PathBuf,
    /// Number of the last line read, from 1.
    pub number: u64,
    reader: Box<dyn BufRead + Send>,
    buffer: Vec<u8>,
    done: bool,
}

impl Lines {
    /// The lines of an opened input.
    pub fn new(opened: Opened) -> Lines {
        let path = opened.path.clone();
        Lines { path, number: 0, reader: opened.into_reader(), buffer: Vec::new(), done: false }
    }

    /// The next line as text, or `None` at the end. A line that is not UTF-8 is an error after which the next can be read.
    pub fn next_line(&mut self) -> Option<Result<&str>> {
        if self.done {
            return None;
        }
        // The capacity of one huge line is not kept for all the small ones.
        if self.buffer.capacity() > 1 << 20 {
            self.buffer = Vec::new();
        }
        self.buffer.clear();
        self.number += 1;
        let read = (&mut self.reader).take(LONGEST as u64 + 2).read_until(b'\n', &mut self.buffer);
        match read.at(&self.path, "cannot read") {
            Err(e) => {
                self.done = true;
                return Some(Err(e));
            }
            Ok(0) => {
                self.done = true;
                return None;
            }
            Ok(_) => {}
        }
        let line = self.buffer.strip_suffix(b"\n").unwrap_or(&self.buffer);
        if line.len() > LONGEST {
            self.done = true;
            return Some(Err(too_long().path(&self.path).line(self.number)));
        }
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        Some(std::str::from_utf8(line).map_err(|e| {
            Error::refused(format!("byte {} of the line is not UTF-8", e.valid_up_to() + 1))
                .path(&self.path)
                .line(self.number)
                .remedy("convert the file: iconv -f <its encoding> -t utf-8")
        }))
    }
}

/// The error about a record of more than [`LONGEST`] bytes.
pub fn too_long() -> Error {
    Error::refused(format!("longer than {} MiB", LONGEST >> 20)).remedy("is this the right --format? Split such texts")
}
