//! Pieces of a page: text made harmless, tables, figures as people read them.

use std::fmt::Write;

/// Text as it may stand in HTML, in SVG and in quoted attributes. What no XML file may hold becomes U+FFFD.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(' '),
            // Marks that turn the direction of the text around them could make a page show what is not there.
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// At most `most` characters of a text.
pub fn shortened(text: &str, most: usize) -> String {
    match text.chars().count() <= most {
        true => text.to_string(),
        false => text.chars().take(most.saturating_sub(1)).chain(['…']).collect(),
    }
}

/// A figure with four digits that count.
pub fn figure(x: f64) -> String {
    let size = x.abs();
    match size {
        _ if x.is_nan() => "not finite".into(),
        _ if x == 0.0 => "0".into(),
        _ if !(1e-3..1e7).contains(&size) => format!("{x:.2e}"),
        _ if size >= 1000.0 => whole(x),
        _ if size >= 100.0 => format!("{x:.1}"),
        _ if size >= 10.0 => format!("{x:.2}"),
        _ => format!("{x:.4}"),
    }
}

/// A figure rounded to a whole number, its digits in groups.
pub fn whole(x: f64) -> String {
    let digits = format!("{:.0}", x.abs());
    let mut out = if x <= -0.5 { "-".to_string() } else { String::new() };
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// A moment as `2026-11-28 08:28 UTC`.
pub fn moment(ts: f64) -> String {
    let seconds = ts.max(0.0) as i64;
    let (days, minutes) = (seconds / 86_400, seconds % 86_400 / 60);
    // Years are counted from March, so that the day that some years lack is the last one (H. Hinnant, chrono-compatible algorithms).
    let z = days + 719_468;
    let (era, day) = (z / 146_097, z % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (d, m) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let y = year + era * 400 + i64::from(m <= 2);
    format!("{y:04}-{m:02}-{d:02} {:02}:{:02} UTC", minutes / 60, minutes % 60)
}

/// A table that scrolls by itself where it is too wide: a head, and rows whose first cell heads them. Cells are text.
pub fn table(head: &[String], rows: &[Vec<String>]) -> String {
    let cells: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| escaped(cell)).collect()).collect();
    table_of(head, &cells)
}

/// [`table`] whose cells are HTML.
pub fn table_of(head: &[String], rows: &[Vec<String>]) -> String {
    let mut out = String::from("<div class=\"scroll\" tabindex=\"0\"><table><thead><tr>");
    // Writing to a string does not fail.
    for cell in head {
        let _ = write!(out, "<th scope=\"col\">{}</th>", escaped(cell));
    }
    out.push_str("</tr></thead><tbody>\n");
    for row in rows {
        out.push_str("<tr>");
        for (i, cell) in row.iter().enumerate() {
            let _ = match i {
                0 => write!(out, "<th scope=\"row\">{cell}</th>"),
                _ => write!(out, "<td>{cell}</td>"),
            };
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_text_is_markup() {
        assert_eq!(escaped("<script>'\"&\u{0}\u{202e}\n"), "&lt;script&gt;&#39;&quot;&amp;\u{fffd}\u{fffd} ");
        assert_eq!(shortened("abcdef", 4), "abc…");
    }

    #[test]
    fn figures_and_moments() {
        let figures = [0.0, 0.12345, 12.3456, 123.456, 1234.5, 2e-5, 1e9, -0.5, f64::NAN].map(figure);
        assert_eq!(figures, ["0", "0.1235", "12.35", "123.5", "1,234", "2.00e-5", "1.00e9", "-0.5000", "not finite"]);
        assert_eq!([whole(1234567.0), whole(-1000.0), whole(0.2)], ["1,234,567", "-1,000", "0"]);
        assert_eq!(moment(0.0), "1970-01-01 00:00 UTC");
        assert_eq!(moment(951_827_696.0), "2000-02-29 12:34 UTC");
        assert_eq!(moment(1_795_854_519.8), "2026-11-28 08:28 UTC");
        assert_eq!(moment(4_107_542_399.0), "2100-02-28 23:59 UTC");
    }
}
