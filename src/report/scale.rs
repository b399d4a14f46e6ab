//! Axes: what range of figures is shown, linear or logarithmic, and where the ticks stand.

use super::html::whole;

/// How figures become places between 0 and 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    low: f64,
    high: f64,
    log: bool,
}

impl Scale {
    /// From 0, or the smallest step, to the last one.
    pub fn steps(last: u64) -> Scale {
        Scale { low: 0.0, high: (last as f64).max(1.0), log: false }
    }

    /// For these figures, of which those that are not finite do not count. Logarithmic where all are positive and a few would press all
    /// others flat.
    pub fn of(figures: impl Iterator<Item = f64>) -> Scale {
        let mut all: Vec<f64> = figures.filter(|x| x.is_finite()).collect();
        all.sort_by(f64::total_cmp);
        let (Some(&low), Some(&high)) = (all.first(), all.last()) else {
            return Scale { low: 0.0, high: 1.0, log: false };
        };
        let median = all[all.len() / 2];
        if low > 0.0 && high > 30.0 * median {
            return Scale { low: low.log10(), high: high.log10(), log: true }.wide();
        }
        // An axis that begins at 0 says more, where it costs little room.
        let low = if low > 0.0 && low < 0.25 * high { 0.0 } else { low };
        Scale { low, high, log: false }.wide()
    }

    /// With a little room at both ends, and never without extent.
    fn wide(self) -> Scale {
        let extent = self.high - self.low;
        let room = if extent > 0.0 { 0.04 * extent } else { 0.05 * self.high.abs().max(1e-9) };
        let low = if self.low == 0.0 && !self.log { 0.0 } else { self.low - room };
        Scale { low, high: self.high + room, ..self }
    }

    /// Where a figure stands: 0 at the low end, 1 at the high one.
    pub fn at(&self, x: f64) -> f64 {
        let x = if self.log { x.log10() } else { x };
        (x - self.low) / (self.high - self.low)
    }

    /// Whether it is logarithmic.
    pub fn is_log(&self) -> bool {
        self.log
    }

    /// Figures to mark, about `most` of them, as text.
    pub fn ticks(&self, most: usize) -> Vec<(f64, String)> {
        let extent = self.high - self.low;
        let rough = extent / most.max(1) as f64;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= rough).unwrap_or(rough);
        let step = if self.log { step.max(1.0).round() } else { step };
        let (first, last) = ((self.low / step).ceil() as i64, (self.high / step).floor() as i64);
        let ticks = (first..=last.min(first + 20)).map(|i| i as f64 * step);
        if !self.log {
            return ticks.map(|x| (x, tick(x, step))).collect();
        }
        let mut found: Vec<f64> = ticks.map(|x| 10f64.powf(x)).collect();
        if found.len() < 3 {
            // Less than two powers of ten in sight.
            let powers = (self.low.floor() as i32)..=(self.high.ceil() as i32);
            let all = powers.flat_map(|p| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(p)));
            found = all.filter(|x| (0.0..=1.0).contains(&self.at(*x))).collect();
        }
        found.into_iter().map(|x| (x, tick(x, x))).collect()
    }
}

/// The text of a tick on an axis whose ticks are `step` apart.
fn tick(x: f64, step: f64) -> String {
    let size = x.abs().max(step);
    match size {
        _ if x == 0.0 => "0".into(),
        s if s >= 1e9 => format!("{}G", short(x / 1e9, step / 1e9)),
        s if s >= 1e6 => format!("{}M", short(x / 1e6, step / 1e6)),
        s if s >= 1e4 => format!("{}k", short(x / 1e3, step / 1e3)),
        s if s < 1e-3 => format!(
            "{:.*e}",
            usize::from(step < x.abs() && (x / 10f64.powf(x.abs().log10().floor())).fract() > 1e-6),
            x
        ),
        _ => short(x, step),
    }
}

/// With as many decimals as the distance of the ticks needs.
fn short(x: f64, step: f64) -> String {
    let decimals = (-(step * 1.0001).log10().floor()).clamp(0.0, 6.0) as usize;
    if decimals == 0 { whole(x) } else { format!("{x:.decimals$}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(scale: Scale, most: usize) -> Vec<String> {
        scale.ticks(most).into_iter().map(|tick| tick.1).collect()
    }

    #[test]
    fn ticks_are_round_and_within() {
        assert_eq!(texts(Scale::steps(600), 5), ["0", "200", "400", "600"]);
        assert_eq!(texts(Scale::steps(100_000), 4), ["0", "50k", "100k"]);
        assert_eq!(texts(Scale::of([6.2, 8.8].into_iter()), 4), ["7", "8"]);
        assert_eq!(texts(Scale::of([0.0, 7e-4].into_iter()), 4), ["0", "2e-4", "4e-4", "6e-4"]);
        assert_eq!(texts(Scale::of([0.1, 0.11].into_iter()), 3), ["0.100", "0.105", "0.110"]);
        let flat = Scale::of([3.0, 3.0].into_iter());
        assert!((flat.at(3.0) - 0.5).abs() < 1e-9, "one figure stands in the middle");
        assert_eq!(Scale::of([f64::NAN].into_iter()).at(0.5), 0.5);
    }

    #[test]
    fn outliers_make_it_logarithmic() {
        let scale = Scale::of([1.0, 1.1, 0.9, 1000.0].into_iter());
        assert!(scale.is_log());
        assert_eq!(texts(scale, 4), ["1", "10", "100", "1,000"]);
        assert!(!Scale::of([1.0, 2.0, 5.0].into_iter()).is_log());
    }
}
