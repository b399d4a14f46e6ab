//! What is encoded: raw text, tokenized on the way, or token shards.

use std::ops::Range;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

use crate::data::shard::ShardSet;
use crate::data::tokenize::stream::{Documented, TextStream};
use crate::error::{Error, Result};
use crate::files::hex;

/// What was read so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceCounts {
    /// Texts without a token: their embedding is that of `[CLS]` `[SEP]`.
    pub empty: u64,
    /// Texts that were cut.
    pub truncated: u64,
    /// Texts left out: their id was there before.
    pub duplicates: u64,
}

/// Texts in order.
pub enum Source {
    /// Raw text.
    Texts(Box<TextStream>),
    /// Shards.
    Shards(ShardTexts),
}

impl Source {
    /// What is read, in words that stay the same when the work goes on.
    pub fn describe(&self) -> String {
        match self {
            Source::Texts(_) => "documents".into(),
            Source::Shards(shards) => format!("shards {}", shards.digest),
        }
    }

    /// Number of texts, where it is known.
    pub fn total(&self) -> Option<u64> {
        match self {
            Source::Texts(_) => None,
            Source::Shards(shards) => Some(shards.texts.end - shards.texts.start),
        }
    }

    /// Part `part` of `parts`, from 0: neighbouring texts, about as many in each. The parts one after the other are the whole.
    ///
    /// # Errors
    /// Raw text, whose number nobody knows, or fewer texts than parts.
    pub fn part(self, part: u64, parts: u64) -> Result<Source> {
        let Source::Shards(mut shards) = self else {
            return Err(Error::usage("--shard: of raw text nobody knows where its parts begin")
                .remedy("tokenize it first, and give the folder of shards"));
        };
        let total = shards.texts.end;
        let cut = |i: u64| (u128::from(total) * u128::from(i) / u128::from(parts.max(1))) as u64;
        shards.texts = cut(part)..cut(part + 1);
        if shards.texts.is_empty() {
            return Err(
                Error::usage(format!("--shard {part}/{parts}: there are {total} texts")).remedy("use fewer shards")
            );
        }
        shards.at = shards.texts.start;
        if parts > 1 {
            let text = format!("{} part {part} of {parts}", shards.digest);
            shards.digest = hex(&Sha256::digest(text));
        }
        Ok(Source::Shards(shards))
    }

    /// The next texts, at most `count`; none at the end.
    ///
    /// # Errors
    /// What the source refuses.
    pub fn next(&mut self, count: usize) -> Result<Option<Documented>> {
        match self {
            Source::Texts(stream) => stream.next(count),
            Source::Shards(shards) => shards.next(count),
        }
    }

    /// Passes over `count` texts; false when there are fewer.
    ///
    /// # Errors
    /// What the source refuses.
    pub fn skip(&mut self, count: u64) -> Result<bool> {
        match self {
            Source::Texts(stream) => stream.skip(count),
            Source::Shards(shards) => {
                shards.at += count;
                Ok(shards.at <= shards.texts.end)
            }
        }
    }

    /// SHA-256 of what was read so far; of shards always that of all.
    pub fn digest(&self) -> String {
        match self {
            Source::Texts(stream) => stream.digest(),
            Source::Shards(shards) => shards.digest.clone(),
        }
    }

    /// What was read so far.
    pub fn counts(&self) -> SourceCounts {
        match self {
            Source::Texts(stream) => {
                let counts = stream.counts();
                SourceCounts { empty: counts.empty, truncated: counts.truncated, duplicates: counts.duplicates }
            }
            Source::Shards(shards) => shards.counts,
        }
    }
}

/// The texts of some sets of shards.
pub struct ShardTexts {
    sets: Vec<ShardSet>,
    /// Tokens kept of a text, `[CLS]` and `[SEP]` not counted.
    room: usize,
    /// Which of all.
    texts: Range<u64>,
    at: u64,
    counts: SourceCounts,
    digest: String,
}

impl ShardTexts {
    /// Opens the folders `dirs`, of which `room` tokens of a text are used.
    ///
    /// # Errors
    /// A folder that is no set of shards, or a damaged one.
    pub fn open(dirs: &[PathBuf], room: usize) -> Result<ShardTexts> {
        let sets = dirs.iter().map(|dir| ShardSet::open(dir)).collect::<Result<Vec<_>>>()?;
        let mut hash = Sha256::new();
        for set in &sets {
            hash.update(set.description()?);
        }
        let texts = 0..sets.iter().map(ShardSet::len).sum();
        Ok(ShardTexts { sets, room, texts, at: 0, counts: SourceCounts::default(), digest: hex(&hash.finalize()) })
    }

    /// The sets.
    pub fn sets(&self) -> &[ShardSet] {
        &self.sets
    }

    fn next(&mut self, count: usize) -> Result<Option<Documented>> {
        let (mut out, mut ids) = (Documented::default(), Vec::new());
        while out.ids.len() < count && self.at < self.texts.end {
            let (mut set, mut i) = (0, self.at);
            while set < self.sets.len() && i >= self.sets[set].len() {
                (set, i) = (set + 1, i - self.sets[set].len());
            }
            let Some(set) = self.sets.get(set) else { break };
            let text = set.text(i)?;
            ids.clear();
            text.copy_tokens(&mut ids);
            let [_, inner @ .., _] = ids.as_slice() else {
                return Err(Error::refused(format!(
                    "text {i} has {} tokens and not at least [CLS] and [SEP]",
                    ids.len()
                ))
                .path(set.dir())
                .remedy("tokenize again"));
            };
            self.counts.truncated += u64::from(inner.len() > self.room);
            self.counts.empty += u64::from(inner.is_empty());
            out.tokens.extend_from_slice(&inner[..inner.len().min(self.room)]);
            out.ends.push(out.tokens.len());
            out.ids.push(set.id(i)?.map_or_else(|| self.at.to_string(), str::to_owned));
            self.at += 1;
        }
        Ok((!out.ids.is_empty()).then_some(out))
    }
}
