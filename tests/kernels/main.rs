//! Kernels, in the emulator or on a GPU, against the CPU's ops: f32 to 1e-5, bf16 within twice the error of a plain bf16 computation,
//! the same bits in every order that a GPU may choose. Then the ops that launch them.

mod activation;
mod attention;
mod bag_of_words;
mod contrastive;
mod cross_entropy;
mod device;
mod dropout;
mod embed;
mod enhanced_decoding;
mod gather;
mod group;
mod harness;
mod layernorm;
mod lexical;
mod ops;
mod optimizer;
mod pool;
mod reference;
mod ring;
mod topk;
