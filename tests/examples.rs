//! The recipes under `examples/`, in their shortest form, on texts of the demo.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use flate2::read::GzDecoder;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The first `n` values of `field` in a file of gzipped JSON lines.
fn values(file: &str, field: &str, n: usize) -> Vec<String> {
    let mut text = String::new();
    let bytes = std::fs::File::open(root().join("assets/demo").join(file)).unwrap();
    GzDecoder::new(bytes).read_to_string(&mut text).unwrap();
    let lines = text.lines().take(n).map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
    lines.map(|v| v[field].as_str().unwrap_or_default().to_string()).collect()
}

fn script(name: &str, arguments: &[&Path], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new("bash");
    command.arg(root().join("examples").join(name)).args(arguments).envs(variables.iter().copied());
    command.env("ENGINE", env!("CARGO_BIN_EXE_retromae-engine")).env_remove("MODEL").output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Files with a title and a text, through the whole chain; the same command again makes nothing anew.
#[test]
fn own_text_goes_through_the_whole_chain() {
    let folder = tempfile::tempdir().unwrap();
    let (files, out) = (folder.path().join("my files"), folder.path().join("out"));
    std::fs::create_dir_all(files.join("more")).unwrap();
    for (i, passage) in values("corpus.jsonl.gz", "text", 60).iter().enumerate() {
        let title = passage.split_whitespace().take(6).collect::<Vec<_>>().join(" ");
        let place = if i % 2 == 0 { files.clone() } else { files.join("more") };
        std::fs::write(place.join(format!("{i:03}.txt")), format!("{title} \"{i}\"\n\n{passage}\n")).unwrap();
    }
    std::fs::write(files.join("empty.txt"), "only a title\n").unwrap();
    let small = [("STEPS", "3"), ("TUNING", "3"), ("BATCH", "4")];
    let done = script("own-text.sh", &[&files, &out], &small);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let table = text(&done.stdout);
    let stages: Vec<&str> = table.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(stages, ["stage", "BM25", "first-round", "second-round", "distilled", "distilled+reranked"], "{table}");
    let figures = |line: &str| -> Vec<f64> { line.split_whitespace().skip(1).map(|f| f.parse().unwrap()).collect() };
    assert!(table.lines().skip(1).all(|line| figures(line).len() == 3), "{table}");
    // A title is made of the first words of its text.
    assert!(table.lines().nth(1).is_some_and(|bm25| figures(bm25)[0] > 0.9), "{table}");
    assert!(text(&done.stderr).contains("1 files without a title and a text are left out"));

    let again = script("own-text.sh", &[&files, &out], &small);
    assert!(again.status.success(), "{}", text(&again.stderr));
    assert_eq!(text(&again.stdout), table);
    assert!(!text(&again.stderr).contains("\n+ ") && !text(&again.stderr).starts_with("+ "), "{}", text(&again.stderr));
}

/// Two arms and two seeds of two steps: a table of means and spreads, made once.
#[test]
fn the_method_gives_a_table() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("set"), folder.path().join("out"));
    std::fs::create_dir_all(data.join("qrels")).unwrap();
    let (mut corpus, mut queries, mut judged) = (String::new(), String::new(), [String::new(), String::new()]);
    for (i, passage) in values("corpus.jsonl.gz", "text", 60).iter().enumerate() {
        let query = passage.split_whitespace().take(6).collect::<Vec<_>>().join(" ");
        corpus += &format!("{}\n", serde_json::json!({"_id": format!("p{i}"), "title": "", "text": passage}));
        queries += &format!("{}\n", serde_json::json!({"_id": format!("q{i}"), "text": query}));
        judged[usize::from(i % 6 == 0)] += &format!("q{i}\tp{i}\t1\n");
    }
    std::fs::write(data.join("corpus.jsonl"), corpus).unwrap();
    std::fs::write(data.join("queries.jsonl"), queries).unwrap();
    for (name, which) in [("train", 0), ("dev", 1), ("test", 1)] {
        std::fs::write(
            data.join("qrels").join(format!("{name}.tsv")),
            format!("query-id\tcorpus-id\tscore\n{}", judged[which]),
        )
        .unwrap();
    }
    let small = [
        ("SEEDS", "1 2"),
        ("ARMS", "none retromae"),
        ("PRETRAIN", "--batch-size 4 --steps 2 --eval-size 4"),
        ("TUNE", "--batch-size 4 --steps 2"),
    ];
    let done = script("method.sh", &[&data, &out, &data], &small);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let table = text(&done.stdout);
    let rows: Vec<&str> = table.lines().collect();
    assert_eq!(rows[0], "| pre-trained by | MRR@10 | Recall@100 | NDCG@10 of set |");
    let names: Vec<&str> = rows[2..].iter().filter_map(|row| row.split('|').nth(1)).map(str::trim).collect();
    assert_eq!(names, ["none", "retromae", "BM25"], "{table}");
    for row in &rows[2..4] {
        assert_eq!(row.matches(" ± 0.").count(), 3, "mean and spread of two seeds: {table}");
    }
    // Every one of 60 passages is within the best 100, and queries are the first words of theirs.
    assert_eq!(rows[3].split('|').nth(3).map(str::trim), Some("1.0000 ± 0.0000"), "{table}");
    let bm25: f64 = rows[4].split('|').nth(2).unwrap().trim().parse().unwrap();
    assert!(bm25 > 0.8, "{table}");

    let again = script("method.sh", &[&data, &out, &data], &small);
    assert_eq!(text(&again.stdout), table);
    assert!(!text(&again.stderr).contains("+ "), "{}", text(&again.stderr));
}

#[test]
fn wrong_input_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let cases: [(&str, PathBuf, &str); 3] = [
        ("own-text.sh", folder.path().join("absent"), "is no folder; name one with .txt files"),
        ("debian.sh", folder.path().to_path_buf(), "holds no corpus.jsonl or corpus.jsonl.gz; name a data set"),
        ("own-text.sh", folder.path().to_path_buf(), "holds no .txt file"),
    ];
    for (name, data, expected) in cases {
        let refused = script(name, &[&data, &out], &[]);
        let told = text(&refused.stderr);
        assert!(!refused.status.success() && told.starts_with("error: ") && told.contains(expected), "{name}: {told}");
        assert_eq!(told.lines().count(), 1, "{told}");
    }
    let usage = script("msmarco.sh", &[], &[]);
    assert_eq!(usage.status.code(), Some(2));
    assert!(text(&usage.stderr).contains("examples/msmarco.sh DATA [OUTPUT]"), "{}", text(&usage.stderr));
}
