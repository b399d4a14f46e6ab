//! Small files, sets of shards and pairs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use retromae_engine::Result;
use retromae_engine::data::corpus::{MemoryCorpus, Tokens};
use retromae_engine::data::pairs::{Draft, Pairs, PairsSettings, Side};
use retromae_engine::data::shard::{Counts, Packing, SetSpec, SetWriter, ShardSet, Special, TitleSep};
use retromae_engine::data::source::Input;

pub const CLS: u32 = 1;
pub const SEP: u32 = 2;

/// A folder for one test.
pub struct Dir(tempfile::TempDir);

impl Dir {
    pub fn new() -> Dir {
        Dir(tempfile::tempdir().unwrap())
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> Input {
        let path = self.at(name);
        std::fs::write(&path, bytes).unwrap();
        Input { path, bytes: None }
    }

    /// An error's message without this folder.
    pub fn message<T>(&self, result: Result<T>) -> String {
        let error = result.err().expect("an error").to_string();
        error.replace(&format!("{}/", self.0.path().display()), "")
    }

    /// A set of shards of these texts, each with its borders; several shards where there are many tokens.
    pub fn set<'a>(&self, name: &str, texts: impl IntoIterator<Item = (&'a str, Vec<u32>)>) -> Arc<ShardSet> {
        self.set_of(name, 7, Packing::Docs, texts)
    }

    pub fn set_of<'a>(
        &self,
        name: &str,
        fingerprint: u8,
        packing: Packing,
        texts: impl IntoIterator<Item = (&'a str, Vec<u32>)>,
    ) -> Arc<ShardSet> {
        let dir = self.at(name);
        std::fs::create_dir(&dir).unwrap();
        let spec = SetSpec {
            max_length: 512,
            vocab_size: 100_000,
            special: Special { cls: CLS, sep: SEP, mask: 3, pad: 0, unk: 4 },
            packing,
            title_sep: TitleSep::None,
            fingerprint: [fingerprint; 32],
            shard_tokens: 50_000,
        };
        let mut writer = SetWriter::new(&dir, &spec);
        for (id, tokens) in texts {
            writer.push(id, bordered(tokens).into_iter().map(|t| (t, true))).unwrap();
        }
        writer.finish(Counts::default()).unwrap();
        Arc::new(ShardSet::open(&dir).unwrap())
    }
}

/// The tokens between [CLS] and [SEP].
pub fn bordered(tokens: Vec<u32>) -> Vec<u32> {
    [vec![CLS], tokens, vec![SEP]].concat()
}

/// A corpus of these texts, each with its borders.
pub fn corpus(texts: impl IntoIterator<Item = Vec<u32>>) -> Arc<MemoryCorpus> {
    let mut corpus = MemoryCorpus::default();
    for text in texts {
        let ids = bordered(text);
        corpus.push(Tokens { ids: &ids, word_start: &vec![true; ids.len()] });
    }
    Arc::new(corpus)
}

/// A corpus of `n` texts of `length` tokens, no two equal: text i is `[CLS] base+i … [SEP]`.
pub fn distinct(n: u32, base: u32, length: usize) -> Arc<MemoryCorpus> {
    corpus((0..n).map(|i| vec![base + i; length - 2]))
}

/// A query's passages: positives and negatives.
pub type Lists<'a> = (&'a [u32], &'a [u32]);

pub fn side(corpus: Arc<MemoryCorpus>) -> Side {
    Side { corpus, ids: None }
}

/// Pairs of the queries `0..lists.len()`.
pub fn pairs(lists: &[Lists<'_>], passages: Arc<MemoryCorpus>, settings: PairsSettings) -> Result<Pairs> {
    let mut draft = Draft::new(settings.depth);
    for (query, (positives, negatives)) in (0..).zip(lists) {
        positives.iter().for_each(|&p| draft.positive(query, p));
        negatives.iter().for_each(|&n| draft.negative(query, n));
    }
    draft.finish(side(distinct(lists.len() as u32, 50_000, 5)), side(passages), settings)
}

pub fn gz(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut w = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    w.write_all(bytes).unwrap();
    w.finish().unwrap()
}

/// Calls `f` in pools of several sizes; all results must be equal.
pub fn in_pools<T: PartialEq + Send>(f: impl Fn() -> T + Sync) -> T {
    let run = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(&f);
    let first = run(1);
    assert!(first == run(2) && first == run(5), "the result depends on the number of threads");
    first
}

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
