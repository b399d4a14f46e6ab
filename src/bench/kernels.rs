//! Speed of the kernels, one family at a time through the ops.
//!
//! Shapes are those of a BERT-base step ([`super::workload`]). Each case runs on several sets of operands in turn, which together
//! exceed a GPU's second-level cache, as recorded work between two events. Rates stand beside a product and a copy of the same run.
//! Bytes are the least that must move, every operand of a kernel once; FLOP are those of the definition, whatever a kernel computes twice.
//! Where a step has the same kernels both are by the formulas of [`super::work`].

mod arena;
mod attention;
mod products;
mod rows;

use std::cell::Cell;

use serde_json::json;

use super::Report;
use super::ceiling::{Ceiling, Random, milliseconds};
use super::work;
use super::workload::{self, Model, Workload};
use crate::device::gpu::Gpu;
use crate::device::{DType, Device, Tensor};
use crate::error::{Error, Result};
use crate::graph::inputs::Inputs;
use crate::graph::{Dims, check_gpu};
use crate::ops::SiteDropout;
use crate::rng::Dropout;
use crate::train::step::Objective;
use crate::train::target::Target;

/// What to time, and how often.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Whose shapes.
    pub model: Model,
    /// Only cases whose name contains this.
    pub only: String,
    /// Times each case is measured, at least 1.
    pub repeats: usize,
    /// Sets of operands of each case, used in turn, at least 1.
    pub copies: usize,
    /// MiB of logits that exist at a time.
    pub logits_mib: Vec<usize>,
}

/// What a case must do at least; 0: not worth a rate.
#[derive(Clone, Copy, Default)]
struct Work {
    flops: usize,
    bytes: usize,
}

/// A batch on the device.
struct Batch {
    name: &'static str,
    inputs: Inputs,
    /// T.
    tokens: usize,
    /// S.
    sequences: usize,
    /// Longest sequence.
    length: usize,
    /// Σ L² over the sequences.
    squares: usize,
}

impl Batch {
    fn new(device: Device, workload: Workload, model: &Model) -> Result<Batch> {
        let config = model.config();
        let (batches, capacity) = workload::batches(workload, model, Objective::RetroMae, 1)?;
        let mut inputs = Inputs::new(device, capacity, config.vocab_size, config.type_vocab_size, true);
        batches.iter().for_each(|batch| {
            inputs.set(batch);
        });
        let squares = workload.lengths(model)?.concat().iter().map(|n| n * n).sum();
        let (tokens, sequences, length) = (capacity.tokens, capacity.sequences, capacity.length);
        Ok(Batch { name: workload.name(), inputs, tokens, sequences, length, squares })
    }
}

/// Where and on what sizes kernels run.
#[derive(Clone, Copy)]
struct Setup {
    device: Device,
    storage: DType,
    dims: Dims,
    /// Used entries of the vocabulary.
    words: usize,
    dropout: SiteDropout,
}

/// What all cases share.
struct Bench<'a> {
    setup: Setup,
    full: &'a Batch,
    ragged: &'a Batch,
    random: &'a Random,
    gpu: &'static Gpu,
    /// Sets of operands.
    copies: usize,
    args: &'a Settings,
    ceiling: Ceiling,
    report: &'a Report<'a>,
    /// Cases so far.
    cases: Cell<usize>,
    precision: &'static str,
}

impl<'a> Bench<'a> {
    /// A tensor of the storage type with values of this size.
    fn stored(&self, len: usize, scale: f32) -> Tensor {
        self.random.tensor(self.setup.device, self.setup.storage, len, scale)
    }

    /// A tensor of this type with standard normal values.
    fn random(&self, dtype: DType, len: usize) -> Tensor {
        self.random.tensor(self.setup.device, dtype, len, 1.0)
    }

    /// A tensor of the storage type for results.
    fn room(&self, len: usize) -> Tensor {
        self.setup.device.zeros(self.setup.storage, len)
    }

    /// An f32 tensor for results.
    fn wide_room(&self, len: usize) -> Tensor {
        self.setup.device.zeros(DType::F32, len)
    }

    /// An f32 tensor with values of this size.
    fn wide(&self, len: usize, scale: f32) -> Tensor {
        self.random.tensor(self.setup.device, DType::F32, len, scale)
    }

    /// The work of ops that a step has, too, laid out for sequences of up to `longest` tokens.
    fn work(&self, longest: usize, add: impl FnOnce(&mut work::List)) -> Work {
        let all = work::of_ops((self.setup.device, self.setup.storage), self.setup.dims, longest, add);
        Work { flops: all.flop() as usize, bytes: all.bytes() as usize }
    }

    /// Bytes of `elements` of the storage type.
    fn bytes(&self, elements: usize) -> usize {
        elements * self.setup.storage.size()
    }

    /// Bytes of logits to try, in MiB.
    fn logits_mib(&self) -> &[usize] {
        &self.args.logits_mib
    }

    /// Whether these sizes are for trying the code only.
    fn tiny(&self) -> bool {
        self.setup.words < 10_000
    }

    /// Times a case; `make` gives it a set of operands of its own.
    fn case(&self, name: &str, work: Work, make: impl Fn() -> Box<dyn Fn() + 'a>) -> Result<()> {
        if !name.contains(&self.args.only) {
            return Ok(());
        }
        let sets: Vec<_> = (0..self.copies).map(|_| make()).collect();
        let all = milliseconds(self.gpu, self.args.repeats, || sets.iter().for_each(|run| run()))?;
        let ms = all / self.copies as f64;
        let (tflops, gb) = (work.flops as f64 / ms / 1e9, work.bytes as f64 / ms / 1e6);
        let of = |rate: f64, ceiling: f64| [format!("{rate:.1}"), format!("{:.0} %", 100.0 * rate / ceiling)];
        let none = || [String::new(), String::new()];
        let product = if work.flops > 0 { of(tflops, self.ceiling.tflops) } else { none() };
        let copy = if work.bytes > 0 { of(gb, self.ceiling.gb_per_s) } else { none() };
        self.cases.set(self.cases.get() + 1);
        let model = self.args.model.name();
        let line = json!({
            "case": format!("kernel {name}, {model} {}", self.precision), "kernel": name, "model": model, "ms": ms,
            "tflops": (work.flops > 0).then_some(tflops), "gb_per_s": (work.bytes > 0).then_some(gb),
            "repeats": self.args.repeats, "copies": self.copies, "matmul_ceiling_tflops": self.ceiling.tflops,
            "copy_ceiling_gb_per_s": self.ceiling.gb_per_s,
        });
        self.report.case(&[&[name.to_string(), format!("{ms:.4}")][..], &product, &copy].concat(), line)
    }
}

/// Times the kernels.
///
/// # Errors
/// A device that is no GPU, sizes that the kernels do not have, a name that no case has, a failure of the GPU, or a failed write.
pub fn run(args: &Settings, target: &Target, report: &Report<'_>) -> Result<()> {
    let Device::Gpu(gpu) = target.device else {
        return Err(Error::usage("the kernels need a GPU, and this is the CPU")
            .remedy("use --device cuda where there is one (`doctor` tells), or --device emulator to try the command"));
    };
    let (device, model, config, random) = (target.device, &args.model, args.model.config(), Random::new());
    check_gpu(config)?;
    let full = Batch::new(device, Workload::Full512, model)?;
    let ragged = Batch::new(device, Workload::Passages, model)?;
    let ceiling = Ceiling::measure(device, target.storage, &random, model.tiny())?;
    let dropout = Dropout::new(7, 1, config.hidden_dropout_prob);
    gpu.set_dropout_key(dropout.key);
    report.say(&format!("{} shapes on {}, {}", model.name(), target.words, target.precision()))?;
    report.say(&format!("product {:.1} TFLOP/s, copy {:.0} GB/s\n", ceiling.tflops, ceiling.gb_per_s))?;
    report.head(&["kernels", "ms", "TFLOP/s", "of product", "GB/s", "of copy"])?;
    let bench = Bench {
        setup: Setup {
            device,
            storage: target.storage,
            dims: Dims::new(config),
            words: config.vocab_size,
            dropout: SiteDropout { mask: dropout, site: 3 },
        },
        full: &full,
        ragged: &ragged,
        random: &random,
        gpu,
        copies: args.copies,
        args,
        ceiling,
        report,
        cases: Cell::new(0),
        precision: target.precision(),
    };
    attention::cases(&bench)?;
    products::cases(&bench)?;
    rows::cases(&bench)?;
    arena::cases(&bench)?;
    if bench.cases.get() == 0 {
        let cause = format!("no kernel's name contains {:?}", args.only);
        return Err(Error::usage(cause).remedy("run without --only to see the names"));
    }
    Ok(())
}
