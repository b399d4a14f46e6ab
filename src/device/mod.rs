//! Devices: where buffers live and kernels run. The driver is the only thing the emulator replaces.

pub mod emulator;
pub mod kernels;
pub mod launch;
