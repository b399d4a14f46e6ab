//! Scores of groups, and losses of them.

use super::*;
use retromae_engine::ops::cross_entropy::Scale;
use retromae_engine::ops::group_loss::{self, Gradient, GroupLoss, Kind};
use retromae_engine::ops::group_scores;

const SCALE: f32 = 0.25;

const TEMPERATURE: f32 = 0.5;

#[test]
fn group_scores_agree() {
    // Blocks of eight passages, the last not full; a block of columns, and several.
    for (queries, group, width) in [(5, 9, 48), (3, 1, 48), (3, 2, 1040)] {
        check(&format!("scores of groups {queries} {group} {width}"), |place| {
            let (rows, number) = (queries * group, place.number(queries));
            let matrix = |rows: usize, room: usize, name| place.matrix(&normal(rows * width, name), room * width);
            let spare = SPARE * group;
            let (q, p) = (&matrix(queries, SPARE, 1), &matrix(rows, spare, 2));
            let (s, ds) = (place.unset_wide(rows, spare), place.wide(&normal(rows, 3), spare));
            let (dq, dp) = (matrix(queries, SPARE, 4), matrix(rows, spare, 5));
            let queries_in_use = place.count(queries, &number);
            let shape = group_scores::Shape { queries: queries_in_use, group, width, temperature: TEMPERATURE };
            group_scores::forward(place.device(), &group_scores::Forward { shape, q, p, s: &s });
            let backward = group_scores::Backward { shape, q, p, ds: &ds, dq_acc: &dq, dp_acc: &dp };
            group_scores::backward(place.device(), &backward);
            let take = |tensor, used| place.take(tensor, used, Rest::Untouched);
            vec![("s", take(&s, rows)), ("dq", take(&dq, queries * width)), ("dp", take(&dp, rows * width))]
        });
    }
}

/// Losses without a teacher, or with one that a kind is made from.
fn loss_of(place: Place, queries: usize, stride: usize, training: bool, kind: fn(&Tensor) -> Kind<'_>) -> Results {
    let (group, number) = (9, place.number(queries));
    let (rows, spare) = (queries * group, SPARE * group);
    let scores = place.wide(&normal(rows * stride, 1), spare * stride);
    let teacher = place.wide(&normal(rows, 2), spare);
    let (loss, ds) = (place.unset_wide(queries, SPARE), place.unset_wide(rows * stride, spare * stride));
    let (correct, sums) = (place.tensor(&vec![u32::MAX; queries], SPARE), place.device().tensor(&[0.25, 3.0]));
    let weight = place.wide(&[SCALE], 0);
    let scale = Scale { value: f64::from(SCALE), on_device: Some(&weight) };
    let run = GroupLoss {
        shape: group_loss::Shape { queries: place.count(queries, &number), group, stride, temperature: TEMPERATURE },
        kind: kind(&teacher),
        scores: &scores,
        loss: &loss,
        correct: &correct,
        sums_acc: &sums,
        gradient: training.then_some(Gradient { scale, ds: &ds }),
    };
    group_loss::run(place.device(), &run);
    let take = |tensor, used| place.take(tensor, used, Rest::Untouched);
    let mut results = vec![("loss", take(&loss, queries)), ("correct", take(&correct, queries))];
    results.push(("sums", place.take(&sums, 2, Rest::Any)));
    if training {
        results.push(("ds", take(&ds, rows * stride)));
    }
    results
}

type OfTeacher = fn(&Tensor) -> Kind<'_>;

#[test]
fn group_losses_agree() {
    let kinds: [(&str, OfTeacher); 3] = [
        ("cross entropy", |_| Kind::CrossEntropy),
        ("divergence", |teacher| Kind::Kl { teacher }),
        ("margins", |teacher| Kind::MarginMse { teacher }),
    ];
    for (name, kind) in kinds {
        // Blocks of eight queries, the last not full.
        for (queries, stride, training) in [(3, 1, true), (21, 8, true), (21, 8, false)] {
            check(&format!("{name} of groups"), |place| loss_of(place, queries, stride, training, kind));
        }
    }
}
