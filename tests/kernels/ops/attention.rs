//! Both attentions, their queries, keys and values as columns of fused matrices.

use super::*;
use crate::reference::{Problem, row_names, side_by_side};
use retromae_engine::device::Matrix;
use retromae_engine::ops::attention::{self, Backward, Forward, Gradient, Shape, Tiles, Work};
use retromae_engine::ops::enhanced_decoding as decoding;

/// More than a tile of 64, one row, and half of a tile.
const LENGTHS: &[usize] = &[70, 1, 33];

/// For which the backward is in one pass by one warpgroup, by two, in two passes: where the GPU and the storage have warpgroups.
const LONGEST: [usize; 3] = [70, 512, 600];

fn problem(heads: usize, head_size: usize, positions: impl Fn(usize) -> Vec<u32>) -> Problem {
    let positions = LENGTHS.iter().map(|&n| positions(n)).collect();
    Problem { heads, head_size, lengths: LENGTHS.to_vec(), positions, dropout: dropout(0.1, 6) }
}

/// Borders of sequences and tables of work, with room for more tiles.
struct Tables {
    borders: [Tensor; 2],
    tables: [(Tensor, Tensor, usize); 3],
    longest: usize,
}

impl Tables {
    fn new(place: Place, p: &Problem, longest: usize) -> Self {
        let (cu_rows, cu_seqlens) = (p.cu_rows(), p.cu_seqlens());
        let table =
            |tiles: Vec<[u32; 2]>| (place.tensor(&tiles.concat(), 2 * SPARE), place.number(tiles.len()), tiles.len());
        let whole = attention::whole_sequences(&cu_seqlens);
        let tables =
            [attention::tiles(&cu_rows, &cu_seqlens), attention::tiles(&cu_seqlens, &cu_rows), whole].map(table);
        Tables { borders: [cu_rows, cu_seqlens].map(|cu| place.tensor(&cu, 0)), tables, longest }
    }

    fn shape(&self, place: Place, p: &Problem) -> Shape<'_> {
        let [queries, keys, sequences] =
            self.tables.each_ref().map(|(table, number, n)| Tiles { table, count: place.count(*n, number) });
        let ([cu_rows, cu_seqlens], work) =
            (&self.borders, Some(Work { queries, keys, sequences, longest: self.longest }));
        Shape { sequences: LENGTHS.len(), heads: p.heads, head_size: p.head_size, cu_rows, cu_seqlens, work }
    }
}

/// Queries, keys and values in one matrix, or queries apart from keys and values.
fn attention_of(place: Place, p: &Problem, fused: bool, longest: usize) -> Results {
    let (c, rows, tokens) = (p.width(), p.rows(), p.tokens());
    let (tables, names) = (Tables::new(place, p, longest), place.names(&row_names(&p.names())));
    let [q, k, v] = [(rows, 1), (tokens, 2), (tokens, 3)].map(|(rows, name)| normal(rows * c, name));
    let parts: &[&[&[f32]]] = if fused { &[&[&q, &k, &v]] } else { &[&[&q], &[&k, &v]] };
    let parts: Vec<_> = parts.iter().map(|part| (side_by_side(part, c), part.len() * c)).collect();
    let matrices: Vec<_> = parts.iter().map(|(x, width)| place.matrix(x, SPARE * width)).collect();
    let gradients: Vec<_> = parts.iter().map(|(x, width)| place.unset(x.len(), SPARE * width)).collect();
    let (q, kv) = (&matrices[0], &matrices[matrices.len() - 1]);
    let (q_stride, k_at, kv_stride) = if fused { (3 * c, c, 3 * c) } else { (c, 0, 2 * c) };
    let (out, dout) = (place.unset(rows * c, SPARE * c), place.matrix(&normal(rows * c, 4), SPARE * c));
    let lse = place.unset_wide(rows * p.heads, SPARE * p.heads);
    let forward = Forward {
        shape: tables.shape(place, p),
        q: Matrix::columns(q, 0, q_stride),
        k: Matrix::columns(kv, k_at, kv_stride),
        v: Matrix::columns(kv, k_at + c, kv_stride),
        names: row_names(&names),
        dropout: p.dropout,
        out: &out,
        lse: &lse,
    };
    attention::forward(place.device(), &forward);
    let gradient = if fused { Gradient::Fused(&gradients[0]) } else { Gradient::Split(&gradients[0], &gradients[1]) };
    attention::backward(place.device(), &Backward { forward, dout: &dout, gradient });
    let take = |tensor, used| place.take(tensor, used, Rest::Untouched);
    let mut results = vec![("out", take(&out, rows * c)), ("lse", take(&lse, rows * p.heads))];
    results.extend(parts.iter().zip(&gradients).map(|((x, _), gradient)| ("gradients", take(gradient, x.len()))));
    results
}

#[test]
fn attention_agrees() {
    for (heads, head_size) in [(3, 32), (2, 64), (1, 128)] {
        let all = problem(heads, head_size, |n| (0..n as u32).collect());
        for longest in LONGEST {
            let what = format!("fused attention with heads of {head_size}, laid out for {longest}");
            check(&what, |place| attention_of(place, &all, true, longest));
        }
        let some = problem(heads, head_size, |n| (0..n as u32).step_by(3).collect());
        check(&format!("split attention with heads of {head_size}"), |place| attention_of(place, &some, false, 70));
    }
}

/// Bit rows of a sequence's pool.
const POOL: usize = 4;

fn decoding_of(place: Place, p: &Problem, whole: bool, longest: usize) -> Results {
    let (c, rows, tokens) = (p.width(), p.rows(), p.tokens());
    let (tables, names) = (Tables::new(place, p, longest), place.names(&row_names(&p.names())));
    let (mut offsets, mut words) = (vec![0], Vec::new());
    for &n in LENGTHS {
        words.extend(below(POOL * n.div_ceil(32), u32::MAX, n as u64));
        offsets.push(words.len() as u32);
    }
    let row: Vec<u16> = LENGTHS.iter().flat_map(|&n| (0..n).map(|i| (i % POOL) as u16)).collect();
    let (offsets, words, row) = (place.tensor(&offsets, 0), place.tensor(&words, 0), place.tensor(&row, SPARE));
    let [position, sentence] =
        [(70, 1), (LENGTHS.len(), 2)].map(|(rows, name)| place.matrix(&normal(rows * c, name), SPARE * c));
    let queries = place.matrix(&normal(rows * c, 5), SPARE * c);
    let kv = place.matrix(&normal(tokens * 2 * c, 3), SPARE * 2 * c);
    let (out, dout) = (place.unset(rows * c, SPARE * c), place.matrix(&normal(rows * c, 4), SPARE * c));
    let (dq, dkv) = (place.unset(rows * c, SPARE * c), place.unset(tokens * 2 * c, SPARE * 2 * c));
    let lse = place.unset_wide(rows * p.heads, SPARE * p.heads);
    let forward = || decoding::Forward {
        shape: tables.shape(place, p),
        queries: match whole {
            true => decoding::Queries::Whole(&queries),
            false => decoding::Queries::Parts { position: &position, sentence: &sentence },
        },
        k: Matrix::columns(&kv, 0, 2 * c),
        v: Matrix::columns(&kv, c, 2 * c),
        visible: decoding::Visible { offsets: &offsets, words: &words, row: &row },
        names: row_names(&names),
        dropout: p.dropout,
        out: &out,
        lse: &lse,
    };
    decoding::forward(place.device(), &forward());
    let backward = decoding::Backward { forward: forward(), dout: &dout, dq: &dq, dkv: &dkv };
    decoding::backward(place.device(), &backward);
    let take = |tensor, used| place.take(tensor, used, Rest::Untouched);
    let (out, lse) = (take(&out, rows * c), take(&lse, rows * p.heads));
    vec![("out", out), ("lse", lse), ("dq", take(&dq, rows * c)), ("dkv", take(&dkv, tokens * 2 * c))]
}

#[test]
fn enhanced_decoding_agrees() {
    for (heads, head_size) in [(3, 32), (2, 64), (1, 128)] {
        // The sequence of one position sees nothing, so it does not ask.
        let p = problem(heads, head_size, |n| (1..n as u32).collect());
        for (whole, longest) in [false, true, false].into_iter().zip(LONGEST) {
            let what = format!("enhanced decoding with heads of {head_size}, whole queries: {whole}");
            check(&what, |place| decoding_of(place, &p, whole, longest));
        }
    }
}
