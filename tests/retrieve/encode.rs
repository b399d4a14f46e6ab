//! Texts to embeddings: what a row is, and what it does not depend on.

use std::path::Path;

use retromae_engine::data::shard::{Packing, TitleSep};
use retromae_engine::data::tokenize;
use retromae_engine::data::tokenizer::Tokenizer;
use retromae_engine::device::{DType, Device};
use retromae_engine::files::Disk;
use retromae_engine::retrieve::embedder::Kind;
use retromae_engine::retrieve::embeddings::{Embeddings, Layout, Meta};
use retromae_engine::retrieve::encode;
use retromae_engine::retrieve::model::{Model, Overrides, Texts};
use retromae_engine::retrieve::npy::Stored;
use retromae_engine::retrieve::representation::Embedded;

use crate::support::{CPU, Dir, WIDTH, content, encode_on, jsonl, open, passages, reading, texts};

/// All rows of a folder.
pub fn rows(dir: &Path) -> Vec<Vec<f32>> {
    let folder = Embeddings::open(dir).unwrap();
    let mut all = Vec::new();
    folder
        .each_block(|first, block: &Embedded| {
            assert_eq!(first as usize, all.len());
            all.extend(block.dense.chunks(folder.meta().spec.dim).map(<[f32]>::to_vec));
            Ok(())
        })
        .unwrap();
    all
}

#[test]
fn a_row_does_not_depend_on_its_neighbours_nor_on_how_they_are_cut_up() {
    let dir = Dir::new();
    let model = open(&dir.model("model", 1));
    let texts = texts(70);
    let input = dir.write("all.jsonl", jsonl(&texts));
    encode_on(&Disk::default(), &model, &input, &dir.at("all"), &passages(1000)).unwrap();
    let all = rows(&dir.at("all"));
    assert_eq!((all.len(), all[0].len()), (70, WIDTH));
    assert!(all.iter().all(|row| (row.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-5));
    // Alone, in threes, in files of seven rows, in larger batches.
    for i in [0, 3, 5, 69] {
        let one = dir.write("one.jsonl", jsonl(&texts[i..=i]));
        encode_on(&Disk::default(), &model, &one, &dir.at(&format!("one{i}")), &passages(1)).unwrap();
        assert!(rows(&dir.at(&format!("one{i}")))[0] == all[i], "text {i} alone");
    }
    encode_on(&Disk::default(), &model, &input, &dir.at("sevens"), &passages(7)).unwrap();
    assert!(rows(&dir.at("sevens")) == all, "files of seven");
    let large = Model::open("small", &dir.at("model"), &Overrides::default()).unwrap();
    encode_on(&Disk::default(), &large, &input, &dir.at("large"), &passages(1000)).unwrap();
    assert!(rows(&dir.at("large")) == all, "one batch");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| encode_on(&Disk::default(), &large, &input, &dir.at("thread"), &passages(1000))).unwrap();
    assert_eq!(content(&dir.at("thread")), content(&dir.at("large")));
}

#[test]
fn shards_and_raw_text_give_the_same_rows() {
    let dir = Dir::new();
    let model = open(&dir.model("model", 1));
    let texts: Vec<String> = texts(40).into_iter().filter(|text| !text.is_empty()).collect();
    let input = dir.write("all.jsonl", jsonl(&texts));
    encode_on(&Disk::default(), &model, &input, &dir.at("raw"), &passages(1000)).unwrap();
    let tokenizer = Tokenizer::load(&dir.at("model")).unwrap();
    let options = tokenize::Options {
        packing: Packing::Docs,
        max_length: 60,
        title_sep: TitleSep::Space,
        shard_tokens: 300,
        threads: 2,
        format: None,
        blank_lines: false,
        keep_duplicates: false,
    };
    let inputs = retromae_engine::data::source::expand(&[input.to_str().unwrap().into()]).unwrap();
    std::fs::create_dir(dir.at("shards")).unwrap();
    tokenize::run(&inputs, &tokenizer, &options, &dir.at("shards"), &|_| {}).unwrap();
    let job = model.job(CPU, &passages(1000)).unwrap();
    let source = model.shards(&job, &[dir.at("shards")]).unwrap();
    let mut embedder = model.embedder(CPU, Kind::Passage, &job).unwrap();
    encode::run(&Disk::default(), source, &mut embedder, &job, &dir.at("from"), &|_| {}).unwrap();
    assert!(rows(&dir.at("from")) == rows(&dir.at("raw")));
    assert_eq!(std::fs::read(dir.at("from/ids.txt")).unwrap(), std::fs::read(dir.at("raw/ids.txt")).unwrap());
    // Shards that another tokenizer made.
    let vocabulary = std::fs::read_to_string(dir.at("model/vocab.txt")).unwrap().replacen("[unused0]", "other", 1);
    let other = dir.write("other/vocab.txt", vocabulary);
    let other =
        Model::open("small", &dir.at("model"), &Overrides { tokenizer: Some(other), ..Overrides::default() }).unwrap();
    let message = dir.message(other.shards(&job, &[dir.at("shards")]).map(drop));
    assert!(message.contains("was tokenized with another tokenizer than the model"), "{message}");
}

#[test]
fn prompts_lengths_and_titles_are_those_of_the_model() {
    let dir = Dir::new();
    let model = open(&dir.model("model", 1));
    let input = dir.write("q.jsonl", "{\"_id\": \"a\", \"text\": \"heat flow\"}\n");
    encode_on(&Disk::default(), &model, &input, &dir.at("q"), &Texts::new(Kind::Query)).unwrap();
    let with = dir.write("w.jsonl", "{\"_id\": \"a\", \"text\": \"find this: heat flow\"}\n");
    encode_on(&Disk::default(), &model, &with, &dir.at("w"), &Texts::new(Kind::Passage)).unwrap();
    let titled = dir.write("t.tsv", "a\tfind this:\theat flow\n");
    encode_on(&Disk::default(), &model, &titled, &dir.at("t"), &Texts::new(Kind::Passage)).unwrap();
    assert!(rows(&dir.at("q")) == rows(&dir.at("w")) && rows(&dir.at("q")) == rows(&dir.at("t")));
    let meta = Meta::read(&dir.at("q")).unwrap();
    assert_eq!((meta.spec.prefix.as_str(), meta.spec.max_len, meta.spec.side.as_str()), ("find this: ", 48, "query"));
    let bare = Texts { prefix: Some(String::new()), ..Texts::new(Kind::Query) };
    encode_on(&Disk::default(), &model, &input, &dir.at("bare"), &bare).unwrap();
    assert!(rows(&dir.at("q")) != rows(&dir.at("bare")));
}

#[test]
fn two_encoders_have_a_side_each() {
    let dir = Dir::new();
    let path = dir.untied("model");
    let model = open(&path);
    let input = dir.write("q.jsonl", jsonl(&texts(3)));
    let kinds = [Kind::Query, Kind::Passage];
    for kind in kinds {
        let texts = Texts { prefix: Some(String::new()), ..Texts::new(kind) };
        encode_on(&Disk::default(), &model, &input, &dir.at(kind.name()), &texts).unwrap();
        let alone = open(&path.join(["query_model", "passage_model"][kind.side()]));
        encode_on(&Disk::default(), &alone, &input, &dir.at(&format!("{}-alone", kind.name())), &texts).unwrap();
        assert!(rows(&dir.at(kind.name())) == rows(&dir.at(&format!("{}-alone", kind.name()))));
    }
    assert!(rows(&dir.at("query")) != rows(&dir.at("passage")));
    let metas = kinds.map(|kind| Meta::read(&dir.at(kind.name())).unwrap());
    assert_eq!(metas[0].spec.difference(&metas[1].spec), None);
}

#[test]
fn layouts_hold_the_same_rows() {
    let dir = Dir::new();
    let model = open(&dir.model("model", 1));
    let input = dir.write("all.jsonl", jsonl(&texts(20)));
    encode_on(&Disk::default(), &model, &input, &dir.at("npy"), &passages(6)).unwrap();
    let expected = rows(&dir.at("npy"));
    for (name, layout, files) in [
        ("faiss", Layout::FaissFlat, vec!["ids.txt", "index.faiss", "meta.json"]),
        (
            "retromae",
            Layout::Retromae,
            vec!["ids.txt", "meta.json", "passage_reps/offset2passageid.txt", "passage_reps/passage.npy"],
        ),
    ] {
        let texts = Texts { layout, ..passages(6) };
        encode_on(&Disk::default(), &model, &input, &dir.at(name), &texts).unwrap();
        assert!(rows(&dir.at(name)) == expected, "{name}");
        let found: Vec<String> =
            content(&dir.at(name)).iter().map(|(file, _)| file.to_str().unwrap().to_string()).collect();
        assert_eq!(found, files);
    }
    let offsets = std::fs::read_to_string(dir.at("retromae/passage_reps/offset2passageid.txt")).unwrap();
    assert!(offsets.starts_with("0\td0\n1\td1\n") && offsets.ends_with("19\td19\n"));
    let half = Texts { stored: Stored::F16, ..passages(6) };
    encode_on(&Disk::default(), &model, &input, &dir.at("half"), &half).unwrap();
    let far = rows(&dir.at("half")).iter().flatten().zip(expected.iter().flatten()).any(|(a, b)| (a - b).abs() > 5e-4);
    assert!(!far);
}

#[test]
fn a_repeated_id_is_left_out_and_a_missing_one_is_the_number() {
    let dir = Dir::new();
    let model = open(&dir.model("model", 1));
    let input = dir.write(
        "a.jsonl",
        "{\"_id\":\"x\",\"text\":\"a\"}\n{\"text\":\"b\"}\n{\"_id\":\"x\",\"text\":\"c\"}\n{\"text\":\"\"}\n",
    );
    let done = encode_on(&Disk::default(), &model, &input, &dir.at("out"), &passages(10)).unwrap();
    assert_eq!(std::fs::read_to_string(dir.at("out/ids.txt")).unwrap(), "x\n1\n2\n");
    assert_eq!((done.rows, done.counts.duplicates, done.counts.empty), (3, 1, 1));
}

#[test]
fn the_emulated_gpu_gives_the_rows_of_the_cpu() {
    let dir = Dir::new();
    let model = open(&dir.model("model", 1));
    let input = dir.write("all.jsonl", jsonl(&texts(30)));
    encode_on(&Disk::default(), &model, &input, &dir.at("cpu"), &passages(100)).unwrap();
    let expected = rows(&dir.at("cpu"));
    let (gpu, _) = Device::open("emulator").unwrap();
    // Several batches of equal work: queued, recorded, replayed.
    for (name, storage, tolerance) in [("f32", DType::F32, 1e-5), ("bf16", DType::BF16, 3e-2)] {
        let job = model.job((gpu, storage), &passages(100)).unwrap();
        let inputs = retromae_engine::data::source::expand(&[input.to_str().unwrap().into()]).unwrap();
        let source = model.documents(&job, inputs, reading()).unwrap();
        let mut embedder = model.embedder((gpu, storage), Kind::Passage, &job).unwrap();
        encode::run(&Disk::default(), source, &mut embedder, &job, &dir.at(name), &|_| {}).unwrap();
        for (i, (row, expected)) in rows(&dir.at(name)).iter().zip(&expected).enumerate() {
            let error = row.iter().zip(expected).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
            assert!(error <= tolerance, "{name}, text {i}: {error}");
        }
    }
}
