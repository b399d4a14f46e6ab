//! Where a command computes, and in which arithmetic: `--device` and `--precision` resolved.

use crate::device::{DType, Device, cpu};
use crate::error::Result;
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
    /// No such device here.
    pub fn open(device: &str, precision: Precision) -> Result<Target> {
        let (device, note) = Device::open(device)?;
        let storage = match (device, precision) {
            (Device::Gpu(_), Precision::Auto | Precision::Bf16) => DType::BF16,
            _ => DType::F32,
        };
        let words = match device {
            Device::Cpu => format!("CPU with {} threads", rayon::current_num_threads()),
            Device::Gpu(gpu) => format!("{} ({})", gpu.facts().name, gpu.facts().software),
        };
        // On the CPU only the operands of products are bf16.
        let bf16_products = !device.is_gpu() && precision == Precision::Bf16;
        cpu::use_bf16_products(bf16_products);
        let slow = "this processor has no AVX512-BF16: --precision bf16 rounds, and is no faster than fp32";
        let note = note.or_else(|| (bf16_products && !cpu::bf16::is_fast()).then(|| slow.to_string()));
        Ok(Target { device, storage, words, note })
    }

    /// The arithmetic, as settings name it.
    pub fn precision(&self) -> &'static str {
        if self.storage == DType::BF16 || cpu::bf16_products() { "bf16" } else { "fp32" }
    }
}
