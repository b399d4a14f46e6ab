//! The safetensors format: a reader that believes nothing, and a streaming writer.
//!
//! A file is an 8-byte header length, a JSON header, and the values. The reader checks the whole header before it offers a tensor and
//! reads values with positioned reads instead of a memory map: a file truncated while it is in use is then an error and not a signal.
//! Our own files carry a digest in `__metadata__` (see [`writer`]), which is checked when the file is opened.

pub mod writer;

use super::element::Dtype;
use super::tensor_file::{Info, Sink, TensorFile};
use crate::error::{Error, IoContext, Result};
use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use writer::{DIGEST_KEY, DIGEST_PREFIX, OUR_PREFIX};

/// Longest header accepted: 100 times that of a 1,000-layer model, and cheap to parse.
const MAX_HEADER: u64 = 16 << 20;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;
/// Bytes read at a time.
pub(super) const PIECE: usize = 1 << 20;
const AGAIN: &str = "get the file again";

/// An open safetensors file whose header has been checked.
#[derive(Debug)]
pub struct SafeTensors {
    path: PathBuf,
    file: File,
    /// File offset of the first value.
    data_start: u64,
    tensors: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    info: Info,
    /// Offsets from the end of the header.
    begin: u64,
    end: u64,
}

impl SafeTensors {
    /// Opens a file, checks its header, and the digest when it carries one.
    ///
    /// # Errors
    /// The file cannot be read, its header is malformed, or its digest does not match.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let (file, length) = open_regular(&path)?;
        let refuse = |cause: String| Error::refused(cause).path(&path).remedy(AGAIN);
        let mut prefix = [0; 8];
        if length < 8 {
            return Err(refuse(format!("{length} bytes are too short for a safetensors file")));
        }
        file.read_exact_at(&mut prefix, 0).at(&path, "cannot read")?;
        let header_length = u64::from_le_bytes(prefix);
        if header_length > MAX_HEADER || header_length > length - 8 {
            return Err(
                refuse(format!("header length {header_length} is impossible in a file of {length} bytes")).offset(0)
            );
        }
        let mut text = vec![0; header_length as usize];
        file.read_exact_at(&mut text, 8).at(&path, "cannot read the header")?;
        let header: Header = serde_json::from_slice(&text)
            .map_err(|e| refuse(format!("malformed safetensors header: {e}")).offset(8))?;
        let data_start = 8 + header_length;
        check_layout(&header.tensors, length - data_start).map_err(|(name, cause)| {
            let error = refuse(cause);
            if name.is_empty() { error } else { error.tensor(name) }
        })?;
        let opened = SafeTensors { path, file, data_start, tensors: header.tensors, metadata: header.metadata };
        opened.check_digest(&text, length)?;
        Ok(opened)
    }

    /// The strings of `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Files of this engine carry several keys below one prefix, so that no single damaged key can hide the digest.
    fn check_digest(&self, header: &[u8], length: u64) -> Result<()> {
        if !self.metadata.keys().any(|key| key.starts_with(OUR_PREFIX)) {
            return Ok(());
        }
        let refuse = |cause: &str| Err(Error::refused(cause).path(&self.path).remedy(AGAIN));
        let marker = format!("\"{DIGEST_KEY}\":\"{DIGEST_PREFIX}");
        let mut found = header.windows(marker.len()).enumerate().filter(|(_, w)| *w == marker.as_bytes());
        let (Some((at, _)), None) = (found.next(), found.next()) else {
            return refuse("the digest is missing or there are several");
        };
        let digits = at + marker.len()..at + marker.len() + 8;
        let Some(written) = header.get(digits.clone()).and_then(|d| std::str::from_utf8(d).ok()) else {
            return refuse("the digest is cut off");
        };
        let mut blank = header.to_vec();
        blank[digits].fill(b'0');
        let mut crc = crc32c::crc32c(&(header.len() as u64).to_le_bytes());
        crc = crc32c::crc32c_append(crc, &blank);
        let mut buffer = vec![0; PIECE.min((length - self.data_start) as usize)];
        let mut offset = self.data_start;
        while offset < length {
            let count = (length - offset).min(PIECE as u64) as usize;
            self.file.read_exact_at(&mut buffer[..count], offset).at(&self.path, "cannot read")?;
            crc = crc32c::crc32c_append(crc, &buffer[..count]);
            offset += count as u64;
        }
        if written == format!("{crc:08x}") { Ok(()) } else { refuse("the contents do not match their digest") }
    }
}

impl TensorFile for SafeTensors {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<Info> {
        self.tensors.get(name).map(|entry| entry.info.clone())
    }

    fn stream(&self, name: &str, sink: &mut Sink<'_>) -> Result<()> {
        self.require(name)?;
        let Some(entry) = self.tensors.get(name) else { return Ok(()) };
        let mut buffer = vec![0; PIECE.min((entry.end - entry.begin) as usize)];
        let mut offset = entry.begin;
        while offset < entry.end {
            let count = (entry.end - offset).min(PIECE as u64) as usize;
            let piece = &mut buffer[..count];
            self.file
                .read_exact_at(piece, self.data_start + offset)
                .map_err(|e| Error::io(&self.path, "cannot read the values", &e).tensor(name))?;
            sink(piece)?;
            offset += count as u64;
        }
        Ok(())
    }
}

/// Opens a regular file and tells its length. Anything else could block for ever or change under the reader.
pub(super) fn open_regular(path: &Path) -> Result<(File, u64)> {
    let meta = std::fs::metadata(path).at(path, "cannot read")?;
    if !meta.is_file() {
        return Err(Error::refused("not a regular file").path(path).remedy("give a file of weights"));
    }
    let file = File::open(path).at(path, "cannot read")?;
    let length = file.metadata().at(path, "cannot read")?.len();
    Ok((file, length))
}

/// Every tensor lies where its shape says, and together they fill the file without overlap or gap.
fn check_layout(tensors: &BTreeMap<String, Entry>, data: u64) -> std::result::Result<(), (String, String)> {
    let mut order: Vec<(&String, &Entry)> = tensors.iter().collect();
    order.sort_by_key(|(_, e)| (e.begin, e.end));
    let mut next = 0;
    for (name, entry) in order {
        let fail = |cause: String| Err((name.clone(), cause));
        let Some(bytes) = byte_length(&entry.info) else {
            return fail(format!("shape {:?} is impossible", entry.info.shape));
        };
        if entry.begin > entry.end || entry.end > data {
            return fail(format!(
                "values at {}..{} are outside the file's {data} bytes of data",
                entry.begin, entry.end
            ));
        }
        if entry.end - entry.begin != bytes {
            let (dtype, held) = (entry.info.dtype.name(), entry.end - entry.begin);
            return fail(format!("{held} bytes of values where {dtype} {:?} needs {bytes}", entry.info.shape));
        }
        if entry.begin != next {
            let what = if entry.begin < next { "overlap the tensor before them" } else { "leave a gap before them" };
            return fail(format!("values at {}..{} {what}", entry.begin, entry.end));
        }
        next = entry.end;
    }
    if next == data { Ok(()) } else { Err((String::new(), format!("{} bytes belong to no tensor", data - next))) }
}

/// Bytes of a tensor, unless that number does not exist.
pub(super) fn byte_length(info: &Info) -> Option<u64> {
    let elements = info.shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d as u64))?;
    elements.checked_mul(info.dtype.size() as u64)
}

struct Header {
    tensors: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Reads the header entry by entry, because a map type would silently keep the last of two tensors with one name.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
        let mut tensors = BTreeMap::new();
        let mut metadata = None;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                if metadata.replace(map.next_value::<BTreeMap<String, String>>()?).is_some() {
                    return Err(de::Error::custom("two __metadata__ objects"));
                }
                continue;
            }
            let raw: RawEntry = map.next_value()?;
            let dtype = Dtype::parse(&raw.dtype)
                .ok_or_else(|| de::Error::custom(format!("tensor {name:?} has the unknown type {:?}", raw.dtype)))?;
            if raw.shape.0.len() > MAX_RANK {
                return Err(de::Error::custom(format!("tensor {name:?} has more than {MAX_RANK} dimensions")));
            }
            let [begin, end] = raw.data_offsets;
            let entry = Entry { info: Info { dtype, shape: raw.shape.0 }, begin, end };
            if tensors.insert(name.clone(), entry).is_some() {
                return Err(de::Error::custom(format!("two tensors are called {name:?}")));
            }
        }
        Ok(Header { tensors, metadata: metadata.unwrap_or_default() })
    }
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Shape,
    data_offsets: [u64; 2],
}

#[derive(serde::Deserialize)]
struct Shape(Vec<usize>);
