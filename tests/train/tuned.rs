//! `train --objective contrastive` and `cross-encoder` through the binary: pairs to exported model, judged, resumed, stopped early.

use std::path::Path;
use std::process::Stdio;

use retromae_engine::model::export::verify_export;
use retromae_engine::rng::{Site, Stream};
use serde_json::Value;

use crate::pair_world::{DEV, PairWorld};
use crate::world::stderr;

/// The lines of the metrics.
fn metrics(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Step, split, and the bits of all figures that do not depend on time.
fn bits(out: &Path) -> Vec<String> {
    let of = |line: &Value| {
        let figures =
            ["loss_bits", "grad_norm_bits", "mrr@10", "ndcg@10", "recall@100"].map(|key| line[key].to_string());
        format!("{} {} {}", line["step"], line["split"], figures.join(" "))
    };
    metrics(out).iter().map(of).collect()
}

/// A metric of the dev set at each evaluation.
fn judged(out: &Path, metric: &str) -> Vec<(u64, f64)> {
    let lines = metrics(out).into_iter().filter(|line| line["split"] == "eval");
    lines.filter_map(|line| Some((line["step"].as_u64()?, line[metric].as_f64()?))).collect()
}

fn model(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("model/model.safetensors")).unwrap()
}

#[test]
fn a_bi_encoder_learns_to_find_its_passages() {
    let world = PairWorld::new();
    let settings = ["--pooling", "mean", "--steps", "60", "--eval-every", "20"];
    let done = world.trained("contrastive", "run", &[&settings[..], &DEV].concat());
    for fact in [
        "objective  bi-encoder, mean pooling, temperature 1, queries of up to 32 tokens, passages of up to 64",
        "data       24 of 24 queries, 40 passages; 24 queries",
        "batch      6 queries with a passage each",
    ] {
        assert!(stderr(&done).contains(fact), "{fact}: {}", stderr(&done));
    }
    let found = judged(&world.path("run"), "mrr@10");
    assert_eq!(found.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [0, 20, 40, 60]);
    assert!(found[0].1 < 0.5 && found[3].1 > 0.8, "{found:?}");
    verify_export(world.path("run/model")).unwrap();
    let read = |name: &str| -> Value {
        serde_json::from_slice(&std::fs::read(world.path("run/model").join(name)).unwrap()).unwrap()
    };
    assert_eq!(read("1_Pooling/config.json")["pooling_mode_mean_tokens"], true);
    assert_eq!(read("config_sentence_transformers.json")["similarity_fn_name"], "dot");
    assert_eq!(read("modules.json").as_array().unwrap().len(), 2);
    // Going on from the export needs no word about pooling: the folder has it, and so is the figure.
    let on = world.trained("contrastive", "on", &[&["--model", "@run/model", "--steps", "1"][..], &DEV].concat());
    assert!(stderr(&on).contains("mean pooling, temperature 1"), "{}", stderr(&on));
    assert_eq!(judged(&world.path("on"), "mrr@10")[0].1, found[3].1);
}

/// What the dev set was judged by is what encode, search and evaluate find with the exported model.
#[test]
fn a_bi_encoder_learns_the_joined_score() {
    let world = PairWorld::new();
    let settings = ["--representation", "both", "--lexical-top-k", "9", "--temperature", "4", "--steps", "60"];
    let done = world.trained("contrastive", "run", &[&settings[..], &["--eval-every", "20"], &DEV].concat());
    let told = "bi-encoder, [CLS] pooling, and the 9 largest words of a text, temperature 4";
    assert!(stderr(&done).contains(told), "{}", stderr(&done));
    let found = judged(&world.path("run"), "mrr@10");
    assert!(found[0].1 < 0.5 && found[3].1 > 0.8, "{found:?}");
    let model = world.path("run/model");
    verify_export(&model).unwrap();
    let config: Value = serde_json::from_slice(&std::fs::read(model.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["architectures"], serde_json::json!(["BertForMaskedLM"]));
    for (kind, input) in [("query", "queries"), ("passage", "passages")] {
        let (input, output) = (format!("@{input}"), format!("@{kind}.emb"));
        let words = ["encode", "--representation", "both", "--lexical-top-k", "9", "--kind", kind, "--device", "cpu"];
        world.command(&[&words[..], &["--model", "@run/model", "--input", &input, "--output", &output]].concat());
    }
    let folders = ["search", "--queries", "@query.emb", "--corpus", "@passage.emb", "--device", "cpu"];
    world.command(&[&folders[..], &["--top-k", "40", "--output", "@run.found"]].concat());
    let run = ["evaluate", "--run", "@run.found", "--qrels", "@qrels.tsv", "--metrics", "mrr@10"];
    world.command(&[&run[..], &["--rules", "msmarco", "--json", "@figures.json"]].concat());
    let figures: Value = serde_json::from_slice(&std::fs::read(world.path("figures.json")).unwrap()).unwrap();
    let text = figures.to_string();
    assert!(text.contains(&format!("{}", found[3].1)), "{found:?} is not among {text}");
}

#[test]
fn kills_change_no_bit_of_any_objective() {
    let world = PairWorld::new();
    let hard = ["--negatives", "@negatives.tsv", "--group-size", "3"];
    let kinds: [(&str, &str, Vec<&str>); 4] = [
        ("contrastive", "distilled", [&hard[..], &["--teacher-scores", "@scores.tsv", "--chunk", "5"], &DEV].concat()),
        ("contrastive", "untied", [&hard[..], &["--untied", "--projection", "16", "--eval-size", "4"]].concat()),
        ("contrastive", "joined", [&["--representation", "both", "--lexical-top-k", "9"][..], &DEV].concat()),
        ("cross-encoder", "cross", [&hard[..], &DEV, &["--dev-run", "@run.trec", "--max-length", "40"]].concat()),
    ];
    let mut random = Stream::new(31, 0, Site::Init, 0);
    for (objective, name, more) in kinds {
        let began = std::time::Instant::now();
        world.trained(objective, name, &more);
        let duration = began.elapsed();
        let whole = (bits(&world.path(name)), files(&world.path(name).join("model")));
        assert!(whole.0.len() >= 12 + 4, "{:?}", whole.0);
        verify_export(world.path(name).join("model")).unwrap();
        for round in 0..3 {
            let out = format!("{name}-{round}");
            let mut child =
                world.train(objective, &out, &more).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
            std::thread::sleep(duration.mul_f32(random.uniform()));
            child.kill().unwrap();
            child.wait().unwrap();
            world.trained(objective, &out, &more);
            assert_eq!((bits(&world.path(&out)), files(&world.path(&out).join("model"))), whole, "{name}");
        }
    }
}

/// Every file of weights below a folder.
fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            all.extend(files(&path));
        } else if path.extension().is_some_and(|e| e == "safetensors") {
            all.push((path.strip_prefix(folder).unwrap().display().to_string(), std::fs::read(&path).unwrap()));
        }
    }
    all.sort();
    all
}

#[test]
fn the_best_checkpoint_is_kept_exported_and_ends_the_run() {
    let world = PairWorld::new();
    // So high a rate destroys what the first steps learn.
    let more = ["--learning-rate", "0.3", "--warmup-steps", "0", "--steps", "400", "--patience", "2", "--keep", "1"];
    let done = world.trained("contrastive", "run", &[&more[..], &DEV, &["--json", "@facts.json"]].concat());
    assert!(stderr(&done).contains("2 evaluations in a row without a better one"), "{}", stderr(&done));
    let found = judged(&world.path("run"), "mrr@10");
    let best = found.iter().fold((0, -1.0), |best, &one| if one.1 > best.1 { one } else { best });
    let last = found.last().unwrap().0;
    assert_eq!(last, best.0 + 8, "{found:?}");
    assert!(last < 400);
    let facts: Value = serde_json::from_slice(&std::fs::read(world.path("facts.json")).unwrap()).unwrap();
    assert_eq!((facts["best_step"].as_u64(), facts["best_mrr@10"].as_f64()), (Some(best.0), Some(best.1)));
    let mut kept: Vec<String> = std::fs::read_dir(world.path("run/checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("step-"))
        .collect();
    kept.sort();
    assert_eq!(kept, [format!("step-{:08}", best.0), format!("step-{last:08}")]);
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(said.contains(&format!("(the best, of step {})", best.0)), "{said}");
    let exported = world.path("again");
    let mut export = std::process::Command::new(crate::world::BINARY);
    export.arg("export").arg("--run").arg(world.path("run")).arg("--output").arg(&exported);
    export.arg("--checkpoint").arg(world.path("run/checkpoints").join(&kept[0]));
    assert!(export.output().unwrap().status.success());
    assert_eq!(std::fs::read(exported.join("model.safetensors")).unwrap(), model(&world.path("run")));
    // The finished run stays finished.
    let again = world.trained("contrastive", "run", &[&more[..], &DEV].concat());
    assert_eq!(judged(&world.path("run"), "mrr@10"), found, "{}", stderr(&again));
}

#[test]
fn a_cross_encoder_learns_to_rerank() {
    let world = PairWorld::new();
    let more = ["--negatives", "@negatives.tsv", "--group-size", "4", "--steps", "240", "--eval-every", "120"];
    let more = [&more[..], &["--learning-rate", "1e-3", "--batch-size", "12"]].concat();
    let dev = [&DEV[..], &["--dev-run", "@run.trec"]].concat();
    world.trained("cross-encoder", "run", &[&more[..], &dev].concat());
    // The positive is last of five in the run that is reranked.
    let found = judged(&world.path("run"), "mrr@10");
    assert!(found[0].1 < 0.7 && found[2].1 > 0.9, "{found:?}");
    let config: Value = serde_json::from_slice(&std::fs::read(world.path("run/model/config.json")).unwrap()).unwrap();
    assert_eq!(config["architectures"][0], "BertForSequenceClassification");
    world.trained("cross-encoder", "on", &[&["--model", "@run/model", "--steps", "1"][..], &dev].concat());
    assert_eq!(judged(&world.path("on"), "mrr@10")[0].1, found[2].1);
}

#[test]
fn rows_bring_their_own_texts_in_each_form() {
    let world = PairWorld::new();
    let lines = |name: &str| -> Vec<(String, String)> {
        let text = std::fs::read_to_string(world.path(name)).unwrap();
        text.lines().map(|l| l.split_once('\t').map(|(a, b)| (a.into(), b.into())).unwrap()).collect()
    };
    let (queries, passages) = (lines("queries.tsv"), lines("passages.tsv"));
    let write = |name: &str, row: &dyn Fn(usize) -> Value| {
        let rows: String = (0..24).map(|i| format!("{}\n", row(i))).collect();
        std::fs::write(world.path(name), rows).unwrap();
    };
    let text = |i: usize| passages[i % 40].1.clone();
    write("flag.jsonl", &|i| {
        serde_json::json!({"query": queries[i].1, "pos": [text(i)], "neg": [text(i + 5), text(i + 7)],
                           "pos_scores": [2.0], "neg_scores": [0.5, -1.0]})
    });
    write(
        "tuples.jsonl",
        &|i| serde_json::json!({"anchor": queries[i].1, "positive": text(i), "negative": text(i + 5)}),
    );
    write("tevatron.jsonl", &|i| {
        let passage = |n: usize| serde_json::json!({"docid": format!("p{}", n % 40), "title": "", "text": text(n)});
        serde_json::json!({"query_id": queries[i].0, "query": queries[i].1, "positive_passages": [passage(i)],
                           "negative_passages": [passage(i + 5), passage(i + 7)]})
    });
    write("ids.jsonl", &|i| {
        serde_json::json!({"query_id": queries[i].0, "query_text": queries[i].1,
                           "positive_document_ids": [format!("p{i}")], "negative_document_ids": ["p30", "p31"]})
    });
    let rows = |name: &'static str| vec!["--tokenizer", "@tokenizer", "--group-size", "3", "--data", name];
    for (out, name, more) in [
        ("flag", "@flag.jsonl", &["--distill-loss", "margin-mse"][..]),
        ("tuples", "@tuples.jsonl", &[]),
        ("tevatron", "@tevatron.jsonl", &[]),
        ("ids", "@ids.jsonl", &["--corpus", "@passages"]),
    ] {
        let done = world.trained("contrastive", out, &[&rows(name)[..], more].concat());
        assert!(stderr(&done).contains("24 of 24 queries"), "{}", stderr(&done));
    }
    let distilled = metrics(&world.path("flag"));
    assert!(distilled[1]["loss_distill"].as_f64().is_some_and(|loss| loss > 0.0), "{}", distilled[1]);
    world.trained("cross-encoder", "cross", &rows("@tevatron.jsonl"));
}

#[test]
fn the_published_spellings_work() {
    let world = PairWorld::new();
    let out = world.path("run").display().to_string();
    let mut command = std::process::Command::new(crate::world::BINARY);
    command.args(["train", "--objective", "contrastive", "--device", "cpu", "--threads", "1", "--output_dir", &out]);
    command.arg("--config-file").arg(world.path("config.json")).arg("--corpus_file").arg(world.path("passages"));
    command.arg("--train_query_file").arg(world.path("queries")).arg("--train_qrels").arg(world.path("qrels.tsv"));
    command
        .arg("--neg_file")
        .arg(world.path("negatives.tsv"))
        .arg("--teacher_score_files")
        .arg(world.path("scores.tsv"));
    command.args(["--query_max_len", "16", "--passage_max_len", "24", "--train_group_size", "3"]);
    command.args(["--sample_neg_from_topk", "4", "--max_steps", "2", "--per_device_train_batch_size", "4"]);
    command.args(["--sentence_pooling_method", "cls", "--normlized", "True", "--temperature", "0.02"]);
    command.args(["--contrastive_loss_weight", "0.2", "--untie_encoder", "False", "--fp16"]);
    let done = command.output().unwrap();
    assert!(done.status.success(), "{}", stderr(&done));
    let fact = "[CLS] pooling, normalised, temperature 0.02, queries of up to 16 tokens, passages of up to 24; \
                Kullback-Leibler to the teacher's scores, contrastive loss × 0.2";
    assert!(stderr(&done).contains(fact), "{}", stderr(&done));
}
