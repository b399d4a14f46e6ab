//! Packed host batches. Glossary: S sequences, T tokens of all sequences together, L tokens of one sequence.

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
}

/// The enhanced decoder's side of a [`PretrainBatch`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DecoderBatch {
    /// `[T]` unmasked token ids.
    pub ids: Vec<u32>,
    /// Positions in the stream with a decoder label, ascending: every token but [CLS] and [SEP].
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
