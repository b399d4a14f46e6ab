//! Speed of a pre-training step: `cargo bench --bench step -- [--device cuda] [--model base] [--workload full512]`.
//!
//! Models and batches are those of the PyTorch baselines (`shared/workload.rs`), dropout 0.1, clipping and AdamW inside the time.
//! Batches are ready in the host's memory beforehand; their upload is inside the time, and so is the wait for the losses, by which
//! every step ends. One JSON line a case, under the baselines' names, then a table.

#[path = "shared/ceiling.rs"]
mod ceiling;
#[path = "shared/workload.rs"]
mod workload;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use serde_json::{Value, json};

use ceiling::{Ceiling, Random, median};
use retromae_engine::device::Device;
use retromae_engine::error::IoContext;
use retromae_engine::ops::optimizer::AdamW;
use retromae_engine::train::flops;
use retromae_engine::train::settings::Precision;
use retromae_engine::train::step::{Objective, Pretrainer};
use retromae_engine::train::target::Target;
use retromae_engine::train::updates::Trainable;
use retromae_engine::{Error, Result};
use workload::{Model, Workload};

/// Time pre-training steps
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

/// One workload, timed.
fn time(
    args: &Arguments,
    target: &Target,
    model: Model,
    workload: Workload,
    ceiling: Option<Ceiling>,
) -> Result<Value> {
    let began = Instant::now();
    let (config, objective, lengths) = (model.config()?, Objective::RetroMae, workload.lengths(model)?);
    let (batches, capacity) = workload::batches(workload, model, args.batches.max(1))?;
    let made = began.elapsed().as_secs_f64();
    let mut trainer = Pretrainer::new(target.device, &config, objective, capacity, target.storage)?;
    trainer.params().load(1, config.initializer_range, |_, _, _| Ok(false))?;
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    let mut step = |trainer: &mut Pretrainer, t: u64| {
        let batch = &batches[(t % batches.len() as u64) as usize];
        let start = Instant::now();
        let out = trainer.step(std::slice::from_ref(batch), &AdamW::default(), 1e-5, t + 1, 7)?;
        let milliseconds = start.elapsed().as_secs_f64() * 1e3;
        if !out.losses.total().is_finite() || out.skipped {
            return Err(Error::device(format!("step {t} has no finite loss and gradient")).remedy("run the tests"));
        }
        losses.push(out.losses.total());
        norms.push(out.grad_norm);
        Ok(milliseconds)
    };
    let first = step(&mut trainer, 0)?;
    for t in 1..args.warmup.max(1) {
        step(&mut trainer, t)?;
    }
    let setup = began.elapsed().as_secs_f64();
    let steps = args.warmup.max(1)..args.warmup.max(1) + args.steps.max(1);
    let mut times = steps.map(|t| step(&mut trainer, t)).collect::<Result<Vec<f64>>>()?;
    let ms = median(&mut times);
    let decile = |part: f64| times[((times.len() as f64 * part) as usize).min(times.len() - 1)];
    let (masked, labelled) =
        (batches[0].encoder_label_ids.len(), batches[0].decoder.as_ref().map_or(0, |d| d.label_ids.len()));
    let work = flops::pretraining(&config, objective, lengths.iter().copied(), masked, labelled) as f64;
    let footprint = Pretrainer::footprint(target.device, &config, objective, capacity, target.storage);
    let tflops = work / ms / 1e9;
    Ok(json!({
        "mode": "engine", "workload": workload.name(), "model": model.name(), "precision": target.precision(),
        "sequences": lengths.len(), "real_tokens": capacity.tokens, "masked_rows": masked, "labelled_rows": labelled,
        "ms": ms, "ms_p10": decile(0.1), "ms_p90": decile(0.9), "tokens_per_s": capacity.tokens as f64 / ms * 1e3,
        "model_tflop": work / 1e12, "tflops": tflops, "matmul_ceiling_tflops": ceiling.map(|c| c.tflops),
        "copy_ceiling_gb_per_s": ceiling.map(|c| c.gb_per_s), "mfu": ceiling.map(|c| tflops / c.tflops),
        "planned_gib": (footprint.parameter_bytes + footprint.activation_bytes) as f64 / f64::from(1 << 30),
        "setup_s": setup, "batches_s": made, "first_step_ms": first, "first_loss": losses[0],
        "last_loss": losses[losses.len() - 1], "last_grad_norm": norms[norms.len() - 1], "dropout": config.hidden_dropout_prob,
        "steps": args.steps, "warmup": args.warmup, "batches": batches.len(), "device": target.words,
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
    let all = [Workload::Full512, Workload::Passages];
    let wanted = if args.workload.is_empty() { &all[..] } else { &args.workload[..] };
    let mut lines = Vec::new();
    for &workload in wanted {
        let line = time(args, &target, model, workload, ceiling)?;
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
