//! Where the time of a step goes: stage by stage beside the least that each could take, kernel by kernel, and as a picture.
//!
//! The step is queued piece by piece for this, not replayed: once with events where the stage changes, which the table is of, and once
//! with an event around every piece, for the kernels. Events and launches cost time, so three totals stand beside each other: the
//! recorded step's by the clock, and the sums of both. The nearer they are, the more the parts are worth.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::ceiling::Ceiling;
use super::flame::Frame;
use super::work::{Work, product_name};
use super::{Report, Times};
use crate::device::trace::{Detail, Label, Piece, Trace};
use crate::error::Result;
use crate::graph::stages;

/// One row: a stage, or a kernel of one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// Its part of the step; empty where that is several.
    pub phase: &'static str,
    /// Its stage.
    pub stage: &'static str,
    /// Its name, of a kernel.
    pub name: String,
    /// Launches; on the CPU ops.
    pub launches: usize,
    /// Milliseconds: the median of the steps.
    pub ms: f64,
    /// Required, and at least to be moved; what is copied from and to the host has neither.
    pub flop: u64,
    /// The same.
    pub bytes: u64,
}

impl Row {
    /// The least milliseconds: `max(FLOP / product rate, bytes / copy rate)`. None where nothing is known of the work.
    pub fn floor(&self, ceiling: &Ceiling) -> Option<f64> {
        let [product, copy] = self.floors(ceiling);
        (self.flop + self.bytes > 0).then(|| product.max(copy))
    }

    fn floors(&self, ceiling: &Ceiling) -> [f64; 2] {
        [self.flop as f64 / ceiling.tflops / 1e9, self.bytes as f64 / ceiling.gb_per_s / 1e6]
    }

    /// TFLOP/s or GB/s, whichever the floor is made of.
    fn rate(&self, ceiling: &Ceiling) -> String {
        let [product, copy] = self.floors(ceiling);
        match self.floor(ceiling) {
            None => String::new(),
            Some(_) if product >= copy => format!("{:.3} TFLOP/s", self.flop as f64 / self.ms / 1e9),
            Some(_) => format!("{:.1} GB/s", self.bytes as f64 / self.ms / 1e6),
        }
    }

    fn json(&self, total: f64, ceiling: &Ceiling) -> Value {
        let floor = self.floor(ceiling);
        let known = |number: u64| (number > 0).then_some(number as f64);
        let mut line = json!({
            "stage": self.stage, "launches": self.launches, "ms": self.ms, "share": self.ms / total,
            "tflop": known(self.flop).map(|n| n / 1e12), "gb": known(self.bytes).map(|n| n / 1e9),
            "tflops": known(self.flop).map(|n| n / self.ms / 1e9), "gb_per_s": known(self.bytes).map(|n| n / self.ms / 1e6),
            "floor_ms": floor, "of_floor": floor.map(|floor| floor / self.ms),
        });
        if !self.name.is_empty() {
            (line["phase"], line["kernel"]) = (json!(self.phase), json!(self.name));
        }
        line
    }
}

/// The traces of some steps, added up.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Breakdown {
    /// In the order of [`stages::STAGES`].
    pub stages: Vec<Row>,
    /// In the order in which a step first comes to them.
    pub kernels: Vec<Row>,
    /// Medians of the steps: with events where the stage changes, and around every piece.
    pub totals: [f64; 2],
    /// Steps of each kind.
    pub steps: usize,
    frames: Vec<(Row, String)>,
}

/// Outside of all names there is only what comes before the first upload.
fn named(label: Label) -> (&'static str, &'static str) {
    let or = |name: &'static str, otherwise| if name.is_empty() { otherwise } else { name };
    (or(label.phase, stages::INPUTS), or(label.stage, stages::UPLOADS))
}

/// The name of a piece among the kernels, and its name in the picture.
fn name(piece: &Piece) -> [String; 2] {
    match piece {
        Piece::Kernel(name) => [name.to_string(), name.to_string()],
        Piece::Product(product, [m, n, k]) => [product_name(*product), format!("{product:?} {m} × {n} × {k}")],
        Piece::Op(module, function) => [(); 2].map(|()| format!("{module}: {function}")),
        Piece::Fill(_) => [(); 2].map(|()| "fill".to_string()),
        Piece::Upload(_) => [(); 2].map(|()| "copies to the device".to_string()),
        Piece::Download(_) => [(); 2].map(|()| "results".to_string()),
        Piece::Host => [(); 2].map(|()| "host".to_string()),
        Piece::Replay => [(); 2].map(|()| "recorded work".to_string()),
    }
}

/// Sums by a key in each trace, and the median of these sums; in the order in which the last trace comes to them.
fn medians<K: Clone + Ord>(traces: &[Trace], key: impl Fn(Label, &Piece) -> K) -> Vec<(K, f64, usize)> {
    let mut sums: BTreeMap<K, Vec<f64>> = BTreeMap::new();
    let (mut order, mut launches) = (Vec::new(), BTreeMap::new());
    for (i, trace) in traces.iter().enumerate() {
        for segment in &trace.segments {
            let key = key(segment.label, &trace.pieces[segment.pieces.start].1);
            let own = sums.entry(key.clone()).or_insert_with(|| vec![0.0; traces.len()]);
            own[i] += segment.milliseconds;
            if i + 1 == traces.len() {
                if !order.contains(&key) {
                    order.push(key.clone());
                }
                let pieces = &trace.pieces[segment.pieces.clone()];
                *launches.entry(key).or_insert(0) += pieces.iter().filter(|(_, piece)| piece.is_launch()).count();
            }
        }
    }
    let median = |key: K| {
        let times = sums.get(&key).cloned().unwrap_or_default();
        let count = launches.get(&key).copied().unwrap_or(0);
        (key, Times::new(times).median(), count)
    };
    order.into_iter().map(median).collect()
}

impl Breakdown {
    /// Of steps that were traced with times of stages, and of others with those of pieces.
    pub fn of(by_stage: &[Trace], by_piece: &[Trace], work: &Work) -> Breakdown {
        let total = |traces: &[Trace]| Times::new(traces.iter().map(Trace::milliseconds).collect()).median();
        let mut rows: Vec<Row> = medians(by_stage, |label, _| named(label).1)
            .into_iter()
            .map(|(stage, ms, launches)| {
                let own = work.stage(stage);
                Row { stage, launches, ms, flop: own.flop(), bytes: own.bytes(), ..Row::default() }
            })
            .collect();
        rows.sort_by_key(|row| stages::STAGES.iter().position(|stage| *stage == row.stage));
        let row = |((phase, stage), name, ms, launches): ((_, _), String, f64, usize)| {
            let own = work.kernels.iter().find(|k| (k.phase, k.stage) == (phase, stage) && k.name == name);
            let (flop, bytes) = own.map_or((0, 0), |k| (k.flop, k.bytes));
            Row { phase, stage, name, launches, ms, flop, bytes }
        };
        let kernels = medians(by_piece, |label, piece| (named(label), name(piece)[0].clone()));
        let frames = medians(by_piece, |label, piece| (named(label), name(piece)));
        Breakdown {
            stages: rows,
            kernels: kernels.into_iter().map(|((label, name), ms, n)| row((label, name, ms, n))).collect(),
            totals: [total(by_stage), total(by_piece)],
            steps: by_stage.len(),
            frames: frames
                .into_iter()
                .map(|((label, [name, shown]), ms, n)| (row((label, name, ms, n)), shown))
                .collect(),
        }
    }

    /// Milliseconds of all stages.
    pub fn sum(&self) -> f64 {
        self.stages.iter().map(|row| row.ms).sum()
    }

    /// Tells the table, and the totals beside that of the step by the clock, `recorded` milliseconds.
    ///
    /// # Errors
    /// A failed write.
    pub fn tell(&self, name: &str, recorded: f64, ceiling: &Ceiling, report: &Report<'_>) -> Result<()> {
        let sum = self.sum();
        report.say(&format!("\n{name}: product {:.3} TFLOP/s, copy {:.1} GB/s\n", ceiling.tflops, ceiling.gb_per_s))?;
        report.head(&["stage", "launches", "ms", "share", "achieved", "floor ms", "of floor"])?;
        let mut floors = 0.0;
        for row in &self.stages {
            let floor = row.floor(ceiling);
            floors += floor.unwrap_or(0.0);
            let (shown, part) = match floor {
                Some(floor) => (format!("{floor:.3}"), format!("{:.0} %", 100.0 * floor / row.ms)),
                None => (String::new(), String::new()),
            };
            let cells =
                [format!("{:.3}", row.ms), format!("{:.1} %", 100.0 * row.ms / sum), row.rate(ceiling), shown, part];
            report.row(&[&[row.stage.to_string(), row.launches.to_string()][..], &cells].concat())?;
        }
        let launches: usize = self.stages.iter().map(|row| row.launches).sum();
        let all = [
            format!("{sum:.3}"),
            "100 %".into(),
            String::new(),
            format!("{floors:.3}"),
            format!("{:.0} %", 100.0 * floors / sum),
        ];
        report.row(&[&["sum".to_string(), launches.to_string()][..], &all].concat())?;
        let [by_stage, by_piece] = self.totals;
        report.say(&format!(
            "\nstep by the clock {recorded:.3} ms; piece by piece {by_stage:.3} ms with times of stages, {by_piece:.3} ms with \
             times of kernels\n"
        ))
    }

    /// The same for results.
    pub fn json(&self, recorded: f64, ceiling: &Ceiling) -> Value {
        let rows = |rows: &[Row], total: f64| rows.iter().map(|row| row.json(total, ceiling)).collect::<Value>();
        let floors: f64 = self.stages.iter().filter_map(|row| row.floor(ceiling)).sum();
        json!({
            "recorded_ms": recorded, "stages_ms": self.totals[0], "kernels_ms": self.totals[1], "sum_ms": self.sum(),
            "floor_ms": floors, "steps": self.steps,
            "stages": rows(&self.stages, self.sum()), "kernels": rows(&self.kernels, self.totals[1]),
        })
    }

    /// The same as a tree: step, phase, stage, kernel.
    pub fn frame(&self, ceiling: &Ceiling) -> Frame {
        let mut step = Frame { name: "step".into(), ..Frame::default() };
        for phase in stages::PHASES {
            for (row, shown) in self.frames.iter().filter(|(row, _)| row.phase == phase) {
                let mut detail = if row.launches > 0 { format!("launches: {}", row.launches) } else { String::new() };
                // The work of products is known together, not by size.
                if let (Some(floor), false) = (row.floor(ceiling), row.name.starts_with("product")) {
                    detail += &format!("\n{}, floor {floor:.3} ms", row.rate(ceiling));
                }
                let parts = &mut step.part(phase).part(row.stage).parts;
                parts.push(Frame { name: shown.clone(), detail, ms: row.ms, parts: Vec::new() });
            }
        }
        step.sum_up();
        step
    }
}

/// What a step is traced with, one after the other.
pub const DETAILS: [Detail; 2] = [Detail::StageTimes, Detail::PieceTimes];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::work::Kernel;
    use crate::device::Product;
    use crate::device::trace::Segment;

    /// Two products and a kernel between them, after the host; the times of the pieces are these.
    fn trace(ms: [f64; 4], stages_only: bool) -> Trace {
        let of = |stage| Label { phase: stages::FORWARD, stage };
        let product = Piece::Product(Product::NT, [2, 3, 4]);
        let (gemms, rows) = (of(stages::ENCODER_PRODUCTS), of(stages::ROWS));
        let pieces =
            vec![(Label::default(), Piece::Host), (gemms, product), (gemms, product), (rows, Piece::Kernel("k"))];
        let segment = |label, pieces, milliseconds| Segment { label, pieces, milliseconds };
        let segments = match stages_only {
            true => vec![
                segment(Label::default(), 0..1, ms[0]),
                segment(gemms, 1..3, ms[1] + ms[2]),
                segment(rows, 3..4, ms[3]),
            ],
            false => (0..4).map(|i| segment(pieces[i].0, i..i + 1, ms[i])).collect(),
        };
        Trace { pieces, segments }
    }

    #[test]
    fn medians_floors_and_shares() {
        let kernel = |stage, name: &str, flop, bytes| Kernel {
            phase: stages::FORWARD,
            stage,
            name: name.into(),
            launches: 1,
            flop,
            bytes,
            products: Vec::new(),
        };
        let products = kernel(stages::ENCODER_PRODUCTS, "product NT", 4_000_000_000_000, 1_000_000_000);
        let work = Work { kernels: vec![products, kernel(stages::ROWS, "k", 0, 3_000_000_000)] };
        let times = [[1.0, 3.0, 5.0, 2.0], [1.0, 3.0, 5.0, 20.0], [9.0, 2.0, 4.0, 3.0]];
        let of = |only| times.map(|ms| trace(ms, only)).to_vec();
        let done = Breakdown::of(&of(true), &of(false), &work);
        let found: Vec<_> = done.stages.iter().map(|row| (row.stage, row.launches, row.ms)).collect();
        assert_eq!(
            found,
            [(stages::ENCODER_PRODUCTS, 2, 8.0), (stages::ROWS, 1, 3.0), (stages::UPLOADS, 0, 1.0)],
            "the median of each stage"
        );
        let ceiling = Ceiling { tflops: 1000.0, gb_per_s: 2000.0 };
        let floors: Vec<_> = done.stages.iter().map(|row| row.floor(&ceiling)).collect();
        assert_eq!(floors, [Some(4.0), Some(1.5), None], "4 TFLOP at 1,000 TFLOP/s, 3 GB at 2,000 GB/s");
        assert_eq!(
            (done.stages[0].rate(&ceiling), done.stages[1].rate(&ceiling)),
            ("500.000 TFLOP/s".into(), "1000.0 GB/s".into())
        );
        let json = done.json(10.0, &ceiling);
        assert_eq!(
            (&json["floor_ms"], &json["sum_ms"], &json["stages"][0]["of_floor"]),
            (&json!(5.5), &json!(12.0), &json!(0.5))
        );
        assert_eq!((&json["kernels"][1]["kernel"], &json["kernels"][1]["launches"]), (&json!("product NT"), &json!(2)));
        let frame = done.frame(&ceiling);
        assert_eq!(frame.parts.len(), 2);
        assert_eq!(frame.parts[1].parts[0].parts[0].name, "NT 2 × 3 × 4");
        assert!((frame.ms - 12.0).abs() < 1e-9, "{}", frame.ms);
    }
}
