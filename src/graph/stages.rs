//! Names of the parts of a training step, for whoever listens ([`crate::device::trace`]): the rows of a breakdown by time.

use crate::device::trace;

/// Phase: the batch goes to the device, the results come back.
pub const INPUTS: &str = "inputs";
/// Phase: embedding to last hidden states, decoder included.
pub const FORWARD: &str = "forward";
/// Phase: losses and their gradients, forward and backward in one pass.
pub const LOSS: &str = "loss";
/// Phase: from the gradient of the last hidden states to that of all parameters.
pub const BACKWARD: &str = "backward";
/// Phase: gradients become zero, norm, AdamW.
pub const UPDATE: &str = "update";

/// Linear layers of the encoder, with their bias gradients.
pub const ENCODER_PRODUCTS: &str = "encoder GEMMs";
/// Attention of the encoder and of the decoder.
pub const ATTENTION_FORWARD: &str = "attention, forward";
/// The same.
pub const ATTENTION_BACKWARD: &str = "attention, backward";
/// Linear layers of the decoder, with their bias gradients.
pub const DECODER_PRODUCTS: &str = "decoder GEMMs";
/// LM head of the decoder's labels: transform, vocabulary, cross entropy, and their gradients.
pub const LM_HEAD: &str = "decoder LM head + loss";
/// The same of the encoder's labels; of DupMAE with its bags of words.
pub const MLM_HEAD: &str = "encoder MLM head + loss";
/// What goes over rows of hidden states outside of the heads.
pub const ROWS: &str = "LayerNorm, dropout, GELU, embedding";
/// Contrastive loss and its gradients.
pub const CONTRASTIVE: &str = "contrastive loss";
/// What goes over all parameters.
pub const OPTIMIZER: &str = "norm + AdamW";
/// Copies to and from the device, and the host's work between them.
pub const UPLOADS: &str = "uploads and results";

/// All phases, in the order of a step.
pub const PHASES: [&str; 5] = [INPUTS, FORWARD, LOSS, BACKWARD, UPDATE];

/// All stages, in the order of a table.
pub const STAGES: [&str; 10] = [
    ENCODER_PRODUCTS,
    ATTENTION_FORWARD,
    ATTENTION_BACKWARD,
    DECODER_PRODUCTS,
    LM_HEAD,
    MLM_HEAD,
    ROWS,
    CONTRASTIVE,
    OPTIMIZER,
    UPLOADS,
];

/// Does `work`, which is of this stage.
pub fn within<R>(stage: &'static str, work: impl FnOnce() -> R) -> R {
    let _stage = trace::stage(stage);
    work()
}
