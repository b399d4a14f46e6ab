//! Lexical embeddings: what they are, how they are stored and searched, what is refused.

use std::collections::HashMap;
use std::path::Path;

use retromae_engine::data::source;
use retromae_engine::device::{DType, Device};
use retromae_engine::files::Disk;
use retromae_engine::graph::Capacity;
use retromae_engine::graph::inference::Inference;
use retromae_engine::model::towers::Towers;
use retromae_engine::retrieve::embedder::Kind;
use retromae_engine::retrieve::embeddings::{Embeddings, Layout, Meta};
use retromae_engine::retrieve::encode;
use retromae_engine::retrieve::model::{Model, Texts};
use retromae_engine::retrieve::npy::Stored;
use retromae_engine::retrieve::representation::{Embedded, Representation};
use retromae_engine::retrieve::search::{Rows, search};

use crate::support::{CPU, Dir, WIDTH, content, encode_on, fails, jsonl, ok, open, passages, reading, texts};

const K: usize = 20;

fn kept(representation: Representation) -> Texts {
    Texts { representation, lexical_top_k: K, ..passages(1000) }
}

/// All rows of a folder.
fn rows(dir: &Path) -> Embedded {
    let folder = Embeddings::open(dir).unwrap();
    let spec = &folder.meta().spec;
    let (mut all, widths) = (Embedded::default(), (spec.dim, spec.lexical_top_k));
    folder
        .each_block(|first, block: &Embedded| {
            assert_eq!(first as usize, all.len(widths));
            all.append(block, 0..block.len(widths), widths);
            Ok(())
        })
        .unwrap();
    all
}

/// Rows `range` of some.
fn part(rows: &Embedded, range: std::ops::Range<usize>, widths: (usize, usize)) -> Embedded {
    let mut part = Embedded::default();
    part.append(rows, range, widths);
    part
}

/// The weights of all words of a text, from the last hidden states of the library, with the head in f64.
fn all_words(path: &Path, ids: &[u32]) -> Vec<f64> {
    let towers = Towers::open(path).unwrap();
    let config = &towers.config;
    let capacity = Capacity { tokens: 64, sequences: 1, length: 64, encoder_labels: 0 };
    let mut inference = Inference::new(Device::Cpu, config, capacity, DType::F32).unwrap();
    inference.params().load(0, 0.0, |name, shape, out| towers.read(name, shape, out)).unwrap();
    let rows: Vec<u32> = (0..ids.len() as u32).collect();
    let hidden = inference.hidden_states(ids, &vec![0; ids.len()], &[0, ids.len() as u32], &rows).to_vec::<f32>();
    let read = |name: &str, shape: &[usize]| {
        let mut out = vec![0.0; shape.iter().product()];
        assert!(towers.read(name, shape, &mut out).unwrap(), "{name}");
        out.into_iter().map(f64::from).collect::<Vec<_>>()
    };
    let (c, v) = (config.hidden_size, config.vocab_size);
    let dense = read("cls.predictions.transform.dense.weight", &[c, c]);
    let [bias, gamma, beta] = ["dense.bias", "LayerNorm.weight", "LayerNorm.bias"]
        .map(|name| read(&format!("cls.predictions.transform.{name}"), &[c]));
    let (words, own) = (read("bert.embeddings.word_embeddings.weight", &[v, c]), read("cls.predictions.bias", &[v]));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut most = vec![f64::NEG_INFINITY; v];
    for h in hidden.chunks(c).skip(1).take(ids.len() - 1) {
        let h: Vec<f64> = h.iter().map(|&x| f64::from(x)).collect();
        let z: Vec<f64> = (0..c).map(|i| (dot(&dense[i * c..(i + 1) * c], &h) + bias[i]).max(0.0)).collect();
        let mean = z.iter().sum::<f64>() / c as f64;
        let rstd =
            (z.iter().map(|z| (z - mean).powi(2)).sum::<f64>() / c as f64 + f64::from(config.layer_norm_eps)).sqrt();
        let y: Vec<f64> = (0..c).map(|i| (z[i] - mean) / rstd * gamma[i] + beta[i]).collect();
        most.iter_mut().enumerate().for_each(|(w, m)| *m = m.max(dot(&words[w * c..(w + 1) * c], &y) + own[w]));
    }
    most
}

#[test]
fn a_row_holds_the_largest_words_of_its_text() {
    let dir = Dir::new();
    let path = dir.headed("model", 1);
    let model = open(&path);
    let texts = texts(12);
    let input = dir.write("all.jsonl", jsonl(&texts));
    encode_on(&Disk::default(), &model, &input, &dir.at("out"), &kept(Representation::Lexical)).unwrap();
    let found = rows(&dir.at("out"));
    assert!(found.dense.is_empty() && found.ids.len() == 12 * K);
    let tokenizer = retromae_engine::data::tokenizer::Tokenizer::load(&path).unwrap();
    // An ordinary text, the empty one, the one that was cut.
    for i in [0, 3, 5] {
        let mut ids = vec![tokenizer.special().cls];
        ids.extend(tokenizer.ids(&texts[i]).unwrap().into_iter().take(46));
        ids.push(tokenizer.special().sep);
        let all = all_words(&path, &ids);
        let mut order: Vec<usize> = (0..all.len()).collect();
        order.sort_by(|&a, &b| all[b].total_cmp(&all[a]).then(a.cmp(&b)));
        let row = part(&found, i..i + 1, (0, K));
        for (n, (&id, &weight)) in row.ids.iter().zip(&row.weights).enumerate() {
            let (own, expected) = (all[id as usize], all[order[n]]);
            assert!((f64::from(weight) - own).abs() < 1e-4 && (own - expected).abs() < 1e-4, "text {i}, word {n}");
        }
        assert!(row.weights.windows(2).all(|w| w[0] >= w[1]));
    }
}

#[test]
fn a_row_does_not_depend_on_its_neighbours_nor_on_what_else_is_kept() {
    let dir = Dir::new();
    let model = open(&dir.headed("model", 1));
    let texts = texts(40);
    let input = dir.write("all.jsonl", jsonl(&texts));
    let encode = |input: &Path, name: &str, texts: &Texts| {
        encode_on(&Disk::default(), &model, input, &dir.at(name), texts).unwrap();
        rows(&dir.at(name))
    };
    let all = encode(&input, "both", &kept(Representation::Both));
    assert_eq!((all.dense.len(), all.ids.len(), all.weights.len()), (40 * WIDTH, 40 * K, 40 * K));
    let lexical = encode(&input, "lexical", &kept(Representation::Lexical));
    let cls = encode(&input, "cls", &kept(Representation::Cls));
    assert!(lexical.ids == all.ids && lexical.weights == all.weights && cls.dense == all.dense);
    assert!(cls.ids.is_empty() && lexical.dense.is_empty());
    for i in [0, 3, 5, 39] {
        let one = dir.write("one.jsonl", jsonl(&texts[i..=i]));
        let one = encode(&one, &format!("one{i}"), &kept(Representation::Both));
        assert!(one == part(&all, i..i + 1, (WIDTH, K)), "text {i} alone");
    }
    assert!(encode(&input, "sevens", &Texts { shard_rows: Some(7), ..kept(Representation::Both) }) == all);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let one = pool.install(|| encode(&input, "thread", &kept(Representation::Both)));
    assert!(one == all && content(&dir.at("thread")) == content(&dir.at("both")));
    // The fewer are the first of the more, and f16 is near.
    let few = encode(&input, "few", &Texts { lexical_top_k: 3, ..kept(Representation::Lexical) });
    assert!(few.ids.chunks(3).zip(all.ids.chunks(K)).all(|(few, all)| few == &all[..3]));
    let half = encode(&input, "half", &Texts { stored: Stored::F16, ..kept(Representation::Both) });
    assert!(
        half.ids == all.ids && half.weights.iter().zip(&all.weights).all(|(a, b)| (a - b).abs() <= b.abs() / 1000.0)
    );
    let bytes = std::fs::read(dir.at("half/lexical-ids-00000.npy")).unwrap();
    assert!(
        bytes.starts_with(b"\x93NUMPY\x01\x00\x76\x00{'descr': '<u2', 'fortran_order': False, 'shape': (40, 20), }")
    );
    assert_eq!(bytes.len(), 128 + 40 * K * 2);
    assert_eq!(Embeddings::open(&dir.at("sevens")).unwrap().verify().unwrap().files, 2 + 3 * 6);
}

#[test]
fn the_emulated_gpu_gives_the_words_of_the_cpu() {
    let dir = Dir::new();
    let model = open(&dir.headed("model", 1));
    let input = dir.write("all.jsonl", jsonl(&texts(14)));
    let texts = kept(Representation::Both);
    encode_on(&Disk::default(), &model, &input, &dir.at("cpu"), &texts).unwrap();
    let expected = rows(&dir.at("cpu"));
    let (gpu, _) = Device::open("emulator").unwrap();
    for (name, storage, tolerance) in [("f32", DType::F32, 1e-4), ("bf16", DType::BF16, 0.6)] {
        for again in ["", "-again"] {
            let job = model.job((gpu, storage), &texts).unwrap();
            let inputs = source::expand(&[input.to_str().unwrap().into()]).unwrap();
            let source = model.documents(&job, inputs, reading()).unwrap();
            let mut embedder = model.embedder((gpu, storage), Kind::Passage, &job).unwrap();
            let out = dir.at(&format!("{name}{again}"));
            encode::run(&Disk::default(), source, &mut embedder, &job, &out, &|_| {}).unwrap();
        }
        assert_eq!(content(&dir.at(name)), content(&dir.at(&format!("{name}-again"))));
        let found = rows(&dir.at(name));
        let texts = found.weights.chunks(K).zip(expected.weights.chunks(K));
        for (i, (found, expected)) in texts.enumerate() {
            let far = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(far <= tolerance, "{name}, text {i}: {far}");
        }
        if storage == DType::F32 {
            assert!(found.ids == expected.ids);
        }
    }
}

/// Scores of all rows in f64, ranked.
fn brute(query: &Embedded, rows: &Embedded, widths: (usize, usize)) -> Vec<(u32, f64)> {
    let words: HashMap<u32, f32> = query.ids.iter().copied().zip(query.weights.iter().copied()).collect();
    let score = |r: usize| {
        let row = part(rows, r..r + 1, widths);
        let dense = row.dense.iter().zip(&query.dense).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let common = row.ids.iter().zip(&row.weights);
        dense + common.filter_map(|(id, b)| Some(f64::from(*words.get(id)?) * f64::from(*b))).sum::<f64>()
    };
    let mut all: Vec<(u32, f64)> = (0..rows.len(widths)).map(|r| (r as u32, score(r))).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    all
}

#[test]
fn searches_over_encoded_texts_are_those_of_a_brute_force() {
    let dir = Dir::new();
    let model = open(&dir.headed("model", 1));
    let all = texts(60);
    let corpus = dir.write("corpus.jsonl", jsonl(&all));
    let queries = dir.write("queries.jsonl", jsonl(&all[..9]));
    for representation in [Representation::Both, Representation::Lexical, Representation::Cls] {
        let name = |side: &str| format!("{side}-{}", representation.name());
        encode_on(
            &Disk::default(),
            &model,
            &corpus,
            &dir.at(&name("c")),
            &Texts { shard_rows: Some(25), ..kept(representation) },
        )
        .unwrap();
        // Queries may keep more words.
        let more = Texts { lexical_top_k: 50, prefix: Some(String::new()), ..kept(representation) };
        encode_on(&Disk::default(), &model, &queries, &dir.at(&name("q")), &more).unwrap();
        let open = |side: &str| Rows::open(&[dir.at(&name(side))]).unwrap();
        let (q, c) = (open("q"), open("c"));
        let (query_rows, corpus_rows) = (rows(&dir.at(&name("q"))), rows(&dir.at(&name("c"))));
        let mut seen = 0;
        search(CPU, (&q, &c), 25, &|_| {}, |id, list| {
            assert_eq!((id, list.len()), (format!("d{seen}").as_str(), 25));
            let expected = brute(&part(&query_rows, seen..seen + 1, q.widths()), &corpus_rows, c.widths());
            for (n, hit) in list.iter().enumerate() {
                let own = expected.iter().find(|e| e.0 == hit.0).unwrap().1;
                let near = 1e-5 * (1.0 + own.abs());
                assert!((own - f64::from(hit.1)).abs() < near && (own - expected[n].1).abs() < near, "{id}, place {n}");
            }
            seen += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, 9);
    }
}

#[test]
fn pyserini_gets_json_lines_of_integers() {
    let dir = Dir::new();
    let model = open(&dir.headed("model", 1));
    let input = dir.write("all.jsonl", jsonl(&texts(10)));
    let texts = Texts { layout: Layout::Pyserini, shard_rows: Some(4), ..kept(Representation::Lexical) };
    encode_on(&Disk::default(), &model, &input, &dir.at("out"), &texts).unwrap();
    let found = rows(&dir.at("out"));
    let words: Vec<String> =
        std::fs::read_to_string(dir.at("model/vocab.txt")).unwrap().lines().map(str::to_owned).collect();
    let files = ["00000", "00001", "00002"].map(|n| dir.at(&format!("out/pyserini/vectors-{n}.jsonl")));
    let lines: Vec<String> = files
        .iter()
        .flat_map(|f| std::fs::read_to_string(f).unwrap().lines().map(str::to_owned).collect::<Vec<_>>())
        .collect();
    assert_eq!(lines.len(), 10);
    for (i, line) in lines.iter().enumerate() {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!((&value["id"], &value["contents"]), (&format!("d{i}").into(), &"".into()));
        let row = part(&found, i..i + 1, (0, K));
        let vector = value["vector"].as_object().unwrap();
        let expected: HashMap<&str, u64> = row
            .ids
            .iter()
            .zip(&row.weights)
            .map(|(&id, w)| (words[id as usize].as_str(), (w * 100.0).round().max(0.0) as u64))
            .filter(|word| word.1 > 0)
            .collect();
        let got: HashMap<&str, u64> = vector.iter().map(|(word, n)| (word.as_str(), n.as_u64().unwrap())).collect();
        assert!(!got.is_empty() && got == expected, "{line}");
    }
    // The folder is also one of embeddings, and complete.
    let meta = Meta::read(&dir.at("out")).unwrap();
    assert_eq!((meta.count, meta.files.pyserini.len(), meta.spec.vocab_size), (10, 3, 30522));
    assert_eq!(Embeddings::open(&dir.at("out")).unwrap().verify().unwrap().files, 2 + 3 * 3);
    std::fs::write(&files[1], "{}\n").unwrap();
    let message = dir.message(Embeddings::open(&dir.at("out")).unwrap().verify());
    assert!(
        message.starts_with("out/pyserini/vectors-00001.jsonl: does not match its digest in meta.json"),
        "{message}"
    );
    encode_on(
        &Disk::default(),
        &model,
        &input,
        &dir.at("out"),
        &Texts { overwrite: true, ..kept(Representation::Cls) },
    )
    .unwrap();
    assert_eq!(
        content(&dir.at("out")).iter().map(|f| f.0.to_str().unwrap()).collect::<Vec<_>>(),
        ["embeddings-00000.npy", "ids.txt", "meta.json"]
    );
}

#[test]
fn what_cannot_be_encoded_or_joined_names_what_is_in_the_way() {
    let dir = Dir::new();
    let (bare, model) = (dir.model("bare", 1), open(&dir.headed("model", 1)));
    let input = dir.write("all.jsonl", jsonl(&texts(6)));
    let refused = |model: &Model, texts: &Texts| dir.message(model.job(CPU, texts).map(drop));
    let message = refused(&open(&bare), &kept(Representation::Both));
    assert_eq!(
        message,
        "bare/model.safetensors: holds no MLM head: no cls.predictions.*, which a lexical representation is made with; give a model that \
         still has the head it was pre-trained with, or use --representation cls"
    );
    let message = refused(&model, &Texts { lexical_top_k: 5000, ..kept(Representation::Lexical) });
    assert_eq!(message, "the 5000 largest of 30522 tokens; choose --lexical-top-k 1 to 4096");
    let message = refused(&model, &Texts { layout: Layout::Pyserini, ..kept(Representation::Cls) });
    assert_eq!(message, "--format pyserini holds lexical embeddings; add --representation lexical or both");
    let message = refused(&model, &Texts { layout: Layout::FaissFlat, ..kept(Representation::Both) });
    assert!(message.starts_with("this --format holds dense embeddings alone; "), "{message}");
    for (name, representation, k) in [
        ("cls", Representation::Cls, K),
        ("lexical", Representation::Lexical, K),
        ("both", Representation::Both, K),
        ("ten", Representation::Both, 10),
    ] {
        let texts = Texts { lexical_top_k: k, ..kept(representation) };
        encode_on(&Disk::default(), &model, &input, &dir.at(name), &texts).unwrap();
        let message = dir.message(encode_on(
            &Disk::default(),
            &model,
            &input,
            &dir.at(name),
            &Texts { lexical_top_k: 9, ..kept(Representation::Lexical) },
        ));
        let expected = if representation == Representation::Lexical {
            "lexical_top_k 20; now it is 9; "
        } else {
            "holds embeddings with "
        };
        assert!(message.contains(expected), "{message}");
    }
    let open = |names: &[&str]| Rows::open(&names.iter().map(|name| dir.at(name)).collect::<Vec<_>>());
    let join = |q: &str, c: &str| search(CPU, (&open(&[q]).unwrap(), &open(&[c]).unwrap()), 2, &|_| {}, |_, _| Ok(()));
    let end = "; encode queries and passages with the same model and settings";
    let message = dir.message(join("cls", "both"));
    assert_eq!(message, format!("cls: differs in the representation: cls; that of both is both{end}"));
    let message = dir.message(join("both", "lexical"));
    assert_eq!(message, format!("both: differs in the representation: both; that of lexical is lexical{end}"));
    // Queries may have fewer words than passages, passages not than one another.
    join("ten", "both").unwrap();
    let message = dir.message(open(&["both", "ten"]));
    assert_eq!(message, format!("ten: differs in --lexical-top-k: 10; that of both is 20{end}"));
    let (gpu, _) = Device::open("emulator").unwrap();
    let both = open(&["both"]).unwrap();
    let message = dir.message(search((gpu, DType::F32), (&both, &both), 2, &|_| {}, |_, _| Ok(())));
    assert_eq!(message, "both embeddings on a GPU: lexical ones are searched on the CPU; use --device cpu");
    // A damaged token.
    let path = dir.at("both/lexical-ids-00000.npy");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[128 + 2 * K..][..2].copy_from_slice(&[255, 255]);
    std::fs::write(&path, &bytes).unwrap();
    let message = dir.message(join("ten", "both"));
    assert!(message.starts_with(
        "both/lexical-ids-00000.npy: the embedding of d1 (row 1) holds token 65535 of a vocabulary of 30522; "
    ));
}

#[test]
fn the_commands_take_representations() {
    let dir = Dir::new();
    let (model, bare) = (dir.headed("model", 1), dir.model("bare", 1));
    let all: Vec<String> = texts(30).into_iter().filter(|text| !text.is_empty()).collect();
    dir.write("set/corpus.jsonl", jsonl(&all));
    let query = |i: usize| format!("{}\n", serde_json::json!({"_id": format!("q{i}"), "text": all[i]}));
    dir.write("set/queries.jsonl", (0..8).map(query).collect::<String>());
    let qrels: String = (0..8).map(|i| format!("q{i}\td{i}\t1\n")).collect();
    dir.write("set/qrels/test.tsv", format!("query-id\tcorpus-id\tscore\n{qrels}"));
    let (model, bare, at) = (model.to_str().unwrap(), bare.to_str().unwrap(), |name: &str| dir.arg(name));
    let both = ["--representation", "both", "--lexical-top-k", "30", "--device", "cpu", "-q"];
    for (kind, input) in [("query", "set/queries.jsonl"), ("passage", "set/corpus.jsonl")] {
        let encode =
            ["encode", "--model", model, "--kind", kind, "--input", &at(input), "--output", &at(kind), "--prefix", ""];
        assert!(ok(&[&encode[..], &both].concat()).contains("64 wide and 30 tokens each, written to "));
    }
    let search = [
        "search",
        "--queries",
        &at("query"),
        "--corpus",
        &at("passage"),
        "--output",
        &at("run"),
        "--top-k",
        "20",
        "-q",
    ];
    let error = fails(2, &[&search[..], &["--device", "emulator"]].concat());
    assert_eq!(error, "both embeddings on a GPU: lexical ones are searched on the CPU; use --device cpu");
    ok(&search);
    ok(&["evaluate", "--run", &at("run"), "--qrels", &at("set/qrels/test.tsv"), "--json", &at("e.json")]);
    let beir =
        ["beir", "--data", &at("set"), "--query-prefix", "", "--top-k", "19", "--json", &at("b.json"), "--model"];
    ok(&[&beir[..], &[model], &both].concat());
    let json =
        |name: &str| -> serde_json::Value { serde_json::from_slice(&std::fs::read(dir.at(name)).unwrap()).unwrap() };
    assert_eq!(
        (&json("b.json")["mrr@10"], &json("b.json")["representation"]),
        (&json("e.json")["mrr@10"], &"both".into())
    );
    let error = fails(1, &[&beir[..], &[bare], &both].concat());
    assert!(error.contains("bare/model.safetensors: holds no MLM head: "), "{error}");
}
