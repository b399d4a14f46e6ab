//! Two files of results side by side.

use std::path::Path;

use serde_json::Value;

use super::Times;
use crate::error::{Error, IoContext, Result};

/// The runs of a case.
struct Case {
    name: String,
    times: Vec<f64>,
    /// The device's name, and the device with its software or threads.
    device: (String, String),
}

/// A case that both files have.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// What was timed.
    pub case: String,
    /// Median milliseconds of its runs in either file.
    pub ms: [f64; 2],
    /// Whether it was timed on two devices.
    pub devices_differ: bool,
}

impl Pair {
    /// How many times the first file's milliseconds the second's are: above 1 it became slower.
    pub fn ratio(&self) -> f64 {
        self.ms[1] / self.ms[0]
    }
}

/// What two files have in common.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    /// Cases of both, in the order of the first.
    pub pairs: Vec<Pair>,
    /// Cases of one file alone, and other things worth telling.
    pub notes: Vec<String>,
}

impl Comparison {
    /// Compares two files of JSON lines. Several runs of a case count as their median. Other devices are refused unless `any_device`.
    ///
    /// # Errors
    /// A file that cannot be read, a line that is no result, no common case, or results of different devices.
    pub fn of([a, b]: [&Path; 2], any_device: bool) -> Result<Comparison> {
        let (first, second) = (read(a)?, read(b)?);
        let mut done = Comparison::default();
        let mut differing = Vec::new();
        for case in &first {
            let Some(other) = second.iter().find(|other| other.name == case.name) else { continue };
            let (devices_differ, ms) = (case.device.0 != other.device.0, [case, other].map(|c| median(&c.times)));
            if case.device != other.device && !differing.contains(&(&case.device.1, &other.device.1)) {
                differing.push((&case.device.1, &other.device.1));
            }
            done.pairs.push(Pair { case: case.name.clone(), ms, devices_differ });
        }
        if done.pairs.is_empty() {
            let example = |cases: &[Case]| cases.first().map_or("nothing", |case| &case.name).to_string();
            let cause =
                format!("no case in common with {}: {} against {}", a.display(), example(&second), example(&first));
            return Err(Error::refused(cause)
                .path(b)
                .remedy("compare runs of one command with one model and precision"));
        }
        if let Some(pair) = done.pairs.iter().find(|pair| pair.devices_differ).filter(|_| !any_device) {
            let name = |cases: &[Case]| {
                cases.iter().find(|c| c.name == pair.case).map(|c| c.device.0.clone()).unwrap_or_default()
            };
            let cause = format!("{} was timed on {}, in {} on {}", pair.case, name(&second), a.display(), name(&first));
            return Err(Error::refused(cause).path(b).remedy("run both on one device, or add --any-device"));
        }
        done.notes.extend(differing.into_iter().map(|(a, b)| format!("note: {a} against {b}")));
        for (path, cases, others) in [(a, &first, &second), (b, &second, &first)] {
            let alone: Vec<&str> =
                cases.iter().filter(|c| others.iter().all(|o| o.name != c.name)).map(|c| c.name.as_str()).collect();
            if !alone.is_empty() {
                done.notes.push(format!("note: only in {}: {}", path.display(), alone.join(", ")));
            }
        }
        Ok(done)
    }

    /// The case that lost most, if one lost more than so many percent.
    ///
    /// # Errors
    /// That case.
    pub fn check(&self, fail_above: f64) -> Result<()> {
        let worst = self.pairs.iter().max_by(|a, b| a.ratio().total_cmp(&b.ratio()));
        let Some(worst) = worst.filter(|pair| !((pair.ratio() - 1.0) * 100.0 <= fail_above)) else { return Ok(()) };
        let [a, b] = worst.ms;
        let lost = (worst.ratio() - 1.0) * 100.0;
        let cause = format!("{} takes {lost:.1} % longer, {a:.4} ms before and {b:.4} ms now", worst.case);
        Err(Error::refused(cause).remedy(format!("find out why, or allow more than --fail-above {fail_above}")))
    }
}

fn median(times: &[f64]) -> f64 {
    Times::new(times.to_vec()).median()
}

/// The cases of a file, each with all its runs.
fn read(path: &Path) -> Result<Vec<Case>> {
    let text = std::fs::read_to_string(path).at(path, "cannot read")?;
    let mut cases: Vec<Case> = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let refused = |cause: String| {
            Err(Error::refused(cause).path(path).line(i as u64 + 1).remedy("give a file that `bench --json` wrote"))
        };
        let value: Value = match serde_json::from_str(line) {
            Ok(value) => value,
            Err(e) => return refused(format!("no JSON object: {e}")),
        };
        // Other programs' results may stand between the engine's.
        let Some(name) = value["case"].as_str() else { continue };
        let Some(ms) = value["ms"].as_f64().filter(|ms| *ms > 0.0) else {
            return refused(format!("{name} has no time: ms is {}", value["ms"]));
        };
        let word = |name: &str| value[name].as_str().unwrap_or("an unknown device").to_string();
        match cases.iter_mut().find(|case| case.name == name) {
            Some(case) => case.times.push(ms),
            None => {
                let device = (word("device_name"), word("device"));
                cases.push(Case { name: name.into(), times: vec![ms], device });
            }
        }
    }
    if cases.is_empty() {
        return Err(Error::refused("holds no results").path(path).remedy("give a file that `bench --json` wrote"));
    }
    Ok(cases)
}
