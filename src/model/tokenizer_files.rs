//! The tokenizer's part of an exported folder: the source's files byte for byte, and the ones some reader needs derived from them.
//!
//! text-embeddings-inference needs `tokenizer.json`, slow tokenizers of older transformers need `vocab.txt`, and without
//! `tokenizer_config.json` no reader knows the longest input.

use super::export::pretty;
use super::export::staging::Staging;
use super::small_file;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const TOKENIZER: &str = "tokenizer.json";
const VOCABULARY: &str = "vocab.txt";
const CONFIG: &str = "tokenizer_config.json";
const SPECIAL: &str = "special_tokens_map.json";
/// Everything a folder may hold of a tokenizer.
const FILES: [&str; 8] = [
    TOKENIZER,
    VOCABULARY,
    CONFIG,
    SPECIAL,
    "added_tokens.json",
    "sentencepiece.bpe.model",
    "vocab.json",
    "merges.txt",
];
/// Largest tokenizer file that is parsed; those of 250,000-token vocabularies take 17 MB.
const MAX_BYTES: u64 = 256 << 20;
/// Role, and the spellings of it in WordPiece and in SentencePiece vocabularies.
const ROLES: [(&str, [&str; 2]); 5] = [
    ("unk_token", ["[UNK]", "<unk>"]),
    ("sep_token", ["[SEP]", "</s>"]),
    ("pad_token", ["[PAD]", "<pad>"]),
    ("cls_token", ["[CLS]", "<s>"]),
    ("mask_token", ["[MASK]", "<mask>"]),
];

/// Copies the tokenizer at `source` (a folder, or one of its two main files) and derives what is missing.
pub(super) fn write(source: &Path, longest: usize, staging: &mut Staging) -> Result<()> {
    let present = find(source)?;
    for (name, path) in &present {
        staging.copy(path, name)?;
    }
    let settings = match present.get(CONFIG) {
        Some(path) => object(path)?,
        None => Map::new(),
    };
    let facts = match (present.get(TOKENIZER), present.get(VOCABULARY)) {
        (Some(path), _) => Facts::from_json(path)?,
        (None, Some(path)) => Facts::from_vocabulary(path, settings.get("do_lower_case").and_then(Value::as_bool))?,
        (None, None) => return Err(nothing(source)),
    };
    if !staging.has(TOKENIZER) {
        staging.write(TOKENIZER, pretty(&facts.tokenizer_json(source)?).as_bytes())?;
    }
    if !staging.has(VOCABULARY) && facts.word_piece {
        staging.write(VOCABULARY, facts.vocabulary(source)?.as_bytes())?;
    }
    let roles = facts.roles();
    if !staging.has(CONFIG) {
        let mut config = roles.clone();
        config.insert("model_max_length".into(), json!(longest));
        if facts.word_piece {
            config.insert("tokenizer_class".into(), json!("BertTokenizer"));
            config.insert("do_lower_case".into(), json!(facts.lower_case));
            config.insert("strip_accents".into(), facts.strip_accents.clone());
            config.insert("tokenize_chinese_chars".into(), json!(facts.chinese));
        } else {
            config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        }
        staging.write(CONFIG, pretty(&Value::Object(config)).as_bytes())?;
    }
    if !staging.has(SPECIAL) {
        staging.write(SPECIAL, pretty(&Value::Object(roles)).as_bytes())?;
    }
    Ok(())
}

/// The files that are there, by the name they are to have.
fn find(source: &Path) -> Result<BTreeMap<&'static str, PathBuf>> {
    if source.is_dir() {
        let all = FILES.into_iter().map(|name| (name, source.join(name)));
        return Ok(all.filter(|(_, path)| path.is_file()).collect());
    }
    if !source.is_file() {
        return Err(nothing(source));
    }
    let name = if source.extension().is_some_and(|e| e == "txt") { VOCABULARY } else { TOKENIZER };
    Ok(BTreeMap::from([(name, source.to_path_buf())]))
}

fn nothing(source: &Path) -> Error {
    Error::refused("no tokenizer: neither tokenizer.json nor vocab.txt")
        .path(source)
        .remedy("give the folder of a tokenizer")
}

/// What has to be known of a tokenizer to write the missing files.
struct Facts {
    word_piece: bool,
    lower_case: bool,
    strip_accents: Value,
    chinese: bool,
    /// Token to id.
    tokens: BTreeMap<String, u64>,
}

impl Facts {
    fn from_json(path: &Path) -> Result<Self> {
        let root = object(path)?;
        let model = root.get("model").and_then(Value::as_object);
        let Some(model) = model else {
            return Err(Error::refused("has no model")
                .path(path)
                .remedy("give a tokenizer.json of the tokenizers library"));
        };
        let mut tokens = BTreeMap::new();
        match model.get("vocab") {
            Some(Value::Object(map)) => {
                tokens.extend(map.iter().filter_map(|(token, id)| Some((token.clone(), id.as_u64()?))));
            }
            Some(Value::Array(list)) => {
                let named =
                    list.iter().enumerate().filter_map(|(i, row)| Some((row.get(0)?.as_str()?.to_string(), i as u64)));
                tokens.extend(named);
            }
            _ => {}
        }
        for added in root.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
            if let (Some(token), Some(id)) =
                (added.get("content").and_then(Value::as_str), added.get("id").and_then(Value::as_u64))
            {
                tokens.entry(token.to_string()).or_insert(id);
            }
        }
        let normalizer = |key: &str| root.get("normalizer").and_then(|n| n.get(key));
        Ok(Facts {
            word_piece: model.get("type").and_then(Value::as_str) == Some("WordPiece"),
            lower_case: normalizer("lowercase").and_then(Value::as_bool).unwrap_or(false),
            strip_accents: normalizer("strip_accents").cloned().unwrap_or(Value::Null),
            chinese: normalizer("handle_chinese_chars").and_then(Value::as_bool).unwrap_or(true),
            tokens,
        })
    }

    fn from_vocabulary(path: &Path, lower_case: Option<bool>) -> Result<Self> {
        let text = text(path)?;
        let mut tokens = BTreeMap::new();
        for (i, line) in text.lines().enumerate() {
            if tokens.insert(line.to_string(), i as u64).is_some() {
                let cause = format!("the token {line:?} is there twice");
                return Err(Error::refused(cause).path(path).line(i as u64 + 1).remedy("remove one of the two lines"));
            }
        }
        Ok(Facts {
            word_piece: true,
            lower_case: lower_case.unwrap_or(true),
            strip_accents: Value::Null,
            chinese: true,
            tokens,
        })
    }

    /// The special tokens the vocabulary has.
    fn roles(&self) -> Map<String, Value> {
        let spelled = |names: [&'static str; 2]| names.into_iter().find(|name| self.tokens.contains_key(*name));
        ROLES.into_iter().filter_map(|(role, names)| Some((role.to_string(), json!(spelled(names)?)))).collect()
    }

    /// The tokens in the order of their ids, one a line.
    fn vocabulary(&self, source: &Path) -> Result<String> {
        let mut order: Vec<(u64, &str)> = self.tokens.iter().map(|(token, id)| (*id, token.as_str())).collect();
        order.sort_unstable();
        if let Some((i, _)) = order.iter().enumerate().find(|(i, row)| *i as u64 != row.0) {
            let cause = format!("token ids are not 0, 1, 2, …: id {i} is missing or there twice");
            return Err(Error::refused(cause).path(source).remedy("put a vocab.txt beside tokenizer.json"));
        }
        let length = order.iter().map(|row| row.1.len() + 1).sum();
        Ok(order.iter().fold(String::with_capacity(length), |text, row| text + row.1 + "\n"))
    }

    /// BERT's WordPiece tokenizer over this vocabulary, as the tokenizers library writes it.
    fn tokenizer_json(&self, source: &Path) -> Result<Value> {
        let mut added = Vec::new();
        for (role, [token, _]) in ROLES {
            let Some(id) = self.tokens.get(token) else {
                let cause = format!("the vocabulary has no {token} ({role})");
                return Err(Error::refused(cause).path(source).remedy("give a BERT vocabulary, or a tokenizer.json"));
            };
            added.push(json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}));
        }
        added.sort_by_key(|token| token["id"].as_u64());
        let special = |name: &str| json!({"id": name, "ids": [self.tokens.get(name)], "tokens": [name]});
        let mark = |name: &str, kind: u8| json!({"SpecialToken": {"id": name, "type_id": kind}});
        let sequence = |name: &str, kind: u8| json!({"Sequence": {"id": name, "type_id": kind}});
        let first = [mark("[CLS]", 0), sequence("A", 0), mark("[SEP]", 0)];
        let pair: Vec<Value> = first.iter().cloned().chain([sequence("B", 1), mark("[SEP]", 1)]).collect();
        let mut order: Vec<(&String, &u64)> = self.tokens.iter().collect();
        order.sort_unstable_by_key(|row| row.1);
        let vocab: Map<String, Value> = order.into_iter().map(|(token, id)| (token.clone(), json!(id))).collect();
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": self.chinese,
                "strip_accents": self.strip_accents, "lowercase": self.lower_case},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {"type": "TemplateProcessing", "single": first, "pair": pair,
                "special_tokens": {"[CLS]": special("[CLS]"), "[SEP]": special("[SEP]")}},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": vocab},
        }))
    }
}

fn object(path: &Path) -> Result<Map<String, Value>> {
    serde_json::from_str(&text(path)?).map_err(|e| {
        Error::refused(format!("not a JSON object: {e}"))
            .path(path)
            .line(e.line().max(1) as u64)
            .remedy("get the tokenizer again")
    })
}

fn text(path: &Path) -> Result<String> {
    small_file::text(path, MAX_BYTES, "a tokenizer")
}
