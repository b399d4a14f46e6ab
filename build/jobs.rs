//! Runs compiler commands in parallel, each only when its inputs or its command line changed.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Digest of file contents.
#[derive(Clone, Copy, Hash)]
pub struct Digest(u64);

impl Digest {
    pub fn of_files(paths: &[PathBuf]) -> Result<Digest, String> {
        let mut hasher = DefaultHasher::new();
        for path in paths {
            path.file_name().hash(&mut hasher);
            std::fs::read(path).map_err(|e| format!("{}: cannot read: {e}", path.display()))?.hash(&mut hasher);
        }
        Ok(Digest(hasher.finish()))
    }
}

/// One command that makes one file. Whatever it prints is kept beside the file in `<output>.log`.
pub struct Job {
    pub output: PathBuf,
    program: PathBuf,
    arguments: Vec<std::ffi::OsString>,
    key: String,
}

impl Job {
    /// `program`, with what `arguments` adds, turns `source` (and the headers) into `output`.
    pub fn new(
        source: &Path,
        headers: Digest,
        output: PathBuf,
        arguments: impl FnOnce(&mut Command, &Path),
        program: &Path,
    ) -> Result<Job, String> {
        let mut command = Command::new(program);
        arguments(&mut command, &output);
        let arguments: Vec<_> = command.get_args().map(|a| a.to_os_string()).collect();
        let mut hasher = DefaultHasher::new();
        (program, &arguments, headers, Digest::of_files(&[source.to_path_buf()])?).hash(&mut hasher);
        // A compiler updated in place has another time stamp.
        if let Ok(changed) = std::fs::metadata(program).and_then(|m| m.modified()) {
            changed.hash(&mut hasher);
        }
        Ok(Job { output, program: program.to_path_buf(), arguments, key: format!("{:016x}", hasher.finish()) })
    }

    fn is_done(&self) -> bool {
        self.output.exists() && std::fs::read_to_string(append(&self.output, ".key")).is_ok_and(|k| k == self.key)
    }

    fn run(&self) -> Result<(), String> {
        let key = append(&self.output, ".key");
        let _ = std::fs::remove_file(&key);
        let done = Command::new(&self.program)
            .args(&self.arguments)
            .output()
            .map_err(|e| format!("{}: cannot run: {e}", self.program.display()))?;
        let printed = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        if !done.status.success() {
            let line: Vec<_> = self.arguments.iter().map(|a| a.to_string_lossy()).collect();
            return Err(format!(
                "{}\nfailed ({}): {} {}",
                printed.trim_end(),
                done.status,
                self.program.display(),
                line.join(" ")
            ));
        }
        write(&append(&self.output, ".log"), &printed)?;
        write(&key, &self.key)
    }
}

/// Runs what is not up to date, `parallel` at a time; the first failure is returned.
pub fn run(jobs: &[Job], parallel: usize) -> Result<(), String> {
    let stale: Vec<&Job> = jobs.iter().filter(|j| !j.is_done()).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(job) = stale.get(next.fetch_add(1, Ordering::Relaxed)) {
            job.run()?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..parallel.clamp(1, stale.len().max(1))).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|w| w.join().unwrap_or_else(|_| Err("a compile thread panicked".into())))
    })
}

/// Files of `folder` and below with one of the extensions, sorted.
pub fn files(folder: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, String> {
    let mut found = Vec::new();
    let entries = std::fs::read_dir(folder).map_err(|e| format!("{}: cannot list: {e}", folder.display()))?;
    for entry in entries {
        let path = entry.map_err(|e| format!("{}: cannot list: {e}", folder.display()))?.path();
        if path.is_dir() {
            found.extend(files(&path, extensions)?);
        } else if path.extension().and_then(|e| e.to_str()).is_some_and(|e| extensions.contains(&e)) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

pub fn folder(path: &Path) -> Result<PathBuf, String> {
    std::fs::create_dir_all(path).map_err(|e| format!("{}: cannot create: {e}", path.display()))?;
    Ok(path.to_path_buf())
}

pub fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// `path` with `suffix` behind its name.
pub fn append(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(suffix);
    PathBuf::from(name)
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|e| format!("{}: cannot write: {e}", path.display()))
}
