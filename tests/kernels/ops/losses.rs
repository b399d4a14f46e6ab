//! Cross entropy, the bag-of-words loss and the contrastive loss.

use super::*;
use retromae_engine::ops::contrastive;
use retromae_engine::ops::cross_entropy::{self, Gradients, Scale, Shape};

const SCALE: f32 = 0.25;

/// Its weight in both forms.
fn scale(on_gpu: &Tensor) -> Scale<'_> {
    Scale { value: f64::from(SCALE), on_device: Some(on_gpu) }
}

struct Head {
    rows: usize,
    width: usize,
    vocabulary: usize,
    chunk: usize,
}

fn cross_entropy_of(place: Place, head: &Head, training: bool) -> Results {
    let &Head { rows, width, vocabulary, chunk } = head;
    let number = place.number(rows);
    let small = |len, name, by: f32| normal(len, name).iter().map(|x| by * x).collect::<Vec<_>>();
    let (h, labels) = (place.matrix(&normal(rows * width, 1), SPARE * width), below(rows, vocabulary as u32 - 3, 2));
    let w = place.matrix(&small(vocabulary * width, 3, 1.0 / (width as f32).sqrt()), 0);
    let mut bias = small(vocabulary, 4, 0.5);
    bias[vocabulary - 3..].fill(f32::NEG_INFINITY);
    let (b, labels) = (place.wide(&bias, 0), place.tensor(&labels, SPARE));
    let (logits, row_loss) = (place.unset(chunk * vocabulary, 0), place.unset_wide(rows, SPARE));
    let (row_correct, sums) = (place.tensor(&vec![u32::MAX; rows], SPARE), place.device().tensor(&[0.25, 3.0]));
    let (dh, weight) = (place.unset(rows * width, SPARE * width), place.wide(&[SCALE], 0));
    let dw_acc = place.wide(&normal(vocabulary * width, 5), 0);
    let db_acc = place.wide(&normal(vocabulary, 6), 0);
    let gradients = || Gradients { scale: scale(&weight), dh: &dh, dw_acc: &dw_acc, db_acc: &db_acc };
    let run = cross_entropy::CrossEntropy {
        shape: Shape { rows: place.count(rows, &number), width, vocabulary, chunk },
        h: &h,
        w: &w,
        b: &b,
        labels: &labels,
        logits: &logits,
        row_loss: &row_loss,
        row_correct: &row_correct,
        sums_acc: &sums,
        gradients: training.then(gradients),
    };
    cross_entropy::run(place.device(), &run);
    let mut results = vec![("loss", place.take(&row_loss, rows, Rest::Untouched))];
    results.push(("correct", place.take(&row_correct, rows, Rest::Untouched)));
    results.push(("sums", place.take(&sums, 2, Rest::Any)));
    if training {
        results.push(("h", place.take(&h, rows * width, Rest::Zero)));
        results.push(("dh", place.take(&dh, rows * width, Rest::Zero)));
        results.push(("dw", place.take(&dw_acc, vocabulary * width, Rest::Any)));
        results.push(("db", place.take(&db_acc, vocabulary, Rest::Any)));
    }
    results
}

#[test]
fn cross_entropy_agrees() {
    // A last chunk of the bound without a row, and one before it that is partly filled; slabs of 64 rows and blocks of 1024 columns, the
    // last ones not full; one chunk for all, larger than the bound.
    for (rows, chunk, vocabulary, width) in [(33, 4, 64, 48), (133, 80, 1040, 48), (7, 40, 64, 1040)] {
        let head = Head { rows, width, vocabulary, chunk };
        for training in [true, false] {
            let what = format!("cross entropy {rows} {chunk} {vocabulary}, training {training}");
            check(&what, |place| cross_entropy_of(place, &head, training));
        }
    }
}

/// On a device without scratch memory yet, whose guard pages show an op that asks for too little.
#[test]
fn the_bag_of_words_loss_agrees() {
    use crate::bag_of_words::{Case, PLAIN};
    // Several chunks; slabs of 64 rows and blocks of 1024 columns, the last ones not full; as many sequences as a chunk may have.
    for case in [
        PLAIN,
        Case { lengths: &[70, 2, 129], chunk: 144, vocabulary: 1061, ..PLAIN },
        Case { lengths: &[2; 40], chunk: 128, ..PLAIN },
    ] {
        for training in [true, false] {
            check(&format!("bags of words of {:?}, training {training}", case.lengths), |place| {
                case.run(place.device(), place.storage, training)
            });
        }
    }
}

fn contrastive_of(place: Place, queries: usize, passages: usize, width: usize, hides: bool) -> Results {
    let numbers = [queries, passages].map(|n| place.number(n));
    let counts = [place.count(queries, &numbers[0]), place.count(passages, &numbers[1])];
    let matrix = |rows: usize, name, by: f32| {
        let x: Vec<f32> = normal(rows * width, name).iter().map(|x| by * x).collect();
        place.matrix(&x, SPARE * width)
    };
    let (q, p) = (matrix(queries, 1, 1.0), matrix(passages, 2, 1.0 / (width as f32).sqrt()));
    let targets = place.tensor(&(0..queries).map(|b| (b * 7 % passages) as u32).collect::<Vec<_>>(), SPARE);
    // Every fifth passage or so is hidden; the rows of bits are as long as the bound of the passages asks.
    let words = counts[1].rows.div_ceil(32);
    let mut bits = vec![0u32; queries * words];
    for (b, i) in (0..queries).flat_map(|b| (0..passages).map(move |i| (b, i))) {
        bits[b * words + i / 32] |= u32::from((b + 3 * i) % 5 == 0) << (i % 32);
    }
    let hidden = place.tensor(&bits, SPARE * words);
    let shape = contrastive::Shape {
        queries: counts[0],
        passages: counts[1],
        width,
        temperature: 0.5,
        targets: &targets,
        hidden: hides.then_some(&hidden),
    };
    let [loss, lse] = [1, 3].map(|each| place.unset_wide(each * queries, each * SPARE));
    let [dq, dp] = [queries, passages].map(|rows| place.unset(rows * width, SPARE * width));
    let (q, p, loss, lse, weight) = (&q, &p, &loss, &lse, place.wide(&[SCALE], 0));
    let correct = place.tensor(&vec![7u32; queries], SPARE);
    contrastive::forward(place.device(), &contrastive::Forward { shape, q, p, loss, lse, correct: &correct });
    let backward = contrastive::Backward { shape, scale: scale(&weight), q, p, lse, dq: &dq, dp: &dp };
    contrastive::backward(place.device(), &backward);
    let take = |tensor, used| place.take(tensor, used, Rest::Untouched);
    let mut results = vec![("loss", take(loss, queries))];
    let correct = correct.to_vec::<u32>();
    results.push(("correct", correct[..queries].iter().map(|&c| f64::from(c)).collect()));
    results.extend([("dq", take(&dq, queries * width)), ("dp", take(&dp, passages * width))]);
    results
}

#[test]
fn the_contrastive_loss_agrees() {
    // Less than a tile, with bits; shares of many passages, then of many queries, their sums by several blocks; a second window of columns.
    for (queries, passages, width, hides) in
        [(3, 33, 48, true), (20, 600, 272, true), (1030, 20, 112, false), (5, 9, 784, false)]
    {
        let what = format!("contrastive loss {queries} {passages} {width}");
        check(&what, |place| contrastive_of(place, queries, passages, width, hides));
    }
}
