//! Metrics of runs: equal to trec_eval's and to MS MARCO's script, and what is refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use retromae_engine::data::pairs::runs::{Run, RunFormat, RunWriter};
use retromae_engine::data::source::Input;
use retromae_engine::eval::metrics::{EvalRules, Evaluation, IdenticalIds, Metric, Rules, evaluate};
use retromae_engine::eval::qrels::Qrels;

fn input(path: impl Into<PathBuf>) -> Input {
    Input { path: path.into(), bytes: None }
}

fn write(name: &str, text: impl AsRef<[u8]>) -> (tempfile::TempDir, Input) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    (dir, input(path))
}

fn metrics() -> Vec<Metric> {
    let cuts = [1, 3, 10, 100];
    let of_cut = |k| [Metric::Ndcg(k), Metric::Recall(k), Metric::Precision(k), Metric::Mrr(k)];
    cuts.into_iter().flat_map(of_cut).chain([Metric::Map]).collect()
}

type Values = BTreeMap<String, f64>;

#[derive(serde::Deserialize)]
struct Expected {
    trec: BTreeMap<String, Values>,
    msmarco: Values,
}

struct Case {
    run: Run,
    qrels: Qrels,
    expected: Expected,
}

fn cases() -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/metrics");
    let read = |i: usize| {
        let at = |name: &str| folder.join(format!("case{i}")).join(name);
        let expected = std::fs::read(at("expected.json")).unwrap();
        Case {
            run: Run::read(&input(at("run.txt")), None).unwrap(),
            qrels: Qrels::read(&input(at("qrels.txt")), None).unwrap().0,
            expected: serde_json::from_slice(&expected).unwrap(),
        }
    };
    (0..4).map(read).collect()
}

fn rules(rules: Rules) -> EvalRules {
    EvalRules { identical: IdenticalIds::Keep, ..EvalRules::new(rules) }
}

#[track_caller]
fn close(a: f64, b: f64, what: &str) {
    assert!((a - b).abs() <= 1e-9, "{what}: {a} and not {b}");
}

#[test]
fn trec_rules_give_trec_evals_figures_of_every_query() {
    let mut compared = 0;
    for (number, case) in cases().iter().enumerate() {
        let found = evaluate(&case.run, &case.qrels, &metrics(), &rules(Rules::Trec)).unwrap();
        let queries: Vec<&String> = found.per_query.iter().map(|(query, _)| query).collect();
        assert_eq!(queries, case.expected.trec.keys().collect::<Vec<_>>(), "case {number}");
        for (query, values) in &found.per_query {
            for (metric, value) in found.metrics.iter().zip(values) {
                let name = metric.to_string();
                close(*value, case.expected.trec[query][&name], &format!("case {number}, {query}, {name}"));
                compared += 1;
            }
        }
        for metric in metrics() {
            let all = case.expected.trec.values().map(|v| v[&metric.to_string()]);
            let mean = all.sum::<f64>() / case.expected.trec.len() as f64;
            close(found.mean(metric).unwrap(), mean, &metric.to_string());
        }
    }
    assert!(compared > 1500, "{compared}");
}

#[test]
fn complete_means_count_judged_queries_without_a_list_as_zero() {
    for case in cases() {
        let with = |complete| {
            evaluate(&case.run, &case.qrels, &metrics(), &EvalRules { complete, ..rules(Rules::Trec) }).unwrap()
        };
        let (found, complete) = (with(false), with(true));
        assert_eq!((complete.per_query.len(), complete.found), (complete.judged, found.per_query.len()));
        assert!(complete.judged > found.found);
        for (a, b) in found.means.iter().zip(&complete.means) {
            close(a * found.found as f64 / found.judged as f64, *b, "complete");
        }
    }
}

#[test]
fn msmarco_rules_take_the_ranks_and_all_judged_queries() {
    for case in cases() {
        let found = evaluate(&case.run, &case.qrels, &metrics(), &rules(Rules::Msmarco)).unwrap();
        for (name, value) in &case.expected.msmarco {
            close(found.mean(name.parse().unwrap()).unwrap(), *value, name);
        }
    }
}

fn small(run: &str, qrels: &str, rules: &EvalRules) -> retromae_engine::Result<Evaluation> {
    let (_a, run) = write("run", run);
    let (_b, qrels) = write("qrels", qrels);
    let (run, qrels) = (Run::read(&run, None).unwrap(), Qrels::read(&qrels, None).unwrap().0);
    evaluate(&run, &qrels, &[Metric::Ndcg(10), Metric::Mrr(10)], rules)
}

#[test]
fn the_two_rules_differ_where_ranks_and_scores_do() {
    let (run, qrels) = ("q Q0 a 1 1.0 t\nq Q0 b 2 1.0 t\n", "q 0 b 1\n");
    assert_eq!(small(run, qrels, &rules(Rules::Trec)).unwrap().means[1], 1.0);
    assert_eq!(small(run, qrels, &rules(Rules::Msmarco)).unwrap().means[1], 0.5);
}

#[test]
fn gains_are_linear() {
    let found = small("q Q0 a 1 2 t\nq Q0 b 2 1 t\n", "q 0 a 1\nq 0 b 3\n", &rules(Rules::Trec)).unwrap();
    let log3 = 3f64.log2();
    close(found.means[0], (1.0 + 3.0 / log3) / (3.0 + 1.0 / log3), "ndcg");
}

#[test]
fn passages_with_the_querys_id_are_ignored_unless_they_are_the_answer() {
    let run = "q Q0 q 1 2 t\nq Q0 b 2 1 t\n";
    let found = small(run, "q 0 b 1\n", &EvalRules::new(Rules::Trec)).unwrap();
    assert_eq!((found.means[1], found.ignored_identical), (1.0, true));
    let found = small(run, "q 0 b 1\nq 0 q 1\n", &EvalRules::new(Rules::Trec)).unwrap();
    assert_eq!((found.means[1], found.ignored_identical), (1.0, false));
    assert_eq!(small(run, "q 0 b 1\n", &rules(Rules::Trec)).unwrap().means[1], 0.5);
    let ignore = EvalRules { identical: IdenticalIds::Ignore, ..EvalRules::new(Rules::Trec) };
    assert_eq!(small(run, "q 0 q 1\n", &ignore).unwrap().means[1], 0.0);
}

#[test]
fn a_run_of_other_queries_is_refused() {
    let error = small("x Q0 a 1 1 t\n", "q 0 a 1\n", &rules(Rules::Trec)).unwrap_err().to_string();
    assert!(
        error.contains("none of the 1 queries of the run (as x) is among the 1 judged ones (as q); check"),
        "{error}"
    );
}

#[test]
fn judgements_that_contradict_each_other_are_refused_and_repeated_ones_are_not() {
    let (_dir, file) = write("qrels", "q 0 a 1\nq 0 a 1\nq 0 b 0\nq 0 a 2\nr 0 a -1\n");
    let error = Qrels::read(&file, None).unwrap_err().to_string();
    assert!(error.ends_with(":4: passage a of query q is judged 1 and 2; keep one of the judgements"), "{error}");
    let (_dir, file) = write("qrels", "q 0 a 1\nq 0 a 1\n");
    assert_eq!(Qrels::read(&file, None).unwrap().0.of("q").unwrap().len(), 1);
}

#[test]
fn metrics_have_names() {
    for metric in metrics() {
        assert_eq!(metric.to_string().parse::<Metric>().unwrap(), metric);
    }
    for wrong in ["ndcg", "ndcg@0", "map@10", "bleu@1", "mrr@x", ""] {
        assert!(wrong.parse::<Metric>().unwrap_err().to_string().contains("there is no metric"), "{wrong}");
    }
}

#[test]
fn a_written_run_keeps_its_order_under_trecs_rules() {
    // Scores that are equal, or equal once more after the first ones were lowered, around zero too; ids against the order of ties.
    let scores = [2.0f32, 2.0, 2.0, 2.0f32.next_down(), 1.0, 1.0, 0.0, 0.0, -0.0, -1e-45, -7.25];
    let ids: Vec<String> = (0..scores.len()).map(|i| format!("d{i:02}")).collect();
    let list = || ids.iter().map(String::as_str).zip(scores);
    let mut writer = RunWriter::new(Vec::new(), RunFormat::Trec, "tag");
    writer.query("q", list()).unwrap();
    assert_eq!(writer.nudged(), 7);
    let (_dir, file) = write("run", writer.into_inner());
    let run = Run::read(&file, None).unwrap();
    for (place, id) in ids.iter().enumerate() {
        let mut qrels = Qrels::default();
        qrels.insert("q", id, 1);
        let found = evaluate(&run, &qrels, &[Metric::Mrr(100)], &rules(Rules::Trec)).unwrap();
        close(found.means[0], 1.0 / (place as f64 + 1.0), id);
    }
    let not_finite = RunWriter::new(Vec::new(), RunFormat::Trec, "t").query("q", [("a", f32::NAN)]);
    assert!(not_finite.unwrap_err().to_string().contains("not finite"));
}
