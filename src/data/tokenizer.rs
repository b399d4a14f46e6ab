//! A model's tokenizer: loading it from the files that models come with, and turning text into token ids.
//!
//! Ids are those of the `tokenizers` crate, always. BERT's tokenizers take a shorter way to the same ids (see `wordpiece.rs`);
//! everything else goes through the crate. Truncation and padding settings of `tokenizer.json` are ignored: the caller cuts.

use std::fs;
use std::path::{Path, PathBuf};

use ahash::AHashMap;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokenizers::decoders::wordpiece::WordPiece as WordPieceDecoder;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::bert::BertProcessing;
use tokenizers::{AddedToken, ModelWrapper, PreTokenizerWrapper};

use crate::error::{Error, IoContext, Result};

use super::shard::Special;
use super::wordpiece::{Cache, Fast};

/// A token as the encoder hands it out: the id, and in the top bit whether it begins a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token(u32);

impl Token {
    const START: u32 = 1 << 31;

    /// Token `id`, the first of its word or not.
    pub fn new(id: u32, starts_word: bool) -> Token {
        Token(id | if starts_word { Self::START } else { 0 })
    }

    /// The id.
    pub fn id(self) -> u32 {
        self.0 & !Self::START
    }

    /// Whether it begins a word.
    pub fn starts_word(self) -> bool {
        self.0 & Self::START != 0
    }
}

/// A loaded tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    fast: Option<Fast>,
    /// Whether splitting the text at whitespace leaves the ids the same.
    splits_at_whitespace: bool,
    /// By token id: the token continues a word. `None` where the words come from the pre-tokenizer.
    continues: Option<Vec<bool>>,
    vocab_size: u32,
    special: Special,
    fingerprint: [u8; 32],
    files: Vec<(String, Vec<u8>)>,
}

/// One thread's encoder.
pub struct Encoder<'t> {
    tokenizer: &'t Tokenizer,
    cache: Cache,
}

/// The whole tokenizer, in the form of the `tokenizers` crate.
pub const TOKENIZER: &str = "tokenizer.json";
/// BERT's list of words.
pub const VOCABULARY: &str = "vocab.txt";

/// Files of a tokenizer that are copied along with everything made with it.
const FILES: [&str; 8] = [
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    VOCABULARY,
    "added_tokens.json",
    "sentencepiece.bpe.model",
    "vocab.json",
    "merges.txt",
];

/// Pieces of text handed to the crate at once: it needs some hundred bytes of memory per byte of text.
const PIECE: usize = 64 << 10;

impl Tokenizer {
    /// Whether `folder` holds a tokenizer.
    pub fn is_at(folder: &Path) -> bool {
        [TOKENIZER, VOCABULARY].iter().any(|name| folder.join(name).is_file())
    }

    /// Loads from a folder with `tokenizer.json` or `vocab.txt`, or from one of these files.
    pub fn load(path: &Path) -> Result<Tokenizer> {
        let (dir, file) = locate(path)?;
        let mut files = Vec::new();
        for name in FILES {
            let path = dir.join(name);
            if path.is_file() {
                files.push((name.to_string(), fs::read(&path).at(&path, "cannot read")?));
            }
        }
        let names = Names::read(&dir)?;
        let json = file.extension().is_some_and(|e| e == "json");
        let mut inner = if json { from_json(&file)? } else { from_vocab(&file, &names)? };
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| unusable(&file, &e.to_string()))?;
        let main = if json { TOKENIZER } else { VOCABULARY };
        if file.file_name().is_some_and(|n| n != main) {
            // A file of another name is the tokenizer; what lies beside it may belong to a different one.
            files = vec![(main.into(), fs::read(&file).at(&file, "cannot read")?)];
        }
        if !json {
            // Consumers of an export need the other form: that of this very list, whatever lies beside it.
            files.retain(|(name, _)| name != TOKENIZER);
            let text = inner.to_string(true).map_err(|e| unusable(&file, &e.to_string()))?;
            files.push((TOKENIZER.into(), text.into_bytes()));
        }
        Self::build(inner, file, &names, files)
    }

    fn build(
        inner: tokenizers::Tokenizer,
        path: PathBuf,
        names: &Names,
        files: Vec<(String, Vec<u8>)>,
    ) -> Result<Tokenizer> {
        let vocab = inner.get_vocab(true);
        // Ids may have gaps: the size is what an id must stay below.
        let vocab_size = vocab.values().max().map_or(0, |&m| m.saturating_add(1));
        if vocab_size == 0 || vocab_size > 1 << 30 {
            return Err(unusable(&path, "the vocabulary is empty or its ids are absurd"));
        }
        let special = names.find(&inner).map_err(|e| e.path(&path))?;
        let continues = match inner.get_model() {
            ModelWrapper::WordPiece(model) => {
                let mut flags = vec![false; vocab_size as usize];
                for (token, &id) in &vocab {
                    flags[id as usize] = token.starts_with(&model.continuing_subword_prefix);
                }
                Some(flags)
            }
            _ => None,
        };
        let splits_at_whitespace = matches!(
            inner.get_pre_tokenizer(),
            Some(
                PreTokenizerWrapper::BertPreTokenizer(_)
                    | PreTokenizerWrapper::Whitespace(_)
                    | PreTokenizerWrapper::WhitespaceSplit(_)
            )
        );
        let fingerprint = fingerprint(&inner, special).map_err(|e| unusable(&path, &e))?;
        let fast = Fast::of(&inner);
        Ok(Tokenizer { inner, path, fast, splits_at_whitespace, continues, vocab_size, special, fingerprint, files })
    }

    /// One more than the largest token id.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// The special tokens' ids.
    pub fn special(&self) -> Special {
        self.special
    }

    /// SHA-256 of everything that decides the token ids of a text: model, normalizer, pre-tokenizer, added and special tokens.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// The tokenizer's files, by name; `tokenizer.json` is always among them.
    pub fn files(&self) -> &[(String, Vec<u8>)] {
        &self.files
    }

    /// The text of a token, as the vocabulary spells it.
    pub fn spelling(&self, id: u32) -> String {
        self.inner.id_to_token(id).unwrap_or_else(|| format!("<{id}>"))
    }

    /// The first token id below `limit` that means another token in `other`, with both spellings; `None` where the ids agree.
    pub fn first_difference(&self, other: &Tokenizer, limit: u32) -> Option<(u32, String, String)> {
        (0..limit)
            .find(|&id| self.inner.id_to_token(id) != other.inner.id_to_token(id))
            .map(|id| (id, self.spelling(id), other.spelling(id)))
    }

    /// An encoder for one thread.
    pub fn encoder(&self) -> Encoder<'_> {
        Encoder { tokenizer: self, cache: Cache::default() }
    }

    /// Ids of the tokens of a short text such as a prefix, without special tokens.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let mut tokens = Vec::new();
        self.encoder().encode(text, usize::MAX, &mut tokens)?;
        Ok(tokens.into_iter().map(Token::id).collect())
    }

    /// Encodes through the crate alone, without special tokens; what [`Encoder::encode`] is tested against.
    pub fn encode_reference(&self, text: &str) -> Result<Vec<Token>> {
        let mut out = Vec::new();
        self.encode_piece(text, &mut out)?;
        Ok(out)
    }

    /// Appends the tokens of `text`, whole, through the crate.
    pub(super) fn encode_piece(&self, text: &str, out: &mut Vec<Token>) -> Result<()> {
        let failed = |e: tokenizers::Error| unusable(&self.path, &format!("it cannot encode a text: {e}"));
        if let Some(continues) = &self.continues {
            let encoding = self.inner.encode_fast(text, false).map_err(failed)?;
            out.extend(encoding.get_ids().iter().map(|&id| Token::new(id, !continues[id as usize])));
        } else {
            let encoding = self.inner.encode(text, false).map_err(failed)?;
            let mut previous = None;
            for (&id, &word) in encoding.get_ids().iter().zip(encoding.get_word_ids()) {
                out.push(Token::new(id, word.is_none() || word != previous));
                previous = word;
            }
        }
        Ok(())
    }
}

impl Encoder<'_> {
    /// Appends tokens of `text`, without `[CLS]` and `[SEP]`, until `out` holds `limit` tokens or the text ends. May go past the limit
    /// by some tokens, never stops short of it.
    pub fn encode(&mut self, text: &str, limit: usize, out: &mut Vec<Token>) -> Result<()> {
        if let Some(fast) = &self.tokenizer.fast {
            return fast.encode(self.tokenizer, &mut self.cache, text, limit, out);
        }
        let mut rest = text;
        while !rest.is_empty() && out.len() < limit {
            let (piece, tail) = self.cut(rest);
            self.tokenizer.encode_piece(piece, out)?;
            rest = tail;
        }
        Ok(())
    }

    /// The next piece: short texts whole, long ones cut before whitespace. Where words are not split at whitespace, the cut of a
    /// long text may change a token beside it; pieces are then longer, so that this is rare.
    fn cut<'s>(&self, text: &'s str) -> (&'s str, &'s str) {
        let size = if self.tokenizer.splits_at_whitespace { PIECE } else { 4 * PIECE };
        if text.len() <= size {
            return (text, "");
        }
        let from = char_boundary(text, size);
        let at = text[from..].find([' ', '\n', '\t', '\r']).map_or(text.len(), |i| from + i);
        // Words without end, as in Chinese: cut them where they are.
        text.split_at(if at - from > size { from } else { at })
    }
}

/// The first character boundary at or after byte `at`.
pub(super) fn char_boundary(text: &str, at: usize) -> usize {
    (at..text.len()).find(|&i| text.is_char_boundary(i)).unwrap_or(text.len())
}

/// The folder and the file that `path` means.
fn locate(path: &Path) -> Result<(PathBuf, PathBuf)> {
    let meta = fs::metadata(path).at(path, "cannot open the tokenizer")?;
    if !meta.is_dir() {
        let dir = path.parent().unwrap_or(Path::new("")).to_path_buf();
        return Ok((dir, path.to_path_buf()));
    }
    [TOKENIZER, VOCABULARY].iter().map(|name| path.join(name)).find(|p| p.is_file()).map_or_else(
        || {
            Err(Error::refused("holds neither tokenizer.json nor vocab.txt")
                .path(path)
                .remedy("give the folder of a model, or one of these files"))
        },
        |file| Ok((path.to_path_buf(), file)),
    )
}

fn unusable(path: &Path, cause: &str) -> Error {
    Error::refused(format!("the tokenizer cannot be used: {cause}"))
        .path(path)
        .remedy("use the files of a BERT-like model")
}

fn from_json(file: &Path) -> Result<tokenizers::Tokenizer> {
    let bytes = fs::read(file).at(file, "cannot read")?;
    tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| unusable(file, &e.to_string()))
}

/// BERT's tokenizer from its word list, with the settings that `tokenizer_config.json` beside it may hold.
fn from_vocab(file: &Path, names: &Names) -> Result<tokenizers::Tokenizer> {
    let text = fs::read(file).at(file, "cannot read")?;
    let text = String::from_utf8(text).map_err(|_| unusable(file, "it is not UTF-8"))?;
    let words: AHashMap<String, u32> = text.lines().zip(0..).map(|(word, id)| (word.to_string(), id)).collect();
    let flag = |key: &str, default: bool| names.config.get(key).and_then(Value::as_bool).unwrap_or(default);
    let model = WordPiece::builder()
        .vocab(words)
        .unk_token(names.unk.clone())
        .build()
        .map_err(|e| unusable(file, &e.to_string()))?;
    let strip_accents = names.config.get("strip_accents").and_then(Value::as_bool);
    let normalizer =
        BertNormalizer::new(true, flag("tokenize_chinese_chars", true), strip_accents, flag("do_lower_case", true));
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_normalizer(Some(normalizer)).with_pre_tokenizer(Some(BertPreTokenizer));
    tokenizer.with_decoder(Some(WordPieceDecoder::default()));
    let marks = [&names.sep, &names.cls].map(|name| Some((name.clone(), tokenizer.token_to_id(name)?)));
    if let [Some(sep), Some(cls)] = marks {
        tokenizer.with_post_processor(Some(BertProcessing::new(sep, cls)));
    }
    let added: Vec<AddedToken> = [&names.pad, &names.unk, &names.cls, &names.sep, &names.mask]
        .into_iter()
        .filter(|name| tokenizer.token_to_id(name).is_some())
        .map(|name| AddedToken::from(name.as_str(), true))
        .collect();
    tokenizer.add_special_tokens(&added);
    Ok(tokenizer)
}

/// What the special tokens are called.
struct Names {
    cls: String,
    sep: String,
    mask: String,
    pad: String,
    unk: String,
    config: Value,
}

impl Names {
    /// From `tokenizer_config.json` or `special_tokens_map.json` where they say, else as BERT calls them.
    fn read(dir: &Path) -> Result<Names> {
        let mut values = Vec::new();
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            let path = dir.join(name);
            if path.is_file() {
                let bytes = fs::read(&path).at(&path, "cannot read")?;
                let value: Value = serde_json::from_slice(&bytes).map_err(|e| {
                    Error::refused(format!("is not JSON: {e}")).path(&path).remedy("restore or remove the file")
                })?;
                values.push(value);
            }
        }
        let name = |key: &str, default: &str| {
            let said = values.iter().filter_map(|v| v.get(key));
            // Either a string or an object with the string as its content.
            let said = said.filter_map(|v| v.as_str().or_else(|| v.get("content")?.as_str())).next();
            said.unwrap_or(default).to_string()
        };
        Ok(Names {
            cls: name("cls_token", "[CLS]"),
            sep: name("sep_token", "[SEP]"),
            mask: name("mask_token", "[MASK]"),
            pad: name("pad_token", "[PAD]"),
            unk: name("unk_token", "[UNK]"),
            config: values.into_iter().next().unwrap_or(Value::Null),
        })
    }

    fn find(&self, tokenizer: &tokenizers::Tokenizer) -> Result<Special> {
        let id = |name: &str, other: &str| {
            tokenizer.token_to_id(name).or_else(|| tokenizer.token_to_id(other)).ok_or_else(|| {
                Error::refused(format!("the vocabulary has no {name}")).remedy(
                    "use the tokenizer of a BERT-like model, or name its special tokens in tokenizer_config.json",
                )
            })
        };
        Ok(Special {
            cls: id(&self.cls, "<s>")?,
            sep: id(&self.sep, "</s>")?,
            mask: id(&self.mask, "<mask>")?,
            pad: id(&self.pad, "<pad>")?,
            unk: id(&self.unk, "<unk>")?,
        })
    }
}

/// Hashes the parts of the tokenizer's own description that decide ids, so that the same tokenizer in another file is the same.
fn fingerprint(tokenizer: &tokenizers::Tokenizer, special: Special) -> std::result::Result<[u8; 32], String> {
    let text = tokenizer.to_string(false).map_err(|e| e.to_string())?;
    let value: Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
    let mut hash = Sha256::new();
    for part in ["normalizer", "pre_tokenizer", "model", "added_tokens"] {
        hash.update(part);
        hash.update(value.get(part).unwrap_or(&Value::Null).to_string());
    }
    for id in [special.cls, special.sep, special.mask, special.pad, special.unk] {
        hash.update(id.to_le_bytes());
    }
    Ok(hash.finalize().into())
}
