//! The short way to the ids of BERT's tokenizers.
//!
//! BERT's normalizer works character by character and its pre-tokenizer splits at whitespace, so the stretches between spaces are
//! independent. A stretch of plain ASCII (nearly all of English text) is lower-cased, split at punctuation and looked up right
//! here, without the alignments and the strings that the `tokenizers` crate keeps per character and token. Any other stretch goes
//! through the crate, with a small memory of recent ones. The ids are the same by test, on real text and on random characters.

use ahash::AHashMap;
use tokenizers::{ModelWrapper, NormalizerWrapper, PreTokenizerWrapper};

use crate::error::Result;

use super::tokenizer::{Token, Tokenizer, char_boundary};

/// Longest stretch handed to the crate at once.
const PIECE: usize = 64 << 10;
/// Stretches up to this length are remembered, and this many of them.
const CACHED_LEN: usize = 48;
const CACHED: usize = 1 << 15;

/// Tables of a BERT tokenizer.
pub struct Fast {
    /// Tokens that begin a word.
    starts: AHashMap<Box<[u8]>, u32>,
    /// Tokens that continue a word, without their prefix.
    rests: AHashMap<Box<[u8]>, u32>,
    /// Bytes of the longest token.
    longest: usize,
    unk: u32,
    lowercase: bool,
    max_chars: usize,
    /// Literal special tokens, which the crate recognises in running text.
    added: Vec<Vec<u8>>,
    /// First bytes of those.
    added_first: [bool; 256],
    /// Whether a long stretch may be cut before one of [`CUTS`].
    cuts: bool,
}

/// Ids of recent stretches that are not ASCII.
#[derive(Default)]
pub struct Cache {
    stretches: AHashMap<Box<str>, Box<[Token]>>,
    word: Vec<u8>,
}

/// Punctuation that always stands alone, begins no token of several characters, and that accents never join across.
const CUTS: [char; 12] = ['.', ',', ';', ':', '!', '?', '/', '&', '=', '%', '。', '、'];

impl Fast {
    /// The tables, if `tokenizer` is one of BERT's in every setting that matters.
    pub fn of(tokenizer: &tokenizers::Tokenizer) -> Option<Fast> {
        let (ModelWrapper::WordPiece(model), Some(NormalizerWrapper::BertNormalizer(normalizer))) =
            (tokenizer.get_model(), tokenizer.get_normalizer())
        else {
            return None;
        };
        let bert_words = matches!(tokenizer.get_pre_tokenizer(), Some(PreTokenizerWrapper::BertPreTokenizer(_)));
        let added: Vec<_> = tokenizer.get_added_tokens_decoder().into_values().collect();
        let plain_added = added.iter().all(|t| {
            let text = t.content.as_str();
            !(t.lstrip
                || t.rstrip
                || t.single_word
                || t.normalized
                || text.is_empty()
                || text.contains(char::is_whitespace))
        });
        if !(bert_words && normalizer.clean_text && plain_added) {
            return None;
        }
        let prefix = model.continuing_subword_prefix.as_bytes();
        let vocab = tokenizers::Model::get_vocab(model);
        let unk = *vocab.get(&model.unk_token)?;
        let (mut starts, mut rests) = (AHashMap::new(), AHashMap::new());
        for (token, id) in vocab {
            if let Some(rest) = token.as_bytes().strip_prefix(prefix) {
                rests.insert(rest.into(), id);
            }
            starts.insert(token.into_bytes().into_boxed_slice(), id);
        }
        let longest = starts.keys().map(|k| k.len()).max().unwrap_or(1).max(1);
        let mut added_first = [false; 256];
        added.iter().for_each(|t| added_first[usize::from(t.content.as_bytes()[0])] = true);
        Some(Fast {
            starts,
            rests,
            longest,
            unk,
            lowercase: normalizer.lowercase,
            max_chars: model.max_input_chars_per_word,
            cuts: !added.iter().any(|t| t.content.contains(CUTS)),
            added: added.into_iter().map(|t| t.content.into_bytes()).collect(),
            added_first,
        })
    }

    /// Appends the tokens of `text` until `out` holds `limit` of them or the text ends.
    pub fn encode(
        &self,
        full: &Tokenizer,
        cache: &mut Cache,
        text: &str,
        limit: usize,
        out: &mut Vec<Token>,
    ) -> Result<()> {
        let bytes = text.as_bytes();
        let mut at = 0;
        while at < bytes.len() && out.len() < limit {
            if is_space(bytes[at]) {
                at += 1;
                continue;
            }
            let (mut end, mut plain) = (at, true);
            while end < bytes.len() && !is_space(bytes[end]) {
                plain &= bytes[end] < 128 && !self.added_first[usize::from(bytes[end])];
                end += 1;
            }
            // Whitespace is ASCII, so both ends are character boundaries.
            let stretch = &text[at..end];
            if plain || (stretch.is_ascii() && !self.holds_added(stretch.as_bytes())) {
                self.ascii(stretch.as_bytes(), &mut cache.word, limit, out);
            } else {
                self.other(full, cache, stretch, limit, out)?;
            }
            at = end;
        }
        Ok(())
    }

    fn holds_added(&self, stretch: &[u8]) -> bool {
        self.added.iter().any(|token| stretch.windows(token.len()).any(|w| w == &token[..]))
    }

    /// A stretch of ASCII without whitespace: control characters vanish, punctuation stands alone.
    fn ascii(&self, stretch: &[u8], word: &mut Vec<u8>, limit: usize, out: &mut Vec<Token>) {
        word.clear();
        for &b in stretch {
            if b.is_ascii_punctuation() {
                self.word(word, out);
                word.clear();
                if out.len() >= limit {
                    return;
                }
                self.word(&[b], out);
            } else if !b.is_ascii_control() {
                word.push(if self.lowercase { b.to_ascii_lowercase() } else { b });
            }
        }
        self.word(word, out);
    }

    /// One word: longest match first, or `[UNK]` whole.
    fn word(&self, word: &[u8], out: &mut Vec<Token>) {
        if word.is_empty() {
            return;
        }
        if word.len() > self.max_chars {
            return out.push(Token::new(self.unk, true));
        }
        let first = out.len();
        let mut at = 0;
        while at < word.len() {
            let table = if at == 0 { &self.starts } else { &self.rests };
            let mut end = word.len().min(at + self.longest);
            let id = loop {
                if let Some(&id) = table.get(&word[at..end]) {
                    break Some(id);
                }
                end -= 1;
                if end == at {
                    break None;
                }
            };
            let Some(id) = id else {
                out.truncate(first);
                return out.push(Token::new(self.unk, true));
            };
            out.push(Token::new(id, at == 0));
            at = end;
        }
    }

    /// A stretch that the crate must encode.
    fn other(
        &self,
        full: &Tokenizer,
        cache: &mut Cache,
        stretch: &str,
        limit: usize,
        out: &mut Vec<Token>,
    ) -> Result<()> {
        if stretch.len() > CACHED_LEN {
            let mut rest = stretch;
            while !rest.is_empty() && out.len() < limit {
                let (piece, tail) = self.cut(rest);
                full.encode_piece(piece, out)?;
                rest = tail;
            }
            return Ok(());
        }
        if let Some(tokens) = cache.stretches.get(stretch) {
            out.extend_from_slice(tokens);
            return Ok(());
        }
        let first = out.len();
        full.encode_piece(stretch, out)?;
        if cache.stretches.len() >= CACHED {
            cache.stretches.clear();
        }
        cache.stretches.insert(stretch.into(), out[first..].into());
        Ok(())
    }

    /// Cuts a stretch of more than a piece, as texts without spaces are, before punctuation that stands alone anyway. Without any
    /// for another piece it is cut where it is: more than 60,000 characters without space or punctuation are no text.
    fn cut<'s>(&self, text: &'s str) -> (&'s str, &'s str) {
        if text.len() <= PIECE {
            return (text, "");
        }
        let from = char_boundary(text, PIECE);
        let window = &text[from..char_boundary(text, 2 * PIECE)];
        let found = if self.cuts { window.find(CUTS) } else { None };
        text.split_at(found.map_or(from, |i| from + i))
    }
}

/// What separates stretches; all other whitespace is left to the crate, or is a control character that BERT drops.
fn is_space(b: u8) -> bool {
    matches!(b, b' ' | b'\t' | b'\n' | b'\r')
}

impl std::fmt::Debug for Fast {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fast({} tokens)", self.starts.len())
    }
}
