//! The largest words of texts.

use super::*;
use retromae_engine::ops::lexical::{self, Lexical, Shape};

#[derive(Clone, Copy)]
struct Case {
    lengths: &'static [usize],
    width: usize,
    vocabulary: usize,
    k: usize,
    chunk: usize,
}

const PLAIN: Case = Case { lengths: &[12, 1, 7, 40], width: 48, vocabulary: 1088, k: 33, chunk: 16 };

/// Ids and weights.
fn words_of(place: Place, case: &Case) -> (Vec<u32>, Vec<f64>) {
    let &Case { lengths, width, vocabulary, k, chunk } = case;
    let (texts, rows) = (lengths.len(), lengths.iter().sum::<usize>());
    let number = place.number(rows);
    let borders: Vec<u32> = (0..=texts).map(|s| lengths[..s].iter().sum::<usize>() as u32).collect();
    let sequence: Vec<u32> = lengths.iter().zip(0..).flat_map(|(&n, s)| vec![s; n]).collect();
    let (cu, sequence) = (place.tensor(&borders, SPARE), place.tensor(&sequence, SPARE));
    let h = place.matrix(&normal(rows * width, 1), SPARE * width);
    let w = place.matrix(&normal(vocabulary * width, 2), 0);
    let mut bias = normal(vocabulary, 3);
    bias[vocabulary - 3..].fill(f32::NEG_INFINITY);
    let b = place.wide(&bias, 0);
    let [logits, maxima] = [0; 2].map(|_| place.unset(chunk * vocabulary, 0));
    let ids = place.tensor(&vec![7u32; texts * k], SPARE * k);
    let weights = place.unset_wide(texts * k, SPARE * k);
    let shape =
        Shape { rows: place.count(rows, &number), cu_seqlens: &cu, sequence: &sequence, width, vocabulary, chunk, k };
    let (h, w, b, logits, maxima) = (&h, &w, &b, &logits, &maxima);
    lexical::run(place.device(), &Lexical { shape, h, w, b, logits, maxima, ids: &ids, weights: &weights });
    let ids = place.take(&ids, texts * k, Rest::Untouched).iter().map(|&id| id as u32).collect();
    (ids, place.take(&weights, texts * k, Rest::Untouched))
}

#[test]
fn words_agree() {
    // Texts over several chunks; one chunk larger than the bound; a last chunk of the bound without a row.
    for case in [PLAIN, Case { chunk: 100, ..PLAIN }, Case { lengths: &[3, 2, 4], chunk: 10, ..PLAIN }] {
        for (storage, allowed) in [(DType::F32, 1e-5), (DType::BF16, BF16_ERROR)] {
            let (exact_ids, exact) = words_of(Place { gpu: None, storage }, &case);
            let (ids, weights) = words_of(Place { gpu: Some(fresh()), storage }, &case);
            let finite = |x: &[f64]| x.iter().copied().filter(|x| x.is_finite()).collect::<Vec<_>>();
            let got: Vec<f32> = finite(&weights).iter().map(|&x| x as f32).collect();
            let error = relative(&got, &finite(&exact));
            assert!(error <= allowed, "{storage:?}: relative error {error:e}");
            let texts = ids.chunks(case.k).zip(exact_ids.chunks(case.k)).zip(exact.chunks(case.k));
            for (s, ((ids, exact_ids), exact)) in texts.enumerate() {
                // A word may miss the list only for one of nearly its weight, the last.
                let least = exact[case.k - 1] + 2.0 * allowed * exact[0].abs();
                let sure = exact_ids.iter().zip(exact).filter(|(_, x)| **x > least || !x.is_finite());
                let missed: Vec<_> = sure.filter(|(id, _)| !ids.contains(id)).collect();
                assert!(missed.is_empty(), "text {s} in {storage:?} misses {missed:?}");
            }
            if storage == DType::F32 {
                assert_eq!(ids, exact_ids);
            }
        }
    }
}

/// 12 MiB of memory, where the logits of all rows alone would be 24 MiB and the maxima of all texts 8 MiB.
#[test]
fn memory_is_bounded() {
    if !emulated("a limit of memory") {
        return;
    }
    const LENGTHS: [usize; 1024] = [3; 1024];
    let case = Case { lengths: &LENGTHS, width: 16, vocabulary: 4096, k: 8, chunk: 128 };
    let limited = opened(Device::emulator(Options { memory: 12 << 20, ..Options::default() }));
    let run = |gpu| words_of(Place { gpu: Some(gpu), storage: DType::BF16 }, &case);
    let before = limited.allocated();
    assert!(run(limited) == run(fresh()));
    assert!(limited.allocated() - before < 6 << 20, "{} bytes", limited.allocated() - before);
}
