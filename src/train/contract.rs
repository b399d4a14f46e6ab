//! The step contract: padded PyTorch-style batches in a safetensors file, and what the engine makes of them.
//!
//! Inputs are named as the reference names them (`encoder_input_ids` `[B, L]`, …, `decoder_attention_mask` `[B, L, L]`), integers of
//! any width. They are packed here: padding goes, labels of −100 go, a dense visibility matrix becomes bit rows.

use std::path::Path;

use crate::data::batch::{Bags, DecoderBatch, PretrainBatch, Visibility};
use crate::data::pairs::batch::{ContrastiveBatch, CrossBatch};
use crate::data::pairs::texts::TextBatch;
use crate::error::{Error, Result};
use crate::files::{self, Disk};
use crate::graph::params::Params;
use crate::model::config::BertConfig;
use crate::model::element::Dtype;
use crate::model::safetensors::SafeTensors;
use crate::model::safetensors::writer::{Spec, Writer};
use crate::model::tensor_file::{Info, TensorFile};

/// The label that means "no loss here".
const IGNORE: i64 = -100;

/// A file of named integer tensors.
pub struct BatchFile {
    file: SafeTensors,
    prefix: String,
}

/// An integer tensor, widened.
struct Ints {
    shape: Vec<usize>,
    values: Vec<i64>,
}

impl BatchFile {
    /// Opens the file at `path`; names are looked up below `prefix` (trajectories number their batches, `0.`).
    pub fn open(path: &Path, prefix: &str) -> Result<Self> {
        Ok(BatchFile { file: SafeTensors::open(path)?, prefix: prefix.to_string() })
    }

    fn refuse(&self, name: &str, cause: String) -> Error {
        let remedy = "see `step --help` for the inputs of an objective";
        Error::refused(cause).path(self.file.path()).tensor(format!("{}{name}", self.prefix)).remedy(remedy)
    }

    fn ints(&self, name: &str, rank: usize) -> Result<Ints> {
        let full = format!("{}{name}", self.prefix);
        let info = self.file.info(&full).ok_or_else(|| self.refuse(name, "the input is missing".into()))?;
        if info.shape.len() != rank {
            return Err(self.refuse(name, format!("has shape {:?}, not {rank} dimensions", info.shape)));
        }
        let mut values = vec![0; info.shape.iter().product()];
        self.file.read_i64(&full, &info.shape, &mut values)?;
        Ok(Ints { shape: info.shape, values })
    }

    /// A tensor that must have the shape `[B, L]` of the batch.
    fn like(&self, name: &str, shape: &[usize]) -> Result<Vec<i64>> {
        let t = self.ints(name, shape.len())?;
        if t.shape != shape {
            return Err(self.refuse(name, format!("has shape {:?}, not {shape:?}", t.shape)));
        }
        Ok(t.values)
    }

    /// The batch of a pre-training objective, for a model with `vocabulary` tokens and at most `positions` positions.
    pub fn pretrain(&self, decoder: bool, vocabulary: usize, positions: usize) -> Result<PretrainBatch> {
        let ids = self.ints("encoder_input_ids", 2)?;
        let shape = ids.shape.clone();
        let mask = self.like("encoder_attention_mask", &shape)?;
        let packing =
            Packing::new(&mask, shape[0], shape[1], positions).map_err(|c| self.refuse("encoder_attention_mask", c))?;
        let tokens = |name: &str, padded: &[i64]| packing.tokens(padded, vocabulary).map_err(|c| self.refuse(name, c));
        let labels =
            |name: &str| packing.labels(&self.like(name, &shape)?, vocabulary).map_err(|c| self.refuse(name, c));
        let (encoder_label_rows, encoder_label_ids) = labels("encoder_labels")?;
        if encoder_label_ids.is_empty() {
            return Err(self.refuse("encoder_labels", "holds no label, so there is no loss".into()));
        }
        let decoder = match decoder {
            false => None,
            true => {
                let (label_rows, label_ids) = labels("decoder_labels")?;
                if label_ids.is_empty() {
                    return Err(self.refuse("decoder_labels", "holds no label, so there is no loss".into()));
                }
                let ids = self.like("decoder_input_ids", &shape)?;
                let visible = self.like("decoder_attention_mask", &[shape[0], shape[1], shape[1]])?;
                if let Some(x) = visible.iter().find(|&&x| x != 0 && x != 1) {
                    return Err(self.refuse("decoder_attention_mask", format!("holds {x}, neither 0 nor 1")));
                }
                let visibility = packing.visibility(&visible);
                Some(DecoderBatch { ids: tokens("decoder_input_ids", &ids)?, label_rows, label_ids, visibility })
            }
        };
        Ok(PretrainBatch {
            encoder_ids: tokens("encoder_input_ids", &ids.values)?,
            samples: (0..shape[0] as u64).collect(),
            encoder_label_rows,
            encoder_label_ids,
            decoder,
            bags: None,
            cu_seqlens: packing.cu_seqlens,
        })
    }

    /// The batch of DupMAE: the same with a decoder, and bags of words.
    pub fn dupmae(&self, vocabulary: usize, positions: usize) -> Result<PretrainBatch> {
        let batch = self.pretrain(true, vocabulary, positions)?;
        let bags = self.bags(&batch.cu_seqlens, vocabulary)?;
        Ok(PretrainBatch { bags: Some(bags), ..batch })
    }

    /// `bag_word_weight` `[B, V]`: equal weights of the words of a text, 0 elsewhere.
    fn bags(&self, cu_seqlens: &[u32], vocabulary: usize) -> Result<Bags> {
        let (name, texts) = ("bag_word_weight", cu_seqlens.len() - 1);
        let full = format!("{}{name}", self.prefix);
        let info = self.file.info(&full).ok_or_else(|| self.refuse(name, "the input is missing".into()))?;
        if info.shape != [texts, vocabulary] {
            return Err(self.refuse(name, format!("has shape {:?}, not [{texts}, {vocabulary}]", info.shape)));
        }
        let mut weights = vec![0.0; texts * vocabulary];
        self.file.read_f32(&full, &info.shape, &mut weights)?;
        let mut bags = Bags::new();
        for (row, weights) in weights.chunks_exact(vocabulary).enumerate() {
            let words: Vec<u32> = (0..vocabulary as u32).filter(|&id| weights[id as usize] != 0.0).collect();
            let weight = words.first().map_or(0.0, |&id| weights[id as usize]);
            if let Some(&id) = words.iter().find(|&&id| weights[id as usize] != weight) {
                let cause = format!(
                    "row {row} weighs its words differently: {weight} and, id {id}, {}; all words of a text weigh 1/n",
                    weights[id as usize]
                );
                return Err(self.refuse(name, cause));
            }
            if weight < 0.0 {
                return Err(self.refuse(name, format!("row {row} holds {weight}, below 0")));
            }
            let tokens = (cu_seqlens[row + 1] - cu_seqlens[row]) as usize;
            if words.len() > tokens {
                let cause = format!("row {row} weighs {} words, but its text has {tokens} tokens", words.len());
                return Err(self.refuse(name, cause));
            }
            bags.push(&words, weight);
        }
        Ok(bags)
    }

    /// Padded texts `<prefix>input_ids`, `<prefix>attention_mask` and, where they are there, `<prefix>token_type_ids`. Dropout is off, so
    /// the texts need no names that differ between sides.
    fn texts(&self, prefix: &str, vocabulary: usize, (positions, types): (usize, usize)) -> Result<TextBatch> {
        let [ids, mask, kinds] =
            ["input_ids", "attention_mask", "token_type_ids"].map(|name| format!("{prefix}{name}"));
        let padded = self.ints(&ids, 2)?;
        let shape = padded.shape.clone();
        let ones = self.like(&mask, &shape)?;
        let packing = Packing::new(&ones, shape[0], shape[1], positions).map_err(|c| self.refuse(&mask, c))?;
        let ids = packing.tokens(&padded.values, vocabulary).map_err(|c| self.refuse(&ids, c))?;
        let has_types = self.file.info(&format!("{}{kinds}", self.prefix)).is_some();
        let types = match has_types {
            true => packing.tokens(&self.like(&kinds, &shape)?, types).map_err(|c| self.refuse(&kinds, c))?,
            false => vec![0; ids.len()],
        };
        Ok(TextBatch { samples: (0..shape[0] as u64).collect(), cu_seqlens: packing.cu_seqlens, ids, types })
    }

    /// The batch of a bi-encoder whose queries have `group` passages each.
    pub fn contrastive(&self, group: usize, config: &BertConfig) -> Result<ContrastiveBatch> {
        let limits = (config.max_position_embeddings, config.type_vocab_size);
        let queries = self.texts("query.", config.vocab_size, limits)?;
        let passages = self.texts("passage.", config.vocab_size, limits)?;
        let (q, p) = (queries.samples.len(), passages.samples.len());
        if q * group != p {
            let cause = format!("holds {p} passages for {q} queries, not {group} each");
            return Err(self.refuse("passage.input_ids", cause));
        }
        let teacher = match self.file.info(&format!("{}teacher_score", self.prefix)) {
            None => None,
            Some(info) if info.shape == [q, group] => {
                let mut scores = vec![0.0; q * group];
                self.file.read_f32(&format!("{}teacher_score", self.prefix), &info.shape, &mut scores)?;
                Some(scores)
            }
            Some(info) => {
                return Err(self.refuse("teacher_score", format!("has shape {:?}, not [{q}, {group}]", info.shape)));
            }
        };
        let targets = (0..q).map(|b| (b * group) as u32).collect();
        let (rows, members) = ((0..q as u32).collect(), (0..p as u32).collect());
        Ok(ContrastiveBatch { queries, passages, group, across: None, targets, hidden: None, teacher, rows, members })
    }

    /// The batch of a cross-encoder whose queries have `group` pairs each.
    pub fn cross(&self, group: usize, config: &BertConfig) -> Result<CrossBatch> {
        let pairs = self.texts("", config.vocab_size, (config.max_position_embeddings, config.type_vocab_size))?;
        if !pairs.samples.len().is_multiple_of(group) {
            let cause = format!("holds {} pairs, no multiple of {group}", pairs.samples.len());
            return Err(self.refuse("input_ids", cause));
        }
        let n = pairs.samples.len();
        let (rows, members) = ((0..(n / group) as u32).collect(), (0..n as u32).collect());
        Ok(CrossBatch { pairs, group, teacher: None, rows, members })
    }
}

/// Something that comes out of a step, by name.
pub struct Outcome {
    name: &'static str,
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl Outcome {
    /// A loss.
    pub fn loss(name: &'static str, value: f64) -> Self {
        Outcome { name, shape: Vec::new(), values: vec![value as f32] }
    }

    /// A matrix of `width` columns.
    pub fn matrix(name: &'static str, values: Vec<f32>, width: usize) -> Self {
        Outcome { name, shape: vec![values.len() / width, width], values }
    }
}

/// Writes what came out of one forward and backward, and `grad.<parameter>` of every parameter, to the file `path`, which must not exist.
/// `name` turns the engine's names of parameters into those of the checkpoint.
pub fn write_gradients(
    path: &Path,
    params: &Params,
    outcomes: &[Outcome],
    name: impl Fn(&str) -> String,
) -> Result<()> {
    let spec = |name: String, shape: Vec<usize>| Spec { name, info: Info { dtype: Dtype::F32, shape } };
    let (parts, grad) = (params.parts(), |part: &str| format!("grad.{}", name(part)));
    let specs = outcomes.iter().map(|o| spec(o.name.to_string(), o.shape.clone()));
    let specs = specs.chain(parts.iter().map(|p| spec(grad(&p.name), p.shape.clone()))).collect();
    let temporary = files::sibling(path, &format!(".tmp-{}", std::process::id()))?;
    let disk = Disk::default();
    let written = Writer::create(&temporary, specs, &[]).and_then(|mut writer| {
        for outcome in outcomes {
            writer.write_f32(outcome.name, &outcome.values)?;
        }
        for part in parts {
            writer.write_f32(&grad(&part.name), &params.get_gradient(part))?;
        }
        writer.finish()?;
        disk.rename(&temporary, path)?;
        disk.sync_dir(files::parent(path))
    });
    if written.is_err() {
        // The error that matters is the first one; the temporary file may not even exist.
        let _ = disk.remove(&temporary);
    }
    // Errors speak of the file that was asked for.
    written.map_err(|e| e.path(path))
}

/// Which cells of a padded batch are tokens.
struct Packing {
    length: usize,
    cu_seqlens: Vec<u32>,
}

impl Packing {
    fn new(mask: &[i64], count: usize, length: usize, positions: usize) -> std::result::Result<Self, String> {
        let mut cu_seqlens = vec![0u32];
        for (s, row) in mask.chunks_exact(length.max(1)).take(count).enumerate() {
            let n = row.iter().take_while(|&&m| m == 1).count();
            if n == 0 || row[n..].iter().any(|&m| m != 0) {
                return Err(format!("row {s} is not ones followed by zeros"));
            }
            if n > positions {
                return Err(format!("row {s} has {n} tokens but the model has {positions} positions"));
            }
            cu_seqlens.push(cu_seqlens[s] + n as u32);
        }
        if cu_seqlens.len() == 1 {
            return Err("holds no sequence".into());
        }
        Ok(Packing { length, cu_seqlens })
    }

    /// Row, first token and length of each sequence.
    fn sequences(&self) -> impl Iterator<Item = (usize, u32, usize)> + '_ {
        self.cu_seqlens.windows(2).enumerate().map(|(s, w)| (s, w[0], (w[1] - w[0]) as usize))
    }

    fn tokens(&self, padded: &[i64], vocabulary: usize) -> std::result::Result<Vec<u32>, String> {
        let mut out = Vec::new();
        for (s, _, n) in self.sequences() {
            for &id in &padded[s * self.length..][..n] {
                match usize::try_from(id) {
                    Ok(i) if i < vocabulary => out.push(i as u32),
                    _ => return Err(format!("row {s} holds id {id}, outside the vocabulary of {vocabulary}")),
                }
            }
        }
        Ok(out)
    }

    fn labels(&self, padded: &[i64], vocabulary: usize) -> std::result::Result<(Vec<u32>, Vec<u32>), String> {
        let (mut rows, mut ids) = (Vec::new(), Vec::new());
        for (s, first, n) in self.sequences() {
            for (i, &id) in padded[s * self.length..][..self.length].iter().enumerate() {
                match usize::try_from(id) {
                    _ if id == IGNORE => {}
                    Ok(label) if label < vocabulary && i < n => {
                        rows.push(first + i as u32);
                        ids.push(label as u32);
                    }
                    _ => {
                        return Err(format!(
                            "row {s} holds label {id} at position {i}: padding, or outside the vocabulary"
                        ));
                    }
                }
            }
        }
        Ok((rows, ids))
    }

    /// One bit row a position.
    fn visibility(&self, visible: &[i64]) -> Visibility {
        let mut v = Visibility { offsets: vec![0], ..Visibility::default() };
        for (s, _, n) in self.sequences() {
            for i in 0..n {
                let row = &visible[(s * self.length + i) * self.length..][..n];
                v.words.extend(
                    row.chunks(32).map(|c| c.iter().enumerate().fold(0u32, |w, (j, &x)| w | u32::from(x == 1) << j)),
                );
                v.row.push(i as u16);
            }
            v.offsets.push(v.words.len() as u32);
        }
        v
    }
}
