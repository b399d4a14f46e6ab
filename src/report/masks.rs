//! The masks of one text of a pre-training run, as the run drew them: what the encoder had to predict, and what the enhanced decoder
//! showed to each position.

use std::fmt::Write;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

use super::html::{escaped, shortened};
use super::run::Run;
use crate::data::batch::{Builder, PretrainBatch};
use crate::data::masking::MaskRules;
use crate::data::order::{Order, Part};
use crate::data::shard::ShardSet;
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;
use crate::files::hex16;
use crate::train::batches::held_out_texts;
use crate::train::settings::{Objective, Settings};

/// Tokens that are drawn; texts of about half of them are preferred.
const MOST: usize = 64;
/// Samples among which one is chosen.
const LOOKED_AT: u64 = 64;

/// What the encoder makes of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoder {
    Shown,
    Masked,
    Random,
    Kept,
}

/// One text's masks.
#[derive(Clone, Debug)]
pub struct Masks {
    /// Number of the sample in the run.
    sample: u64,
    id: String,
    /// Tokens of the whole text.
    length: usize,
    /// Spelling, whether it begins a word, and what the encoder makes of it.
    tokens: Vec<(String, bool, Encoder)>,
    /// What each position sees, where there is a decoder.
    visible: Option<Vec<Vec<bool>>>,
    seed: u64,
}

impl Masks {
    /// Those of `run`, if it is one of pre-training; or why they cannot be drawn.
    ///
    /// # Errors
    /// In words: shards that are gone, or are not those of the run any more.
    pub fn of(run: &Run) -> std::result::Result<Option<Masks>, String> {
        let Some(settings) = run.facts.parsed.as_ref().filter(|settings| !settings.objective.is_fine_tuning()) else {
            return Ok(None);
        };
        let shards = open(run, settings)?;
        draw(run, settings, &shards).map_err(|e| e.to_string()).map(Some)
    }

    /// The masks as HTML.
    pub fn figure(&self, id: &str) -> String {
        let shown = self.tokens.len();
        let cut = if shown < self.length { format!(", its first {shown} drawn") } else { String::new() };
        let mut out = format!(
            "<figure class=\"narrow\">\n<figcaption><strong>Masks of sample {} ({}), seed {}</strong> {} tokens{cut}. Predicted by the \
             encoder: <mark>as [MASK]</mark> <mark class=\"random\">with a random token in its place</mark> <mark class=\"kept\">left as \
             it is</mark></figcaption>\n<p class=\"tokens\">",
            self.sample,
            escaped(&shortened(&self.id, 60)),
            self.seed,
            self.length
        );
        for (i, (text, starts, encoder)) in self.tokens.iter().enumerate() {
            if i > 0 && *starts {
                out.push(' ');
            }
            let text = escaped(text);
            // Writing to a string does not fail.
            let _ = match encoder {
                Encoder::Shown => write!(out, "{text}"),
                Encoder::Masked => write!(out, "<mark>{text}</mark>"),
                Encoder::Random => write!(out, "<mark class=\"random\">{text}</mark>"),
                Encoder::Kept => write!(out, "<mark class=\"kept\">{text}</mark>"),
            };
        }
        let _ = write!(out, "</p>\n{}</figure>\n", self.svg(id));
        out
    }

    /// The encoder's mask as a row of cells, and below it what the decoder shows to each position.
    fn svg(&self, id: &str) -> String {
        let n = self.tokens.len();
        let cell = (440.0 / n.max(1) as f64).min(14.0);
        let (left, top) = (36.0, 22.0);
        let matrix = top + cell + 26.0;
        let height = if self.visible.is_some() { matrix + cell * n as f64 + 6.0 } else { top + cell + 6.0 };
        let masked = self.tokens.iter().filter(|token| token.2 != Encoder::Shown).count();
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 480 {height:.0}\" role=\"img\" aria-labelledby=\"{id}-t {id}-d\">\n\
             <title id=\"{id}-t\">Encoder and decoder masks of one text</title>\n<desc id=\"{id}-d\">The encoder predicts {masked} of {n} \
             tokens.{}</desc>\n<text x=\"{left}\" y=\"14\">encoder: tokens to predict</text>\n",
            if self.visible.is_some() {
                " Below, a row for each position: the tokens hidden from it in the decoder."
            } else {
                ""
            }
        );
        for (kind, class) in [(Encoder::Masked, "masked"), (Encoder::Random, "random"), (Encoder::Kept, "kept")] {
            let cells: Vec<bool> = self.tokens.iter().map(|token| token.2 == kind).collect();
            let _ = writeln!(out, "<path class=\"{class}\" d=\"{}\"/>", row(&cells, left, top, cell));
        }
        let frame = |y: f64, rows: usize| {
            let (width, height) = (cell * n as f64, cell * rows as f64);
            format!("<rect class=\"frame\" x=\"{left}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"/>\n")
        };
        out += &frame(top, 1);
        if let Some(visible) = &self.visible {
            let _ = writeln!(
                out,
                "<text x=\"{left}\" y=\"{:.1}\">decoder: hidden from each position; red: itself</text>",
                matrix - 8.0
            );
            let mut hidden = String::new();
            let mut own = String::new();
            for (i, sees) in visible.iter().enumerate() {
                let y = matrix + cell * i as f64;
                hidden +=
                    &row(&sees.iter().enumerate().map(|(j, sees)| i != j && !sees).collect::<Vec<_>>(), left, y, cell);
                own += &row(&(0..n).map(|j| i == j).collect::<Vec<_>>(), left, y, cell);
                if i % 10 == 0 {
                    let _ = writeln!(
                        out,
                        "<text class=\"end\" x=\"{}\" y=\"{:.1}\">{i}</text>",
                        left - 6.0,
                        y + cell / 2.0 + 4.5
                    );
                }
            }
            let _ = writeln!(out, "<path class=\"hidden\" d=\"{hidden}\"/>\n<path class=\"own\" d=\"{own}\"/>");
            out += &frame(matrix, n);
        }
        out.push_str("</svg>\n");
        out
    }
}

/// The cells of a row that are set, neighbours as one piece.
fn row(cells: &[bool], left: f64, y: f64, cell: f64) -> String {
    let mut out = String::new();
    let mut at = 0;
    for piece in cells.chunk_by(|a, b| a == b) {
        if piece[0] {
            let (x, width) = (left + at as f64 * cell, piece.len() as f64 * cell);
            let _ = write!(out, "M{x:.1} {y:.1}h{width:.1}v{cell:.1}h-{width:.1}z");
        }
        at += piece.len();
    }
    if out.is_empty() { "M0 0".into() } else { out }
}

/// The shards of a run: where its settings say, seen from here or from a folder above the run, and with the digest it was trained on.
fn open(run: &Run, settings: &Settings) -> std::result::Result<ShardSet, String> {
    let data = settings.data.as_ref().ok_or("the settings name no shards")?;
    let whole = run.dir.canonicalize().unwrap_or_else(|_| run.dir.clone());
    let places: Vec<PathBuf> =
        std::iter::once(data.clone()).chain(whole.ancestors().skip(1).take(4).map(|dir| dir.join(data))).collect();
    let place = places.iter().find(|place| ShardSet::is_set(place));
    let place = place.ok_or_else(|| format!("the shards {} are not here", data.display()))?;
    let shards = ShardSet::open(place).map_err(|e| e.to_string())?;
    let about = run.facts.origin.as_ref().map(|(about, _)| &about.data);
    let known = about.or_else(|| run.facts.state()?.settings.get("data"));
    let digest = hex16(&Sha256::digest(shards.description().map_err(|e| e.to_string())?));
    match known {
        Some(known) if !known.ends_with(&format!("[{digest}]")) => {
            Err(format!("the shards {} are not those the run was trained on", place.display()))
        }
        _ => Ok(shards),
    }
}

fn draw(run: &Run, settings: &Settings, shards: &ShardSet) -> Result<Masks> {
    let order = Order::new(settings.seed, shards.len(), held_out_texts(settings, shards.len()))?;
    let config = run.facts.origin.as_ref().map(|(_, config)| config);
    let limits = [settings.max_length.map(|n| n as usize), config.map(|config| config.max_position_embeddings)];
    let limit = limits.into_iter().flatten().fold(shards.facts().longest as usize, usize::min);
    let mut best = (0, usize::MAX);
    for sample in 0..LOOKED_AT.min(order.texts(Part::Train)) {
        let distance = shards.length(order.text(Part::Train, sample))?.min(limit).abs_diff(MOST / 2);
        if distance < best.1 {
            best = (sample, distance);
        }
    }
    let sample = best.0;
    let text = order.text(Part::Train, sample);
    let decoder = (settings.objective != Objective::Mlm).then_some(settings.decoder_mask_probability);
    let vocabulary = shards.facts().vocabulary();
    let rules = MaskRules::new(settings.seed, vocabulary, settings.encoder_mask_probability, decoder)?;
    let batch = Builder::new(rules, order, Part::Train, limit).build(shards, sample..sample + 1)?;
    let tokenizer = Tokenizer::load(shards.dir())?;
    let length = batch.tokens();
    let shown = length.min(MOST);
    let original = original(&batch);
    let source = shards.text(text)?;
    let encoder = |i: usize| match (original[i], batch.encoder_ids[i]) {
        (None, _) => Encoder::Shown,
        (Some(_), now) if now == vocabulary.mask => Encoder::Masked,
        (Some(was), now) if was == now => Encoder::Kept,
        _ => Encoder::Random,
    };
    let token = |i: usize| {
        let starts = source.is_word_start(i);
        let spelling = tokenizer.spelling(original[i].unwrap_or(batch.encoder_ids[i]));
        let bare = spelling.strip_prefix("##").filter(|_| !starts);
        (bare.unwrap_or(&spelling).to_string(), starts, encoder(i))
    };
    let sees = |i: usize| -> Vec<bool> {
        let visibility = batch.decoder.as_ref().map(|decoder| &decoder.visibility);
        (0..shown).map(|j| visibility.is_some_and(|v| v.sees(0, 0..length, i, j))).collect()
    };
    Ok(Masks {
        sample,
        id: shards.id(text)?.map_or_else(|| format!("text {text}"), str::to_string),
        length,
        tokens: (0..shown).map(token).collect(),
        visible: batch.decoder.is_some().then(|| (0..shown).map(sees).collect()),
        seed: settings.seed,
    })
}

/// The token that stood where the encoder has a label.
fn original(batch: &PretrainBatch) -> Vec<Option<u32>> {
    let mut original = vec![None; batch.tokens()];
    for (row, id) in batch.encoder_label_rows.iter().zip(&batch.encoder_label_ids) {
        original[*row as usize] = Some(*id);
    }
    original
}
