//! Writes safetensors files one tensor at a time, with a digest of the whole file in `__metadata__`.
//!
//! The digest is the CRC32C of the file with the eight hexadecimal digits of the digest itself taken as `00000000`, so it covers the
//! header (names, types, shapes, offsets) as well as every value.

use crate::error::{Error, Result};
use crate::files::Disk;
use crate::files::disk::File;
use crate::model::element::{Dtype, encode};
use crate::model::safetensors::byte_length;
use crate::model::tensor_file::Info;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Start of every key of ours in `__metadata__`.
pub const OUR_PREFIX: &str = "retromae_engine.";
/// Key of the digest.
pub const DIGEST_KEY: &str = "retromae_engine.digest";
/// What the value of [`DIGEST_KEY`] begins with; eight lower-case hexadecimal digits follow.
pub const DIGEST_PREFIX: &str = "crc32c:";
/// A second key of ours: damage to one of the two cannot make the file look like one without a digest.
const VERSION_KEY: &str = "retromae_engine.version";

/// Size and checksum of a file just written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes.
    pub size: u64,
    /// CRC32C of all bytes.
    pub crc32c: u32,
}

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Name in the file.
    pub name: String,
    /// Type and shape.
    pub info: Info,
}

/// A safetensors file being written. Tensors come in the order of the specs given to [`Writer::create`].
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: File,
    specs: std::vec::IntoIter<Spec>,
    header: Vec<u8>,
    /// Where the digits of the digest lie in `header`.
    digits: usize,
    data_crc: u32,
    data_length: u64,
    buffer: Vec<u8>,
}

impl Writer {
    /// Creates the file (which must not exist) and writes its header. `metadata` is added to `format: pt` and the digest.
    ///
    /// # Errors
    /// The file cannot be created or written, or a spec is impossible.
    pub fn create(path: impl AsRef<Path>, specs: Vec<Spec>, metadata: &[(&str, &str)]) -> Result<Self> {
        Self::create_on(&Disk::default(), path.as_ref(), specs, metadata)
    }

    /// [`Writer::create`] on this disk.
    ///
    /// # Errors
    /// As [`Writer::create`].
    pub fn create_on(disk: &Disk, path: &Path, specs: Vec<Spec>, metadata: &[(&str, &str)]) -> Result<Self> {
        let path = path.to_path_buf();
        let header = header(&path, &specs, metadata)?;
        let marker = format!("\"{DIGEST_KEY}\":\"{DIGEST_PREFIX}");
        let found = header.windows(marker.len()).position(|w| w == marker.as_bytes());
        let digits = found
            .map(|at| at + marker.len())
            .ok_or_else(|| Error::refused("a metadata key hides the digest").path(&path).remedy("rename the key"))?;
        let mut file = disk.create_new(&path)?;
        file.put(&(header.len() as u64).to_le_bytes())?;
        file.put(&header)?;
        let specs = specs.into_iter();
        Ok(Writer { path, file, specs, header, digits, data_crc: 0, data_length: 0, buffer: Vec::new() })
    }

    /// Writes the next tensor, rounding to its element type.
    ///
    /// # Errors
    /// Another tensor is due, the number of values is wrong, a value is not finite or overflows the type, or the write fails.
    pub fn write_f32(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let dtype = self.begin(name, values.len())?;
        let largest = match dtype {
            Dtype::F16 => half::f16::MAX.to_f32(),
            Dtype::Bf16 => half::bf16::MAX.to_f32(),
            _ => f32::MAX,
        };
        if let Some(bad) = values.iter().find(|v| v.is_nan() || v.abs() > largest) {
            let cause = format!("value {bad} cannot be stored as {}", dtype.name());
            return Err(Error::refused(cause)
                .path(&self.path)
                .tensor(name)
                .remedy("export as f32, or from another checkpoint"));
        }
        self.pieces(values, |values, bytes| encode(dtype, values, bytes), name)
    }

    /// Writes the next tensor, whose type is I64.
    ///
    /// # Errors
    /// As [`Writer::write_f32`].
    pub fn write_i64(&mut self, name: &str, values: &[i64]) -> Result<()> {
        let dtype = self.begin(name, values.len())?;
        let append = |values: &[i64], bytes: &mut Vec<u8>| {
            values.iter().for_each(|v| bytes.extend_from_slice(&v.to_le_bytes()));
            dtype == Dtype::I64
        };
        self.pieces(values, append, name)
    }

    /// Fills in the digest and makes the file durable.
    ///
    /// # Errors
    /// A tensor was not written, or the system refuses.
    pub fn finish(mut self) -> Result<Written> {
        if let Some(left) = self.specs.next() {
            return Err(Error::refused("was not written").path(&self.path).tensor(left.name));
        }
        let length = (self.header.len() as u64).to_le_bytes();
        let whole = |header: &[u8]| {
            let head = crc32c::crc32c_append(crc32c::crc32c(&length), header);
            crc32c::crc32c_combine(head, self.data_crc, self.data_length as usize)
        };
        let digits = format!("{:08x}", whole(&self.header));
        self.header[self.digits..self.digits + 8].copy_from_slice(digits.as_bytes());
        self.file.put_at(digits.as_bytes(), 8 + self.digits as u64)?;
        self.file.sync()?;
        let head = crc32c::crc32c_append(crc32c::crc32c(&length), &self.header);
        Ok(Written {
            size: 8 + self.header.len() as u64 + self.data_length,
            crc32c: crc32c::crc32c_combine(head, self.data_crc, self.data_length as usize),
        })
    }

    fn begin(&mut self, name: &str, count: usize) -> Result<Dtype> {
        let refuse = |cause: String| Err(Error::refused(cause).path(&self.path).tensor(name));
        match self.specs.next() {
            Some(spec) if spec.name == name => {
                let expected = spec.info.shape.iter().product::<usize>();
                if expected != count {
                    return refuse(format!("{count} values for shape {:?}", spec.info.shape));
                }
                Ok(spec.info.dtype)
            }
            Some(spec) => refuse(format!("written where {} is due", spec.name)),
            None => refuse("is not among the announced tensors".into()),
        }
    }

    fn pieces<T>(&mut self, values: &[T], convert: impl Fn(&[T], &mut Vec<u8>) -> bool, name: &str) -> Result<()> {
        for piece in values.chunks(super::PIECE / 8) {
            self.buffer.clear();
            if !convert(piece, &mut self.buffer) {
                return Err(Error::refused("announced with another element type").path(&self.path).tensor(name));
            }
            self.file.put(&self.buffer)?;
            self.data_crc = crc32c::crc32c_append(self.data_crc, &self.buffer);
            self.data_length += self.buffer.len() as u64;
        }
        Ok(())
    }
}

/// The JSON header, padded with spaces to a multiple of 8, with a digest of zeros.
fn header(path: &Path, specs: &[Spec], metadata: &[(&str, &str)]) -> Result<Vec<u8>> {
    let mut meta = Map::new();
    meta.insert("format".into(), json!("pt"));
    meta.insert(VERSION_KEY.into(), json!(env!("CARGO_PKG_VERSION")));
    meta.insert(DIGEST_KEY.into(), json!(format!("{DIGEST_PREFIX}00000000")));
    for (key, value) in metadata {
        meta.entry(*key).or_insert(json!(value));
    }
    let mut map = Map::new();
    map.insert("__metadata__".into(), Value::Object(meta));
    let mut offset = 0u64;
    for spec in specs {
        let end = byte_length(&spec.info).and_then(|bytes| offset.checked_add(bytes));
        let Some(end) = end else {
            return Err(Error::refused(format!("shape {:?} is impossible", spec.info.shape))
                .path(path)
                .tensor(&spec.name));
        };
        let entry = json!({"dtype": spec.info.dtype.name(), "shape": spec.info.shape, "data_offsets": [offset, end]});
        if map.insert(spec.name.clone(), entry).is_some() {
            return Err(Error::refused("announced twice").path(path).tensor(&spec.name));
        }
        offset = end;
    }
    let mut text = Value::Object(map).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok(text)
}
