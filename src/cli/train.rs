//! `train`: flags and file to settings, settings to parts, parts to a run, run to an exported model.

mod aliases;
mod pairs;
pub(super) mod ranks;

use std::path::PathBuf;

use clap::builder::BoolishValueParser;
use clap::{ArgMatches, Args, FromArgMatches};
use serde::Serialize;
use toml::Table;

use self::ranks::{Member, Part};
use super::{Global, say};
use crate::error::{Error, Result};
use crate::files::Disk;
use crate::train::collective::agreement;
use crate::train::export::{Request, export_run};
use crate::train::parts::biencoder::BiEncoderJob;
use crate::train::parts::pretrain::Pretraining;
use crate::train::parts::ranker::RankerJob;
use crate::train::parts::{Facts, Job};
use crate::train::plan::Plan;
use crate::train::progress::{Progress, human};
use crate::train::room;
use crate::train::run::{Run, Summary};
use crate::train::schedule::Decay;
use crate::train::settings::{Objective, Precision, Settings};
use crate::train::signals::Stop;
use crate::train::step;
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
    /// Model to start from: a folder, a file of weights, or a name of the Hugging Face hub
    #[arg(long, value_name = "DIR", conflicts_with_all = ["config_file", "config_name"])]
    model: Option<String>,
    /// config.json of a model to start from scratch
    #[arg(long, value_name = "FILE", conflicts_with = "config_name")]
    config_file: Option<PathBuf>,
    /// Standard size to start from scratch: bert-tiny, bert-mini, bert-small, bert-medium, bert-base, bert-large, minilm-l6
    #[arg(long, value_name = "NAME")]
    config_name: Option<String>,
    /// Pre-training: the folder that tokenize wrote. Fine-tuning: rows that bring their own queries and passages, a file, folder or glob
    /// of Tevatron's, FlagEmbedding's or sentence-transformers' rows
    #[arg(long, value_name = "DIR|FILE")]
    data: Option<PathBuf>,
    /// Folder of the run; a run that is already there goes on
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// auto: go on from the newest checkpoint of the output folder; never: start anew; or a checkpoint folder [default: auto]
    #[arg(long, value_name = "auto|never|CHECKPOINT")]
    resume: Option<String>,
    /// Texts of a micro-batch; of fine-tuning, queries [default: 32]
    #[arg(long, value_name = "N", conflicts_with = "tokens_per_batch")]
    batch_size: Option<u32>,
    /// Tokens of a micro-batch, in place of --batch-size
    #[arg(long, value_name = "N")]
    tokens_per_batch: Option<u32>,
    /// Micro-batches whose gradients make one step [default: 1]
    #[arg(long, value_name = "N")]
    accumulate: Option<u32>,
    /// Cut texts, or the pairs of a cross-encoder, to this many tokens [default: cross-encoder: 128]
    #[arg(long, value_name = "N")]
    max_length: Option<u32>,
    /// Passes over the data [default: 3]
    #[arg(long, value_name = "X", conflicts_with = "steps")]
    epochs: Option<f64>,
    /// Steps, in place of --epochs
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Highest learning rate [default: 1e-4; fine-tuning: 2e-5]
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
    /// Weight of DupMAE's bag-of-words loss [default: 0.1]
    #[arg(long, value_name = "X")]
    bow_loss_weight: Option<f64>,
    /// Device [default: auto]
    #[arg(long, value_name = "auto|cpu|cuda|emulator")]
    device: Option<String>,
    /// Arithmetic [default: auto]
    #[arg(long, value_enum)]
    precision: Option<Precision>,
    /// Texts held out for evaluation [default: 1 % of the data, at most 1,000; fine-tuning, queries: 0]
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
    /// What makes an evaluation the best: mrr@10, ndcg@10, recall@100 or loss (default: mrr@10 with a dev set, else loss)
    #[arg(long, value_name = "METRIC")]
    best_metric: Option<String>,
    /// Stop after this many evaluations in a row without a better one
    #[arg(long, value_name = "N")]
    patience: Option<u64>,
    /// Keep the checkpoint of the best evaluation and export that one [default: true with a dev set]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    keep_best: Option<bool>,
    #[command(flatten)]
    #[serde(flatten)]
    pairs: pairs::Flags,
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
    #[command(flatten)]
    ranks: ranks::Flags,
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
    if args.control.ranks.gpus.is_some() {
        args.flags.device.get_or_insert_with(|| "cuda".into());
    }
    let flags = Table::try_from(&args.flags)
        .map_err(|e| Error::usage(format!("a flag cannot be used: {e}")).remedy("see train --help"))?;
    let mut settings = Settings::resolve(flags, args.control.config.as_deref())?;
    let member = match args.control.ranks.part()? {
        Part::Launcher(n) if args.control.dry_run => {
            settings.share.ranks = n as u64;
            Member::default()
        }
        Part::Launcher(n) => return args.control.ranks.launch(n, global.threads()),
        Part::Rank(place) => args.control.ranks.meet(&place)?,
        Part::Alone => Member::default(),
    };
    if !args.control.dry_run {
        settings.share = member.share();
    }
    let result = start_threads(&settings, global).and_then(|()| open(&settings, &args, global, &member));
    member.leave(result)
}

fn open(settings: &Settings, args: &Arguments, global: &Global, member: &Member) -> Result<()> {
    match settings.objective {
        Objective::Retromae => train(Pretraining::open(settings, step::Objective::RetroMae)?, args, global, member),
        Objective::Dupmae => train(Pretraining::open(settings, step::Objective::DupMae)?, args, global, member),
        Objective::Mlm => train(Pretraining::open(settings, step::Objective::Mlm)?, args, global, member),
        Objective::Contrastive => train(BiEncoderJob::open(settings)?, args, global, member),
        Objective::CrossEncoder => train(RankerJob::open(settings)?, args, global, member),
    }
}

fn train<J: Job>(mut job: J, args: &Arguments, global: &Global, member: &Member) -> Result<()> {
    let Facts { settings, about, notes } = job.facts().clone();
    let plan = Plan::new(settings, about, job.batches())?;
    let settings = &plan.settings;
    let out = settings.output.clone().unwrap_or_default();
    let crowded = job.memory().map_or(Ok(None), |memory| room::check(plan.about.memory, &memory, &job.knobs()));
    if args.control.dry_run {
        say(&plan.to_text())?;
        match crowded {
            Ok(note) => note.map_or(Ok(()), |line| say(&format!("warning: {line}")))?,
            Err(refused) => say(&format!("warning: {refused}"))?,
        }
        plan.room(&out).map_or(Ok(()), |line| say(&format!("warning: {line}")))?;
        return global.write_json(&plan.to_json());
    }

    let crowded = crowded?;
    let (stop, team) = (Stop::install()?, member.team());
    let mut progress = match member.is_first() {
        true => Progress::stderr(global.quiet),
        false => Progress::lines(Box::new(std::io::sink())),
    };
    args.notes.iter().chain(&notes).chain(&crowded).for_each(|note| progress.warn(note));
    agreement::same_run(&team, &plan.identity)?;
    let mut workspace = None;
    if member.is_first() {
        let opened =
            Workspace::open(&Disk::default(), &plan, &args.control.overrides, &mut |line| progress.warn(&line))?;
        progress.say(&plan.to_text());
        member.words().into_iter().for_each(|line| progress.say(&line));
        if let Some(line) = plan.room(&out) {
            progress.warn(&line);
        }
        if let Some(checkpoint) = &opened.start {
            progress.say(&format!("resuming from {}", checkpoint.dir.display()));
        }
        job.keep_origin(&plan, &opened)?;
        workspace = Some(opened);
    }
    let mut engine = job.engine(&mut |line| progress.say(&line))?;
    let team = member.team_on(engine.device(), &mut |line| progress.warn(&line))?;
    engine.join(team.clone());
    let run = Run::new(&plan, workspace, team, &mut engine, job.batches(), &stop, &mut progress)?;
    let (summary, workspace) = run.run()?;
    // The others have done their part.
    let Some(workspace) = workspace else { return Ok(()) };
    let model = out.join(MODEL);
    let checkpoint = chosen(settings, &summary, &workspace, &mut progress)?;
    let request = Request { checkpoint, overwrite: true, ..Request::new(&out, &model) };
    let exported = export_run(&workspace.disk, &request, &mut |line| progress.warn(&line))?;
    let of = match exported.state.step == summary.state.step {
        true => String::new(),
        false => format!(" (the best, of step {})", exported.state.step),
    };
    say(&format!(
        "{}\n{} in this process\nmodel: {}{of}",
        summary.to_text(),
        human(std::time::Duration::from_secs_f64(summary.seconds)),
        model.display()
    ))?;
    global.write_json(&summary.to_json())
}

/// The checkpoint that is exported: the best where that is kept, else the last.
fn chosen(
    settings: &Settings,
    summary: &Summary,
    workspace: &Workspace,
    progress: &mut Progress,
) -> Result<Option<PathBuf>> {
    if let Some(best) = summary.state.best.as_ref().filter(|_| settings.keeps_best()) {
        match workspace.store.at(best.step)? {
            Some(dir) => return Ok(Some(dir)),
            // The run went on from a checkpoint older than one that was found to be damaged.
            None => progress.warn(&format!("the best checkpoint, of step {}, is gone; exporting the last", best.step)),
        }
    }
    Ok(workspace.store.list()?.pop().map(|(_, dir)| dir))
}

/// Threads of the configuration file, where no flag has set them already.
fn start_threads(settings: &Settings, global: &Global) -> Result<()> {
    let (None, Some(threads)) = (global.threads, settings.threads) else { return Ok(()) };
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|e| Error::refused(format!("cannot start {threads} threads: {e}")).remedy("use fewer --threads"))
}
