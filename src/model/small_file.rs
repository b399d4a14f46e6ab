//! Reading of JSON and other small files whose size nobody promises.

use super::safetensors::open_regular;
use crate::error::{Error, IoContext, Result};
use std::io::Read;
use std::path::Path;

/// The text of a file of at most `limit` bytes; `what` names what it is meant to be.
pub(super) fn text(path: &Path, limit: u64, what: &str) -> Result<String> {
    let (file, length) = open_regular(path)?;
    let remedy = format!("give {what}");
    if length > limit {
        return Err(Error::refused(format!("{length} bytes are too many for {what}")).path(path).remedy(remedy));
    }
    let mut bytes = Vec::with_capacity(length as usize);
    // A file that grows while it is read ends at the limit all the same.
    file.take(limit).read_to_end(&mut bytes).at(path, "cannot read")?;
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to() as u64;
        Error::refused(format!("not UTF-8, so not {what}")).path(path).offset(at).remedy(remedy)
    })
}
