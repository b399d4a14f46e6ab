//! Speed of a training step.
//!
//! Models and batches are those of the PyTorch baselines ([`super::workload`]): pre-training, and for `finetune` one encoder of queries and
//! passages, `[CLS]`, dot product, temperature 1, every passage a candidate. Dropout 0.1, clipping and AdamW are inside the time.
//! Batches are ready in the host's memory beforehand; their upload is inside the time, and so is the wait for the losses, by which
//! every step ends. Objects have the baselines' names.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Value, json};

use super::breakdown::{Breakdown, DETAILS};
use super::ceiling::{Ceiling, Random};
use super::work::{self, Work, model};
use super::workload::{self, Model, Workload};
use super::{Report, Times, flame, pairs};
use crate::device::trace;
use crate::error::{Error, IoContext, Result};
use crate::files;
use crate::graph::biencoder::Shape;
use crate::graph::check_gpu;
use crate::ops::optimizer::AdamW;
use crate::ops::pool::Pooling;
use crate::train::biencoder::{BiEncoder, Options};
use crate::train::step::{Footprint, Objective, Pretrainer};
use crate::train::target::Target;
use crate::train::updates::Trainable;

/// What is minimised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Minimised {
    /// Encoder MLM and enhanced decoding.
    Retromae,
    /// Encoder MLM alone.
    Mlm,
    /// RetroMAE and bags of words.
    Dupmae,
    /// In-batch contrastive loss of a bi-encoder.
    Contrastive,
}

impl Minimised {
    /// The objective of pre-training, and its name in results; none for a bi-encoder.
    pub(super) fn pretraining(self) -> Option<(Objective, &'static str)> {
        match self {
            Minimised::Retromae => Some((Objective::RetroMae, "retromae")),
            Minimised::Mlm => Some((Objective::Mlm, "mlm")),
            Minimised::Dupmae => Some((Objective::DupMae, "dupmae")),
            Minimised::Contrastive => None,
        }
    }
}

/// What to time, and how often.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The model.
    pub model: Model,
    /// What is minimised; without it, contrastive for `finetune` and RetroMAE for the others.
    pub objective: Option<Minimised>,
    /// The batches; none: all that the objective has.
    pub workloads: Vec<Workload>,
    /// Steps to time, at least 1.
    pub steps: u64,
    /// Steps before them, at least 1.
    pub warmup: u64,
    /// Distinct batches, at least 1.
    pub batches: u64,
    /// Whether to tell where the time goes.
    pub breakdown: bool,
    /// Where to draw it, too; for a single case.
    pub svg: Option<PathBuf>,
}

impl Settings {
    /// The cases: batches and what is minimised on them.
    ///
    /// # Errors
    /// A workload that the objective does not have.
    pub fn cases(&self) -> Result<Vec<(Workload, Minimised)>> {
        let pairs = |workload| workload == Workload::Finetune;
        let fits =
            |&workload: &Workload| self.objective.is_none_or(|o| pairs(workload) == (o == Minimised::Contrastive));
        let all = [Workload::Full512, Workload::Passages, Workload::Finetune];
        if let Some(wrong) = self.workloads.iter().find(|workload| !fits(workload)) {
            let remedy = if pairs(*wrong) { "use --objective contrastive" } else { "use retromae, mlm or dupmae" };
            return Err(Error::usage(format!("--workload {}: not with this --objective", wrong.name())).remedy(remedy));
        }
        if self.svg.is_some() && self.workloads.len() != 1 {
            return Err(Error::usage("--svg: one picture of one step").remedy("name one --workload"));
        }
        let wanted = if self.workloads.is_empty() { &all[..] } else { &self.workloads[..] };
        let standard = |workload| if pairs(workload) { Minimised::Contrastive } else { Minimised::Retromae };
        Ok(wanted.iter().filter(|w| fits(w)).map(|&w| (w, self.objective.unwrap_or(standard(w)))).collect())
    }
}

/// Times every case.
///
/// # Errors
/// A workload that the objective does not have, a failure of the device, or a failed write.
pub fn run(settings: &Settings, target: &Target, report: &Report<'_>) -> Result<()> {
    let (cases, model) = (settings.cases()?, &settings.model);
    if target.device.is_gpu() {
        check_gpu(model.config())?;
    }
    // Better known before the measurement than after it.
    if let Some(path) = &settings.svg {
        File::options().create(true).append(true).open(path).at(path, "cannot create")?;
    }
    let ceiling = Ceiling::measure(target.device, target.storage, &Random::new(), model.tiny())?;
    report.say(&format!("{} on {}, {}\n", model.name(), target.words, target.precision()))?;
    let mut told = Vec::new();
    report.head(&["step", "median ms", "p10", "p90", "tokens/s", "TFLOP/s", "of product"])?;
    for (workload, objective) in cases {
        let (line, breakdown) = match objective.pretraining() {
            None => time(settings, target, ceiling, Case::<BiEncoder>::new(target, model, settings.batches)?)?,
            Some(objective) => {
                let case = Case::<Pretrainer>::new(target, model, workload, objective, settings.batches)?;
                time(settings, target, ceiling, case)?
            }
        };
        let number = |name: &str, digits: usize| format!("{:.digits$}", line[name].as_f64().unwrap_or(f64::NAN));
        let share = line["mfu"].as_f64().map_or_else(String::new, |mfu| format!("{:.1} %", 100.0 * mfu));
        let name = format!("{} {}", line["objective"].as_str().unwrap_or_default(), workload.name());
        let times = ["ms", "ms_p10", "ms_p90"].map(|name| number(name, 2));
        let rates = [number("tokens_per_s", 0), number("tflops", 3), share];
        let (ms, case) =
            (line["ms"].as_f64().unwrap_or(f64::NAN), line["case"].as_str().unwrap_or_default().to_string());
        report.case(&[&[name][..], &times, &rates].concat(), line)?;
        let Some(breakdown) = breakdown else { continue };
        told.push((case, ms, breakdown));
    }
    for (case, ms, breakdown) in &told {
        breakdown.tell(case, *ms, &ceiling, report)?;
        if let Some(path) = &settings.svg {
            let frame = breakdown.frame(&ceiling);
            let title = format!("{case} on {}: {:.2} ms as drawn, {ms:.2} by the clock", target.words, frame.ms);
            files::write_atomic(path, |out| out.write_all(flame::svg(&title, &frame).as_bytes()))?;
        }
    }
    Ok(())
}

/// What is timed.
struct Case<'a, T: Trainable> {
    model: &'a Model,
    workload: Workload,
    objective: &'static str,
    /// When the batches were begun.
    began: Instant,
    trainer: T,
    batches: Vec<T::Batch>,
    /// Seconds that they took.
    batches_s: f64,
    footprint: Footprint,
    /// Floating-point operations of a step as everybody counts them, and its work as it is.
    model_flop: f64,
    work: Work,
    /// Numbers of rows that the kind of step has, by their names in results.
    rows: [(&'static str, usize); 2],
}

impl<'a> Case<'a, Pretrainer> {
    fn new(
        target: &Target,
        model: &'a Model,
        workload: Workload,
        (objective, name): (Objective, &'static str),
        count: u64,
    ) -> Result<Self> {
        let began = Instant::now();
        let config = model.config();
        let (batches, capacity) = workload::batches(workload, model, objective, count)?;
        let batches_s = began.elapsed().as_secs_f64();
        let masked = batches[0].encoder_label_ids.len();
        let labelled = batches[0].decoder.as_ref().map_or(0, |d| d.label_ids.len());
        let [_, lengths] = workload.lengths(model)?;
        let on = (target.device, target.storage);
        let footprint = Pretrainer::footprint(target.device, config, objective, capacity, target.storage);
        Ok(Case {
            model,
            workload,
            objective: name,
            began,
            trainer: Pretrainer::new(target.device, config, objective, capacity, target.storage)?,
            work: work::pretraining(on, config, objective, (capacity, footprint.parameters), &batches[0]),
            batches,
            batches_s,
            footprint,
            model_flop: model::pretraining(config, objective, lengths, masked, labelled) as f64,
            rows: [("masked_rows", masked), ("labelled_rows", labelled)],
        })
    }
}

impl<'a> Case<'a, BiEncoder> {
    fn new(target: &Target, model: &'a Model, count: u64) -> Result<Self> {
        let began = Instant::now();
        let (config, workload) = (model.config(), Workload::Finetune);
        let (batches, room) = pairs::batches(model, count)?;
        let batches_s = began.elapsed().as_secs_f64();
        let shape = Shape { pooling: Pooling::Cls, projection: None, normalize: false };
        let options = Options { shape, lexical: None, untied: false, temperature: 1.0, distillation: None };
        let [queries, passages] = workload.lengths(model)?;
        let on = (target.device, target.storage);
        let trainer = BiEncoder::new(target.device, config, options, room, target.storage)?;
        let footprint = BiEncoder::footprint(on, config, &options, room);
        let sizes = (trainer.capacity(0), [room.queries, room.passages], footprint.parameters);
        Ok(Case {
            model,
            workload,
            objective: "contrastive",
            began,
            trainer,
            work: work::fine_tuning(on, config, sizes, &batches[0]),
            batches,
            batches_s,
            footprint,
            model_flop: model::fine_tuning(config, [&queries, &passages]) as f64,
            rows: [("queries", queries.len()), ("passages", passages.len())],
        })
    }
}

/// One case, timed.
fn time<T: Trainable>(
    args: &Settings,
    target: &Target,
    ceiling: Ceiling,
    mut case: Case<'_, T>,
) -> Result<(Value, Option<Breakdown>)> {
    let config = case.trainer.config().clone();
    case.trainer.params().load(1, config.initializer_range, |_, _, _| Ok(false))?;
    let (sequences, tokens) = T::size(&case.batches[0]);
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    // As in training the next batch is made ready while the step runs; not where the pieces of a single step are told.
    let mut step = |t: u64, alone: bool| {
        let batch = |t: u64| &case.batches[(t % case.batches.len() as u64) as usize];
        let next = (!alone).then(|| batch(t + 1));
        let start = Instant::now();
        let out =
            case.trainer.step_before(std::slice::from_ref(batch(t)), next, &AdamW::default(), 1e-5, (t + 1, 7))?;
        let milliseconds = start.elapsed().as_secs_f64() * 1e3;
        let loss: f64 = case.trainer.parts(&out.losses).iter().map(|part| part.weight * part.loss()).sum();
        if !loss.is_finite() || out.skipped {
            return Err(Error::device(format!("step {t} has no finite loss and gradient")).remedy("run the tests"));
        }
        losses.push(loss);
        norms.push(out.grad_norm);
        Ok(milliseconds)
    };
    let first = step(0, false)?;
    for t in 1..args.warmup {
        step(t, false)?;
    }
    let setup = case.began.elapsed().as_secs_f64();
    let steps = args.warmup..args.warmup + args.steps;
    let times = Times::new(steps.map(|t| step(t, false)).collect::<Result<Vec<f64>>>()?);
    let ms = times.median();
    // As many steps piece by piece, but no more than a median needs.
    let (repeats, mut t) = (args.steps.min(10), args.warmup + args.steps);
    let mut traces = DETAILS.map(|_| Vec::new());
    if args.breakdown {
        for (detail, traces) in DETAILS.into_iter().zip(&mut traces) {
            for _ in 0..repeats {
                traces.push(trace::record(target.device, detail, || step(t, true))?.1);
                t += 1;
            }
        }
    }
    let breakdown = args.breakdown.then(|| Breakdown::of(&traces[0], &traces[1], &case.work));
    let tflops = case.model_flop / ms / 1e9;
    let [(a, of_a), (b, of_b)] = case.rows;
    let names = [case.objective, case.model.name(), case.workload.name(), target.precision()];
    let mut line = json!({
        "mode": "engine", "case": format!("step {}", names.join(" ")), "objective": case.objective,
        "workload": case.workload.name(), "model": case.model.name(),
        "sequences": sequences, "real_tokens": tokens, (a): of_a, (b): of_b,
        "tokens_per_s": tokens as f64 / ms * 1e3,
        "model_tflop": case.model_flop / 1e12, "tflops": tflops, "matmul_ceiling_tflops": ceiling.tflops,
        "required_tflop": case.work.flop() as f64 / 1e12, "required_gb": case.work.bytes() as f64 / 1e9, "launches": case.work.launches(),
        "copy_ceiling_gb_per_s": ceiling.gb_per_s, "mfu": tflops / ceiling.tflops,
        "planned_gib": (case.footprint.parameter_bytes + case.footprint.activation_bytes) as f64 / f64::from(1 << 30),
        "setup_s": setup, "batches_s": case.batches_s, "first_step_ms": first, "first_loss": losses[0],
        "last_loss": losses[losses.len() - 1], "last_grad_norm": norms[norms.len() - 1], "dropout": config.hidden_dropout_prob,
        "steps": args.steps, "warmup": args.warmup, "batches": case.batches.len(),
    });
    times.describe(&mut line);
    if let Some(breakdown) = &breakdown {
        line["breakdown"] = breakdown.json(ms, &ceiling);
    }
    Ok((line, breakdown))
}
