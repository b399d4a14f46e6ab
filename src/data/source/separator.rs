//! What separates the columns of a line that should hold tabs: the commonest mistake in tables, told with the command that mends it.

use std::path::Path;

/// What stands in place of tabs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Separator {
    mark: char,
    count: usize,
}

impl Separator {
    /// That of a line without tabs; none where nothing separates.
    pub fn of(line: &str) -> Option<Separator> {
        let mark =
            line.trim().chars().find(|c| [',', ';', ' ', '|', '\t'].contains(c)).filter(|_| !line.contains('\t'))?;
        Some(Separator { mark, count: line.trim().matches(mark).count() })
    }

    /// In words, of several.
    pub fn words(self) -> &'static str {
        match self.mark {
            ',' => "commas",
            ';' => "semicolons",
            '|' => "bars",
            _ => "blanks",
        }
    }

    /// The command that writes `path` with tabs, in place of the first on each line or of all: the text or list in a last column may hold
    /// others.
    pub fn command(self, path: &Path, first: bool) -> String {
        let all = if first || self.count == 1 { "" } else { "g" };
        format!(
            "separate the columns by tabs: sed 's/{}/\\t/{all}' {} > tabs.tsv, and give tabs.tsv",
            self.mark,
            path.display()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_in_place_of_tabs_is_named() {
        let found = |line: &str| Separator::of(line).map(Separator::words);
        assert_eq!(found("q1,p1"), Some("commas"));
        assert_eq!(found("q1 p1,p2"), Some("blanks"));
        assert_eq!([found("q1"), found("q1\tp1,p2"), found("")], [None; 3]);
        let command = |line, first| Separator::of(line).unwrap().command(Path::new("a.csv"), first);
        assert!(command("q1,p1,2", false).contains("sed 's/,/\\t/g' a.csv > tabs.tsv"));
        assert!(command("q1;p1;p2", true).contains("sed 's/;/\\t/' a.csv > tabs.tsv"));
    }
}
