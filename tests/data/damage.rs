//! Damaged shards: every flipped bit is found, and nothing is ever read past an end.

use std::path::Path;

use retromae_engine::data::shard::format::{HEADER, Header};
use retromae_engine::data::shard::{ShardSet, verify_file};

use crate::support::{Dir, run};

/// A small set: 40 texts with ids in one shard.
fn small(dir: &Dir) -> std::path::PathBuf {
    let lines: String = (0..40).map(|i| format!("id{i}\tsome unbelievable text {i}\n")).collect();
    dir.write("in.tsv", lines);
    dir.tokenize("in.tsv", "set", &[]).ok();
    dir.at("set/shard-00000.rms")
}

/// Opens the set and reads everything in it.
fn read_all(dir: &Path) -> retromae_engine::Result<()> {
    let set = ShardSet::open(dir)?;
    (0..set.len()).try_for_each(|i| {
        let text = set.text(i)?;
        (0..text.len())
            .for_each(|k| assert!(text.token(k) < set.facts().vocab_size && (k > 0 || text.is_word_start(k))));
        set.id(i).map(drop)
    })
}

#[test]
fn a_flipped_bit_anywhere_is_found() {
    let dir = Dir::new();
    let path = small(&dir);
    let good = std::fs::read(&path).expect("a shard");
    assert!(read_all(&dir.at("set")).is_ok());
    let mut changed = good.clone();
    // Every byte of the used header and of what follows it, every 61st of the header's padding.
    let places = (0..256).chain((256..HEADER - 4).step_by(61)).chain(HEADER - 4..good.len());
    for at in places {
        changed[at] ^= 1 << (at % 8);
        std::fs::write(&path, &changed).expect("a shard");
        for found in [verify_file(&path).map(drop), read_all(&dir.at("set"))] {
            let message = found.expect_err("a flipped bit was accepted").to_string();
            assert!(message.contains("shard-00000.rms") && message.contains("; "), "byte {at}: {message}");
        }
        changed[at] = good[at];
    }
}

#[test]
fn a_shortened_or_lengthened_file_is_refused() {
    let dir = Dir::new();
    let path = small(&dir);
    let good = std::fs::read(&path).expect("a shard");
    let mut longer = good.clone();
    longer.push(0);
    for bytes in
        [&good[..0], &good[..7], &good[..100], &good[..HEADER], &good[..HEADER + 1], &good[..good.len() - 1], &longer]
    {
        std::fs::write(&path, bytes).expect("a shard");
        assert!(verify_file(&path).is_err() && ShardSet::open(&dir.at("set")).is_err(), "{} bytes", bytes.len());
    }
    std::fs::remove_file(&path).expect("removal");
    assert!(run(&["inspect", &dir.arg("set")]).error(1).contains("shard-00000.rms: cannot open"));
}

/// Headers that are whole by their digest and lie: sizes that overflow, that ask for terabytes, that contradict each other.
#[test]
fn hostile_headers_are_refused_without_reading_or_allocating() {
    let dir = Dir::new();
    let path = small(&dir);
    let good = std::fs::read(&path).expect("a shard");
    let header = Header::parse(&good[..HEADER], &path).expect("a header");
    assert_eq!(header.to_bytes(), good[..HEADER]);
    let lies: [&dyn Fn(&mut Header); 10] = [
        &|h| h.sequences = u64::MAX,
        &|h| h.tokens = u64::MAX,
        &|h| (h.sequences, h.tokens) = (1 << 31, 1 << 32),
        &|h| (h.sequences, h.tokens) = ((1 << 32) - 1, (1 << 32) - 1),
        &|h| h.id_bytes = Some(u64::MAX),
        &|h| h.width = 0,
        &|h| h.width = 1 << 31,
        &|h| h.vocab_size = 0,
        &|h| h.special[0] = h.vocab_size,
        &|h| h.longest = u32::MAX,
    ];
    for (i, lie) in lies.iter().enumerate() {
        let mut lying = header.clone();
        lie(&mut lying);
        let bytes = [&lying.to_bytes(), &good[HEADER..]].concat();
        std::fs::write(&path, bytes).expect("a shard");
        assert!(verify_file(&path).is_err(), "lie {i}");
    }
    // A token outside the vocabulary, every digest right: the vocabulary is made smaller than the tokens.
    let mut lying = header.clone();
    (lying.vocab_size, lying.special) = (1000, [0, 1, 2, 3, 4]);
    std::fs::write(&path, [&lying.to_bytes(), &good[HEADER..]].concat()).expect("a shard");
    let message = verify_file(&path).expect_err("a token outside the vocabulary").to_string();
    assert!(message.contains("a token id is not in the vocabulary"), "{message}");
}

#[test]
fn foreign_swapped_and_mixed_files_are_refused() {
    let dir = Dir::new();
    small(&dir);
    dir.tokenize("in.tsv", "two", &["--shard-tokens", "100"]).ok();
    let set = dir.at("two");
    let (a, b) = (set.join("shard-00000.rms"), set.join("shard-00001.rms"));
    let (first, second) = (std::fs::read(&a).expect("a shard"), std::fs::read(&b).expect("a shard"));
    std::fs::write(&a, &second).expect("a shard");
    std::fs::write(&b, &first).expect("a shard");
    assert!(run(&["verify", &dir.arg("two")]).error(1).contains("is not the shard that meta.json describes"));
    std::fs::write(&a, "not a shard at all").expect("a file");
    assert!(run(&["verify", &dir.arg("two")]).error(1).contains("is not a shard of this program"));
}

#[test]
fn the_description_and_the_tokenizer_are_covered_too() {
    let dir = Dir::new();
    small(&dir);
    let set = dir.arg("set");
    assert!(run(&["verify", &set]).ok().out.contains("ok, shards: 6 files"));
    let meta = dir.at("set/meta.json");
    let good = std::fs::read(&meta).expect("a description");
    let mut changed = good.clone();
    for at in (0..good.len()).step_by(7) {
        changed[at] ^= 1;
        std::fs::write(&meta, &changed).expect("a description");
        assert!(ShardSet::open(&dir.at("set")).is_err(), "byte {at}");
        changed[at] = good[at];
    }
    std::fs::write(&meta, &good).expect("a description");
    let tokenizer = dir.at("set/tokenizer.json");
    let mut bytes = std::fs::read(&tokenizer).expect("a tokenizer");
    bytes[1000] ^= 1;
    std::fs::write(&tokenizer, bytes).expect("a tokenizer");
    let ran = run(&["verify", &set]);
    assert!(ran.error(1).contains("tokenizer.json: does not match its digest"), "{}", ran.err);
    std::fs::remove_file(&meta).expect("removal");
    assert!(run(&["inspect", &set]).error(1).contains("holds no meta.json"));
    assert!(run(&["verify", &set, &set]).error(1).contains(" | "), "every path is checked");
}
