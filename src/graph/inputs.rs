//! A host batch on the device: token streams, row subsets and the index groups that make gradient sums deterministic.

use crate::data::batch::{DecoderBatch, PretrainBatch};
use crate::device::{DType, Device, Tensor};
use crate::ops::attention::{self, Tiles, Work};
use crate::ops::{Count, Groups, RowNames};

use super::Capacity;
use super::extent::{Bounds, Extent};
use super::head_chunks::HeadChunks;

/// Room for index groups of up to `rows` rows.
pub struct GroupBuffers {
    count: Extent,
    entries: usize,
    keys: Tensor,
    offsets: Tensor,
    rows: Tensor,
}

impl GroupBuffers {
    fn new(device: Device, groups: usize, rows: usize) -> Self {
        let u32s = |len| device.zeros(DType::U32, len);
        let (count, keys, offsets, rows) = (Extent::new(device), u32s(groups), u32s(groups + 1), u32s(rows));
        GroupBuffers { count, entries: 0, keys, offsets, rows }
    }

    /// Groups the rows `0..keys.len()` by key; rows stay ascending inside a group. Work is laid out for `bound` rows.
    fn set(&mut self, keys: &[u32], bound: usize) {
        // A counting sort: keys are numbers of words, positions or sequences, and a batch has about as many rows.
        let mut ends = vec![0u32; keys.iter().max().map_or(0, |&most| most as usize + 1)];
        keys.iter().for_each(|&key| ends[key as usize] += 1);
        let (mut distinct, mut offsets, mut end) = (Vec::new(), vec![0], 0);
        for (key, rows) in ends.iter_mut().enumerate().filter(|(_, rows)| **rows > 0) {
            (end, *rows) = (end + *rows, end);
            distinct.push(key as u32);
            offsets.push(end);
        }
        let mut order = vec![0; keys.len()];
        for (row, &key) in keys.iter().enumerate() {
            order[ends[key as usize] as usize] = row as u32;
            ends[key as usize] += 1;
        }
        self.upload(&distinct, &offsets, &order, bound);
    }

    fn upload(&mut self, keys: &[u32], offsets: &[u32], rows: &[u32], bound: usize) {
        self.count.set(keys.len(), bound.max(keys.len()));
        self.entries = bound.max(rows.len());
        self.keys.upload(keys);
        self.offsets.upload(offsets);
        self.rows.upload(rows);
    }

    /// The groups, for an op.
    pub fn groups(&self) -> Groups<'_> {
        let (count, entries) = (self.count.get(), self.entries);
        Groups { count, entries, keys: &self.keys, offsets: &self.offsets, rows: &self.rows }
    }
}

/// Room for one of attention's tables of work; nothing on the CPU.
struct TileBuffers {
    count: Extent,
    table: Option<Tensor>,
}

impl TileBuffers {
    /// For up to `rows` rows of `sequences`.
    fn new(device: Device, rows: usize, sequences: usize) -> Self {
        let tiles = Self::most(rows, sequences);
        TileBuffers { count: Extent::new(device), table: device.is_gpu().then(|| device.zeros(DType::U32, 2 * tiles)) }
    }

    fn most(rows: usize, sequences: usize) -> usize {
        rows / attention::TILE + sequences
    }

    /// The tiles of the rows between the borders `cu`, laid out for `rows` rows of `sequences`.
    fn set(&mut self, cu: &[u32], others: &[u32], (rows, sequences): (usize, usize)) {
        self.fill(Self::most(rows, sequences), || attention::tiles(cu, others));
    }

    /// The sequences between the borders `cu`, laid out for `sequences`.
    fn set_whole(&mut self, cu: &[u32], sequences: usize) {
        self.fill(sequences, || attention::whole_sequences(cu));
    }

    fn fill(&mut self, bound: usize, tiles: impl FnOnce() -> Vec<[u32; 2]>) {
        if let Some(table) = &self.table {
            let tiles = tiles();
            self.count.set(tiles.len(), bound);
            table.upload(tiles.as_flattened());
        }
    }

    fn get(&self) -> Option<Tiles<'_>> {
        self.table.as_ref().map(|table| Tiles { table, count: self.count.get() })
    }
}

/// Some rows of the token stream: which, whose, and where.
pub struct Rows {
    /// Number of rows.
    pub count: Extent,
    /// `[count]` row of the token stream, ascending.
    pub token: Tensor,
    /// `[S + 1]` first row of each sequence.
    pub cu_rows: Tensor,
    sequence: Tensor,
    position: Tensor,
    query_tiles: TileBuffers,
    key_tiles: TileBuffers,
    whole: TileBuffers,
    longest: usize,
}

impl Rows {
    /// Room for `rows` rows of batches up to `c`.
    pub(super) fn new(device: Device, rows: usize, c: Capacity) -> Self {
        let u32s = |len| device.zeros(DType::U32, len);
        Rows {
            count: Extent::new(device),
            token: u32s(rows),
            cu_rows: u32s(c.sequences + 1),
            sequence: u32s(rows),
            position: u32s(rows),
            query_tiles: TileBuffers::new(device, rows, c.sequences),
            key_tiles: TileBuffers::new(device, c.tokens, c.sequences),
            whole: TileBuffers::new(device, 0, c.sequences),
            longest: 0,
        }
    }

    /// Work is laid out for `bound` of these rows of a batch with `bounds`.
    pub(super) fn set(
        &mut self,
        rows: &[u32],
        cu_seqlens: &[u32],
        bound: usize,
        bounds: &Bounds,
    ) -> (Vec<u32>, Vec<u32>) {
        let (mut cu, mut sequence, mut position) = (vec![0], Vec::new(), Vec::new());
        for s in 0..cu_seqlens.len() - 1 {
            while let Some(&row) = rows.get(sequence.len()).filter(|&&r| r < cu_seqlens[s + 1]) {
                sequence.push(s as u32);
                position.push(row - cu_seqlens[s]);
            }
            cu.push(sequence.len() as u32);
        }
        self.count.set(rows.len(), bound);
        self.token.upload(rows);
        self.cu_rows.upload(&cu);
        self.sequence.upload(&sequence);
        self.position.upload(&position);
        self.query_tiles.set(&cu, cu_seqlens, (bound, bounds.sequences));
        self.key_tiles.set(cu_seqlens, &cu, (bounds.tokens, bounds.sequences));
        self.whole.set_whole(cu_seqlens, bounds.sequences);
        self.longest = bounds.length;
        (sequence, position)
    }

    /// The tables of work of an attention whose queries are these rows.
    pub fn work(&self) -> Option<Work<'_>> {
        let (queries, keys, sequences) = (self.query_tiles.get()?, self.key_tiles.get()?, self.whole.get()?);
        Some(Work { queries, keys, sequences, longest: self.longest })
    }
}

/// A packed token stream on the device.
pub struct TokenInputs {
    /// T.
    pub count: Extent,
    /// S.
    pub sequences: Extent,
    /// Longest sequence, or what work is laid out for.
    pub longest: usize,
    /// The same on the device: every position that work is laid out for counts as in use.
    positions: Extent,
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
    tiles: TileBuffers,
    whole: TileBuffers,
}

impl TokenInputs {
    pub(super) fn new(device: Device, c: Capacity, words: usize, types: usize) -> Self {
        let u32s = |len| device.zeros(DType::U32, len);
        TokenInputs {
            count: Extent::new(device),
            sequences: Extent::new(device),
            longest: 0,
            positions: Extent::new(device),
            ids: u32s(c.tokens),
            types: u32s(c.tokens),
            cu_seqlens: u32s(c.sequences + 1),
            samples: device.zeros(DType::U64, c.sequences),
            sequence: u32s(c.tokens),
            position: u32s(c.tokens),
            by_word: GroupBuffers::new(device, c.tokens.min(words), c.tokens),
            by_position: GroupBuffers::new(device, c.length, c.tokens),
            by_type: GroupBuffers::new(device, types, c.tokens),
            tiles: TileBuffers::new(device, c.tokens, c.sequences),
            whole: TileBuffers::new(device, 0, c.sequences),
        }
    }

    pub(super) fn set(&mut self, ids: &[u32], types: &[u32], cu_seqlens: &[u32], samples: &[u64], bounds: &Bounds) {
        let (mut sequence, mut position) = (Vec::with_capacity(ids.len()), Vec::with_capacity(ids.len()));
        self.longest = bounds.length;
        self.positions.set(bounds.length, bounds.length);
        for (s, w) in cu_seqlens.windows(2).enumerate() {
            sequence.extend(std::iter::repeat_n(s as u32, (w[1] - w[0]) as usize));
            position.extend(0..w[1] - w[0]);
        }
        self.count.set(ids.len(), bounds.tokens);
        self.sequences.set(samples.len(), bounds.sequences);
        self.tiles.set(cu_seqlens, cu_seqlens, (bounds.tokens, bounds.sequences));
        self.whole.set_whole(cu_seqlens, bounds.sequences);
        self.ids.upload(ids);
        self.types.upload(types);
        self.cu_seqlens.upload(cu_seqlens);
        self.samples.upload(samples);
        self.sequence.upload(&sequence);
        self.position.upload(&position);
    }

    /// Prepares the sums of the backward for the tokens that [`Self::set`] was given.
    pub(super) fn set_groups(&mut self, ids: &[u32], types: &[u32], cu_seqlens: &[u32], bounds: &Bounds) {
        let position: Vec<u32> = cu_seqlens.windows(2).flat_map(|w| 0..w[1] - w[0]).collect();
        self.by_word.set(ids, bounds.tokens);
        self.by_position.set(&position, bounds.tokens);
        self.by_type.set(types, bounds.tokens);
    }

    /// The tables of work of an attention of all tokens.
    pub fn work(&self) -> Option<Work<'_>> {
        let (tiles, sequences) = (self.tiles.get()?, self.whole.get()?);
        Some(Work { queries: tiles, keys: tiles, sequences, longest: self.longest })
    }

    /// [`Self::longest`], for an op.
    pub fn longest_count(&self) -> Count<'_> {
        self.positions.get()
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
    /// Labelled rows by token type, all in one; where queries are embedded.
    pub by_type: Option<GroupBuffers>,
}

/// A pre-training batch on the device.
pub struct Inputs {
    /// Masked tokens.
    pub tokens: TokenInputs,
    /// Rows needed of the encoder's last layer: labelled ones, and `[CLS]` where there is a decoder; for DupMAE all.
    pub needed: Rows,
    /// M.
    pub label_count: Extent,
    /// `[M]` where the labelled rows are among the needed ones.
    pub label_rows: Tensor,
    /// `[M]` labels.
    pub labels: Tensor,
    /// `[S]` where the `[CLS]` rows are among the needed ones.
    pub cls_rows: Tensor,
    /// `[S]` first token of each sequence.
    pub first_tokens: Tensor,
    /// One group a sequence: its first token.
    pub by_first: GroupBuffers,
    /// Present for RetroMAE and DupMAE.
    pub decoder: Option<DecoderInputs>,
    /// Present for DupMAE.
    pub head_chunks: Option<HeadChunks>,
    device: Device,
    capacity: Capacity,
    /// The batch that is there already, ahead of its step.
    ready: Option<(PretrainBatch, Bounds)>,
}

impl Inputs {
    /// Room for batches up to `c`.
    pub fn new(device: Device, c: Capacity, vocabulary: usize, types: usize, decoder: bool) -> Self {
        let u32s = |len| device.zeros(DType::U32, len);
        let words = c.tokens * c.length.div_ceil(32).max(1) + c.sequences;
        Inputs {
            tokens: TokenInputs::new(device, c, vocabulary, types),
            needed: Rows::new(device, c.encoder_labels + c.sequences, c),
            label_count: Extent::new(device),
            label_rows: u32s(c.encoder_labels),
            labels: u32s(c.encoder_labels),
            cls_rows: u32s(c.sequences),
            first_tokens: u32s(c.sequences),
            by_first: GroupBuffers::new(device, c.sequences, c.sequences),
            decoder: decoder.then(|| DecoderInputs {
                tokens: TokenInputs::new(device, c, vocabulary, types),
                rows: Rows::new(device, c.tokens, c),
                labels: u32s(c.tokens),
                offsets: u32s(c.sequences + 1),
                words: u32s(words),
                row: device.zeros(DType::U16, c.tokens),
                by_position: GroupBuffers::new(device, c.length, c.tokens),
                by_sequence: GroupBuffers::new(device, c.sequences, c.tokens),
                by_type: None,
            }),
            head_chunks: None,
            device,
            capacity: c,
            ready: None,
        }
    }

    /// The same for DupMAE, whose LM head takes chunks of `rows` rows.
    pub fn of_whole_sequences(self, rows: usize) -> Self {
        let (device, c) = (self.device, self.capacity);
        Inputs {
            needed: Rows::new(device, c.tokens, c),
            head_chunks: Some(HeadChunks::new(device, c, rows)),
            decoder: self.decoder.map(|d| DecoderInputs { by_type: Some(GroupBuffers::new(device, 1, c.tokens)), ..d }),
            ..self
        }
    }

    /// Does the work of [`Self::set`] before its time, while a GPU computes the step before: the uploads are queued behind that, so
    /// they change nothing that it reads. Whatever is set next, the result is the same.
    pub fn make_ready(&mut self, batch: &PretrainBatch) {
        if self.device.is_gpu() {
            let bounds = self.set(batch);
            self.ready = Some((batch.clone(), bounds));
        }
    }

    /// Uploads a batch, which must fit the capacity, and says for what its work is laid out.
    pub fn set(&mut self, batch: &PretrainBatch) -> Bounds {
        match self.ready.take() {
            Some((ready, bounds)) if ready == *batch => bounds,
            _ => self.upload(batch),
        }
    }

    fn upload(&mut self, batch: &PretrainBatch) -> Bounds {
        let mut bounds = Bounds::new(self.device, self.capacity, batch);
        bounds.head_chunks = self.head_chunks.as_mut().map_or(0, |chunks| chunks.set(batch));
        let types = vec![0; batch.tokens()];
        self.tokens.set(&batch.encoder_ids, &types, &batch.cu_seqlens, &batch.samples, &bounds);
        self.tokens.set_groups(&batch.encoder_ids, &types, &batch.cu_seqlens, &bounds);
        let first = &batch.cu_seqlens[..batch.sequences()];
        self.first_tokens.upload(first);
        let with_cls = self.decoder.is_some();
        let mut needed: Vec<u32> = match self.head_chunks {
            Some(_) => (0..batch.tokens() as u32).collect(),
            None => batch.encoder_label_rows.clone(),
        };
        let bound = if self.head_chunks.is_some() { bounds.tokens } else { bounds.needed() };
        if with_cls && self.head_chunks.is_none() {
            needed.extend_from_slice(first);
            needed.sort_unstable();
            needed.dedup();
        }
        let place = |row: &u32| needed.partition_point(|r| r < row) as u32;
        self.label_rows.upload(&batch.encoder_label_rows.iter().map(place).collect::<Vec<_>>());
        self.labels.upload(&batch.encoder_label_ids);
        self.label_count.set(batch.encoder_label_ids.len(), bounds.labels);
        if with_cls {
            self.cls_rows.upload(&first.iter().map(place).collect::<Vec<_>>());
            self.by_first.set_rows(first, bounds.sequences);
        }
        self.needed.set(&needed, &batch.cu_seqlens, bound, &bounds);
        if let (Some(to), Some(from)) = (&mut self.decoder, &batch.decoder) {
            to.set(from, batch, &types, &bounds);
        }
        bounds
    }
}

impl GroupBuffers {
    /// One group for each of `rows`, with keys 0, 1, 2, ….
    fn set_rows(&mut self, rows: &[u32], bound: usize) {
        let iota: Vec<u32> = (0..=rows.len() as u32).collect();
        self.upload(&iota[..rows.len()], &iota, rows, bound);
    }
}

impl DecoderInputs {
    fn set(&mut self, from: &DecoderBatch, batch: &PretrainBatch, types: &[u32], bounds: &Bounds) {
        self.tokens.set(&from.ids, types, &batch.cu_seqlens, &batch.samples, bounds);
        self.tokens.set_groups(&from.ids, types, &batch.cu_seqlens, bounds);
        let (sequence, position) = self.rows.set(&from.label_rows, &batch.cu_seqlens, bounds.decoder_rows, bounds);
        self.by_sequence.set(&sequence, bounds.decoder_rows);
        self.by_position.set(&position, bounds.decoder_rows);
        if let Some(by_type) = &mut self.by_type {
            by_type.set(&vec![0; position.len()], bounds.decoder_rows);
        }
        self.labels.upload(&from.label_ids);
        self.offsets.upload(&from.visibility.offsets);
        self.words.upload(&from.visibility.words);
        self.row.upload(&from.visibility.row);
    }
}
