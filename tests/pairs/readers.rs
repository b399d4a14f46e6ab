//! Files that name texts by id: every format says what it should.

use retromae_engine::data::pairs::negatives::{self, NegativesFormat, SystemRules};
use retromae_engine::data::pairs::qrels::{self, QrelsFormat};
use retromae_engine::data::pairs::teacher;
use retromae_engine::data::source::Input;

use super::support::*;

type Judged = (String, String, i32, u64);

fn judgements(input: &Input, format: Option<QrelsFormat>) -> (QrelsFormat, Vec<Judged>) {
    let mut all = Vec::new();
    let format = qrels::read(input, format, |j| {
        all.push((j.query.into(), j.passage.into(), j.grade, j.line));
        Ok(())
    });
    (format.unwrap_or_else(|e| panic!("{e}")), all)
}

/// The file as it is, with Windows' line ends, compressed with gzip and with zstd, after a byte order mark: all say the same.
fn variants(dir: &Dir, text: &str) -> Vec<Input> {
    vec![
        dir.write("plain", text),
        dir.write("crlf", text.replace('\n', "\r\n")),
        dir.write("cut", text.trim_end()),
        dir.write("packed.gz", gz(text.as_bytes())),
        dir.write("packed.zst", zstd::encode_all(text.as_bytes(), 1).unwrap()),
        dir.write("mark", [b"\xEF\xBB\xBF", text.as_bytes()].concat()),
    ]
}

#[track_caller]
fn check_qrels(text: &str, format: QrelsFormat, expected: &[(&str, &str, i32, u64)]) {
    let dir = Dir::new();
    let expected: Vec<Judged> = expected.iter().map(|&(q, p, g, l)| (q.into(), p.into(), g, l)).collect();
    for input in variants(&dir, text) {
        assert_eq!(judgements(&input, None), (format, expected.clone()), "{}", input.path.display());
        assert_eq!(judgements(&input, Some(format)).1, expected);
    }
}

#[test]
fn judgements_of_trec_and_msmarco() {
    check_qrels(
        "q1 0 d1 2\nq1 0 d2 0\n\nq2\t0\td1\t1\nq3  0   d-é  -1\n",
        QrelsFormat::Trec,
        &[("q1", "d1", 2, 1), ("q1", "d2", 0, 2), ("q2", "d1", 1, 4), ("q3", "d-é", -1, 5)],
    );
    check_qrels("1185869\t0\t0\t1\n", QrelsFormat::Trec, &[("1185869", "0", 1, 1)]);
}

#[test]
fn judgements_of_beir_have_a_header() {
    let text = "query-id\tcorpus-id\tscore\nPLAIN-2\tMED-2427\t2\nPLAIN-2\tMED-10\t0\n";
    check_qrels(text, QrelsFormat::Beir, &[("PLAIN-2", "MED-2427", 2, 2), ("PLAIN-2", "MED-10", 0, 3)]);
    check_qrels("query-id\tcorpus-id\tscore\n", QrelsFormat::Beir, &[]);
    // Without a header only where the user says what it is.
    let dir = Dir::new();
    let input = dir.write("q", "a\tb\t1\n");
    assert_eq!(judgements(&input, Some(QrelsFormat::Beir)).1, [("a".into(), "b".into(), 1, 1)]);
}

#[test]
fn judgements_of_retromae_are_lists() {
    let expected = [("q1", "p1", 1, 1), ("q2", "p1", 1, 2), ("q2", "p3", 1, 2), ("q1", "p9", 1, 3)];
    check_qrels("q1\tp1\nq2\tp1,p3\nq1\tp9\n", QrelsFormat::Lists, &expected);
}

type Named = (String, String, bool);

fn candidates(input: &Input, rules: &SystemRules) -> (NegativesFormat, Vec<Named>) {
    let mut all = Vec::new();
    let format = negatives::read(input, rules, |c| {
        all.push((c.query.into(), c.passage.into(), c.positive));
        Ok(())
    });
    (format.unwrap_or_else(|e| panic!("{e}")), all)
}

#[track_caller]
fn check_negatives(text: &str, rules: &SystemRules, format: NegativesFormat, expected: &[(&str, &str, bool)]) {
    let dir = Dir::new();
    let expected: Vec<Named> = expected.iter().map(|&(q, p, positive)| (q.into(), p.into(), positive)).collect();
    for input in variants(&dir, text) {
        assert_eq!(candidates(&input, rules), (format, expected.clone()), "{}", input.path.display());
    }
}

#[test]
fn lists_of_negatives_are_in_the_order_of_their_ranks() {
    check_negatives(
        "q1\tn3,n1\nq2\t\nq1\tn2\n",
        &SystemRules::default(),
        NegativesFormat::Lists,
        &[("q1", "n3", false), ("q1", "n1", false), ("q1", "n2", false)],
    );
}

#[test]
fn triples_name_a_positive_and_a_negative() {
    check_negatives(
        "1\t7\t8\n1\t7\t9\n",
        &SystemRules::default(),
        NegativesFormat::Triples,
        &[("1", "7", true), ("1", "8", false), ("1", "7", true), ("1", "9", false)],
    );
}

const SYSTEMS: &str = concat!(
    r#"{"qid": 5, "pos": [{"pid": 1, "ce-score": 9.0}, {"pid": "2", "ce-score": 6.0}], "neg": {"bm25": "#,
    r#"[{"pid": 10, "ce-score": 2.9}, {"pid": 11, "ce-score": 3.1}, {"pid": 12, "ce-score": 3.0}, {"pid": 13, "ce-score": -4}], "#,
    r#""ance": [{"pid": 20, "ce-score": -1.0}, {"pid": 10, "ce-score": 2.9}]}}"#,
    "\n"
);

#[test]
fn negatives_by_system_keep_a_margin_and_take_turns() {
    let positives = [("5", "1", true), ("5", "2", true)];
    let with = |negatives: &[&'static str]| {
        positives.into_iter().chain(negatives.iter().map(|n| ("5", *n, false))).collect::<Vec<_>>()
    };
    let rules = SystemRules::default();
    // 3.1 is nearer than 3.0 to the lowest positive, 6.0; after the best of each system comes the second best of each.
    check_negatives(SYSTEMS, &rules, NegativesFormat::Systems, &with(&["10", "20", "12", "10", "13"]));
    let rules = SystemRules { per_system: 1, ..SystemRules::default() };
    check_negatives(SYSTEMS, &rules, NegativesFormat::Systems, &with(&["10", "20"]));
    let rules = SystemRules { margin: 0.0, systems: vec!["bm25".into()], ..SystemRules::default() };
    check_negatives(SYSTEMS, &rules, NegativesFormat::Systems, &with(&["10", "11", "12", "13"]));
}

#[test]
fn negatives_by_system_may_be_ids_alone() {
    let text = "{\"qid\": \"a\", \"pos\": [1], \"neg\": {\"s\": [\"x\", 3]}}\n{\"qid\": \"b\"}\n";
    let expected = [("a", "1", true), ("a", "x", false), ("a", "3", false)];
    check_negatives(text, &SystemRules::default(), NegativesFormat::Systems, &expected);
}

#[test]
fn scores_may_stand_in_brackets() {
    let dir = Dir::new();
    for input in variants(&dir, "q\tp\t1.5\nq\tr\t[-2.25]\nq\ts\t[ 1e2]\n") {
        let mut all = Vec::new();
        teacher::read(&input, |s| {
            all.push((s.passage.to_string(), s.score));
            Ok(())
        })
        .unwrap();
        assert_eq!(all, [("p".into(), 1.5), ("r".into(), -2.25), ("s".into(), 100.0)]);
    }
}
