//! Speed of a training step: `cargo bench --bench step -- [--device cuda] [--model base] [--workload full512]`.
//!
//! Models and batches are those of the PyTorch baselines (`shared/workload.rs`): RetroMAE, and for `finetune` one encoder of queries and
//! passages, [CLS], dot product, temperature 1, every passage a candidate. Dropout 0.1, clipping and AdamW are inside the time.
//! Batches are ready in the host's memory beforehand; their upload is inside the time, and so is the wait for the losses, by which
//! every step ends. One JSON line a case, under the baselines' names, then a table.

#[path = "shared/ceiling.rs"]
mod ceiling;
#[path = "shared/pairs.rs"]
mod pairs;
#[path = "shared/workload.rs"]
mod workload;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use serde_json::{Value, json};

use ceiling::{Ceiling, Random, median};
use retromae_engine::device::Device;
use retromae_engine::error::IoContext;
use retromae_engine::graph::biencoder::Shape;
use retromae_engine::ops::optimizer::AdamW;
use retromae_engine::ops::pool::Pooling;
use retromae_engine::train::biencoder::{BiEncoder, Options};
use retromae_engine::train::flops;
use retromae_engine::train::settings::Precision;
use retromae_engine::train::step::{Footprint, Objective, Pretrainer};
use retromae_engine::train::target::Target;
use retromae_engine::train::updates::Trainable;
use retromae_engine::{Error, Result};
use workload::{Model, Workload};

/// Time training steps
#[derive(Parser)]
struct Arguments {
    /// Device: auto, cpu, cuda or emulator
    #[arg(long, default_value = "auto")]
    device: String,
    /// Arithmetic
    #[arg(long, value_enum, default_value = "auto")]
    precision: Precision,
    /// Size of the model [default: base on a GPU, minilm on the CPU, mini in the emulator]
    #[arg(long, value_enum)]
    model: Option<Model>,
    /// Texts; several may be given [default: all]
    #[arg(long, value_enum)]
    workload: Vec<Workload>,
    /// Steps to time
    #[arg(long, default_value_t = 20)]
    steps: u64,
    /// Steps before them. A GPU records the work of a batch at its second step and replays it from then on
    #[arg(long, default_value_t = 10)]
    warmup: u64,
    /// Distinct batches, used in turn
    #[arg(long, default_value_t = 4)]
    batches: u64,
    /// Append the results to this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Passed by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is timed.
struct Case<T: Trainable> {
    model: Model,
    workload: Workload,
    /// When the batches were begun.
    began: Instant,
    trainer: T,
    batches: Vec<T::Batch>,
    /// Seconds that they took.
    batches_s: f64,
    footprint: Footprint,
    /// Floating-point operations of a step.
    work: f64,
    /// Numbers of rows that the kind of step has, by their names in results.
    rows: [(&'static str, usize); 2],
}

impl Case<Pretrainer> {
    fn new(target: &Target, model: Model, workload: Workload, count: u64) -> Result<Self> {
        let began = Instant::now();
        let (config, objective) = (model.config()?, Objective::RetroMae);
        let (batches, capacity) = workload::batches(workload, model, count)?;
        let batches_s = began.elapsed().as_secs_f64();
        let masked = batches[0].encoder_label_ids.len();
        let labelled = batches[0].decoder.as_ref().map_or(0, |d| d.label_ids.len());
        let [_, lengths] = workload.lengths(model)?;
        Ok(Case {
            model,
            workload,
            began,
            trainer: Pretrainer::new(target.device, &config, objective, capacity, target.storage)?,
            batches,
            batches_s,
            footprint: Pretrainer::footprint(target.device, &config, objective, capacity, target.storage),
            work: flops::pretraining(&config, objective, lengths, masked, labelled) as f64,
            rows: [("masked_rows", masked), ("labelled_rows", labelled)],
        })
    }
}

impl Case<BiEncoder> {
    fn new(target: &Target, model: Model, count: u64) -> Result<Self> {
        let began = Instant::now();
        let (config, workload) = (model.config()?, Workload::Finetune);
        let (batches, room) = pairs::batches(model, count)?;
        let batches_s = began.elapsed().as_secs_f64();
        let shape = Shape { pooling: Pooling::Cls, projection: None, normalize: false };
        let options = Options { shape, lexical: None, untied: false, temperature: 1.0, distillation: None };
        let [queries, passages] = workload.lengths(model)?;
        Ok(Case {
            model,
            workload,
            began,
            trainer: BiEncoder::new(target.device, &config, options, room, target.storage)?,
            batches,
            batches_s,
            footprint: BiEncoder::footprint((target.device, target.storage), &config, &options, room),
            work: flops::fine_tuning(&config, [&queries, &passages]) as f64,
            rows: [("queries", queries.len()), ("passages", passages.len())],
        })
    }
}

/// One case, timed.
fn time<T: Trainable>(args: &Arguments, target: &Target, ceiling: Option<Ceiling>, mut case: Case<T>) -> Result<Value> {
    let config = case.trainer.config().clone();
    case.trainer.params().load(1, config.initializer_range, |_, _, _| Ok(false))?;
    let (sequences, tokens) = T::size(&case.batches[0]);
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    let mut step = |t: u64| {
        let batch = &case.batches[(t % case.batches.len() as u64) as usize];
        let start = Instant::now();
        let out = case.trainer.step(std::slice::from_ref(batch), &AdamW::default(), 1e-5, t + 1, 7)?;
        let milliseconds = start.elapsed().as_secs_f64() * 1e3;
        let loss: f64 = case.trainer.parts(&out.losses).iter().map(|part| part.weight * part.loss()).sum();
        if !loss.is_finite() || out.skipped {
            return Err(Error::device(format!("step {t} has no finite loss and gradient")).remedy("run the tests"));
        }
        losses.push(loss);
        norms.push(out.grad_norm);
        Ok(milliseconds)
    };
    let first = step(0)?;
    for t in 1..args.warmup.max(1) {
        step(t)?;
    }
    let setup = case.began.elapsed().as_secs_f64();
    let steps = args.warmup.max(1)..args.warmup.max(1) + args.steps.max(1);
    let mut times = steps.map(&mut step).collect::<Result<Vec<f64>>>()?;
    let ms = median(&mut times);
    let decile = |part: f64| times[((times.len() as f64 * part) as usize).min(times.len() - 1)];
    let tflops = case.work / ms / 1e9;
    let [(a, of_a), (b, of_b)] = case.rows;
    Ok(json!({
        "mode": "engine", "workload": case.workload.name(), "model": case.model.name(), "precision": target.precision(),
        "sequences": sequences, "real_tokens": tokens, (a): of_a, (b): of_b,
        "ms": ms, "ms_p10": decile(0.1), "ms_p90": decile(0.9), "tokens_per_s": tokens as f64 / ms * 1e3,
        "model_tflop": case.work / 1e12, "tflops": tflops, "matmul_ceiling_tflops": ceiling.map(|c| c.tflops),
        "copy_ceiling_gb_per_s": ceiling.map(|c| c.gb_per_s), "mfu": ceiling.map(|c| tflops / c.tflops),
        "planned_gib": (case.footprint.parameter_bytes + case.footprint.activation_bytes) as f64 / f64::from(1 << 30),
        "setup_s": setup, "batches_s": case.batches_s, "first_step_ms": first, "first_loss": losses[0],
        "last_loss": losses[losses.len() - 1], "last_grad_norm": norms[norms.len() - 1], "dropout": config.hidden_dropout_prob,
        "steps": args.steps, "warmup": args.warmup, "batches": case.batches.len(), "device": target.words,
        "threads": rayon::current_num_threads(), "engine": env!("CARGO_PKG_VERSION"),
        "commit": std::env::var("RETROMAE_COMMIT").ok(),
    }))
}

/// Prints the line, and appends it to the file of `--json`.
fn report(args: &Arguments, line: &Value) -> Result<()> {
    println!("{line}");
    let Some(path) = &args.json else { return Ok(()) };
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).at(path, "cannot open")?;
    writeln!(file, "{line}").at(path, "cannot write")
}

fn run(args: &Arguments) -> Result<()> {
    let target = Target::open(&args.device, args.precision)?;
    let standard = match target.device {
        Device::Cpu => Model::Minilm,
        Device::Gpu(_) if args.device == "emulator" => Model::Mini,
        Device::Gpu(_) => Model::Base,
    };
    let model = args.model.unwrap_or(standard);
    let ceiling = match target.device {
        Device::Cpu => None,
        Device::Gpu(gpu) => Some(Ceiling::measure(gpu, &Random::new(), if model == Model::Mini { 64 } else { 8192 })?),
    };
    let wanted = if args.workload.is_empty() { Workload::value_variants() } else { &args.workload[..] };
    let count = args.batches.max(1);
    let mut lines = Vec::new();
    for &workload in wanted {
        let line = match workload {
            Workload::Finetune => time(args, &target, ceiling, Case::<BiEncoder>::new(&target, model, count)?)?,
            _ => time(args, &target, ceiling, Case::<Pretrainer>::new(&target, model, workload, count)?)?,
        };
        report(args, &line)?;
        lines.push(line);
    }
    println!("\n{} on {}, {}", model.name(), target.words, target.precision());
    println!(
        "| workload | median ms | p10 | p90 | tokens/s | TFLOP/s | MFU |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    );
    for line in lines {
        let number = |name: &str| line[name].as_f64().unwrap_or(f64::NAN);
        let mfu = line["mfu"].as_f64().map_or_else(String::new, |mfu| format!("{mfu:.3}"));
        println!(
            "| {} | {:.2} | {:.2} | {:.2} | {:.0} | {:.2} | {mfu} |",
            line["workload"].as_str().unwrap_or_default(),
            number("ms"),
            number("ms_p10"),
            number("ms_p90"),
            number("tokens_per_s"),
            number("tflops"),
        );
    }
    Ok(())
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
