//! Texts to mask and a plain view of what came out.

use retromae_engine::data::batch::{Builder, PretrainBatch};
use retromae_engine::data::corpus::{Corpus, MemoryCorpus, Tokens};
use retromae_engine::data::masking::{MaskRules, MaskedText, Masker, TextVisibility, Vocabulary, pool_rows, row_words};
use retromae_engine::data::order::{Order, Part};
use retromae_engine::rng::{Site, Stream};

pub const CLS: u32 = 101;
pub const SEP: u32 = 102;
pub const MASK: u32 = 103;
pub const UNK: u32 = 100;
pub const VOCABULARY: Vocabulary = Vocabulary { size: 5000, cls: CLS, sep: SEP, pad: 0, mask: MASK, unk: Some(UNK) };

/// [CLS], words of these lengths with fresh ids from 200 on, [SEP].
pub fn text_of_words(lengths: &[usize]) -> (Vec<u32>, Vec<bool>) {
    let (mut ids, mut starts) = (vec![CLS], vec![true]);
    for &length in lengths {
        for i in 0..length {
            ids.push(199 + ids.len() as u32);
            starts.push(i == 0);
        }
    }
    ids.push(SEP);
    starts.push(true);
    (ids, starts)
}

/// A text of exactly `length` tokens whose words are of 1 to 5 tokens, mostly 1.
pub fn text_of_length(length: usize, seed: u64) -> (Vec<u32>, Vec<bool>) {
    let mut random = Stream::new(seed, 99, Site::Init, 0);
    let mut left = length.saturating_sub(2);
    let mut words = Vec::new();
    while left > 0 {
        let word = (1 + random.below(10).saturating_sub(5) as usize).min(left);
        words.push(word);
        left -= word;
    }
    text_of_words(&words)
}

/// Texts of these lengths.
pub fn corpus(lengths: impl IntoIterator<Item = usize>) -> MemoryCorpus {
    let mut corpus = MemoryCorpus::default();
    for (i, length) in lengths.into_iter().enumerate() {
        let (ids, word_start) = text_of_length(length, i as u64);
        corpus.push(Tokens { ids: &ids, word_start: &word_start });
    }
    corpus
}

pub fn rules(seed: u64) -> MaskRules {
    MaskRules::new(seed, VOCABULARY, 0.3, Some(0.5)).unwrap()
}

/// The masks of one text, unpacked.
pub struct Masks {
    pub encoder_ids: Vec<u32>,
    pub labels: Vec<u32>,
    /// Hidden tokens of every row of the pool.
    pub hidden: Vec<Vec<bool>>,
    pub row: Vec<u16>,
}

/// Masks of a text as sample `sample` of training.
pub fn mask(masker: &mut Masker, ids: &[u32], word_start: &[bool], sample: u64) -> Masks {
    let (rows, width) = (pool_rows(ids.len()), row_words(ids.len()));
    // Garbage in the outputs: everything must be overwritten.
    let mut pool = vec![0xDEAD_BEEF; rows * width];
    let mut row = vec![u16::MAX; ids.len()];
    let mut encoder_ids = vec![u32::MAX; ids.len()];
    let mut labels = vec![u32::MAX; 3];
    let visibility = Some(TextVisibility { pool: &mut pool, row: &mut row });
    let out = MaskedText { encoder_ids: &mut encoder_ids, labels: &mut labels, visibility };
    masker.mask(Tokens { ids, word_start }, Part::Train.pass(), sample, out);
    let bit = |words: &[u32], j: usize| words[j / 32] >> (j % 32) & 1 == 1;
    let hidden = (0..rows)
        .map(|r| {
            let words = &pool[r * width..(r + 1) * width];
            assert!((ids.len()..32 * width).all(|j| !bit(words, j)), "bits past the text are clear");
            (0..ids.len()).map(|j| !bit(words, j)).collect()
        })
        .collect();
    Masks { encoder_ids, labels, hidden, row }
}

/// The batch of samples of a corpus in its training order.
pub fn build(corpus: &dyn Corpus, seed: u64, samples: std::ops::Range<u64>) -> PretrainBatch {
    let order = Order::new(seed, corpus.texts(), 0).unwrap();
    Builder::new(rules(seed), order, Part::Train, 512).build(corpus, samples).unwrap()
}

/// Everything about the texts of a batch, text by text, independent of the batch around it.
pub type Text = (u64, Vec<u32>, Vec<(u32, u32)>, Vec<u32>, Vec<(u32, u32)>, Vec<u32>, Vec<u16>);

pub fn by_text(batch: &PretrainBatch) -> Vec<Text> {
    let decoder = batch.decoder.as_ref().unwrap();
    (0..batch.sequences())
        .map(|s| {
            let (start, end) = (batch.cu_seqlens[s], batch.cu_seqlens[s + 1]);
            let within = |rows: &[u32], ids: &[u32]| {
                let pairs = rows.iter().zip(ids).filter(|(row, _)| (start..end).contains(row));
                pairs.map(|(row, id)| (row - start, *id)).collect::<Vec<_>>()
            };
            let text = start as usize..end as usize;
            let words = decoder.visibility.offsets[s] as usize..decoder.visibility.offsets[s + 1] as usize;
            (
                batch.samples[s],
                batch.encoder_ids[text.clone()].to_vec(),
                within(&batch.encoder_label_rows, &batch.encoder_label_ids),
                decoder.ids[text.clone()].to_vec(),
                within(&decoder.label_rows, &decoder.label_ids),
                decoder.visibility.words[words].to_vec(),
                decoder.visibility.row[text].to_vec(),
            )
        })
        .collect()
}
