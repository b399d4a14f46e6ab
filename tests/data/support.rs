//! Running the binary and making small inputs.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use retromae_engine::data::shard::ShardSet;

/// What a run of the binary left behind.
pub struct Ran {
    /// Exit code; `None` for a death by signal.
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ran {
    /// The one error line, after checking that it is one and that the exit code is `code`.
    #[track_caller]
    pub fn error(&self, code: i32) -> &str {
        let errors: Vec<&str> =
            self.err.lines().filter(|l| !l.starts_with("warning: ") && !l.contains(": plain text")).collect();
        let errors: Vec<&str> =
            errors.into_iter().filter(|l| !l.ends_with("JSON lines") && !l.ends_with("columns")).collect();
        assert_eq!(self.code, Some(code), "{}", self.err);
        assert_eq!(errors.len(), 1, "{}", self.err);
        assert!(errors[0].starts_with("error: ") && errors[0].contains("; "), "{}", self.err);
        &errors[0]["error: ".len()..]
    }

    #[track_caller]
    pub fn ok(self) -> Ran {
        assert_eq!(self.code, Some(0), "{}", self.err);
        self
    }
}

pub fn binary() -> &'static str {
    env!("CARGO_BIN_EXE_retromae-engine")
}

/// The tokenizer of a real model, and what it must give.
pub fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/minilm")
}

pub fn run<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Ran {
    finish(Command::new(binary()).args(args).stdin(Stdio::null()))
}

pub fn finish(command: &mut Command) -> Ran {
    let out = command.output().expect("the binary starts");
    let text = |b: Vec<u8>| String::from_utf8(b).expect("output is UTF-8");
    Ran { code: out.status.code(), out: text(out.stdout), err: text(out.stderr) }
}

/// A folder for one test.
pub struct Dir(tempfile::TempDir);

impl Dir {
    pub fn new() -> Dir {
        Dir(tempfile::tempdir().expect("a temporary folder"))
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn arg(&self, name: &str) -> String {
        self.at(name).to_str().expect("a UTF-8 path").into()
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.at(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
        std::fs::write(&path, bytes).expect("a file");
        path
    }

    /// Names in the folder, hidden ones too, sorted.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).expect("a folder");
        let mut names: Vec<_> =
            entries.map(|e| e.expect("an entry").file_name().into_string().expect("UTF-8")).collect();
        names.sort();
        names
    }

    /// Runs `tokenize` on a file of this folder into `out`, with more arguments.
    pub fn tokenize(&self, input: &str, out: &str, more: &[&str]) -> Ran {
        let (input, out) = (if input == "-" { "-".into() } else { self.arg(input) }, self.arg(out));
        let tokenizer = golden();
        let mut args = vec!["tokenize", "--input", &input, "--output", &out, "--threads", "2"];
        args.extend(["--tokenizer", tokenizer.to_str().expect("UTF-8")]);
        args.extend(more);
        run(&args)
    }

    pub fn open(&self, name: &str) -> ShardSet {
        ShardSet::open(&self.at(name)).unwrap_or_else(|e| panic!("{e}"))
    }
}

/// All sequences of a set: id and tokens.
pub fn sequences(set: &ShardSet) -> Vec<(Option<String>, Vec<u32>)> {
    let one = |i| {
        let mut tokens = Vec::new();
        set.text(i).expect("a text").copy_tokens(&mut tokens);
        (set.id(i).expect("an id").map(str::to_owned), tokens)
    };
    (0..set.len()).map(one).collect()
}

pub fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut w = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    w.write_all(bytes).expect("compression");
    w.finish().expect("compression")
}

pub fn zst(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).expect("compression")
}
