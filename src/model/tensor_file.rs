//! What every file of named tensors can do, whatever its format: tell names, types and shapes, and hand out values checked.

use super::element::{Dtype, decode_f32, decode_f64, decode_i64};
use crate::error::{Error, Result};
use std::path::Path;

/// Type and shape of a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Element type.
    pub dtype: Dtype,
    /// Shape, row-major.
    pub shape: Vec<usize>,
}

/// Takes the next bytes of a tensor: whole elements, little-endian, row-major.
pub type Sink<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

/// A file of named tensors.
pub trait TensorFile: std::fmt::Debug + Send + Sync {
    /// The file, for messages.
    fn path(&self) -> &Path;

    /// The names in the file, sorted.
    fn names(&self) -> Vec<&str>;

    /// Type and shape of a tensor; `None` when the file does not have it.
    fn info(&self, name: &str) -> Option<Info>;

    /// Whether two names stand for the same bytes of the file, so that comparing their values is needless.
    fn same_memory(&self, _a: &str, _b: &str) -> bool {
        false
    }

    /// Passes the values of a tensor to `sink`, in pieces, so that memory does not grow with the tensor.
    ///
    /// # Errors
    /// A missing tensor, a failed read, or an error of `sink`.
    fn stream(&self, name: &str, sink: &mut Sink<'_>) -> Result<()>;

    /// Type and shape of a tensor that must be there.
    ///
    /// # Errors
    /// The tensor is missing.
    fn require(&self, name: &str) -> Result<Info> {
        self.info(name).ok_or_else(|| {
            Error::refused("tensor is missing").path(self.path()).tensor(name).remedy("give the file that holds it")
        })
    }

    /// Reads floats of any width as f32.
    ///
    /// # Errors
    /// Missing tensor, another shape, a type that is not a float, a value that is not finite.
    fn read_f32(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<()> {
        read(self, name, shape, out, decode_f32, |v| v.is_finite())
    }

    /// Reads floats of any width as f64.
    ///
    /// # Errors
    /// As [`TensorFile::read_f32`].
    fn read_f64(&self, name: &str, shape: &[usize], out: &mut [f64]) -> Result<()> {
        read(self, name, shape, out, decode_f64, |v| v.is_finite())
    }

    /// Reads integers of any width, or booleans, as i64.
    ///
    /// # Errors
    /// Missing tensor, another shape, a type that is not an integer.
    fn read_i64(&self, name: &str, shape: &[usize], out: &mut [i64]) -> Result<()> {
        read(self, name, shape, out, decode_i64, |_| true)
    }
}

/// The common part of the typed reads: shape and type are checked before a byte is read.
fn read<F: TensorFile + ?Sized, T: Copy + std::fmt::Display>(
    file: &F,
    name: &str,
    shape: &[usize],
    out: &mut [T],
    decode: fn(Dtype, &[u8], &mut [T]) -> bool,
    valid: fn(T) -> bool,
) -> Result<()> {
    let info = file.require(name)?;
    let refuse = |cause: String, remedy: &str| Error::refused(cause).path(file.path()).tensor(name).remedy(remedy);
    let elements = shape.iter().product::<usize>();
    if info.shape != shape || elements != out.len() {
        let cause = format!("shape {:?} where {shape:?} is expected", info.shape);
        return Err(refuse(cause, "give the config.json that belongs to these weights"));
    }
    let wrong_type = || refuse(format!("element type {} cannot be read as such", info.dtype.name()), RECONVERT);
    let mut done = 0;
    file.stream(name, &mut |bytes| {
        let count = bytes.len() / info.dtype.size();
        let piece =
            out.get_mut(done..done + count).ok_or_else(|| refuse("more values than its shape".into(), AGAIN))?;
        if !decode(info.dtype, bytes, piece) {
            return Err(wrong_type());
        }
        if let Some(i) = piece.iter().position(|v| !valid(*v)) {
            let cause = format!("value {} at element {} is not finite", piece[i], done + i);
            return Err(refuse(cause, "the weights are damaged or diverged: use another checkpoint"));
        }
        done += count;
        Ok(())
    })?;
    if done == elements { Ok(()) } else { Err(refuse("fewer values than its shape".into(), AGAIN)) }
}

const RECONVERT: &str = "convert the tensor to float32 (integers: int64)";
const AGAIN: &str = "get the file again";
