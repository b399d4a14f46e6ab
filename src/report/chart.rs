//! Curves as an SVG picture: raw points thin, a smooth line over them, marks of evaluations; long series by least and greatest figure of
//! each column.

use std::fmt::Write;

use super::history::Series;
use super::html::{escaped, figure, shortened, table};
use super::scale::Scale;

/// Size of the drawing, and what is left around the curves. Small enough that a phone shows its letters at two thirds of their size.
const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 54.0;
const RIGHT: f64 = 18.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 34.0;

/// Series of fewer points are not smoothed.
const SMOOTHED_FROM: usize = 60;
/// Rows of the table of figures.
const ROWS: usize = 10;

/// How a series is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Many points: thin, with a smooth line over them.
    Steps,
    /// Points without noise, as those of a schedule.
    Exact,
    /// Few points, each marked.
    Marks,
}

/// One series.
#[derive(Clone, Debug)]
pub struct Curve<'a> {
    /// What it is called.
    pub label: String,
    /// Number of its colour.
    pub color: usize,
    /// Number of its dash.
    pub dash: usize,
    /// How it is drawn.
    pub kind: Kind,
    /// Its figures by step.
    pub points: &'a Series,
}

/// A picture of series over steps.
#[derive(Clone, Debug)]
pub struct Chart<'a> {
    /// Its name among the ids of the page.
    pub id: String,
    /// What it shows.
    pub title: String,
    /// Its curves.
    pub curves: Vec<Curve<'a>>,
    /// Steps from which a run was resumed.
    pub resumed: Vec<u64>,
}

/// Dashes, from the second on.
const DASHES: [&str; 4] = ["", "6 6", "1 5", "10 5 1 5"];
/// Colours of the page's style, which has one class each.
pub const COLORS: usize = 8;

/// Attributes of a curve's line.
pub fn stroke(color: usize, dash: usize) -> String {
    match DASHES[dash % DASHES.len()] {
        "" => format!("class=\"l c{}\"", color % COLORS),
        dashes => format!("class=\"l c{}\" stroke-dasharray=\"{dashes}\"", color % COLORS),
    }
}

impl Chart<'_> {
    /// The chart with its legend and its table of figures. Series are drawn in `columns` columns.
    pub fn figure(&self, columns: usize) -> String {
        let mut out = format!("<figure class=\"chart\">\n{}", self.svg(columns));
        let _ = write!(out, "<figcaption><strong>{}</strong>", escaped(&self.title));
        for curve in &self.curves {
            let last = curve.points.last().map_or(f64::NAN, |point| point.1);
            let _ = write!(
                out,
                " <span class=\"key\">{}{} <b>{}</b></span>",
                swatch(curve),
                escaped(&shortened(&curve.label, 60)),
                figure(last)
            );
        }
        let _ =
            write!(out, "</figcaption>\n<details><summary>Figures</summary>\n{}</details>\n</figure>\n", self.table());
        out
    }

    /// The picture.
    pub fn svg(&self, columns: usize) -> String {
        let last = self.curves.iter().filter_map(|curve| curve.points.last()).map(|point| point.0).max().unwrap_or(0);
        let x = Scale::steps(last);
        let y = Scale::of(self.curves.iter().flat_map(|curve| curve.points.iter().map(|point| point.1)));
        let (id, title) = (&self.id, escaped(&self.title));
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-labelledby=\"{id}-t {id}-d\">\n\
             <title id=\"{id}-t\">{title}</title>\n<desc id=\"{id}-d\">{}</desc>\n",
            escaped(&self.description(last, y.is_log()))
        );
        axes(&mut out, x, y);
        for step in self.resumed.iter().filter(|step| **step <= last) {
            let at = LEFT + x.at(*step as f64) * (WIDTH - LEFT - RIGHT);
            let bottom = HEIGHT - BOTTOM;
            let _ = writeln!(
                out,
                "<path class=\"resumed\" d=\"M{at:.1} {TOP}V{bottom}\"><title>resumed from step {step}</title></path>"
            );
        }
        let place = |(step, figure): &(u64, f64)| {
            let (u, v) = (x.at(*step as f64), y.at(*figure));
            (LEFT + u * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - v * (HEIGHT - TOP - BOTTOM))
        };
        for curve in &self.curves {
            let points: Vec<(f64, f64)> = curve.points.iter().map(place).collect();
            draw(&mut out, curve, &points, columns);
        }
        out.push_str("</svg>\n");
        out
    }

    fn description(&self, last: u64, log: bool) -> String {
        let mut text = format!("Steps 0 to {last}{}.", if log { ", logarithmic" } else { "" });
        for curve in &self.curves {
            let finite = || curve.points.iter().filter(|point| point.1.is_finite());
            let ends = [curve.points.first(), curve.points.last()].map(|point| point.map_or(f64::NAN, |point| point.1));
            let least = finite().min_by(|a, b| a.1.total_cmp(&b.1));
            let most = finite().max_by(|a, b| a.1.total_cmp(&b.1));
            let _ = write!(text, " {}: first {}, last {}", curve.label, figure(ends[0]), figure(ends[1]));
            if let (Some(least), Some(most)) = (least, most) {
                let [low, high] = [least, most].map(|point| figure(point.1));
                let _ = write!(text, ", lowest {low} at step {}, highest {high} at step {}", least.0, most.0);
            }
            text.push('.');
        }
        text
    }

    /// Some of the figures, over the whole of the series.
    fn table(&self) -> String {
        let mut steps: Vec<u64> =
            self.curves.iter().flat_map(|curve| curve.points.iter().map(|point| point.0)).collect();
        steps.sort_unstable();
        steps.dedup();
        let last = steps.len().saturating_sub(1);
        let rows = ROWS.min(steps.len());
        let mut chosen: Vec<u64> = (0..rows).map(|i| steps[i * last / (rows - 1).max(1)]).collect();
        chosen.dedup();
        let head: Vec<String> = std::iter::once("step".to_string())
            .chain(self.curves.iter().map(|curve| shortened(&curve.label, 40)))
            .collect();
        let cell = |curve: &Curve<'_>, step: u64| {
            let at = curve.points.partition_point(|point| point.0 <= step);
            // A series that has ended says nothing of later steps.
            let known = at > 0 && curve.points.last().is_some_and(|point| point.0 >= step);
            if known { figure(curve.points[at - 1].1) } else { String::new() }
        };
        let row = |step: &u64| {
            std::iter::once(step.to_string()).chain(self.curves.iter().map(|curve| cell(curve, *step))).collect()
        };
        table(&head, &chosen.iter().map(row).collect::<Vec<Vec<String>>>())
    }
}

fn draw(out: &mut String, curve: &Curve<'_>, points: &[(f64, f64)], columns: usize) {
    let line = stroke(curve.color, curve.dash);
    let color = curve.color % COLORS;
    if curve.kind == Kind::Marks {
        let line = line.replacen("\"l ", "\"l thin ", 1);
        let _ = writeln!(out, "<path {line} d=\"{}\"/>", path(&thinned(points, columns)));
        for (place, (step, value)) in points.iter().zip(curve.points) {
            // More marks than room would be a band.
            if points.len() <= 60 && place.1.is_finite() {
                let _ = writeln!(
                    out,
                    "<circle class=\"m c{color}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"><title>{}, step {step}: {}</title></circle>",
                    place.0,
                    place.1,
                    escaped(&curve.label),
                    figure(*value)
                );
            }
        }
    } else if curve.kind == Kind::Exact || points.len() < SMOOTHED_FROM {
        let _ = writeln!(out, "<path {line} d=\"{}\"/>", path(&thinned(points, columns)));
    } else {
        let _ = writeln!(out, "<path class=\"raw c{color}\" d=\"{}\"/>", path(&thinned(points, columns)));
        let smooth: Vec<(f64, f64)> = smoothed(points);
        let _ = writeln!(out, "<path {line} d=\"{}\"/>", path(&sampled(&smooth, columns / 2)));
    }
    // What is not finite has no place; where it was stands a tick at the bottom.
    for (x, _) in points.iter().filter(|(_, y)| !y.is_finite()).take(50) {
        let _ = writeln!(out, "<path class=\"gone\" d=\"M{x:.1} {}v-7\"/>", HEIGHT - BOTTOM);
    }
}

/// A piece of a curve's line, for legends.
fn swatch(curve: &Curve<'_>) -> String {
    let mark = match curve.kind {
        Kind::Marks => format!("<circle class=\"m c{}\" cx=\"13\" cy=\"6\" r=\"3\"/>", curve.color % COLORS),
        Kind::Steps | Kind::Exact => String::new(),
    };
    format!(
        "<svg class=\"swatch\" viewBox=\"0 0 26 12\" aria-hidden=\"true\"><path {} d=\"M1 6H25\"/>{mark}</svg>",
        stroke(curve.color, curve.dash)
    )
}

fn axes(out: &mut String, x: Scale, y: Scale) {
    let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
    for (value, text) in y.ticks(5) {
        let at = bottom - y.at(value) * (bottom - TOP);
        let _ = writeln!(
            out,
            "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{right}\"/><text class=\"end\" x=\"{}\" y=\"{:.1}\">{text}</text>",
            LEFT - 6.0,
            at + 4.0
        );
    }
    for (value, text) in x.ticks(5) {
        let at = LEFT + x.at(value) * (right - LEFT);
        let _ = writeln!(
            out,
            "<path class=\"axis\" d=\"M{at:.1} {bottom}v4\"/><text class=\"mid\" x=\"{at:.1}\" y=\"{}\">{text}</text>",
            bottom + 18.0
        );
    }
    let _ = writeln!(out, "<path class=\"axis\" d=\"M{LEFT} {TOP}V{bottom}H{right}\"/>");
    let _ = writeln!(out, "<text class=\"end\" x=\"{right}\" y=\"{}\">step</text>", HEIGHT - 2.0);
}

/// The least and the greatest of every column in their order, and a gap where nothing was finite.
pub fn thinned(points: &[(f64, f64)], columns: usize) -> Vec<(f64, f64)> {
    let columns = columns.max(2);
    if points.len() <= 2 * columns {
        return points.to_vec();
    }
    let wide = (WIDTH - LEFT - RIGHT) / columns as f64;
    let column = |x: f64| ((x - LEFT) / wide) as usize;
    let mut out = Vec::new();
    for run in points.chunk_by(|a, b| column(a.0) == column(b.0)) {
        let finite = || (0..run.len()).filter(|i| run[*i].1.is_finite());
        let low = finite().min_by(|a, b| run[*a].1.total_cmp(&run[*b].1));
        let high = finite().max_by(|a, b| run[*a].1.total_cmp(&run[*b].1));
        match low.zip(high) {
            Some((low, high)) if low != high => out.extend([run[low.min(high)], run[low.max(high)]]),
            Some((low, _)) => out.push(run[low]),
            None => out.push((run[0].0, f64::NAN)),
        }
    }
    out
}

/// At most about `columns` of the points, the last among them.
fn sampled(points: &[(f64, f64)], columns: usize) -> Vec<(f64, f64)> {
    let every = points.len().div_ceil(columns.max(2));
    let last = points.len().saturating_sub(1);
    points.iter().enumerate().filter(|(i, _)| i % every == 0 || *i == last).map(|(_, point)| *point).collect()
}

/// Exponential means over about a fortieth of the points, those of the beginning over what there is.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let keep = 1.0 - 1.0 / (points.len() as f64 / 40.0).max(3.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let mean = |&(x, y): &(f64, f64)| {
        if y.is_finite() {
            (sum, weight) = (keep * sum + (1.0 - keep) * y, keep * weight + (1.0 - keep));
        }
        (x, if weight > 0.0 { sum / weight } else { f64::NAN })
    };
    points.iter().map(mean).collect()
}

/// A line through the points, broken where one has no place.
fn path(points: &[(f64, f64)]) -> String {
    let mut out = String::new();
    let mut down = false;
    for &(x, y) in points {
        if y.is_finite() {
            let _ = write!(out, "{}{x:.1} {y:.1}", if down { "L" } else { "M" });
        }
        // A single point is drawn, too: a line to itself with a round end.
        if y.is_finite() && !down {
            out.push_str("h0");
        }
        down = y.is_finite();
    }
    if out.is_empty() { "M0 0".into() } else { out }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_every_spike() {
        let apart = (WIDTH - LEFT - RIGHT) / 100_000.0;
        let mut points: Vec<(f64, f64)> = (0..100_000).map(|i| (LEFT + f64::from(i) * apart, 100.0)).collect();
        points[31_234].1 = 3.0;
        points[77_777].1 = 211.0;
        let thin = thinned(&points, 200);
        assert!(thin.len() <= 402, "{}", thin.len());
        assert!(thin.contains(&points[31_234]) && thin.contains(&points[77_777]));
        assert!(thin.windows(2).all(|pair| pair[0].0 <= pair[1].0), "in the order of the steps");
        assert_eq!(thinned(&points[..300], 200), &points[..300], "what is short stays as it is");
    }

    #[test]
    fn lines_break_where_nothing_is_finite() {
        let points = [(0.0, 1.0), (1.0, 2.0), (2.0, f64::NAN), (3.0, 4.0)];
        assert_eq!(path(&points), "M0.0 1.0h0L1.0 2.0M3.0 4.0h0");
        assert_eq!(path(&[(0.0, f64::NAN)]), "M0 0");
    }

    #[test]
    fn smoothing_is_a_mean_of_what_came_before() {
        let flat: Vec<(f64, f64)> = (0..50).map(|i| (f64::from(i), 7.0)).collect();
        assert!(
            smoothed(&flat).iter().all(|point| (point.1 - 7.0).abs() < 1e-12),
            "no pull towards 0 at the beginning"
        );
        let mut one = flat.clone();
        one[10].1 = f64::NAN;
        assert!(smoothed(&one)[11].1.is_finite(), "one bad figure does not spoil those after it");
    }
}
