//! Shards as the corpus that batches are built from.

use crate::data::corpus::Corpus;
use crate::data::masking::Vocabulary;
use crate::error::Result;

use super::{Facts, ShardSet};

impl Corpus for ShardSet {
    fn texts(&self) -> u64 {
        self.len()
    }

    fn length(&self, i: u64) -> Result<usize> {
        let (shard, k) = self.locate(i)?;
        shard.length(k)
    }

    fn read(&self, i: u64, ids: &mut Vec<u32>, word_start: &mut Vec<bool>) -> Result<()> {
        let text = self.text(i)?;
        ids.clear();
        text.copy_tokens(ids);
        word_start.clear();
        word_start.extend((0..text.len()).map(|k| text.is_word_start(k)));
        Ok(())
    }
}

impl Facts {
    /// What masking must know of the vocabulary.
    pub fn vocabulary(&self) -> Vocabulary {
        let special = self.special;
        Vocabulary {
            size: self.vocab_size,
            cls: special.cls,
            sep: special.sep,
            pad: special.pad,
            mask: special.mask,
            unk: Some(special.unk),
        }
    }
}
