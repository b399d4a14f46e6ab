//! Speed of the data side: `cargo bench --bench data`.
//!
//! Masks of one 512-token text on one core (goal G3), and whole batches from a corpus in memory.

use std::hint::black_box;
use std::time::{Duration, Instant};

use retromae_engine::data::batch::Builder;
use retromae_engine::data::corpus::{Corpus, MemoryCorpus, Tokens};
use retromae_engine::data::masking::{MaskRules, MaskedText, Masker, TextVisibility, Vocabulary, pool_rows, row_words};
use retromae_engine::data::order::{BatchSize, Batching, Order, Part, Plan};
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

fn main() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let result = pool.map_err(|e| retromae_engine::Error::refused(e.to_string())).and_then(|pool| pool.install(run));
    if let Err(error) = result {
        eprintln!("error: {error}");
        std::process::exit(error.exit_code());
    }
}
