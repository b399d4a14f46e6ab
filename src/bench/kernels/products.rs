//! Kernels around matrix products: the layers' products themselves, the LM head with its loss, the contrastive loss, top-k search.

use std::cell::RefCell;

use super::{Bench, Work};
use crate::bench::work::Input;
use crate::device::{DType, Matrix, Output, Tensor};
use crate::error::Result;
use crate::ops::cross_entropy::{self, CrossEntropy, Gradients, Scale};
use crate::ops::topk::{self, TopK};
use crate::ops::{Count, contrastive, linear};

/// Times all of them.
pub(super) fn cases(bench: &Bench<'_>) -> Result<()> {
    let (c, i) = (bench.setup.dims.hidden, bench.setup.dims.intermediate);
    for (name, inputs, outputs) in [("qkv", c, 3 * c), ("out", c, c), ("up", c, i), ("down", i, c)] {
        layer(bench, name, inputs, outputs)?;
    }
    bench.logits_mib().iter().try_for_each(|mib| head(bench, mib << 20))?;
    let sizes = if bench.tiny() { [(8, 24), (16, 64)] } else { [(512, 4096), (4096, 32768)] };
    sizes.iter().try_for_each(|&(queries, passages)| in_batch(bench, queries, passages))?;
    // One query reads the rows; many queries multiply.
    let sizes = if bench.tiny() { [(1, 600, 10), (20, 600, 10)] } else { [(1, 1 << 20, 1000), (4096, 1 << 18, 1000)] };
    sizes.iter().try_for_each(|&(queries, rows, k)| search(bench, queries, rows, k))
}

fn layer(bench: &Bench<'_>, name: &str, inputs: usize, outputs: usize) -> Result<()> {
    let (device, batch) = (bench.setup.device, bench.full);
    let (t, rows) = (batch.tokens, batch.inputs.tokens.count.get());
    let work = bench.work(batch.length, |list| list.linear_forward((t, inputs, outputs), true));
    bench.case(&format!("linear {name} forward"), work, || {
        let (x, w, b) =
            (bench.stored(t * inputs, 1.0), bench.stored(outputs * inputs, 0.02), bench.stored(outputs, 0.02));
        let y = bench.room(t * outputs);
        Box::new(move || {
            let (x, y) = (Matrix::new(&x, inputs), Matrix::new(&y, outputs));
            linear::forward(device, &linear::Forward { rows, inputs, outputs, x, w: &w, b: Some(&b), y });
        })
    })?;
    let work = bench.work(batch.length, |list| list.linear_backward((t, inputs, outputs), true, Input::Set, true));
    bench.case(&format!("linear {name} backward"), work, || {
        let (x, w, dy) =
            (bench.stored(t * inputs, 1.0), bench.stored(outputs * inputs, 0.02), bench.stored(t * outputs, 1.0));
        let (dx, dw, db) = (bench.room(t * inputs), bench.wide_room(outputs * inputs), bench.wide_room(outputs));
        Box::new(move || {
            let dx = Some((Matrix::new(&dx, inputs), Output::Set));
            let (x, dy) = (Matrix::new(&x, inputs), Matrix::new(&dy, outputs));
            let (w, dw_acc, db_acc) = (&w, &dw, Some(&db));
            linear::backward(device, &linear::Backward { rows, inputs, outputs, x, w, dy, dx, dw_acc, db_acc });
        })
    })
}

/// Loss and all gradients over every token, as for the decoder.
fn head(bench: &Bench<'_>, logits_bytes: usize) -> Result<()> {
    let (device, dims, batch) = (bench.setup.device, bench.setup.dims, bench.full);
    let (t, c, v) = (batch.tokens, dims.hidden, dims.vocabulary);
    let rows = batch.inputs.tokens.count.get();
    let chunk = (logits_bytes / bench.bytes(v)).clamp(16, t);
    let chunk = if chunk > 128 { chunk / 128 * 128 } else { chunk };
    let shape = cross_entropy::Shape { rows, width: c, vocabulary: v, chunk };
    let labels = &batch.inputs.tokens.ids;
    let bytes = bench.bytes(2 * t * c + v * c) + 8 * v * c;
    bench.case(&format!("LM head and loss, chunks of {chunk}"), Work { flops: 6 * t * c * v, bytes }, || {
        let (h, w, bias) = (bench.stored(t * c, 1.0), bench.stored(v * c, 0.02), bench.wide(v, 0.02));
        let (logits, row_loss, row_correct) = (bench.room(chunk * v), bench.wide_room(t), device.zeros(DType::U32, t));
        let (dh, dw, db) = (bench.room(t * c), bench.wide_room(v * c), bench.wide_room(v));
        let (sums, scale) = (device.zeros(DType::F64, 2), device.tensor(&[1.0 / t as f32]));
        Box::new(move || {
            let scale = Scale { value: 1.0 / t as f64, on_device: Some(&scale) };
            let run = CrossEntropy {
                shape,
                h: &h,
                w: &w,
                b: &bias,
                labels,
                logits: &logits,
                row_loss: &row_loss,
                row_correct: &row_correct,
                sums_acc: &sums,
                gradients: Some(Gradients { scale, dh: &dh, dw_acc: &dw, db_acc: &db }),
            };
            cross_entropy::run(device, &run);
        })
    })
}

/// Sizes of the contrastive loss; `counts` holds the numbers of queries and passages.
fn shape_of<'t>(
    width: usize,
    (queries, passages): (usize, usize),
    targets: &'t Tensor,
    [b, p]: &'t [Tensor; 2],
) -> contrastive::Shape<'t> {
    let (queries, passages) = (Count::on_device(queries, b), Count::on_device(passages, p));
    contrastive::Shape { queries, passages, width, temperature: 0.05, targets, hidden: None }
}

/// The contrastive loss of normalised embeddings at temperature 0.05; backward is counted as twice the forward.
fn in_batch(bench: &Bench<'_>, queries: usize, passages: usize) -> Result<()> {
    let (device, c) = (bench.setup.device, bench.setup.dims.hidden);
    let (name, size) = (format!("contrastive {queries} x {passages}"), 1.0 / (c as f32).sqrt());
    let group = passages / queries;
    let operands = || {
        let targets: Vec<u32> = (0..queries).map(|query| (query * group) as u32).collect();
        let counts = [queries, passages].map(|n| device.tensor(&[n as u32]));
        let (q, p) = (bench.stored(queries * c, size), bench.stored(passages * c, size));
        (device.tensor(&targets), counts, q, p, bench.wide_room(queries), bench.wide_room(3 * queries))
    };
    let flops = 2 * queries * passages * c;
    let once = bench.bytes((queries + passages) * c);
    bench.case(&format!("{name} forward"), Work { flops, bytes: once }, || {
        let (targets, counts, q, p, loss, lse) = operands();
        let correct = device.tensor(&vec![0u32; queries]);
        Box::new(move || {
            let shape = shape_of(c, (queries, passages), &targets, &counts);
            let (q, p, loss, lse, correct) = (&q, &p, &loss, &lse, &correct);
            contrastive::forward(device, &contrastive::Forward { shape, q, p, loss, lse, correct });
        })
    })?;
    bench.case(&format!("{name} backward"), Work { flops: 2 * flops, bytes: 2 * once }, || {
        let (targets, counts, q, p, loss, lse) = operands();
        let (shape, correct) =
            (shape_of(c, (queries, passages), &targets, &counts), device.tensor(&vec![0u32; queries]));
        let forward = contrastive::Forward { shape, q: &q, p: &p, loss: &loss, lse: &lse, correct: &correct };
        contrastive::forward(device, &forward);
        let (dq, dp) = (bench.room(queries * c), bench.room(passages * c));
        let scale = device.tensor(&[1.0 / queries as f32]);
        Box::new(move || {
            let shape = shape_of(c, (queries, passages), &targets, &counts);
            let scale = Scale { value: 1.0 / queries as f64, on_device: Some(&scale) };
            let (q, p, lse, dq, dp) = (&q, &p, &lse, &dq, &dp);
            contrastive::backward(device, &contrastive::Backward { shape, scale, q, p, lse, dq, dp });
        })
    })
}

/// Exact search from the start, in f32, or in f16 where other kernels have bf16: with every block of rows that follows, candidates become
/// fewer.
fn search(bench: &Bench<'_>, queries: usize, rows: usize, k: usize) -> Result<()> {
    let (device, width) = (bench.setup.device, bench.setup.dims.hidden);
    let storage = if bench.setup.storage == DType::BF16 { DType::F16 } else { DType::F32 };
    let shape = topk::Shape { queries, width, k };
    TopK::new(device, shape)?;
    let work =
        Work { flops: 2 * queries * rows * width, bytes: bench.bytes((queries + rows) * width) + 16 * queries * k };
    let name = format!("top {k} of {rows} for {queries} in {}", if storage == DType::F16 { "f16" } else { "f32" });
    bench.case(&name, work, || {
        let [q, x] = [queries, rows].map(|n| bench.random(storage, n * width));
        // Refused above, if at all.
        let run = TopK::new(device, shape).ok().map(RefCell::new);
        Box::new(move || {
            if let Some(mut search) = run.as_ref().map(RefCell::borrow_mut) {
                search.start(&q, queries);
                search.add(&x, rows, 0);
            }
        })
    })
}
