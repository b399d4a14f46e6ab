//! Parquet through its column readers: only the columns that matter are read, a few rows at a time.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::DataType;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::SchemaDescriptor;

use crate::error::{Error, Result};

use super::bytes::Opened;
use super::{Document, json};

/// Rows read at once.
const ROWS: usize = 256;

/// The documents of a Parquet file.
pub struct Rows {
    path: PathBuf,
    file: SerializedFileReader<File>,
    /// Columns of id, title and text.
    columns: [Option<usize>; 3],
    group: usize,
    readers: Option<[Option<Column>; 3]>,
    batch: Vec<Document>,
    row: u64,
    progress: Progress,
    done: bool,
}

/// Spreads the file's bytes over its rows, since columns are read out of order.
struct Progress {
    read: Arc<AtomicU64>,
    bytes: u64,
    rows: u64,
}

struct Column {
    reader: ColumnReader,
    /// Definition level of a value that is there; 0 where none may be missing.
    defined: i16,
}

impl Rows {
    /// Reads the file's description and finds the columns.
    pub fn open(opened: Opened, read: Arc<AtomicU64>) -> Result<Rows> {
        let path = opened.path.clone();
        let file = reader(opened)?;
        let meta = file.metadata().file_metadata();
        let columns = find_columns(meta.schema_descr()).map_err(|e| e.path(&path))?;
        let rows = u64::try_from(meta.num_rows()).unwrap_or(0);
        let bytes = std::fs::metadata(&path).map_or(0, |m| m.len());
        // Detection has counted what it looked at.
        let bytes = bytes.saturating_sub(read.load(Ordering::Relaxed));
        let progress = Progress { read, bytes, rows };
        Ok(Rows { path, file, columns, group: 0, readers: None, batch: Vec::new(), row: 0, progress, done: false })
    }

    /// Reads the next rows into `batch`, in reverse; leaves it empty at the end.
    fn fill(&mut self) -> Result<()> {
        while self.batch.is_empty() {
            let Some(readers) = &mut self.readers else {
                if self.group == self.file.num_row_groups() {
                    return Ok(());
                }
                self.readers = Some(self.open_group().map_err(|e| unreadable(&e).path(&self.path))?);
                self.group += 1;
                continue;
            };
            let mut read = |i: usize| readers[i].as_mut().map(Column::read).transpose();
            let (ids, titles, texts) =
                read(0).and_then(|a| Ok((a, read(1)?, read(2)?))).map_err(|e| unreadable(&e).path(&self.path))?;
            let texts = texts.unwrap_or_default();
            if texts.is_empty() {
                self.readers = None;
                continue;
            }
            self.collect(ids, titles, texts)?;
        }
        Ok(())
    }

    fn open_group(&self) -> std::result::Result<[Option<Column>; 3], ParquetError> {
        let group = self.file.get_row_group(self.group)?;
        let column = |i: usize| {
            let reader = group.get_column_reader(i)?;
            let defined = self.file.metadata().file_metadata().schema_descr().column(i).max_def_level();
            Ok::<_, ParquetError>(Column { reader, defined })
        };
        let [id, title, text] = self.columns;
        Ok([id.map(column).transpose()?, title.map(column).transpose()?, text.map(column).transpose()?])
    }

    fn collect(&mut self, ids: Option<Strings>, titles: Option<Strings>, texts: Strings) -> Result<()> {
        let count = texts.len();
        let uneven = [&ids, &titles].into_iter().flatten().any(|c| c.len() != count);
        let at = |row: u64, cause: &str| {
            Error::refused(cause).path(&self.path).line(row).remedy("the row is counted from 1; correct the file")
        };
        if uneven {
            return Err(at(self.row + 1, "the columns have different numbers of rows"));
        }
        let (mut ids, mut titles) = (ids.map(Vec::into_iter), titles.map(Vec::into_iter));
        for (i, text) in texts.into_iter().enumerate() {
            let row = self.row + i as u64 + 1;
            let utf8 = |value: Option<Vec<u8>>| {
                value.map(|v| String::from_utf8(v).map_err(|_| at(row, "a value is not UTF-8"))).transpose()
            };
            let id = utf8(ids.as_mut().and_then(|c| c.next().flatten()))?;
            let title = utf8(titles.as_mut().and_then(|c| c.next().flatten()))?;
            let text = utf8(text)?.ok_or_else(|| at(row, "the text is null"))?;
            let filled = |s: &String| !s.is_empty();
            self.batch.push(Document { id: id.filter(filled), title: title.filter(filled), text });
        }
        self.batch.reverse();
        self.row += count as u64;
        let Progress { read, bytes, rows } = &self.progress;
        if *rows > 0 {
            let part = |row: u64| (u128::from(*bytes) * u128::from(row.min(*rows)) / u128::from(*rows)) as u64;
            read.fetch_add(part(self.row) - part(self.row - count as u64), Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Iterator for Rows {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.batch.is_empty()
            && !self.done
            && let Err(e) = self.fill()
        {
            self.done = true;
            return Some(Err(e));
        }
        self.batch.pop().map(Ok)
    }
}

/// A column's next values; `None` for null.
type Strings = Vec<Option<Vec<u8>>>;

impl Column {
    /// Up to [`ROWS`] values; none at the end of the row group.
    fn read(&mut self) -> std::result::Result<Strings, ParquetError> {
        let defined = self.defined;
        match &mut self.reader {
            ColumnReader::ByteArrayColumnReader(r) => values(r, defined, |v| v.data().to_vec()),
            ColumnReader::Int32ColumnReader(r) => values(r, defined, |v| v.to_string().into_bytes()),
            ColumnReader::Int64ColumnReader(r) => values(r, defined, |v| v.to_string().into_bytes()),
            _ => Err(ParquetError::General("a column is neither text nor a whole number".into())),
        }
    }
}

fn values<T: DataType>(
    reader: &mut ColumnReaderImpl<T>,
    defined: i16,
    to_bytes: impl Fn(&T::T) -> Vec<u8>,
) -> std::result::Result<Strings, ParquetError> {
    let (mut levels, mut found) = (Vec::new(), Vec::new());
    let mut rows = 0;
    while rows < ROWS {
        let (read, _, _) = reader.read_records(ROWS - rows, Some(&mut levels), None, &mut found)?;
        if read == 0 {
            break;
        }
        rows += read;
    }
    let mut found = found.iter();
    if defined == 0 {
        return Ok(found.map(|v| Some(to_bytes(v))).collect());
    }
    Ok(levels.iter().map(|&level| if level == defined { found.next().map(&to_bytes) } else { None }).collect())
}

/// The columns of id, title and text: top-level ones, under the names that JSON uses.
fn find_columns(schema: &SchemaDescriptor) -> Result<[Option<usize>; 3]> {
    let find = |names: &[&str]| {
        names.iter().find_map(|name| {
            schema.columns().iter().position(|c| c.max_rep_level() == 0 && c.path().parts() == [name.to_string()])
        })
    };
    let Some(text) = find(&json::TEXT) else {
        let names: Vec<String> = schema.columns().iter().map(|c| c.path().string()).collect();
        return Err(Error::refused(json::no_text(names.iter().map(String::as_str).take(8)))
            .remedy("rename the column of the text to text"));
    };
    Ok([find(&json::ID), find(&[json::TITLE]), Some(text)])
}

/// Reads a file's description; one that places columns outside the file is refused, since the crate trusts it.
pub(in crate::data) fn reader(opened: Opened) -> Result<SerializedFileReader<File>> {
    let path = opened.path.clone();
    let file = opened.into_file()?;
    let bytes = file.metadata().map_or(0, |m| m.len());
    let reader = SerializedFileReader::new(file).map_err(|e| unreadable(&e).path(&path))?;
    for column in reader.metadata().row_groups().iter().flat_map(|group| group.columns()) {
        let start = column.dictionary_page_offset().unwrap_or(column.data_page_offset());
        let (start, size) = (u64::try_from(start).ok(), u64::try_from(column.compressed_size()).ok());
        let end = start.zip(size).and_then(|(start, size)| start.checked_add(size));
        if end.is_none_or(|end| end > bytes) {
            let e = ParquetError::General("a column lies outside the file".into());
            return Err(unreadable(&e).path(&path));
        }
    }
    Ok(reader)
}

pub(in crate::data) fn unreadable(e: &ParquetError) -> Error {
    Error::refused(format!("cannot be read as Parquet: {e}")).remedy("restore the file, or name the right --format")
}
