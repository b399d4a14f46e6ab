//! What is refused, and how it is told.

use retromae_engine::device::{DType, Device};
use retromae_engine::files::Disk;
use retromae_engine::retrieve::embedder::Kind;
use retromae_engine::retrieve::embeddings::{Embeddings, Spec};
use retromae_engine::retrieve::model::{Model, Overrides, Texts};
use retromae_engine::retrieve::npy::Stored;
use retromae_engine::retrieve::search::{Rows, search};

use crate::support::{CPU, Dir, encode_on, folder, ids, open, passages, vectors};

#[test]
fn embeddings_that_do_not_belong_together_name_what_differs() {
    let dir = Dir::new();
    folder(&dir.at("c"), &ids("d", 4), 8, &vectors(1, 32), |_| {});
    let corpus = Rows::open(&[dir.at("c")]).unwrap();
    type Case = (&'static str, usize, fn(&mut Spec));
    let cases: [Case; 4] = [
        ("differs in the model: other (ffff); that of c is m (0123456789ab)", 8, |spec| {
            (spec.model, spec.model_sha256) = ("other".into(), "ffff".into());
        }),
        ("differs in the dimension: 16; that of c is 8", 16, |_| {}),
        ("differs in the pooling: mean; that of c is cls", 8, |spec| {
            spec.pooling = retromae_engine::ops::pool::Pooling::Mean
        }),
        ("differs in normalisation: on; that of c is off", 8, |spec| spec.normalized = true),
    ];
    for (i, (expected, width, change)) in cases.into_iter().enumerate() {
        let name = format!("q{i}");
        folder(&dir.at(&name), &ids("q", 2), width, &vectors(2, 2 * width), change);
        let queries = Rows::open(&[dir.at(&name)]).unwrap();
        let message = dir.message(search(CPU, (&queries, &corpus), 2, &|_| {}, |_, _| Ok(())));
        let expected = format!("{name}: {expected}; encode queries and passages with the same model and settings");
        assert_eq!(message, expected);
        assert!(dir.message(Rows::open(&[dir.at("c"), dir.at(&name)])).starts_with(&format!("{name}: differs in ")));
    }
}

#[test]
fn numbers_that_are_not_finite_are_refused_with_their_id() {
    let dir = Dir::new();
    for (name, bad) in [("nan", f32::NAN), ("inf", f32::INFINITY)] {
        let mut rows = vectors(1, 40 * 8);
        rows[31 * 8 + 3] = bad;
        folder(&dir.at(name), &ids("d", 40), 8, &rows, |_| {});
        let message = dir.message(Embeddings::open(&dir.at(name)).unwrap().verify());
        let expected = "embeddings-00001.npy: the embedding of d31 (row 11) holds a number that is not finite; ";
        assert!(message.starts_with(&format!("{name}/{expected}")), "{message}");
    }
    folder(&dir.at("huge"), &ids("d", 3), 8, &[3e38; 24], |_| {});
    let rows = Rows::open(&[dir.at("huge")]).unwrap();
    let message = dir.message(search(CPU, (&rows, &rows), 2, &|_| {}, |_, _| Ok(())));
    assert!(message.starts_with("inner products of query d0 are not finite; "), "{message}");
}

#[test]
fn numbers_too_large_for_a_search_in_f16_are_refused_with_file_and_row() {
    let dir = Dir::new();
    let (gpu, _) = Device::open("emulator").unwrap();
    let mut rows = vectors(1, 40 * 8);
    // The last that rounds to a number of f16 passes.
    (rows[5], rows[31 * 8 + 3]) = (65_519.0, -65_520.0);
    folder(&dir.at("c"), &ids("d", 40), 8, &rows, |_| {});
    folder(&dir.at("q"), &ids("q", 1), 8, &[1.0; 8], |_| {});
    let (queries, corpus) = (Rows::open(&[dir.at("q")]).unwrap(), Rows::open(&[dir.at("c")]).unwrap());
    let message = dir.message(search((gpu, DType::F16), (&queries, &corpus), 3, &|_| {}, |_, _| Ok(())));
    let expected =
        "c/embeddings-00001.npy: the embedding of d31 (row 11) holds -65520, too large for f16, which ends at 65504; ";
    assert_eq!(message, format!("{expected}use --precision fp32"));
    let message = dir.message(search((gpu, DType::F16), (&corpus, &queries), 3, &|_| {}, |_, _| Ok(())));
    assert!(message.starts_with(expected), "{message}");
    search((gpu, DType::F32), (&queries, &corpus), 3, &|_| {}, |_, _| Ok(())).unwrap();
}

#[test]
fn a_corpus_that_changed_since_it_was_encoded_is_noticed() {
    let dir = Dir::new();
    folder(&dir.at("c"), &ids("d", 40), 8, &vectors(1, 320), |_| {});
    let part = dir.at("c/embeddings-00001.npy");
    let good = std::fs::read(&part).unwrap();
    let check = || Embeddings::open(&dir.at("c")).and_then(|folder| folder.verify());
    assert_eq!(check().unwrap().files, 4);
    for at in [9, 130, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        std::fs::write(&part, &bad).unwrap();
        let message = dir.message(check());
        assert!(message.starts_with("c/embeddings-00001.npy: does not match its digest in meta.json"), "{message}");
    }
    std::fs::write(&part, &good[..good.len() - 1]).unwrap();
    assert!(dir.message(check()).starts_with("c/embeddings-00001.npy: has 767 bytes where meta.json says 768; "));
    std::fs::remove_file(&part).unwrap();
    assert!(dir.message(check()).starts_with("c/embeddings-00001.npy: cannot open"));
    std::fs::write(&part, &good).unwrap();
    for (name, expected) in
        [("ids.txt", "does not match its digest in meta.json"), ("meta.json", "does not match its digest")]
    {
        let path = dir.at("c").join(name);
        let whole = std::fs::read(&path).unwrap();
        let mut bad = whole.clone();
        bad[40] ^= 1;
        std::fs::write(&path, bad).unwrap();
        assert!(dir.message(check()).starts_with(&format!("c/{name}: {expected}")), "{}", dir.message(check()));
        std::fs::write(&path, whole).unwrap();
    }
    std::fs::write(dir.at("c/meta.json"), "{}").unwrap();
    assert!(dir.message(check()).contains("is not a description of embeddings by this program"));
    std::fs::create_dir(dir.at("empty")).unwrap();
    let message = dir.message(Embeddings::open(&dir.at("empty")));
    assert_eq!(message, "empty: holds no embeddings: there is no meta.json; give a folder that encode wrote");
}

#[test]
fn what_cannot_be_encoded_is_one_line() {
    let dir = Dir::new();
    let model = open(&dir.model("model", 1));
    let encode = |name: &str, text: &str, texts: &Texts| {
        let input = dir.write(name, text);
        dir.message(encode_on(&Disk::default(), &model, &input, &dir.at("out"), texts))
    };
    let message = encode("a.jsonl", "{\"_id\":\"a b\",\"text\":\"x\"}\n", &passages(4));
    assert_eq!(message, "a.jsonl: the id \"a b\" holds white space, which no list can name; rename the document");
    let three = "{\"_id\":\"a\",\"text\":\"x\"}\n[]\nnonsense\n{\"_id\":\"b\"}\n{\"_id\":\"c\",\"text\":\"x\"}\n{}\n";
    let message = encode("b.jsonl", three, &passages(4));
    assert!(message.starts_with("b.jsonl:2: ") && message.contains("4 errors in all"), "{message}");
    assert!(encode("c.jsonl", "", &passages(4)).contains("no documents: the input is empty"));
    let message = encode("d.jsonl", "{\"text\":\"x\"}\n", &Texts { max_length: Some(65), ..passages(4) });
    assert_eq!(message, "texts of 65 tokens; the model takes 64; choose --max-length 64 or less");
    let long = Texts { max_length: Some(5), ..Texts::new(Kind::Query) };
    assert!(
        encode("d.jsonl", "{\"text\":\"x\"}\n", &long)
            .contains("leave no room beside [CLS], [SEP] and 3 of the prefix")
    );
    dir.write("mine/notes.txt", "x");
    let message = dir.message(encode_on(&Disk::default(), &model, &dir.at("d.jsonl"), &dir.at("mine"), &passages(4)));
    assert!(message.starts_with("mine: is not used: it holds files and no meta.json of this program; "), "{message}");
    let message =
        dir.message(encode_on(&Disk::default(), &model, &dir.at("d.jsonl"), &dir.at("d.jsonl"), &passages(4)));
    assert!(message.starts_with("d.jsonl: exists and is not a folder; "), "{message}");
    std::fs::remove_dir_all(dir.at("out")).unwrap();
    encode_on(&Disk::default(), &model, &dir.at("d.jsonl"), &dir.at("out"), &passages(4)).unwrap();
}

#[test]
fn numbers_too_large_for_f16_and_models_without_tokenizer_are_told() {
    let dir = Dir::new();
    let path = dir.model("model", 1);
    for file in ["tokenizer.json", "vocab.txt"] {
        std::fs::remove_file(path.join(file)).unwrap();
    }
    let model = Model::open("small", &path, &Overrides::default()).unwrap();
    let message = dir.message(model.job(CPU, &passages(4)).map(drop));
    assert_eq!(message, "model: holds no tokenizer; name one with --tokenizer");
    assert_eq!(Stored::F16.encode(&[1e6], &mut Vec::new()), Err(0));
}
