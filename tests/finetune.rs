//! Losses and gradients of fine-tuning against the golden cases, on the CPU and on a GPU: the emulated one, or with
//! `RETROMAE_DEVICE=cuda` a real one. And what must hold on any batch: chunks change nothing, texts keep to themselves.

#[path = "finetune/exported.rs"]
mod exported;
#[path = "finetune/golden.rs"]
mod golden;
#[path = "finetune/invariants.rs"]
mod invariants;
#[path = "finetune/joined.rs"]
mod joined;
