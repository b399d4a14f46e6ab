//! Packed host batches and how they are built from texts. Glossary: S sequences, T tokens of all sequences together, L tokens of one
//! sequence.

use std::ops::Range;

use rayon::prelude::*;

use super::corpus::{Corpus, Tokens};
use super::masking::{LONGEST_TEXT, MaskRules, MaskedText, Masker, TextVisibility, pool_rows, row_words};
use super::order::{Order, Part};
use crate::error::{Error, Result};

/// Which tokens each position of the enhanced decoder may see: per text a pool of bit rows, per position one row of it.
///
/// Position `i` of a text sees position `j` when bit `j` of its row is set and `i != j`; the rows need not clear their own bit.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Visibility {
    /// `[S + 1]` offsets into `words`. Rows of text `s` are `L.div_ceil(32)` words each.
    pub offsets: Vec<u32>,
    /// Bit `j % 32` of word `j / 32` of a row: token `j` of the text is visible.
    pub words: Vec<u32>,
    /// `[T]` row of its text's pool that the position uses.
    pub row: Vec<u16>,
}

/// One packed batch of a pre-training objective.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PretrainBatch {
    /// `[S + 1]` first token of every sequence in the stream; the last entry is T.
    pub cu_seqlens: Vec<u32>,
    /// `[S]` number of the sample in the run, counted over epochs from 0: the name of its masks and dropout.
    pub samples: Vec<u64>,
    /// `[T]` token ids after the encoder's masking.
    pub encoder_ids: Vec<u32>,
    /// Positions in the stream with an encoder label, ascending.
    pub encoder_label_rows: Vec<u32>,
    /// The labels, as token ids.
    pub encoder_label_ids: Vec<u32>,
    /// What the enhanced decoder works on; `None` for plain MLM.
    pub decoder: Option<DecoderBatch>,
    /// The texts as bags of words, where the objective has a loss over them.
    pub bags: Option<Bags>,
}

/// The distinct words of each text, of equal weight: 1 / n of the text's n tokens (arXiv 2211.08769).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bags {
    /// `[S + 1]` first word of each bag.
    pub offsets: Vec<u32>,
    /// Token ids, ascending and distinct in a bag: every token but `[CLS]` and `[SEP]`.
    pub ids: Vec<u32>,
    /// `[S]` weight of each word of a bag; 0 of an empty one.
    pub weights: Vec<f32>,
}

impl Bags {
    /// None yet.
    pub fn new() -> Self {
        Bags { offsets: vec![0], ..Bags::default() }
    }

    /// Adds a bag. `ids`: ascending and distinct.
    pub fn push(&mut self, ids: &[u32], weight: f32) {
        self.ids.extend_from_slice(ids);
        self.offsets.push(self.ids.len() as u32);
        self.weights.push(weight);
    }
}

/// The enhanced decoder's side of a [`PretrainBatch`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DecoderBatch {
    /// `[T]` unmasked token ids.
    pub ids: Vec<u32>,
    /// Positions in the stream with a decoder label, ascending: every token but `[CLS]` and `[SEP]`.
    pub label_rows: Vec<u32>,
    /// The labels, as token ids.
    pub label_ids: Vec<u32>,
    /// Position-specific masks.
    pub visibility: Visibility,
}

impl PretrainBatch {
    /// Number of sequences S.
    pub fn sequences(&self) -> usize {
        self.samples.len()
    }

    /// Number of tokens T.
    pub fn tokens(&self) -> usize {
        self.encoder_ids.len()
    }
}

impl Visibility {
    /// Whether position `i` of the text that is tokens `start..end` of the stream and number `s` of the batch sees position `j`.
    pub fn sees(&self, s: usize, text: Range<usize>, i: usize, j: usize) -> bool {
        let at = self.offsets[s] as usize + usize::from(self.row[text.start + i]) * row_words(text.len());
        i != j && self.words[at + j / 32] >> (j % 32) & 1 == 1
    }
}

/// Builds [`PretrainBatch`]es: reads texts, masks them, packs them. Texts are worked on in parallel in the current rayon pool; the result
/// depends on nothing but the samples.
#[derive(Clone, Debug)]
pub struct Builder {
    rules: MaskRules,
    order: Order,
    part: Part,
    max_length: usize,
}

/// One text's share of a batch under construction.
struct Slot<'a> {
    sample: u64,
    text: u64,
    encoder_ids: &'a mut [u32],
    decoder_ids: &'a mut [u32],
    visibility: Option<TextVisibility<'a>>,
    encoder_labels: Vec<u32>,
    encoder_label_ids: Vec<u32>,
    /// Distinct words, and tokens they are of.
    bag: (Vec<u32>, usize),
}

impl Builder {
    /// A builder for the samples of one part; longer texts are cut to `max_length` tokens, the last of which stays the last.
    pub fn new(rules: MaskRules, order: Order, part: Part, max_length: usize) -> Self {
        Builder { rules, order, part, max_length: max_length.min(LONGEST_TEXT) }
    }

    /// The batch of these samples, in their order.
    pub fn build(&self, corpus: &dyn Corpus, samples: impl Iterator<Item = u64>) -> Result<PretrainBatch> {
        let samples: Vec<u64> = samples.collect();
        let texts: Vec<u64> = samples.iter().map(|&sample| self.order.text(self.part, sample)).collect();
        let mut batch = self.allocate(corpus, samples, &texts)?;
        let mut slots = slots(&mut batch, &texts);
        let done: Vec<Result<()>> = slots
            .par_iter_mut()
            .map_init(
                || (Masker::new(&self.rules), Vec::new(), Vec::new()),
                |(masker, ids, starts), slot| self.fill(corpus, slot, masker, ids, starts),
            )
            .collect();
        // Errors in sample order: the same one is reported whatever the threads did.
        done.into_iter().collect::<Result<()>>()?;
        let mut bags = self.rules.has_bags().then(Bags::new);
        if let Some(bags) = &mut bags {
            for (words, tokens) in slots.iter().map(|slot| &slot.bag) {
                bags.push(words, if *tokens > 0 { 1.0 / *tokens as f32 } else { 0.0 });
            }
        }
        let labels: Vec<(Vec<u32>, Vec<u32>)> =
            slots.into_iter().map(|slot| (slot.encoder_labels, slot.encoder_label_ids)).collect();
        batch.bags = bags;
        for (&first, (positions, ids)) in batch.cu_seqlens.iter().zip(&labels) {
            batch.encoder_label_rows.extend(positions.iter().map(|position| first + position));
            batch.encoder_label_ids.extend(ids);
        }
        if let Some(decoder) = &mut batch.decoder {
            for (row, &id) in decoder.ids.iter().enumerate() {
                if !self.rules.vocabulary().is_border(id) {
                    decoder.label_rows.push(row as u32);
                    decoder.label_ids.push(id);
                }
            }
        }
        Ok(batch)
    }

    /// A batch whose offsets are final and whose token and mask arrays have their sizes.
    fn allocate(&self, corpus: &dyn Corpus, samples: Vec<u64>, texts: &[u64]) -> Result<PretrainBatch> {
        let mut batch = PretrainBatch { cu_seqlens: vec![0], samples, ..Default::default() };
        let mut visibility = Visibility { offsets: vec![0], ..Default::default() };
        let (mut tokens, mut words) = (0u64, 0u64);
        for &text in texts {
            let length = corpus.length(text)?.min(self.max_length);
            tokens += length as u64;
            words += (pool_rows(length) * row_words(length)) as u64;
            let (Ok(end), Ok(words_end)) = (u32::try_from(tokens), u32::try_from(words)) else {
                return Err(Error::usage(format!("a batch of {} sequences has too many tokens", texts.len()))
                    .remedy("choose smaller batches and accumulate more of them"));
            };
            batch.cu_seqlens.push(end);
            visibility.offsets.push(words_end);
        }
        batch.encoder_ids = vec![0; tokens as usize];
        if self.rules.has_decoder() {
            visibility.words = vec![0; words as usize];
            visibility.row = vec![0; tokens as usize];
            batch.decoder = Some(DecoderBatch { ids: vec![0; tokens as usize], visibility, ..Default::default() });
        }
        Ok(batch)
    }

    /// Reads and masks the text of one slot.
    fn fill(
        &self,
        corpus: &dyn Corpus,
        slot: &mut Slot<'_>,
        masker: &mut Masker,
        ids: &mut Vec<u32>,
        starts: &mut Vec<bool>,
    ) -> Result<()> {
        corpus.read(slot.text, ids, starts)?;
        if let Some(&last) = ids.last().filter(|_| ids.len() > self.max_length) {
            ids.truncate(self.max_length);
            starts.truncate(self.max_length);
            ids[self.max_length - 1] = last;
            starts[self.max_length - 1] = true;
        }
        if ids.len() != slot.encoder_ids.len() || starts.len() != ids.len() {
            let cause = format!("text {} has {} tokens and not {}", slot.text, ids.len(), slot.encoder_ids.len());
            return Err(Error::refused(cause).remedy("check the data with `verify`"));
        }
        let visibility = slot.visibility.as_mut().map(|to| TextVisibility { pool: &mut *to.pool, row: &mut *to.row });
        let out = MaskedText { encoder_ids: slot.encoder_ids, labels: &mut slot.encoder_labels, visibility };
        masker.mask(Tokens { ids, word_start: starts }, self.part.pass(), slot.sample, out);
        slot.encoder_label_ids.extend(slot.encoder_labels.iter().map(|&position| ids[position as usize]));
        if self.rules.has_decoder() {
            slot.decoder_ids.copy_from_slice(ids);
        }
        if self.rules.has_bags() {
            let (words, tokens) = &mut slot.bag;
            words.extend(ids.iter().filter(|&&id| !self.rules.vocabulary().is_border(id)));
            *tokens = words.len();
            words.sort_unstable();
            words.dedup();
        }
        Ok(())
    }
}

/// Cuts the arrays of a batch into the texts' shares.
fn slots<'a>(batch: &'a mut PretrainBatch, texts: &[u64]) -> Vec<Slot<'a>> {
    let mut encoder_ids = batch.encoder_ids.as_mut_slice();
    let (mut decoder_ids, mut pool, mut row, has_decoder) = match &mut batch.decoder {
        Some(d) => (d.ids.as_mut_slice(), d.visibility.words.as_mut_slice(), d.visibility.row.as_mut_slice(), true),
        None => Default::default(),
    };
    let lengths = batch.cu_seqlens.windows(2).map(|ends| (ends[1] - ends[0]) as usize);
    let mut slots = Vec::with_capacity(texts.len());
    for ((&text, &sample), length) in texts.iter().zip(&batch.samples).zip(lengths) {
        let visibility = has_decoder.then(|| TextVisibility {
            pool: take(&mut pool, pool_rows(length) * row_words(length)),
            row: take(&mut row, length),
        });
        slots.push(Slot {
            sample,
            text,
            encoder_ids: take(&mut encoder_ids, length),
            decoder_ids: take(&mut decoder_ids, if has_decoder { length } else { 0 }),
            visibility,
            encoder_labels: Vec::new(),
            encoder_label_ids: Vec::new(),
            bag: Default::default(),
        });
    }
    slots
}

/// Cuts the first `n` elements off a slice.
fn take<'a, T>(slice: &mut &'a mut [T], n: usize) -> &'a mut [T] {
    let (head, tail) = std::mem::take(slice).split_at_mut(n);
    *slice = tail;
    head
}
