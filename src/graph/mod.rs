//! The transformer graph: explicit forward and backward, no tape.
//!
//! Each part (`encoder`, `mlm`, `retromae`, `dupmae`) owns the numbers of its parameters in the [`params::Params`] table and of its
//! buffers in the activation plan; a forward stands directly above its backward, which is the forward's list reversed.
//!
//! Glossary: B sequences of a batch (also S), T tokens, R rows needed of the last layer, M labelled rows, C hidden size, H heads,
//! D head size, I feed-forward width, V vocabulary.

pub mod activations;
pub mod biencoder;
pub mod block;
pub mod cross_encoder;
pub mod dupmae;
pub mod encoder;
pub mod extent;
pub mod head_chunks;
pub mod inference;
pub mod inputs;
pub mod lexical;
pub mod mlm;
pub mod params;
pub mod records;
pub mod retromae;
pub mod stages;

use crate::device::{Device, Tensor};
use crate::error::{Error, Result};
use crate::model::config::{Activation, BertConfig};
use crate::ops::SiteDropout;
use crate::ops::activation::Function;
use crate::rng::Dropout;
use activations::{Activations, Slot};
use params::{Entries, Id, Params};

/// Largest batch that buffers are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// T.
    pub tokens: usize,
    /// S.
    pub sequences: usize,
    /// Longest sequence.
    pub length: usize,
    /// M: rows with an encoder label.
    pub encoder_labels: usize,
}

/// Sizes of a model.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// C.
    pub hidden: usize,
    /// H.
    pub heads: usize,
    /// I.
    pub intermediate: usize,
    /// V, rounded up to a multiple of 64; the bias of the padding is −∞.
    pub vocabulary: usize,
    /// ε of LayerNorm.
    pub eps: f32,
    /// Feed-forward activation.
    pub activation: Function,
}

impl Dims {
    /// The sizes of `config`.
    pub fn new(config: &BertConfig) -> Self {
        Dims {
            hidden: config.hidden_size,
            heads: config.num_attention_heads,
            intermediate: config.intermediate_size,
            vocabulary: config.vocab_size.next_multiple_of(64),
            eps: config.layer_norm_eps,
            activation: match config.hidden_act {
                Activation::Gelu => Function::Gelu,
                Activation::GeluTanh => Function::GeluTanh,
                Activation::QuickGelu => Function::QuickGelu,
                Activation::Relu => Function::Relu,
                Activation::Silu => Function::Silu,
            },
        }
    }

    /// D.
    pub fn head_size(&self) -> usize {
        self.hidden / self.heads
    }
}

/// Refuses a model whose sizes the GPU's kernels do not have.
pub fn check_gpu(config: &BertConfig) -> Result<()> {
    let dims = Dims::new(config);
    let refuse = |what: &str, is: usize, must: &str| {
        Err(Error::refused(format!("{what} is {is}; the GPU's kernels need {must}"))
            .remedy("use --device cpu, or a model of another size"))
    };
    match dims.head_size() {
        32 | 64 | 128 => {}
        other => return refuse("the size of an attention head", other, "32, 64 or 128"),
    }
    if dims.hidden > 4096 {
        return refuse("hidden_size", dims.hidden, "at most 4096");
    }
    if !dims.intermediate.is_multiple_of(8) {
        return refuse("intermediate_size", dims.intermediate, "a multiple of 8");
    }
    Ok(())
}

/// The dropout masks of one step.
#[derive(Clone, Copy, Debug)]
pub struct StepDropout {
    /// Of hidden states.
    pub hidden: Dropout,
    /// Of attention probabilities.
    pub attention: Dropout,
}

impl StepDropout {
    /// None: evaluation.
    pub const OFF: StepDropout = StepDropout { hidden: Dropout::OFF, attention: Dropout::OFF };

    /// Hidden-state dropout at `site`.
    pub fn hidden(&self, site: u32) -> SiteDropout {
        SiteDropout { mask: self.hidden, site }
    }

    /// Attention dropout at `site`.
    pub fn attention(&self, site: u32) -> SiteDropout {
        SiteDropout { mask: self.attention, site }
    }

    /// What recorded work holds of the masks: how much is dropped of hidden states, and of attention probabilities.
    pub fn thresholds(&self) -> [u32; 2] {
        [self.hidden.threshold, self.attention.threshold]
    }

    /// Uploads what recorded work reads of them: the key, which both share.
    pub fn announce(&self, device: Device) {
        if let Device::Gpu(gpu) = device {
            gpu.set_dropout_key(self.hidden.key);
        }
    }
}

/// What every part of the graph works with during one pass.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    /// Where.
    pub device: Device,
    /// Weights and gradients.
    pub params: &'a Params,
    /// Buffers.
    pub buffers: &'a Activations,
    /// Masks of the step.
    pub dropout: StepDropout,
    /// Who wants to know, in a backward, whose gradients it adds nothing more to.
    pub complete: Option<&'a dyn Fn(&Entries)>,
}

impl Pass<'_> {
    /// The backward adds nothing more to the gradients of these entries.
    pub fn complete(&self, entries: &Entries) {
        if let Some(told) = self.complete {
            told(entries);
        }
    }

    /// Weight tensor, in the storage type.
    pub fn w(&self, id: Id) -> &Tensor {
        self.params.weight(id)
    }

    /// Weight tensor as the optimizer has it: γ, β, and the bias of the LM head.
    pub fn master(&self, id: Id) -> &Tensor {
        self.params.master(id)
    }

    /// Gradient tensor.
    pub fn g(&self, id: Id) -> &Tensor {
        self.params.gradient(id)
    }

    /// Buffer.
    pub fn b(&self, slot: Slot) -> &Tensor {
        self.buffers.tensor(slot)
    }
}
