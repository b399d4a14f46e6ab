//! Lexical embeddings as JSON lines for Pyserini's impact index (`JsonVectorCollection`):
//! `{"id": …, "contents": "", "vector": {token: impact}}`.
//!
//! Impacts are integers of at least 1 there. As is usual with learned sparse vectors they are weights times 100, rounded; a token whose
//! impact would be below 1 is left out, since such an index has no place for it. `contents` is empty: texts are not kept. Tokens are
//! spelled as in the vocabulary, the largest weight first, so that the same embeddings give the same bytes.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::super::embeddings::{Column, decode_ids};
use super::super::npy::HEADER;
use super::Job;
use crate::error::{Error, Result};
use crate::files::Disk;
use crate::files::disk::File;

/// Where the files lie in the folder of embeddings.
pub const FOLDER: &str = "pyserini";
/// What a weight is multiplied by.
const SCALE: f32 = 100.0;
/// Rows at a time.
const BLOCK: u64 = 4096;

/// Writes `rows` rows, whose `ids` follow and whose tokens and weights lie in the files `from`; gives the digest of what was written.
pub(super) fn write<'i>(
    disk: &Disk,
    job: &Job,
    from: [PathBuf; 2],
    rows: u64,
    ids: &mut impl Iterator<Item = &'i [u8]>,
    to: &mut File,
) -> Result<u32> {
    let (spec, k) = (&job.spec, job.spec.lexical_top_k);
    let mut files = Vec::new();
    for path in &from {
        let mut file = disk.open(path)?;
        file.seek(SeekFrom::Start(HEADER as u64)).map_err(|e| Error::io(path, "cannot read", &e))?;
        files.push(file);
    }
    let (mut crc, mut text, mut bytes) = (0, String::new(), Vec::new());
    let (mut tokens, mut weights) = (Vec::new(), Vec::new());
    for at in (0..rows).step_by(BLOCK as usize) {
        let count = BLOCK.min(rows - at) as usize;
        let mut next = |file: usize, column: Column, bytes: &mut Vec<u8>| {
            bytes.resize(count * column.row(spec), 0);
            files[file].read_exact(bytes).map_err(|e| Error::io(&from[file], "cannot read", &e))
        };
        next(0, Column::Ids, &mut bytes)?;
        tokens.resize(count * k, 0);
        decode_ids(Column::Ids.element(spec), &bytes, &mut tokens);
        next(1, Column::Weights, &mut bytes)?;
        weights.resize(count * k, 0.0);
        spec.dtype.decode(&bytes, &mut weights);
        text.clear();
        for (tokens, weights) in tokens.chunks_exact(k).zip(weights.chunks_exact(k)) {
            let id = ids.next().map(String::from_utf8_lossy).unwrap_or_default();
            line(job, &id, tokens, weights, &mut text, &from[0])?;
        }
        crc = crc32c::crc32c_append(crc, text.as_bytes());
        to.put(text.as_bytes())?;
    }
    Ok(crc)
}

/// One document.
fn line(job: &Job, id: &str, tokens: &[u32], weights: &[f32], out: &mut String, path: &Path) -> Result<()> {
    let quoted = |text: &str| {
        serde_json::to_string(text).map_err(|e| {
            Error::refused(format!("{text} cannot be written as JSON: {e}")).path(path).remedy("report this")
        })
    };
    out.push_str(&format!("{{\"id\": {}, \"contents\": \"\", \"vector\": {{", quoted(id)?));
    let mut first = true;
    for (&token, weight) in tokens.iter().zip(weights) {
        let impact = (weight * SCALE).round() as u32;
        if impact > 0 {
            let comma = if first { "" } else { ", " };
            out.push_str(&format!("{comma}{}: {impact}", quoted(&job.tokenizer.spelling(token))?));
            first = false;
        }
    }
    out.push_str("}}\n");
    Ok(())
}
