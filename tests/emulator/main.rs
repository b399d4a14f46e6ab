//! The kernel emulator: one kernel through the whole path, each primitive against its definition, and planted bugs that must be found.

#[path = "../../build/emulator.rs"]
mod build_emulator;
#[path = "../kernels/device.rs"]
mod device;
#[path = "../../build/jobs.rs"]
mod jobs;

mod bugs;
mod layernorm;
mod libraries;
mod primitives;
mod support;
