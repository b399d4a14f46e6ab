//! Tables: files of which every line is one fact, and how their wrong lines are told.

use std::sync::Arc;

use crate::data::source::Input;
use crate::data::source::bytes::{self, Lines};
use crate::data::source::separator::Separator;
use crate::error::{Error, Kind, Result};

/// Wrong lines after which reading stops.
pub(super) const ERRORS: usize = 100_000;

/// What is wrong with a line, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wrong {
    pub cause: String,
    pub remedy: &'static str,
    /// What stands in place of tabs, and whether the first on a line only.
    separator: Option<(Separator, bool)>,
}

/// What most wrong lines need.
pub(super) const CORRECT: &str = "correct the line, or name the right format";

const LISTS: &str =
    "rename the text, here and where it was tokenized, or separate the passages of a list by commas: qid<TAB>pid,pid";

impl Wrong {
    /// With the remedy [`CORRECT`].
    pub fn new(cause: impl Into<String>) -> Wrong {
        Wrong { cause: cause.into(), remedy: CORRECT, separator: None }
    }

    /// With another remedy.
    pub fn remedy(mut self, remedy: &'static str) -> Wrong {
        self.remedy = remedy;
        self
    }

    /// Columns of `line` that are too few because something else than tabs separates them, where that is so. `first`: only the first of
    /// these stands for a tab.
    pub fn separated(mut self, line: &str, first: bool) -> Wrong {
        if let Some(separator) = Separator::of(line) {
            self.cause += &format!(": {} has {} in place of tabs", shown(line), separator.words());
            self.separator = Some((separator, first));
        }
        self
    }

    /// As an error about a line of a file.
    pub fn at(self, input: &Input, line: u64) -> Error {
        let error = Error::refused(self.cause).path(&input.path).line(line);
        match self.separator {
            Some((separator, first)) => error.remedy(separator.command(&input.path, first)),
            None => error.remedy(self.remedy),
        }
    }
}

/// Calls `each(number, line)` for every line that is not blank. All wrong lines are found before the first three are told.
/// A file without such a line is refused.
pub(super) fn each_line(
    input: &Input,
    mut each: impl FnMut(u64, &str) -> std::result::Result<(), Wrong>,
) -> Result<u64> {
    let mut lines = Lines::new(bytes::open(input, Arc::default())?);
    let (mut count, mut errors) = (0, Vec::new());
    loop {
        let number = lines.number + 1;
        match lines.next_line() {
            None => break,
            Some(Ok(line)) if line.trim_ascii().is_empty() => continue,
            Some(Ok(line)) => {
                count += 1;
                if let Err(wrong) = each(number, line) {
                    errors.push(wrong.at(input, number));
                }
            }
            Some(Err(e)) if e.kind() == Kind::Refused => errors.push(e),
            Some(Err(e)) => return Err(e),
        }
        if errors.len() >= ERRORS {
            break;
        }
    }
    if !errors.is_empty() {
        return Err(Error::several(errors));
    }
    if count == 0 {
        return Err(Error::refused("is empty").path(&input.path).remedy("check the path, or leave the file out"));
    }
    Ok(count)
}

/// The id in a field: no white space and no control character, inside or around it.
pub(super) fn id(field: &str) -> std::result::Result<&str, Wrong> {
    if !field.is_empty() && field.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(field);
    }
    let shown = shown(field);
    if field.is_empty() {
        Err(Wrong::new("an id is empty"))
    } else if field.trim() != field {
        Err(Wrong::new(format!("the id {shown} has white space before or after it")).remedy("remove the white space"))
    } else if field.chars().any(|c| c.is_whitespace() || c.is_control()) {
        let remedy = "rename the text, here and where it was tokenized";
        Err(Wrong::new(format!("the id {shown} holds white space or a control character")).remedy(remedy))
    } else {
        Ok(field)
    }
}

/// The id of a passage on a list, of which the next is behind a comma.
pub(super) fn id_of_list(field: &str) -> std::result::Result<&str, Wrong> {
    id(field).map_err(|wrong| match field.trim().contains(' ') {
        true => wrong.remedy(LISTS),
        false => wrong,
    })
}

/// A field as a message shows it.
pub(super) fn shown(field: &str) -> String {
    let short: String = field.chars().take(40).collect();
    format!("{short:?}{}", if short.len() < field.len() { "…" } else { "" })
}

/// A finite number. `[1.5]` is one too: the published scripts write one-element arrays.
pub(super) fn score(field: &str) -> std::result::Result<f32, Wrong> {
    let inner = field.strip_prefix('[').and_then(|f| f.strip_suffix(']')).unwrap_or(field);
    // Through f64, as C's atof and Python read it.
    match inner.trim_matches(' ').parse::<f64>() {
        Ok(x) if (x as f32).is_finite() => Ok(x as f32),
        _ => Err(Wrong::new(format!("the score {} is not a finite number", shown(field)))),
    }
}
