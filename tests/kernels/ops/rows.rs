//! Ops that work row by row, sums over rows, and the optimizer.

use super::*;
use crate::gather::OwnGroups;
use crate::reference::row_names;
use retromae_engine::device::Matrix;
use retromae_engine::device::Output;
use retromae_engine::ops::optimizer::AdamW;
use retromae_engine::ops::pool::Pooling;
use retromae_engine::ops::{Groups, activation, embed, gather, layernorm, linear, optimizer, pool};

/// 33 rows: one more than four warps or eight fill evenly, and two windows of a group sum.
const LENGTHS: &[usize] = &[20, 1, 12];
const ROWS: usize = 33;

/// One warp a row, and four.
const WIDTHS: [usize; 2] = [48, 1040];

fn gamma(width: usize) -> Vec<f32> {
    normal(width, 30).iter().map(|x| 1.0 + 0.5 * x).collect()
}

/// Rows by key, here.
struct OnPlace {
    tensors: [Tensor; 3],
    number: Tensor,
    groups: usize,
    entries: usize,
}

impl OnPlace {
    fn new(place: Place, keys: &[u32]) -> Self {
        let own = OwnGroups::new(keys);
        let tensors = [&own.keys, &own.offsets, &own.rows].map(|x| place.tensor(x, SPARE));
        let (groups, entries) = (own.keys.len(), own.rows.len());
        OnPlace { tensors, number: place.number(groups), groups, entries }
    }

    fn get(&self, place: Place) -> Groups<'_> {
        let [keys, offsets, rows] = &self.tensors;
        let entries = if place.gpu.is_some() { self.entries + SPARE } else { self.entries };
        Groups { count: place.count(self.groups, &self.number), entries, keys, offsets, rows }
    }
}

fn layernorm_of(place: Place, width: usize, residual: bool, p: Option<f32>) -> Results {
    let (n, room, number) = (ROWS * width, SPARE * width, place.number(ROWS));
    let [x, dy] = [1, 2].map(|name| place.matrix(&normal(n, name), room));
    let residual = residual.then(|| place.matrix(&normal(n, 3), room));
    let (gamma, beta) = (place.wide(&gamma(width), 0), place.wide(&normal(width, 4), 0));
    let [y, dx] = [(); 2].map(|()| place.unset(n, room));
    let [mean, rstd] = [(); 2].map(|()| place.unset_wide(ROWS, SPARE));
    let [dgamma_acc, dbeta_acc] = [5, 6].map(|name| place.wide(&normal(width, name), 0));
    let names = place.names(&Names::new(LENGTHS).rows());
    let dropout = p.map(|p| (dropout(p, 4), row_names(&names)));
    let shape = layernorm::Shape { rows: place.count(ROWS, &number), width, eps: 1e-12 };
    let (x, y, mean, rstd, gamma, beta) = (&x, &y, &mean, &rstd, &gamma, &beta);
    let residual = residual.as_ref();
    layernorm::forward(place.device(), &layernorm::Forward { shape, x, residual, dropout, gamma, beta, y, mean, rstd });
    let backward = layernorm::Backward {
        shape,
        z: x,
        mean,
        rstd,
        gamma,
        dy: &dy,
        dropout: dropout.map(|(site, rows)| (site, rows, &dx)),
        dgamma_acc: &dgamma_acc,
        dbeta_acc: &dbeta_acc,
    };
    layernorm::backward(place.device(), &backward);
    let take = |tensor, used| place.take(tensor, used, Rest::Untouched);
    let mut results =
        vec![("z", take(x, n)), ("y", take(y, n)), ("mean", take(mean, ROWS)), ("rstd", take(rstd, ROWS))];
    results.extend([("dz", take(&dy, n)), ("dgamma", take(&dgamma_acc, width)), ("dbeta", take(&dbeta_acc, width))]);
    if p.is_some() {
        results.push(("dx", take(&dx, n)));
    }
    results
}

#[test]
fn layernorm_agrees() {
    for width in WIDTHS {
        for (residual, p) in [(true, Some(0.1)), (true, Some(0.0)), (false, None)] {
            check(&format!("layernorm {width} {p:?}"), |place| layernorm_of(place, width, residual, p));
        }
    }
}

#[test]
fn embed_agrees() {
    for width in WIDTHS {
        check(&format!("embed {width}"), |place| {
            let (n, room, number, names) = (ROWS * width, SPARE * width, place.number(ROWS), Names::new(LENGTHS));
            let (ids, types) = (below(ROWS, 7, 1), below(ROWS, 2, 2));
            let groups = [&ids, &names.position, &types].map(|keys| OnPlace::new(place, keys));
            let [ids, types] = [ids, types].map(|x| place.tensor(&x, SPARE));
            let [word, position, token_type] =
                [(7, 1), (20, 2), (2, 3)].map(|(rows, name)| place.matrix(&normal(rows * width, name), 0));
            let (gamma, beta) = (place.wide(&gamma(width), 0), place.wide(&normal(width, 4), 0));
            let acc = [7 * width, 20 * width, 2 * width, width, width].map(|len| place.wide(&normal(len, 9), 0));
            let (y, dy) = (place.unset(n, room), place.matrix(&normal(n, 6), room));
            let [mean, rstd] = [(); 2].map(|()| place.unset_wide(ROWS, SPARE));
            let names = place.names(&names.rows());
            let shape = layernorm::Shape { rows: place.count(ROWS, &number), width, eps: 1e-12 };
            let tokens = embed::Tokens { ids: &ids, types: &types, names: row_names(&names) };
            let tables = [&word, &position, &token_type, &gamma, &beta];
            let all = |[word, position, token_type, gamma, beta]: [_; 5]| embed::Tables {
                word,
                position,
                token_type,
                gamma,
                beta,
            };
            let (dropout, tables, grad_acc) = (dropout(0.1, 9), all(tables), all(acc.each_ref()));
            let (y, mean, rstd) = (&y, &mean, &rstd);
            embed::forward(place.device(), &embed::Forward { shape, tokens, tables, dropout, y, mean, rstd });
            let groups = groups.each_ref().map(|g| g.get(place));
            let backward = embed::Backward { shape, tokens, tables, dropout, mean, rstd, dy: &dy, groups, grad_acc };
            embed::backward(place.device(), &backward);
            let take = |tensor: &Tensor, used| place.take(tensor, used, Rest::Untouched);
            let mut results = vec![("y", take(y, n)), ("mean", take(mean, ROWS)), ("rstd", take(rstd, ROWS))];
            results.push(("dz", take(&dy, n)));
            let names = ["dword", "dposition", "dtype", "dgamma", "dbeta"];
            results.extend(names.into_iter().zip(&acc).map(|(name, acc)| (name, take(acc, acc.len()))));
            results
        });
    }
}

#[test]
fn activations_agree() {
    use activation::Function::*;
    // The last block of 2048 elements is not full.
    let width = 272;
    for function in [Gelu, GeluTanh, QuickGelu, Relu, Silu, Tanh] {
        check(&format!("{function:?}"), |place| {
            let (n, room, number) = (ROWS * width, SPARE * width, place.number(ROWS));
            let [u, dy] = [1, 2].map(|name| place.matrix(&normal(n, name), room));
            let (y, rows) = (place.unset(n, room), (place.count(ROWS, &number), width));
            activation::forward(place.device(), function, &u, &y, rows);
            activation::backward(place.device(), function, &u, &dy, rows);
            vec![("y", place.take(&y, n, Rest::Untouched)), ("du", place.take(&dy, n, Rest::Untouched))]
        });
    }
}

/// To the bit what the two do one after the other.
#[test]
fn activations_with_their_bias_agree() {
    use activation::Function::*;
    // Two blocks of columns, the second not full; few rows, and more than the blocks take at once.
    for (function, width, rows) in [(Gelu, 272, ROWS), (Relu, 16, 5), (GeluTanh, 528, 301), (Silu, 48, 1)] {
        let run = |place: Place, fused: bool| {
            let (n, room, number) = (rows * width, SPARE * width, place.number(rows));
            let [u, dy] = [1, 2].map(|name| place.matrix(&normal(n, name), room));
            let (db_acc, size) = (place.wide(&normal(width, 3), 0), (place.count(rows, &number), width));
            if fused {
                activation::backward_with_bias(place.device(), function, &u, &dy, &db_acc, size);
            } else {
                activation::backward(place.device(), function, &u, &dy, size);
                linear::bias_gradient(place.device(), size, &Matrix::new(&dy, width), &db_acc);
            }
            vec![("du", place.take(&dy, n, Rest::Untouched)), ("db", place.take(&db_acc, width, Rest::Untouched))]
        };
        check(&format!("{function:?} with a bias"), |place| {
            let together = run(place, true);
            assert!(together == run(place, false), "{function:?} of {rows} x {width}");
            together
        });
    }
}

/// Input and output are columns of wider matrices, as parts of a fused layer are; `extra` columns lie on each side of them.
fn linear_of(
    place: Place,
    rows: usize,
    (inputs, outputs, extra): (usize, usize, usize),
    dx: Option<Output>,
) -> Results {
    let (k, n, number) = (inputs + 2 * extra, outputs + 2 * extra, place.number(rows));
    let matrix = |width: usize, name| place.matrix(&normal(rows * width, name), SPARE * width);
    let (x, y, dy, dx_out) = (matrix(k, 1), matrix(n, 2), matrix(n, 3), matrix(k, 4));
    let size = (inputs as f32).sqrt();
    let w = place.matrix(&normal(outputs * inputs, 5).iter().map(|w| w / size).collect::<Vec<_>>(), 0);
    let b = place.matrix(&normal(outputs, 6), 0);
    let (dw_acc, db_acc) = (place.wide(&normal(outputs * inputs, 7), 0), place.wide(&normal(outputs, 8), 0));
    let (count, of) = (place.count(rows, &number), Matrix::columns);
    let (x_part, w) = (of(&x, extra, k), &w);
    let forward = linear::Forward { rows: count, inputs, outputs, x: x_part, w, b: Some(&b), y: of(&y, extra, n) };
    linear::forward(place.device(), &forward);
    let y = place.take(&y, rows * n, Rest::Any);
    let backward = linear::Backward {
        rows: count,
        inputs,
        outputs,
        x: x_part,
        w,
        dy: of(&dy, extra, n),
        dx: dx.map(|output| (of(&dx_out, extra, k), output)),
        dw_acc: &dw_acc,
        db_acc: Some(&db_acc),
    };
    linear::backward(place.device(), &backward);
    let all = |tensor: &Tensor| place.take(tensor, tensor.len(), Rest::Any);
    let mut results = vec![("y", y), ("dw", all(&dw_acc)), ("db", all(&db_acc))];
    results.push(("dx", place.take(&dx_out, rows * k, Rest::Any)));
    for (tensor, width) in [(&x, k), (&dy, n)] {
        // Only the columns that are multiplied become zero.
        for row in all(tensor)[rows * width..].chunks(width) {
            let (before, own, after) = (&row[..extra], &row[extra..width - extra], &row[width - extra..]);
            assert!(own.iter().all(|&x| x == 0.0) && before.iter().chain(after).all(|x| x.is_nan()));
        }
    }
    results
}

#[test]
fn linear_agrees() {
    // One block of columns; several, the last not full; sums of columns by more than one block of rows.
    for (rows, sizes) in [(ROWS, (48, 48, 0)), (ROWS, (64, 272, 8)), (200, (48, 528, 16)), (1, (1040, 16, 0))] {
        for dx in [None, Some(Output::Set), Some(Output::Add)] {
            check(&format!("linear {rows} {sizes:?} {dx:?}"), |place| linear_of(place, rows, sizes, dx));
        }
    }
}

#[test]
fn moves_of_rows_agree() {
    for width in WIDTHS {
        check(&format!("moves of {width}"), |place| {
            let large = 2 * ROWS;
            let (number, room) = (place.number(ROWS), SPARE * width);
            let rows = place.tensor(&(0..ROWS as u32).map(|i| 2 * i + 1).collect::<Vec<_>>(), SPARE);
            let others = place.tensor(&below(ROWS, large as u32, 1), SPARE);
            let small = place.matrix(&normal(ROWS * width, 1), room);
            let [from, scattered, added, zeroed] =
                [2, 3, 4, 5].map(|name| place.matrix(&normal(large * width, name), 0));
            let [gathered, sums] = [(); 2].map(|()| place.unset(ROWS * width, room));
            let (on, count) = (place.device(), place.count(ROWS, &number));
            gather::gather(on, &from, &rows, count, width, &gathered);
            gather::scatter(on, &small, &rows, count, width, &scattered);
            gather::scatter_add(on, &small, &rows, count, width, &added);
            gather::zero_rows(on, &rows, count, width, &zeroed);
            gather::add_rows(on, (&from, &rows), (&scattered, &others), count, width, &sums);
            let cleared = place.matrix(&normal(64, 6), 0);
            gather::zero(on, &cleared, 40);
            let tensors = [("gathered", &gathered), ("sums", &sums), ("scattered", &scattered), ("added", &added)];
            let others = [("zeroed", &zeroed), ("cleared", &cleared)];
            let used = |tensor: &Tensor| if tensor.len() > large * width { large * width } else { tensor.len() };
            let used = |name, tensor| if ["gathered", "sums"].contains(&name) { ROWS * width } else { used(tensor) };
            let all = tensors.into_iter().chain(others);
            all.map(|(name, t)| (name, place.take(t, used(name, t), Rest::Untouched))).collect()
        });
    }
}

#[test]
fn rounded_rows_agree() {
    let width = 48;
    check("rounding", |place| {
        let (number, room) = (place.number(ROWS), SPARE * width);
        let (from, storage) = (place.wide(&normal(ROWS * width, 1), room), place.unset(ROWS * width, room));
        let count = place.count(ROWS, &number);
        let rounded = gather::rounded(place.device(), &from, count, width, &storage);
        assert!(place.gpu.is_none() || rounded.dtype() == place.storage);
        vec![("rows", place.take(rounded, ROWS * width, Rest::Untouched))]
    });
}

#[test]
fn group_sums_agree() {
    // Several windows of 32 entries, groups across their borders, more columns than a warp's and a block's.
    for (entries, keys, width) in [(ROWS, 4, 48), (100, 3, 272), (150, 200, 1040)] {
        check(&format!("sums of {entries} rows of {width}"), |place| {
            let groups = OnPlace::new(place, &below(entries, keys, 1));
            let from = place.matrix(&normal(entries * width, 1), SPARE * width);
            let acc = place.wide(&normal(keys as usize * width, 2), 0);
            gather::group_sums(place.device(), &from, groups.get(place), width, &acc);
            vec![("sums", place.take(&acc, acc.len(), Rest::Any))]
        });
    }
}

#[test]
fn pooling_agrees() {
    // More columns than a block's, and sequences that fill no block of eight.
    let (width, sequences) = (272, LENGTHS.len());
    for pooling in [Pooling::Cls, Pooling::Mean] {
        check(&format!("{pooling:?}"), |place| {
            let borders: Vec<u32> = (0..=sequences).map(|s| LENGTHS[..s].iter().sum::<usize>() as u32).collect();
            let (cu_seqlens, number) = (place.tensor(&borders, SPARE), place.number(sequences));
            let sequences_count = place.count(sequences, &number);
            let shape = pool::Shape { sequences: sequences_count, width, cu_seqlens: &cu_seqlens, pooling };
            let matrix = |rows: usize, name| place.matrix(&normal(rows * width, name), SPARE * width);
            let (x, dy) = (matrix(ROWS, 1), matrix(sequences, 2));
            let (y, dx) = (place.unset(sequences * width, SPARE * width), place.unset(ROWS * width, SPARE * width));
            pool::forward(place.device(), shape, &x, &y);
            pool::backward(place.device(), shape, &dy, &dx);
            let take = |tensor, rows| place.take(tensor, rows * width, Rest::Untouched);
            vec![("y", take(&y, sequences)), ("dx", take(&dx, ROWS))]
        });
    }
}

#[test]
fn normalisation_agrees() {
    for width in WIDTHS {
        check(&format!("normalisation of {width}"), |place| {
            let (n, room, number) = (ROWS * width, SPARE * width, place.number(ROWS));
            let [x, dy] = [1, 2].map(|name| place.matrix(&normal(n, name), room));
            let [y, dx] = [(); 2].map(|()| place.unset(n, room));
            let (norm, rows) = (place.unset_wide(ROWS, SPARE), (place.count(ROWS, &number), width));
            pool::normalize(place.device(), rows, &x, &y, &norm);
            pool::normalize_backward(place.device(), rows, &y, &norm, &dy, &dx);
            let take = |tensor, used| place.take(tensor, used, Rest::Untouched);
            vec![("y", take(&y, n)), ("norm", take(&norm, ROWS)), ("dx", take(&dx, n))]
        });
    }
}

#[test]
fn the_optimizer_agrees() {
    // Many parts of the norm and blocks of the update, the last ones not full.
    let (n, lr) = (600_008, 1e-2);
    check("AdamW", |place| {
        let adamw = AdamW { max_norm: 0.5, ..AdamW::default() };
        let w = place.wide(&normal(n, 1).iter().map(|w| 0.02 * w).collect::<Vec<_>>(), 0);
        let [m, v] = [(); 2].map(|()| place.wide(&vec![0.0; n], 0));
        let norm = place.device().tensor(&[f64::NAN]);
        // Where the storage is f32 there is no copy.
        let copy = (place.storage == DType::BF16).then(|| place.unset(n, 0));
        for t in 1..=2 {
            let (g, schedule) = (place.wide(&normal(n, 1 + t), 0), place.wide(&adamw.schedule(lr, t), 0));
            optimizer::squared_norm(place.device(), &g, &norm);
            let (w, g, m, v, squared_norm) = (&w, &g, &m, &v, &norm);
            let (schedule, copy) = (Some(&schedule), copy.as_ref().filter(|_| place.gpu.is_some()));
            let update = optimizer::Update { adamw, lr, t, schedule, w, copy, g, m, v, decayed: 20_004, squared_norm };
            optimizer::update(place.device(), &update);
        }
        if let (Some(_), Some(copy)) = (place.gpu, &copy) {
            assert_eq!(copy.to_vec::<bf16>(), w.to_vec().into_iter().map(bf16::from_f32).collect::<Vec<_>>());
        }
        [("w", &w), ("m", &m), ("v", &v), ("norm", &norm)]
            .map(|(name, t)| (name, place.take(t, t.len(), Rest::Any)))
            .into()
    });
}
