//! Wrong input: one line with path, cause and remedy, and nothing written.

use std::path::Path;

use crate::support::{engine, folder, metrics, written};
use crate::world::stderr;

/// Runs `report` on a folder; gives the exit code and the line.
fn refused(run: &Path, more: &[&str]) -> (Option<i32>, String) {
    let dir = folder();
    let output = dir.path().join("page.html");
    let done = engine(&[&["report", run.to_str().unwrap(), "--output", output.to_str().unwrap()], more].concat());
    let text = stderr(&done);
    assert!(text.starts_with("error: ") && text.lines().count() == 1, "{text}");
    assert!(!output.exists(), "what is refused leaves nothing");
    (done.status.code(), text)
}

#[test]
fn folders_without_a_usable_run_are_refused_in_one_line() {
    let dir = folder();
    let run = dir.path().join("run");
    let mut cases = vec![("no run is there; give the folder that train --output named", None)];
    let good = metrics(2, |_| 1.0);
    let lines = [
        ("", "metrics.jsonl: holds no line yet; let train log"),
        ("{\"step\":1,\"split\":\"train\"", "metrics.jsonl: holds no line yet"),
        ("not json\n", "metrics.jsonl:1: the line is no JSON object; remove the line"),
        ("[1]\n", "metrics.jsonl:1: the line is no JSON object"),
        ("{\"split\":\"train\"}\n", "metrics.jsonl:1: the line has no step"),
        ("{\"step\":1}\n", "metrics.jsonl:1: the line has no split"),
    ];
    cases.extend(lines.into_iter().map(|(text, expected)| (expected, Some(text.to_string()))));
    cases.push(("metrics.jsonl:3: the line is no JSON object", Some(format!("{good}{{\"step\":3,\u{1}\n"))));
    cases.push(("metrics.jsonl:3: the line is of step 1 after one of step 2", Some(format!("{good}{good}"))));
    for (expected, text) in cases {
        if let Some(text) = &text {
            written(&run, text, "");
        }
        let (code, line) = refused(&run, &[]);
        assert_eq!(code, Some(1), "{line}");
        assert!(line.contains(expected), "{expected}: {line}");
    }
    let (code, line) = refused(&run.join("metrics.jsonl"), &[]);
    assert!(code == Some(1) && line.contains("no run is there"), "{line}");
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    let (_, line) = refused(&dir.path().join("empty"), &[]);
    assert!(line.contains("no run is there: it has no metrics.jsonl"), "{line}");
}

/// The last line of a run that was killed, or that is being written, may have no end.
#[test]
fn a_last_line_without_its_end_is_left_out() {
    let dir = folder();
    written(dir.path(), &(metrics(5, |_| 1.0) + "{\"step\":6,\"spl"), "");
    let html = crate::support::page(&[dir.path()], &[]);
    assert!(html.contains("1.0000 (step 5)") && html.contains("not finished"));
}

#[test]
fn breakdowns_and_outputs_are_checked() {
    let dir = folder();
    let (run, file) = (dir.path().join("run"), dir.path().join("bench.jsonl"));
    written(&run, &metrics(2, |_| 1.0), "");
    for (text, expected) in [
        ("", "bench.jsonl: holds no breakdown of a step; give a file that bench step --breakdown --json wrote"),
        ("{\"case\":\"x\"}\n", "holds no breakdown"),
        ("{}\nx\n", "bench.jsonl:2: the line is no JSON object"),
        ("{\"breakdown\":{\"stages\":[{\"stage\":\"a\"}]}}\n", "bench.jsonl:1: the breakdown has no stages"),
    ] {
        std::fs::write(&file, text).unwrap();
        let (code, line) = refused(&run, &["--breakdown", file.to_str().unwrap()]);
        assert!(code == Some(1) && line.contains(expected), "{expected}: {line}");
    }
    let page = dir.path().join("page.html");
    let arguments = ["report", run.to_str().unwrap(), "--output", page.to_str().unwrap()];
    std::fs::write(&page, "mine").unwrap();
    let kept = engine(&arguments);
    assert_eq!(kept.status.code(), Some(1));
    assert!(
        stderr(&kept).contains("page.html: the file already exists; choose another --output or add --overwrite"),
        "{}",
        stderr(&kept)
    );
    assert_eq!(std::fs::read_to_string(&page).unwrap(), "mine");
    let replaced = engine(&[&arguments[..], &["--overwrite"]].concat());
    assert!(replaced.status.success() && std::fs::read_to_string(&page).unwrap().starts_with("<!DOCTYPE html>"));
    let many = vec![run.to_str().unwrap(); 17];
    let crowded = engine(&[&["report", "--output", "x.html"], &many[..]].concat());
    assert!(crowded.status.code() == Some(2) && stderr(&crowded).contains("give at most 16"), "{}", stderr(&crowded));
    for folder in [dir.path().to_str().unwrap(), "nowhere/page.html"] {
        let done = engine(&["report", run.to_str().unwrap(), "--output", folder]);
        assert!(done.status.code() == Some(1) && stderr(&done).lines().count() == 1, "{}", stderr(&done));
    }
}
