//! The page: a summary, curves of all runs over each other, settings, environment, checkpoints, interruptions, masks, stages of a step.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::breakdown::Breakdown;
use super::chart::{Chart, Curve, Kind};
use super::history::{History, Series};
use super::html::{escaped, figure, moment, shortened, table, whole};
use super::masks::Masks;
use super::run::{Run, Status};
use crate::train::checkpoint::{Best, LOSS};
use crate::train::progress::{bytes, human};

/// The page's style.
const STYLE: &str = include_str!("page.css");
/// Points of all curves, so that the page stays below a megabyte; each is about eleven bytes.
const POINTS: usize = 60_000;
/// Columns of a curve at most: more than a chart has pixels on a usual screen.
const COLUMNS: usize = 420;
/// Rows of a list of skipped steps of one run.
const SKIPPED: usize = 20;
/// Masks that are drawn, of runs whose masks differ.
const PICTURES: usize = 3;

/// The whole page of `runs`, with the stages of steps that were measured.
pub fn page(runs: &[Run], breakdowns: &[Breakdown]) -> String {
    let names = runs.iter().map(|run| run.name.as_str()).collect::<Vec<_>>().join(", ");
    let title = escaped(&shortened(&names, 120));
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\" xmlns=\"http://www.w3.org/1999/xhtml\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>\n\
         <title>Training report: {title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<header><h1>Training report</h1>\n"
    );
    let sections = [
        ("summary", "Summary", summary(runs)),
        ("training", "Training", charts(runs, &training(runs))),
        ("evaluation", "Dev set", charts(runs, &judged(runs))),
        ("settings", "Settings", settings(runs)),
        ("environment", "Environment", environment(runs)),
        ("checkpoints", "Checkpoints", checkpoints(runs)),
        ("interruptions", "Starts and skipped steps", interruptions(runs)),
        ("masks", "Masks", masks(runs)),
        ("stages", "Stages of a step", stages(breakdowns)),
    ];
    let there = || sections.iter().filter(|section| !section.2.is_empty());
    out.push_str("<nav aria-label=\"Sections\">");
    for (id, name, _) in there() {
        // Writing to a string does not fail.
        let _ = write!(out, "<a href=\"#{id}\">{name}</a> ");
    }
    out.push_str("</nav></header>\n<main>\n");
    for (id, name, body) in there() {
        let _ = writeln!(out, "<section id=\"{id}\"><h2>{name}</h2>\n{body}</section>");
    }
    let version = env!("CARGO_PKG_VERSION");
    let _ = writeln!(
        out,
        "</main>\n<footer><p>Drawn by retromae-engine {version} from the folders of the runs.</p></footer>\n</body>\n</html>"
    );
    out
}

/// A figure that a chart is of: in which lines, under which name, and the chart's title.
struct Panel {
    title: String,
    train: Option<String>,
    eval: Option<String>,
}

/// The name of a part of the loss or of an accuracy.
fn part(short: &str) -> &str {
    match short {
        "enc" => "encoder",
        "dec" => "decoder",
        "bow" => "bag of words",
        "distill" => "distillation",
        other => other,
    }
}

/// Names with this prefix in any run, those of pre-training first; parts that are the whole loss of every run they occur in left out.
fn parts(runs: &[Run], prefix: &str) -> Vec<String> {
    let of = |run: &Run| -> BTreeSet<String> {
        let both = run.history.train.keys().chain(run.history.eval.keys());
        both.filter(|key| key.starts_with(prefix)).cloned().collect()
    };
    let all: Vec<BTreeSet<String>> = runs.iter().map(of).collect();
    let union: BTreeSet<&String> = all.iter().flatten().collect();
    let tells = |key: &&&String| prefix != "loss_" || all.iter().any(|own| own.contains(**key) && own.len() > 1);
    let mut names: Vec<String> = union.iter().filter(tells).map(|key| (*key).clone()).collect();
    let rank = |key: &str| ["enc", "dec", "bow"].iter().position(|name| key.ends_with(name)).unwrap_or(3);
    names.sort_by_key(|key| rank(key));
    names
}

fn training(runs: &[Run]) -> Vec<Panel> {
    let both = |key: &str, title: String| Panel { title, train: Some(key.into()), eval: Some(key.into()) };
    let train = |key: &str, title: &str| Panel { title: title.into(), train: Some(key.into()), eval: None };
    let mut panels = vec![both("loss", "Loss".into())];
    panels.extend(parts(runs, "loss_").iter().map(|key| both(key, format!("Loss: {}", part(&key[5..])))));
    panels.extend(parts(runs, "acc_").iter().map(|key| both(key, format!("Accuracy: {}", part(&key[4..])))));
    panels.push(train("lr", "Learning rate"));
    panels.push(train("grad_norm", "Gradient norm before clipping"));
    panels.push(train("tps", "Tokens per second"));
    panels
}

/// Figures of evaluations that are no loss and no accuracy.
fn judged(runs: &[Run]) -> Vec<Panel> {
    let keys: BTreeSet<&String> = runs.iter().flat_map(|run| run.history.eval.keys()).collect();
    let metric = |key: &&&String| !key.starts_with("loss") && !key.starts_with("acc_");
    let panel = |key: &&String| Panel { title: (*key).clone(), train: None, eval: Some((*key).clone()) };
    keys.iter().filter(metric).map(panel).collect()
}

/// The charts of `panels` that have anything to show.
fn charts(runs: &[Run], panels: &[Panel]) -> String {
    let several = runs.len() > 1;
    let mut found = Vec::new();
    for (number, panel) in panels.iter().enumerate() {
        let mut curves = Vec::new();
        for (i, run) in runs.iter().enumerate() {
            let label = |what: &str| named(run, several, what);
            if let Some(points) = drawable(&run.history.train, panel.train.as_deref()) {
                let kind = if panel.train.as_deref() == Some("lr") { Kind::Exact } else { Kind::Steps };
                curves.push(Curve { label: label(""), color: i, dash: i, kind, points });
            }
            if let Some(points) = drawable(&run.history.eval, panel.eval.as_deref()) {
                // Of one run the held-out figures have a colour of their own; of several, each keeps its own and is told by its marks.
                let color = if several || panel.train.is_none() { i } else { 1 };
                let label = label(if panel.train.is_some() { "held out" } else { "" });
                curves.push(Curve { label, color, dash: i, kind: Kind::Marks, points });
            }
        }
        if !curves.is_empty() {
            let id = format!("{}{number}", if panel.train.is_some() { "t" } else { "e" });
            let resumed = if several { Vec::new() } else { resumed(&runs[0]) };
            found.push(Chart { id, title: panel.title.clone(), curves, resumed });
        }
    }
    if found.is_empty() {
        return String::new();
    }
    // Two points a column, and a smooth line of half as many points over them.
    let series: usize = found.iter().map(|chart| chart.curves.len()).sum();
    let columns = (POINTS * 2 / 5 / series).clamp(40, COLUMNS);
    let drawn: String = found.iter().map(|chart| chart.figure(columns)).collect();
    let smooth = match panels.iter().any(|panel| panel.train.is_some()) {
        true => {
            "<p class=\"soft\">Lines: logged steps; of many, the thick one is their exponential mean. Marks: evaluations on \
             held-out texts.</p>\n"
        }
        false => "",
    };
    format!("{smooth}<div class=\"charts\">\n{drawn}</div>\n")
}

/// A series that has anything to draw.
fn drawable<'a>(all: &'a BTreeMap<String, Series>, key: Option<&str>) -> Option<&'a Series> {
    all.get(key?).filter(|series| series.iter().any(|point| point.1.is_finite()))
}

/// The label of a curve.
fn named(run: &Run, several: bool, what: &str) -> String {
    match (several, what) {
        (true, "") => run.name.clone(),
        (true, what) => format!("{}, {what}", run.name),
        (false, "") => "this run".into(),
        (false, what) => what.into(),
    }
}

/// Steps from which later processes went on.
fn resumed(run: &Run) -> Vec<u64> {
    run.facts.beginnings.iter().skip(1).map(|beginning| beginning.step).collect()
}

/// Facts by name, a column a run.
fn columns(runs: &[Run], rows: Vec<(&str, Vec<String>)>) -> String {
    let head: Vec<String> = std::iter::once(String::new()).chain(runs.iter().map(|run| run.name.clone())).collect();
    let told = rows.into_iter().filter(|(_, cells)| cells.iter().any(|cell| !cell.is_empty()));
    let rows: Vec<Vec<String>> =
        told.map(|(name, cells)| std::iter::once(name.to_string()).chain(cells).collect()).collect();
    if rows.is_empty() { String::new() } else { table(&head, &rows) }
}

fn each(runs: &[Run], of: impl Fn(&Run) -> String) -> Vec<String> {
    runs.iter().map(of).collect()
}

/// The newest figure of a name, with its step.
fn newest(series: &BTreeMap<String, Series>, name: &str) -> String {
    History::newest(series, name).map(|(step, x)| format!("{} (step {step})", figure(*x))).unwrap_or_default()
}

fn summary(runs: &[Run]) -> String {
    let steps = |run: &Run| {
        let done = run.history.last.map_or(0, |last| last.step);
        match run.total() {
            Some(total) if total != done => format!("{} of {}", whole(done as f64), whole(total as f64)),
            _ => whole(done as f64),
        }
    };
    let status = |run: &Run| match run.facts.status {
        Status::Running(pid) => format!("running, process {pid}"),
        Status::Finished => "finished".into(),
        Status::Stopped => "not finished".into(),
    };
    let last = |run: &Run| run.history.last.unwrap_or_default();
    let mut rows = vec![
        ("objective", each(runs, |run| run.facts.objective().to_string())),
        ("status", each(runs, status)),
        ("steps", each(runs, steps)),
        ("epochs", each(runs, |run| figure(last(run).epoch))),
        ("tokens", each(runs, |run| whole(last(run).tokens as f64))),
        ("training loss", each(runs, |run| newest(&run.history.train, "loss"))),
        ("held-out loss", each(runs, |run| newest(&run.history.eval, "loss"))),
        ("best evaluation", each(runs, |run| run.facts.best().map(best).unwrap_or_default())),
        ("tokens per second", each(runs, |run| median(run.history.train.get("tps")).map(whole).unwrap_or_default())),
        ("time in steps", each(runs, |run| human(Duration::from_secs_f64(run.history.seconds.clamp(0.0, 1e12))))),
        ("first line", each(runs, |run| run.history.first.map(|first| moment(first.ts)).unwrap_or_default())),
        ("last line", each(runs, |run| moment(last(run).ts))),
        ("skipped steps", each(runs, |run| run.history.skipped.len().to_string())),
    ];
    let metrics = judged(runs);
    let at = rows.len() - 6;
    for panel in metrics.iter().rev() {
        let key = panel.eval.as_deref().unwrap_or_default();
        rows.insert(at, (key, each(runs, |run| newest(&run.history.eval, key))));
    }
    let mut out = columns(runs, rows);
    for run in runs {
        for note in &run.facts.notes {
            let _ = writeln!(out, "<p class=\"soft\">{}: {}</p>", escaped(&run.name), escaped(note));
        }
    }
    out
}

fn best(best: &Best) -> String {
    let name = if best.metric == LOSS { "held-out loss" } else { &best.metric };
    format!("{name} {} (step {})", figure(best.value), best.step)
}

/// The median of a series.
fn median(series: Option<&Series>) -> Option<f64> {
    let mut all: Vec<f64> = series?.iter().map(|point| point.1).filter(|x| x.is_finite()).collect();
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied()
}

fn settings(runs: &[Run]) -> String {
    let keys: BTreeSet<&String> = runs.iter().flat_map(|run| run.facts.settings.keys()).collect();
    if keys.is_empty() {
        return String::new();
    }
    let of = |run: &Run, key: &str| run.facts.settings.get(key).cloned();
    let differs = |key: &&&String| runs.iter().any(|run| of(run, key) != of(&runs[0], key));
    let rows = |keys: &[&'_ String]| {
        let cells = |key: &str| each(runs, |run| of(run, key).unwrap_or_else(|| "unset".into()));
        columns(runs, keys.iter().map(|key| (key.as_str(), cells(key))).collect())
    };
    if runs.len() == 1 {
        return rows(&keys.into_iter().collect::<Vec<_>>());
    }
    let (different, same): (Vec<&String>, Vec<&String>) = keys.iter().partition(|key| differs(key));
    let mut out = String::new();
    if different.is_empty() {
        out.push_str("<p>All settings are equal.</p>\n");
    } else {
        let _ = write!(out, "<h3>Different</h3>\n{}", rows(&different));
    }
    let equal: Vec<Vec<String>> =
        same.iter().map(|key| vec![key.to_string(), of(&runs[0], key).unwrap_or_default()]).collect();
    if !equal.is_empty() {
        let head = ["setting", "value"].map(String::from);
        let _ = writeln!(
            out,
            "<details><summary>{} equal settings</summary>\n{}</details>",
            equal.len(),
            table(&head, &equal)
        );
    }
    out
}

fn environment(runs: &[Run]) -> String {
    let identity = |run: &Run, key: &str| run.facts.state().and_then(|state| state.settings.get(key).cloned());
    let about = |run: &Run| run.facts.origin.as_ref().map(|(about, _)| about.clone());
    let most = |run: &Run, key: &str| {
        let all = run.history.train.get(key).into_iter().flatten().map(|point| point.1);
        all.filter(|x| x.is_finite()).fold(None, |most: Option<f64>, x| Some(most.map_or(x, |most| most.max(x))))
    };
    let waited = |run: &Run| {
        let series = run.history.train.get("data_wait_s")?;
        let mean = series.iter().map(|point| point.1).sum::<f64>() / series.len().max(1) as f64;
        Some(format!("{} ms a step", figure(1000.0 * mean)))
    };
    let rows = vec![
        ("folder", each(runs, |run| run.dir.display().to_string())),
        ("engine", each(runs, |run| run.facts.state().map(|state| state.engine.clone()).unwrap_or_default())),
        ("device", each(runs, |run| run.facts.settings.get("device").cloned().unwrap_or_default())),
        ("computed by", each(runs, |run| run.facts.state().map(|state| state.device.clone()).unwrap_or_default())),
        ("precision", each(runs, |run| identity(run, "precision").unwrap_or_default())),
        ("model", each(runs, |run| about(run).map(|a| a.model).or_else(|| identity(run, "model")).unwrap_or_default())),
        ("data", each(runs, |run| about(run).map(|a| a.data).or_else(|| identity(run, "data")).unwrap_or_default())),
        ("most memory", each(runs, |run| most(run, "mem_gib").map(|x| format!("{x:.2} GiB")).unwrap_or_default())),
        ("waiting for data", each(runs, |run| waited(run).unwrap_or_default())),
    ];
    columns(runs, rows)
}

fn checkpoints(runs: &[Run]) -> String {
    let mut rows = Vec::new();
    for run in runs {
        let newest = run.facts.checkpoints.len().saturating_sub(1);
        for (i, saved) in run.facts.checkpoints.iter().enumerate() {
            let mut notes = Vec::new();
            let mut tokens = String::new();
            match &saved.state {
                Ok(state) => {
                    tokens = whole(state.tokens as f64);
                    if let Some(found) = run.facts.best().filter(|best| best.step == state.step) {
                        notes.push(format!("the best: {}", best(found)));
                    }
                }
                Err(error) => notes.push(error.clone()),
            }
            if i == newest {
                notes.push("the newest".into());
            }
            rows.push(vec![saved.name.clone(), run.name.clone(), tokens, bytes(saved.bytes), notes.join("; ")]);
        }
    }
    let head = ["checkpoint", "run", "tokens seen", "size", ""].map(String::from);
    if rows.is_empty() { String::new() } else { table(&head, &rows) }
}

fn interruptions(runs: &[Run]) -> String {
    let (mut starts, mut skipped) = (Vec::new(), Vec::new());
    for run in runs {
        for (i, beginning) in run.facts.beginnings.iter().enumerate() {
            let what = match (i, beginning.step) {
                (0, 0) => "started".to_string(),
                (_, 0) => "started again from step 0".to_string(),
                (_, step) => format!("resumed from step {step}"),
            };
            starts.push(vec![moment(beginning.ts), run.name.clone(), what]);
        }
        if run.facts.beginnings.is_empty() {
            // Without TensorBoard's files a process leaves no trace but the time it was not there.
            for pause in &run.history.pauses {
                let long = human(Duration::from_secs_f64(pause.seconds.clamp(0.0, 1e12)));
                starts.push(vec![
                    format!("step {}", pause.after),
                    run.name.clone(),
                    format!("a pause of {long} after this step"),
                ]);
            }
        }
        let all = &run.history.skipped;
        for step in all.iter().take(SKIPPED) {
            let more = step.count.saturating_sub(step.texts.len());
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let ranks = step.ranks.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
            let texts = format!("{}{more}", step.texts.join(", "));
            skipped.push(vec![step.step.to_string(), run.name.clone(), ranks, texts]);
        }
        if all.len() > SKIPPED {
            let more = format!("{} more steps", all.len() - SKIPPED);
            skipped.push(vec!["…".into(), run.name.clone(), String::new(), more]);
        }
    }
    let mut out = String::new();
    if !starts.is_empty() {
        out += &table(&["when", "run", "what"].map(String::from), &starts);
    }
    if !skipped.is_empty() {
        out.push_str("<h3>Steps whose gradient was not finite</h3>\n");
        out += &table(&["step", "run", "ranks", "texts"].map(String::from), &skipped);
    }
    out
}

fn masks(runs: &[Run]) -> String {
    let (mut out, mut drawn) = (String::new(), Vec::new());
    for run in runs {
        let of = |key: &str| run.facts.settings.get(key).cloned();
        let keys = ["data", "seed", "encoder-mask-probability", "decoder-mask-probability", "max-length", "eval-size"];
        let key = keys.map(of);
        // Runs that differ in nothing of this have the same masks.
        if drawn.contains(&key) || drawn.len() == PICTURES {
            continue;
        }
        match Masks::of(run) {
            Ok(Some(masks)) => {
                let _ = write!(out, "{}", masks.figure(&format!("m{}", drawn.len())));
                drawn.push(key);
            }
            Ok(None) => {}
            Err(cause) => {
                let _ = writeln!(out, "<p class=\"soft\">{}: not drawn, {}</p>", escaped(&run.name), escaped(&cause));
            }
        }
    }
    out
}

fn stages(breakdowns: &[Breakdown]) -> String {
    if breakdowns.is_empty() {
        return String::new();
    }
    let figures: String = breakdowns.iter().enumerate().map(|(i, one)| one.figure(&format!("s{i}"))).collect();
    format!("<div class=\"charts\">\n{figures}</div>\n")
}

/// The summary for programs.
pub fn to_json(runs: &[Run]) -> Value {
    let of = |run: &Run| {
        let mut line = Map::new();
        let last = run.history.last.unwrap_or_default();
        line.insert("run".into(), json!(run.dir));
        line.insert("objective".into(), json!(run.facts.objective()));
        line.insert("finished".into(), json!(run.facts.status == Status::Finished));
        line.insert("step".into(), json!(last.step));
        line.insert("total_steps".into(), json!(run.total()));
        line.insert("tokens".into(), json!(last.tokens));
        line.insert("skipped".into(), json!(run.history.skipped.len()));
        line.insert("tps".into(), json!(median(run.history.train.get("tps"))));
        for (split, series) in [("train", &run.history.train), ("eval", &run.history.eval)] {
            let figures =
                series.iter().filter(|(name, _)| !matches!(name.as_str(), "tps" | "data_wait_s" | "mem_gib" | "lr"));
            let figures: Map<String, Value> =
                figures.filter_map(|(name, points)| Some((name.clone(), json!(points.last()?.1)))).collect();
            line.insert(split.into(), Value::Object(figures));
        }
        Value::Object(line)
    };
    runs.iter().map(of).collect()
}
