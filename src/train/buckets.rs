//! Buckets of gradients: what ranks sum in one operation, and when.
//!
//! The flat arena of gradients is cut into ranges of at least [`BYTES`], along the order in which the backward completes gradients: what
//! is in front of the encoder's output first, then layer after layer from the last on, the embeddings at the very end (the LM head and
//! the decoder use them, too). A part of the graph is never divided, so that no bucket is smaller than a layer, but for the biases and
//! LayerNorms of all parts, which lie together behind the matrices (weight decay leaves them out) and are the last bucket. The order of
//! the arena is left as it is: it is that in which ‖g‖² is added up, and with it one process' bits.
//!
//! Every rank sums the same buckets in the same order, each once a step. When depends on the collective:
//!
//! - Where sums run beside computing ([`Collective::overlaps`]: NCCL), a bucket is begun as soon as the backward of the step's last
//!   micro-batch has completed it and all before it. Backwards say what they have completed ([`Pass::complete`]); where they are
//!   recorded, the record is cut there ([`Records::run_in_pieces`]), so that sums are never recorded: NCCL wants all ranks or none to
//!   record an operation, and records belong to the sizes of a batch, which differ between ranks. On a GPU a sum waits, on a stream of
//!   its own, for what was queued before it, and the optimizer for the last sum.
//! - Where they do not (TCP between CPUs or through the host), buckets are summed in their order behind the backward: ranks then wait
//!   for each other once and not for every bucket. Memory holds copies of one bucket and not of all gradients.
//!
//! Micro-batches before the last, and chunks of a bi-encoder's batch before the last of their encoder, add to gradients and sum
//! nothing. A rank without a micro-batch sums its zeros. Clipping needs ‖g‖ of the sums and so comes behind the last bucket, as does
//! skipping a step; which rank was at fault is read off the norms of its own gradients, taken bucket by bucket before each sum.
//!
//! [`Collective::overlaps`]: super::collective::Collective::overlaps
//! [`Pass::complete`]: crate::graph::Pass::complete
//! [`Records::run_in_pieces`]: crate::graph::records::Records::run_in_pieces

use std::ops::Range;

use crate::graph::params::{Entries, Params};

/// Least bytes of a bucket that the backward can still add to, as of PyTorch's DistributedDataParallel: large enough for a link's full
/// rate, small enough that little is left to sum when the backward ends.
pub const BYTES: usize = 25 << 20;

/// The buckets of a model, and how far the sums of a step are.
pub struct Buckets {
    layout: Layout,
    all: Vec<Bucket>,
    /// Whether the backward adds nothing more to an entry's gradient.
    complete: Vec<bool>,
    /// Buckets whose sum was begun.
    begun: usize,
}

struct Bucket {
    /// Elements of the arena.
    range: Range<usize>,
    /// Entries that lie there.
    entries: Vec<usize>,
}

/// Where gradients lie.
struct Layout {
    /// The matrices of each part of the graph, in the order of the backward.
    matrices: Vec<Range<usize>>,
    /// First element of each entry.
    starts: Vec<usize>,
    /// Elements, and bytes of one.
    len: usize,
    size: usize,
}

impl Layout {
    /// Ranges of `bytes` at least but for what is left.
    fn ranges(&self, bytes: usize) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for matrices in &self.matrices {
            match ranges.last_mut() {
                // Backwards come from the end of the arena.
                Some(last) if last.len() * self.size < bytes && matrices.end == last.start => {
                    last.start = matrices.start
                }
                _ => ranges.push(matrices.clone()),
            }
        }
        let mut covered = ranges.clone();
        covered.sort_by_key(|range| range.start);
        let starts = covered.iter().map(|range| range.start).chain([self.len]);
        let ends = [0].into_iter().chain(covered.iter().map(|range| range.end));
        for gap in ends.zip(starts).map(|(end, start)| end..start).filter(|gap| !gap.is_empty()) {
            match ranges.last_mut() {
                Some(last) if last.end == gap.start => last.end = gap.end,
                _ => ranges.push(gap),
            }
        }
        ranges
    }
}

impl Buckets {
    /// Of [`BYTES`] at least, of parameters whose gradients are completed in the order `completed`.
    pub fn new(params: &Params, completed: &[Entries]) -> Self {
        let start = |entry: usize| params.spans(&(entry..entry + 1)).into_iter().find(|span| !span.is_empty());
        let layout = Layout {
            matrices: completed
                .iter()
                .map(|entries| params.spans(entries)[0].clone())
                .filter(|m| !m.is_empty())
                .collect(),
            starts: (0..params.entries()).map(|i| start(i).map_or(0, |span| span.start)).collect(),
            len: params.gradients().len(),
            size: params.gradients().dtype().size(),
        };
        let complete = vec![false; params.entries()];
        let mut buckets = Buckets { layout, all: Vec::new(), complete, begun: 0 };
        buckets.cut(BYTES);
        buckets
    }

    /// Of `bytes` at least from here on.
    pub fn cut(&mut self, bytes: usize) {
        let starts = &self.layout.starts;
        let inside = |range: &Range<usize>| (0..starts.len()).filter(|&i| range.contains(&starts[i])).collect();
        let ranges = self.layout.ranges(bytes).into_iter();
        self.all = ranges.map(|range| Bucket { entries: inside(&range), range }).collect();
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there is nothing to sum.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Which elements they hold, in the order of their sums.
    pub fn ranges(&self) -> Vec<Range<usize>> {
        self.all.iter().map(|bucket| bucket.range.clone()).collect()
    }

    /// The step adds nothing more to the gradients of these entries.
    pub fn complete(&mut self, entries: &Entries) {
        self.complete[entries.clone()].fill(true);
    }

    /// The next bucket to sum, if it is complete: its number and range. It then counts as begun.
    pub fn next_complete(&mut self) -> Option<(usize, Range<usize>)> {
        let bucket = self.all.get(self.begun)?;
        if !bucket.entries.iter().all(|&entry| self.complete[entry]) {
            return None;
        }
        self.begun += 1;
        Some((self.begun - 1, bucket.range.clone()))
    }

    /// The next step.
    pub fn restart(&mut self) {
        self.complete.fill(false);
        self.begun = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{DType, Device};
    use crate::graph::params::{Init, Table};

    /// Embeddings of 640 elements, then parts with a matrix each of 64, and 64 elements of vectors in every part.
    fn model(parts: usize) -> (Params, Vec<Entries>) {
        let (mut t, mut completed) = (Table::default(), Vec::new());
        for part in 0..=parts {
            let first = t.len();
            t.vectors(&[format!("{part}.bias")], 3, Init::Zeros);
            t.matrices(&[format!("{part}.weight")], if part == 0 { 10 } else { 1 }, 64, Init::Normal);
            completed.insert(0, t.since(first));
        }
        (t.allocate(Device::Cpu, DType::F32), completed)
    }

    fn cut(params: &Params, completed: &[Entries], bytes: usize) -> Buckets {
        let mut buckets = Buckets::new(params, completed);
        buckets.cut(bytes);
        buckets
    }

    #[test]
    fn every_gradient_is_in_one_bucket_whatever_their_size() {
        let (params, completed) = model(5);
        let len = params.gradients().len();
        for bytes in [1, 256, 257, 600, 1100, 1 << 20] {
            let mut ranges = cut(&params, &completed, bytes).ranges();
            ranges.sort_by_key(|range| range.start);
            assert_eq!(ranges[0].start, 0);
            assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start), "{bytes}: {ranges:?}");
            assert_eq!(ranges.last().unwrap().end, len);
        }
    }

    #[test]
    fn they_follow_the_backward_and_hold_whole_parts() {
        let (params, completed) = model(5);
        let two = cut(&params, &completed, 2 * 64 * 4).ranges();
        // Two layers each; the fifth waits for the embeddings; then what does not decay.
        assert_eq!(two, [832..960, 704..832, 0..704, 960..1344]);
        let whole = Buckets::new(&params, &completed).ranges();
        assert_eq!((whole.len(), whole[0].clone()), (1, 0..1344));
        // What nobody says to complete is summed, too, at the end.
        assert_eq!(cut(&params, &completed[..2], 1).ranges(), [896..960, 832..896, 0..832, 960..1344]);
    }

    /// As two encoders, the first of which completes all of its own before the second begins.
    #[test]
    fn neighbours_in_time_that_are_none_in_memory_are_apart() {
        let (params, mut completed) = model(5);
        completed.rotate_left(3);
        let ranges = Buckets::new(&params, &completed).ranges();
        assert_eq!(ranges, [0..768, 768..1344]);
    }

    #[test]
    fn a_bucket_is_summed_when_it_and_all_before_it_are_complete() {
        let (params, completed) = model(5);
        let mut buckets = cut(&params, &completed, 2 * 64 * 4);
        assert_eq!((buckets.len(), buckets.next_complete()), (4, None));
        buckets.complete(&completed[1]);
        buckets.complete(&completed[2]);
        buckets.complete(&completed[3]);
        assert_eq!(buckets.next_complete(), None, "the second bucket may not come before the first");
        buckets.complete(&completed[0]);
        assert_eq!((buckets.next_complete(), buckets.next_complete()), (Some((0, 832..960)), Some((1, 704..832))));
        buckets.complete(&completed[4]);
        assert_eq!(buckets.next_complete(), None, "of the last layers and the embeddings one is missing");
        buckets.complete(&completed[5]);
        assert_eq!([0; 3].map(|_| buckets.next_complete().map(|(i, _)| i)), [Some(2), Some(3), None]);
        buckets.restart();
        assert_eq!(buckets.next_complete(), None);
    }
}
