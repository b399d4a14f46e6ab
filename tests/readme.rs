//! Every command of the README run for real, in its order, in a folder where the files that it names are small ones; its Python run where
//! the packages are; every flag and file that it names is there; the library's own documentation builds without a warning.

#[path = "train/pair_files.rs"]
mod pair_files;
#[path = "readme/text.rs"]
mod text;
#[path = "train/texts.rs"]
mod texts;

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::text::{Block, blocks, code_words, commands, readme};

const BINARY: &str = env!("CARGO_BIN_EXE_retromae-engine");

/// Commands that are not run here, by their beginning, and why.
const LEFT_OUT: [(&str, &str); 7] = [
    ("cargo run --release -- demo", "builds the program; .ci/run does so, and tests/cli_demo.rs runs a short demo"),
    ("cargo test --release", "is what runs this"),
    (
        "retromae-engine train --gpus 8",
        "wants eight GPUs; tests/collective runs ranks of this machine, tests/cuda GPUs that are fakes",
    ),
    ("torchrun", "wants PyTorch on two machines; tests/collective starts ranks by the same variables"),
    ("apt-get install", "changes the machine"),
    ("cargo build --release --features mpi", "builds the program; .ci/run does so where MPI is"),
    ("mpirun", "wants a build with MPI and more machines; tests/collective runs mpirun on this one"),
];

/// What makes a command short: flags behind those that begin so.
const SHORT: [(&str, &str); 13] = [
    ("train ", "--batch-size 4 --device cpu"),
    ("rerank ", "--device cpu"),
    ("encode ", "--device cpu"),
    ("search ", "--device cpu"),
    ("beir ", "--device cpu"),
    ("watch ", "--once"),
    ("bench step --objective", "--device cpu --model mini --steps 1 --warmup 1 --batches 1"),
    ("bench step --workload", "--device cpu --model mini --steps 1 --warmup 1 --batches 1"),
    ("bench kernels", "--device emulator --repeats 1 --copies 1"),
    ("bench data", "--batches 1 --batch-size 4"),
    ("bench encode", "--device cpu --texts 2 --repeats 1"),
    ("bench search", "--device cpu --repeats 1"),
    ("bench compare", "--any-device"),
];

/// Sizes that are smaller here.
const SMALLER: [(&str, &str); 4] = [
    ("--max-length 256", "--max-length 64"),
    ("--only attention", "--only layernorm"),
    ("--model minilm-l6", "--model mini"),
    ("--rows 200000 --width 768", "--rows 2000 --width 64"),
];

/// A folder with what the README's commands name.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Home {
        let home = Home(tempfile::tempdir().unwrap());
        std::fs::create_dir(home.path("")).unwrap();
        texts::write(home.0.path());
        pair_files::write(home.0.path());
        home.model();
        home.texts();
        home.lists();
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join("home").join(name)
    }

    fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        std::fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        std::fs::write(self.path(name), contents).unwrap();
    }

    /// `MODEL`, which has an MLM head, and three runs to be drawn.
    fn model(&self) {
        self.works("tokenize --input ../texts.txt --tokenizer ../tokenizer --max-length 32 --output ../shards");
        let train = "train --config-file ../config.json --data ../shards --device cpu --threads 1 --batch-size 8";
        for objective in ["retromae", "dupmae", "mlm"] {
            self.works(&format!("{train} --objective {objective} --output runs/{objective} --steps 4"));
        }
        std::fs::rename(self.path("runs/retromae/model"), self.path("MODEL")).unwrap();
    }

    /// Queries and passages as JSON lines, and as two data sets of BEIR.
    fn texts(&self) {
        let lines = |name: &str| {
            let text = std::fs::read_to_string(self.0.path().join(name)).unwrap();
            let row = |line: &str| {
                let (id, text) = line.split_once('\t').unwrap();
                serde_json::json!({ "_id": id, "title": "", "text": text }).to_string() + "\n"
            };
            text.lines().map(row).collect::<String>()
        };
        let (queries, corpus) = (lines("queries.tsv"), lines("passages.tsv"));
        self.write("queries.jsonl", &queries);
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut packed, corpus.as_bytes()).unwrap();
        self.write("corpus.jsonl.gz", packed.finish().unwrap());
        for set in ["scifact", "nfcorpus"] {
            self.write(&format!("{set}/queries.jsonl"), &queries);
            self.write(&format!("{set}/corpus.jsonl"), &corpus);
            let judged: String = (0..24).map(|i| format!("q{i}\tp{i}\t1\n")).collect();
            self.write(&format!("{set}/qrels/test.tsv"), format!("query-id\tcorpus-id\tscore\n{judged}"));
        }
    }

    /// Judgements, negatives, and runs of first rounds.
    fn lists(&self) {
        let copy = |from: &str, to: &str| self.write(to, std::fs::read(self.0.path().join(from)).unwrap());
        for to in ["train.tsv", "qrels/test.tsv", "qrels/train.tsv"] {
            copy("qrels.tsv", to);
        }
        copy("negatives.tsv", "negatives.tsv");
        copy("run.trec", "run.trec");
        let mut run = String::new();
        for query in 0..24 {
            (0..40).for_each(|rank| {
                writeln!(run, "q{query} Q0 p{} {} {} x", (query + rank) % 40, rank + 1, 40 - rank).unwrap()
            });
        }
        self.write("train.trec", run);
    }

    fn typed(&self, line: &str) -> Output {
        let programs = Path::new(BINARY).parent().unwrap().display().to_string();
        let path = format!("{programs}:{}", std::env::var("PATH").unwrap_or_default());
        let mut shell = Command::new("sh");
        shell
            .args(["-ec", line])
            .current_dir(self.path(""))
            .env("PATH", path)
            .env("RETROMAE_COMMIT", "abc")
            .output()
            .unwrap()
    }

    /// A command of the engine that works.
    #[track_caller]
    fn works(&self, line: &str) {
        let done = self.typed(&format!("retromae-engine {line}"));
        assert!(done.status.success(), "retromae-engine {line}\n{}", String::from_utf8_lossy(&done.stderr));
    }
}

/// A command of the README as it is run here.
fn shortened(command: &str) -> String {
    let (_, words) = command.split_once(' ').unwrap();
    let mut line = words.to_string();
    SMALLER.iter().for_each(|(from, to)| line = line.replace(from, to));
    let flags: Vec<&str> =
        SHORT.iter().filter(|(start, _)| words.starts_with(start)).map(|(_, flags)| *flags).collect();
    assert!(flags.len() <= 1, "{command}: {flags:?}");
    format!("{line} {}", flags.concat())
}

#[test]
fn every_command_runs() {
    let readme = readme();
    let (home, mut left_out, mut run) = (Home::new(), Vec::new(), 0);
    for command in commands(&readme) {
        if let Some((start, _)) = LEFT_OUT.iter().find(|(start, _)| command.starts_with(start)) {
            left_out.push(*start);
            continue;
        }
        let known = command.starts_with("retromae-engine ");
        assert!(known, "{command}: not run here; run it, or name it in LEFT_OUT with the reason");
        if command.contains("after.jsonl") {
            std::fs::copy(home.path("before.jsonl"), home.path("after.jsonl")).unwrap();
        }
        home.works(&shortened(&command));
        run += 1;
    }
    assert!(run >= 20, "{run} commands were found");
    assert_eq!(left_out, LEFT_OUT.map(|(start, _)| start), "what is left out is in the README, once and in this order");
    for (start, _) in SHORT {
        assert!(readme.contains(&format!("retromae-engine {start}")), "{start:?} is no command of the README");
    }
    for (from, _) in SMALLER {
        assert!(readme.contains(from), "{from:?} is not in the README");
    }
    python(&home, &readme);
}

/// The README's Python, where the packages are; the files that it reads were written by the commands.
fn python(home: &Home, readme: &str) {
    for part in ["0", "1"] {
        let encode = "encode --model MODEL --device cpu --input passages --format faiss-flat";
        home.works(&format!("{encode} --shard {part}/2 --output emb/{part}"));
    }
    let interpreter = std::env::var("RETROMAE_PYTHON").unwrap_or_else(|_| "python3".into());
    let python = |program: &str| {
        let mut command = Command::new(&interpreter);
        command.args(["-c", program]).current_dir(home.path("")).env("HF_HUB_OFFLINE", "1").output()
    };
    let (mut snippets, mut imported) = (0, 0);
    for Block { text, .. } in blocks(readme).into_iter().filter(|block| block.language == "python") {
        // Each import begins a program of its own: one may be there without the other.
        for program in text.split("\n\n") {
            snippets += 1;
            let first = program.lines().next().unwrap();
            assert!(first.starts_with("import ") || first.starts_with("from "), "{program}");
            let modules = first.split_whitespace().nth(1).unwrap().trim_end_matches(',');
            let needs = if modules == "transformers" { "transformers, torch" } else { modules };
            if !python(&format!("import {needs}")).is_ok_and(|done| done.status.success()) {
                eprintln!("left out: no Python with {needs} (set RETROMAE_PYTHON): {first}");
                continue;
            }
            let done = python(program).unwrap();
            assert!(done.status.success(), "{program}\n{}", String::from_utf8_lossy(&done.stderr));
            imported += 1;
        }
    }
    assert!(snippets >= 4, "{snippets} snippets were found");
    if imported > 0 && home.path("corpus.pkl").is_file() {
        let check =
            "import pickle; rows, ids = pickle.load(open('corpus.pkl', 'rb')); assert len(rows) == len(ids) == 40";
        assert!(python(check).unwrap().status.success());
    }
}

/// Flags of other programs that the README names.
const OF_OTHERS: [(&str, &str); 8] = [
    ("--release", "cargo"),
    ("--features", "cargo"),
    ("--hostfile", "mpirun"),
    ("--path", "cargo install"),
    ("--nnodes", "torchrun"),
    ("--nproc-per-node", "torchrun"),
    ("--no-python", "torchrun"),
    ("--use_title", "the published preprocess.py"),
];

#[test]
fn every_flag_and_file_exists() {
    let readme = readme();
    let help = |words: &[&str]| {
        let done = Command::new(BINARY).args(words).arg("--help").output().unwrap();
        assert!(done.status.success(), "{words:?}");
        String::from_utf8(done.stdout).unwrap()
    };
    let listed = |text: &str| -> Vec<String> {
        let lines = text.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
        let names = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
        names
            .filter_map(|line| line.split_whitespace().next())
            .filter(|name| *name != "help")
            .map(String::from)
            .collect()
    };
    let mut all = String::new();
    for command in listed(&help(&[])) {
        let own = help(&[&command]);
        listed(&own).iter().for_each(|inner| all += &help(&[&command, inner]));
        all += &own;
    }
    let known = |flag: &str| all.split(|c: char| !(c.is_alphanumeric() || "-_".contains(c))).any(|word| word == flag);
    // The spelling of the published scripts is hidden in --help; tests/cli_demo.rs types each.
    let own: String = readme.split("\n## ").filter(|section| !section.starts_with("Coming from")).collect();
    let mut flags = 0;
    for flag in code_words(&own).iter().filter(|word| word.starts_with("--") && word.len() > 2) {
        let of_other = OF_OTHERS.iter().any(|(other, _)| other == flag);
        assert!(known(flag) || of_other, "README.md names {flag}, which no --help has");
        flags += 1;
    }
    assert!(flags > 100 && !known("--no-such-flag"), "{flags}");
    for (flag, program) in OF_OTHERS {
        assert!(readme.contains(flag), "{flag} of {program} is not in the README");
    }

    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = ["src/", "tests/", "benches/", "kernels/", "examples/", "assets/"];
    let mut files = 0;
    for word in code_words(&readme).iter().filter(|word| folders.iter().any(|folder| word.starts_with(folder))) {
        assert!(root.join(word).exists(), "README.md names {word}, which does not exist");
        files += 1;
    }
    assert!(files >= 5, "{files}");
    let headings: Vec<String> =
        readme.lines().filter_map(|line| line.trim_start_matches('#').strip_prefix(' ')).map(anchor).collect();
    for link in readme.split("](#").skip(1).filter_map(|rest| rest.split(')').next()) {
        assert!(headings.iter().any(|heading| heading == link), "README.md links to #{link}, which is no heading");
    }
}

/// The name by which a heading is linked to.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

#[test]
fn the_documentation_has_no_warning() {
    let mut cargo = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()));
    cargo.args(["doc", "--release", "--no-deps", "--lib", "--document-private-items", "--quiet"]);
    let done = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).env("RUSTDOCFLAGS", "-D warnings").output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success() && !said.contains("warning: unresolved"), "{said}");
}
