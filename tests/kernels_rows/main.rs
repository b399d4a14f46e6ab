//! Kernels on the emulator against the CPU's ops: f32 to 1e-5, bf16 within twice the error of a plain bf16 computation, the same bits
//! in every order that a GPU may choose.

mod activation;
mod embed;
mod gather;
mod harness;
mod layernorm;
mod optimizer;
