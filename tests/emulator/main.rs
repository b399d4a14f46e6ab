//! The kernel emulator: one kernel through the whole path, each primitive against its definition, and planted bugs that must be found.

mod layernorm;
mod support;
