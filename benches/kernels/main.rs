//! Speed of the kernels, one family at a time through the ops: `cargo bench --bench kernels -- [--device cuda] [--only attention]`.
//!
//! Shapes are those of a BERT-base step (`shared/workload.rs`). Each case runs on several sets of operands in turn, which together
//! exceed a GPU's second-level cache, as recorded work between two events. Rates stand beside a product and a copy of the same run.
//! Bytes are the least that must move, every operand once; FLOP are those of the definition, whatever a kernel computes twice.

mod arena;
mod attention;
#[path = "../shared/ceiling.rs"]
mod ceiling;
mod products;
mod rows;
#[path = "../shared/workload.rs"]
mod workload;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use serde_json::json;

use ceiling::{Ceiling, Random, milliseconds};
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::{DType, Device, Tensor};
use retromae_engine::error::IoContext;
use retromae_engine::graph::Dims;
use retromae_engine::graph::inputs::Inputs;
use retromae_engine::graph::mlm::LOGITS_BYTES_GPU;
use retromae_engine::ops::SiteDropout;
use retromae_engine::rng::Dropout;
use retromae_engine::train::settings::Precision;
use retromae_engine::train::target::Target;
use retromae_engine::{Error, Result};
use workload::{Model, Workload};

/// Time the kernels
#[derive(Parser)]
struct Arguments {
    /// Device: cuda or emulator
    #[arg(long, default_value = "auto")]
    device: String,
    /// Storage type
    #[arg(long, value_enum, default_value = "auto")]
    precision: Precision,
    /// Shapes [default: base; mini in the emulator]
    #[arg(long, value_enum)]
    model: Option<Model>,
    /// Only cases whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Times each case is measured
    #[arg(long, default_value_t = 15)]
    repeats: usize,
    /// Sets of operands of each case, used in turn [default: 4, together larger than the cache; 1 in the emulator]
    #[arg(long)]
    copies: Option<usize>,
    /// MiB of logits that exist at a time [default: as in training]
    #[arg(long, value_delimiter = ',', default_values_t = [LOGITS_BYTES_GPU >> 20])]
    logits_mib: Vec<usize>,
    /// Append the results to this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Passed by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// What a case must do at least; 0: not worth a rate.
#[derive(Clone, Copy, Default)]
pub struct Work {
    pub flops: usize,
    pub bytes: usize,
}

/// A batch on the device.
pub struct Batch {
    pub name: &'static str,
    pub inputs: Inputs,
    /// T.
    pub tokens: usize,
    /// S.
    pub sequences: usize,
    /// Longest sequence.
    pub length: usize,
    /// Σ L² over the sequences.
    pub squares: usize,
}

impl Batch {
    fn new(device: Device, workload: Workload, model: Model) -> Result<Batch> {
        let config = model.config()?;
        let (batches, capacity) = workload::batches(workload, model, 1)?;
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
pub struct Setup {
    pub device: Device,
    pub storage: DType,
    pub dims: Dims,
    /// Used entries of the vocabulary.
    pub words: usize,
    pub dropout: SiteDropout,
}

/// What all cases share.
pub struct Bench<'a> {
    pub setup: Setup,
    pub full: &'a Batch,
    pub ragged: &'a Batch,
    random: &'a Random,
    gpu: &'static Gpu,
    /// Sets of operands.
    copies: usize,
    args: &'a Arguments,
    ceiling: Ceiling,
    facts: serde_json::Value,
}

impl<'a> Bench<'a> {
    /// A tensor of the storage type with values of this size.
    pub fn stored(&self, len: usize, scale: f32) -> Tensor {
        self.random.tensor(self.setup.device, self.setup.storage, len, scale)
    }

    /// A tensor of this type with standard normal values.
    pub fn random(&self, dtype: DType, len: usize) -> Tensor {
        self.random.tensor(self.setup.device, dtype, len, 1.0)
    }

    /// A tensor of the storage type for results.
    pub fn room(&self, len: usize) -> Tensor {
        self.setup.device.zeros(self.setup.storage, len)
    }

    /// An f32 tensor for results.
    pub fn wide_room(&self, len: usize) -> Tensor {
        self.setup.device.zeros(DType::F32, len)
    }

    /// An f32 tensor with values of this size.
    pub fn wide(&self, len: usize, scale: f32) -> Tensor {
        self.random.tensor(self.setup.device, DType::F32, len, scale)
    }

    /// Bytes of `elements` of the storage type.
    pub fn bytes(&self, elements: usize) -> usize {
        elements * self.setup.storage.size()
    }

    /// Bytes of logits to try, in MiB.
    pub fn logits_mib(&self) -> &[usize] {
        &self.args.logits_mib
    }

    /// Whether these sizes are for trying the code only.
    pub fn tiny(&self) -> bool {
        self.setup.words < 10_000
    }

    /// Times a case; `make` gives it a set of operands of its own.
    pub fn case(&self, name: &str, work: Work, make: impl Fn() -> Box<dyn Fn() + 'a>) -> Result<()> {
        if !name.contains(&self.args.only) {
            return Ok(());
        }
        let sets: Vec<_> = (0..self.copies).map(|_| make()).collect();
        let all = milliseconds(self.gpu, self.args.repeats, || sets.iter().for_each(|run| run()))?;
        let ms = all / self.copies as f64;
        let (tflops, gb) = (work.flops as f64 / ms / 1e9, work.bytes as f64 / ms / 1e6);
        let of = |rate: f64, ceiling: f64| format!("{rate:.1} | {:.0} %", 100.0 * rate / ceiling);
        let rates = [
            if work.flops > 0 { of(tflops, self.ceiling.tflops) } else { " | ".into() },
            if work.bytes > 0 { of(gb, self.ceiling.gb_per_s) } else { " | ".into() },
        ];
        println!("| {name} | {ms:.4} | {} |", rates.join(" | "));
        let Some(path) = &self.args.json else { return Ok(()) };
        let mut line = self.facts.clone();
        line["kernel"] = json!(name);
        line["ms"] = json!(ms);
        line["tflops"] = json!((work.flops > 0).then_some(tflops));
        line["gb_per_s"] = json!((work.bytes > 0).then_some(gb));
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).at(path, "cannot open")?;
        writeln!(file, "{line}").at(path, "cannot write")
    }
}

fn run(args: &Arguments) -> Result<()> {
    let target = Target::open(&args.device, args.precision)?;
    let Device::Gpu(gpu) = target.device else {
        return Err(Error::usage("the kernels need a GPU").remedy("use --device cuda or --device emulator"));
    };
    let emulated = args.device == "emulator";
    let model = args.model.unwrap_or(if emulated { Model::Mini } else { Model::Base });
    let (device, config, random) = (target.device, model.config()?, Random::new());
    let full = Batch::new(device, Workload::Full512, model)?;
    let ragged = Batch::new(device, Workload::Passages, model)?;
    let ceiling = Ceiling::measure(gpu, &random, if model == Model::Mini { 64 } else { 8192 })?;
    let dropout = Dropout::new(7, 1, config.hidden_dropout_prob);
    gpu.set_dropout_key(dropout.key);
    println!("{} shapes on {}, {}", model.name(), target.words, target.precision());
    println!("product {:.1} TFLOP/s, copy {:.0} GB/s\n", ceiling.tflops, ceiling.gb_per_s);
    println!("| kernels | ms | TFLOP/s | of product | GB/s | of copy |\n| --- | ---: | ---: | ---: | ---: | ---: |");
    let bench = Bench {
        setup: Setup {
            device,
            storage: target.storage,
            dims: Dims::new(&config),
            words: config.vocab_size,
            dropout: SiteDropout { mask: dropout, site: 3 },
        },
        full: &full,
        ragged: &ragged,
        random: &random,
        gpu,
        copies: args.copies.unwrap_or(if emulated { 1 } else { 4 }).max(1),
        args,
        ceiling,
        facts: json!({
            "model": model.name(), "precision": target.precision(), "device": target.words, "repeats": args.repeats,
            "matmul_ceiling_tflops": ceiling.tflops, "copy_ceiling_gb_per_s": ceiling.gb_per_s,
            "engine": env!("CARGO_PKG_VERSION"), "commit": std::env::var("RETROMAE_COMMIT").ok(),
        }),
    };
    attention::cases(&bench)?;
    products::cases(&bench)?;
    rows::cases(&bench)?;
    arena::cases(&bench)
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code() as u8)
        }
    }
}
