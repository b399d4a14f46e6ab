//! Speed of the data side: `cargo bench --bench data`.
//!
//! Masks of one 512-token text on one core (goal G3), and whole batches from a corpus in memory. Then, on all cores, what fine-tuning
//! does once, the ids of a set of shards, and at every step, its batches.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use retromae_engine::data::batch::Builder;
use retromae_engine::data::corpus::{Corpus, MemoryCorpus, Tokens};
use retromae_engine::data::masking::{MaskRules, MaskedText, Masker, TextVisibility, Vocabulary, pool_rows, row_words};
use retromae_engine::data::order::{BatchSize, Batching, Order, Part, Plan};
use retromae_engine::data::pairs::batch::{ContrastiveBuilder, Duplicates};
use retromae_engine::data::pairs::files::{PairFiles, from_files};
use retromae_engine::data::pairs::ids::IdIndex;
use retromae_engine::data::pairs::texts::TextRules;
use retromae_engine::data::pairs::{Draft, PairsSettings, Side};
use retromae_engine::data::shard::{Counts, Packing, SetSpec, SetWriter, ShardSet, Special, TitleSep};
use retromae_engine::data::source::Input;
use retromae_engine::error::IoContext;
use retromae_engine::rng::{Site, Stream};

const VOCABULARY: Vocabulary = Vocabulary { size: 30_522, cls: 101, sep: 102, pad: 0, mask: 103, unk: Some(100) };
const TEXTS: u64 = 512;

/// Texts of `length` tokens, one in seven of which continues a word: about 437 words in 512 tokens, as measured on English package
/// descriptions under BERT's vocabulary. More words are more draws, so fewer continuations would be the harder case.
fn corpus(length: usize) -> MemoryCorpus {
    let mut corpus = MemoryCorpus::default();
    for text in 0..TEXTS {
        let mut random = Stream::new(1, 0, Site::Init, text);
        let mut ids: Vec<u32> = (0..length).map(|_| 1000 + random.below(29_000)).collect();
        let mut word_start: Vec<bool> = (0..length).map(|_| random.below(7) != 0).collect();
        (ids[0], ids[length - 1]) = (VOCABULARY.cls, VOCABULARY.sep);
        (word_start[0], word_start[1], word_start[length - 1]) = (true, true, true);
        corpus.push(Tokens { ids: &ids, word_start: &word_start });
    }
    corpus
}

/// Times of masking each text of `corpus` several times over, sorted.
fn mask_times(corpus: &MemoryCorpus, rounds: u64, length: usize) -> retromae_engine::Result<Vec<Duration>> {
    let rules = MaskRules::new(7, VOCABULARY, 0.3, Some(0.5))?;
    let mut masker = Masker::new(&rules);
    let (mut ids, mut starts, mut labels) = (Vec::new(), Vec::new(), Vec::new());
    let mut encoder_ids = vec![0; length];
    let mut pool = vec![0; pool_rows(length) * row_words(length)];
    let mut row = vec![0; length];
    let mut times = Vec::new();
    for sample in 0..rounds * TEXTS {
        corpus.read(sample % TEXTS, &mut ids, &mut starts)?;
        let visibility = Some(TextVisibility { pool: &mut pool, row: &mut row });
        let out = MaskedText { encoder_ids: &mut encoder_ids, labels: &mut labels, visibility };
        let start = Instant::now();
        masker.mask(black_box(Tokens { ids: &ids, word_start: &starts }), 0, sample, out);
        times.push(start.elapsed());
        black_box((&encoder_ids, &pool, &row, &labels));
    }
    times.sort();
    Ok(times)
}

/// Time per batch of `sequences` texts on one thread, sorted.
fn batch_times(corpus: &MemoryCorpus, sequences: u64, rounds: u64) -> retromae_engine::Result<Vec<Duration>> {
    let rules = MaskRules::new(7, VOCABULARY, 0.3, Some(0.5))?;
    let builder = Builder::new(rules, Order::new(7, TEXTS, 0)?, Part::Train, 512);
    let mut times = Vec::new();
    for step in 0..rounds {
        let start = Instant::now();
        black_box(builder.build(corpus, step * sequences..(step + 1) * sequences)?);
        times.push(start.elapsed());
    }
    times.sort();
    Ok(times)
}

/// Time to count the steps of batches by tokens.
fn plan_time(corpus: &MemoryCorpus, samples: u64) -> retromae_engine::Result<Duration> {
    let batching = Batching { size: BatchSize::Tokens(8192), accumulation: 1, ranks: 1, max_length: 512 };
    let plan = Plan::new(Order::new(7, TEXTS, 12)?, Part::Train, batching, samples)?;
    let start = Instant::now();
    black_box(plan.steps(corpus, 0)?);
    Ok(start.elapsed())
}

fn run() -> retromae_engine::Result<()> {
    println!("| what, on one core | median | min | target |");
    println!("| --- | ---: | ---: | ---: |");
    for (length, target) in [(512, "≤ 0.5 ms, stretch 0.3 ms"), (128, "")] {
        let times = mask_times(&corpus(length), 8, length)?;
        let (median, min) = (times[times.len() / 2], times[0]);
        println!(
            "| masks of a {length}-token text | {:.3} ms | {:.3} ms | {target} |",
            median.as_secs_f64() * 1e3,
            min.as_secs_f64() * 1e3
        );
    }
    for (length, sequences) in [(512, 64u64), (128, 64)] {
        let times = batch_times(&corpus(length), sequences, 40)?;
        let (median, min) = (times[times.len() / 2].as_secs_f64(), times[0].as_secs_f64());
        let tokens = (sequences * length as u64) as f64;
        println!(
            "| batch of {sequences} × {length} tokens | {:.2} ms ({:.0} batches/s, {:.2} M tokens/s) | {:.2} ms | |",
            median * 1e3,
            1.0 / median,
            tokens / median / 1e6,
            min * 1e3,
        );
    }
    let samples = 200 * TEXTS;
    let nanoseconds = plan_time(&corpus(128), samples)?.as_secs_f64() * 1e9 / samples as f64;
    println!("| plan batches by tokens, a sample | {nanoseconds:.0} ns | | |");
    Ok(())
}

/// Texts of the set whose ids are indexed.
const IDS: u32 = 2_000_000;
/// Passages and queries of MS MARCO.
const MSMARCO: f64 = 8_841_823.0 + 502_939.0;

/// A set of shards of `IDS` short texts under numbers as ids.
fn shards(dir: &std::path::Path) -> retromae_engine::Result<Arc<ShardSet>> {
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
    for i in 0..IDS {
        writer.push(&i.to_string(), [101, 1000 + i % 29_000, 102].into_iter().map(|id| (id, true)))?;
    }
    writer.finish(Counts::default())?;
    Ok(Arc::new(ShardSet::open(dir)?))
}

/// Largest memory of this process so far, in MB.
fn peak() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or("");
    line.trim().trim_end_matches(" kB").trim().parse::<f64>().unwrap_or(f64::NAN) / 1e3
}

fn fine_tuning() -> retromae_engine::Result<()> {
    println!("\n| fine-tuning, on {} cores | measured | for MS MARCO |", rayon::current_num_threads());
    println!("| --- | ---: | ---: |");
    let dir = std::env::temp_dir().join(format!("retromae-bench-{}", std::process::id()));
    std::fs::create_dir_all(&dir).at(&dir, "cannot create")?;
    let indexed = index(&dir);
    std::fs::remove_dir_all(&dir).at(&dir, "cannot remove")?;
    indexed?;
    pair_batches()
}

fn index(dir: &std::path::Path) -> retromae_engine::Result<()> {
    let set = shards(dir)?;
    let (before, start) = (peak(), Instant::now());
    let index = IdIndex::new(set.clone())?;
    let (seconds, scale) = (start.elapsed().as_secs_f64(), MSMARCO / f64::from(IDS));
    let bytes = index.bytes() as f64 / 1e6;
    println!("| open {IDS} ids | {seconds:.2} s | {:.1} s |", seconds * scale);
    println!("| their index | {bytes:.1} MB | {:.0} MB |", bytes * scale);
    let grown = peak() - before;
    println!("| growth of the process meanwhile, mapped files included | {grown:.0} MB | {:.0} MB |", grown * scale);
    let (mut random, finds) = (Stream::new(3, 0, Site::Init, 0), 1_000_000);
    let ids: Vec<String> = (0..finds).map(|_| random.below(IDS).to_string()).collect();
    let start = Instant::now();
    for id in &ids {
        assert!(index.find(black_box(id))?.is_some());
    }
    let nanoseconds = start.elapsed().as_secs_f64() * 1e9 / f64::from(finds);
    println!("| find one of them, on one core | {nanoseconds:.0} ns | |");
    drop(index);
    read_files(dir, set)
}

/// Judgements and lists of 200 negatives for 20,000 queries, from files.
fn read_files(dir: &std::path::Path, set: Arc<ShardSet>) -> retromae_engine::Result<()> {
    let (mut qrels, mut negatives, mut random) = (String::new(), String::new(), Stream::new(4, 0, Site::Init, 0));
    let queries = 20_000;
    for query in 0..queries {
        qrels += &format!("{query}\t0\t{}\t1\n", random.below(IDS));
        let list: Vec<String> = (0..200).map(|_| random.below(IDS).to_string()).collect();
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
    let (seconds, scale) = (start.elapsed().as_secs_f64(), 502_939.0 / f64::from(queries));
    let (lines, bytes) = (queries * 200, pairs.bytes() as f64 / 1e6);
    println!("| open both sets and read {lines} negatives from a file | {seconds:.2} s | {:.0} s |", seconds * scale);
    println!("| their lists | {bytes:.1} MB | {:.0} MB |", bytes * scale);
    Ok(())
}

/// Batches of 64 queries with 8 passages each out of 20,000 pairs.
fn pair_batches() -> retromae_engine::Result<()> {
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
    let (seconds, lines) = (start.elapsed().as_secs_f64(), f64::from(queries) * 200.0);
    println!("| lists of {lines} negatives | {seconds:.2} s | {:.0} s |", seconds * 502_939.0 / f64::from(queries));
    let (q, p) = (TextRules::new(32), TextRules::new(128));
    let builder = ContrastiveBuilder::new(1, pairs, q, p, Duplicates::Mask)?;
    let mut times = Vec::new();
    for step in 0..200u64 {
        let start = Instant::now();
        black_box(builder.build(step * 64..(step + 1) * 64)?);
        times.push(start.elapsed());
    }
    times.sort();
    println!("| batch of 64 queries × 8 passages of 80 tokens | {:.2} ms | |", times[100].as_secs_f64() * 1e3);
    Ok(())
}

fn main() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let result = pool.map_err(|e| retromae_engine::Error::refused(e.to_string())).and_then(|pool| pool.install(run));
    let result = result.and_then(|()| fine_tuning());
    if let Err(error) = result {
        eprintln!("error: {error}");
        std::process::exit(error.exit_code());
    }
}
