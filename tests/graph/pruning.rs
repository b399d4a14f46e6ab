//! The last layer for needed rows only gives the loss and the gradients of the full layer.

use retromae_engine::data::batch::PretrainBatch;
use retromae_engine::device::{DType, Device, Tensor};
use retromae_engine::graph::activations::{Activations, Plan};
use retromae_engine::graph::encoder::Encoder;
use retromae_engine::graph::inputs::Inputs;
use retromae_engine::graph::mlm::MlmHead;
use retromae_engine::graph::params::{Params, Table};
use retromae_engine::graph::retromae::EnhancedDecoder;
use retromae_engine::graph::{Dims, Pass};
use retromae_engine::model::config::Activation;
use retromae_engine::ops::gather;
use retromae_engine::train::step::Objective;

use super::common::{CAPACITY, Labels, USUAL, assert_close, batch, config, dropout, fill, gradients, small};
use retromae_engine::train::updates::Trainable;

/// The graph put together as `train::step` does it, but with every row of the encoder's last layer.
struct Full {
    params: Params,
    buffers: Activations,
    encoder: Encoder,
    head: MlmHead,
    decoder: EnhancedDecoder,
}

impl Full {
    fn new() -> Self {
        let config = config(32, Activation::Gelu);
        let (mut table, mut plan) = (Table::default(), Plan::default());
        let rows = CAPACITY.encoder_labels + CAPACITY.sequences;
        let encoder = Encoder::new(&mut table, &mut plan, &config, CAPACITY, rows);
        let head = MlmHead::new(
            (Device::Cpu, DType::F64),
            &mut table,
            &mut plan,
            &config,
            encoder.embeddings.word,
            CAPACITY.tokens,
        );
        let decoder = EnhancedDecoder::new(&mut table, &mut plan, &encoder, Dims::new(&config), CAPACITY);
        let params = table.allocate(Device::Cpu, DType::F64);
        fill(&params);
        Full { params, buffers: plan.allocate(Device::Cpu, DType::F64), encoder, head, decoder }
    }

    /// Total loss and gradients of `batch`. Every row counts as labelled, so every row is needed; the loss takes the true ones.
    fn run(&self, batch: &PretrainBatch) -> (f64, Vec<(String, Vec<f64>)>) {
        let mut all = batch.clone();
        all.encoder_label_rows = (0..batch.tokens() as u32).collect();
        all.encoder_label_ids = vec![0; batch.tokens()];
        let mut inputs = Inputs::new(Device::Cpu, CAPACITY, config(32, Activation::Gelu).vocab_size, 2, true);
        inputs.set(&all);
        assert_eq!(inputs.needed.count.count, batch.tokens());
        let decoder_inputs = inputs.decoder.as_ref().unwrap();
        let p = Pass {
            device: Device::Cpu,
            params: &self.params,
            buffers: &self.buffers,
            dropout: dropout(),
            complete: None,
        };
        let (c, g) = (64, self.encoder.gradients);
        let labels = batch.encoder_label_ids.len();
        let zeros = |rows: usize| Tensor::zeros(DType::F64, rows * c);
        let (h, dh) = (zeros(labels), zeros(labels));
        let (rows, ids) = (Tensor::from_slice(&batch.encoder_label_rows), Tensor::from_slice(&batch.encoder_label_ids));

        self.encoder.forward(&p, &inputs.tokens, &inputs.needed);
        let output = p.b(self.encoder.output());
        gather::gather(p.device, output, &rows, labels.into(), c, &h);
        let (encoder_sums, decoder_sums) = (Tensor::zeros(DType::F64, 2), Tensor::zeros(DType::F64, 2));
        let gradient = Some(((1.0 / labels as f64).into(), &dh));
        self.head.loss(&p, labels.into(), &h, &ids, &encoder_sums, gradient);
        gather::zero(p.device, p.b(g.rows), batch.tokens() * c);
        gather::scatter_add(p.device, &dh, &rows, labels.into(), c, p.b(g.rows));

        let (d, n) = (&self.decoder, decoder_inputs.rows.count.count);
        d.forward(&p, &inputs, decoder_inputs, output);
        let gradient = Some(((1.0 / n as f64).into(), p.b(d.output_gradient())));
        self.head.loss(&p, n.into(), p.b(d.output()), &decoder_inputs.labels, &decoder_sums, gradient);
        d.backward(&p, &inputs, decoder_inputs, (p.b(g.hidden), p.b(g.wide)), g.block);
        let sequences = batch.sequences().into();
        let dc = d.sentence_gradient(&p, sequences);
        gather::scatter_add(p.device, dc, &inputs.cls_rows, sequences, c, p.b(g.rows));
        self.encoder.backward(&p, &inputs.tokens, &inputs.needed);

        let flat = self.params.gradients().to_vec::<f64>();
        let parts = self.params.parts().iter();
        let all = parts.map(|p| (p.name.clone(), flat[p.offset..p.offset + p.elements()].to_vec())).collect();
        let mean = |sums: &Tensor, labels: usize| sums.to_vec::<f64>()[0] / labels as f64;
        (mean(&encoder_sums, labels) + mean(&decoder_sums, n), all)
    }
}

fn check(batch: &PretrainBatch) {
    let (full_loss, full) = Full::new().run(batch);
    let mut pruned = small(Objective::RetroMae, DType::F64);
    let loss = pruned.gradients(std::slice::from_ref(batch), dropout()).unwrap().total();
    assert!((loss / full_loss - 1.0).abs() <= 1e-12, "loss {loss} instead of {full_loss}");
    assert_close(&gradients(&pruned), &full, 1e-12);
}

#[test]
fn pruned_and_full_last_layer_agree() {
    check(&batch(4, &[5, 33, 18], USUAL));
}

#[test]
fn with_texts_that_need_only_their_first_row() {
    check(&batch(4, &[2, 33, 2, 9], USUAL));
}

#[test]
fn with_labels_on_first_and_last_rows() {
    let labels = Labels { encoder: |i, n| i == 0 || i + 1 == n, ..USUAL };
    check(&batch(4, &[4, 1, 7], labels));
}
