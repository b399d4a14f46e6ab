//! Token ids are those of the reference tokenizer, on every path that leads to them.

use retromae_engine::data::tokenizer::{Token, Tokenizer};

use crate::support::{Dir, golden};

fn load(path: &std::path::Path) -> Tokenizer {
    Tokenizer::load(path).unwrap_or_else(|e| panic!("{e}"))
}

fn encode(tokenizer: &Tokenizer, text: &str, limit: usize) -> Vec<Token> {
    let mut out = Vec::new();
    tokenizer.encoder().encode(text, limit, &mut out).unwrap_or_else(|e| panic!("{e}"));
    out
}

fn json<T: serde::de::DeserializeOwned>(name: &str) -> T {
    serde_json::from_slice(&std::fs::read(golden().join(name)).expect("a fixture")).expect("JSON")
}

#[test]
fn ids_equal_those_of_the_published_model() {
    let (texts, expected): (Vec<String>, Vec<Vec<u32>>) = (json("texts.json"), json("ids.json"));
    assert_eq!(texts.len(), 96);
    for path in [golden(), golden().join("tokenizer.json"), golden().join("vocab.txt")] {
        let tokenizer = load(&path);
        let special = tokenizer.special();
        for (text, expected) in texts.iter().zip(&expected) {
            let inner = encode(&tokenizer, text, 126);
            let mut ids = vec![special.cls];
            ids.extend(inner.iter().take(126).map(|t| t.id()));
            ids.push(special.sep);
            assert_eq!(&ids, expected, "{text:?}");
        }
    }
}

#[test]
fn word_list_alone_is_the_same_tokenizer() {
    let dir = Dir::new();
    for name in ["vocab.txt", "tokenizer_config.json"] {
        dir.write(&format!("m/{name}"), std::fs::read(golden().join(name)).expect("a fixture"));
    }
    let (json, words) = (load(&golden()), load(&dir.at("m")));
    assert_eq!(json.fingerprint(), words.fingerprint());
    assert!(words.files().iter().any(|(name, _)| name == "tokenizer.json"), "consumers of an export need it");
    // Case matters to the ids, and so to the fingerprint.
    dir.write("m/tokenizer_config.json", "{\"do_lower_case\": false}");
    let cased = load(&dir.at("m"));
    assert_ne!(cased.fingerprint(), json.fingerprint());
    assert_eq!(encode(&cased, "HELLO", 9)[0].id(), cased.special().unk);
}

/// Random strings of the characters that make tokenizers differ, in every mixture.
#[test]
fn the_short_way_gives_the_same_tokens() {
    const ALPHABET: &[&str] = &[
        "a", "e", "s", "ing", "the", "un", "X", "QUE", " ", " ", "\n", "\t", "\r\n", ".", ",", "-", "'", "[", "]",
        "[MASK]", "[SEP]", "##", "_", "0", "42", "\u{0}", "\u{7}", "\u{b}", "\u{c}", "\u{1f}", "\u{7f}", "\u{85}",
        "\u{a0}", "\u{200b}", "\u{200d}", "\u{2028}", "\u{3000}", "\u{feff}", "\u{fffd}", "é", "e\u{301}", "\u{301}",
        "ß", "İ", "Σ", "ς", "ﬁ", "½", "漢", "字", "か", "한", "🙂", "—", "。", "ع", "\u{302e}", "ǆ",
    ];
    let tokenizer = load(&golden());
    let mut random = retromae_engine::rng::Stream::new(7, 0, retromae_engine::rng::Site::Init, 0);
    for round in 0..6000 {
        let n = random.below(if round % 50 == 0 { 400 } else { 24 });
        let text: String = (0..n).map(|_| ALPHABET[random.below(ALPHABET.len() as u32) as usize]).collect();
        let reference = tokenizer.encode_reference(&text).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(encode(&tokenizer, &text, usize::MAX), reference, "{text:?}");
        // Stopping early changes nothing before the stop.
        let limit = random.below(20) as usize;
        let early = encode(&tokenizer, &text, limit);
        assert!(early.len() >= limit.min(reference.len()), "{text:?}");
        assert_eq!(early, reference[..early.len()], "{text:?}");
    }
}

#[test]
fn long_stretches_without_spaces_keep_their_ids() {
    let tokenizer = load(&golden());
    for unit in ["漢字。", "abc,", "naïve/", "é!x"] {
        let text = unit.repeat(200_000 / unit.len());
        assert_eq!(
            encode(&tokenizer, &text, usize::MAX),
            tokenizer.encode_reference(&text).unwrap_or_else(|e| panic!("{e}"))
        );
    }
}

#[test]
fn words_of_other_tokenizers_come_from_their_pre_tokenizer() {
    let model = r#"{"version": "1.0", "truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": null, "normalizer": null, "post_processor": null, "decoder": null,
        "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": {"<s>": 0, "</s>": 1, "<mask>": 2, "<pad>": 3, "<unk>": 4, "a": 5, "b": 6, "c": 7, "ab": 8},
            "merges": [["a", "b"]]}}"#;
    let dir = Dir::new();
    let tokenizer = load(&dir.write("tokenizer.json", model));
    let expected = [(8, true), (7, false), (5, true), (5, true), (5, false)].map(|(id, start)| Token::new(id, start));
    // Five tokens although the file says to truncate at two: the caller cuts.
    assert_eq!(encode(&tokenizer, "abc a aa", usize::MAX), expected);
    let long = "abc a aa ".repeat(40_000);
    assert_eq!(encode(&tokenizer, &long, usize::MAX), expected.repeat(40_000));
}

#[test]
fn unusable_tokenizers_are_refused() {
    let dir = Dir::new();
    let refused = |path: &std::path::Path| match Tokenizer::load(path) {
        Ok(_) => panic!("{} was accepted", path.display()),
        Err(e) => e.to_string(),
    };
    dir.write("empty/readme.md", "");
    assert!(refused(&dir.at("empty")).contains("neither tokenizer.json nor vocab.txt"));
    assert!(refused(&dir.write("cut.json", "{\"version\": \"1.0\"")).contains("the tokenizer cannot be used"));
    assert!(
        refused(&dir.write("v/vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\nword\n"))
            .contains("the vocabulary has no [MASK]")
    );
    assert!(refused(&dir.at("nowhere")).contains("No such file"));
}
