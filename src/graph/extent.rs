//! For how many rows the work of a batch is laid out, and how many of them are in use.
//!
//! On the CPU both are the same. On a GPU a step is recorded once and replayed for every batch that fits it, so its work is laid out
//! for rounded numbers of rows; kernels read the true ones from device memory.

use super::Capacity;
use crate::data::batch::PretrainBatch;
use crate::device::{DType, Device, Tensor};
use crate::ops::Count;

/// The rows for which the work of a batch is laid out. Batches with equal bounds have equal work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// T.
    pub tokens: usize,
    /// S.
    pub sequences: usize,
    /// Rows with an encoder label.
    pub labels: usize,
    /// Rows of the decoder.
    pub decoder_rows: usize,
    /// Longest sequence.
    pub length: usize,
    /// Chunks of whole sequences that go through the LM head.
    pub head_chunks: usize,
}

/// `n` rounded up to a multiple of one `parts`-th of `most`, and at most that.
fn rounded(n: usize, most: usize, parts: usize) -> usize {
    n.max(1).next_multiple_of(most.div_ceil(parts).next_multiple_of(16)).min(most)
}

impl Bounds {
    /// Of `batch` on `device`, within `capacity`. At most an eighth of the capacity is laid out in vain.
    pub fn new(device: Device, capacity: Capacity, batch: &PretrainBatch) -> Self {
        let longest = batch.cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as usize).max().unwrap_or(0);
        let exact = Bounds {
            tokens: batch.tokens(),
            sequences: batch.sequences(),
            labels: batch.encoder_label_ids.len(),
            decoder_rows: batch.decoder.as_ref().map_or(0, |d| d.label_ids.len()),
            length: longest,
            head_chunks: 0,
        };
        if device.is_gpu() { exact.rounded(capacity) } else { exact }
    }

    /// Rounded so that the batches of a run need few records.
    pub fn rounded(self, capacity: Capacity) -> Self {
        Bounds {
            tokens: rounded(self.tokens, capacity.tokens, 8),
            sequences: self.sequences.next_power_of_two().min(capacity.sequences),
            labels: rounded(self.labels, capacity.tokens, 16).min(capacity.encoder_labels),
            decoder_rows: rounded(self.decoder_rows, capacity.tokens, 8),
            length: capacity.length,
            head_chunks: self.head_chunks,
        }
    }

    /// Rows needed of the encoder's last layer: labels, and `[CLS]`; no more than there are tokens.
    pub fn needed(&self) -> usize {
        (self.labels + self.sequences).min(self.tokens)
    }
}

/// A number of rows, here and on the device.
pub struct Extent {
    /// Rows in use.
    pub count: usize,
    bound: usize,
    /// `[1]` u32 on a GPU.
    exact: Option<Tensor>,
}

impl Extent {
    /// None yet.
    pub fn new(device: Device) -> Self {
        Extent { count: 0, bound: 0, exact: device.is_gpu().then(|| device.zeros(DType::U32, 1)) }
    }

    /// `count` rows, laid out for `bound`.
    pub fn set(&mut self, count: usize, bound: usize) {
        assert!(count <= bound || self.exact.is_none(), "{count} rows where work is laid out for {bound}");
        (self.count, self.bound) = (count, bound);
        if let Some(exact) = &self.exact {
            exact.upload(&[count as u32]);
        }
    }

    /// For an op.
    pub fn get(&self) -> Count<'_> {
        match &self.exact {
            Some(exact) => Count::on_device(self.bound, exact),
            None => self.count.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_few_and_hold_every_batch() {
        let capacity = Capacity { tokens: 1000, sequences: 20, length: 64, encoder_labels: 320 };
        let mut seen = std::collections::HashSet::new();
        for tokens in 1..=1000 {
            let exact = Bounds {
                tokens,
                sequences: tokens.div_ceil(50),
                labels: tokens * 3 / 10,
                decoder_rows: tokens - 1,
                length: 50,
                head_chunks: 0,
            };
            let b = exact.rounded(capacity);
            assert!(b.tokens >= tokens && b.sequences >= exact.sequences && b.labels >= exact.labels);
            assert!(b.decoder_rows >= exact.decoder_rows && b.tokens <= 1000 && b.sequences <= 20 && b.labels <= 320);
            assert_eq!(b.length, 64);
            seen.insert(b);
        }
        assert!(seen.len() < 40, "{} bounds", seen.len());
    }
}
