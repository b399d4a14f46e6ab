//! Attention of the encoder and of the enhanced decoder; pairs that masks hide count.

use super::{Batch, Bench, Setup};
use crate::bench::work::Attention;
use crate::device::{Matrix, Tensor};
use crate::error::Result;
use crate::graph::inputs::DecoderInputs;
use crate::ops::attention::{self, Gradient, Shape};
use crate::ops::enhanced_decoding::{self, Queries, Visible};

/// Times all of them.
pub(super) fn cases(bench: &Bench<'_>) -> Result<()> {
    for batch in [bench.full, bench.ragged] {
        encoder(bench, batch)?;
        if let Some(inputs) = &batch.inputs.decoder {
            decoder(bench, batch, inputs)?;
        }
    }
    Ok(())
}

/// The encoder's operands.
struct Encoder<'a> {
    setup: Setup,
    batch: &'a Batch,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
}

impl<'a> Encoder<'a> {
    fn new(bench: &Bench<'a>, batch: &'a Batch) -> Self {
        let (setup, t, c) = (bench.setup, batch.tokens, bench.setup.dims.hidden);
        let lse = bench.wide_room(t * setup.dims.heads);
        Encoder { setup, batch, qkv: bench.stored(t * 3 * c, 1.0), out: bench.room(t * c), lse }
    }

    fn arguments(&self) -> attention::Forward<'_> {
        let (dims, tokens) = (&self.setup.dims, &self.batch.inputs.tokens);
        let of = |part: usize| Matrix::columns(&self.qkv, part * dims.hidden, 3 * dims.hidden);
        attention::Forward {
            shape: Shape {
                sequences: self.batch.sequences,
                heads: dims.heads,
                head_size: dims.head_size(),
                cu_rows: &tokens.cu_seqlens,
                cu_seqlens: &tokens.cu_seqlens,
                work: tokens.work(),
            },
            q: of(0),
            k: of(1),
            v: of(2),
            names: tokens.names(),
            dropout: self.setup.dropout,
            out: &self.out,
            lse: &self.lse,
        }
    }
}

fn encoder<'a>(bench: &Bench<'a>, batch: &'a Batch) -> Result<()> {
    let (c, t) = (bench.setup.dims.hidden, batch.tokens);
    let sizes = Attention { stem: "attention", queries: t, rows: t, keys: t, pairs: batch.squares as u64 };
    let work = bench.work(batch.length, |list| list.attention_forward(sizes));
    bench.case(&format!("attention {} forward", batch.name), work, || {
        let x = Encoder::new(bench, batch);
        Box::new(move || attention::forward(x.setup.device, &x.arguments()))
    })?;
    let work = bench.work(batch.length, |list| list.attention_backward(sizes));
    bench.case(&format!("attention {} backward", batch.name), work, || {
        let (x, dout, gradient) = (Encoder::new(bench, batch), bench.stored(t * c, 1.0), bench.room(t * 3 * c));
        attention::forward(x.setup.device, &x.arguments());
        Box::new(move || {
            let gradient = Gradient::Fused(&gradient);
            attention::backward(x.setup.device, &attention::Backward { forward: x.arguments(), dout: &dout, gradient });
        })
    })
}

/// The decoder's operands.
struct Decoder<'a> {
    setup: Setup,
    batch: &'a Batch,
    inputs: &'a DecoderInputs,
    position: Tensor,
    sentence: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
}

impl<'a> Decoder<'a> {
    fn new(bench: &Bench<'a>, batch: &'a Batch, inputs: &'a DecoderInputs) -> Self {
        let (setup, t, c) = (bench.setup, batch.tokens, bench.setup.dims.hidden);
        Decoder {
            setup,
            batch,
            inputs,
            position: bench.stored(batch.length * c, 0.7),
            sentence: bench.stored(batch.sequences * c, 0.7),
            kv: bench.stored(t * 2 * c, 1.0),
            out: bench.room(t * c),
            lse: bench.wide_room(t * setup.dims.heads),
        }
    }

    fn arguments(&self) -> enhanced_decoding::Forward<'_> {
        let (dims, inputs) = (&self.setup.dims, self.inputs);
        enhanced_decoding::Forward {
            shape: Shape {
                sequences: self.batch.sequences,
                heads: dims.heads,
                head_size: dims.head_size(),
                cu_rows: &inputs.rows.cu_rows,
                cu_seqlens: &inputs.tokens.cu_seqlens,
                work: inputs.rows.work(),
            },
            queries: Queries::Parts { position: &self.position, sentence: &self.sentence },
            k: Matrix::columns(&self.kv, 0, 2 * dims.hidden),
            v: Matrix::columns(&self.kv, dims.hidden, 2 * dims.hidden),
            visible: Visible { offsets: &inputs.offsets, words: &inputs.words, row: &inputs.row },
            names: inputs.tokens.names_of(&inputs.rows),
            dropout: self.setup.dropout,
            out: &self.out,
            lse: &self.lse,
        }
    }
}

fn decoder<'a>(bench: &Bench<'a>, batch: &'a Batch, inputs: &'a DecoderInputs) -> Result<()> {
    let (c, t) = (bench.setup.dims.hidden, batch.tokens);
    let (queries, pairs) = (batch.length + batch.sequences, batch.squares as u64);
    let sizes = Attention { stem: "enhanced_decoding", queries, rows: t, keys: t, pairs };
    let work = bench.work(batch.length, |list| list.attention_forward(sizes));
    bench.case(&format!("enhanced decoding {} forward", batch.name), work, || {
        let x = Decoder::new(bench, batch, inputs);
        Box::new(move || enhanced_decoding::forward(x.setup.device, &x.arguments()))
    })?;
    let work = bench.work(batch.length, |list| list.attention_backward(sizes));
    bench.case(&format!("enhanced decoding {} backward", batch.name), work, || {
        let x = Decoder::new(bench, batch, inputs);
        let (dout, dq, dkv) = (bench.stored(t * c, 1.0), bench.room(t * c), bench.room(t * 2 * c));
        enhanced_decoding::forward(x.setup.device, &x.arguments());
        Box::new(move || {
            let (forward, dout, dq, dkv) = (x.arguments(), &dout, &dq, &dkv);
            enhanced_decoding::backward(x.setup.device, &enhanced_decoding::Backward { forward, dout, dq, dkv });
        })
    })
}
