//! Where the time of a step went, from the results of `bench step --breakdown --json FILE`: a bar a stage, with its floor.

use std::fmt::Write;
use std::path::Path;

use serde_json::{Map, Value};

use super::html::{escaped, figure, shortened, table, whole};
use crate::error::{Error, IoContext, Result};

/// Cases that are shown, the last ones of the file.
const MOST: usize = 6;

/// One stage.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// Its name.
    pub name: String,
    /// Launches; on the CPU ops.
    pub launches: u64,
    /// Milliseconds.
    pub ms: f64,
    /// The least it could take.
    pub floor: Option<f64>,
}

/// A case.
#[derive(Clone, Debug, PartialEq)]
pub struct Breakdown {
    /// What was timed.
    pub case: String,
    /// On which device.
    pub device: String,
    /// Milliseconds of the step as in training.
    pub recorded: f64,
    /// Its stages.
    pub stages: Vec<Stage>,
}

/// Reads the cases of `path` that have a breakdown.
///
/// # Errors
/// A damaged line, or no such case.
pub fn read(path: &Path) -> Result<Vec<Breakdown>> {
    let text = std::fs::read_to_string(path).at(path, "cannot read")?;
    let mut found = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let damaged = |cause: &str| {
            Error::refused(cause)
                .path(path)
                .line(i as u64 + 1)
                .remedy("give a file that bench step --breakdown --json wrote")
        };
        let line: Map<String, Value> = serde_json::from_str(line).map_err(|_| damaged("the line is no JSON object"))?;
        if let Some(breakdown) = line.get("breakdown") {
            found.push(case(&line, breakdown).ok_or_else(|| damaged("the breakdown has no stages"))?);
        }
    }
    if found.is_empty() {
        let remedy = "give a file that bench step --breakdown --json wrote";
        return Err(Error::refused("holds no breakdown of a step").path(path).remedy(remedy));
    }
    Ok(found.split_off(found.len().saturating_sub(MOST)))
}

fn case(line: &Map<String, Value>, breakdown: &Value) -> Option<Breakdown> {
    let text = |key: &str| line.get(key).and_then(Value::as_str).unwrap_or_default().to_string();
    let stage = |stage: &Value| {
        Some(Stage {
            name: stage["stage"].as_str()?.to_string(),
            launches: stage["launches"].as_u64().unwrap_or(0),
            ms: stage["ms"].as_f64().filter(|ms| *ms >= 0.0)?,
            floor: stage["floor_ms"].as_f64(),
        })
    };
    let stages = breakdown["stages"].as_array()?.iter().map(stage).collect::<Option<Vec<_>>>()?;
    let device = [text("device"), text("device_name")].into_iter().find(|text| !text.is_empty()).unwrap_or_default();
    let recorded = breakdown["recorded_ms"].as_f64().unwrap_or(f64::NAN);
    (!stages.is_empty()).then(|| Breakdown { case: text("case"), device, recorded, stages })
}

/// Size of the drawing and of a row.
const WIDTH: f64 = 480.0;
const ROW: f64 = 36.0;

impl Breakdown {
    /// The case with its table.
    pub fn figure(&self, id: &str) -> String {
        let sum: f64 = self.stages.iter().map(|stage| stage.ms).sum();
        let share = |stage: &Stage| format!("{:.1} %", 100.0 * stage.ms / sum.max(f64::MIN_POSITIVE));
        let head = ["stage", "launches", "ms", "share", "floor ms"].map(String::from);
        let rows: Vec<Vec<String>> = self
            .stages
            .iter()
            .map(|stage| {
                let floor = stage.floor.map(figure).unwrap_or_default();
                vec![stage.name.clone(), whole(stage.launches as f64), figure(stage.ms), share(stage), floor]
            })
            .collect();
        format!(
            "<figure class=\"chart\">\n{}<figcaption><strong>{}</strong> <span class=\"key\">{}</span> <span class=\"key\">step as in \
             training <b>{} ms</b>, stages <b>{} ms</b>; the mark on a bar is the stage’s floor</span></figcaption>\n\
             <details><summary>Figures</summary>\n{}</details>\n</figure>\n",
            self.svg(id, sum),
            escaped(&self.case),
            escaped(&self.device),
            figure(self.recorded),
            figure(sum),
            table(&head, &rows)
        )
    }

    fn svg(&self, id: &str, sum: f64) -> String {
        let height = self.stages.len() as f64 * ROW + 8.0;
        let longest = self.stages.iter().flat_map(|stage| [stage.ms, stage.floor.unwrap_or(0.0)]).fold(0.0, f64::max);
        let scale = (WIDTH - 8.0) / longest.max(f64::MIN_POSITIVE);
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-labelledby=\"{id}-t {id}-d\">\n\
             <title id=\"{id}-t\">{}</title>\n<desc id=\"{id}-d\">Milliseconds of {} stages, {} in all.</desc>\n",
            escaped(&format!("Stages of {}", self.case)),
            self.stages.len(),
            figure(sum)
        );
        for (i, stage) in self.stages.iter().enumerate() {
            let y = i as f64 * ROW;
            // Writing to a string does not fail.
            let _ = writeln!(
                out,
                "<text class=\"name\" x=\"0\" y=\"{:.1}\">{}</text><text class=\"end\" x=\"{WIDTH}\" y=\"{:.1}\">{} ms, {:.1} %</text>\
                 <rect class=\"bar\" x=\"0\" y=\"{:.1}\" width=\"{:.1}\" height=\"12\" rx=\"2\"/>",
                y + 14.0,
                escaped(&shortened(&stage.name, 38)),
                y + 14.0,
                figure(stage.ms),
                100.0 * stage.ms / sum.max(f64::MIN_POSITIVE),
                y + 19.0,
                (stage.ms * scale).max(0.5)
            );
            if let Some(floor) = stage.floor {
                let _ = writeln!(
                    out,
                    "<path class=\"floor\" d=\"M{:.1} {:.1}v18\"><title>floor {} ms</title></path>",
                    (floor * scale).max(1.0),
                    y + 16.0,
                    figure(floor)
                );
            }
        }
        out.push_str("</svg>\n");
        out
    }
}
