//! `metrics.jsonl`: one JSON object a line for every logged step and every evaluation, in order and without duplicates.
//!
//! A run that resumes from step n first removes every line past n, and whatever a killed writer left of its last line.

use std::io::{BufRead, BufReader};
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{IoContext, Result};
use crate::files::disk::{Disk, File};

/// Name of the file in the output folder.
pub const FILE: &str = "metrics.jsonl";

/// The open file.
pub struct Metrics {
    file: File,
}

impl Metrics {
    /// Opens the metrics of output folder `out` to go on after step `restored`; with None everything in it is removed.
    pub fn open(disk: &Disk, out: &Path, restored: Option<u64>) -> Result<Self> {
        let path = out.join(FILE);
        let mut file = disk.append(&path)?;
        let keep = match restored {
            Some(step) => length_up_to(&mut file, step).at(&path, "cannot read")?,
            None => 0,
        };
        if file.size()? > keep {
            file.truncate(keep)?;
            file.sync()?;
        }
        Ok(Metrics { file })
    }

    /// Appends one line.
    pub fn write(&mut self, line: Map<String, Value>) -> Result<()> {
        let mut text = Value::Object(line).to_string();
        text.push('\n');
        self.file.put(text.as_bytes())
    }

    /// Makes every line so far durable; a checkpoint must not outlive the lines before it.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync()
    }
}

/// Bytes of the leading lines that are whole and belong to a step up to `step`.
fn length_up_to(file: &mut File, step: u64) -> std::io::Result<u64> {
    let mut reader = BufReader::new(file);
    let (mut length, mut line) = (0, Vec::new());
    loop {
        line.clear();
        let n = reader.read_until(b'\n', &mut line)?;
        let of_step = serde_json::from_slice::<Value>(&line).ok().and_then(|v| v["step"].as_u64());
        if line.last() != Some(&b'\n') || of_step.is_none_or(|s| s > step) {
            break;
        }
        length += n as u64;
    }
    Ok(length)
}
