//! The page of a run: what must be on it, and what must not.

use std::collections::HashSet;

use serde_json::Value;

use crate::support::{folder, metrics, page, parsed, resumed, written};
use crate::world::World;

/// Elements of this name.
fn all<'a>(document: &'a roxmltree::Document<'a>, name: &str) -> Vec<roxmltree::Node<'a, 'a>> {
    document.descendants().filter(|node| node.tag_name().name() == name).collect()
}

/// All text of a page.
fn text(document: &roxmltree::Document<'_>) -> String {
    document.descendants().filter_map(|node| node.text().filter(|_| node.is_text())).collect::<Vec<_>>().join("\n")
}

/// What every page must be: accessible, alone, without scripts.
fn check(document: &roxmltree::Document<'_>) {
    let mut ids = HashSet::new();
    for node in document.descendants().filter_map(|node| node.attribute("id")) {
        assert!(ids.insert(node), "the id {node} occurs twice");
    }
    for svg in all(document, "svg") {
        if svg.attribute("aria-hidden").is_some() {
            continue;
        }
        assert_eq!(svg.attribute("role"), Some("img"));
        let labels: Vec<&str> = svg.attribute("aria-labelledby").unwrap().split(' ').collect();
        assert_eq!(labels.len(), 2);
        assert!(labels.iter().all(|id| ids.contains(id)), "{labels:?}");
        for name in ["title", "desc"] {
            let told = svg.children().find(|node| node.tag_name().name() == name).and_then(|node| node.text());
            assert!(told.is_some_and(|text| !text.is_empty()), "a picture says what it shows");
        }
        for path in svg.descendants().filter_map(|node| node.attribute("d")) {
            assert!(!path.contains("NaN") && !path.contains("inf"), "{path}");
        }
    }
    assert!(all(document, "script").is_empty());
    for node in document.descendants() {
        for attribute in node.attributes() {
            assert!(!attribute.name().starts_with("on"), "{}", attribute.name());
            let link = matches!(attribute.name(), "href" | "src");
            assert!(!link || attribute.value().starts_with('#'), "{}", attribute.value());
        }
    }
    assert!(!all(document, "style")[0].text().unwrap().contains("url("));
}

#[test]
fn a_real_run_is_on_its_page() {
    let world = World::new();
    let run = resumed(&world, "first", &[]);
    let html = page(&[&run], &[]);
    let document = parsed(&html);
    check(&document);
    assert!(html.len() < 200_000, "{} bytes", html.len());
    let told = text(&document);
    let lines = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let newest = |split: &str, key: &str| {
        let line = lines.iter().rev().find(|line| line["split"] == split).unwrap();
        format!("{:.4}", line[key].as_f64().unwrap())
    };
    for figure in [
        newest("train", "loss_enc"),
        newest("eval", "loss_enc"),
        newest("eval", "loss_dec"),
        newest("train", "acc_dec"),
    ] {
        assert!(told.contains(&figure), "{figure}");
    }
    for fact in [
        "finished",
        "Loss: encoder",
        "Loss: decoder",
        "Accuracy: decoder",
        "Learning rate",
        "Gradient norm before clipping",
        "Tokens per second",
        "learning-rate",
        "step-00000016",
        "BERT from scratch, 1 layers of width 64",
        "resumed from step 8",
        "fp32",
        "computed by",
        &retromae_engine::device::Device::Cpu.name(),
    ] {
        assert!(told.contains(fact), "{fact}: {told}");
    }
    assert_eq!(
        html.matches("class=\"resumed\"").count(),
        html.matches("<svg xmlns").count() - 1,
        "in all charts, and not in the masks"
    );
}

/// The masks are those of the run: a text drawn as `inspect` shows it, with as many tokens to predict as the rule says.
#[test]
fn the_masks_of_a_text_are_drawn_from_the_shards_of_the_run() {
    let world = World::new();
    let run = resumed(&world, "first", &["--encoder-mask-probability", "0.4"]);
    let html = page(&[&run], &[]);
    let document = parsed(&html);
    let tokens = all(&document, "p").into_iter().find(|node| node.attribute("class") == Some("tokens")).unwrap();
    let words: String = tokens.descendants().filter_map(|node| node.text().filter(|_| node.is_text())).collect();
    let words: Vec<&str> = words.split(' ').collect();
    assert_eq!((words[0], words[words.len() - 1]), ("[CLS]", "[SEP]"));
    let texts = std::fs::read_to_string(world.path("texts.txt")).unwrap();
    let bare = words[1..words.len() - 1].join(" ");
    assert!(texts.lines().any(|line| line == bare), "{bare}");
    let marked = tokens.children().filter(|node| node.tag_name().name() == "mark").count();
    assert_eq!(marked, (words.len() as f64 * 0.4).round_ties_even() as usize);
    let hidden = all(&document, "path").into_iter().find(|node| node.attribute("class") == Some("hidden")).unwrap();
    assert!(
        hidden.attribute("d").unwrap().matches('M').count() > words.len(),
        "every position of the decoder sees less than all"
    );

    std::fs::rename(world.path("shards"), world.path("elsewhere")).unwrap();
    let gone = page(&[&run], &[]);
    assert!(gone.contains("not drawn, the shards") && !gone.contains("class=\"tokens\""));
}

#[test]
fn several_runs_lie_over_each_other() {
    let world = World::new();
    let first = resumed(&world, "first", &[]);
    let second = resumed(&world, "second", &["--weight-decay", "0.05", "--objective", "mlm"]);
    let html = page(&[&first, &second], &[]);
    let document = parsed(&html);
    check(&document);
    let different = html.find("<h3>Different</h3>").unwrap();
    let equal = html.find("equal settings").unwrap();
    let of = |key: &str| html.find(&format!("<th scope=\"row\">{key}</th>")).unwrap();
    assert!(different < of("weight-decay") && of("weight-decay") < equal && equal < of("seed"));
    let loss =
        all(&document, "svg").into_iter().find(|svg| svg.attribute("aria-labelledby") == Some("t0-t t0-d")).unwrap();
    let lines: Vec<_> =
        loss.children().filter(|node| node.attribute("class").is_some_and(|class| class.starts_with("l "))).collect();
    let looks: HashSet<_> =
        lines.iter().map(|node| (node.attribute("class"), node.attribute("stroke-dasharray"))).collect();
    assert_eq!((lines.len(), looks.len()), (4, 4), "each run, and what it holds out, has a look of its own");
    let again = page(&[&first, &first], &[]);
    assert!(
        again.contains(&format!("{}, held out", first.display())),
        "runs of one name are told apart by their paths"
    );
    check(&parsed(&again.replace('\u{fffd}', "")));
}

#[test]
fn what_files_say_is_text() {
    let dir = folder();
    let evil = "<script>alert(1)</script>";
    let run = dir.path().join("<b>&'\"bold");
    let mut lines = metrics(3, |step| 3.0 / step as f64);
    lines += &serde_json::json!({
        "ts": 0.0, "step": 4, "split": "train", "loss": null, format!("loss_{evil}"): 1.0, "skipped": true, "ranks": [1, 3],
        "texts": [evil, "]]>", "\u{0}\u{202e}", "a", "b", "c", "d", "e", "f", "g"],
    })
    .to_string();
    lines.push('\n');
    lines += &serde_json::json!({ "step": 4, "split": "eval", "loss": 2.0, "mrr@10</svg><script>": 0.5 }).to_string();
    lines.push('\n');
    written(
        &run,
        &lines,
        "objective = '</style><script>alert(2)</script>'\nmodel = 'x' # no settings of this engine\n",
    );
    std::fs::create_dir_all(run.join("checkpoints/step-00000003")).unwrap();
    std::fs::write(run.join("checkpoints/step-00000003/manifest.json"), evil).unwrap();
    let html = page(&[&run], &[]);
    let document = parsed(&html);
    check(&document);
    let told = text(&document);
    for fact in [
        evil,
        "<b>&'\"bold",
        "]]>",
        "mrr@10</svg><script>",
        "</style><script>alert(2)</script>",
        "and 2 more",
        "1, 3",
        "not a manifest",
    ] {
        assert!(told.contains(fact), "{fact}");
    }
    assert!(!told.contains('\u{202e}'));
    assert!(html.contains("class=\"gone\""), "a loss that is not finite leaves a mark");
}

#[test]
fn long_runs_make_small_pages_that_keep_their_spikes() {
    let dir = folder();
    let runs: Vec<_> = (0..4).map(|i| dir.path().join(format!("run-{i}"))).collect();
    for (i, run) in runs.iter().enumerate() {
        let loss = |step: u64| if step == 12_345 { 77.5 } else { 5.0 + (step as f64 * 0.7 + i as f64).sin() };
        written(run, &metrics(30_000, loss), "objective = 'retromae'\nsteps = 60000\n");
    }
    let html = page(&runs.iter().map(|run| run.as_path()).collect::<Vec<_>>(), &[]);
    assert!(html.len() < 1_000_000, "{} bytes", html.len());
    let document = parsed(&html);
    check(&document);
    let loss =
        all(&document, "svg").into_iter().find(|svg| svg.attribute("aria-labelledby") == Some("t0-t t0-d")).unwrap();
    assert!(loss.children().any(|node| node.text().is_some_and(|text| text.contains("highest 77.50 at step 12345"))));
    let raw = loss.children().find(|node| node.attribute("class") == Some("raw c0")).unwrap().attribute("d").unwrap();
    let heights = raw.split(['M', 'L']).filter_map(|point| point.split(['h', ' ']).nth(1)?.parse::<f64>().ok());
    assert!(heights.fold(f64::MAX, f64::min) < 25.0, "the spike reaches the top of the chart");
    let told = text(&document);
    assert!(told.contains("30,000 of 60,000") && told.contains("not finished"), "{told}");
}

/// What `bench` writes with `--breakdown`.
#[test]
fn stages_of_a_measured_step_are_shown() {
    let dir = folder();
    let run = dir.path().join("run");
    written(&run, &metrics(3, |_| 1.0), "objective = 'mlm'\n");
    let file = dir.path().join("step.jsonl");
    let mut bench = std::process::Command::new(crate::world::BINARY);
    bench.args([
        "bench",
        "step",
        "--device",
        "cpu",
        "--model",
        "mini",
        "--workload",
        "passages",
        "--objective",
        "mlm",
        "--steps",
        "1",
    ]);
    bench.args(["--warmup", "1", "--breakdown", "--json"]).arg(&file);
    let done = bench.output().unwrap();
    assert!(done.status.success(), "{}", crate::world::stderr(&done));
    let html = page(&[&run], &["--breakdown", file.to_str().unwrap()]);
    let document = parsed(&html);
    check(&document);
    let line: Value = serde_json::from_str(std::fs::read_to_string(&file).unwrap().trim()).unwrap();
    let stages = line["breakdown"]["stages"].as_array().unwrap();
    assert!(stages.len() > 3);
    for stage in stages {
        assert!(text(&document).contains(stage["stage"].as_str().unwrap()), "{stage}");
    }
    assert_eq!(html.matches("class=\"bar\"").count(), stages.len());
}
