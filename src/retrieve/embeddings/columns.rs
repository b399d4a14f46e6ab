//! The columns of a folder of embeddings, and the files they lie in: NPY, some thousand rows each.

use serde::{Deserialize, Serialize};

use super::{Part, Spec};
use crate::retrieve::npy::{self, HEADER};
use crate::retrieve::representation::Embedded;

/// One of the arrays that hold the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    /// `[n, W]` dense embeddings.
    Dense,
    /// `[n, K]` token ids, u16 where the vocabulary allows it, else u32.
    Ids,
    /// `[n, K]` their weights, of the type of the dense numbers.
    Weights,
}

impl Column {
    /// What embeddings of `spec` have, in order.
    pub fn of(spec: &Spec) -> &'static [Column] {
        match (spec.representation.dense(), spec.representation.lexical()) {
            (true, true) => &[Column::Dense, Column::Ids, Column::Weights],
            (true, false) => &[Column::Dense],
            _ => &[Column::Ids, Column::Weights],
        }
    }

    /// What its files are called before their number.
    pub fn stem(self) -> &'static str {
        match self {
            Column::Dense => "embeddings",
            Column::Ids => "lexical-ids",
            Column::Weights => "lexical-weights",
        }
    }

    /// Elements of a row.
    pub fn width(self, spec: &Spec) -> usize {
        if self == Column::Dense { spec.dim } else { spec.lexical_top_k }
    }

    /// Bytes of an element.
    pub fn element(self, spec: &Spec) -> usize {
        match self {
            Column::Ids if spec.vocab_size <= 1 << 16 => 2,
            Column::Ids => 4,
            _ => spec.dtype.size(),
        }
    }

    /// Bytes of a row.
    pub fn row(self, spec: &Spec) -> usize {
        self.width(spec) * self.element(spec)
    }

    /// The header of a file of `rows` rows.
    pub fn header(self, spec: &Spec, rows: u64) -> [u8; HEADER] {
        let descr = match (self, self.element(spec)) {
            (Column::Ids, 2) => "<u2",
            (Column::Ids, _) => "<u4",
            _ => return npy::header(spec.dtype, rows, self.width(spec)),
        };
        npy::header_of(descr, rows, self.width(spec))
    }

    /// The bytes of rows, appended to `out`; the place of the first number that is too large for its type.
    pub fn encode(self, spec: &Spec, rows: &Embedded, out: &mut Vec<u8>) -> Result<(), usize> {
        match self {
            Column::Dense => spec.dtype.encode(&rows.dense, out),
            Column::Weights => spec.dtype.encode(&rows.weights, out),
            Column::Ids if self.element(spec) == 2 => {
                out.extend(rows.ids.iter().flat_map(|&id| (id as u16).to_le_bytes()));
                Ok(())
            }
            Column::Ids => {
                out.extend(rows.ids.iter().flat_map(|id| id.to_le_bytes()));
                Ok(())
            }
        }
    }
}

/// Token ids in `bytes`, of `element` bytes each.
pub fn decode_ids(element: usize, bytes: &[u8], out: &mut [u32]) {
    match element {
        2 => out.iter_mut().zip(bytes.as_chunks::<2>().0).for_each(|(x, b)| *x = u32::from(u16::from_le_bytes(*b))),
        _ => out.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(x, b)| *x = u32::from_le_bytes(*b)),
    }
}

/// The files of a folder, by column, in the order of the rows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    /// Dense embeddings.
    #[serde(default)]
    pub shards: Vec<Part>,
    /// Token ids of lexical embeddings.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lexical_ids: Vec<Part>,
    /// Their weights.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lexical_weights: Vec<Part>,
    /// The same once more, for Pyserini.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pyserini: Vec<Part>,
}

impl From<Vec<Part>> for Files {
    fn from(shards: Vec<Part>) -> Files {
        Files { shards, ..Files::default() }
    }
}

impl Files {
    /// Those of one column.
    pub fn column(&self, column: Column) -> &[Part] {
        match column {
            Column::Dense => &self.shards,
            Column::Ids => &self.lexical_ids,
            Column::Weights => &self.lexical_weights,
        }
    }

    /// Appends one to a column.
    pub fn push(&mut self, column: Column, part: Part) {
        match column {
            Column::Dense => self.shards.push(part),
            Column::Ids => self.lexical_ids.push(part),
            Column::Weights => self.lexical_weights.push(part),
        }
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Part> {
        self.shards.iter().chain(&self.lexical_ids).chain(&self.lexical_weights).chain(&self.pyserini)
    }

    /// The parts that rows are divided into: those of the first column.
    pub fn parts(&self, spec: &Spec) -> &[Part] {
        self.column(Column::of(spec)[0])
    }

    /// Rows in them.
    pub fn rows(&self, spec: &Spec) -> u64 {
        self.parts(spec).iter().map(|part| part.rows).sum()
    }

    /// Whether all columns of `spec` and no others hold `count` rows, divided in the same way.
    pub fn agree(&self, spec: &Spec, count: u64) -> bool {
        let rows = |parts: &[Part]| parts.iter().map(|part| part.rows).collect::<Vec<u64>>();
        let first = rows(self.parts(spec));
        let sum = first.iter().try_fold(0u64, |sum, &rows| sum.checked_add(rows));
        let all = [Column::Dense, Column::Ids, Column::Weights];
        let alike = |column: &Column| match Column::of(spec).contains(column) {
            true => rows(self.column(*column)) == first,
            false => self.column(*column).is_empty(),
        };
        sum == Some(count) && all.iter().all(alike) && (self.pyserini.is_empty() || rows(&self.pyserini) == first)
    }
}
