//! Records of named fields: one JSON value a line, or the rows of a Parquet file, which become the same.

use std::sync::Arc;

use serde_json::Value;

use crate::data::source::Input;
use crate::data::source::bytes::{self, Lines, Opened};
use crate::error::Result;

use super::table::Wrong;

/// A record not yet parsed, so that several threads can do that.
pub(super) enum Raw {
    /// A line of JSON.
    Line(String),
    /// A row of Parquet.
    #[cfg(feature = "parquet")]
    Row(Value),
}

impl Raw {
    /// Bytes of the record, about.
    pub fn size(&self) -> usize {
        match self {
            Raw::Line(line) => line.len(),
            #[cfg(feature = "parquet")]
            Raw::Row(_) => 1024,
        }
    }

    pub fn parse(self) -> std::result::Result<Value, Wrong> {
        match self {
            Raw::Line(line) => serde_json::from_str(&line)
                .map_err(|e| Wrong::new(e.to_string().replace("at line 1 column", "at column"))),
            #[cfg(feature = "parquet")]
            Raw::Row(row) => Ok(row),
        }
    }
}

/// Numbered records.
pub(super) type Records = Box<dyn Iterator<Item = Result<(u64, Raw)>>>;

/// The records of a file, numbered from 1 by line or row. Blank lines are skipped.
pub(super) fn open(input: &Input) -> Result<Records> {
    let opened = bytes::open(input, Arc::default())?;
    if opened.head().starts_with(b"PAR1") { rows(opened) } else { Ok(Box::new(JsonLines(Lines::new(opened)))) }
}

struct JsonLines(Lines);

impl Iterator for JsonLines {
    type Item = Result<(u64, Raw)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let number = self.0.number + 1;
            match self.0.next_line()? {
                Ok(line) if line.trim_ascii().is_empty() => {}
                Ok(line) => return Some(Ok((number, Raw::Line(line.to_owned())))),
                Err(e) => return Some(Err(e)),
            }
        }
    }
}

#[cfg(not(feature = "parquet"))]
fn rows(opened: Opened) -> Result<Records> {
    Err(crate::error::Error::refused("this program was built without Parquet")
        .path(&opened.path)
        .remedy("build with --features parquet"))
}

#[cfg(feature = "parquet")]
fn rows(opened: Opened) -> Result<Records> {
    use crate::data::source::parquet::{reader, unreadable};
    use parquet::errors::ParquetError;
    use parquet::record::reader::RowIter;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    let path = opened.path.clone();
    let file = reader(opened)?;
    let (mut rows, mut number) = (Some(RowIter::from_file_into(Box::new(file))), 0);
    Ok(Box::new(std::iter::from_fn(move || {
        let open = rows.as_mut()?;
        // The crate's record reader panics at some damaged files; it is not used again after that.
        let row = catch_unwind(AssertUnwindSafe(|| open.next()))
            .unwrap_or_else(|_| Some(Err(ParquetError::General("the file is damaged".into()))));
        number += 1;
        match row {
            Some(Ok(row)) => {
                let fields = row.into_columns().into_iter().map(|(name, field)| (name, value(field)));
                Some(Ok((number, Raw::Row(Value::Object(fields.collect())))))
            }
            Some(Err(e)) => {
                rows = None;
                Some(Err(unreadable(&e).path(&path).line(number)))
            }
            None => {
                rows = None;
                None
            }
        }
    })))
}

/// A Parquet value as JSON spells it; kinds that no training data has are null.
#[cfg(feature = "parquet")]
fn value(field: parquet::record::Field) -> Value {
    use parquet::record::Field as F;
    match field {
        F::Bool(x) => x.into(),
        F::Byte(x) => x.into(),
        F::Short(x) => x.into(),
        F::Int(x) => x.into(),
        F::Long(x) => x.into(),
        F::UByte(x) => x.into(),
        F::UShort(x) => x.into(),
        F::UInt(x) => x.into(),
        F::ULong(x) => x.into(),
        F::Float16(x) => f32::from(x).into(),
        F::Float(x) => x.into(),
        F::Double(x) => x.into(),
        F::Str(text) => text.into(),
        // Text of writers that do not say it is text.
        F::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Value::Null, Value::from),
        F::ListInternal(list) => Value::Array(list.elements().iter().cloned().map(value).collect()),
        F::Group(row) => Value::Object(row.into_columns().into_iter().map(|(name, f)| (name, value(f))).collect()),
        _ => Value::Null,
    }
}
