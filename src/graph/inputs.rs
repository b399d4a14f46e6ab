//! A host batch on the device: token streams, row subsets and the index groups that make gradient sums deterministic.

use crate::data::batch::{DecoderBatch, PretrainBatch};
use crate::device::{DType, Tensor};
use crate::ops::{Groups, RowNames};

use super::Capacity;

/// Room for index groups of up to `rows` rows.
pub struct GroupBuffers {
    count: usize,
    keys: Tensor,
    offsets: Tensor,
    rows: Tensor,
}

impl GroupBuffers {
    fn new(groups: usize, rows: usize) -> Self {
        let u32s = |len| Tensor::zeros(DType::U32, len);
        GroupBuffers { count: 0, keys: u32s(groups), offsets: u32s(groups + 1), rows: u32s(rows) }
    }

    /// Groups the rows `0..keys.len()` by key; rows stay ascending inside a group.
    fn set(&mut self, keys: &[u32]) {
        let mut order: Vec<u64> =
            keys.iter().enumerate().map(|(row, &key)| u64::from(key) << 32 | row as u64).collect();
        order.sort_unstable();
        let (mut distinct, mut offsets) = (Vec::new(), Vec::new());
        for (i, &x) in order.iter().enumerate() {
            let key = (x >> 32) as u32;
            if distinct.last() != Some(&key) {
                distinct.push(key);
                offsets.push(i as u32);
            }
        }
        offsets.push(order.len() as u32);
        self.count = distinct.len();
        self.keys.upload(&distinct);
        self.offsets.upload(&offsets);
        self.rows.upload(&order.iter().map(|&x| x as u32).collect::<Vec<_>>());
    }

    /// The groups, for an op.
    pub fn groups(&self) -> Groups<'_> {
        Groups { count: self.count, keys: &self.keys, offsets: &self.offsets, rows: &self.rows }
    }
}

/// Some rows of the token stream: which, whose, and where.
pub struct Rows {
    /// Number of rows.
    pub count: usize,
    /// `[count]` row of the token stream, ascending.
    pub token: Tensor,
    /// `[S + 1]` first row of each sequence.
    pub cu_rows: Tensor,
    sequence: Tensor,
    position: Tensor,
}

impl Rows {
    pub(super) fn new(rows: usize, sequences: usize) -> Self {
        let u32s = |len| Tensor::zeros(DType::U32, len);
        Rows { count: 0, token: u32s(rows), cu_rows: u32s(sequences + 1), sequence: u32s(rows), position: u32s(rows) }
    }

    pub(super) fn set(&mut self, rows: &[u32], cu_seqlens: &[u32]) -> (Vec<u32>, Vec<u32>) {
        let (mut cu, mut sequence, mut position) = (vec![0], Vec::new(), Vec::new());
        for s in 0..cu_seqlens.len() - 1 {
            while let Some(&row) = rows.get(sequence.len()).filter(|&&r| r < cu_seqlens[s + 1]) {
                sequence.push(s as u32);
                position.push(row - cu_seqlens[s]);
            }
            cu.push(sequence.len() as u32);
        }
        self.count = rows.len();
        self.token.upload(rows);
        self.cu_rows.upload(&cu);
        self.sequence.upload(&sequence);
        self.position.upload(&position);
        (sequence, position)
    }
}

/// A packed token stream on the device.
pub struct TokenInputs {
    /// T.
    pub count: usize,
    /// S.
    pub sequences: usize,
    /// Longest sequence.
    pub longest: usize,
    /// `[T]`.
    pub ids: Tensor,
    /// `[T]` token types.
    pub types: Tensor,
    /// `[S + 1]`.
    pub cu_seqlens: Tensor,
    /// `[S]` u64.
    pub samples: Tensor,
    sequence: Tensor,
    position: Tensor,
    by_word: GroupBuffers,
    by_position: GroupBuffers,
    by_type: GroupBuffers,
}

impl TokenInputs {
    pub(super) fn new(c: Capacity, words: usize, types: usize) -> Self {
        let u32s = |len| Tensor::zeros(DType::U32, len);
        TokenInputs {
            count: 0,
            sequences: 0,
            longest: 0,
            ids: u32s(c.tokens),
            types: u32s(c.tokens),
            cu_seqlens: u32s(c.sequences + 1),
            samples: Tensor::zeros(DType::U64, c.sequences),
            sequence: u32s(c.tokens),
            position: u32s(c.tokens),
            by_word: GroupBuffers::new(c.tokens.min(words), c.tokens),
            by_position: GroupBuffers::new(c.length, c.tokens),
            by_type: GroupBuffers::new(types, c.tokens),
        }
    }

    pub(super) fn set(&mut self, ids: &[u32], types: &[u32], cu_seqlens: &[u32], samples: &[u64]) {
        let (mut sequence, mut position) = (Vec::with_capacity(ids.len()), Vec::with_capacity(ids.len()));
        self.longest = 0;
        for (s, w) in cu_seqlens.windows(2).enumerate() {
            sequence.extend(std::iter::repeat_n(s as u32, (w[1] - w[0]) as usize));
            position.extend(0..w[1] - w[0]);
            self.longest = self.longest.max((w[1] - w[0]) as usize);
        }
        (self.count, self.sequences) = (ids.len(), samples.len());
        self.ids.upload(ids);
        self.types.upload(types);
        self.cu_seqlens.upload(cu_seqlens);
        self.samples.upload(samples);
        self.sequence.upload(&sequence);
        self.position.upload(&position);
    }

    /// Prepares the sums of the backward for the tokens that [`Self::set`] was given.
    fn set_groups(&mut self, ids: &[u32], types: &[u32], cu_seqlens: &[u32]) {
        let position: Vec<u32> = cu_seqlens.windows(2).flat_map(|w| 0..w[1] - w[0]).collect();
        self.by_word.set(ids);
        self.by_position.set(&position);
        self.by_type.set(types);
    }

    /// Names of all rows.
    pub fn names(&self) -> RowNames<'_> {
        RowNames { samples: &self.samples, sequence: &self.sequence, position: &self.position }
    }

    /// Names of some rows.
    pub fn names_of<'a>(&'a self, rows: &'a Rows) -> RowNames<'a> {
        RowNames { samples: &self.samples, sequence: &rows.sequence, position: &rows.position }
    }

    /// Rows by word id, position and token type.
    pub fn groups(&self) -> [Groups<'_>; 3] {
        [self.by_word.groups(), self.by_position.groups(), self.by_type.groups()]
    }
}

/// The enhanced decoder's inputs.
pub struct DecoderInputs {
    /// Unmasked tokens.
    pub tokens: TokenInputs,
    /// Labelled rows.
    pub rows: Rows,
    /// `[rows]` labels.
    pub labels: Tensor,
    /// `[S + 1]` first word of each pool.
    pub offsets: Tensor,
    /// Bit rows.
    pub words: Tensor,
    /// `[T]` u16.
    pub row: Tensor,
    /// Labelled rows by position.
    pub by_position: GroupBuffers,
    /// Labelled rows by sequence.
    pub by_sequence: GroupBuffers,
}

/// A pre-training batch on the device.
pub struct Inputs {
    /// Masked tokens.
    pub tokens: TokenInputs,
    /// Rows needed of the encoder's last layer: labelled ones, and [CLS] where there is a decoder.
    pub needed: Rows,
    /// M.
    pub labels_count: usize,
    /// `[M]` where the labelled rows are among the needed ones.
    pub label_rows: Tensor,
    /// `[M]` labels.
    pub labels: Tensor,
    /// `[S]` where the [CLS] rows are among the needed ones.
    pub cls_rows: Tensor,
    /// `[S]` first token of each sequence.
    pub first_tokens: Tensor,
    /// One group a sequence: its first token.
    pub by_first: GroupBuffers,
    /// Present for RetroMAE.
    pub decoder: Option<DecoderInputs>,
}

impl Inputs {
    /// Room for batches up to `c`.
    pub fn new(c: Capacity, vocabulary: usize, types: usize, decoder: bool) -> Self {
        let u32s = |len| Tensor::zeros(DType::U32, len);
        let words = c.tokens * c.length.div_ceil(32).max(1) + c.sequences;
        Inputs {
            tokens: TokenInputs::new(c, vocabulary, types),
            needed: Rows::new(c.encoder_labels + c.sequences, c.sequences),
            labels_count: 0,
            label_rows: u32s(c.encoder_labels),
            labels: u32s(c.encoder_labels),
            cls_rows: u32s(c.sequences),
            first_tokens: u32s(c.sequences),
            by_first: GroupBuffers::new(c.sequences, c.sequences),
            decoder: decoder.then(|| DecoderInputs {
                tokens: TokenInputs::new(c, vocabulary, types),
                rows: Rows::new(c.tokens, c.sequences),
                labels: u32s(c.tokens),
                offsets: u32s(c.sequences + 1),
                words: u32s(words),
                row: Tensor::zeros(DType::U16, c.tokens),
                by_position: GroupBuffers::new(c.length, c.tokens),
                by_sequence: GroupBuffers::new(c.sequences, c.tokens),
            }),
        }
    }

    /// Uploads a batch. It must fit the capacity.
    pub fn set(&mut self, batch: &PretrainBatch) {
        let types = vec![0; batch.tokens()];
        self.tokens.set(&batch.encoder_ids, &types, &batch.cu_seqlens, &batch.samples);
        self.tokens.set_groups(&batch.encoder_ids, &types, &batch.cu_seqlens);
        let first = &batch.cu_seqlens[..batch.sequences()];
        self.first_tokens.upload(first);
        let with_cls = self.decoder.is_some();
        let mut needed: Vec<u32> = batch.encoder_label_rows.clone();
        if with_cls {
            needed.extend_from_slice(first);
            needed.sort_unstable();
            needed.dedup();
        }
        let place = |row: &u32| needed.partition_point(|r| r < row) as u32;
        self.label_rows.upload(&batch.encoder_label_rows.iter().map(place).collect::<Vec<_>>());
        self.labels.upload(&batch.encoder_label_ids);
        self.labels_count = batch.encoder_label_ids.len();
        if with_cls {
            self.cls_rows.upload(&first.iter().map(place).collect::<Vec<_>>());
            self.by_first.set_rows(first);
        }
        self.needed.set(&needed, &batch.cu_seqlens);
        if let (Some(to), Some(from)) = (&mut self.decoder, &batch.decoder) {
            to.set(from, batch, &types);
        }
    }
}

impl GroupBuffers {
    /// One group for each of `rows`, with keys 0, 1, 2, ….
    fn set_rows(&mut self, rows: &[u32]) {
        let iota: Vec<u32> = (0..=rows.len() as u32).collect();
        self.count = rows.len();
        self.keys.upload(&iota[..rows.len()]);
        self.offsets.upload(&iota);
        self.rows.upload(rows);
    }
}

impl DecoderInputs {
    fn set(&mut self, from: &DecoderBatch, batch: &PretrainBatch, types: &[u32]) {
        self.tokens.set(&from.ids, types, &batch.cu_seqlens, &batch.samples);
        self.tokens.set_groups(&from.ids, types, &batch.cu_seqlens);
        let (sequence, position) = self.rows.set(&from.label_rows, &batch.cu_seqlens);
        self.by_sequence.set(&sequence);
        self.by_position.set(&position);
        self.labels.upload(&from.label_ids);
        self.offsets.upload(&from.visibility.offsets);
        self.words.upload(&from.visibility.words);
        self.row.upload(&from.visibility.row);
    }
}
