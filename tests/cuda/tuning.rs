//! How algorithms of products are found, remembered and used, on the fakes, whose algorithms take the times they are told to.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::fakes::{Libraries, Said, child, doctor};

/// The first proposal is the second best.
const ALGORITHMS: &str = "77:4,78:3,79:9,80:5";

/// Runs the scenario, its algorithms remembered in `cache`; nothing in a build without kernels.
fn tuned(cache: &Path, variables: &[(&str, &str)]) -> Option<Said> {
    let mut all = vec![("RETROMAE_CACHE", cache.to_str().expect("a plain path")), ("FAKE_ALGORITHMS", ALGORITHMS)];
    all.extend(variables);
    child("tuned", Libraries::Both, &all)
}

fn cache() -> TempDir {
    tempfile::tempdir().expect("a folder for what is remembered")
}

/// The files of algorithms.
fn files(cache: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(cache).expect("the folder is there").map(|entry| entry.expect("an entry").path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|e| e == "json")).collect();
    files.sort();
    files
}

/// The calls behind the mark `text`.
fn behind<'a>(said: &'a Said, text: &str) -> Vec<&'a str> {
    let from = said.log.iter().skip_while(|line| **line != format!("-- {text}")).skip(1);
    from.map(String::as_str).take_while(|line| !line.starts_with("-- ")).collect()
}

fn count(said: &Said, call: &str) -> usize {
    said.log.iter().filter(|line| line.starts_with(call)).count()
}

/// The algorithm of each kind once it is chosen, and that it was computed with alone.
fn chosen(said: &Said) -> [&str; 2] {
    ["second NT", "second TN"].map(|text| {
        let calls = behind(said, text);
        let products: Vec<&str> = calls.into_iter().filter_map(|call| call.strip_prefix("cublasLtMatmul ")).collect();
        let [product] = products[..] else { panic!("{products:?}") };
        product.split_once(" by ").map_or("77", |(_, number)| number)
    })
}

/// The same of a run without a warning.
fn fine(said: &Said) -> [&str; 2] {
    assert_eq!(said.lines, ["fine"]);
    chosen(said)
}

#[test]
fn the_fastest_algorithm_is_found_once_and_remembered() {
    let cache = cache();
    let Some(said) = tuned(cache.path(), &[]) else { return };
    assert_eq!(fine(&said), ["78", "78"]);
    assert_eq!(count(&said, "cublasLtMatmulAlgoGetHeuristic 8"), 2);
    // The slowest is given up after the turn that loads it and the one that is timed.
    let tries = |number: &str| behind(&said, "first NT").iter().filter(|call| call.ends_with(number)).count();
    assert_eq!((tries("by 79"), tries("by 78") > 4), (2, true));
    let [file] = &files(cache.path())[..] else { panic!("{:?}", files(cache.path())) };
    assert_eq!(file.file_name().unwrap(), "products-fake-gpu-sm90-4-cublaslt130100-64mib.json");
    let text = std::fs::read_to_string(file).expect("the file can be read");
    let stored: serde_json::Value = serde_json::from_str(&text).expect("the file is JSON");
    let products = stored["products"].as_object().expect("products");
    assert_eq!(products.len(), 2, "{text}");
    for (kind, found) in products {
        assert!(kind.starts_with("NT 6 x 5 x 7, BF16 = BF16 + bias") || kind.starts_with("TN 6 x 5 x 7, F32 += BF16"));
        assert_eq!((found["us"].as_f64(), found["first_us"].as_f64()), (Some(3000.0), Some(4000.0)), "{kind}");
    }
    // Never searched again, whatever would be the fastest now.
    let Some(again) = tuned(cache.path(), &[("FAKE_ALGORITHMS", "77:1,78:3,79:9")]) else { return };
    assert_eq!(fine(&again), ["78", "78"]);
    assert_eq!((count(&again, "cublasLtMatmulAlgoGetHeuristic"), count(&again, "cublasLtMatmul ")), (0, 4));
    assert_eq!(std::fs::read_to_string(file).expect("the file can be read"), text, "nothing new to write");
}

#[test]
fn noise_leaves_the_first_proposal() {
    let cache = cache();
    for _ in 0..2 {
        let Some(said) = tuned(cache.path(), &[("FAKE_ALGORITHMS", "77:100,78:98,79:97.5")]) else { return };
        assert_eq!(fine(&said), ["77", "77"]);
    }
    let Some(said) = tuned(cache.path(), &[]) else { return };
    assert_eq!((chosen(&said), count(&said, "cublasLtMatmulAlgoGetHeuristic")), (["77", "77"], 0));
}

#[test]
fn an_algorithm_that_does_not_run_is_not_chosen() {
    let cache = [cache(), cache()];
    let Some(said) = tuned(cache[0].path(), &[("FAKE_BROKEN", "78")]) else { return };
    assert_eq!(fine(&said), ["77", "77"]);
    let variables = [("FAKE_BROKEN", "77"), ("FAKE_ALGORITHMS", "77:1,80:5,81:6")];
    for _ in 0..2 {
        let Some(said) = tuned(cache[1].path(), &variables) else { return };
        assert_eq!(fine(&said), ["80", "80"]);
    }
}

#[test]
fn what_the_library_refuses_is_searched_again() {
    let cache = cache();
    let Some(_) = tuned(cache.path(), &[]) else { return };
    let others = ("FAKE_ALGORITHMS", "77:5,80:4");
    let Some(said) = tuned(cache.path(), &[others, ("RETROMAE_TUNE_PRODUCTS", "cached")]) else { return };
    assert_eq!(fine(&said), ["77", "77"]);
    assert_eq!(count(&said, "cublasLtMatmulAlgoGetHeuristic 1"), 2);
    for searches in [2, 0] {
        let Some(said) = tuned(cache.path(), &[others]) else { return };
        assert_eq!((chosen(&said), count(&said, "cublasLtMatmulAlgoGetHeuristic 8")), (["80", "80"], searches));
        assert_eq!(said.lines, ["fine"]);
    }
}

#[test]
fn damaged_and_foreign_files_are_one_warning_and_replaced() {
    let cache = cache();
    let Some(_) = tuned(cache.path(), &[]) else { return };
    let [file] = &files(cache.path())[..] else { panic!("one file") };
    let good = std::fs::read_to_string(file).expect("the file can be read");
    let of_another = |text: &str| retromae_engine::files::sealed::seal(text);
    let cases = [
        (good.replace("3000", "3001"), "damaged: the digest is another"),
        (good[..good.len() / 2].to_string(), "not a file of algorithms"),
        (String::new(), "not a file of algorithms"),
        (of_another("{\n  \"products\": 3\n}"), "not a file of algorithms"),
        (
            match retromae_engine::files::sealed::open(&good) {
                retromae_engine::files::sealed::Sealed::Whole(text) => {
                    of_another(&text.replace("Fake GPU", "Other GPU"))
                }
                other => panic!("{other:?}"),
            },
            "of another GPU or version",
        ),
    ];
    for (text, cause) in cases {
        std::fs::write(file, &text).expect("the file can be written");
        let Some(said) = tuned(cache.path(), &[]) else { return };
        let [line] = &said.lines[..] else { panic!("{:?}", said.lines) };
        let start = format!("products are tuned anew: {}: {cause}", file.display());
        assert!(line.starts_with(&start) && line.ends_with("; the file is replaced"), "{line}");
        assert_eq!(chosen(&said), ["78", "78"]);
        let text = std::fs::read_to_string(file).expect("the file can be read");
        assert_eq!(text, good, "whole again");
    }
}

#[test]
fn another_version_has_a_file_of_its_own() {
    let cache = cache();
    let Some(_) = tuned(cache.path(), &[]) else { return };
    let variables = [("FAKE_LIBRARY", "130200"), ("FAKE_ALGORITHMS", "77:5,78:6,79:1")];
    let Some(said) = tuned(cache.path(), &variables) else { return };
    assert_eq!(fine(&said), ["79", "79"]);
    let Some(said) = tuned(cache.path(), &[("FAKE_CAPABILITY", "89")]) else { return };
    assert_eq!((said.lines, files(cache.path()).len()), (vec!["fine".to_string()], 3));
}

#[test]
fn nothing_is_searched_where_it_could_not_be_remembered() {
    let cache = cache();
    let blocked = cache.path().join("file");
    std::fs::write(&blocked, "").expect("the file can be written");
    let Some(said) = tuned(&blocked.join("folder"), &[]) else { return };
    let [line] = &said.lines[..] else { panic!("{:?}", said.lines) };
    assert!(line.starts_with("new products are not tuned: ") && line.contains("set RETROMAE_CACHE"), "{line}");
    assert_eq!((chosen(&said), count(&said, "cublasLtMatmulAlgoGetHeuristic 1")), (["77", "77"], 2));
    let Some(said) = tuned(Path::new(""), &[("HOME", "")]) else { return };
    assert!(said.lines[0].starts_with("products are not tuned: no folder"), "{:?}", said.lines);
}

#[test]
fn the_mode_is_told_by_a_variable() {
    let cache = cache();
    for mode in ["never", "cached"] {
        let Some(said) = tuned(cache.path(), &[("RETROMAE_TUNE_PRODUCTS", mode)]) else { return };
        assert_eq!(fine(&said), ["77", "77"]);
        assert_eq!(files(cache.path()).len(), 0, "{mode}");
    }
    let Some(_) = tuned(cache.path(), &[]) else { return };
    for (mode, expected) in [("never", "77"), ("cached", "78"), ("auto", "78")] {
        let Some(said) = tuned(cache.path(), &[("RETROMAE_TUNE_PRODUCTS", mode)]) else { return };
        assert_eq!(chosen(&said), [expected; 2], "{mode}");
    }
    let Some(said) = tuned(cache.path(), &[("RETROMAE_TUNE_PRODUCTS", "often")]) else { return };
    assert_eq!(said.lines, ["error: RETROMAE_TUNE_PRODUCTS has a value that is unknown; auto, cached and never are"]);
}

#[test]
fn nothing_is_searched_while_a_capture_is_open() {
    let Some(said) = child("tuned in a capture", Libraries::Both, &[("FAKE_ALGORITHMS", ALGORITHMS)]) else { return };
    assert_eq!(said.lines, ["fine"]);
    let capture = said.log.iter().skip_while(|line| !line.starts_with("cuStreamBeginCapture"));
    let capture: Vec<&String> = capture.take_while(|line| *line != "cuStreamEndCapture").collect();
    assert!(capture.iter().any(|line| *line == "cublasLtMatmulAlgoGetHeuristic 1"), "{capture:?}");
    assert_eq!(capture.iter().filter(|line| line.starts_with("cublasLtMatmul ")).count(), 1, "{capture:?}");
    let waits =
        capture.iter().filter(|line| line.contains("Event") || line.contains("Mem") || line.contains("Synchron"));
    assert_eq!(waits.count(), 0, "{capture:?}");
}

#[test]
fn searching_takes_a_bounded_time_of_a_process() {
    let cache = cache();
    let began = std::time::Instant::now();
    let Some(said) = tuned(cache.path(), &[("FAKE_SLOW", "150")]) else { return };
    assert!(began.elapsed().as_secs() < 10, "{:?}", began.elapsed());
    assert_eq!(fine(&said), ["77", "77"]);
    // The second kind came when the time was up; a later process searches both.
    assert_eq!(count(&said, "cublasLtMatmulAlgoGetHeuristic 1"), 1);
    let Some(said) = tuned(cache.path(), &[]) else { return };
    assert_eq!(chosen(&said), ["78", "78"]);
}

#[test]
fn processes_at_once_agree() {
    let cache = cache();
    let fastest = ["77:9,78:3,79:4,80:5", "77:9,78:5,79:3,80:5", "77:9,78:5,79:4,80:3"];
    let all: Vec<Option<Said>> = std::thread::scope(|scope| {
        let run = |&times: &&'static str| {
            let cache = cache.path();
            scope.spawn(move || tuned(cache, &[("FAKE_ALGORITHMS", times)]))
        };
        let running: Vec<_> = fastest.iter().map(run).collect();
        running.into_iter().map(|thread| thread.join().expect("the child ran")).collect()
    });
    let Some(all): Option<Vec<Said>> = all.into_iter().collect() else { return };
    let expected = chosen(&all[0]);
    for said in &all {
        assert_eq!(fine(said), expected);
    }
    for text in ["first NT", "first TN"] {
        let timed = |said: &&Said| behind(said, text).contains(&"cuEventElapsedTime");
        assert_eq!(all.iter().filter(timed).count(), 1, "one process searched for the {text}");
    }
    let Some(said) = tuned(cache.path(), &[]) else { return };
    assert_eq!((chosen(&said), count(&said, "cublasLtMatmulAlgoGetHeuristic")), (expected, 0));
}

#[test]
fn doctor_names_the_file() {
    let cache = cache();
    let variables = [("RETROMAE_CACHE", cache.path().to_str().expect("a plain path"))];
    let file = cache.path().join("products-fake-gpu-sm90-4-cublaslt130100-64mib.json");
    let told = doctor(Libraries::Both, &variables);
    assert!(told.contains(&format!("ok  algorithms   0 kinds of product in {}\n", file.display())), "{told}");
    assert!(!file.exists(), "doctor changes nothing");
    let Some(_) = tuned(cache.path(), &[]) else { return };
    let told = doctor(Libraries::Both, &variables);
    assert!(told.contains(&format!("ok  algorithms   2 kinds of product in {}\n", file.display())), "{told}");
    std::fs::write(&file, "{}").expect("the file can be written");
    let told = doctor(Libraries::Both, &variables);
    assert!(told.contains(&format!("--  algorithms   {}: not a file of algorithms", file.display())), "{told}");
}
