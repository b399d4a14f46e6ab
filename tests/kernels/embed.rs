//! The embedding layer: table sums, LayerNorm, dropout, and the gradients of all five parameters.

use crate::gather::{Kernels, OwnGroups, groups_of};
use crate::harness::*;
use half::bf16;
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::kernels::*;
use retromae_engine::device::launch::Shape;
use retromae_engine::device::{Device, Element, Tensor};
use retromae_engine::ops::{SiteDropout, embed, layernorm};

/// Rows of the capacity that are not in use.
const SPARE: usize = 3;
const EPS: f32 = 1e-12;

struct Case<'a> {
    lengths: &'a [usize],
    width: usize,
    words: u32,
    types: u32,
    p: f32,
    blocks: usize,
}

const PLAIN: Case = Case { lengths: &[5, 1, 4], width: 48, words: 7, types: 2, p: 0.1, blocks: 2 };

/// Values as the storage holds them.
struct Inputs {
    ids: Vec<u32>,
    types: Vec<u32>,
    /// Word, position and token type.
    tables: [Vec<f32>; 3],
    gamma: Vec<f32>,
    beta: Vec<f32>,
    dy: Vec<f32>,
}

/// What is compared, in this order.
const RESULTS: [&str; 9] = ["y", "mean", "rstd", "dz", "dgamma", "dbeta", "dword", "dposition", "dtype"];

impl Case<'_> {
    fn rows(&self) -> usize {
        self.lengths.iter().sum()
    }

    fn dropout(&self) -> SiteDropout {
        dropout(self.p, 9)
    }

    fn inputs<T: Storage>(&self) -> Inputs {
        let (rows, c) = (self.rows(), self.width);
        let longest = self.lengths.iter().max().copied().unwrap_or(0);
        let values = |name, rows: usize| rounded::<T>(&normal(rows * c, name));
        Inputs {
            ids: below(rows, self.words, 1),
            types: below(rows, self.types, 2),
            tables: [values(1, self.words as usize), values(2, longest), values(3, self.types as usize)],
            gamma: normal(c, 4).iter().map(|x| 1.0 + 0.5 * x).collect(),
            beta: normal(c, 5),
            dy: values(6, rows),
        }
    }

    /// Rows by word, position and token type.
    fn groups(&self, i: &Inputs) -> [OwnGroups; 3] {
        [&i.ids, &Names::new(self.lengths).position, &i.types].map(|keys| OwnGroups::new(keys))
    }
}

macro_rules! runner {
    ($name:ident, $t:ty, $forward:ident, $backward:ident) => {
        /// All kernels of the layer.
        fn $name(on: &'static Gpu, case: &Case, i: &Inputs) -> Vec<Vec<f32>> {
            let (rows, c, done) = (case.rows(), case.width, "a correct kernel raises nothing");
            let [word, position, token_type] = [0, 1, 2].map(|k| stored::<$t>(on, &i.tables[k], 0));
            let (gamma, beta) = (Buffer::of(on, &i.gamma), Buffer::of(on, &i.beta));
            let (ids, types) = (Buffer::of(on, &i.ids), Buffer::of(on, &i.types));
            let y = Buffer::<$t>::poisoned(on, (rows + SPARE) * c);
            let [mean, rstd] = [(); 2].map(|()| Buffer::<f32>::poisoned(on, rows + SPARE));
            let (dy, partials) = (stored::<$t>(on, &i.dy, SPARE * c), Buffer::poisoned(on, case.blocks * 2 * c));
            let [dgamma, dbeta] = [(); 2].map(|()| Buffer::of(on, &vec![1f32; c]));
            let (count, key) = (Buffer::of(on, &[rows as i32]), Buffer::of(on, &case.dropout().mask.key));
            let names = Names::new(case.lengths).on(on);
            let dropout = device_dropout(case.dropout(), &key);
            let blocks = if c <= 1024 { (rows + SPARE).div_ceil(4) } else { rows + SPARE };
            $forward {
                y: y.get_mut(),
                mean: mean.get_mut(),
                rstd: rstd.get_mut(),
                word: word.get(),
                position: position.get(),
                token_type: token_type.get(),
                gamma: gamma.get(),
                beta: beta.get(),
                ids: ids.get(),
                types: types.get(),
                names: names.get(),
                dropout,
                site: 9,
                rows: count.get(),
                C: c as i32,
                eps: EPS,
            }
            .launch(on, Shape::linear(blocks as u32, 128))
            .expect(done);
            $backward {
                dy: dy.get_mut(),
                partials: partials.get_mut(),
                word: word.get(),
                position: position.get(),
                token_type: token_type.get(),
                mean: mean.get(),
                rstd: rstd.get(),
                gamma: gamma.get(),
                ids: ids.get(),
                types: types.get(),
                names: names.get(),
                dropout,
                site: 9,
                rows: count.get(),
                C: c as i32,
            }
            .launch(on, Shape::linear(case.blocks as u32, 128))
            .expect(done);
            LayernormBackwardSums {
                dgamma_acc: dgamma.get_mut(),
                dbeta_acc: dbeta.get_mut(),
                partials: partials.get(),
                rows: count.get(),
                blocks: case.blocks as i32,
                C: c as i32,
            }
            .launch(on, Shape::linear((2 * c / 32) as u32, 1024))
            .expect(done);
            let mut out = vec![widened(y.take(rows * c)), mean.take(rows), rstd.take(rows)];
            out.extend([widened(dy.take(rows * c)), dgamma.take(c), dbeta.take(c)]);
            for (groups, table) in case.groups(i).iter().zip(&i.tables) {
                let sums = Buffer::of(on, &vec![1f32; table.len()]);
                <$t as Kernels>::group_sums(on, &dy, groups, c, &sums, SPARE);
                out.push(sums.take(table.len()));
            }
            out
        }
    };
}
runner!(run_f32, f32, EmbedForwardF32, EmbedBackwardF32);
runner!(run_bf16, bf16, EmbedForwardBf16, EmbedBackwardBf16);

/// The op in f64, exactly these inputs.
fn exactly(case: &Case, i: &Inputs) -> Vec<Vec<f64>> {
    let (rows, c) = (case.rows(), case.width);
    let tensor = |x: &[f32]| Tensor::from_slice(&f64s(x));
    let filled = |len, value: f64| Tensor::from_slice(&vec![value; len]);
    let (y, mean, rstd, dy) = (filled(rows * c, 0.0), filled(rows, 0.0), filled(rows, 0.0), tensor(&i.dy));
    let shape = layernorm::Shape { rows: rows.into(), width: c, eps: EPS };
    let (ids, types) = (Tensor::from_slice(&i.ids), Tensor::from_slice(&i.types));
    let names = Names::new(case.lengths);
    let values = [&i.tables[0], &i.tables[1], &i.tables[2], &i.gamma, &i.beta].map(|x| tensor(x));
    let gradients = [0, 1, 2, 3, 4].map(|k| filled(values[k].len(), 1.0));
    let tokens = embed::Tokens { ids: &ids, types: &types, names: names.rows() };
    let (dropout, groups) = (case.dropout(), case.groups(i));
    let forward = embed::Forward { shape, tokens, tables: tables(&values), dropout, y: &y, mean: &mean, rstd: &rstd };
    embed::forward(Device::Cpu, &forward);
    let own = groups.each_ref().map(OwnGroups::tensors);
    let groups = own.each_ref().map(groups_of);
    embed::backward(
        Device::Cpu,
        &embed::Backward {
            shape,
            tokens,
            tables: tables(&values),
            dropout,
            mean: &mean,
            rstd: &rstd,
            dy: &dy,
            groups,
            grad_acc: tables(&gradients),
        },
    );
    let [dword, dposition, dtype, dgamma, dbeta] = gradients;
    [y, mean, rstd, dy, dgamma, dbeta, dword, dposition, dtype].iter().map(Tensor::to_vec).collect()
}

fn tables(all: &[Tensor; 5]) -> embed::Tables<'_> {
    let [word, position, token_type, gamma, beta] = all;
    embed::Tables { word, position, token_type, gamma, beta }
}

/// Rounds where a bf16 implementation in PyTorch does: each sum of two tables, y, its dropout, the gradient's dropout, dz.
fn plainly(case: &Case, i: &Inputs) -> Vec<Vec<f32>> {
    let (rows, c) = (case.rows(), case.width);
    let names = Names::new(case.lengths);
    let row = |k: usize, index: u32| i.tables[k][index as usize * c..][..c].iter();
    let z: Vec<f32> = (0..rows)
        .flat_map(|r| {
            let (word, token_type) = (row(0, i.ids[r]), row(2, i.types[r]));
            let sums = word.zip(token_type).map(|(w, t)| round::<bf16>(w + t));
            sums.zip(row(1, names.position[r])).map(|(s, p)| round::<bf16>(s + p)).collect::<Vec<_>>()
        })
        .collect();
    let tensor = |x: &[f32]| Tensor::from_slice(x);
    let zeros = |len| Tensor::zeros(f32::DTYPE, len);
    let dropped = rounded::<bf16>(&names.dropped(&i.dy, case.dropout()));
    let (z, dy, gamma, beta) = (tensor(&z), tensor(&dropped), tensor(&i.gamma), tensor(&i.beta));
    let (y, mean, rstd) = (zeros(rows * c), zeros(rows), zeros(rows));
    let (dgamma, dbeta) = (tensor(&vec![1.0; c]), tensor(&vec![1.0; c]));
    let shape = layernorm::Shape { rows: rows.into(), width: c, eps: EPS };
    let (residual, dropout) = (None, None);
    let forward = layernorm::Forward {
        shape,
        x: &z,
        residual,
        dropout,
        gamma: &gamma,
        beta: &beta,
        y: &y,
        mean: &mean,
        rstd: &rstd,
    };
    layernorm::forward(Device::Cpu, &forward);
    let backward = layernorm::Backward {
        shape,
        z: &z,
        mean: &mean,
        rstd: &rstd,
        gamma: &gamma,
        dy: &dy,
        dropout: None,
        dgamma_acc: &dgamma,
        dbeta_acc: &dbeta,
    };
    layernorm::backward(Device::Cpu, &backward);
    let y = rounded::<bf16>(&names.dropped(&rounded::<bf16>(&y.to_vec::<f32>()), case.dropout()));
    let dz = rounded::<bf16>(&dy.to_vec::<f32>());
    let mut out = vec![y, mean.to_vec(), rstd.to_vec(), dz.clone(), dgamma.to_vec(), dbeta.to_vec()];
    for (groups, table) in case.groups(i).iter().zip(&i.tables) {
        let mut sums = vec![1f64; table.len()];
        groups.exactly(&f64s(&dz), c, &mut sums);
        out.push(sums.iter().map(|&x| x as f32).collect());
    }
    out
}

fn judged<T: Storage>(case: &Case, run: fn(&'static Gpu, &Case, &Inputs) -> Vec<Vec<f32>>) {
    let i = case.inputs::<T>();
    let got = in_every_order(|on| run(on, case, &i));
    let (exact, plain) = (exactly(case, &i), plainly(case, &i));
    for (k, name) in RESULTS.iter().enumerate() {
        judge::<T>(&format!("{name} of {:?} x {}", case.lengths, case.width), &got[k], &exact[k], &plain[k]);
    }
}

fn check(case: Case) {
    judged::<f32>(&case, run_f32);
    judged::<bf16>(&case, run_bf16);
}

#[test]
fn one_token() {
    check(Case { lengths: &[1], words: 1, types: 1, ..PLAIN });
}

#[test]
fn widths() {
    // Two vectors; half of the second vector of each lane; BERT base; the last width of one warp, the first of four, the widest.
    for width in [16, 384, 768, 1024, 1040, 4096] {
        check(Case { width, ..PLAIN });
    }
}

#[test]
fn without_dropout_and_with_much() {
    check(Case { p: 0.0, ..PLAIN });
    check(Case { p: 0.5, width: 272, ..PLAIN });
}

#[test]
fn more_blocks_than_rows_and_several_rows_a_warp() {
    check(Case { blocks: 7, ..PLAIN });
    check(Case { lengths: &[30, 1, 40], words: 50, blocks: 3, ..PLAIN });
}
