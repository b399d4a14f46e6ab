//! Documents as tokens without shards in between: what encoding reads of raw text, some thousand documents at a time.
//!
//! Unlike `tokenize`, which leaves texts without a token out, every document is kept: it has an id, and a list may name it. Of documents
//! with one id the first stays, as there.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use ahash::AHashSet;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::encode_document;
use super::ids::Seen;
use crate::data::shard::TitleSep;
use crate::data::source::{self, Document, Documents, Format, Input};
use crate::data::tokenizer::{Token, Tokenizer};
use crate::error::{Error, Kind, Result};
use crate::files::hex;

/// How documents are read and cut.
#[derive(Clone, Debug)]
pub struct StreamOptions {
    /// How titles are joined.
    pub title_sep: TitleSep,
    /// Tokens kept of a document, `[CLS]` and `[SEP]` not counted.
    pub tokens: usize,
    /// Overrules the detection of formats.
    pub format: Option<Format>,
    /// Plain text is separated by blank lines.
    pub blank_lines: bool,
    /// Documents with other ids are passed over.
    pub only: Option<AHashSet<String>>,
}

/// What was read so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamCounts {
    /// Documents handed out or skipped.
    pub documents: u64,
    /// Documents without a token.
    pub empty: u64,
    /// Documents that were cut.
    pub truncated: u64,
    /// Documents left out: their id was seen before.
    pub duplicates: u64,
}

/// Some documents in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Documented {
    /// Their ids: the number of the document, from 0, where it has none.
    pub ids: Vec<String>,
    /// Where the tokens of each end.
    pub ends: Vec<usize>,
    /// Token ids, without `[CLS]` and `[SEP]`.
    pub tokens: Vec<u32>,
}

/// Bytes of text in one piece of the stream, but for the last document of it.
const BYTES: usize = 64 << 20;
/// Refused records after which reading stops.
const ERRORS: usize = 100_000;

/// Reads files one after the other.
pub struct TextStream {
    inputs: std::vec::IntoIter<Input>,
    tokenizer: Arc<Tokenizer>,
    options: StreamOptions,
    open: Option<(Input, Documents)>,
    seen: Seen,
    digest: Sha256,
    counts: StreamCounts,
}

impl TextStream {
    /// Reads `inputs` in their order.
    pub fn new(inputs: Vec<Input>, tokenizer: Arc<Tokenizer>, options: StreamOptions) -> TextStream {
        TextStream {
            inputs: inputs.into_iter(),
            tokenizer,
            options,
            open: None,
            seen: Seen::default(),
            digest: Sha256::new(),
            counts: StreamCounts::default(),
        }
    }

    /// What was read so far.
    pub fn counts(&self) -> StreamCounts {
        self.counts
    }

    /// SHA-256, in hex, of all documents so far: ids, titles and texts as read.
    pub fn digest(&self) -> String {
        hex(&self.digest.clone().finalize())
    }

    /// Passes over `count` documents; false when there are fewer.
    ///
    /// # Errors
    /// As [`TextStream::next`].
    pub fn skip(&mut self, count: u64) -> Result<bool> {
        for _ in 0..count {
            if self.document()?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The next documents, at most `count`, fewer where they are long; none at the end.
    ///
    /// # Errors
    /// A file that cannot be read, or records that are refused: the first three of all that follow, and the count.
    pub fn next(&mut self, count: usize) -> Result<Option<Documented>> {
        let (mut documents, mut bytes) = (Vec::new(), 0);
        while documents.len() < count && bytes < BYTES {
            let Some(document) = self.document()? else { break };
            bytes += document.text.len() + document.title.as_ref().map_or(0, String::len);
            documents.push(document);
        }
        if documents.is_empty() { Ok(None) } else { self.encode(documents).map(Some) }
    }

    /// Tokenizes in parallel; one token past the limit tells that something was cut.
    fn encode(&mut self, documents: Vec<Document>) -> Result<Documented> {
        let (tokenizer, options) = (&*self.tokenizer, &self.options);
        let piece = documents.len().div_ceil(4 * rayon::current_num_threads()).max(16);
        let encoded = documents.par_chunks(piece).map(|documents| {
            let (mut encoder, sep) = (tokenizer.encoder(), tokenizer.special().sep);
            let (mut all, mut ends, mut cut, mut own) = (Vec::new(), Vec::new(), 0, Vec::new());
            for document in documents {
                own.clear();
                let limit = options.tokens + 1;
                let title = document.title.as_deref();
                encode_document(&mut encoder, options.title_sep, title, &document.text, limit, sep, &mut own)?;
                cut += u64::from(own.len() > options.tokens);
                all.extend(own.iter().take(options.tokens).map(|token: &Token| token.id()));
                ends.push(all.len());
            }
            Ok((all, ends, cut))
        });
        let encoded = encoded.collect::<Vec<Result<_>>>();
        let mut out = Documented::default();
        for piece in encoded {
            let (tokens, ends, cut): (Vec<u32>, Vec<usize>, u64) = piece?;
            let first = out.tokens.len();
            self.counts.truncated += cut;
            self.counts.empty +=
                ends.iter().zip(std::iter::once(&0).chain(&ends)).filter(|(a, b)| a == b).count() as u64;
            out.tokens.extend(tokens);
            out.ends.extend(ends.iter().map(|end| first + end));
        }
        out.ids = documents.into_iter().filter_map(|document| document.id).collect();
        Ok(out)
    }

    /// The next document, its id set.
    fn document(&mut self) -> Result<Option<Document>> {
        loop {
            let Some((input, documents)) = &mut self.open else {
                let Some(input) = self.inputs.next() else { return Ok(None) };
                let (_, documents) = self.open_input(&input)?;
                self.open = Some((input, documents));
                continue;
            };
            match documents.next() {
                None => self.open = None,
                Some(Err(e)) if e.kind() == Kind::Refused => return Err(self.refused(e)),
                Some(Err(e)) => return Err(e),
                Some(Ok(document)) => {
                    let path = input.path.clone();
                    if let Some(document) = self.take(document).map_err(|e| e.path(path))? {
                        return Ok(Some(document));
                    }
                }
            }
        }
    }

    fn open_input(&self, input: &Input) -> Result<(Format, Documents)> {
        source::open(input, self.options.format, self.options.blank_lines, Arc::new(AtomicU64::new(0)))
    }

    /// Counts and numbers a document; none when it is passed over.
    fn take(&mut self, mut document: Document) -> Result<Option<Document>> {
        if let Some(only) = &self.options.only
            && document.id.as_ref().is_none_or(|id| !only.contains(id))
        {
            return Ok(None);
        }
        if document.id.as_deref().is_some_and(|id| self.seen.again(id)) {
            self.counts.duplicates += 1;
            return Ok(None);
        }
        let number = self.counts.documents;
        let id = document.id.get_or_insert_with(|| number.to_string());
        if id.is_empty() || id.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(Error::refused(format!("the id {id:?} holds white space, which no list can name"))
                .remedy("rename the document"));
        }
        for part in [Some(id.as_str()), document.title.as_deref(), Some(&document.text)] {
            self.digest.update(part.map_or(u64::MAX, |text| text.len() as u64).to_le_bytes());
            self.digest.update(part.unwrap_or_default());
        }
        self.counts.documents += 1;
        Ok(Some(document))
    }

    /// A refused record, with those that follow it.
    fn refused(&mut self, first: Error) -> Error {
        let mut errors = vec![first];
        loop {
            let Some((_, documents)) = &mut self.open else {
                let Some(input) = self.inputs.next() else { break };
                match self.open_input(&input) {
                    Ok((_, documents)) => self.open = Some((input, documents)),
                    Err(_) => break,
                }
                continue;
            };
            match documents.next() {
                None => self.open = None,
                Some(Ok(_)) => {}
                Some(Err(e)) if e.kind() == Kind::Refused && errors.len() < ERRORS => errors.push(e),
                Some(Err(_)) => break,
            }
        }
        Error::several(errors)
    }
}
