//! Measurements for users: how fast steps, kernels, data, encoding and search are on this machine, with what it takes to repeat them.
//!
//! Every case is one JSON object: `case` says what was timed, `ms` is the median time of one piece of it, and the rest are rates and the
//! circumstances ([`Report`]). [`compare`] sets two files of such lines side by side.

pub mod breakdown;
pub mod ceiling;
pub mod compare;
pub mod data;
pub mod encode;
pub mod environment;
pub mod flame;
pub mod kernels;
pub mod pairs;
pub mod search;
pub mod step;
pub mod work;
pub mod workload;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use serde_json::{Map, Value, json};

use crate::device::{Device, cpu};
use crate::error::{IoContext, Result};
use crate::train::target::Target;
use environment::Watch;

/// Where the results of a command go: rows of a table to the user, objects to a file of JSON lines.
pub struct Report<'a> {
    say: &'a (dyn Fn(&str) -> Result<()> + Sync),
    json: Option<(PathBuf, File)>,
    facts: Map<String, Value>,
    watch: Watch,
    warn: &'a (dyn Fn(&str) + Sync),
}

impl<'a> Report<'a> {
    /// A report to `say`, and to the end of the file `json`, where one is named. `facts` are part of every object. What makes a measurement
    /// doubtful goes to `warn`.
    ///
    /// # Errors
    /// A file that cannot be opened: better known before an hour of measuring than after it.
    pub fn new(
        say: &'a (dyn Fn(&str) -> Result<()> + Sync),
        warn: &'a (dyn Fn(&str) + Sync),
        json: Option<PathBuf>,
        facts: Value,
    ) -> Result<Self> {
        // The emulator is a GPU whose clocks nobody sets.
        let with_gpu = !facts["driver"].is_null();
        let facts = facts.as_object().cloned().unwrap_or_default();
        let open = |path: PathBuf| {
            let file = File::options().create(true).append(true).open(&path).at(&path, "cannot open")?;
            Ok((path, file))
        };
        Ok(Report { say, json: json.map(open).transpose()?, facts, watch: Watch::new(with_gpu), warn })
    }

    /// Tells a line.
    ///
    /// # Errors
    /// A failed write.
    pub fn say(&self, text: &str) -> Result<()> {
        (self.say)(text)
    }

    /// Tells the head of a table; the first column is text, the others are numbers.
    ///
    /// # Errors
    /// A failed write.
    pub fn head(&self, columns: &[&str]) -> Result<()> {
        self.say(&format!("| {} |\n| --- |{}", columns.join(" | "), " ---: |".repeat(columns.len() - 1)))
    }

    /// Tells a row of a table.
    ///
    /// # Errors
    /// A failed write.
    pub fn row(&self, cells: &[String]) -> Result<()> {
        self.say(&format!("| {} |", cells.join(" | ")))
    }

    /// Tells a row of a table, and keeps the object of its case together with the facts of the command.
    ///
    /// # Errors
    /// A failed write.
    pub fn case(&self, cells: &[String], line: Value) -> Result<()> {
        self.row(cells)?;
        let (environment, warnings) = self.watch.environment();
        warnings.iter().for_each(|warning| (self.warn)(warning));
        let Some((path, mut file)) = self.json.as_ref().map(|(path, file)| (path, file)) else { return Ok(()) };
        let mut line = line.as_object().cloned().unwrap_or_default();
        line.insert("environment".to_string(), environment);
        for (name, fact) in &self.facts {
            line.entry(name.clone()).or_insert_with(|| fact.clone());
        }
        file.write_all(format!("{}\n", Value::Object(line)).as_bytes()).at(path, "cannot write")
    }
}

/// What one must know to repeat a measurement on `target`: the command, the engine, the machine.
pub fn facts(bench: &str, target: &Target) -> Value {
    let mut facts = machine(bench);
    let software = match target.device {
        Device::Cpu => None,
        Device::Gpu(gpu) => Some(gpu.facts().software.clone()),
    };
    facts["device"] = json!(target.words);
    facts["device_name"] = json!(target.device.name());
    facts["precision"] = json!(target.precision());
    let part = |prefix: &str| {
        let all = software.as_deref().unwrap_or_default().split(", ");
        all.into_iter().find_map(|part| part.strip_prefix(prefix)).map(str::to_string)
    };
    facts["driver"] = json!(part("driver "));
    facts["cublaslt"] = json!(part("cuBLASLt "));
    facts
}

/// The same of what runs on the processor alone.
pub fn machine(bench: &str) -> Value {
    let threads = rayon::current_num_threads();
    let (commit, dirty) = environment::commit();
    json!({
        "bench": bench, "device": format!("CPU with {threads} threads"), "device_name": cpu::processor(), "processor": cpu::processor(),
        "threads": threads, "engine": env!("CARGO_PKG_VERSION"), "commit": commit, "dirty": dirty,

        "command": std::env::args().collect::<Vec<_>>().join(" "),
    })
}

/// The most memory of this process that was resident so far, in MiB.
fn peak_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib / 1024)
}

/// Milliseconds between two moments, sorted; the median, and the times that a tenth of them keep below and above.
#[derive(Clone, Debug)]
pub struct Times(Vec<f64>);

impl Times {
    /// Of these times, of which there is at least one.
    pub fn new(mut milliseconds: Vec<f64>) -> Self {
        milliseconds.sort_by(f64::total_cmp);
        Times(milliseconds)
    }

    /// The time at this part of them.
    pub fn at(&self, part: f64) -> f64 {
        let last = self.0.len().saturating_sub(1);
        self.0.get(((self.0.len() as f64 * part) as usize).min(last)).copied().unwrap_or(f64::NAN)
    }

    /// The median.
    pub fn median(&self) -> f64 {
        self.at(0.5)
    }

    /// The median and the spread under the names of results.
    pub fn describe(&self, line: &mut Value) {
        line["ms"] = json!(self.median());
        line["ms_p10"] = json!(self.at(0.1));
        line["ms_p90"] = json!(self.at(0.9));
        line["repeats"] = json!(self.0.len());
    }
}
