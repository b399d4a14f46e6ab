//! A user's desk: a folder with texts, pairs and a model's sizes, in which commands are typed.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::{pair_files, texts};

const BINARY: &str = env!("CARGO_BIN_EXE_retromae-engine");

/// The beginning of most commands: two steps of a model from scratch.
pub const TRAIN: &str =
    "retromae-engine train --config-file config.json --device cpu --threads 1 --steps 2 --log-every 1";

/// The same of a bi-encoder, all but the judgements.
pub const PAIRS: &str = "retromae-engine train --config-file config.json --device cpu --threads 1 --steps 2 --log-every 1 \
                         --objective contrastive --queries queries --corpus passages";

/// The folder.
pub struct Desk(tempfile::TempDir);

/// What a process said on standard error.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

impl Desk {
    /// With texts and pairs on it, as files and as shards.
    pub fn new() -> Desk {
        let desk = Desk(tempfile::tempdir().unwrap());
        texts::write(desk.0.path());
        pair_files::write(desk.0.path());
        for (input, output) in [("texts.txt", "shards"), ("queries.tsv", "queries"), ("passages.tsv", "passages")] {
            let tokenize = "retromae-engine tokenize --tokenizer tokenizer --max-length 32";
            desk.works(&format!("{tokenize} --input {input} --output {output}"));
        }
        desk
    }

    /// A path on it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file.
    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// Reads a file.
    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    /// What a command does that is typed here.
    pub fn typed(&self, line: &str) -> Output {
        let programs = Path::new(BINARY).parent().unwrap().display().to_string();
        let path = format!("{programs}:{}", std::env::var("PATH").unwrap_or_default());
        let mut shell = Command::new("sh");
        shell.args(["-c", line]).current_dir(self.path("")).env("PATH", path);
        for name in ["HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"] {
            shell.env_remove(name);
        }
        shell.output().unwrap()
    }

    /// A command that works; what it says.
    #[track_caller]
    pub fn works(&self, line: &str) -> String {
        let done = self.typed(line);
        assert!(done.status.success(), "{line}: {}", stderr(&done));
        String::from_utf8_lossy(&done.stdout).into_owned() + &stderr(&done)
    }

    /// The one line of a command that is refused, without `error: `.
    #[track_caller]
    pub fn refused(&self, line: &str) -> String {
        let done = self.typed(line);
        let said = stderr(&done);
        assert!(matches!(done.status.code(), Some(1 | 2)), "{line}: {said}");
        // What a command says of its progress may stand before, never behind.
        let (last, before) = said.trim_end().rsplit_once('\n').map_or((said.trim_end(), ""), |(b, l)| (l, b));
        assert!(!before.contains("error: ") && !before.contains("panicked"), "{said}");
        let told = last.strip_prefix("error: ").unwrap_or_else(|| panic!("{line}: {said}"));
        assert!(told.contains("; "), "no remedy: {told}");
        told.to_string()
    }

    /// The one line of a command that is refused, which is all it says.
    #[track_caller]
    pub fn refused_at_once(&self, line: &str) -> String {
        assert_eq!(stderr(&self.typed(line)).lines().count(), 1, "{line}");
        self.refused(line)
    }

    /// The warning of a command that works, of those the one with these words, without `warning: `.
    #[track_caller]
    pub fn warned(&self, line: &str, words: &str) -> String {
        let said = self.works(line);
        let mut warnings = said.lines().filter_map(|line| line.strip_prefix("warning: "));
        warnings
            .find(|warning| warning.contains(words))
            .unwrap_or_else(|| panic!("{line}: no warning: {said}"))
            .to_string()
    }
}

/// What stands between `before` and `after` in a line.
#[track_caller]
pub fn between<'a>(line: &'a str, before: &str, after: &str) -> &'a str {
    let rest = line.split_once(before).unwrap_or_else(|| panic!("no {before:?}: {line}")).1;
    rest.split_once(after).map_or(rest, |(found, _)| found)
}
