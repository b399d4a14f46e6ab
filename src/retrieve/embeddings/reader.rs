//! Reading a folder of embeddings: rows in order, in bounded memory, digests checked on the way.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::columns::decode_ids;
use super::{Column, IDS, META, Meta, Spec};
use crate::data::shard::Verified;
use crate::error::{Error, IoContext, Result};
use crate::retrieve::npy::{Number, Stored};
use crate::retrieve::representation::Embedded;

/// An open folder.
#[derive(Debug)]
pub struct Embeddings {
    dir: PathBuf,
    meta: Meta,
    ids: IdList,
    /// By column.
    files: Vec<(Column, Vec<File>)>,
}

/// Rows that are read at a time: some megabytes.
pub fn block_rows(dim: usize) -> usize {
    ((16 << 20) / (4 * dim)).clamp(64, 1 << 16)
}

/// Numbers of a row.
fn width(spec: &Spec) -> usize {
    Column::of(spec).iter().map(|column| column.width(spec)).sum()
}

impl Embeddings {
    /// Opens a folder: description and ids are checked, sizes of the files too; the rows when they are read.
    ///
    /// # Errors
    /// Something is missing, damaged or of another size.
    pub fn open(dir: &Path) -> Result<Embeddings> {
        let meta = Meta::read(dir)?;
        let ids = IdList::read(&dir.join(IDS), &meta)?;
        let mut files = Vec::new();
        for &column in Column::of(&meta.spec) {
            let mut opened = Vec::new();
            for part in meta.files.column(column) {
                let path = dir.join(&part.file);
                let file = File::open(&path).at(&path, "cannot open")?;
                let found = file.metadata().at(&path, "cannot look at")?.len();
                let expected = meta.header() as u64 + part.rows * column.row(&meta.spec) as u64;
                if found != expected {
                    return Err(Error::refused(format!("has {found} bytes where {META} says {expected}"))
                        .path(&path)
                        .remedy(AGAIN));
                }
                opened.push(file);
            }
            files.push((column, opened));
        }
        Ok(Embeddings { dir: dir.to_path_buf(), meta, ids, files })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the folder says of itself.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// Number of rows.
    pub fn rows(&self) -> u64 {
        self.meta.count
    }

    /// The id of row `row`, which must exist.
    pub fn id(&self, row: u64) -> &str {
        self.ids.get(row as usize)
    }

    /// Hands out all rows in order, some thousand at a time: `each(first, rows)`. While a block is worked on the next is read. Digests
    /// are compared at the end of every file.
    ///
    /// # Errors
    /// A failed read, a file that does not match its digest, a number that is not finite or too large for the type, or an error of `each`.
    pub fn each_block<N: Number>(&self, mut each: impl FnMut(u64, &Embedded<N>) -> Result<()>) -> Result<()> {
        let (to, blocks) = std::sync::mpsc::sync_channel::<Result<(u64, Embedded<N>)>>(1);
        let (back, used) = std::sync::mpsc::channel::<Embedded<N>>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut first = 0;
                for (part, of) in self.meta.files.parts(&self.meta.spec).iter().enumerate() {
                    let sent = self.read_part(part, |from, rows| {
                        // Nobody listens any more after an error there.
                        let going = to.send(Ok((first + from, rows))).is_ok();
                        going.then(|| used.try_recv().unwrap_or_default())
                    });
                    match sent {
                        Ok(true) => first += of.rows,
                        Ok(false) => return,
                        Err(e) => return drop(to.send(Err(e))),
                    }
                }
            });
            for block in blocks {
                let (first, rows) = block?;
                each(first, &rows)?;
                // The reader may be done.
                let _ = back.send(rows);
            }
            Ok(())
        })
    }

    /// Reads a part of the rows in blocks, its columns side by side: `each(first row of the part, rows)` gives room for the next block, or
    /// none to stop. Says whether it came to the end.
    fn read_part<N: Number>(
        &self,
        part: usize,
        mut each: impl FnMut(u64, Embedded<N>) -> Option<Embedded<N>>,
    ) -> Result<bool> {
        let (spec, header) = (&self.meta.spec, self.meta.header());
        let (block, all) = (block_rows(width(spec)) as u64, self.meta.files.parts(spec)[part].rows);
        let (mut buffer, mut digests) = (vec![0; header], Vec::new());
        for (column, files) in &self.files {
            files[part].read_exact_at(&mut buffer, 0).at(self.path(*column, part), "cannot read")?;
            digests.push(crc32c::crc32c(&buffer));
        }
        let (mut at, mut rows) = (0, Embedded::<N>::default());
        while at < all {
            let count = block.min(all - at);
            for ((column, files), crc) in self.files.iter().zip(&mut digests) {
                let row = column.row(spec);
                buffer.resize(count as usize * row, 0);
                let from = header as u64 + at * row as u64;
                files[part].read_exact_at(&mut buffer, from).at(self.path(*column, part), "cannot read")?;
                *crc = crc32c::crc32c_append(*crc, &buffer);
                self.decode((*column, part), at, &buffer, &mut rows)?;
            }
            match each(at, rows) {
                Some(room) => rows = room,
                None => return Ok(false),
            }
            at += count;
        }
        let wrong =
            self.files.iter().zip(digests).find(|((column, _), crc)| self.meta.files.column(*column)[part].crc != *crc);
        wrong.map_or(Ok(true), |((column, _), _)| Err(changed(&self.path(*column, part))))
    }

    fn path(&self, column: Column, part: usize) -> PathBuf {
        self.dir.join(&self.meta.files.column(column)[part].file)
    }

    /// Bytes to numbers, all of which must be finite, and to ids, which must be of the vocabulary.
    fn decode<N: Number>(
        &self,
        (column, part): (Column, usize),
        first: u64,
        bytes: &[u8],
        out: &mut Embedded<N>,
    ) -> Result<()> {
        let spec = &self.meta.spec;
        let element = column.element(spec);
        let count = bytes.len() / element;
        let wrong = match column {
            Column::Dense => first_wrong(spec.dtype, bytes, count, &mut out.dense),
            Column::Weights => first_wrong(spec.dtype, bytes, count, &mut out.weights),
            Column::Ids => {
                out.ids.resize(count, 0);
                decode_ids(element, bytes, &mut out.ids);
                out.ids.iter().position(|&id| id as usize >= spec.vocab_size)
            }
        };
        let Some(at) = wrong else { return Ok(()) };
        let row = first + (at / column.width(spec)) as u64;
        let before: u64 = self.meta.files.parts(spec)[..part].iter().map(|part| part.rows).sum();
        let id = self.id(before + row);
        let mut number = [f32::NAN];
        if column != Column::Ids {
            spec.dtype.decode(&bytes[at * element..(at + 1) * element], &mut number);
        }
        let (what, remedy) = match column {
            Column::Ids => (format!("token {} of a vocabulary of {}", out.ids[at], spec.vocab_size), AGAIN),
            _ if number[0].is_finite() => {
                (format!("{}, too large for f16, which ends at {}", number[0], half::f16::MAX), "use --precision fp32")
            }
            _ => ("a number that is not finite".into(), AGAIN),
        };
        Err(Error::refused(format!("the embedding of {id} (row {row}) holds {what}"))
            .path(self.path(column, part))
            .remedy(remedy))
    }

    /// Checks every digest and every number.
    ///
    /// # Errors
    /// What is damaged first.
    pub fn verify(&self) -> Result<Verified> {
        self.each_block::<f32>(|_, _| Ok(()))?;
        let (mut files, mut bytes) = (2, self.ids.text.len() as u64);
        for (column, of) in &self.files {
            files += of.len();
            bytes += (self.meta.header() * of.len()) as u64 + self.rows() * column.row(&self.meta.spec) as u64;
        }
        for part in &self.meta.files.pyserini {
            let path = self.dir.join(&part.file);
            let (crc, size) = digest(&path)?;
            if crc != part.crc {
                return Err(changed(&path));
            }
            (files, bytes) = (files + 1, bytes + size);
        }
        Ok(Verified { files, bytes })
    }
}

/// Decodes `count` numbers in parallel; the place of the first that is not finite.
fn first_wrong<N: Number>(stored: Stored, bytes: &[u8], count: usize, out: &mut Vec<N>) -> Option<usize> {
    const PIECE: usize = 1 << 14;
    out.resize(count, N::default());
    let pieces = out.par_chunks_mut(PIECE).zip(bytes.par_chunks(PIECE * stored.size())).enumerate();
    let wrong = pieces.filter_map(|(i, (out, bytes))| match N::decode(stored, bytes, out) {
        true => None,
        false => out.iter().position(|x| !x.is_finite()).map(|at| i * PIECE + at),
    });
    wrong.min()
}

/// CRC32C and size of a file.
fn digest(path: &Path) -> Result<(u32, u64)> {
    let mut file = File::open(path).at(path, "cannot open")?;
    let (mut buffer, mut crc, mut size) = (vec![0; 1 << 20], 0, 0);
    loop {
        let n = file.read(&mut buffer).at(path, "cannot read")?;
        if n == 0 {
            return Ok((crc, size));
        }
        (crc, size) = (crc32c::crc32c_append(crc, &buffer[..n]), size + n as u64);
    }
}

fn changed(path: &Path) -> Error {
    Error::refused(format!("does not match its digest in {META}: it was changed or damaged")).path(path).remedy(AGAIN)
}

const AGAIN: &str = "restore the file or encode again";

/// The ids, in memory: 8.8 million of MS MARCO take 70 MB.
#[derive(Debug)]
struct IdList {
    text: String,
    /// Where every [`EVERY`]th line begins.
    starts: Vec<usize>,
}

const EVERY: usize = 32;

impl IdList {
    fn read(path: &Path, meta: &Meta) -> Result<IdList> {
        let bytes = std::fs::read(path).at(path, "cannot read")?;
        if crc32c::crc32c(&bytes) != meta.ids_crc {
            return Err(changed(path));
        }
        let text = String::from_utf8(bytes).map_err(|_| Error::refused("is not UTF-8").path(path).remedy(AGAIN))?;
        let (mut starts, mut line) = (Vec::new(), 0u64);
        let mut start = 0;
        for (end, _) in text.match_indices('\n') {
            if line.is_multiple_of(EVERY as u64) {
                starts.push(start);
            }
            (line, start) = (line + 1, end + 1);
        }
        if line != meta.count || start != text.len() {
            return Err(Error::refused(format!("has {line} lines for {} rows", meta.count)).path(path).remedy(AGAIN));
        }
        Ok(IdList { text, starts })
    }

    fn get(&self, row: usize) -> &str {
        self.text[self.starts[row / EVERY]..].lines().nth(row % EVERY).unwrap_or_default()
    }
}
