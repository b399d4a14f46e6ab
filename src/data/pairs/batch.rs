//! Packed batches of fine-tuning. Glossary: S sequences, T tokens of all sequences together, B queries, P passages, g passages a query.

/// A packed token stream.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TextBatch {
    /// `[S + 1]` first token of every sequence; the last entry is T.
    pub cu_seqlens: Vec<u32>,
    /// `[S]` name of each sequence's dropout.
    pub samples: Vec<u64>,
    /// `[T]` token ids.
    pub ids: Vec<u32>,
    /// `[T]` token types.
    pub types: Vec<u32>,
}

/// One batch of a bi-encoder.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ContrastiveBatch {
    /// B texts.
    pub queries: TextBatch,
    /// P = B g texts, those of a query side by side, its positive first.
    pub passages: TextBatch,
    /// g.
    pub group: usize,
    /// `[B]` each query's positive among the passages.
    pub targets: Vec<u32>,
    /// `[B, ⌈P / 32⌉]` bit p of row b: passage p is no candidate of query b.
    pub hidden: Option<Vec<u32>>,
    /// `[B, g]` scores of a teacher.
    pub teacher: Option<Vec<f32>>,
}

/// One batch of a cross-encoder.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CrossBatch {
    /// B g pairs of query and passage, those of a query side by side, its positive first.
    pub pairs: TextBatch,
    /// g.
    pub group: usize,
}
