//! A flame graph as an SVG file of its own: widths by time, parts below their whole. Readable in light and in dark, without scripts.

use std::fmt::Write;

/// A part of the time, and its own parts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Frame {
    /// What it is.
    pub name: String,
    /// What is told besides, when the pointer rests on it.
    pub detail: String,
    /// Milliseconds, those of its parts included.
    pub ms: f64,
    /// In the order in which they are drawn.
    pub parts: Vec<Frame>,
}

impl Frame {
    /// The part of this name, which is added where there is none.
    pub fn part(&mut self, name: &str) -> &mut Frame {
        let at = self.parts.iter().position(|part| part.name == name).unwrap_or_else(|| {
            self.parts.push(Frame { name: name.to_string(), ..Frame::default() });
            self.parts.len() - 1
        });
        &mut self.parts[at]
    }

    /// Times of frames without parts added up into those above them.
    pub fn sum_up(&mut self) -> f64 {
        if !self.parts.is_empty() {
            self.ms = self.parts.iter_mut().map(Frame::sum_up).sum();
        }
        self.ms
    }

    fn depth(&self) -> usize {
        1 + self.parts.iter().map(Frame::depth).max().unwrap_or(0)
    }
}

/// Width of the drawing, height of a row, and of what stands above the rows.
const WIDTH: f64 = 1200.0;
const ROW: f64 = 22.0;
const TOP: f64 = 40.0;
/// Width of a letter of the text in frames, about.
const LETTER: f64 = 6.7;

/// The picture of `root`, headed by `title`.
pub fn svg(title: &str, root: &Frame) -> String {
    let height = TOP + root.depth() as f64 * ROW + 8.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"ui-monospace, monospace\" font-size=\"11\">\n\
         <style>\n\
         .back {{ fill: #ffffff }} text {{ fill: #1b1b1b }} rect.f {{ stroke: #ffffff }} .f:hover {{ stroke: #1b1b1b }}\n\
         .c0 {{ fill: #d9d9d9 }} .c1 {{ fill: #a9cdec }} .c2 {{ fill: #f6c98b }} .c3 {{ fill: #b4dcab }} .c4 {{ fill: #d9b8e6 }} \
         .c5 {{ fill: #f2b3ad }}\n\
         @media (prefers-color-scheme: dark) {{\n\
         .back {{ fill: #161616 }} text {{ fill: #f0f0f0 }} rect.f {{ stroke: #161616 }} .f:hover {{ stroke: #f0f0f0 }}\n\
         .c0 {{ fill: #4a4a4a }} .c1 {{ fill: #235a86 }} .c2 {{ fill: #875a14 }} .c3 {{ fill: #33682a }} .c4 {{ fill: #653c77 }} \
         .c5 {{ fill: #8a3a33 }}\n\
         }}\n\
         </style>\n\
         <rect class=\"back\" width=\"{WIDTH}\" height=\"{height}\"/>\n\
         <text x=\"8\" y=\"24\" font-size=\"14\">{}</text>\n",
        escaped(title)
    );
    let whole = if root.ms > 0.0 { root.ms } else { 1.0 };
    draw(&mut out, root, (8.0, TOP), (WIDTH - 16.0) / whole, (whole, 0));
    out.push_str("</svg>\n");
    out
}

/// Draws a frame from `x` and `y` on and its parts below, `scale` wide for a millisecond.
fn draw(out: &mut String, frame: &Frame, (x, y): (f64, f64), scale: f64, (whole, color): (f64, usize)) {
    let width = frame.ms * scale;
    let (name, share) = (escaped(&frame.name), 100.0 * frame.ms / whole);
    let detail = if frame.detail.is_empty() { String::new() } else { format!("\n{}", escaped(&frame.detail)) };
    // Writing to a string does not fail.
    let _ = writeln!(
        out,
        "<g><title>{name}: {:.3} ms, {share:.1} %{detail}</title>\
         <rect class=\"f c{color}\" x=\"{x:.2}\" y=\"{y}\" width=\"{:.2}\" height=\"{}\" \
         rx=\"2\"/>{}</g>",
        frame.ms,
        width.max(0.1),
        ROW - 1.0,
        label(&frame.name, (x, y), width),
    );
    let mut at = x;
    for (i, part) in frame.parts.iter().enumerate() {
        // Phases have a colour each, and what is below has that of its phase.
        let color = if color == 0 { 1 + i % 5 } else { color };
        draw(out, part, (at, y + ROW), scale, (whole, color));
        at += part.ms * scale;
    }
}

/// As much of the name as fits.
fn label(name: &str, (x, y): (f64, f64), width: f64) -> String {
    let room = ((width - 8.0) / LETTER).max(0.0) as usize;
    if room < 3 {
        return String::new();
    }
    let shown = match name.chars().count() <= room {
        true => name.to_string(),
        false => name.chars().take(room - 1).chain(['…']).collect(),
    };
    format!("<text x=\"{:.2}\" y=\"{}\" pointer-events=\"none\">{}</text>", x + 4.0, y + 15.0, escaped(&shown))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(name: &str, ms: f64) -> Frame {
        Frame { name: name.into(), ms, ..Frame::default() }
    }

    #[test]
    fn widths_are_times_and_parts_lie_below_their_whole() {
        let mut step = Frame { name: "step".into(), ..Frame::default() };
        step.part("forward").parts.extend([leaf("a<b>", 3.0), leaf("tiny", 0.001)]);
        step.part("backward").parts.push(leaf("c", 0.999));
        assert_eq!(step.part("forward").parts.len(), 2);
        assert!((step.sum_up() - 4.0).abs() < 1e-12);
        let svg = svg("one & all", &step);
        assert_eq!(svg.matches("<rect class=\"f ").count(), 6);
        assert_eq!(svg.matches("<title>").count(), 6);
        let widths = [1184.0, 1184.0 * 3.001 / 4.0, 1184.0 * 3.0 / 4.0];
        for width in widths {
            assert!(svg.contains(&format!("width=\"{width:.2}\"")), "{width}: {svg}");
        }
        assert!(svg.contains("one &amp; all") && svg.contains("a&lt;b&gt;: 3.000 ms, 75.0 %") && !svg.contains("<b>"));
        assert!(svg.contains("prefers-color-scheme: dark") && !svg.contains("<script") && !svg.contains("href"));
        assert!(!svg.contains(">tiny</text>"), "a name that does not fit is not drawn");
    }
}
