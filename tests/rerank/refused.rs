//! What `rerank` refuses: one line each, and nothing left behind.

use retromae_engine::model::element::Dtype;
use retromae_engine::model::safetensors::SafeTensors;
use retromae_engine::model::safetensors::writer::{Spec, Writer};
use retromae_engine::model::tensor_file::{Info, TensorFile};

use crate::world::{World, golden, stderr};

/// The command fails with this code, one line that holds `expected`, and no file.
fn refused(world: &World, more: &[&str], code: i32, expected: &str) {
    let done = world.rerank("refused", more).output().unwrap();
    let text = stderr(&done);
    assert_eq!(done.status.code(), Some(code), "{text}");
    assert!(text.starts_with("error: ") && text.lines().count() == 1 && text.contains(expected), "{text}");
    assert!(!world.path("refused").exists());
    assert_eq!(world.hidden(), Vec::<String>::new(), "{more:?}");
}

#[test]
fn runs() {
    let world = World::new();
    let write = |name: &str, text: &str| std::fs::write(world.path(name), text).unwrap();
    write("empty", "");
    refused(&world, &["--run", "empty"], 1, "empty: is empty; check the path");
    refused(&world, &["--run", "absent"], 1, "absent: cannot open");
    write("strange", "q0 Q0 p0 1 9 x\nq0 Q0 nowhere 2 8 x\nq1 Q0 p1 1 7 x\nq1 Q0 lost 2 6 x\n");
    let line = "strange: 2 passages of the run are not in passages (first: strange:2: nowhere); give the texts that";
    refused(&world, &["--run", "strange", "--corpus", "passages"], 1, line);
    write("stranger", "q0 Q0 p0 1 9 x\nq99 Q0 p0 1 8 x\n");
    let line = "stranger: 1 queries of the run are not in queries (first: stranger:2: q99)";
    refused(&world, &["--run", "stranger", "--queries", "queries"], 1, line);
    write("twice", "q0 Q0 p0 1 9 x\nq0 Q0 p0 2 8 x\n");
    refused(&world, &["--run", "twice"], 1, "twice:2: passage p0 is twice on the list of query q0");
    write("broken", "q0 Q0 p0 first 9 x\n");
    refused(&world, &["--run", "broken"], 1, "broken:1: the rank \"first\" is no whole number");
    refused(&world, &["--run", "run.trec", "--pairs", "run.trec"], 2, "cannot be used with");
    refused(&world, &["--top-k", "0"], 2, "invalid value '0'");
    refused(&world, &["--tag", "two words"], 2, "a word without blanks");
}

#[test]
fn outputs() {
    let world = World::new();
    std::fs::write(world.path("there"), "mine").unwrap();
    let done = world.rerank("there", &[]).output().unwrap();
    assert_eq!(done.status.code(), Some(1));
    assert!(stderr(&done).contains("there: exists already; choose another name or add --overwrite"));
    assert_eq!(std::fs::read_to_string(world.path("there")).unwrap(), "mine");
    refused(&world, &["--scores", "there"], 1, "there: exists already");
    let whole = world.reranked("there", &["--overwrite", "--top-k", "2"]);
    assert_eq!(whole.lines().count(), 24);
    assert_eq!(world.hidden(), Vec::<String>::new());
    let done = world.rerank("passages", &["--overwrite"]).output().unwrap();
    assert!(stderr(&done).contains("passages: is a folder; name a file"), "{}", stderr(&done));
    let done = world.rerank("there/inside", &[]).output().unwrap();
    assert_eq!((done.status.code(), stderr(&done).lines().count()), (Some(1), 1), "{}", stderr(&done));
    assert!(stderr(&done).contains("cannot create the folder: "), "{}", stderr(&done));
    let same = world.path("refused");
    refused(&world, &["--scores", same.to_str().unwrap()], 2, "is named twice, for the run and for the scores");
}

#[test]
fn lengths() {
    let world = World::new();
    refused(&world, &["--max-length", "52"], 2, "--max-length 52: the model has 51 positions; choose at most 51");
    refused(&world, &["--max-length", "5"], 2, "choose a length from 3");
    refused(&world, &["--max-length", "20", "--query-length", "19"], 2, "pairs of 20 tokens do not hold a query of 19");
}

#[test]
fn texts_of_another_tokenizer() {
    let world = World::new();
    std::fs::create_dir(world.path("elsewhere")).unwrap();
    let words = std::fs::read_to_string(world.path("model/vocab.txt")).unwrap();
    std::fs::write(world.path("elsewhere/vocab.txt"), words.replace("word5\n", "five\n")).unwrap();
    world.tokenize("passages", "other-passages", "elsewhere");
    world.tokenize("queries", "other-queries", "elsewhere");
    refused(&world, &["--corpus", "other-passages"], 1, "was tokenized with another tokenizer than");
    let line = "token 10 is \"five\" in the data and \"word5\" in the model; tokenize with --tokenizer";
    refused(&world, &["--corpus", "other-passages", "--queries", "other-queries"], 1, line);
    // Without a tokenizer beside the model at least the size of the vocabulary is known.
    std::fs::remove_file(world.path("model/vocab.txt")).unwrap();
    std::fs::write(world.path("elsewhere/vocab.txt"), words + "one\n").unwrap();
    world.tokenize("passages", "more-passages", "elsewhere");
    world.tokenize("queries", "more-queries", "elsewhere");
    let line = "the tokens are of a vocabulary of 1004, the model has 1003";
    refused(&world, &["--corpus", "more-passages", "--queries", "more-queries"], 1, line);
}

#[test]
fn models() {
    let world = World::new();
    refused(&world, &["--model", "./nowhere"], 1, "./nowhere: no such file or folder");
    let bi = golden("contrastive/model");
    refused(&world, &["--model", bi.to_str().unwrap()], 1, "is no cross-encoder: there is no classifier; give a model");

    // Three labels.
    let given = SafeTensors::open(world.path("model/model.safetensors")).unwrap();
    let wide = |name: &str, shape: Vec<usize>| match name {
        "classifier.weight" => vec![3, 64],
        "classifier.bias" => vec![3],
        _ => shape,
    };
    let names: Vec<String> = given.names().into_iter().map(String::from).collect();
    let spec = |name: &String| {
        let shape = wide(name, given.info(name).unwrap().shape);
        Spec { name: name.clone(), info: Info { dtype: Dtype::F32, shape } }
    };
    let mut writer = Writer::create(world.path("three.safetensors"), names.iter().map(spec).collect(), &[]).unwrap();
    for name in &names {
        let shape = given.info(name).unwrap().shape;
        let mut values = vec![0.0; shape.iter().product()];
        given.read_f32(name, &shape, &mut values).unwrap();
        let wanted = wide(name, shape).iter().product();
        values.resize(wanted, 0.5);
        writer.write_f32(name, &values).unwrap();
    }
    writer.finish().unwrap();
    std::fs::rename(world.path("three.safetensors"), world.path("model/model.safetensors")).unwrap();
    refused(&world, &[], 1, "the classifier has 3 labels where a reranker has one; use a cross-encoder");
}
