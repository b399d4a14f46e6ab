//! JSON that carries its own digest: its last field is the CRC32C of the bytes before that field.

/// What separates the body from the digest.
const TAIL: &str = ",\n  \"crc32c\": ";

/// A text of [`seal`], looked at.
#[derive(Debug, PartialEq, Eq)]
pub enum Sealed {
    /// The JSON object that was sealed.
    Whole(String),
    /// The digest is not that of the rest.
    Damaged,
    /// There is no digest.
    Foreign,
}

/// Seals a pretty-printed JSON object, which is not empty.
pub fn seal(object: &str) -> String {
    let body = object.trim_end_matches("\n}");
    format!("{body}{TAIL}{}\n}}\n", crc32c::crc32c(body.as_bytes()))
}

/// Undoes [`seal`].
pub fn open(text: &str) -> Sealed {
    let Some((body, tail)) = text.rsplit_once(TAIL) else { return Sealed::Foreign };
    let stored: Option<u32> = tail.strip_suffix("\n}\n").and_then(|n| n.parse().ok());
    match stored == Some(crc32c::crc32c(body.as_bytes())) {
        true => Sealed::Whole(format!("{body}\n}}")),
        false => Sealed::Damaged,
    }
}
