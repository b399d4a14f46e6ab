//! A toy to run the real loop around: real batches of a small corpus, and an engine of a few numbers whose every bit depends on
//! every step before. One run takes milliseconds, so the reliability tests can afford hundreds.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use retromae_engine::Result;
use retromae_engine::data::batch::PretrainBatch;
use retromae_engine::data::corpus::{MemoryCorpus, Tokens};
use retromae_engine::data::masking::{MaskRules, Vocabulary};
use retromae_engine::files::disk::Disk;
use retromae_engine::train::batches::CorpusBatches;
use retromae_engine::train::collective::Team;
use retromae_engine::train::plan::Plan;
use retromae_engine::train::progress::Progress;
use retromae_engine::train::run::{Run, Summary};
use retromae_engine::train::settings::Settings;
use retromae_engine::train::signals::Stop;
use retromae_engine::train::workspace::Workspace;
use retromae_engine::train::{About, Arena, Arenas, Batches, Engine, EvalPart, EvalReport, ParamInfo, StepReport};

/// Steps of the toy's run.
pub const STEPS: u64 = 24;

/// An engine of 23 numbers in an arena of 32, with padding that must survive.
pub struct Toy {
    weights: Vec<f32>,
    moment1: Vec<f32>,
    moment2: Vec<f32>,
    /// Steps whose gradient is not finite.
    pub bad: Vec<u64>,
    /// Asks to stop during this step.
    pub stop_at: Option<(u64, Stop)>,
    /// Time a step takes.
    pub pace: Duration,
    /// What the next step was said to begin with.
    next: Option<PretrainBatch>,
}

impl Default for Toy {
    fn default() -> Self {
        let mut weights = vec![f32::NEG_INFINITY; 32];
        for p in Toy::table() {
            for (i, w) in weights[p.offset..p.offset + p.elements()].iter_mut().enumerate() {
                *w = 0.1 * (i as f32 + p.offset as f32).sin();
            }
        }
        Toy {
            weights,
            moment1: vec![0.0; 32],
            moment2: vec![0.0; 32],
            bad: Vec::new(),
            stop_at: None,
            pace: Duration::ZERO,
            next: None,
        }
    }
}

impl Toy {
    fn table() -> Vec<ParamInfo> {
        let p = |name: &str, shape: &[usize], offset, decay| ParamInfo {
            name: name.into(),
            shape: shape.into(),
            offset,
            decay,
        };
        vec![
            p("bert.a.weight", &[3, 4], 0, true),
            p("bert.a.bias", &[3], 16, false),
            p("cls.b.weight", &[2, 4], 24, true),
        ]
    }

    fn arena(&mut self, which: Arena) -> &mut Vec<f32> {
        match which {
            Arena::Weights => &mut self.weights,
            Arena::Moment1 => &mut self.moment1,
            Arena::Moment2 => &mut self.moment2,
        }
    }

    /// Bits of all state.
    pub fn bits(&self) -> Vec<u32> {
        [&self.weights, &self.moment1, &self.moment2].into_iter().flatten().map(|x| x.to_bits()).collect()
    }

    /// Squared distance of a weight from what the token wants it to be, and its gradient.
    fn term(&self, id: u32, position: usize) -> (usize, f64, f64) {
        let live = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 16, 17, 18, 24, 25, 26, 27, 28, 29, 30, 31];
        let at = live[(id as usize * 7 + position) % live.len()];
        let d = f64::from(self.weights[at]) - f64::from(id).cos();
        (at, d * d, 2.0 * d)
    }
}

impl Engine for Toy {
    type Batch = PretrainBatch;

    fn step(&mut self, micro: &[PretrainBatch], step: u64, lr: f32) -> Result<StepReport> {
        std::thread::sleep(self.pace);
        if let Some((at, stop)) = &self.stop_at
            && *at == step
        {
            stop.request(15);
        }
        let (mut gradient, mut loss, mut n) = (vec![0f64; 32], 0.0, 0u64);
        for batch in micro {
            for (position, &id) in batch.encoder_ids.iter().enumerate() {
                let (at, l, g) = self.term(id, position);
                (loss, gradient[at], n) = (loss + l, gradient[at] + g, n + 1);
            }
        }
        let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt() / n as f64;
        let skipped = self.bad.contains(&step);
        if !skipped {
            for (i, g) in gradient.iter().enumerate().filter(|(_, g)| **g != 0.0) {
                let g = (g / n as f64) as f32;
                self.moment1[i] = 0.9 * self.moment1[i] + 0.1 * g;
                self.moment2[i] = 0.999 * self.moment2[i] + 0.001 * g * g;
                self.weights[i] -= lr * self.moment1[i] / (self.moment2[i].sqrt() + 1e-8);
            }
        }
        let loss = loss / n as f64;
        Ok(StepReport {
            loss: if skipped { f64::NAN } else { loss },
            parts: vec![("encoder", 0.25 * loss), ("decoder", 0.75 * loss)],
            accuracy: vec![("encoder", 0.5), ("decoder", 0.25)],
            grad_norm: if skipped { f64::INFINITY } else { norm },
            skipped,
            culprits: Vec::new(),
            tokens: n,
            sequences: micro.iter().map(|b| b.sequences() as u64).sum(),
            labels: n,
        })
    }

    fn step_before(
        &mut self,
        micro: &[PretrainBatch],
        next: Option<&PretrainBatch>,
        step: u64,
        lr: f32,
    ) -> Result<StepReport> {
        if let Some(told) = self.next.take() {
            assert_eq!(micro.first(), Some(&told), "step {step} begins with another batch than was said");
        }
        self.next = next.cloned();
        self.step(micro, step, lr)
    }

    fn evaluate(&mut self, batch: &PretrainBatch) -> Result<EvalReport> {
        let loss: f64 = batch.encoder_ids.iter().enumerate().map(|(position, &id)| self.term(id, position).1).sum();
        let labels = batch.tokens() as u64;
        let part = |name, loss_sum| EvalPart { name, loss_sum, correct: Some(labels / 2), labels, weight: 1.0 };
        Ok(EvalReport { parts: vec![part("encoder", loss), part("decoder", 2.0 * loss)] })
    }
}

impl Arenas for Toy {
    fn parameters(&self) -> Vec<ParamInfo> {
        Toy::table()
    }

    fn read_arena(&self, which: Arena, out: &mut Vec<f32>) -> Result<()> {
        let from = match which {
            Arena::Weights => &self.weights,
            Arena::Moment1 => &self.moment1,
            Arena::Moment2 => &self.moment2,
        };
        out.clone_from(from);
        Ok(())
    }

    fn write_arena(&mut self, which: Arena, data: &[f32]) -> Result<()> {
        self.arena(which).copy_from_slice(data);
        Ok(())
    }
}

/// Sixty short texts over a vocabulary of 40.
pub fn corpus() -> Arc<MemoryCorpus> {
    let mut corpus = MemoryCorpus::default();
    for text in 0..60u32 {
        let mut ids = vec![1];
        ids.extend((0..3 + text % 9).map(|i| 5 + (text * 13 + i * 7) % 35));
        ids.push(2);
        let word_start: Vec<bool> = ids.iter().map(|id| id % 4 != 3).collect();
        corpus.push(Tokens { ids: &ids, word_start: &word_start });
    }
    Arc::new(corpus)
}

/// The toy's batches.
pub fn batches(settings: &Settings) -> Result<CorpusBatches> {
    let vocabulary = Vocabulary { size: 40, cls: 1, sep: 2, pad: 0, mask: 4, unk: Some(3) };
    let rules = MaskRules::new(settings.seed, vocabulary, 0.3, Some(0.5))?;
    CorpusBatches::new(corpus(), settings, rules, 32, 1, Box::new(|text| Some(format!("doc-{text}"))))
}

/// The settings of the toy's run into `out`, changed by `more` lines of TOML.
pub fn settings(out: &Path, more: &str) -> Settings {
    let base = format!(
        "model = 'toy'\ndata = 'corpus'\noutput = '{}'\nsteps = {STEPS}\nbatch-size = 4\nlearning-rate = 0.01\nwarmup-steps = 3\n\
         eval-size = 6\neval-every = 8\nlog-every = 1\nsave-every = 5\nkeep = 2\ntensorboard = false\n",
        out.display()
    );
    let mut table: toml::Table = toml::from_str(&base).unwrap();
    table.extend(toml::from_str::<toml::Table>(more).unwrap());
    Settings::resolve(table, None).unwrap()
}

/// What the toy is made of.
pub fn about(batches: &dyn Batches<Batch = PretrainBatch>) -> About {
    About {
        model: "toy of 23 numbers".into(),
        model_fingerprint: "t1".into(),
        parameters: 23,
        data: "sixty texts".into(),
        data_fingerprint: "d1".into(),
        texts: batches.texts(),
        tokens: batches.texts() * 9,
        held_out: 6,
        device: "the CPU".into(),
        precision: "fp32".into(),
        memory: 1 << 20,
    }
}

/// One run of the toy.
pub struct Job {
    /// Output folder.
    pub out: PathBuf,
    /// Settings in TOML on top of [`settings`].
    pub more: String,
    /// `--override`.
    pub overrides: Vec<String>,
    /// The file operations.
    pub disk: Disk,
    /// The engine.
    pub toy: Toy,
    /// Signals.
    pub stop: Stop,
    /// What the run told, warnings included.
    pub told: Told,
}

/// Text written from inside a run.
#[derive(Clone, Default)]
pub struct Told(Arc<Mutex<Vec<u8>>>);

impl Told {
    /// All of it.
    pub fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Told {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Job {
    /// The toy's run into `out`.
    pub fn new(out: &Path) -> Self {
        Job {
            out: out.into(),
            more: String::new(),
            overrides: Vec::new(),
            disk: Disk::default(),
            toy: Toy::default(),
            stop: Stop::default(),
            told: Told::default(),
        }
    }

    /// With these settings on top.
    pub fn with(mut self, more: &str) -> Self {
        self.more = more.into();
        self
    }

    /// Runs as `train` does.
    pub fn run(&mut self) -> Result<Summary> {
        let settings = settings(&self.out, &self.more);
        let mut batches = batches(&settings)?;
        let about = about(&batches);
        let plan = Plan::new(settings, about, &batches)?;
        let mut progress = Progress::lines(Box::new(self.told.clone()));
        let workspace = Workspace::open(&self.disk, &plan, &self.overrides, &mut |text| progress.warn(&text))?;
        Run::new(&plan, Some(workspace), Team::default(), &mut self.toy, &mut batches, &self.stop, &mut progress)?
            .run()
            .map(|(summary, _)| summary)
    }
}

/// `metrics.jsonl` without the figures that depend on the clock.
pub fn metrics(out: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let mut line: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).unwrap();
            for key in ["ts", "tps", "data_wait_s", "mem_gib"] {
                line.remove(key);
            }
            serde_json::Value::Object(line).to_string()
        })
        .collect()
}

/// Names in the folder of checkpoints.
pub fn checkpoints(out: &Path) -> Vec<String> {
    Disk::default().list(&out.join("checkpoints")).unwrap()
}

/// A folder for the test, in memory where the system offers it: these tests flush to disk thousands of times.
pub fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

/// What an undisturbed run leaves: metrics and the bits of all state.
pub fn undisturbed() -> (Vec<String>, Vec<u32>) {
    let dir = folder();
    let out = dir.path().join("out");
    let mut job = Job::new(&out);
    job.run().unwrap();
    (metrics(&out), job.toy.bits())
}
