//! Masks as a picture of characters, for `inspect --masks`.

use std::fmt::Write;

use super::batch::PretrainBatch;
use super::masking::{Vocabulary, pool_rows};

/// What the characters mean; printed once above the pictures.
pub const LEGEND: &str = "words    | begins a word   - continues it   C [CLS]   S [SEP]
encoder  # [MASK]   r random token   k label, token kept   . no label
decoder  # hidden   . visible   o the position itself (never sees itself)";

/// Draws the masks of text `sequence` of a batch: its words (`word_start` as read from the corpus), the encoder's mask, and what the
/// enhanced decoder shows to each of `positions`. Lines are folded after `width` tokens. Positions past the text are left out.
pub fn picture(
    batch: &PretrainBatch,
    sequence: usize,
    word_start: &[bool],
    vocabulary: &Vocabulary,
    positions: &[usize],
    width: usize,
) -> String {
    let text = batch.cu_seqlens[sequence] as usize..batch.cu_seqlens[sequence + 1] as usize;
    let masked = &batch.encoder_ids[text.clone()];
    let mut original = masked.to_vec();
    let mut labelled = vec![false; text.len()];
    for (&row, &id) in batch.encoder_label_rows.iter().zip(&batch.encoder_label_ids) {
        if text.contains(&(row as usize)) {
            original[row as usize - text.start] = id;
            labelled[row as usize - text.start] = true;
        }
    }
    let words = (0..text.len()).map(|i| match original[i] {
        id if id == vocabulary.cls => 'C',
        id if id == vocabulary.sep => 'S',
        _ if word_start.get(i).copied().unwrap_or(true) => '|',
        _ => '-',
    });
    let encoder = (0..text.len()).map(|i| match masked[i] {
        _ if !labelled[i] => '.',
        id if id == vocabulary.mask => '#',
        id if id == original[i] => 'k',
        _ => 'r',
    });
    let mut lines =
        vec![("words".to_string(), words.collect()), ("encoder".to_string(), encoder.collect::<Vec<char>>())];
    if let Some(decoder) = &batch.decoder {
        for &i in positions.iter().filter(|&&i| i < text.len()) {
            let visible = |j: usize| decoder.visibility.sees(sequence, text.clone(), i, j);
            let line = (0..text.len())
                .map(|j| {
                    if i == j {
                        'o'
                    } else if visible(j) {
                        '.'
                    } else {
                        '#'
                    }
                })
                .collect();
            lines.push((
                format!("sees {i}: row {} of {}", decoder.visibility.row[text.start + i], pool_rows(text.len())),
                line,
            ));
        }
    }
    fold(&lines, text.len(), width.max(1))
}

/// Writes lines of `length` characters in pieces of `width`, each piece of all lines together under the position it begins at.
fn fold(lines: &[(String, Vec<char>)], length: usize, width: usize) -> String {
    let margin = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut out = String::new();
    for start in (0..length).step_by(width) {
        let end = length.min(start + width);
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{:margin$}  {start}", "token");
        for (name, characters) in lines {
            let piece: String = characters[start..end].iter().collect();
            let _ = writeln!(out, "{name:margin$}  {piece}");
        }
    }
    out
}
