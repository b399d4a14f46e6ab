//! `train`: flags and file to settings, settings to parts, parts to a run, run to an exported model.

mod aliases;

use std::path::PathBuf;

use clap::{ArgMatches, Args, FromArgMatches};
use serde::Serialize;
use toml::Table;

use super::{Global, say};
use crate::error::{Error, Result};
use crate::files::Disk;
use crate::train::export::{Request, export_run};
use crate::train::parts::Parts;
use crate::train::plan::Plan;
use crate::train::progress::{Progress, human};
use crate::train::run::Run;
use crate::train::schedule::Decay;
use crate::train::settings::{Objective, Precision, Settings};
use crate::train::signals::Stop;
use crate::train::workspace::{MODEL, Workspace};

/// The flags of `train`, under their own names and those of [`aliases`].
#[derive(Debug)]
pub struct Arguments {
    flags: Flags,
    control: Control,
    notes: Vec<String>,
}

/// Settings given on the command line; what is absent comes from the configuration file or has its default.
#[derive(Debug, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Flags {
    /// What is minimised [default: retromae]
    #[arg(long, value_enum)]
    objective: Option<Objective>,
    /// Model to start from: a folder, a file of weights, or a hub name that is in the local Hugging Face cache
    #[arg(long, value_name = "DIR", conflicts_with_all = ["config_file", "config_name"])]
    model: Option<String>,
    /// config.json of a model to start from scratch
    #[arg(long, value_name = "FILE", conflicts_with = "config_name")]
    config_file: Option<PathBuf>,
    /// Standard size to start from scratch: bert-tiny, bert-mini, bert-small, bert-medium, bert-base, bert-large, minilm-l6
    #[arg(long, value_name = "NAME")]
    config_name: Option<String>,
    /// Folder that tokenize wrote
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Folder of the run; a run that is already there goes on
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// auto: go on from the newest checkpoint of the output folder; never: start anew; or a checkpoint folder [default: auto]
    #[arg(long, value_name = "auto|never|CHECKPOINT")]
    resume: Option<String>,
    /// Texts of a micro-batch [default: 32]
    #[arg(long, value_name = "N", conflicts_with = "tokens_per_batch")]
    batch_size: Option<u32>,
    /// Tokens of a micro-batch, in place of --batch-size
    #[arg(long, value_name = "N")]
    tokens_per_batch: Option<u32>,
    /// Micro-batches whose gradients make one step [default: 1]
    #[arg(long, value_name = "N")]
    accumulate: Option<u32>,
    /// Cut texts to this many tokens
    #[arg(long, value_name = "N")]
    max_length: Option<u32>,
    /// Passes over the data [default: 3]
    #[arg(long, value_name = "X", conflicts_with = "steps")]
    epochs: Option<f64>,
    /// Steps, in place of --epochs
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Highest learning rate [default: 1e-4]
    #[arg(long, value_name = "X")]
    learning_rate: Option<f64>,
    /// How the learning rate falls after the warm-up [default: linear]
    #[arg(long, value_enum)]
    schedule: Option<Decay>,
    /// Part of the steps in which the learning rate rises [default: 0.1]
    #[arg(long, value_name = "X", conflicts_with = "warmup_steps")]
    warmup_ratio: Option<f64>,
    /// Steps in which the learning rate rises, in place of --warmup-ratio
    #[arg(long, value_name = "N")]
    warmup_steps: Option<u64>,
    /// Weight decay, on all but biases and LayerNorm [default: 0.01]
    #[arg(long, value_name = "X")]
    weight_decay: Option<f64>,
    /// Beta 1 of AdamW [default: 0.9]
    #[arg(long, value_name = "X")]
    beta1: Option<f64>,
    /// Beta 2 of AdamW [default: 0.999]
    #[arg(long, value_name = "X")]
    beta2: Option<f64>,
    /// Epsilon of AdamW [default: 1e-8]
    #[arg(long, value_name = "X")]
    epsilon: Option<f64>,
    /// Norm the gradient is clipped to; 0: no clipping [default: 1]
    #[arg(long, value_name = "X")]
    clip: Option<f64>,
    /// Part of a text's tokens the encoder has to predict [default: 0.3]
    #[arg(long, value_name = "P")]
    encoder_mask_probability: Option<f64>,
    /// Part of a text's tokens hidden from each position of the enhanced decoder [default: 0.5]
    #[arg(long, value_name = "P")]
    decoder_mask_probability: Option<f64>,
    /// Device [default: auto]
    #[arg(long, value_name = "auto|cpu|cuda|emulator")]
    device: Option<String>,
    /// Arithmetic [default: auto]
    #[arg(long, value_enum)]
    precision: Option<Precision>,
    /// Texts held out for evaluation [default: 1 % of the data, at most 1,000]
    #[arg(long, value_name = "N")]
    eval_size: Option<u64>,
    /// Steps between evaluations; 0: only at the start and the end [default: 500]
    #[arg(long, value_name = "N")]
    eval_every: Option<u64>,
    /// Steps between log lines [default: 10]
    #[arg(long, value_name = "N")]
    log_every: Option<u64>,
    /// Steps between checkpoints; 0: only at the end and when stopped [default: 500]
    #[arg(long, value_name = "N")]
    save_every: Option<u64>,
    /// Checkpoints to keep [default: 3]
    #[arg(long, value_name = "N")]
    keep: Option<usize>,
    /// Stop after this many steps in a row without a finite gradient [default: 10]
    #[arg(long, value_name = "N")]
    max_skipped: Option<u64>,
    /// Write TensorBoard events [default: true]
    #[arg(long, value_name = "BOOL", action = clap::ArgAction::Set)]
    tensorboard: Option<bool>,
    #[arg(skip)]
    seed: Option<u64>,
    #[arg(skip)]
    threads: Option<u32>,
}

/// What steers this one invocation and is no setting of the run.
#[derive(Debug, Args)]
struct Control {
    /// Settings in TOML; keys are the names of these flags, and a flag wins. A run writes its own as OUTPUT/run.toml
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Let this setting differ from that of the checkpoint; may be given several times
    #[arg(long = "override", value_name = "SETTING")]
    overrides: Vec<String>,
    /// Print parameters, memory, tokens, steps and disk, and stop
    #[arg(long)]
    dry_run: bool,
}

impl Args for Arguments {
    fn augment_args(command: clap::Command) -> clap::Command {
        aliases::add(Control::augment_args(Flags::augment_args(command)))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Arguments {
    fn from_arg_matches(matches: &ArgMatches) -> std::result::Result<Self, clap::Error> {
        let (flags, control) = (Flags::from_arg_matches(matches)?, Control::from_arg_matches(matches)?);
        Ok(Arguments { flags, control, notes: aliases::notes(matches) })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> std::result::Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Runs `train`.
pub fn run(mut args: Arguments, global: &Global) -> Result<()> {
    (args.flags.seed, args.flags.threads) = (global.seed, global.threads);
    let flags = Table::try_from(&args.flags)
        .map_err(|e| Error::usage(format!("a flag cannot be used: {e}")).remedy("see train --help"))?;
    let settings = Settings::resolve(flags, args.control.config.as_deref())?;
    start_threads(&settings, global)?;
    let mut parts = Parts::open(&settings)?;
    let plan = Plan::new(settings, parts.about.clone(), &parts.batches)?;
    let settings = &plan.settings;
    let out = settings.output.clone().unwrap_or_default();
    if args.control.dry_run {
        say(&plan.to_text())?;
        plan.room(&out).map_or(Ok(()), |line| say(&format!("warning: {line}")))?;
        return global.write_json(&plan.to_json());
    }

    let stop = Stop::install()?;
    let mut progress = Progress::stderr(global.quiet);
    args.notes.iter().chain(&parts.notes).for_each(|note| progress.warn(note));
    let workspace =
        Workspace::open(&Disk::default(), &plan, &args.control.overrides, &mut |line| progress.warn(&line))?;
    progress.say(&plan.to_text());
    if let Some(line) = plan.room(&out) {
        progress.warn(&line);
    }
    if let Some(checkpoint) = &workspace.start {
        progress.say(&format!("resuming from {}", checkpoint.dir.display()));
    }
    parts.keep_origin(&plan, &workspace)?;
    let mut engine = parts.engine(settings, &mut |line| progress.say(&line))?;
    let run = Run::new(&plan, workspace, &mut engine, &mut parts.batches, &stop, &mut progress)?;
    let (summary, workspace) = run.run()?;
    let model = out.join(MODEL);
    let last = workspace.store.list()?.pop().map(|(_, dir)| dir);
    let request = Request { checkpoint: last, overwrite: true, ..Request::new(&out, &model) };
    export_run(&workspace.disk, &request, &mut |line| progress.warn(&line))?;
    say(&format!(
        "{}\n{} in this process\nmodel: {}",
        summary.to_text(),
        human(std::time::Duration::from_secs_f64(summary.seconds)),
        model.display()
    ))?;
    global.write_json(&summary.to_json())
}

/// Threads of the configuration file, where no flag has set them already.
fn start_threads(settings: &Settings, global: &Global) -> Result<()> {
    let (None, Some(threads)) = (global.threads, settings.threads) else { return Ok(()) };
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|e| Error::refused(format!("cannot start {threads} threads: {e}")).remedy("use fewer --threads"))
}
