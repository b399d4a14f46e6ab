//! The tokenizer's part of an exported folder: the source's files byte for byte, and the ones some reader needs derived from them.
//!
//! text-embeddings-inference needs `tokenizer.json`, slow tokenizers of older transformers need `vocab.txt`, and without
//! `tokenizer_config.json` no reader knows the longest input.

use super::export::pretty;
use super::export::staging::Staging;
use crate::data::tokenizer::{TOKENIZER, Tokenizer, VOCABULARY};
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

const CONFIG: &str = "tokenizer_config.json";
const SPECIAL: &str = "special_tokens_map.json";
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
    let tokenizer = Tokenizer::load(source)?;
    let mut description: &[u8] = &[];
    for (name, bytes) in tokenizer.files() {
        staging.write(name, bytes)?;
        if name == TOKENIZER {
            description = bytes;
        }
    }
    let facts = Facts::read(description).map_err(|e| e.path(source))?;
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
    /// From the text of `tokenizer.json`.
    fn read(description: &[u8]) -> Result<Self> {
        let refuse = |cause: String| Error::refused(cause).remedy("give a tokenizer.json of the tokenizers library");
        let root: Map<String, Value> =
            serde_json::from_slice(description).map_err(|e| refuse(format!("not a JSON object: {e}")))?;
        let model = root.get("model").and_then(Value::as_object);
        let Some(model) = model else { return Err(refuse("has no model".into())) };
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
}
