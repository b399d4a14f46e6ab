//! `bench` through the binary: what each measurement leaves behind, what two of them are compared to, what is refused.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use retromae_engine::data::shard::{Counts, Packing, SetSpec, SetWriter, Special, TitleSep};
use serde_json::{Value, json};

fn bench(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_retromae-engine"));
    command.arg("bench").args(args).env("RETROMAE_COMMIT", "abc").output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What every measurement says of itself.
const FACTS: [&str; 10] =
    ["bench", "case", "ms", "repeats", "device", "device_name", "threads", "engine", "commit", "command"];

/// Runs a measurement and gives its objects, each of which has the facts and these keys. The table has as many rows.
#[track_caller]
fn measured(args: &[&str], keys: &[&str]) -> Vec<Value> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.jsonl");
    let output = bench(&[args, &["--json", path.to_str().unwrap()]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for line in &lines {
        for key in FACTS.iter().chain(keys) {
            assert!(!line[key].is_null(), "{key}: {line}");
        }
        assert!(line["ms"].as_f64().unwrap() > 0.0 && line["commit"] == "abc" && line["bench"] == args[0], "{line}");
        assert!(line["command"].as_str().unwrap().ends_with(path.to_str().unwrap()), "{line}");
    }
    let printed = String::from_utf8(output.stdout).unwrap();
    let rows = printed.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| ---")).count();
    let heads = printed.lines().filter(|line| line.starts_with("| ---")).count();
    assert_eq!((rows - heads, heads > 0), (lines.len(), true), "{printed}");
    lines
}

const STEP: [&str; 14] = [
    "mode",
    "workload",
    "model",
    "objective",
    "precision",
    "sequences",
    "real_tokens",
    "ms_p10",
    "ms_p90",
    "tokens_per_s",
    "model_tflop",
    "tflops",
    "first_loss",
    "planned_gib",
];

#[test]
fn steps_in_the_emulator_beside_a_product() {
    let args =
        ["step", "--device", "emulator", "--workload", "full512", "--steps", "1", "--warmup", "1", "--batches", "1"];
    let lines = measured(&args, &[&STEP[..], &["mfu", "matmul_ceiling_tflops", "masked_rows"]].concat());
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0]["case"], "step retromae mini full512 bf16");
    assert_eq!((&lines[0]["mode"], &lines[0]["real_tokens"]), (&json!("engine"), &json!(256)));
}

#[test]
fn steps_of_every_objective_on_the_cpu() {
    let common = ["step", "--device", "cpu", "--model", "mini", "--steps", "1", "--warmup", "1"];
    let all = measured(&common, &STEP);
    let cases: Vec<&str> = all.iter().map(|line| line["case"].as_str().unwrap()).collect();
    assert_eq!(
        cases,
        ["step retromae mini full512 fp32", "step retromae mini passages fp32", "step contrastive mini finetune fp32"]
    );
    for (objective, cases) in [("mlm", 2), ("dupmae", 2), ("contrastive", 1)] {
        let lines = measured(&[&common[..], &["--objective", objective]].concat(), &STEP);
        assert_eq!((lines.len(), &lines[0]["objective"]), (cases, &json!(objective)));
    }
}

/// The object of a breakdown, its table, and its picture.
fn breakdown(args: &[&str]) -> (Value, String, String) {
    let dir = tempfile::tempdir().unwrap();
    let [json, svg] = ["out.jsonl", "out.svg"].map(|name| dir.path().join(name).to_str().unwrap().to_string());
    let common = ["step", "--steps", "2", "--warmup", "2", "--batches", "1", "--json", &json, "--svg", &svg];
    let output = bench(&[&common[..], args].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let line = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    (line, String::from_utf8(output.stdout).unwrap(), std::fs::read_to_string(svg).unwrap())
}

#[test]
fn a_step_stage_by_stage() {
    for (device, objective, workload) in
        [("emulator", "retromae", "full512"), ("cpu", "dupmae", "passages"), ("emulator", "contrastive", "finetune")]
    {
        let args = ["--device", device, "--model", "mini", "--objective", objective, "--workload", workload];
        let (line, table, svg) = breakdown(&args);
        let parts = &line["breakdown"];
        let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{value}: {line}"));
        let stages = parts["stages"].as_array().unwrap();
        let sum: f64 = stages.iter().map(|stage| number(&stage["ms"])).sum();
        assert!((sum - number(&parts["sum_ms"])).abs() < 1e-9 * sum);
        // Each total is a median of two steps, the sum is one of medians.
        assert!(sum > 0.0 && number(&parts["stages_ms"]) > 0.0 && number(&parts["kernels_ms"]) > 0.0);
        assert_eq!(number(&parts["recorded_ms"]), number(&line["ms"]));
        let shares: f64 = stages.iter().map(|stage| number(&stage["share"])).sum();
        assert!((shares - 1.0).abs() < 1e-9, "{shares}");
        for stage in stages {
            let name = stage["stage"].as_str().unwrap();
            assert!(table.contains(&format!("| {name} | {} |", stage["launches"])), "{name}: {table}");
            assert_eq!(stage["floor_ms"].is_null(), name == "uploads and results", "{stage}");
            assert!(svg.contains(&format!("<title>{}: ", name)), "{name} is drawn");
        }
        let flop: f64 = stages.iter().filter_map(|stage| stage["tflop"].as_f64()).sum();
        assert!((flop / number(&line["required_tflop"]) - 1.0).abs() < 1e-9);
        let kernels = parts["kernels"].as_array().unwrap();
        if device == "emulator" {
            let launches: u64 = kernels.iter().map(|kernel| kernel["launches"].as_u64().unwrap()).sum();
            assert_eq!(Some(launches), line["launches"].as_u64(), "launches by the formulas and by the trace");
        }
        assert!(kernels.iter().any(|kernel| kernel["kernel"] == "product TN" && kernel["phase"] == "backward"));
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && svg.contains("step "), "{svg}");
    }
}

#[test]
fn results_tell_the_machine_before_and_after() {
    let lines = measured(&["data", "--objective", "mlm", "--batches", "1"], &["environment", "dirty"]);
    for when in ["before", "after"] {
        let state = &lines[0]["environment"][when];
        assert!(state["processor"]["logical_cores"].as_u64().unwrap() > 0, "{state}");
        assert!(state["processor"]["load_average"][0].as_f64().is_some() && state["gpu"].is_null(), "{state}");
    }
}

#[test]
fn kernels_in_the_emulator() {
    let args = ["kernels", "--device", "emulator", "--only", "layernorm", "--repeats", "1"];
    let keys = ["kernel", "model", "gb_per_s", "copy_ceiling_gb_per_s", "matmul_ceiling_tflops", "copies", "precision"];
    let lines = measured(&args, &keys);
    assert_eq!(
        lines.iter().map(|l| l["kernel"].as_str().unwrap()).collect::<Vec<_>>(),
        ["layernorm forward", "layernorm backward"]
    );
}

/// A set of 20 texts of 12 tokens.
fn shards(dir: &Path) -> PathBuf {
    let spec = SetSpec {
        max_length: 16,
        vocab_size: 1000,
        special: Special { cls: 1, sep: 2, mask: 3, pad: 0, unk: 4 },
        packing: Packing::Docs,
        title_sep: TitleSep::None,
        fingerprint: [0; 32],
        shard_tokens: 1 << 20,
    };
    let dir = dir.join("shards");
    std::fs::create_dir(&dir).unwrap();
    let mut writer = SetWriter::new(&dir, &spec);
    for text in 0..20u32 {
        let words = (0..10).map(|word| 10 + (text * 31 + word) % 900);
        writer.push(&text.to_string(), [1].into_iter().chain(words).chain([2]).map(|id| (id, true))).unwrap();
    }
    writer.finish(Counts::default()).unwrap();
    dir
}

#[test]
fn data_from_shards_from_memory_and_of_pairs() {
    let dir = tempfile::tempdir().unwrap();
    let shards = shards(dir.path());
    let common = ["data", "--threads", "2", "--batches", "3", "--batch-size", "4"];
    let of_shards = [&common[..], &["--data", shards.to_str().unwrap()]].concat();
    let lines = measured(&of_shards, &["batches_per_s", "tokens_per_s", "tokens_per_s_per_core", "data", "tokens"]);
    assert_eq!(
        lines.iter().map(|l| (l["threads"].as_u64(), l["tokens"].as_u64())).collect::<Vec<_>>(),
        [(Some(1), Some(3 * 4 * 12)), (Some(2), Some(3 * 4 * 12))]
    );
    assert_eq!(measured(&common, &["tokens_per_s"]).len(), 5);
    assert_eq!(measured(&["data", "--objective", "mlm", "--batches", "1"], &["tokens_per_s"]).len(), 5);
}

#[test]
fn encoding_with_random_weights() {
    for (device, precision) in [("cpu", "fp32"), ("emulator", "bf16")] {
        let args = ["encode", "--device", device, "--model", "mini", "--texts", "5", "--repeats", "1"];
        let lines = measured(&args, &["texts", "tokens", "texts_per_s", "tokens_per_s", "model"]);
        assert_eq!(lines[0]["case"], format!("encode mini 5 texts {precision}"));
    }
}

#[test]
fn searching_keeps_vectors_where_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let keep = dir.path().join("vectors");
    let args = |rows| {
        let common = ["search", "--queries", "2", "--width", "8", "--top-k", "3", "--repeats", "2", "--rows", rows];
        [&common[..], &["--device", "cpu", "--keep", keep.to_str().unwrap()]].concat()
    };
    let lines = measured(&args("40"), &["queries", "rows", "width", "top_k", "gflops", "precision"]);
    assert_eq!((&lines[0]["case"], &lines[0]["repeats"]), (&json!("search 2 x 40 x 8, top 3 fp32"), &json!(2)));
    assert!(keep.join("d/meta.json").is_file() && keep.join("run.trec").is_file());
    let refused = bench(&args("41"));
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("holds 40 rows of 8, not 41 of 8; name another folder"), "{}", stderr(&refused));
}

/// Writes results: case, milliseconds, device.
fn results(dir: &Path, name: &str, lines: &[(&str, f64, &str)]) -> String {
    let path = dir.join(name);
    let line = |(case, ms, device): &(&str, f64, &str)| {
        format!(
            "{}\n",
            json!({ "case": case, "ms": ms, "device": format!("{device} (driver)"), "device_name": device })
        )
    };
    std::fs::write(&path, lines.iter().map(line).collect::<String>()).unwrap();
    path.to_str().unwrap().into()
}

#[test]
fn comparing_finds_the_worst_case() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name, lines: &[_]| results(dir.path(), name, lines);
    let before = of("a", &[("gelu", 1.0, "X"), ("norm", 2.0, "X"), ("gone", 1.0, "X"), ("norm", 2.0, "X")]);
    let after = of("b", &[("norm", 2.2, "X"), ("gelu", 1.04, "X")]);
    let equal = bench(&["compare", &before, &before]);
    assert!(equal.status.success() && stderr(&equal).is_empty(), "{}", stderr(&equal));
    assert!(String::from_utf8_lossy(&equal.stdout).contains("| norm | 2.0000 | 2.0000 | 1.000 |"));

    let json = dir.path().join("pairs.json");
    let loss = bench(&["compare", &before, &after, "--json", json.to_str().unwrap()]);
    assert_eq!(loss.status.code(), Some(1));
    let told = stderr(&loss);
    assert!(told.contains(&format!("note: only in {before}: gone\n")), "{told}");
    assert!(
        told.contains("error: norm takes 10.0 % longer, 2.0000 ms before and 2.2000 ms now; find out why"),
        "{told}"
    );
    let pairs: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(pairs["cases"].as_array().unwrap().len(), 2);
    assert!(bench(&["compare", &before, &after, "--fail-above", "11"]).status.success());
    assert!(bench(&["compare", &after, &before]).status.success(), "faster is no loss");
}

#[test]
fn comparing_what_cannot_be_compared() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name, lines: &[_]| results(dir.path(), name, lines);
    let (a, other_case) = (of("a", &[("gelu", 1.0, "X")]), of("c", &[("norm", 1.0, "X")]));
    let other_device = of("d", &[("gelu", 1.0, "Y")]);
    let refused = |args: &[&str], code: i32, what: &str| {
        let output = bench(&[&["compare"], args].concat());
        let told = stderr(&output);
        assert!(output.status.code() == Some(code) && told.contains(what) && told.lines().count() == 1, "{told}");
    };
    refused(&[&a, &other_case], 1, "no case in common with");
    refused(&[&a, &other_device], 1, "gelu was timed on Y, in");
    refused(&[&a, &dir.path().join("none").to_string_lossy()], 1, "none: cannot read");
    refused(&[&a, &of("empty", &[])], 1, "holds no results");
    refused(&[&a, &of("zero", &[("gelu", 0.0, "X")])], 1, "zero:1: gelu has no time");
    refused(&[&a, &a, "--fail-above", "NaN"], 2, "no percentage");
    let anyway = bench(&["compare", &a, &other_device, "--any-device"]);
    assert!(anyway.status.success() && stderr(&anyway).contains("note: X (driver) against Y (driver)"));
}

#[test]
fn wrong_input_is_one_line() {
    let refused = |args: &[&str], code: i32, what: &str| {
        let output = bench(args);
        let told = stderr(&output);
        assert!(output.status.code() == Some(code) && told.contains(what) && told.lines().count() == 1, "{told}");
    };
    refused(&["step", "--workload", "novels"], 2, "novels");
    refused(&["step", "--steps", "0", "--device", "cpu"], 2, "--steps");
    refused(&["step", "--device", "cpu", "--model", "mini", "--svg", "x"], 2, "--svg: one picture of one step");
    let nowhere = ["step", "--device", "cpu", "--model", "mini", "--workload", "full512", "--svg", "nowhere/x"];
    refused(&nowhere, 1, "nowhere/x: cannot create");
    refused(&["step", "--model", "huge", "--device", "cpu"], 2, "no configuration is called \"huge\"");
    let wrong = ["step", "--device", "cpu", "--model", "mini", "--objective", "mlm", "--workload", "finetune"];
    refused(&wrong, 2, "use --objective contrastive");
    refused(&["kernels", "--device", "cpu"], 2, "the kernels need a GPU");
    refused(&["kernels", "--device", "emulator", "--only", "no such kernel"], 2, "no kernel's name contains");
    refused(&["data", "--data", "nowhere"], 1, "nowhere");
    refused(&["data", "--objective", "contrastive"], 2, "no masks");
    refused(&["encode", "--device", "cpu", "--model", "./nowhere"], 1, "nowhere");
    refused(&["search", "--device", "cpu", "--rows", "0"], 2, "--rows");
    refused(&["encode", "--device", "cpu", "--model", "mini", "--json", "nowhere/out"], 1, "nowhere/out: cannot open");
}
