//! The largest words of texts, the reference, against all logits in f64.

use retromae_engine::device::{DType, Tensor};
use retromae_engine::ops::lexical::{Lexical, MAX_K, Shape, run};

use super::common::{CPU, Names, borders, equal_bits, normal, on_threads, relative, values};

#[derive(Clone, Copy)]
struct Case {
    lengths: &'static [usize],
    width: usize,
    /// Words, the last three of them padding.
    vocabulary: usize,
    k: usize,
    chunk: usize,
    /// Rounded to integers: many equal weights.
    coarse: bool,
}

const PLAIN: Case = Case { lengths: &[5, 2, 9], width: 7, vocabulary: 40, k: 6, chunk: 100, coarse: false };

/// Ids and weights of every text.
type Words = (Vec<u32>, Vec<f64>);

impl Case {
    fn rows(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// States, weights of the words, bias.
    fn x(&self) -> [Vec<f64>; 3] {
        let mut x =
            [(self.rows(), 1, 1.0), (self.vocabulary, 2, 0.5)].map(|(n, name, by)| normal(n * self.width, name, by));
        let mut bias = normal(self.vocabulary, 3, 0.5);
        if self.coarse {
            x.iter_mut().flatten().chain(&mut bias).for_each(|x| *x = x.round());
        }
        bias[self.vocabulary - 3..].fill(f64::NEG_INFINITY);
        let [h, w] = x;
        [h, w, bias]
    }

    /// All logits at once, and a sort.
    fn naive(&self, [h, w, bias]: &[Vec<f64>; 3]) -> Words {
        let (mut ids, mut weights, mut first) = (Vec::new(), Vec::new(), 0);
        for &length in self.lengths {
            let rows = &h[(first + 1) * self.width..(first + length) * self.width];
            first += length;
            let word = |v: usize| {
                let w = &w[v * self.width..][..self.width];
                let logit = |row: &[f64]| row.iter().zip(w).map(|(h, w)| h * w).sum::<f64>() + bias[v];
                (rows.chunks(self.width).map(logit).fold(f64::NEG_INFINITY, f64::max) + 0.0, v as u32)
            };
            let mut all: Vec<(f64, u32)> = (0..self.vocabulary).map(word).collect();
            all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            ids.extend(all[..self.k].iter().map(|a| if length == 1 { u32::MAX } else { a.1 }));
            weights.extend(all[..self.k].iter().map(|a| a.0));
        }
        (ids, weights)
    }

    fn run(&self, dtype: DType, x: &[Vec<f64>; 3]) -> Words {
        let tensor = |x: &[f64]| match dtype {
            DType::F64 => Tensor::from_slice(x),
            _ => Tensor::from_slice(&x.iter().map(|&x| x as f32).collect::<Vec<_>>()),
        };
        let (cu, names) = (Tensor::from_slice(&borders(self.lengths)), Names::all(self.lengths));
        let unset = |len: usize| tensor(&vec![f64::NAN; len]);
        let [h, w, b] = x.each_ref().map(|x| tensor(x));
        // Room for more texts than come.
        let room = (self.lengths.len() + 2) * self.k;
        let (ids, weights) = (Tensor::from_slice(&vec![7u32; room]), unset(room));
        let shape = Shape {
            rows: self.rows().into(),
            cu_seqlens: &cu,
            sequence: names.rows().sequence,
            width: self.width,
            vocabulary: self.vocabulary,
            chunk: self.chunk,
            k: self.k,
        };
        let (logits, maxima) = (unset(self.chunk * self.vocabulary), unset(self.chunk * self.vocabulary));
        let (h, w, b, logits, maxima) = (&h, &w, &b, &logits, &maxima);
        run(CPU, &Lexical { shape, h, w, b, logits, maxima, ids: &ids, weights: &weights });
        let used = self.lengths.len() * self.k;
        let (mut ids, mut weights) = (ids.to_vec::<u32>(), values(&weights));
        assert!(ids[used..].iter().all(|&id| id == 7) && weights[used..].iter().all(|x| x.is_nan()));
        ids.truncate(used);
        weights.truncate(used);
        (ids, weights)
    }
}

#[test]
fn words_are_those_of_all_logits() {
    for case in [
        PLAIN,
        // A text of [CLS] alone between others, the shortest text that has words, as many words as there are.
        Case { lengths: &[3, 1, 2], k: 37, ..PLAIN },
        Case { lengths: &[2], width: 1, vocabulary: 4, k: 1, ..PLAIN },
        Case { lengths: &[1], ..PLAIN },
    ] {
        let (ids, weights) = case.naive(&case.x());
        let got = case.run(DType::F64, &case.x());
        assert_eq!(got.0, ids);
        assert!(got.1.iter().zip(&weights).all(|(a, b)| a == b || (a - b).abs() <= 1e-14));
        let narrow = case.run(DType::F32, &case.x());
        let finite = |x: &[f64]| x.iter().copied().filter(|x| x.is_finite()).collect::<Vec<_>>();
        assert!(relative(&finite(&narrow.1), &finite(&weights)) <= 1e-6);
    }
}

/// Texts that begin or end with a chunk, go over many, or share one; a chunk of one row.
#[test]
fn chunks_and_threads_change_nothing() {
    let case = Case { lengths: &[5, 2, 9, 1, 1, 3, 20], ..PLAIN };
    for dtype in [DType::F64, DType::F32] {
        let whole = case.run(dtype, &case.x());
        for chunk in [1, 2, 5, 7, 16, 41] {
            for threads in [1, 2] {
                let got = on_threads(threads, || Case { chunk, ..case }.run(dtype, &case.x()));
                // Products of a single row are summed in another order.
                let near = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| a == b || (a - b).abs() <= 1e-6);
                assert!(got.0 == whole.0 && near(&got.1, &whole.1), "chunks of {chunk}");
                assert!(equal_bits(&got.1, &Case { chunk, ..case }.run(dtype, &case.x()).1));
            }
        }
    }
}

#[test]
fn equal_weights_are_in_the_order_of_ids() {
    let case = Case { vocabulary: 300, width: 2, k: 150, coarse: true, ..PLAIN };
    let (ids, weights) = case.naive(&case.x());
    assert!(weights.chunks(case.k).all(|w| w.windows(2).filter(|w| w[0] == w[1]).count() > 50), "no equal weights");
    for dtype in [DType::F64, DType::F32] {
        for chunk in [3, 100] {
            let got = Case { chunk, ..case }.run(dtype, &case.x());
            assert!(got.0 == ids && equal_bits(&got.1, &weights));
        }
    }
    // Zeros of both signs are equal.
    let [h, w, bias] = case.x();
    let zeros =
        [h.iter().map(|x| 0.0 * x).collect(), w, bias.iter().map(|b| if b.is_finite() { -0.0 } else { *b }).collect()];
    let (ids, weights) = case.run(DType::F64, &zeros);
    assert!(ids.chunks(case.k).all(|ids| ids.iter().copied().eq(0..case.k as u32)));
    assert!(weights.iter().all(|x| x.to_bits() == 0));
}

#[test]
fn more_words_than_can_be_sorted_are_a_bug() {
    let case = Case { vocabulary: MAX_K + 10, k: MAX_K + 1, ..PLAIN };
    assert!(std::panic::catch_unwind(|| case.run(DType::F64, &case.x())).is_err());
}
