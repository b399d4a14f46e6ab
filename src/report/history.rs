//! What `metrics.jsonl` of a run tells: series of figures by name, skipped steps, pauses; read once, or followed while it grows.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, IoContext, Result};
use crate::train::metrics::FILE;

/// Longest line that is read: that of a skipped step names every text of it.
const LONGEST: u64 = 16 << 20;

/// Ids of a skipped step that are kept to be shown.
pub const SHOWN: usize = 8;

/// Figures by step; one that was not finite is NaN.
pub type Series = Vec<(u64, f64)>;

/// Where a run was at one line.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mark {
    /// Seconds since 1970.
    pub ts: f64,
    /// Steps done.
    pub step: u64,
    /// Passes over the data.
    pub epoch: f64,
    /// Tokens seen.
    pub tokens: u64,
}

/// A step without a finite gradient.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Skipped {
    /// Which.
    pub step: u64,
    /// Ids of its first [`SHOWN`] texts.
    pub texts: Vec<String>,
    /// Texts it had.
    pub count: usize,
    /// Ranks whose gradient was to blame, where there are several.
    pub ranks: Vec<u64>,
}

/// Time in which a run did not run, as far as its rates tell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pause {
    /// After this logged step.
    pub after: u64,
    /// Seconds.
    pub seconds: f64,
}

/// All lines so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// Figures of logged steps, under the names of the file.
    pub train: BTreeMap<String, Series>,
    /// Figures of evaluations.
    pub eval: BTreeMap<String, Series>,
    /// Skipped steps.
    pub skipped: Vec<Skipped>,
    /// Pauses longer than rates and clocks can be wrong by.
    pub pauses: Vec<Pause>,
    /// The first line.
    pub first: Option<Mark>,
    /// The last line.
    pub last: Option<Mark>,
    /// Seconds of the logged steps, pauses left out.
    pub seconds: f64,
    last_train: Option<Mark>,
}

impl History {
    /// Reads the metrics of the run in `dir`.
    ///
    /// # Errors
    /// No such file, one without a line, or a damaged line.
    pub fn read(dir: &Path) -> Result<History> {
        let path = dir.join(FILE);
        let mut follower = Follower::new(dir);
        follower.poll()?;
        if !follower.exists {
            let cause = if dir.is_dir() { "no run is there: it has no metrics.jsonl" } else { "no run is there" };
            return Err(Error::refused(cause).path(dir).remedy("give the folder that train --output named"));
        }
        if follower.history.last.is_none() {
            return Err(Error::refused("holds no line yet").path(path).remedy("let train log its first step"));
        }
        Ok(follower.history)
    }

    /// The newest figure of this name and its step.
    pub fn newest<'a>(series: &'a BTreeMap<String, Series>, name: &str) -> Option<&'a (u64, f64)> {
        series.get(name)?.last()
    }

    fn add(&mut self, line: Map<String, Value>) -> std::result::Result<(), String> {
        let number = |key: &str| line.get(key).and_then(Value::as_u64);
        let step = number("step").ok_or("has no step")?;
        let split = line.get("split").and_then(Value::as_str).ok_or("has no split")?;
        if self.last.is_some_and(|last| step < last.step) {
            return Err(format!("is of step {step} after one of step {}", self.last.map_or(0, |last| last.step)));
        }
        let real = |key: &str| line.get(key).and_then(Value::as_f64);
        let mark = Mark {
            ts: real("ts").unwrap_or(0.0),
            step,
            epoch: real("epoch").unwrap_or(0.0),
            tokens: number("tokens").unwrap_or(0),
        };
        let train = split != "eval";
        let series = if train { &mut self.train } else { &mut self.eval };
        for (key, value) in &line {
            let figure = match value {
                Value::Number(x) => x.as_f64().unwrap_or(f64::NAN),
                Value::Null => f64::NAN,
                _ => continue,
            };
            if !matches!(key.as_str(), "ts" | "step" | "epoch" | "tokens" | "labels") {
                series.entry(key.clone()).or_default().push((step, figure));
            }
        }
        if line.get("skipped") == Some(&Value::Bool(true)) {
            let texts = line.get("texts").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            let shown = texts.iter().take(SHOWN).map(|id| id.as_str().map_or(id.to_string(), str::to_string));
            let ranks = line.get("ranks").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_u64);
            self.skipped.push(Skipped { step, texts: shown.collect(), count: texts.len(), ranks: ranks.collect() });
        }
        if train {
            self.pause(mark, real("tps").unwrap_or(0.0));
            self.last_train = Some(mark);
        }
        self.first = self.first.or(Some(mark));
        self.last = Some(mark);
        Ok(())
    }

    /// A rate is that since the line before, or since its process began: what is left of the time between two lines is a pause.
    fn pause(&mut self, mark: Mark, rate: f64) {
        let Some(last) = self.last_train else {
            self.seconds += if rate > 0.0 { mark.tokens as f64 / rate } else { 0.0 };
            return;
        };
        let wall = mark.ts - last.ts;
        let tokens = mark.tokens.saturating_sub(last.tokens) as f64;
        let run = if rate > 0.0 { tokens / rate } else { wall };
        // Rates are written as whole numbers.
        let doubt = 1.0 + run * (0.02 + 0.5 / rate.max(0.5));
        if wall - run > doubt {
            self.pauses.push(Pause { after: last.step, seconds: wall - run });
            self.seconds += run;
        } else {
            self.seconds += wall.max(0.0);
        }
    }
}

/// Reads the metrics of a run again and again, each time only what is new; from the beginning where what was read is not there any more,
/// as after a resume.
#[derive(Debug, Default)]
pub struct Follower {
    path: PathBuf,
    /// What was read so far.
    pub history: History,
    /// Whether there is such a file.
    pub exists: bool,
    inode: u64,
    offset: u64,
    lines: u64,
    /// The last line read, with its end.
    newest: Vec<u8>,
}

impl Follower {
    /// Of the run in `dir`, before anything is read.
    pub fn new(dir: &Path) -> Follower {
        Follower { path: dir.join(FILE), ..Follower::default() }
    }

    /// Reads what is new; says whether anything was. A last line without its end is left for the next time: its writer is at it, or was
    /// killed at it.
    ///
    /// # Errors
    /// A damaged line, or a failure of the system.
    pub fn poll(&mut self) -> Result<bool> {
        let path = self.path.clone();
        let mut file = match File::open(&path) {
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                let had = self.exists;
                *self = Follower { path, ..Follower::default() };
                return Ok(had);
            }
            other => other.at(&path, "cannot open")?,
        };
        let known = self.is_known(&mut file).at(&path, "cannot read")?;
        let inode = file.metadata().at(&path, "cannot read")?.ino();
        let mut changed = !self.exists;
        if !known {
            *self = Follower { path: path.clone(), ..Follower::default() };
            changed = true;
        }
        (self.exists, self.inode) = (true, inode);
        file.seek(SeekFrom::Start(self.offset)).at(&path, "cannot read")?;
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let n = (&mut reader).take(LONGEST).read_until(b'\n', &mut line).at(&path, "cannot read")? as u64;
            if line.last() != Some(&b'\n') {
                if n == LONGEST {
                    return Err(self.damaged(format!("is longer than {} MiB", LONGEST >> 20)));
                }
                return Ok(changed);
            }
            let parsed = serde_json::from_slice::<Map<String, Value>>(&line);
            let parsed = parsed.map_err(|_| "is no JSON object".to_string());
            if let Err(cause) = parsed.and_then(|map| self.history.add(map)) {
                return Err(self.damaged(cause));
            }
            self.offset += n;
            self.lines += 1;
            self.newest.clone_from(&line);
            changed = true;
        }
    }

    /// Whether what was read still stands where it stood.
    fn is_known(&self, file: &mut File) -> std::io::Result<bool> {
        if !self.exists {
            return Ok(true);
        }
        let meta = file.metadata()?;
        if meta.ino() != self.inode || meta.len() < self.offset {
            return Ok(false);
        }
        let mut now = vec![0; self.newest.len()];
        file.seek(SeekFrom::Start(self.offset - self.newest.len() as u64))?;
        file.read_exact(&mut now)?;
        Ok(now == self.newest)
    }

    fn damaged(&self, cause: String) -> Error {
        Error::refused(format!("the line {cause}"))
            .path(&self.path)
            .line(self.lines + 1)
            .remedy("remove the line, or resume the run from a checkpoint before it, which cuts the file there")
    }
}
