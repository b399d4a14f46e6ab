//! Readers: from the files people have to documents.
//!
//! Plain text, JSON lines, tab-separated columns and Parquet, each also compressed with gzip or zstd, from files, folders, globs
//! and standard input. What a file is gets detected from its name and first bytes. Files are read as streams: memory is bounded by
//! the longest record, and no record may be longer than [`LONGEST`].

pub(super) mod bytes;
mod json;
mod lines;
#[cfg(feature = "parquet")]
pub(super) mod parquet;
pub(super) mod separator;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::error::{Error, IoContext, Result};

use bytes::Opened;

/// Bytes of the longest line or text that is read.
pub const LONGEST: usize = 64 << 20;

/// A document as read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Document {
    /// Its id, where the input has one.
    pub id: Option<String>,
    /// Its title, where the input has one.
    pub title: Option<String>,
    /// Its text.
    pub text: String,
}

/// How a file holds documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One document a line.
    Text,
    /// Documents separated by blank lines.
    Paragraphs,
    /// One JSON object a line.
    Jsonl,
    /// `id text`, `id title text` or `id url title body`, separated by tabs.
    Tsv,
    /// Parquet with columns named like the fields of JSON.
    Parquet,
}

impl Format {
    /// What the user is told.
    pub fn describe(self) -> &'static str {
        match self {
            Format::Text => "plain text, one document a line",
            Format::Paragraphs => "plain text, documents separated by blank lines",
            Format::Jsonl => "JSON lines",
            Format::Tsv => "tab-separated columns",
            Format::Parquet => "Parquet",
        }
    }
}

/// One file to read, or standard input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// `-` for standard input.
    pub path: PathBuf,
    /// Bytes on disk; `None` where that is not known.
    pub bytes: Option<u64>,
}

impl Input {
    fn is_stdin(&self) -> bool {
        self.path.as_os_str() == "-"
    }
}

/// A file's documents, in order. A record that is refused does not end the iteration; anything else does.
pub type Documents = Box<dyn Iterator<Item = Result<Document>> + Send>;

/// Finds the files that the arguments mean: files, folders, globs and `-`, in the order given, folders and globs sorted by name.
pub fn expand(arguments: &[String]) -> Result<Vec<Input>> {
    let mut inputs = Vec::new();
    for argument in arguments {
        let path = Path::new(argument);
        if argument == "-" {
            inputs.push(Input { path: path.into(), bytes: None });
        } else if path.is_dir() {
            folder(path, &mut inputs)?;
        } else if !path.exists() && argument.contains(['*', '?', '[']) {
            matching(argument, &mut inputs)?;
        } else {
            inputs.push(file(path.into())?);
        }
    }
    if inputs.iter().filter(|i| i.is_stdin()).count() > 1 {
        return Err(Error::usage("standard input is named twice").path("-").remedy("name it once"));
    }
    Ok(inputs)
}

fn file(path: PathBuf) -> Result<Input> {
    let meta = fs::metadata(&path).at(&path, "cannot open")?;
    // A pipe has no size.
    let bytes = meta.is_file().then_some(meta.len());
    Ok(Input { path, bytes })
}

fn matching(pattern: &str, inputs: &mut Vec<Input>) -> Result<()> {
    // As shells do: a star does not mean hidden files.
    let options = glob::MatchOptions { require_literal_leading_dot: true, ..glob::MatchOptions::new() };
    let paths = glob::glob_with(pattern, options).map_err(|e| {
        Error::usage(format!("is not a pattern: {}", e.msg))
            .path(pattern)
            .remedy("use *, ? and [abc], or name the files")
    })?;
    let before = inputs.len();
    for path in paths {
        let path = path.map_err(|e| Error::io(e.path(), "cannot look at", e.error()))?;
        if path.is_file() {
            inputs.push(file(path)?);
        }
    }
    if inputs.len() == before {
        return Err(Error::refused("no file matches").path(pattern).remedy("check the pattern"));
    }
    Ok(())
}

/// A BEIR folder means its corpus; any other all files under it whose names say what they are.
fn folder(dir: &Path, inputs: &mut Vec<Input>) -> Result<()> {
    for name in ["corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.zst"] {
        let path = dir.join(name);
        if path.is_file() {
            inputs.push(file(path)?);
            return Ok(());
        }
    }
    let before = inputs.len();
    walk(dir, 0, inputs)?;
    if inputs.len() == before {
        return Err(Error::refused("holds no .txt, .jsonl, .tsv or .parquet file, compressed or not")
            .path(dir)
            .remedy("name the files and their --format"));
    }
    Ok(())
}

fn walk(dir: &Path, depth: usize, inputs: &mut Vec<Input>) -> Result<()> {
    let entries = fs::read_dir(dir).at(dir, "cannot list")?;
    let mut paths = entries.map(|e| e.map(|e| e.path())).collect::<std::io::Result<Vec<_>>>().at(dir, "cannot list")?;
    paths.sort();
    for path in paths {
        let hidden = path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
        if hidden {
            continue;
        }
        // Links to folders are not followed: they may lead back here.
        let is_dir = fs::symlink_metadata(&path).at(&path, "cannot look at")?.is_dir();
        if is_dir && depth < 32 {
            walk(&path, depth + 1, inputs)?;
        } else if !is_dir && by_name(&path).is_some() && path.is_file() {
            inputs.push(file(path)?);
        }
    }
    Ok(())
}

/// The format that a file's name promises, compression set aside.
fn by_name(path: &Path) -> Option<Format> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    let name = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(&name);
    match name.rsplit_once('.')?.1 {
        "txt" | "text" => Some(Format::Text),
        "jsonl" | "json" | "ndjson" => Some(Format::Jsonl),
        "tsv" => Some(Format::Tsv),
        "parquet" => Some(Format::Parquet),
        _ => None,
    }
}

/// Opens a file. `format` overrules detection; `blank` means that plain text is separated by blank lines. `read` counts the bytes
/// consumed on disk. Gives the format and the documents.
pub fn open(input: &Input, format: Option<Format>, blank: bool, read: Arc<AtomicU64>) -> Result<(Format, Documents)> {
    let opened = bytes::open(input, read.clone())?;
    let found = match format {
        Some(format) => format,
        None => detect(input, opened.head())?,
    };
    let found = if found == Format::Text && blank { Format::Paragraphs } else { found };
    let documents: Documents = match found {
        Format::Text => Box::new(lines::Text::new(opened)),
        Format::Paragraphs => Box::new(lines::Paragraphs::new(opened)),
        Format::Jsonl => Box::new(lines::Jsonl::new(opened)),
        Format::Tsv => Box::new(lines::Tsv::new(opened)),
        Format::Parquet => parquet_documents(opened, read)?,
    };
    Ok((found, documents))
}

#[cfg(feature = "parquet")]
fn parquet_documents(opened: Opened, read: Arc<AtomicU64>) -> Result<Documents> {
    Ok(Box::new(parquet::Rows::open(opened, read)?))
}

#[cfg(not(feature = "parquet"))]
fn parquet_documents(opened: Opened, _read: Arc<AtomicU64>) -> Result<Documents> {
    Err(Error::refused("this program was built without Parquet")
        .path(&opened.path)
        .remedy("build with --features parquet"))
}

/// What a file is, by its first bytes where they are plain, else by its name.
fn detect(input: &Input, head: &[u8]) -> Result<Format> {
    if head.starts_with(b"PAR1") {
        return Ok(Format::Parquet);
    }
    if input.path.extension().is_some_and(|e| e.eq_ignore_ascii_case("csv")) {
        // As plain text, ids and quotes would become part of the texts.
        let name = input.path.display();
        let command = format!(
            "python3 -c \"import csv; [print(*row, sep='\\t') for row in csv.reader(open('{name}'))]\" > texts.tsv"
        );
        return Err(Error::refused("columns separated by commas are not read").path(&input.path).remedy(format!(
            "write tabs: {command}, and give texts.tsv; or give --format txt if each line is a text"
        )));
    }
    if let Some(format) = by_name(&input.path) {
        return Ok(format);
    }
    let first_line = head.split(|&b| b == b'\n').next().unwrap_or_default();
    if head.contains(&0) {
        return Err(Error::refused("is neither text nor a known binary format")
            .path(&input.path)
            .remedy("name its --format if it is text all the same"));
    }
    Ok(match first_line.trim_ascii_start().first() {
        Some(b'{') => Format::Jsonl,
        _ if (1..=3).contains(&first_line.iter().filter(|&&b| b == b'\t').count()) => Format::Tsv,
        _ => Format::Text,
    })
}
