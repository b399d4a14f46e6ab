//! Kernels that go over the rows of hidden states once: bytes are all they cost.

use super::{Bench, Work};
use crate::device::Tensor;
use crate::error::Result;
use crate::ops::activation::{self, Function};
use crate::ops::pool::{self, Pooling};
use crate::ops::{embed, gather, layernorm};

/// Times all of them.
pub(super) fn cases(bench: &Bench<'_>) -> Result<()> {
    norm(bench)?;
    gelu(bench)?;
    embedding(bench)?;
    moves(bench)?;
    pooling(bench)
}

fn bytes(bytes: usize) -> Work {
    Work { flops: 0, bytes }
}

/// Dropout, residual and LayerNorm.
fn norm(bench: &Bench<'_>) -> Result<()> {
    let (setup, batch) = (bench.setup, bench.full);
    let (t, c, tokens) = (batch.tokens, setup.dims.hidden, &batch.inputs.tokens);
    let shape = layernorm::Shape { rows: tokens.count.get(), width: c, eps: setup.dims.eps };
    bench.case("layernorm forward", bench.work(batch.length, |list| list.layernorm_forward(t, true)), || {
        let (x, residual, y) = (bench.stored(t * c, 0.1), bench.stored(t * c, 1.0), bench.room(t * c));
        let (gamma, beta) = (bench.wide(c, 1.0), bench.wide(c, 1.0));
        let (mean, rstd) = (bench.wide_room(t), bench.wide_room(t));
        Box::new(move || {
            let forward = layernorm::Forward {
                shape,
                x: &x,
                residual: Some(&residual),
                dropout: Some((setup.dropout, tokens.names())),
                gamma: &gamma,
                beta: &beta,
                y: &y,
                mean: &mean,
                rstd: &rstd,
            };
            layernorm::forward(setup.device, &forward);
        })
    })?;
    bench.case("layernorm backward", bench.work(batch.length, |list| list.layernorm_backward(t, true)), || {
        let (z, dy, dropped) = (bench.stored(t * c, 1.0), bench.stored(t * c, 1.0), bench.room(t * c));
        let (gamma, dgamma, dbeta) = (bench.wide(c, 1.0), bench.wide_room(c), bench.wide_room(c));
        let (mean, rstd) = (bench.wide_room(t), setup.device.tensor(&vec![1.0f32; t]));
        Box::new(move || {
            let backward = layernorm::Backward {
                shape,
                z: &z,
                mean: &mean,
                rstd: &rstd,
                gamma: &gamma,
                dy: &dy,
                dropout: Some((setup.dropout, tokens.names(), &dropped)),
                dgamma_acc: &dgamma,
                dbeta_acc: &dbeta,
            };
            layernorm::backward(setup.device, &backward);
        })
    })
}

fn gelu(bench: &Bench<'_>) -> Result<()> {
    let (device, batch, i) = (bench.setup.device, bench.full, bench.setup.dims.intermediate);
    let (t, rows) = (batch.tokens, batch.inputs.tokens.count.get());
    bench.case("gelu forward", bench.work(batch.length, |list| list.activation_forward(t, i)), || {
        let (u, y) = (bench.stored(t * i, 1.0), bench.room(t * i));
        Box::new(move || activation::forward(device, Function::Gelu, &u, &y, (rows, i)))
    })?;
    bench.case("gelu backward", bench.work(batch.length, |list| list.activation_backward(t, i)), || {
        let (u, dy) = (bench.stored(t * i, 1.0), bench.stored(t * i, 1.0));
        Box::new(move || activation::backward(device, Function::Gelu, &u, &dy, (rows, i)))
    })
}

/// The embedding layer's tables, or their gradients.
struct Tables([Tensor; 5]);

impl Tables {
    fn get(&self) -> embed::Tables<'_> {
        let [word, position, token_type, gamma, beta] = &self.0;
        embed::Tables { word, position, token_type, gamma, beta }
    }
}

fn embedding(bench: &Bench<'_>) -> Result<()> {
    let (setup, batch) = (bench.setup, bench.full);
    let (t, c, tokens) = (batch.tokens, setup.dims.hidden, &batch.inputs.tokens);
    let rows = [setup.dims.vocabulary, batch.length, 2];
    let shape = layernorm::Shape { rows: tokens.count.get(), width: c, eps: setup.dims.eps };
    let names = embed::Tokens { ids: &tokens.ids, types: &tokens.types, names: tokens.names() };
    let weights = || {
        let [word, position, types] = rows.map(|n| bench.stored(n * c, 0.02));
        Tables([word, position, types, bench.wide(c, 1.0), bench.wide(c, 1.0)])
    };
    // A word in, y out.
    bench.case("embed forward", bytes(bench.bytes(2 * t * c)), || {
        let (tables, y) = (weights(), bench.room(t * c));
        let (mean, rstd) = (bench.wide_room(t), bench.wide_room(t));
        Box::new(move || {
            let (tables, y, mean, rstd) = (tables.get(), &y, &mean, &rstd);
            let dropout = setup.dropout;
            embed::forward(setup.device, &embed::Forward { shape, tokens: names, tables, dropout, y, mean, rstd });
        })
    })?;
    // A word and dy in, dz out; then dz in once for each of three sums. What the sums write is small against that.
    bench.case("embed backward", bytes(bench.bytes(6 * t * c)), || {
        let (tables, dy) = (weights(), bench.stored(t * c, 1.0));
        let (mean, rstd) = (bench.wide_room(t), setup.device.tensor(&vec![50.0f32; t]));
        let [word, position, types] = rows.map(|n| bench.wide_room(n * c));
        let gradients = Tables([word, position, types, bench.wide_room(c), bench.wide_room(c)]);
        Box::new(move || {
            let backward = embed::Backward {
                shape,
                tokens: names,
                tables: tables.get(),
                dropout: setup.dropout,
                mean: &mean,
                rstd: &rstd,
                dy: &dy,
                groups: tokens.groups(),
                grad_acc: gradients.get(),
            };
            embed::backward(setup.device, &backward);
        })
    })
}

/// Gathers, scatters and sums of rows, as the last layer and the decoder need them.
fn moves(bench: &Bench<'_>) -> Result<()> {
    let (device, batch, c) = (bench.setup.device, bench.full, bench.setup.dims.hidden);
    let (t, needed) = (batch.tokens, &batch.inputs.needed);
    let (rows, count) = (needed.count.count, needed.count.get());
    bench.case("gather of needed rows", bench.work(batch.length, |list| list.moved("gather", rows)), || {
        let (from, to) = (bench.stored(t * c, 1.0), bench.room(rows * c));
        Box::new(move || gather::gather(device, &from, &needed.token, count, c, &to))
    })?;
    bench.case(
        "scatter-add of needed rows",
        bench.work(batch.length, |list| list.moved("scatter_add", rows)),
        || {
            let (from, to) = (bench.stored(rows * c, 1.0), bench.room(t * c));
            Box::new(move || gather::scatter_add(device, &from, &needed.token, count, c, &to))
        },
    )?;
    let Some(decoder) = &batch.inputs.decoder else { return Ok(()) };
    let labelled = decoder.rows.count.count;
    let groups =
        [("positions", &decoder.by_position, batch.length), ("sequences", &decoder.by_sequence, batch.sequences)];
    for (name, groups, sums) in groups {
        let work = bench.work(batch.length, |list| list.group_sums(labelled, sums));
        bench.case(&format!("sums by {name}"), work, || {
            let (from, to) = (bench.stored(t * c, 1.0), bench.wide_room(sums * c));
            Box::new(move || gather::group_sums(device, &from, groups.groups(), c, &to))
        })?;
    }
    Ok(())
}

fn pooling(bench: &Bench<'_>) -> Result<()> {
    let (device, c, batch) = (bench.setup.device, bench.setup.dims.hidden, bench.ragged);
    let (t, s, tokens) = (batch.tokens, batch.sequences, &batch.inputs.tokens);
    let (sequences, cu_seqlens) = (tokens.sequences.get(), &tokens.cu_seqlens);
    let shape = pool::Shape { sequences, width: c, cu_seqlens, pooling: Pooling::Mean };
    bench.case("mean pooling forward", bytes(bench.bytes((t + s) * c)), || {
        let (x, y) = (bench.stored(t * c, 1.0), bench.room(s * c));
        Box::new(move || pool::forward(device, shape, &x, &y))
    })?;
    bench.case("mean pooling backward", bytes(bench.bytes((t + s) * c)), || {
        let (dy, dx) = (bench.stored(s * c, 1.0), bench.room(t * c));
        Box::new(move || pool::backward(device, shape, &dy, &dx))
    })?;
    bench.case("normalisation forward", bytes(bench.bytes(2 * s * c)), || {
        let (x, y, norm) = (bench.stored(s * c, 1.0), bench.room(s * c), bench.wide_room(s));
        Box::new(move || pool::normalize(device, (sequences, c), &x, &y, &norm))
    })
}
