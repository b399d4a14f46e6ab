//! A text's sentence embedding does not depend on the texts around it, to the bit.

use retromae_engine::device::{DType, Device};
use retromae_engine::graph::activations::Plan;
use retromae_engine::graph::encoder::Encoder;
use retromae_engine::graph::inputs::Inputs;
use retromae_engine::graph::params::Table;
use retromae_engine::graph::{Capacity, Pass, StepDropout};
use retromae_engine::model::config::Activation;

use super::common::{Labels, batch, config, fill};

const NO_LABELS: Labels = Labels { encoder: |_, _| false, decoder: |_, _| false };

/// The [CLS] rows of the texts of samples `first..`, in f32.
fn encode(head_size: usize, first: u64, lengths: &[usize]) -> Vec<Vec<u32>> {
    let config = config(head_size, Activation::Gelu);
    let capacity = Capacity { tokens: 800, sequences: 24, length: 40, encoder_labels: 0 };
    let (mut table, mut plan) = (Table::default(), Plan::default());
    let encoder = Encoder::new(&mut table, &mut plan, &config, capacity, capacity.sequences);
    let (params, buffers) = (table.allocate(Device::Cpu, DType::F32), plan.allocate(Device::Cpu, DType::F32));
    fill(&params);
    let mut inputs = Inputs::new(Device::Cpu, capacity, config.vocab_size, 2, true);
    inputs.set(&batch(first, lengths, NO_LABELS));
    let p = Pass { device: Device::Cpu, params: &params, buffers: &buffers, dropout: StepDropout::OFF, complete: None };
    encoder.forward(&p, &inputs.tokens, &inputs.needed);
    let rows = p.b(encoder.output()).to_vec::<f32>();
    rows.chunks(config.hidden_size).take(lengths.len()).map(|r| r.iter().map(|x| x.to_bits()).collect()).collect()
}

/// Counts the elements in which texts encoded alone differ from the same texts encoded together.
fn differing(head_size: usize, lengths: &[usize]) -> usize {
    let together = encode(head_size, 0, lengths);
    let alone = lengths.iter().enumerate().map(|(i, &n)| encode(head_size, i as u64, &[n]).remove(0));
    let differ = |(a, b): (Vec<u32>, &Vec<u32>)| a.iter().zip(b).filter(|(a, b)| a != b).count();
    alone.zip(&together).map(differ).sum()
}

#[test]
fn alone_or_among_others() {
    for head_size in [32, 64, 128] {
        assert_eq!(differing(head_size, &[1, 2, 33, 40, 7, 16]), 0, "head size {head_size}");
        // Enough rows that the product blocks and threads.
        let many: Vec<usize> = (0..24).map(|i| 12 + 5 * i % 28).collect();
        assert_eq!(differing(head_size, &many), 0, "head size {head_size}, 24 texts");
    }
}
