//! The rows that go through the LM head in chunks of whole sequences: which sequences go together, and the tables of the chunks' work on
//! the device.
//!
//! A chunk takes sequences in the order of the batch as long as they fit, so its rows are neighbours in the stream. Every chunk has the
//! same room: on a GPU the work of all of them is recorded once, for as many chunks as [`bound`] says.

use std::ops::Range;

use super::Capacity;
use crate::data::batch::PretrainBatch;
use crate::device::{DType, Device, Tensor};
use crate::ops::Count;
use crate::ops::bag_of_words::{Chunk, MOST_ROWS, NO_LABEL, SLAB, Shape};

/// Rows for each sequence that a chunk has room for: shorter ones would need more memory for their maxima than for their logits.
const ROWS_PER_SEQUENCE: usize = 8;

/// Rows of a chunk where that of the head is `usual`, with room for the longest sequence.
pub fn rows(usual: usize, longest: usize) -> usize {
    usual.max(longest.next_multiple_of(128)).min(MOST_ROWS)
}

/// Sequences of a chunk of `rows` rows.
fn sequences(rows: usize) -> usize {
    (rows / ROWS_PER_SEQUENCE).max(1)
}

/// The sequences of each chunk of `rows` rows, by their lengths.
pub fn layout(cu_seqlens: &[u32], rows: usize) -> Vec<Range<usize>> {
    let (mut chunks, mut first) = (Vec::new(), 0);
    for s in 0..cu_seqlens.len() - 1 {
        let would_be = (cu_seqlens[s + 1] - cu_seqlens[first]) as usize;
        if s > first && (would_be > rows || s - first == sequences(rows)) {
            chunks.push(first..s);
            first = s;
        }
    }
    if first + 1 < cu_seqlens.len() {
        chunks.push(first..cu_seqlens.len() - 1);
    }
    chunks
}

/// For how many chunks work is laid out where there are `n`: at most an eighth more, so that the batches of a run need few records.
pub fn bound(n: usize) -> usize {
    n.next_multiple_of((n.next_power_of_two() / 16).max(1))
}

/// Most chunks of a batch. One ends for want of room for the next sequence, which a pair of neighbours has less of than they have rows,
/// or because it has its number of sequences.
fn most(c: Capacity, rows: usize) -> usize {
    bound((2 * c.tokens / rows + c.sequences / sequences(rows) + 1).min(c.sequences.max(1)))
}

/// The chunks of a batch on the device.
pub struct HeadChunks {
    device: Device,
    rows: usize,
    /// Sizes of a chunk's tables.
    shape: [usize; TABLES],
    all: Tensor,
    weights: Tensor,
    words: Tensor,
    tables: Vec<Tables>,
    /// Rows of each chunk in use.
    used: Vec<usize>,
    bound: usize,
}

/// Tables of a chunk that are parts of one tensor: counts, stream rows, sequences, cu_rows, cu_slabs, slabs, label slots, labels, cu_bags.
const TABLES: usize = 9;

struct Tables {
    /// `[1]`, the first of the counts.
    used: Tensor,
    parts: [Tensor; TABLES],
    weights: Tensor,
}

impl HeadChunks {
    /// Room for batches up to `c`, in chunks of `rows` rows, which hold the longest sequence.
    pub fn new(device: Device, c: Capacity, rows: usize) -> Self {
        let n = sequences(rows);
        let shape = [6, rows, n, n + 1, n + 1, 3 * slabs(rows), rows, rows, n + 1];
        let (most, each) = (most(c, rows), shape.iter().sum::<usize>());
        let (all, weights) = (device.zeros(DType::U32, most * each), device.zeros(DType::F32, most * n));
        let tables = (0..most).map(|chunk| {
            let mut at = chunk * each;
            let parts: [Tensor; TABLES] = shape.map(|len| {
                at += len;
                all.slice(at - len..at)
            });
            Tables { used: parts[0].slice(0..1), parts, weights: weights.slice(chunk * n..(chunk + 1) * n) }
        });
        HeadChunks {
            device,
            rows,
            shape,
            tables: tables.collect(),
            all,
            weights,
            words: device.zeros(DType::U32, c.tokens),
            used: Vec::new(),
            bound: 0,
        }
    }

    /// Uploads the chunks of `batch`, which must have bags, and says for how many work is laid out.
    pub fn set(&mut self, batch: &PretrainBatch) -> usize {
        let Some(bags) = &batch.bags else { panic!("a batch without bags of words") };
        let chunks = layout(&batch.cu_seqlens, self.rows);
        self.bound = if self.device.is_gpu() { bound(chunks.len()) } else { chunks.len() };
        let each = self.shape.iter().sum::<usize>();
        let mut all = vec![0u32; self.bound * each];
        let mut weights = vec![0.0f32; self.bound * sequences(self.rows)];
        self.used.clear();
        // Chunks without a sequence have one slab after another of no sequence.
        let none = batch.sequences()..batch.sequences();
        let padded = chunks.into_iter().chain(std::iter::repeat(none)).take(self.bound);
        let to = all.chunks_exact_mut(each).zip(weights.chunks_exact_mut(sequences(self.rows)));
        for (sequences, (to, weights)) in padded.zip(to) {
            self.used.push((batch.cu_seqlens[sequences.end] - batch.cu_seqlens[sequences.start]) as usize);
            weights[..sequences.len()].copy_from_slice(&bags.weights[sequences.clone()]);
            let parts = tables(batch, &bags.offsets, sequences, self.rows);
            let mut at = 0;
            for (part, len) in parts.iter().zip(self.shape) {
                to[at..at + part.len()].copy_from_slice(part);
                at += len;
            }
        }
        self.all.upload(&all);
        self.weights.upload(&weights);
        self.words.upload(&bags.ids);
        self.bound
    }

    /// Sizes for the op, of a head over `vocabulary` words from rows `width` wide.
    pub fn shape(&self, width: usize, vocabulary: usize) -> Shape {
        Shape { width, vocabulary, sequences: sequences(self.rows), slabs: slabs(self.rows) }
    }

    /// The chunks that work is laid out for: where their rows are in the stream (`[rows]` u32), and what the op needs of them.
    pub fn chunks(&self) -> impl Iterator<Item = (&Tensor, Chunk<'_>)> {
        self.tables[..self.bound].iter().zip(&self.used).map(|(tables, &used)| {
            let rows = match self.device {
                Device::Gpu(_) => Count::on_device(self.rows, &tables.used),
                Device::Cpu => used.into(),
            };
            let [counts, stream, sequence, cu_rows, cu_slabs, slabs, label_slots, labels, cu_bags] = &tables.parts;
            let (words, weights) = (&self.words, &tables.weights);
            let chunk = Chunk {
                rows,
                counts,
                sequence,
                cu_rows,
                cu_slabs,
                slabs,
                label_slots,
                labels,
                cu_bags,
                words,
                weights,
            };
            (stream, chunk)
        })
    }
}

/// Most slabs of a chunk: each sequence's last one, and that of the slots without a sequence, may be shorter than the rest.
fn slabs(rows: usize) -> usize {
    rows.div_ceil(SLAB) + sequences(rows) + 1
}

/// The tables of one chunk, in the order of [`TABLES`].
fn tables(batch: &PretrainBatch, bags: &[u32], sequences: Range<usize>, rows: usize) -> [Vec<u32>; TABLES] {
    let cu = &batch.cu_seqlens[sequences.start..=sequences.end];
    let (start, end) = (cu[0], cu[sequences.len()]);
    let cu_rows: Vec<u32> = cu.iter().map(|row| row - start).collect();
    let (mut slabs, mut cu_slabs) = (Vec::new(), vec![0]);
    let borders = cu_rows.windows(2).map(|w| (w[0], w[1])).chain([(end - start, rows as u32)]);
    for (s, (from, to)) in borders.enumerate() {
        let own = s < sequences.len();
        for first in (from..to).step_by(SLAB) {
            slabs.extend([if own { s as u32 } else { NO_LABEL }, first, to.min(first + SLAB as u32)]);
        }
        if own {
            cu_slabs.push(slabs.len() as u32 / 3);
        }
    }
    let first_label = batch.encoder_label_rows.partition_point(|&row| row < start);
    let last_label = batch.encoder_label_rows.partition_point(|&row| row < end);
    let label_slots: Vec<u32> =
        batch.encoder_label_rows[first_label..last_label].iter().map(|row| row - start).collect();
    let mut labels = vec![NO_LABEL; rows];
    for (&slot, &id) in label_slots.iter().zip(&batch.encoder_label_ids[first_label..]) {
        labels[slot as usize] = id;
    }
    let counts = [
        (end - start) as usize,
        sequences.len(),
        cu_slabs[sequences.len()] as usize,
        slabs.len() / 3,
        label_slots.len(),
        first_label,
    ];
    [
        counts.map(|n| n as u32).to_vec(),
        (start..end).collect(),
        sequences.clone().map(|s| s as u32).collect(),
        cu_rows,
        cu_slabs,
        slabs,
        label_slots,
        labels,
        bags[sequences.start..=sequences.end].to_vec(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Site, Stream};

    fn cu(lengths: &[u32]) -> Vec<u32> {
        std::iter::once(0)
            .chain(lengths.iter().scan(0, |end, n| {
                Some({
                    *end += n;
                    *end
                })
            }))
            .collect()
    }

    #[test]
    fn chunks_hold_whole_sequences_in_order() {
        assert_eq!(layout(&cu(&[10, 6, 1, 16, 3]), 16), [0..2, 2..3, 3..4, 4..5]);
        assert_eq!(layout(&cu(&[1; 5]), 16), [0..2, 2..4, 4..5], "at most an eighth as many sequences as rows");
        assert!(layout(&[0], 16).is_empty());
    }

    #[test]
    fn no_batch_has_more_chunks_than_there_is_room_for() {
        let mut random = Stream::new(3, 0, Site::Init, 0);
        for rows in [16, 64, 128, 300] {
            for longest in [1, 2, rows as u32 / 2 + 1, rows as u32] {
                let lengths: Vec<u32> = (0..200).map(|_| 1 + random.below(longest)).collect();
                let c = Capacity {
                    tokens: lengths.iter().sum::<u32>() as usize,
                    sequences: lengths.len(),
                    length: rows,
                    encoder_labels: 0,
                };
                let chunks = layout(&cu(&lengths), rows);
                assert!(bound(chunks.len()) <= most(c, rows), "{} chunks of {rows} rows", chunks.len());
                for chunk in chunks {
                    let own = lengths[chunk.clone()].iter().sum::<u32>() as usize;
                    assert!(own <= rows && chunk.len() <= sequences(rows));
                    let of_own: u32 = lengths[chunk].iter().map(|n| n.div_ceil(SLAB as u32)).sum();
                    assert!(of_own as usize + (rows - own).div_ceil(SLAB) <= slabs(rows));
                }
            }
        }
    }

    #[test]
    fn bounds_are_few_and_near() {
        let all: std::collections::BTreeSet<usize> = (1..=256).map(bound).collect();
        assert!(all.len() <= 60, "{} bounds", all.len());
        assert!((1..=256).all(|n| bound(n) >= n && bound(n) <= n + n / 8));
    }
}
