//! Where a command computes, and in which arithmetic: `--device` and `--precision` resolved.

use crate::device::{DType, Device};
use crate::error::{Error, Result};
use crate::train::settings::Precision;

/// A device and the arithmetic on it.
#[derive(Clone, Debug)]
pub struct Target {
    /// Where.
    pub device: Device,
    /// What hidden states and the weights of products are stored as.
    pub storage: DType,
    /// The device in words.
    pub words: String,
    /// A line worth telling: why `auto` leaves a GPU aside.
    pub note: Option<String>,
}

impl Target {
    /// Opens the device `auto`, `cpu`, `cuda` or `emulator`.
    ///
    /// # Errors
    /// No such device here, or not in this precision.
    pub fn open(device: &str, precision: Precision) -> Result<Target> {
        let (device, note) = Device::open(device)?;
        let storage = match (device, precision) {
            (Device::Cpu, Precision::Bf16) => {
                return Err(Error::usage("--precision bf16: the CPU computes in fp32")
                    .remedy("leave --precision out or use fp32"));
            }
            (Device::Gpu(_), Precision::Auto | Precision::Bf16) => DType::BF16,
            _ => DType::F32,
        };
        let words = match device {
            Device::Cpu => format!("CPU with {} threads", rayon::current_num_threads()),
            Device::Gpu(gpu) => format!("{} ({})", gpu.facts().name, gpu.facts().software),
        };
        Ok(Target { device, storage, words, note })
    }

    /// The arithmetic, as settings name it.
    pub fn precision(&self) -> &'static str {
        if self.storage == DType::BF16 { "bf16" } else { "fp32" }
    }
}
