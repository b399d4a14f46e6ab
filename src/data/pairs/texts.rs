//! Texts as the model gets them: with their prefix, cut to their limit, packed into one stream.

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ahash::RandomState;
use rayon::prelude::*;

use crate::data::corpus::Corpus;
use crate::data::masking::LONGEST_TEXT;
use crate::error::{Error, Result};

/// Packed texts of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextBatch {
    /// `[S + 1]` first token of every sequence in the stream; the last entry is T.
    pub cu_seqlens: Vec<u32>,
    /// `[S]` names of the sequences' dropout: `(sample << 16) | member`; member 0 of a sample is its query, then come its passages.
    pub samples: Vec<u64>,
    /// `[T]` token ids.
    pub ids: Vec<u32>,
    /// `[T]` token types: all 0 but for the second text of a pair.
    pub types: Vec<u32>,
}

impl TextBatch {
    /// Number of sequences S.
    pub fn sequences(&self) -> usize {
        self.samples.len()
    }

    /// Number of tokens T.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Some of the sequences.
    pub fn part(&self, range: Range<usize>) -> TextBatch {
        let (first, last) = (self.cu_seqlens[range.start], self.cu_seqlens[range.end]);
        let tokens = first as usize..last as usize;
        TextBatch {
            cu_seqlens: self.cu_seqlens[range.start..=range.end].iter().map(|at| at - first).collect(),
            samples: self.samples[range].to_vec(),
            ids: self.ids[tokens.clone()].to_vec(),
            types: self.types[tokens].to_vec(),
        }
    }

    /// These sequences and then the others.
    pub fn joined(&self, others: &TextBatch) -> TextBatch {
        let first = self.ids.len() as u32;
        let ends = others.cu_seqlens[1..].iter().map(|at| at + first);
        TextBatch {
            cu_seqlens: self.cu_seqlens.iter().copied().chain(ends).collect(),
            samples: [&self.samples[..], &others.samples].concat(),
            ids: [&self.ids[..], &others.ids].concat(),
            types: [&self.types[..], &others.types].concat(),
        }
    }
}

/// How texts of one kind are cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextRules {
    /// Longer texts are cut to this many tokens, `[CLS]`, prefix and `[SEP]` included; the last token stays the last.
    pub max_length: usize,
    /// Token ids put after `[CLS]`: an instruction such as `query: `.
    pub prefix: Vec<u32>,
}

impl TextRules {
    /// Texts cut to `max_length` tokens, without a prefix.
    pub fn new(max_length: usize) -> Self {
        TextRules { max_length, prefix: Vec::new() }
    }
}

/// The texts of a corpus under [`TextRules`].
pub struct Texts {
    corpus: Arc<dyn Corpus>,
    rules: TextRules,
    hasher: RandomState,
    /// Hash of each text as it is cut; 0 is not known yet.
    hashes: Box<[AtomicU64]>,
}

impl Texts {
    /// The texts of `corpus`. A limit that leaves no room for one token of text is refused.
    pub fn new(corpus: Arc<dyn Corpus>, rules: TextRules) -> Result<Texts> {
        let least = rules.prefix.len() + 3;
        if !(least..=LONGEST_TEXT).contains(&rules.max_length) {
            let cause = format!("texts with {} tokens before them cannot be cut to {}", least - 2, rules.max_length);
            return Err(Error::usage(cause).remedy(format!("choose a length from {least} to {LONGEST_TEXT}")));
        }
        let hashes = (0..corpus.texts()).map(|_| AtomicU64::new(0)).collect();
        let hasher = RandomState::with_seeds(0xA409_3822, 0x299F_31D0, 0x082E_FA98, 0xEC4E_6C89);
        Ok(Texts { corpus, rules, hasher, hashes })
    }

    /// Number of texts.
    pub fn texts(&self) -> u64 {
        self.corpus.texts()
    }

    /// How texts are cut.
    pub fn rules(&self) -> &TextRules {
        &self.rules
    }

    /// Tokens of text `i` after cutting.
    pub fn length(&self, i: u32) -> Result<usize> {
        let length = self.corpus.length(u64::from(i))?;
        if length < 2 {
            return Err(Error::refused(format!("text {i} has {length} tokens and not at least [CLS] and [SEP]"))
                .remedy("tokenize again"));
        }
        Ok((length + self.rules.prefix.len()).min(self.rules.max_length))
    }

    /// Reads text `i`, cut, into the scratch.
    pub(super) fn read<'s>(&self, i: u32, scratch: &'s mut Scratch) -> Result<&'s [u32]> {
        let length = self.length(i)?;
        self.corpus.read(u64::from(i), &mut scratch.ids, &mut scratch.starts)?;
        let (prefix, ids) = (&self.rules.prefix, &mut scratch.ids);
        let &[.., last] = ids.as_slice() else { return Err(changed(i)) };
        if !prefix.is_empty() {
            ids.splice(1..1, prefix.iter().copied());
        }
        if ids.len() < length {
            return Err(changed(i));
        }
        ids.truncate(length);
        ids[length - 1] = last;
        Ok(ids)
    }

    /// A hash of text `i` as it is cut: texts of equal hash are the same to the model. Computed once.
    pub fn hash(&self, i: u32) -> Result<u64> {
        self.hash_with(i, &mut Scratch::default())
    }

    /// [`Texts::hash`] with memory to read into.
    pub(super) fn hash_with(&self, i: u32, scratch: &mut Scratch) -> Result<u64> {
        // Relaxed: the value says something about an immutable text, nothing is published through it.
        let known = self.hashes.get(i as usize).map_or(0, |h| h.load(Ordering::Relaxed));
        if known != 0 {
            return Ok(known);
        }
        let hash = self.hasher.hash_one(self.read(i, scratch)?).max(1);
        self.hashes[i as usize].store(hash, Ordering::Relaxed);
        Ok(hash)
    }

    /// The texts `(name, number)` in this order as one stream.
    pub fn pack(&self, texts: &[(u64, u32)]) -> Result<TextBatch> {
        let names = texts.iter().map(|&(name, _)| name).collect();
        pack(
            names,
            |k| self.length(texts[k].1),
            |k, scratch, ids, _| {
                ids.copy_from_slice(self.read(texts[k].1, scratch)?);
                Ok(())
            },
        )
    }
}

/// Texts by falling length, those of equal length in their order, in batches of at most `texts` texts and `tokens` tokens. A text that is
/// longer than that is alone.
pub fn by_length(lengths: &[usize], (texts, tokens): (usize, usize)) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&i| Reverse(lengths[i]));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut held = 0;
    for i in order {
        match batches.last_mut() {
            Some(batch) if batch.len() < texts && held + lengths[i] <= tokens => batch.push(i),
            _ => {
                batches.push(vec![i]);
                held = 0;
            }
        }
        held += lengths[i];
    }
    batches
}

fn changed(i: u32) -> Error {
    Error::refused(format!("text {i} is shorter than its length")).remedy("check the data with `verify`")
}

/// Memory to read texts into.
#[derive(Default)]
pub(super) struct Scratch {
    ids: Vec<u32>,
    starts: Vec<bool>,
}

/// Packs the sequences of these names: `length` of a sequence, and `write` its ids and types. In parallel; the result and the error do
/// not depend on the threads.
pub(super) fn pack(
    samples: Vec<u64>,
    length: impl Fn(usize) -> Result<usize> + Sync,
    write: impl Fn(usize, &mut Scratch, &mut [u32], &mut [u32]) -> Result<()> + Sync,
) -> Result<TextBatch> {
    let (mut cu_seqlens, mut total) = (vec![0u32], 0u64);
    for k in 0..samples.len() {
        total += length(k)? as u64;
        let end = u32::try_from(total).map_err(|_| {
            Error::usage(format!("a batch of {} sequences has too many tokens", samples.len()))
                .remedy("choose smaller batches and accumulate more of them")
        })?;
        cu_seqlens.push(end);
    }
    let (mut ids, mut types) = (vec![0; total as usize], vec![0; total as usize]);
    let mut slots = Vec::with_capacity(samples.len());
    let (mut ids_left, mut types_left) = (ids.as_mut_slice(), types.as_mut_slice());
    for ends in cu_seqlens.windows(2) {
        let n = (ends[1] - ends[0]) as usize;
        let (ids, types) = (ids_left.split_off_mut(..n), types_left.split_off_mut(..n));
        slots.push(ids.zip(types).unwrap_or_default());
    }
    let written: Vec<Result<()>> = slots
        .into_par_iter()
        .enumerate()
        .map_init(Scratch::default, |scratch, (k, (ids, types))| write(k, scratch, ids, types))
        .collect();
    written.into_iter().collect::<Result<()>>()?;
    Ok(TextBatch { cu_seqlens, samples, ids, types })
}
