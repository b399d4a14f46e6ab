//! Joined embeddings.

use super::*;
use retromae_engine::ops::joined::{self, Backward, Shape, Words};

struct Case {
    lengths: &'static [usize],
    width: usize,
    dense: usize,
    vocabulary: usize,
    k: usize,
    chunk: usize,
}

const PLAIN: Case = Case { lengths: &[12, 1, 7, 40], width: 48, dense: 24, vocabulary: 1088, k: 33, chunk: 16 };

impl Case {
    /// `K` distinct words of every text; of a text of one row none.
    fn ids(&self) -> Vec<u32> {
        let (words, k) = (self.vocabulary - 3, self.k);
        let of = |s: usize| (0..k).map(move |i| ((s * 37 + i * (words / k)) % words) as u32);
        let texts = self.lengths.iter().enumerate();
        texts.flat_map(|(s, &n)| of(s).map(move |id| if n == 1 { u32::MAX } else { id })).collect()
    }

    fn run(&self, place: Place) -> Results {
        let &Case { lengths, width, dense, vocabulary, k, chunk } = self;
        let (texts, rows) = (lengths.len(), lengths.iter().sum::<usize>());
        let numbers = [texts, rows].map(|n| place.number(n));
        let borders: Vec<u32> = (0..=texts).map(|s| lengths[..s].iter().sum::<usize>() as u32).collect();
        // The texts' rows in the other order, and one between that no text has.
        let places: Vec<u32> = (0..texts as u32).rev().map(|s| s + u32::from(s > 0)).collect();
        let (cu, places) = (place.tensor(&borders, SPARE), place.tensor(&places, SPARE));
        let shape = Shape { texts: place.count(texts, &numbers[0]), cu_seqlens: &cu, dense, vocabulary, k };
        let ids = place.tensor(&self.ids(), SPARE * k);

        let weights = place.wide(&normal(texts * k, 1), SPARE * k);
        let e = place.matrix(&normal(texts * dense, 2), SPARE * dense);
        let all_len = (texts + 1) * (dense + vocabulary);
        let all = place.matrix(&vec![0.5; all_len], 0);
        joined::put(place.device(), shape, &e, Words { ids: &ids, weights: &weights }, &places, &all);

        let d_all = place.matrix(&normal(all_len, 3), 0);
        let (de, d_weights) = (place.unset(texts * dense, SPARE * dense), place.unset_wide(texts * k, SPARE * k));
        let d_words = Words { ids: &ids, weights: &d_weights };
        joined::take(place.device(), shape, &de, d_words, &places, &d_all);

        let h = place.matrix(&normal(rows * width, 4), SPARE * width);
        let w = place.matrix(&normal(vocabulary * width, 5), 0);
        let winners = place.tensor(&vec![u32::MAX; texts * k], SPARE * k);
        let (g, dh) = (place.unset(chunk * vocabulary, 0), place.unset(rows * width, SPARE * width));
        let (dw_acc, db_acc) = (place.wide(&normal(vocabulary * width, 6), 0), place.wide(&normal(vocabulary, 7), 0));
        let run = Backward {
            shape,
            rows: place.count(rows, &numbers[1]),
            width,
            chunk,
            h: &h,
            w: &w,
            d_words,
            winners: &winners,
            g: &g,
            dh: &dh,
            dw_acc: &dw_acc,
            db_acc: &db_acc,
        };
        joined::backward(place.device(), &run);
        vec![
            ("all", place.take(&all, all_len, Rest::Any)),
            ("dense", place.take(&de, texts * dense, Rest::Untouched)),
            ("weights", place.take(&d_weights, texts * k, Rest::Untouched)),
            ("winners", place.take(&winners, texts * k, Rest::Untouched)),
            ("h", place.take(&h, rows * width, Rest::Zero)),
            ("dh", place.take(&dh, rows * width, Rest::Any)),
            ("dw", place.take(&dw_acc, vocabulary * width, Rest::Any)),
            ("db", place.take(&db_acc, vocabulary, Rest::Any)),
        ]
    }
}

#[test]
fn joined_embeddings_agree() {
    // Texts over several chunks; one chunk larger than the bound; more words than a block has threads, and one; rows as wide as they get.
    for case in [
        PLAIN,
        Case { chunk: 100, ..PLAIN },
        Case { lengths: &[3, 2, 4], k: 300, chunk: 10, ..PLAIN },
        Case { k: 1, width: 1040, dense: 1040, vocabulary: 64, ..PLAIN },
    ] {
        check(&format!("joined {:?} {} {}", case.lengths, case.k, case.chunk), |place| case.run(place));
    }
}
