//! Cross entropy and the bag-of-words loss of chunks of whole sequences: both losses, the gradient in place of the logits, its products.
//!
//! Logits are exact in bf16, so the largest of a word is in the same row on every side, also where rows tie.

use crate::device::in_every_order;
use crate::harness::*;
use half::bf16;
use retromae_engine::data::batch::{Bags, PretrainBatch};
use retromae_engine::device::{DType, Device, Tensor};
use retromae_engine::graph::Capacity;
use retromae_engine::graph::head_chunks::HeadChunks;
use retromae_engine::ops::bag_of_words::{BagOfWords, Gradients, run};
use retromae_engine::ops::cross_entropy::Scale;
use retromae_engine::ops::gather;

const SCALES: [f32; 2] = [0.25, 0.125];

/// Rows of buffers that are not in use.
const SPARE: usize = 5;

/// `bags`: words of the bag of a sequence of so many rows.
pub struct Case<'a> {
    pub lengths: &'a [usize],
    pub chunk: usize,
    pub width: usize,
    pub vocabulary: usize,
    pub padding: usize,
    pub bags: fn(usize) -> usize,
}

pub const PLAIN: Case =
    Case { lengths: &[5, 12, 3, 1, 30], chunk: 32, width: 32, vocabulary: 61, padding: 3, bags: |n| n.min(9) };

impl Case<'_> {
    fn batch(&self) -> PretrainBatch {
        let rows: usize = self.lengths.iter().sum();
        let (mut bags, mut cu_seqlens) = (Bags::new(), vec![0]);
        for (s, &n) in self.lengths.iter().enumerate() {
            cu_seqlens.push(cu_seqlens[s] + n as u32);
            let mut words = below((self.bags)(n), self.vocabulary as u32, 40 + s as u64);
            words.sort_unstable();
            words.dedup();
            bags.push(&words, 1.0 / (2 + n) as f32);
        }
        let labelled: Vec<u32> = (0..rows as u32).filter(|row| row % 3 == 1 || row % 7 == 0).collect();
        PretrainBatch {
            cu_seqlens,
            samples: (0..self.lengths.len() as u64).collect(),
            encoder_ids: vec![0; rows],
            encoder_label_ids: below(labelled.len(), self.vocabulary as u32, 3),
            encoder_label_rows: labelled,
            decoder: None,
            bags: Some(bags),
        }
    }

    /// Losses, correct rows and, in training, all gradients, on the CPU in f64 or on a GPU, whose buffers are poisoned.
    pub fn run(&self, device: Device, storage: DType, training: bool) -> Vec<(&'static str, Vec<f64>)> {
        let (batch, c, v) = (self.batch(), self.width, self.vocabulary + self.padding);
        let (rows, texts) = (batch.tokens(), batch.sequences());
        let labels = batch.encoder_label_ids.len();
        let narrow = |x: &[f32]| match (device, storage) {
            (Device::Cpu, _) => device.tensor(&f64s(x)),
            (_, DType::BF16) => device.tensor(&x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()),
            _ => device.tensor(x),
        };
        let wide = |x: &[f32]| if device.is_gpu() { device.tensor(x) } else { device.tensor(&f64s(x)) };
        let nan = |len: usize| vec![f32::NAN; len];
        // One-hot rows pick columns of the weights: multiples of 1/8 below 4.
        let one_hot = |i: usize| f32::from(u8::from(i % c == i / c * 5 % c));
        let y: Vec<f32> = (0..rows * c).map(one_hot).chain(nan(SPARE * c)).collect();
        let w: Vec<f32> = below(v * c, 32, 2).into_iter().map(|x| x as f32 / 8.0).collect();
        let mut bias = normal(v, 4);
        bias[self.vocabulary..].fill(f32::NEG_INFINITY);
        let capacity =
            Capacity { tokens: rows + SPARE, sequences: texts + SPARE, length: self.chunk, encoder_labels: labels };
        let mut chunks = HeadChunks::new(device, capacity, self.chunk);
        chunks.set(&batch);
        let (y, w, b) = (narrow(&y), narrow(&w), wide(&bias));
        let [h, dh, logits] = [c, c, v].map(|width| narrow(&nan(self.chunk * width)));
        let (row_loss, bag_loss) = (wide(&nan(labels + SPARE)), wide(&nan(texts + SPARE)));
        let row_correct = device.tensor(&vec![7u32; labels + SPARE]);
        let (dy, dw_acc, db_acc) = (narrow(&nan(rows * c)), wide(&normal(v * c, 5)), wide(&normal(v, 6)));
        let on_device = SCALES.map(|scale| device.tensor(&[scale]));
        let scale = |i: usize| Scale { value: f64::from(SCALES[i]), on_device: Some(&on_device[i]) };
        for (stream, chunk) in chunks.chunks() {
            gather::gather(device, &y, stream, chunk.rows, c, &h);
            run(
                device,
                &BagOfWords {
                    shape: chunks.shape(c, v),
                    chunk,
                    h: &h,
                    w: &w,
                    b: &b,
                    logits: &logits,
                    row_loss: &row_loss,
                    row_correct: &row_correct,
                    bag_loss: &bag_loss,
                    gradients: training.then(|| Gradients {
                        label_scale: scale(0),
                        bag_scale: scale(1),
                        dh: &dh,
                        dw_acc: &dw_acc,
                        db_acc: &db_acc,
                    }),
                },
            );
            if training {
                gather::scatter(device, &dh, stream, chunk.rows, c, &dy);
            }
        }
        let take = |tensor: &Tensor, used: usize| -> Vec<f64> {
            let all = match tensor.dtype() {
                DType::F32 => f64s(&tensor.to_vec()),
                DType::BF16 => f64s(&widened(tensor.to_vec::<bf16>())),
                _ => tensor.to_vec(),
            };
            assert!(all[used..].iter().all(|x| x.is_nan()), "rows that are not in use were written");
            all[..used].to_vec()
        };
        let correct = row_correct.to_vec::<u32>();
        device.check().expect("correct kernels raise nothing");
        assert_eq!(correct[labels..], [7; SPARE]);
        let correct = correct[..labels].iter().map(|&c| f64::from(c)).collect();
        let mut all = vec![("loss", take(&row_loss, labels)), ("correct", correct), ("bags", take(&bag_loss, texts))];
        if training {
            let (dw, db) = (take(&dw_acc, v * c), take(&db_acc, v));
            all.extend([("dy", take(&dy, rows * c)), ("dw", dw), ("db", db)]);
        }
        all
    }

    fn check(&self) {
        for (storage, allowed) in [(DType::F32, 1e-5), (DType::BF16, 4.0 / 512.0)] {
            let exact = self.run(Device::Cpu, storage, true);
            let f32s = |all: Vec<(&str, Vec<f64>)>| -> Vec<Vec<f32>> {
                all.into_iter().map(|(_, x)| x.into_iter().map(|x| x as f32).collect()).collect()
            };
            let got = in_every_order(|gpu| f32s(self.run(Device::Gpu(gpu), storage, true)));
            let evaluated = in_every_order(|gpu| f32s(self.run(Device::Gpu(gpu), storage, false)));
            assert!(evaluated[..] == got[..3], "evaluation and training agree");
            for (got, (name, exact)) in got.iter().zip(&exact) {
                // Losses and statistics are f32 whatever the storage.
                let allowed = if name.starts_with('d') { allowed } else { 1e-5 };
                let error = relative(got, exact);
                assert!(error <= allowed, "{name} in {storage:?}: relative error {error:e}, allowed {allowed:e}");
            }
        }
    }
}

#[test]
fn sequences_that_share_chunks() {
    PLAIN.check();
}

/// More rows than the width: some are equal, so that whole rows tie.
#[test]
fn rows_that_tie() {
    Case { lengths: &[20, 12], width: 8, ..PLAIN }.check();
}

/// Slabs of 64 rows: one before and one behind their borders, and several in a sequence.
#[test]
fn sequences_of_several_slabs() {
    Case { lengths: &[63, 64, 65, 66, 200], chunk: 200, width: 40, ..PLAIN }.check();
}

/// Work is laid out for 18 chunks, the last of which is empty.
#[test]
fn a_chunk_without_a_sequence() {
    Case { lengths: &[9; 17], chunk: 16, ..PLAIN }.check();
}

#[test]
fn sequences_without_a_bag() {
    Case { lengths: &[1, 1, 4, 7, 1], bags: |n| if n == 4 { 0 } else { 3 }, ..PLAIN }.check();
    Case { lengths: &[1], ..PLAIN }.check();
}

/// Columns over two blocks, the last of which is not full; the last vector of the vocabulary is padding.
#[test]
fn a_vocabulary_of_several_blocks() {
    Case { lengths: &[120, 60], chunk: 184, vocabulary: 1060, padding: 12, bags: |n| n, ..PLAIN }.check();
}
