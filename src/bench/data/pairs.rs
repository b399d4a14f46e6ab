//! What fine-tuning does with its texts: opens a set and indexes its ids, reads judgements and negatives, builds batches.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;

use super::super::{Report, Times};
use super::VOCABULARY;
use crate::data::corpus::{MemoryCorpus, Tokens};
use crate::data::pairs::batch::{ContrastiveBuilder, Duplicates};
use crate::data::pairs::files::{PairFiles, from_files};
use crate::data::pairs::ids::IdIndex;
use crate::data::pairs::texts::TextRules;
use crate::data::pairs::{Draft, PairsSettings, Side};
use crate::data::shard::{Counts, Packing, SetSpec, SetWriter, ShardSet, Special, TitleSep};
use crate::data::source::Input;
use crate::error::{Error, IoContext, Result};
use crate::rng::{Site, Stream};

/// Passages and queries of MS MARCO.
const MSMARCO: f64 = 8_841_823.0 + 502_939.0;
/// Queries of MS MARCO that are judged.
const JUDGED: f64 = 502_939.0;

/// A case: what, milliseconds, and how many times as much MS MARCO has.
fn told(report: &Report<'_>, what: String, times: &Times, scale: Option<f64>, bytes: Option<usize>) -> Result<()> {
    let mut line = json!({ "case": format!("data {what}"), "bytes": bytes, "msmarco_times": scale });
    times.describe(&mut line);
    let of_msmarco = |x: f64| scale.map_or_else(String::new, |scale| format!("{:.1}", x * scale));
    let mib = bytes.map(|bytes| bytes as f64 / f64::from(1 << 20));
    let cells = [
        what,
        format!("{:.4}", times.median()),
        of_msmarco(times.median() / 1e3),
        mib.map_or_else(String::new, |mib| format!("{mib:.1}")),
        mib.map_or_else(String::new, of_msmarco),
    ];
    report.case(&cells, line)
}

fn milliseconds(start: Instant) -> Times {
    Times::new(vec![start.elapsed().as_secs_f64() * 1e3])
}

/// Times all of it on a set of `texts` texts.
///
/// # Errors
/// A failed write.
pub fn run(texts: u32, report: &Report<'_>) -> Result<()> {
    report.say("")?;
    report.head(&["fine-tuning", "ms", "s for MS MARCO", "MiB", "MiB for MS MARCO"])?;
    let dir = std::env::temp_dir().join(format!("retromae-bench-{}", std::process::id()));
    std::fs::create_dir_all(&dir).at(&dir, "cannot create")?;
    let indexed = index(texts, &dir, report);
    std::fs::remove_dir_all(&dir).at(&dir, "cannot remove")?;
    indexed?;
    pair_batches(report)
}

/// A set of shards of `texts` short texts under numbers as ids.
fn shards(texts: u32, dir: &Path) -> Result<Arc<ShardSet>> {
    let spec = SetSpec {
        max_length: 128,
        vocab_size: VOCABULARY.size,
        special: Special { cls: 101, sep: 102, mask: 103, pad: 0, unk: 100 },
        packing: Packing::Docs,
        title_sep: TitleSep::None,
        fingerprint: [0; 32],
        shard_tokens: 64 << 20,
    };
    let mut writer = SetWriter::new(dir, &spec);
    for i in 0..texts {
        writer.push(&i.to_string(), [101, 1000 + i % 29_000, 102].into_iter().map(|id| (id, true)))?;
    }
    writer.finish(Counts::default())?;
    Ok(Arc::new(ShardSet::open(dir)?))
}

fn index(texts: u32, dir: &Path, report: &Report<'_>) -> Result<()> {
    let set = shards(texts, dir)?;
    let (scale, start) = (MSMARCO / f64::from(texts), Instant::now());
    let index = IdIndex::new(set.clone())?;
    told(report, format!("index of {texts} ids"), &milliseconds(start), Some(scale), Some(index.bytes() as usize))?;
    let (mut random, finds) = (Stream::new(3, 0, Site::Init, 0), 1_000_000);
    let ids: Vec<String> = (0..finds).map(|_| random.below(texts).to_string()).collect();
    let start = Instant::now();
    for id in &ids {
        if index.find(black_box(id))?.is_none() {
            return Err(Error::refused(format!("{id} is not in the index")).remedy("report this as a defect"));
        }
    }
    told(report, format!("{finds} ids of {texts} found, one core"), &milliseconds(start), None, None)?;
    drop(index);
    read_files(texts, dir, set, report)
}

/// Judgements and lists of 200 negatives for 20,000 queries, from files.
fn read_files(texts: u32, dir: &Path, set: Arc<ShardSet>, report: &Report<'_>) -> Result<()> {
    let (mut qrels, mut negatives, mut random) = (String::new(), String::new(), Stream::new(4, 0, Site::Init, 0));
    let queries = 20_000;
    for query in 0..queries {
        qrels += &format!("{query}\t0\t{}\t1\n", random.below(texts));
        let list: Vec<String> = (0..200).map(|_| random.below(texts).to_string()).collect();
        negatives += &format!("{query}\t{}\n", list.join(","));
    }
    let write = |name: &str, text: String| {
        let path = dir.join(name);
        std::fs::write(&path, text).at(&path, "cannot write")?;
        Ok(vec![Input { path, bytes: None }])
    };
    let (qrels, negatives) = (write("qrels", qrels)?, write("negatives", negatives)?);
    let files = PairFiles { qrels, negatives, ..PairFiles::default() };
    let start = Instant::now();
    let pairs = from_files(set.clone(), set, &files, PairsSettings::default(), None)?;
    let (times, scale, lines) = (milliseconds(start), JUDGED / f64::from(queries), queries * 200);
    told(report, format!("both sets opened, {lines} negatives read"), &times, Some(scale), Some(pairs.bytes() as usize))
}

/// Batches of 64 queries with 8 passages each out of 20,000 pairs.
fn pair_batches(report: &Report<'_>) -> Result<()> {
    let texts = |n: u64, length: usize| {
        let mut corpus = MemoryCorpus::default();
        for text in 0..n {
            let mut random = Stream::new(2, length as u64, Site::Init, text);
            let ids: Vec<u32> = (0..length).map(|_| 1000 + random.below(29_000)).collect();
            corpus.push(Tokens { ids: &ids, word_start: &vec![true; length] });
        }
        Side { corpus: Arc::new(corpus), ids: None }
    };
    let (queries, passages) = (20_000, 100_000);
    let mut draft = Draft::new(200);
    let mut random = Stream::new(5, 0, Site::Init, 0);
    for query in 0..queries {
        draft.positive(query, random.below(passages));
        (0..200).for_each(|_| draft.negative(query, random.below(passages)));
    }
    let settings = PairsSettings::default();
    let sides = (texts(u64::from(queries), 12), texts(u64::from(passages), 80));
    let start = Instant::now();
    let pairs = Arc::new(draft.finish(sides.0, sides.1, settings)?);
    let (times, lines) = (milliseconds(start), queries * 200);
    told(report, format!("lists of {lines} negatives"), &times, Some(JUDGED / f64::from(queries)), None)?;
    let (q, p) = (TextRules::new(32), TextRules::new(128));
    let builder = ContrastiveBuilder::new(1, pairs, q, p, Duplicates::Mask)?;
    let mut times = Vec::new();
    for step in 0..200u64 {
        let start = Instant::now();
        black_box(builder.build(step * 64..(step + 1) * 64)?);
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    told(report, "batch of 64 queries x 8 passages of 80 tokens".into(), &Times::new(times), None, None)
}
