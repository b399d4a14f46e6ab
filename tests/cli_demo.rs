//! What a new user meets first: the demo through the binary, the help of every subcommand, and a README that tells the truth.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const BINARY: &str = env!("CARGO_BIN_EXE_retromae-engine");
const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn run(arguments: &[&str]) -> Output {
    Command::new(BINARY).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn file(name: &str) -> String {
    std::fs::read_to_string(Path::new(ROOT).join(name)).unwrap()
}

/// The subcommands that `--help` lists.
fn subcommands() -> Vec<String> {
    let help = text(&run(&["--help"]).stdout);
    let names = help.lines().skip_while(|l| *l != "Commands:").skip(1).take_while(|l| !l.is_empty());
    // A description that is wrapped is indented further.
    let names = names.filter(|l| l.starts_with("  ") && !l.starts_with("   "));
    names.filter_map(|l| l.split_whitespace().next()).filter(|n| *n != "help").map(String::from).collect()
}

fn demo(folder: &Path, steps: &str, json: &Path) -> Command {
    let mut command = Command::new(BINARY);
    command.args(["demo", "--device", "cpu"]).arg("--output").arg(folder).args(["--steps", steps, "--json"]).arg(json);
    command
}

/// The other objective: its third loss is in the table and in the figures, and its folder is not that of the first.
#[test]
fn the_demo_pre_trains_with_dupmae() {
    let world = tempfile::tempdir().unwrap();
    let (folder, json) = (world.path().join("demo"), world.path().join("demo.json"));
    let done = demo(&folder, "20", &json).args(["--objective", "dupmae"]).output().unwrap();
    let shown = text(&done.stdout);
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(shown.contains("train --objective dupmae") && shown.contains("bag-of-words loss"), "{shown}");
    let figures: Value = serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    let bow = |i: usize| figures["held_out"][i]["bow_loss"].as_f64().unwrap();
    assert!(bow(1) < bow(0), "{figures}");
    let other = demo(&folder, "20", &json).output().unwrap();
    assert_eq!(other.status.code(), Some(1));
    assert!(text(&other.stderr).contains("with other options"), "{}", text(&other.stderr));
}

#[test]
fn the_demo_trains_goes_on_and_leaves_other_folders_alone() {
    let world = tempfile::tempdir().unwrap();
    let (folder, json) = (world.path().join("my demo"), world.path().join("demo.json"));
    let done = demo(&folder, "20", &json).output().unwrap();
    let shown = text(&done.stdout);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let parts = ["tokenize --input '", "train --config-file '", "verify '", "frequencies alone", "from_pretrained(\""];
    let more =
        ["train --objective contrastive", "encode --model '", "search --queries '", "evaluate --run '", "BM25  "];
    for part in parts.into_iter().chain(more) {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let figures = |path: &Path| serde_json::from_str::<Value>(&std::fs::read_to_string(path).unwrap()).unwrap();
    let first = figures(&json);
    let held_out = first["held_out"].as_array().unwrap();
    assert_eq!(held_out.iter().map(|e| e["step"].as_u64()).collect::<Vec<_>>(), [Some(0), Some(20)]);
    for key in ["encoder_loss", "decoder_loss"] {
        let (before, after) = (held_out[0][key].as_f64().unwrap(), held_out[1][key].as_f64().unwrap());
        assert!(after < before - 0.5, "{key}: {before} {after}");
    }
    // The vocabulary has 6,000 tokens: knowing nothing costs ln 6000 = 8.7 nats.
    let unigram = first["unigram"]["loss"].as_f64().unwrap();
    assert!(unigram > 5.0 && unigram < 8.0, "{unigram}");
    assert!(folder.join("run/model/model.safetensors").is_file());
    assert!(folder.join("retriever/model/1_Pooling/config.json").is_file());
    judged(&first, &folder);

    let again = demo(&folder, "20", &json).output().unwrap();
    assert!(again.status.success(), "{}", text(&again.stderr));
    assert!(text(&again.stderr).contains("there already"), "{}", text(&again.stderr));
    let second = figures(&json);
    assert_eq!(first["held_out"], second["held_out"]);
    assert_eq!(first["commands"], second["commands"]);
    assert_eq!(first["retrieval"], second["retrieval"]);

    let other = demo(&folder, "30", &json).output().unwrap();
    assert_eq!(other.status.code(), Some(1));
    let told = text(&other.stderr);
    assert_eq!(told.lines().count(), 1, "{told}");
    assert!(told.contains("with other options; remove the folder or choose another --output"), "{told}");

    let foreign = world.path().join("mine");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("notes.txt"), "keep").unwrap();
    let refused = demo(&foreign, "20", &json).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("is not a demo's"), "{}", text(&refused.stderr));
    assert_eq!(std::fs::read_dir(&foreign).unwrap().count(), 1);
}

/// The table of a short demo: four systems, the figures that `evaluate` wrote, BM25 far above a model that saw next to nothing.
fn judged(figures: &Value, folder: &Path) {
    let systems = figures["retrieval"].as_object().unwrap();
    assert_eq!(systems.keys().collect::<Vec<_>>(), ["untrained", "pre-trained", "fine-tuned", "bm25"]);
    for (name, found) in systems {
        let judged = std::fs::read_to_string(folder.join(name).with_extension("json")).unwrap();
        let judged: Value = serde_json::from_str(&judged).unwrap();
        assert_eq!((judged["queries"].as_u64(), judged["judged"].as_u64()), (Some(30), Some(30)), "{name}");
        for metric in ["mrr@10", "ndcg@10", "recall@100"] {
            let figure = found[metric].as_f64().unwrap();
            assert!((0.0..=1.0).contains(&figure), "{name} {metric} {figure}");
            assert_eq!(found[metric], judged[metric], "{name} {metric}");
        }
    }
    let mrr = |name: &str| systems[name]["mrr@10"].as_f64().unwrap();
    assert!(mrr("bm25") > 0.7 && mrr("bm25") > mrr("untrained") + 0.3, "{} {}", mrr("bm25"), mrr("untrained"));
    // The two parts of the queries have none in common and are all of them.
    let ids = |part: &str| -> Vec<String> {
        let text = std::fs::read_to_string(folder.join(format!("{part}-qrels.tsv"))).unwrap();
        text.lines().map(|line| line.split('\t').next().unwrap().to_string()).collect()
    };
    let (mut train, dev) = (ids("train"), ids("dev"));
    assert_eq!((train.len(), dev.len()), (270, 30));
    train.extend(dev);
    train.sort();
    train.dedup();
    assert_eq!(train.len(), 300);
}

#[test]
fn an_interrupted_demo_goes_on_with_the_same_command() {
    let world = tempfile::tempdir().unwrap();
    let (folder, json) = (world.path().join("demo"), world.path().join("demo.json"));
    let child = demo(&folder, "40", &json).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let stopped = interrupt(child, &folder.join("run/metrics.jsonl"));
    assert_eq!(stopped, Some(130));
    assert!(!json.exists());
    let done = demo(&folder, "40", &json).output().unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(text(&done.stderr).contains("resuming from"), "{}", text(&done.stderr));
    assert!(text(&done.stdout).contains("step 40 "), "{}", text(&done.stdout));
}

/// Sends SIGINT once `sign` holds a line, and returns the exit code.
fn interrupt(mut child: Child, sign: &Path) -> Option<i32> {
    let began = Instant::now();
    while !std::fs::metadata(sign).is_ok_and(|m| m.len() > 0) && began.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    child.wait().unwrap().code()
}

#[test]
fn every_subcommand_has_help_and_a_row_in_the_readme() {
    let (names, readme) = (subcommands(), file("README.md"));
    assert!(names.len() >= 7, "{names:?}");
    for name in &names {
        let help = run(&[name, "--help"]);
        assert!(help.status.success(), "{name}: {}", text(&help.stderr));
        assert!(text(&help.stdout).contains(&format!("Usage: retromae-engine {name}")), "{name}");
        assert!(readme.contains(&format!("| `{name}` |")), "README.md has no row for {name}");
    }
    let section = readme.split("\n## ").find(|s| s.starts_with("Commands\n")).unwrap();
    let rows = section.lines().filter(|l| l.starts_with("| `")).count();
    assert_eq!(rows, names.len(), "README.md lists a command that does not exist");
}

#[test]
fn completions_and_manual_pages_name_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let script = text(&run(&["completions", shell]).stdout);
        for name in subcommands() {
            assert!(script.contains(&name), "{shell}: {name}");
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("man1");
    let done = run(&["man", "--output", pages.to_str().unwrap()]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    for name in subcommands() {
        let page = std::fs::read_to_string(pages.join(format!("retromae-engine-{name}.1"))).unwrap();
        assert!(page.contains(".SH OPTIONS") && page.contains(&format!("retromae\\-engine\\-{name}")), "{name}");
    }
    assert!(pages.join("retromae-engine.1").is_file());
    let refused = run(&["completions", "tcsh"]);
    assert_eq!((refused.status.code(), text(&refused.stderr).lines().count()), (Some(2), 1));
}

#[test]
fn the_readme_has_two_commands_and_ci_runs_them() {
    let (readme, ci) = (file("README.md"), file(".ci/run"));
    let section = readme.split("\n## ").find(|s| s.starts_with("Two commands\n")).unwrap();
    let commands: Vec<&str> = section.split("```").skip(1).step_by(2).map(str::trim).collect();
    assert_eq!(commands, ["cargo run --release -- demo", "cargo test --release"]);
    assert!(ci.lines().any(|line| line == "cargo test --release"));
    assert!(ci.contains("demo='cargo run --release -- demo'"));
    assert!(ci.lines().any(|line| line == "cargo fmt --check"));
    assert!(ci.lines().any(|line| line == "cargo clippy --release --all-targets -- -D warnings"));
}

#[test]
fn the_readme_names_flags_and_files_that_exist() {
    let readme = file("README.md");
    let section = readme.split("\n## ").find(|s| s.starts_with("Coming from")).unwrap();
    let mut flags = 0;
    for row in section.lines().filter(|l| l.starts_with("| `--")) {
        for word in row.split('`').filter(|w| w.starts_with("--")) {
            let flag = word.split_whitespace().next().unwrap();
            let told = text(&run(&["train", flag]).stderr);
            assert!(!told.contains("unexpected argument"), "{flag}: {told}");
            flags += 1;
        }
    }
    assert!(flags > 40, "{flags}");
    assert!(text(&run(&["train", "--no-such-flag"]).stderr).contains("unexpected argument"));

    let links = readme.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    for link in links.filter(|l| !l.starts_with("http") && !l.starts_with('#')) {
        assert!(Path::new(ROOT).join(link).exists(), "{link}");
    }
}
