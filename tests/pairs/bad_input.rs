//! Wrong lines: one line with path, line, cause and remedy; never a panic.

use retromae_engine::Result;
use retromae_engine::data::pairs::negatives::{self, SystemRules};
use retromae_engine::data::pairs::qrels;
use retromae_engine::data::pairs::runs::Run;
use retromae_engine::data::pairs::teacher;
use retromae_engine::data::source::Input;

use super::support::*;

fn read_qrels(input: &Input) -> Result<()> {
    qrels::read(input, None, |_| Ok(())).map(drop)
}

fn read_negatives(input: &Input) -> Result<()> {
    negatives::read(input, &SystemRules::default(), |_| Ok(())).map(drop)
}

fn read_teacher(input: &Input) -> Result<()> {
    teacher::read(input, |_| Ok(()))
}

fn read_run(input: &Input) -> Result<()> {
    Run::read(input, None).map(drop)
}

type Read = fn(&Input) -> Result<()>;

#[track_caller]
fn check(read: Read, bytes: impl AsRef<[u8]>, expected: &str) {
    let dir = Dir::new();
    let input = dir.write("f", bytes);
    let message = dir.message(read(&input));
    assert!(message.starts_with(expected), "{message}\n  and not {expected}");
    assert!(message.contains("; "), "no remedy: {message}");
}

#[test]
fn ids() {
    check(read_qrels, "q 0 d 1\nq\t0\td e\t1\n", "f:2: 5 columns where a judgement has 4");
    check(read_qrels, "q\tp, r\n", "f:1: the id \" r\" has white space before or after it; remove the white space");
    check(read_qrels, "q\tp,,r\n", "f:1: an id is empty");
    check(read_qrels, " q\tp\n", "f:1: the id \" q\" has white space before");
    check(read_qrels, "q\ta b\n", "f:1: the id \"a b\" holds white space or a control character; rename the text");
    check(read_qrels, "q\ta\u{a0}b\n", "f:1: the id \"a\\u{a0}b\" holds white space");
    check(read_qrels, "q\ta\u{1}\n", "f:1: the id \"a\\u{1}\" holds white space or a control character");
    check(read_qrels, "q\ta\r\r\n", "f:1: the id \"a\\r\" has white space before or after it");
    let long = format!("q\t{} x\n", "y".repeat(100));
    check(read_qrels, long, &format!("f:1: the id \"{}\"… holds", "y".repeat(40)));
}

#[test]
fn judgements() {
    check(read_qrels, "", "f: is empty; check the path");
    check(read_qrels, "\n \r\n", "f: is empty");
    check(read_qrels, "q 0 d 1.5\n", "f:1: the grade \"1.5\" is not a whole number; correct the line");
    check(read_qrels, "q 0 d 99999999999\n", "f:1: the grade \"99999999999\" is not");
    check(read_qrels, "1\t2\t3\n", "f:1: three columns without the header query-id, corpus-id, score; add the header");
    check(read_qrels, "one\n", "f:1: 1 columns, which are no judgement");
    check(read_qrels, "query-id\tcorpus-id\tscore\na\tb\n", "f:2: 2 columns where a judgement has 3");
    check(read_qrels, "q\tp\nq\tp\tr\n", "f:2: 3 tab-separated columns where there should be 2");
    check(read_qrels, b"q\tp\nq\t\xff\n".as_slice(), "f:2: byte 3 of the line is not UTF-8");
    check(read_qrels, b"\xff\xfeq\0".as_slice(), "f: is UTF-16");
}

#[test]
fn several_wrong_lines_show_three_and_the_count() {
    let text = "q 0 d 1\nq 0 d x\nq 0 d y\nq 0 d z\nq 0 d w\n";
    check(read_qrels, text, "f:2: the grade \"x\" is not a whole number | ");
    let dir = Dir::new();
    let message = dir.message(read_qrels(&dir.write("f", text)));
    assert!(message.contains("f:4: the grade \"z\"") && !message.contains("\"w\""), "{message}");
    assert!(message.contains("4 errors in all; correct the line"), "{message}");
}

#[test]
fn negatives_of_all_kinds() {
    check(read_negatives, "q\n", "f:1: 1 tab-separated columns, which are no negatives; give qid");
    check(read_negatives, "q\ta\tb\nq\ta\n", "f:2: 2 tab-separated columns where a triple has 3");
    check(read_negatives, "q\ta\nq\ta\tb\n", "f:2: 3 tab-separated columns where there should be 2");
    check(read_negatives, "{\"qid\": 1, \"neg\": {\"s\": 3}}\n", "f:1: the negatives of s are not a list");
    check(read_negatives, "{\"qid\": 1.5}\n", "f:1: the id 1.5 is neither text nor a whole number");
    check(read_negatives, "{\"qid\": \"\"}\n", "f:1: an id is empty");
    check(read_negatives, "{\"pos\": []}\n", "f:1: missing field `qid`");
    check(read_negatives, "{\"qid\": 1, \n", "f:1: EOF while parsing");
    check(read_negatives, "{\"qid\": 1, \"neg\": {\"s\": [{\"id\": 3}]}}\n", "f:1: a passage has no pid");
    let score = "{\"qid\": 1, \"pos\": [{\"pid\": 3, \"ce-score\": \"high\"}]}\n";
    check(read_negatives, score, "f:1: a ce-score is not a finite number");
}

#[test]
fn scores() {
    check(read_teacher, "q\tp\n", "f:1: 2 tab-separated columns where a score has 3: qid pid score");
    check(read_teacher, "q p 1\n", "f:1: 1 tab-separated columns");
    for wrong in ["nan", "inf", "1e99", "[1, 2]", "[[1]]", "", "x"] {
        check(read_teacher, format!("q\tp\t{wrong}\n"), &format!("f:1: the score {wrong:?} is not a finite number"));
    }
}

#[test]
fn runs() {
    check(read_run, "q Q0 d 1 x t\n", "f:1: the score \"x\" is not a finite number");
    check(read_run, "q Q0 d one 1 t\n", "f:1: the rank \"one\" is no whole number; if the column holds scores");
    check(read_run, "q Q0 d 1 1 t\nq Q0 d 1\n", "f:2: 4 columns where a line has 6: qid Q0 docid rank score tag");
    check(read_run, "q\ta\t1\nq\tb\t0.5\n", "f:2: the rank \"0.5\" is no whole number; if the column holds scores");
    check(read_run, "word\n", "f:1: 1 columns where a line has 2, separated by a tab: qid pid");
    let twice = "q Q0 a 1 3 t\nr Q0 a 1 3 t\nq Q0 b 2 2 t\nq Q0 a 3 1 t\n";
    check(read_run, twice, "f:4: passage a is twice on the list of query q; remove one of the lines");
}

#[test]
fn files_that_are_cut_or_not_there() {
    let dir = Dir::new();
    let packed = gz("q 0 d 1\n".repeat(10_000).as_bytes());
    let input = dir.write("f.gz", &packed[..packed.len() / 2]);
    let message = dir.message(read_qrels(&input));
    assert!(message.starts_with("f.gz: cannot read: "), "{message}");
    let absent = Input { path: dir.at("absent"), bytes: None };
    assert_eq!(dir.message(read_qrels(&absent)), "absent: cannot open: No such file or directory; check the path");
}
