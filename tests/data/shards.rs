//! What `tokenize` writes and `ShardSet` reads.

use crate::support::{Dir, binary, finish, golden, run, sequences};

/// Lines with ids, of very different lengths, some empty.
fn corpus(n: usize) -> String {
    let line = |i: usize| {
        format!(
            "{{\"id\": \"d{i}\", \"title\": \"Title {i}\", \"text\": \"{}\"}}\n",
            "isrcsubmit word, ".repeat(i * 7 % 60)
        )
    };
    (0..n).map(line).collect()
}

#[test]
fn docs_cuts_and_blocks_lose_nothing() {
    let dir = Dir::new();
    dir.write("in.jsonl", corpus(100));
    for title in ["none", "space", "sep"] {
        let out = |name: &str| format!("{name}-{title}");
        dir.tokenize("in.jsonl", &out("long"), &["--max-length", "4096", "--title-sep", title]).ok();
        dir.tokenize("in.jsonl", &out("docs"), &["--max-length", "16", "--title-sep", title]).ok();
        dir.tokenize("in.jsonl", &out("blocks"), &["--max-length", "16", "--title-sep", title, "--packing", "blocks"])
            .ok();
        let long = sequences(&dir.open(&out("long")));
        let inner = |tokens: &[u32]| tokens[1..tokens.len() - 1].to_vec();
        let docs = dir.open(&out("docs"));
        for ((id, tokens), (whole_id, whole)) in sequences(&docs).iter().zip(&long) {
            let inner = inner(whole);
            let cut: Vec<u32> = std::iter::once(101).chain(inner.into_iter().take(14)).chain([102]).collect();
            assert_eq!((id, tokens), (whole_id, &cut));
        }
        let truncated = long.iter().filter(|(_, t)| t.len() > 16).count() as u64;
        let empty = if title == "none" { (0..100).filter(|i| i * 7 % 60 == 0).count() as u64 } else { 0 };
        let counts = &docs.facts().counts;
        assert_eq!(
            (counts.documents, counts.truncated, counts.empty, docs.len()),
            (100, truncated, empty, 100 - empty)
        );
        // The pieces of a document, put together again, are the document; every piece but its last is full.
        let mut joined: Vec<(Option<String>, Vec<u32>)> = Vec::new();
        for (id, tokens) in sequences(&dir.open(&out("blocks"))) {
            assert!(tokens.len() <= 16 && tokens[0] == 101 && tokens[tokens.len() - 1] == 102);
            match joined.last_mut().filter(|(last, _)| *last == id) {
                Some((_, all)) => {
                    assert_eq!(all.len() % 14, 0, "a piece before the last is not full");
                    all.extend(inner(&tokens));
                }
                None => joined.push((id, inner(&tokens))),
            }
        }
        let whole: Vec<_> = long.into_iter().map(|(id, t)| (id, inner(&t))).collect();
        assert_eq!(joined, whole);
    }
}

#[test]
fn titles_are_joined_as_asked() {
    let dir = Dir::new();
    dir.write("in.tsv", "1\thello\tworld\n2\t\tworld\n");
    for (sep, first) in [
        ("none", vec![101, 2088, 102]),
        ("space", vec![101, 7592, 2088, 102]),
        ("sep", vec![101, 7592, 102, 2088, 102]),
    ] {
        dir.tokenize("in.tsv", sep, &["--title-sep", sep]).ok();
        let found: Vec<_> = sequences(&dir.open(sep)).into_iter().map(|(_, t)| t).collect();
        assert_eq!(found, [first, vec![101, 2088, 102]], "{sep}");
    }
}

#[test]
fn word_starts_follow_the_words_and_the_cuts() {
    let dir = Dir::new();
    // is ##rc ##su ##bm ##it, twice
    dir.write("in.txt", "isrcsubmit isrcsubmit\n");
    let starts = |name: &str| -> Vec<Vec<bool>> {
        let set = dir.open(name);
        (0..set.len())
            .map(|i| set.text(i).expect("a text"))
            .map(|t| (0..t.len()).map(|k| t.is_word_start(k)).collect())
            .collect()
    };
    dir.tokenize("in.txt", "docs", &[]).ok();
    let whole = &starts("docs")[0];
    assert_eq!(whole, &[true, true, false, false, false, false, true, false, false, false, false, true]);
    dir.tokenize("in.txt", "blocks", &["--packing", "blocks", "--max-length", "4"]).ok();
    for piece in starts("blocks") {
        assert!(piece[0] && piece[1] && piece[piece.len() - 1], "the first token of a piece begins a word");
    }
}

#[test]
fn output_does_not_depend_on_threads() {
    let dir = Dir::new();
    dir.write("in.jsonl", corpus(9000));
    let more = ["--shard-tokens", "100000", "--packing", "blocks", "--max-length", "64"];
    dir.tokenize("in.jsonl", "a", &more).ok();
    let (input, out) = (dir.arg("in.jsonl"), dir.arg("b"));
    let golden = golden();
    let mut args = vec![
        "tokenize",
        "--input",
        &input,
        "--output",
        &out,
        "--tokenizer",
        golden.to_str().expect("UTF-8"),
        "--threads",
        "7",
    ];
    args.extend(more);
    run(&args).ok();
    let files = |name: &str| {
        let mut files: Vec<_> =
            std::fs::read_dir(dir.at(name)).expect("a folder").map(|e| e.expect("an entry").path()).collect();
        files.sort();
        files
    };
    let (a, b) = (files("a"), files("b"));
    assert!(a.len() > 8 && a.len() == b.len(), "several shards");
    for (a, b) in a.iter().zip(&b) {
        assert!(std::fs::read(a).expect("a file") == std::fs::read(b).expect("a file"), "{}", a.display());
    }
    // Every sequence is found across shards, in order, and the counts are those of the parts.
    let set = dir.open("a");
    let all = sequences(&set);
    assert_eq!(all.iter().map(|(_, t)| t.len() as u64).sum::<u64>(), set.tokens());
    assert_eq!(set.facts().longest, 64);
    let numbers: Vec<usize> =
        all.iter().map(|(id, _)| id.as_deref().expect("an id")[1..].parse().expect("a number")).collect();
    assert!(numbers.is_sorted() && numbers[numbers.len() - 1] == 8999);
    assert!(set.text(set.len()).is_err());
    // Batches see the same texts through their own trait.
    use retromae_engine::data::corpus::Corpus;
    let (mut ids, mut starts) = (Vec::new(), Vec::new());
    for (i, (_, tokens)) in all.iter().enumerate().step_by(97) {
        set.read(i as u64, &mut ids, &mut starts).expect("a text");
        assert_eq!((&ids, starts.len()), (tokens, set.length(i as u64).expect("a length")));
    }
}

#[test]
fn wide_vocabularies_take_four_bytes() {
    let dir = Dir::new();
    let words: Vec<String> = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        .map(String::from)
        .into_iter()
        .chain((0..70_000).map(|i| format!("w{i}")))
        .collect();
    dir.write("m/vocab.txt", words.join("\n"));
    dir.write("in.txt", "w69999 w0\n");
    let (input, out, model) = (dir.arg("in.txt"), dir.arg("out"), dir.arg("m"));
    run(&["tokenize", "--input", &input, "--output", &out, "--tokenizer", &model]).ok();
    let set = dir.open("out");
    assert_eq!((set.facts().token_width, set.facts().vocab_size), (4, 70_005));
    assert_eq!(sequences(&set), [(None, vec![2, 70_004, 5, 3])]);
    set.verify().expect("a sound set");
}

#[test]
fn counts_are_printed_and_written_as_json() {
    let dir = Dir::new();
    let lines = [
        r#"{"id": 1, "text": "a b c d e"}"#,
        r#"{"id": 2, "text": " "}"#,
        r#"{"id": 1, "text": "f"}"#,
        r#"{"text": "g"}"#,
        "",
    ];
    dir.write("in.jsonl", lines.join("\n"));
    let json = dir.arg("counts.json");
    let ran = dir.tokenize("in.jsonl", "out", &["--max-length", "5", "--json", &json]).ok();
    assert!(ran.err.contains("warning: ") && ran.err.contains("id \"1\" was seen before"), "{}", ran.err);
    let value: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).expect("a file")).expect("JSON");
    for (name, n) in
        [("documents", 4), ("sequences", 2), ("tokens", 8), ("empty", 1), ("truncated", 1), ("duplicates", 1)]
    {
        assert_eq!(value[name], n, "{name}");
        assert!(ran.out.lines().any(|l| l.split_whitespace().eq([name, &n.to_string()])), "{}", ran.out);
    }
    dir.tokenize("in.jsonl", "kept", &["--keep-duplicates"]).ok();
    assert_eq!((dir.open("kept").len(), dir.open("kept").facts().counts.duplicates), (3, 1));
}

#[test]
fn inspect_shows_facts_and_texts_and_survives_a_closed_pipe() {
    let dir = Dir::new();
    dir.write("in.jsonl", corpus(50));
    dir.tokenize("in.jsonl", "out", &[]).ok();
    let out = dir.arg("out");
    let shown = run(&["inspect", &out]).ok().out;
    assert!(
        shown.contains("sequences   50") && shown.contains("#16  d16") && shown.contains("is·rc·su·bm·it"),
        "{shown}"
    );
    let one = run(&["inspect", &out, "--text", "3"]).ok().out;
    assert!(one.trim_start().starts_with("#3  d3"), "{one}");
    let masks = run(&["inspect", &out, "--text", "1", "--masks", "--seed", "3"]).ok().out;
    assert!(masks.contains("encoder") && masks.contains("sees 0: row ") && masks.contains("C||"), "{masks}");
    assert!(run(&["inspect", &out, "--text", "50"]).error(1).contains("there is no text 50"));
    let script = format!("'{}' inspect '{out}' --samples 50 | true; exit ${{PIPESTATUS[0]}}", binary());
    let ran = finish(std::process::Command::new("bash").args(["-c", &script])).ok();
    assert_eq!(ran.err, "");
}

#[test]
fn tokenizer_files_travel_along_byte_for_byte() {
    let dir = Dir::new();
    dir.write("in.txt", "hello\n");
    dir.tokenize("in.txt", "out", &[]).ok();
    for name in ["tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json"] {
        let read = |p: std::path::PathBuf| std::fs::read(p).expect("a file");
        assert!(read(golden().join(name)) == read(dir.at("out").join(name)), "{name}");
    }
}
