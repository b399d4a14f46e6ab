//! Rows that bring their own texts, in every form.

use retromae_engine::Result;
use retromae_engine::data::pairs::rows::{RowFormat, RowRules, from_rows};
use retromae_engine::data::pairs::{MissingScore, Pairs, PairsSettings, Side};
use retromae_engine::data::shard::TitleSep;
use retromae_engine::data::source::Input;
use retromae_engine::data::tokenizer::Tokenizer;

use super::support::*;

const RULES: RowRules = RowRules { format: None, title_sep: TitleSep::Space, query_length: 8, passage_length: 12 };
const SETTINGS: PairsSettings = PairsSettings { group: 1, depth: 10, missing_score: MissingScore::Error };

fn tokenizer() -> Tokenizer {
    Tokenizer::load(&root().join("tests/golden/minilm")).unwrap_or_else(|e| panic!("{e}"))
}

fn read(input: &Input) -> Result<Pairs> {
    from_rows(std::slice::from_ref(input), &tokenizer(), None, &RULES, SETTINGS)
}

/// A text's tokens in words, without its borders.
fn words(tokenizer: &Tokenizer, side: &Side, i: u32) -> String {
    let (mut ids, mut starts) = (Vec::new(), Vec::new());
    side.corpus.read(u64::from(i), &mut ids, &mut starts).unwrap();
    let special = tokenizer.special();
    assert_eq!((ids[0], ids[ids.len() - 1]), (special.cls, special.sep));
    ids[1..ids.len() - 1].iter().map(|&id| tokenizer.spelling(id)).collect::<Vec<_>>().join(" ")
}

/// A passage and its score.
type Scored = (String, Option<f32>);

/// Query, positives and negatives of every row.
fn texts(pairs: &Pairs) -> Vec<(String, Vec<Scored>, Vec<Scored>)> {
    let tokenizer = tokenizer();
    let list = |list: &[u32], scores: Option<&[f32]>| {
        let one = |(k, &p): (usize, &u32)| (words(&tokenizer, pairs.passages(), p), scores.map(|s| s[k]));
        list.iter().enumerate().map(one).collect::<Vec<_>>()
    };
    let row = |r| {
        let positives = list(pairs.positives(r), pairs.positive_scores(r));
        let negatives = list(pairs.negatives(r), pairs.negative_scores(r));
        (words(&tokenizer, pairs.queries(), pairs.query(r)), positives, negatives)
    };
    (0..pairs.rows()).map(row).collect()
}

type Expected<'a> = (&'a str, &'a [&'a str], &'a [&'a str]);

#[track_caller]
fn check_pairs(pairs: &Pairs, format: RowFormat, expected: &[Expected<'_>]) {
    let plain = |list: &[&str]| list.iter().map(|t| (t.to_string(), None)).collect::<Vec<Scored>>();
    let expected: Vec<_> = expected.iter().map(|(q, p, n)| (q.to_string(), plain(p), plain(n))).collect();
    assert_eq!(texts(pairs), expected);
    assert!(pairs.findings().files.iter().all(|(_, what)| *what == format.describe()));
}

#[track_caller]
fn check(text: &str, format: RowFormat, expected: &[Expected<'_>]) {
    let dir = Dir::new();
    for input in [
        dir.write("rows.jsonl", text),
        dir.write("crlf", text.replace('\n', "\r\n")),
        dir.write("rows.jsonl.gz", gz(text.as_bytes())),
    ] {
        check_pairs(&read(&input).unwrap_or_else(|e| panic!("{e}")), format, expected);
    }
}

#[test]
fn tevatron_rows_bring_passages_with_titles() {
    check(
        concat!(
            r#"{"query_id": "1", "query": "red fox", "positive_passages": [{"docid": "a", "title": "Fox", "text": "an animal"}], "#,
            r#""negative_passages": [{"docid": "b", "title": "", "text": "a house"}, {"docid": "c", "text": "the sea"}]}"#,
            "\n\n",
            r#"{"query_id": "2", "query": "sea", "positive_passages": [{"docid": "c", "text": "the sea"}], "negative_passages": []}"#,
            "\n"
        ),
        RowFormat::TevatronTexts,
        &[("red fox", &["fox an animal"], &["a house", "the sea"]), ("sea", &["the sea"], &[])],
    );
}

#[test]
fn titles_are_joined_as_said() {
    let dir = Dir::new();
    let input = dir.write("r", r#"{"query": "q", "positive_passages": [{"title": "Fox", "text": "an animal"}]}"#);
    for (title_sep, expected) in
        [(TitleSep::None, "an animal"), (TitleSep::Space, "fox an animal"), (TitleSep::Sep, "fox [SEP] an animal")]
    {
        let rules = RowRules { title_sep, ..RULES };
        let pairs = from_rows(std::slice::from_ref(&input), &tokenizer(), None, &rules, SETTINGS).unwrap();
        assert_eq!(texts(&pairs)[0].1[0].0, expected);
    }
}

#[test]
fn flag_embedding_rows_may_bring_scores() {
    let text = "{\"query\": \"red\", \"pos\": [\"a fox\"], \"neg\": [\"a house\", \"a sea\"]}\n\
                {\"query\": \"blue\", \"pos\": [\"a sea\"], \"neg\": [], \"pos_scores\": null, \"extra\": 1}\n";
    let expected: [Expected<'_>; 2] = [("red", &["a fox"], &["a house", "a sea"]), ("blue", &["a sea"], &[])];
    check(text, RowFormat::FlagEmbedding, &expected);
    let dir = Dir::new();
    let scored = "{\"query\": \"red\", \"pos\": [\"a fox\", \"the fox\"], \"neg\": [\"a house\"], \"pos_scores\": [2, 1.5], \
                  \"neg_scores\": [-3], \"prompt\": \"find\"}\n";
    let pairs = read(&dir.write("rows", scored)).unwrap();
    let scored = |list: &[(&str, f32)]| list.iter().map(|&(t, s)| (t.to_string(), Some(s))).collect::<Vec<_>>();
    let (positives, negatives) = (scored(&[("a fox", 2.0), ("the fox", 1.5)]), scored(&[("a house", -3.0)]));
    assert_eq!(texts(&pairs), [("red".to_string(), positives, negatives)]);
    assert_eq!(pairs.findings().prompts.count, 1);
}

#[test]
fn columns_are_anchor_positive_and_negatives_in_order() {
    check(
        "{\"anchor\": \"red\", \"positive\": \"a fox\", \"negative_1\": \"a house\", \"negative_2\": \"a sea\"}\n\
         {\"anchor\": \"blue\", \"positive\": \"a sea\", \"negative_1\": \"a fox\", \"negative_2\": null}\n",
        RowFormat::Tuples,
        &[("red", &["a fox"], &["a house", "a sea"]), ("blue", &["a sea"], &["a fox"])],
    );
    // Any names; arrays; lists of negatives.
    check("{\"question\": \"red\", \"answer\": \"a fox\"}\n", RowFormat::Tuples, &[("red", &["a fox"], &[])]);
    check("[\"red\", \"a fox\", \"a house\"]\n", RowFormat::Tuples, &[("red", &["a fox"], &["a house"])]);
    let lists = "{\"query\": \"red\", \"positive\": \"a fox\", \"negatives\": [\"a sea\", \"a house\"]}\n";
    check(lists, RowFormat::Tuples, &[("red", &["a fox"], &["a sea", "a house"])]);
    // A label says whether a pair is one; equal queries are one query.
    check(
        "{\"a\": \"red\", \"b\": \"a sea\", \"label\": 0}\n{\"a\": \"Red\", \"b\": \"a fox\", \"label\": 1.0}\n\
         {\"a\": \"red\", \"b\": \"a house\", \"label\": false}\n",
        RowFormat::Tuples,
        &[("red", &["a fox"], &["a sea", "a house"])],
    );
    let dir = Dir::new();
    let pairs = read(&dir.write("r", "{\"a\": \"q\", \"b\": \"x\", \"c\": \"y\", \"label\": [0.5, -1]}\n")).unwrap();
    assert_eq!((pairs.positive_scores(0).unwrap(), pairs.negative_scores(0).unwrap()), (&[0.5][..], &[-1.0][..]));
}

#[test]
fn equal_texts_are_one_and_a_positive_of_one_row_is_no_negative_in_another() {
    let dir = Dir::new();
    let text = "[\"red\", \"a fox\", \"a sea\"]\n[\"RED \", \"a sea\", \"a house\"]\n[\"blue\", \"A  fox\"]\n";
    let pairs = read(&dir.write("rows", text)).unwrap();
    check_pairs(&pairs, RowFormat::Tuples, &[("red", &["a fox", "a sea"], &["a house"]), ("blue", &["a fox"], &[])]);
    assert_eq!((pairs.queries().corpus.texts(), pairs.passages().corpus.texts()), (2, 3));
    assert_eq!((pairs.findings().rows, pairs.findings().positive_negatives.count), (3, 1));
    assert_eq!(pairs.findings().positive_negatives.first.as_deref(), Some("text 1 of query text 0"));
}

#[test]
fn texts_are_cut_and_empty_ones_left_out() {
    let dir = Dir::new();
    let long = "one two three four five six seven eight nine ten eleven twelve";
    let text = format!("[{long:?}, {long:?}, \"\", \" \"]\n[\"\", \"x\"]\n");
    let pairs = read(&dir.write("rows", text)).unwrap();
    let expected: [Expected<'_>; 1] =
        [("one two three four five six", &["one two three four five six seven eight nine ten"], &[])];
    check_pairs(&pairs, RowFormat::Tuples, &expected);
    let lines = pairs.findings().lines();
    assert!(lines[0].starts_with("3 texts of rows are empty; left out (first: "), "{lines:?}");
    assert!(lines[0].ends_with("rows:1: a passage)"), "{lines:?}");
}

#[test]
fn rows_may_name_passages_of_a_corpus() {
    let dir = Dir::new();
    let tokenizer = tokenizer();
    let fingerprint = tokenizer.fingerprint();
    let set = dir.set("set", [("a", vec![2001]), ("7", vec![2002]), ("c", vec![2003])]);
    let rows = "{\"query_id\": \"1\", \"query_text\": \"red\", \"positive_document_ids\": [\"c\"], \
                \"negative_document_ids\": [7, \"x\"]}\n";
    let input = dir.write("rows", rows);
    let read = |corpus, rules: &RowRules| from_rows(std::slice::from_ref(&input), &tokenizer, corpus, rules, SETTINGS);
    // Of another tokenizer.
    let told = dir.message(read(Some(set), &RULES));
    assert!(told.starts_with("set: was tokenized with another tokenizer than the model"), "{told}");
    let told = dir.message(read(None, &RULES));
    assert_eq!(told, "rows:1: the row names passages by id, and there is no corpus; give the corpus");
    let corpus = dir.write("corpus.tsv", "a\tone\n7\ttwo\nc\tthree\n");
    let set = tokenized(&dir, &tokenizer, &corpus);
    assert_eq!(set.facts().fingerprint, fingerprint.iter().map(|b| format!("{b:02x}")).collect::<String>());
    let pairs = read(Some(set.clone()), &RULES).unwrap();
    check_pairs(&pairs, RowFormat::TevatronIds, &[("red", &["three"], &["two"])]);
    assert_eq!(pairs.findings().unknown_negatives.count, 1);
    let other = dir.write("other", "[\"a\", \"b\"]\n");
    let told = dir.message(from_rows(&[other], &tokenizer, Some(set), &RULES, SETTINGS));
    assert!(told.starts_with("other:1: the row brings its own passages, and there is a corpus; leave"), "{told}");
}

#[track_caller]
fn refused(text: &str, expected: &str) {
    let dir = Dir::new();
    let message = dir.message(read(&dir.write("f", text)));
    assert!(message.starts_with(expected) && message.contains("; "), "{message}\n  and not {expected}");
}

#[test]
fn wrong_rows_are_told_by_line() {
    refused("", "f: is empty");
    refused("{\"text\": \"alone\"}\n", "f:1: this is no training row; give query and pos");
    refused("[\"a\", \"b\"]\n{\n", "f:2: EOF while parsing an object at column 1");
    refused("[\"a\", \"b\"]\n7\n", "f:2: the row is no JSON object; write one object a line");
    refused("[\"a\"]\n", "f:1: the row has an anchor and nothing else");
    refused("[\"a\", 3]\n", "f:1: column 2 is not text");
    refused("{\"a\": \"x\", \"b\": null}\n", "f:1: b is missing");
    refused(
        "{\"a\": \"x\", \"b\": \"y\", \"score\": 0.3}\n",
        "f:1: score does not say whether the pair is one; give 1 or 0",
    );
    refused("{\"a\": \"x\", \"b\": \"y\", \"c\": \"z\", \"label\": 0}\n", "f:1: label does not say");
    refused("{\"a\": \"x\", \"b\": \"y\", \"label\": [1, 2]}\n", "f:1: 2 scores of 1 passages");
    refused("{\"query\": 1, \"pos\": []}\n", "f:1: query is not text");
    refused("{\"query\": \"a\", \"pos\": \"b\"}\n", "f:1: pos is not a list");
    refused("{\"query\": \"a\", \"pos\": [7]}\n", "f:1: a passage in pos is not text");
    refused("{\"query\": \"a\", \"pos\": [\"b\"], \"pos_scores\": []}\n", "f:1: 0 scores of the 1 passages in pos");
    refused(
        "{\"query\": \"a\", \"pos\": [\"b\"], \"pos_scores\": [\"x\"]}\n",
        "f:1: pos_scores holds something that is not",
    );
    refused(
        "{\"query\": \"a\", \"positive_passages\": [{\"docid\": 1}]}\n",
        "f:1: the text of a passage in positive_passages is missing",
    );
    let many: String =
        (0..5000).map(|i| if i % 1000 == 999 { "[1]\n".into() } else { format!("[\"q{i}\", \"p\"]\n") }).collect();
    refused(&many, "f:1000: column 1 is not text | ");
}

#[test]
fn the_result_does_not_depend_on_threads() {
    let dir = Dir::new();
    let rows: String =
        (0..5000).map(|i| format!("[\"query {}\", \"text {}\", \"other {}\"]\n", i % 900, i % 70, i % 331)).collect();
    let input = dir.write("rows", rows);
    let all = in_pools(|| {
        let pairs = read(&input).unwrap_or_else(|e| panic!("{e}"));
        texts(&pairs)
    });
    assert_eq!(all.len(), 900);
}

#[test]
fn real_texts_tokenized_become_batches() {
    use retromae_engine::data::pairs::batch::{ContrastiveBuilder, Duplicates};
    use retromae_engine::data::pairs::files::{PairFiles, from_files};
    use retromae_engine::data::pairs::texts::TextRules;
    use std::sync::Arc;

    let (dir, demo) = (Dir::new(), root().join("assets/demo"));
    let tokenizer = Tokenizer::load(&demo.join("vocab.txt")).unwrap();
    let set = |name: &str| tokenized(&dir, &tokenizer, &Input { path: demo.join(name), bytes: None });
    let (queries, passages) = (set("queries.jsonl.gz"), set("corpus.jsonl.gz"));
    let mut qrels = String::from("query-id\tcorpus-id\tscore\n");
    for i in 0..queries.len() {
        let id = queries.id(i).unwrap().unwrap();
        qrels += &format!("{id}\t{id}\t1\n");
    }
    let files = PairFiles { qrels: vec![dir.write("train.tsv", qrels)], ..PairFiles::default() };
    let settings = PairsSettings { group: 4, ..PairsSettings::default() };
    let pairs = from_files(queries.clone(), passages.clone(), &files, settings, None).unwrap();
    assert_eq!((pairs.rows(), pairs.findings().short_lists.count), (4000, 4000));
    for row in 0..4000 {
        let positive = pairs.positives(row)[0];
        assert_eq!(queries.id(u64::from(pairs.query(row))).unwrap(), passages.id(u64::from(positive)).unwrap());
    }
    let rules = |n| TextRules::new(n);
    let builder = ContrastiveBuilder::new(1, Arc::new(pairs), rules(32), rules(128), Duplicates::Mask).unwrap();
    let batch = in_pools(|| builder.build(3984..4016).unwrap());
    assert_eq!((batch.queries.sequences(), batch.passages.sequences()), (32, 128));
    let longest = batch.passages.cu_seqlens.windows(2).map(|w| w[1] - w[0]).max().unwrap();
    assert_eq!(longest, 128);
}

/// A file's documents as a set of shards.
fn tokenized(
    dir: &Dir,
    tokenizer: &Tokenizer,
    input: &Input,
) -> std::sync::Arc<retromae_engine::data::shard::ShardSet> {
    use retromae_engine::data::shard::{Packing, ShardSet};
    use retromae_engine::data::tokenize::{Options, run};
    let name = input.path.file_name().unwrap().to_str().unwrap();
    let out = dir.at(&format!("set of {name}"));
    std::fs::create_dir(&out).unwrap();
    let options = Options {
        packing: Packing::Docs,
        max_length: 128,
        title_sep: TitleSep::None,
        shard_tokens: 1 << 20,
        threads: 2,
        format: None,
        blank_lines: false,
        keep_duplicates: false,
    };
    run(std::slice::from_ref(input), tokenizer, &options, &out, &|_| {}).unwrap();
    std::sync::Arc::new(ShardSet::open(&out).unwrap())
}

#[cfg(feature = "parquet")]
mod parquet_files {
    use super::*;
    use parquet::data_type::{ByteArray, ByteArrayType, DoubleType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use std::sync::Arc;

    /// A column's values with definition and repetition levels.
    enum Column {
        Texts(Vec<&'static str>, Option<Vec<i16>>, Option<Vec<i16>>),
        Numbers(Vec<f64>),
    }

    fn file(schema: &str, columns: Vec<Column>) -> Vec<u8> {
        let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
        let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::new(WriterProperties::new())).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for column in columns {
            let mut to = group.next_column().unwrap().unwrap();
            match column {
                Column::Texts(values, def, rep) => {
                    let values: Vec<ByteArray> = values.into_iter().map(ByteArray::from).collect();
                    to.typed::<ByteArrayType>().write_batch(&values, def.as_deref(), rep.as_deref()).unwrap();
                }
                Column::Numbers(values) => {
                    to.typed::<DoubleType>().write_batch(&values, None, None).unwrap();
                }
            }
            to.close().unwrap();
        }
        group.close().unwrap();
        writer.into_inner().unwrap()
    }

    fn triplets() -> Vec<u8> {
        let schema = "message m { required binary anchor (UTF8); required binary positive (UTF8); \
                      optional binary negative (UTF8); required double label; }";
        let negatives = Column::Texts(vec!["a house"], Some(vec![1, 0]), None);
        let texts = |values| Column::Texts(values, None, None);
        let columns =
            vec![texts(vec!["red", "blue"]), texts(vec!["a fox", "a sea"]), negatives, Column::Numbers(vec![1.0; 2])];
        file(schema, columns)
    }

    #[test]
    fn columns_of_parquet() {
        let dir = Dir::new();
        let expected: [Expected<'_>; 2] = [("red", &["a fox"], &["a house"]), ("blue", &["a sea"], &[])];
        for input in [dir.write("rows.parquet", triplets()), dir.write("rows.gz", gz(&triplets()))] {
            check_pairs(&read(&input).unwrap_or_else(|e| panic!("{e}")), RowFormat::Tuples, &expected);
        }
    }

    #[test]
    fn lists_of_parquet() {
        let list = |name| {
            format!("optional group {name} (LIST) {{ repeated group list {{ optional binary element (UTF8); }} }}")
        };
        let schema = format!("message m {{ required binary query (UTF8); {} {} }}", list("pos"), list("neg"));
        let columns = vec![
            Column::Texts(vec!["red", "blue"], None, None),
            Column::Texts(vec!["a fox", "a sea"], Some(vec![3, 3]), Some(vec![0, 0])),
            // Two in the first row, an empty list in the second.
            Column::Texts(vec!["a house", "the sea"], Some(vec![3, 3, 1]), Some(vec![0, 1, 0])),
        ];
        let dir = Dir::new();
        let pairs = read(&dir.write("rows", file(&schema, columns))).unwrap_or_else(|e| panic!("{e}"));
        check_pairs(
            &pairs,
            RowFormat::FlagEmbedding,
            &[("red", &["a fox"], &["a house", "the sea"]), ("blue", &["a sea"], &[])],
        );
    }

    #[test]
    fn files_of_pyarrow() {
        let read = |name: &str| {
            let path = root().join("tests/golden/rows").join(name);
            read(&Input { path, bytes: None }).unwrap_or_else(|e| panic!("{e}"))
        };
        let expected: [Expected<'_>; 2] = [("red", &["a fox"], &["a house"]), ("blue", &["a sea"], &[])];
        check_pairs(&read("triplets.parquet"), RowFormat::Tuples, &expected);
        let expected: [Expected<'_>; 2] = [("red", &["fox a fox"], &["a house"]), ("blue", &["a sea"], &[])];
        check_pairs(&read("tevatron.parquet"), RowFormat::TevatronTexts, &expected);
        let pairs = read("flag_embedding.parquet");
        let found = texts(&pairs);
        assert_eq!(found[0].2, [("a house".to_string(), Some(-1.0)), ("the sea".to_string(), Some(-2.0))]);
        assert_eq!((&found[1].1[..], &found[1].2[..]), (&[("a sea".to_string(), Some(2.5))][..], &[][..]));
    }

    #[test]
    fn damaged_files_are_refused() {
        let (dir, whole) = (Dir::new(), triplets());
        for cut in [4, 9, whole.len() / 2, whole.len() - 1] {
            let message = dir.message(read(&dir.write("cut", &whole[..cut])));
            assert!(message.starts_with("cut: cannot be read as Parquet"), "{message}");
        }
        // Parquet has no digests: a flipped letter is another text. What matters is that nothing panics or hangs.
        let (tokenizer, mut refused) = (tokenizer(), 0);
        for (at, flip) in (0..whole.len()).flat_map(|at| [(at, 0x55), (at, 0x80), (at, 0x01)]) {
            let mut bytes = whole.clone();
            bytes[at] ^= flip;
            let input = dir.write("flipped", bytes);
            refused += u32::from(from_rows(&[input], &tokenizer, None, &RULES, SETTINGS).is_err());
        }
        assert!(refused > 100, "{refused}");
    }
}
