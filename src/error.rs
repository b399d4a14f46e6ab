//! The one error type of the engine.
//!
//! Every error that reaches the user is one line, `<path>[:line | @offset | #tensor]: <cause>; <what to do>`, and carries the exit
//! code it ends the process with. Only `main.rs` prints it.

use std::fmt;
use std::path::{Path, PathBuf};

/// `Result` with the engine's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure an [`Error`] is; decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Data, configuration or a model that the engine refuses to use. Exit code 1.
    Refused,
    /// The operating system refused to read or write. Exit code 1.
    Io,
    /// The device or its driver failed. Exit code 1.
    Device,
    /// The command line is wrong. Exit code 2.
    Usage,
    /// Stopped by this signal after saving. Exit code 128 + signal.
    Signal(i32),
}

/// Where inside a file a problem lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Line number, from 1.
    Line(u64),
    /// Byte offset, from 0.
    Offset(u64),
    /// Tensor name.
    Tensor(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Line(n) => write!(f, ":{n}"),
            Place::Offset(n) => write!(f, "@{n}"),
            Place::Tensor(name) => write!(f, "#{name}"),
        }
    }
}

/// A failure, with the file and place it concerns, its cause, and what to do about it.
#[derive(Clone, Debug)]
pub struct Error(Box<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    kind: Kind,
    path: Option<PathBuf>,
    place: Option<Place>,
    cause: String,
    remedy: String,
}

impl Error {
    /// An error of the given kind with its cause; add path, place and remedy with the builder methods.
    pub fn new(kind: Kind, cause: impl Into<String>) -> Self {
        Error(Box::new(Inner { kind, path: None, place: None, cause: cause.into(), remedy: String::new() }))
    }

    /// Data or a setting that the engine refuses.
    pub fn refused(cause: impl Into<String>) -> Self {
        Self::new(Kind::Refused, cause)
    }

    /// A wrong command line.
    pub fn usage(cause: impl Into<String>) -> Self {
        Self::new(Kind::Usage, cause)
    }

    /// A failure of the device or its driver.
    pub fn device(cause: impl Into<String>) -> Self {
        Self::new(Kind::Device, cause)
    }

    /// A failed system call on `path`; says what to do for the common causes.
    pub fn io(path: impl AsRef<Path>, doing: &str, source: &std::io::Error) -> Self {
        use std::io::ErrorKind as K;
        let remedy = match source.kind() {
            K::NotFound => "check the path",
            K::PermissionDenied => "check the permissions of the file and its folder",
            K::StorageFull | K::QuotaExceeded => "free space or choose another folder",
            K::ReadOnlyFilesystem => "choose a folder on a writable file system",
            K::IsADirectory => "give a file, not a folder",
            K::NotADirectory => "give a folder, not a file",
            K::UnexpectedEof => "the file is shorter than its header says; make it again",
            _ if source.raw_os_error() == Some(libc::EMFILE) => "raise the limit of open files (ulimit -n)",
            _ => "check the disk and run again",
        };
        Self::new(Kind::Io, format!("{doing}: {}", plain(source))).path(path).remedy(remedy)
    }

    /// Names the file or folder.
    pub fn path(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path = Some(path.as_ref().to_path_buf());
        self
    }

    /// Names the line (from 1).
    pub fn line(mut self, line: u64) -> Self {
        self.0.place = Some(Place::Line(line));
        self
    }

    /// Names the byte offset (from 0).
    pub fn offset(mut self, offset: u64) -> Self {
        self.0.place = Some(Place::Offset(offset));
        self
    }

    /// Names the tensor.
    pub fn tensor(mut self, name: impl Into<String>) -> Self {
        self.0.place = Some(Place::Tensor(name.into()));
        self
    }

    /// Says what to do.
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.0.remedy = remedy.into();
        self
    }

    /// The first three of several errors and the count, as one error. `errors` must not be empty.
    pub fn several(errors: Vec<Error>) -> Self {
        let total = errors.len();
        let mut iter = errors.into_iter();
        let Some(mut first) = iter.next() else {
            return Self::refused("unknown error");
        };
        if total > 1 {
            let more: Vec<String> = iter.take(2).map(|e| e.head()).collect();
            let shown = more.len() + 1;
            first.0.cause = format!("{} | {}", first.0.cause, more.join(" | "));
            if total > shown {
                first.0.cause = format!("{} | {total} errors in all", first.0.cause);
            }
        }
        first
    }

    /// The kind.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// Whether a file or folder is named.
    pub fn has_path(&self) -> bool {
        self.0.path.is_some()
    }

    /// The cause alone, without path and remedy.
    pub fn cause(&self) -> &str {
        &self.0.cause
    }

    /// What to do about it, without the rest; may be empty.
    pub fn advice(&self) -> &str {
        &self.0.remedy
    }

    /// The exit code the process ends with.
    pub fn exit_code(&self) -> i32 {
        match self.0.kind {
            Kind::Refused | Kind::Io | Kind::Device => 1,
            Kind::Usage => 2,
            Kind::Signal(n) => 128 + n,
        }
    }

    /// Path, place and cause, without the remedy.
    fn head(&self) -> String {
        let mut s = String::new();
        if let Some(p) = &self.0.path {
            s.push_str(&p.display().to_string());
        }
        if let Some(p) = &self.0.place {
            s.push_str(&p.to_string());
        }
        if !s.is_empty() {
            s.push_str(": ");
        }
        s.push_str(&self.0.cause);
        s
    }
}

/// The system's message without the "(os error N)" that Rust appends.
fn plain(e: &std::io::Error) -> String {
    let s = e.to_string();
    match s.find(" (os error") {
        Some(i) => s[..i].to_string(),
        None => s,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut s = self.head();
        if !self.0.remedy.is_empty() {
            s.push_str("; ");
            s.push_str(&self.0.remedy);
        }
        // One line, whatever a file name or a library's message holds.
        for c in s.chars() {
            if c.is_control() { f.write_str(" ")? } else { fmt::Write::write_char(f, c)? }
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// Adds the path to a `std::io::Result`.
pub trait IoContext<T> {
    /// `doing` is what was being done: "cannot read", "cannot create".
    fn at(self, path: impl AsRef<Path>, doing: &str) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn at(self, path: impl AsRef<Path>, doing: &str) -> Result<T> {
        self.map_err(|e| Error::io(path, doing, &e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_with_path_place_cause_and_remedy() {
        let e = Error::refused("bad\nid").path("a.tsv").line(7).remedy("fix it");
        assert_eq!(e.to_string(), "a.tsv:7: bad id; fix it");
        assert_eq!(e.exit_code(), 1);
        assert_eq!(Error::usage("x").exit_code(), 2);
        assert_eq!(Error::new(Kind::Signal(15), "stopped").exit_code(), 143);
    }

    #[test]
    fn several_errors_show_three_and_the_count() {
        let all = (1..=5).map(|i| Error::refused(format!("c{i}")).path("f").line(i)).collect();
        assert_eq!(Error::several(all).to_string(), "f:1: c1 | f:2: c2 | f:3: c3 | 5 errors in all");
    }
}
