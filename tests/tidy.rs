//! The rules of the source tree that the compiler does not hold: layers, `unsafe`, sizes, what must not be committed.

use std::path::{Path, PathBuf};

/// Top-level modules by layer; a module uses modules of lower layers only. Listed inside a layer: uses that are allowed there.
const LAYERS: [&[&str]; 11] = [
    &["error", "config", "rng", "files"],
    &["device", "data"],
    &["ops"],
    &["model", "graph"],
    &["eval"],
    &["retrieve"],
    &["train"],
    &["bench"],
    &["report"],
    &["cli"],
    &["main"],
];

/// Uses beside the layers, each with its reason.
const EXCEPTIONS: [(&str, &str, &str); 2] = [
    ("graph", "model", "the graph is built from `model::config`; `model` does not know the graph"),
    ("files", "error", "writing files fails with the one error type"),
];

/// Where `unsafe` may be. The emulator's tests launch kernels below the typed stubs, wrong ones too.
const UNSAFE: [&str; 3] = ["src/device/", "src/data/shard/file.rs", "tests/emulator/"];

const LONGEST_FILE: usize = 500;
const LONGEST_LINE: usize = 140;

/// A text file of the tree, under its path from the root.
struct Source {
    path: String,
    text: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files below `folder` with one of these endings.
fn sources(folders: &[&str], endings: &[&str]) -> Vec<Source> {
    let mut found = Vec::new();
    let mut open: Vec<PathBuf> = folders.iter().map(|f| root().join(f)).filter(|f| f.is_dir()).collect();
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| endings.iter().any(|x| e == *x)) {
                let name = path.strip_prefix(root()).unwrap().to_str().unwrap().replace('\\', "/");
                found.push(Source { path: name, text: std::fs::read_to_string(&path).unwrap() });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn rust() -> Vec<Source> {
    let found = sources(&["src", "tests", "benches"], &["rs"]);
    assert!(found.len() > 30, "the sources are where this test looks");
    found
}

fn code() -> Vec<Source> {
    let mut all = rust();
    all.extend(sources(&["kernels"], &["cu", "cuh", "h", "cpp"]));
    all
}

/// Fails with every finding at once.
fn assert_none(findings: Vec<String>, rule: &str) {
    assert!(findings.is_empty(), "{rule}:\n{}", findings.join("\n"));
}

/// A line without its comment and without the content of its strings.
fn bare(line: &str) -> String {
    let (mut out, mut inside, mut escaped) = (String::new(), false, false);
    let characters: Vec<char> = line.chars().collect();
    for (i, &c) in characters.iter().enumerate() {
        match (inside, c) {
            (true, _) if escaped => escaped = false,
            (true, '\\') => escaped = true,
            (true, '"') => inside = false,
            (true, _) => {}
            (false, '"') if i == 0 || characters[i - 1] != '\'' => inside = true,
            (false, '/') if characters.get(i + 1) == Some(&'/') => break,
            (false, c) => out.push(c),
        }
    }
    out
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether `word` occurs in `text` with no letter beside it.
fn has_word(text: &str, word: &str) -> bool {
    text.match_indices(word)
        .any(|(at, _)| !text[..at].ends_with(is_word) && !text[at + word.len()..].starts_with(is_word))
}

/// The lines of a file on which `test` holds of the bare line, as `path:line`.
fn lines(source: &Source, test: impl Fn(&str) -> bool) -> Vec<String> {
    let all = source.text.lines().enumerate();
    all.filter(|(_, line)| test(&bare(line)))
        .map(|(i, line)| format!("{}:{}: {}", source.path, i + 1, line.trim()))
        .collect()
}

/// The names after each `prefix` in a line: `crate::ops::x` and `crate::{ops, data}`.
fn names_after<'a>(line: &'a str, prefix: &str) -> Vec<&'a str> {
    let mut names = Vec::new();
    for (at, _) in line.match_indices(prefix) {
        if line[..at].ends_with(is_word) || line[..at].ends_with(':') {
            continue;
        }
        let rest = &line[at + prefix.len()..];
        let list = rest.strip_prefix('{').map(|r| r.split('}').next().unwrap_or(r)).unwrap_or(rest);
        let parts = if rest.starts_with('{') { list.split(',').collect() } else { vec![list] };
        names.extend(parts.into_iter().map(|p| p.trim().split(|c| !is_word(c)).next().unwrap_or("")));
    }
    names.into_iter().filter(|n| n.starts_with(|c: char| c.is_ascii_lowercase())).collect()
}

/// The top-level modules that a file names through `crate::` or through enough `super::`.
fn uses(source: &Source) -> Vec<(usize, String)> {
    let inner = source.path.trim_start_matches("src/").trim_end_matches(".rs");
    let depth = inner.split('/').filter(|p| *p != "mod").count();
    let (mut found, mut inline) = (Vec::new(), 0);
    for (i, line) in source.text.lines().enumerate() {
        let line = bare(line);
        let declares = line.split_whitespace().any(|w| w == "mod") && line.ends_with('{');
        match line.as_str() {
            _ if declares && !line.starts_with(' ') => inline = 1,
            "}" => inline = 0,
            _ => {}
        }
        let up = "super::".repeat(depth + inline);
        for prefix in ["crate::", "retromae_engine::", up.as_str()] {
            found.extend(names_after(&line, prefix).into_iter().map(|n| (i + 1, n.to_string())));
        }
    }
    found
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|l| l.contains(&module))
}

#[test]
fn layers_point_down() {
    let mut findings = Vec::new();
    let mut edges = 0;
    for source in sources(&["src"], &["rs"]) {
        let inner = source.path.trim_start_matches("src/");
        let own = inner.split('/').next().unwrap_or(inner).trim_end_matches(".rs");
        if own == "lib" {
            continue;
        }
        let Some(own_layer) = layer(own) else {
            findings.push(format!("{}: `{own}` has no layer; add it to ARCHITECTURE and to this test", source.path));
            continue;
        };
        for (line, used) in uses(&source) {
            let allowed = used == own || EXCEPTIONS.iter().any(|(from, to, _)| (*from, *to) == (own, used.as_str()));
            // Names that are no module: macros and re-exports of the crate's root (`crate::Result`).
            let Some(used_layer) = layer(&used) else { continue };
            edges += 1;
            if !allowed && used_layer >= own_layer {
                findings.push(format!(
                    "{}:{line}: {own} (layer {own_layer}) uses {used} (layer {used_layer})",
                    source.path
                ));
            }
        }
    }
    assert!(edges > 100, "only {edges} uses were found");
    assert_none(findings, "a module uses only modules of lower layers");
}

#[test]
fn the_layer_test_sees_every_form_of_use() {
    let text = "use crate::ops::{linear, gather};\nlet x = crate::train::step::f();\nuse crate::{data, rng::key};\n\
                // crate::cli in a comment\nmod cpu {\n    use super::super::super::graph;\n}\nuse super::super::eval;\nuse super::ops;";
    let source = Source { path: "src/model/names.rs".into(), text: text.into() };
    let names: Vec<String> = uses(&source).into_iter().map(|u| u.1).collect();
    assert_eq!(names, ["ops", "train", "data", "rng", "graph", "eval"]);
}

#[test]
fn unsafe_only_at_the_edges_and_explained() {
    let mut findings = Vec::new();
    let mut seen = 0;
    for source in rust() {
        let all: Vec<&str> = source.text.lines().collect();
        for (i, line) in all.iter().enumerate().filter(|(_, line)| has_word(&bare(line), "unsafe")) {
            seen += 1;
            let place = format!("{}:{}", source.path, i + 1);
            // Declares foreign functions or their type: what is owed is said where one is called.
            let declares = line.contains("unsafe extern");
            if !UNSAFE.iter().any(|p| source.path.starts_with(p)) {
                findings.push(format!("{place}: `unsafe` outside {UNSAFE:?}"));
            }
            // The comment stands directly above, perhaps over several lines, attributes or the rest of the statement's head.
            let explained = all[i.saturating_sub(6)..i].iter().rev().take_while(|l| !l.trim_end().ends_with(';'));
            if !declares && !explained.clone().any(|l| l.contains("// SAFETY:") || l.contains("# Safety")) {
                findings.push(format!("{place}: no `// SAFETY:` above"));
            }
        }
    }
    assert!(seen > 3, "`unsafe` in the device memory was not found");
    assert_none(findings, "`unsafe` is rare and says who upholds what");
}

#[test]
fn nothing_unfinished() {
    let words = ["todo", "unimplemented", "dbg"].map(|w| format!("{w}!"));
    let attributes = ["ignore", "should_panic]", "allow(dead_code)"].map(|a| format!("#[{a}"));
    let findings = code().into_iter().flat_map(|s| {
        lines(&s, |line| {
            words.iter().any(|w| line.match_indices(w.as_str()).any(|(at, _)| !line[..at].ends_with(is_word)))
                || attributes.iter().any(|a| line.contains(a.as_str()))
        })
    });
    assert_none(findings.collect(), "no stubs, no skipped tests, no bare `should_panic`, no dead code");
}

#[test]
fn no_code_in_comments() {
    let looks_like_code = |line: &str| {
        let Some(text) = line.trim_start().strip_prefix("// ") else { return false };
        let text = text.trim();
        text.ends_with(");") || (text.starts_with("let ") && text.ends_with(';')) || text.ends_with(") {")
    };
    let findings = code().into_iter().flat_map(|s| {
        let found = s.text.lines().enumerate().filter(|(_, l)| looks_like_code(l));
        found.map(|(i, l)| format!("{}:{}: {}", s.path, i + 1, l.trim())).collect::<Vec<_>>()
    });
    assert_none(findings.collect(), "code that is not run is deleted");
}

#[test]
fn files_and_lines_have_a_limit() {
    let mut findings = Vec::new();
    for source in code() {
        let count = source.text.lines().count();
        if count > LONGEST_FILE {
            findings.push(format!("{}: {count} lines", source.path));
        }
        for (i, line) in source.text.lines().enumerate() {
            let width = line.chars().count();
            if width > LONGEST_LINE {
                findings.push(format!("{}:{}: {width} columns", source.path, i + 1));
            }
            if line.ends_with([' ', '\t']) {
                findings.push(format!("{}:{}: white space at the end", source.path, i + 1));
            }
        }
        if !source.text.is_empty() && !source.text.ends_with('\n') {
            findings.push(format!("{}: no newline at the end", source.path));
        }
    }
    assert_none(findings, "at most 500 lines of at most 140 columns");
}

#[test]
fn no_paths_of_a_machine() {
    let paths = ["work", "root", "opt/venv"].map(|p| format!("/{p}/"));
    let mut all = code();
    all.extend(sources(&["tests", "benches", "docs", "kernels"], &["py", "md", "toml", "sh"]));
    for name in ["README.md", "Cargo.toml", "build.rs", ".ci/run"] {
        if let Ok(text) = std::fs::read_to_string(root().join(name)) {
            all.push(Source { path: name.into(), text });
        }
    }
    let found = |line: &str| {
        paths
            .iter()
            .any(|p| line.match_indices(p.as_str()).any(|(at, _)| !line[..at].ends_with(|c| is_word(c) || c == '.')))
    };
    let findings = all.iter().flat_map(|s| {
        let hits = s.text.lines().enumerate().filter(|(_, l)| found(l));
        hits.map(|(i, l)| format!("{}:{}: {}", s.path, i + 1, l.trim())).collect::<Vec<_>>()
    });
    assert_none(findings.collect(), "nothing knows the machine it was written on");
}

#[test]
fn every_op_has_its_tests() {
    let tests = std::fs::read_to_string(root().join("tests/ops.rs")).unwrap();
    let mut ops = 0;
    for source in sources(&["src/ops"], &["rs"]) {
        let stem = source.path.trim_start_matches("src/ops/").trim_end_matches(".rs");
        // `gpu` is what the ops' launches share; in a folder of an op are the halves of one that is too long for one file.
        if stem == "mod" || stem == "gpu" || stem.contains('/') {
            continue;
        }
        ops += 1;
        let path = format!("tests/ops/{stem}.rs");
        assert!(root().join(&path).is_file(), "{} has no {path}", source.path);
        assert!(tests.contains(&format!("mod {stem};")), "tests/ops.rs does not run {path}");
    }
    assert!(ops >= 9);
}

#[test]
fn every_module_says_what_lives_there() {
    let silent = rust().into_iter().filter(|s| !s.text.starts_with("//! "));
    assert_none(silent.map(|s| s.path).collect(), "a file opens with what lives there and why");
}
