//! Work that goes on where it was interrupted: numbers that have been computed for an output, kept beside it until it is written.
//!
//! ```text
//! .NAME.parts/
//!   state.json     what the work is of: setting by setting, so that what differs can be named
//!   numbers.bin    of every finished part: its size, its f32 numbers, a CRC32C of both
//!   done           all is computed: what has the names of the outputs is ours, or is about to be
//! ```
//!
//! A part that a kill or a full disk cut off, or whose bits have changed, is computed again with all that follow it.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::disk::{Disk, File};
use super::lock::Lock;
use super::{output, parent, sibling};
use crate::error::{Error, IoContext, Result};

const STATE: &str = "state.json";
const NUMBERS: &str = "numbers.bin";
const DONE: &str = "done";
/// Largest state that is read.
const SMALL: u64 = 1 << 20;

/// What a work is of; two of equal settings have equal results.
pub type Settings = BTreeMap<String, String>;

/// The numbers so far. Dropped without any, it leaves nothing behind.
#[derive(Debug)]
pub struct Unfinished {
    dir: PathBuf,
    disk: Disk,
    file: File,
    numbers: Vec<f32>,
    done: bool,
    _lock: Lock,
}

impl Unfinished {
    /// Begins the work for `output`, or goes on with it. Numbers of another work are refused, naming what differs.
    ///
    /// # Errors
    /// Another process is at it, it is another work, or a failure of the system.
    pub fn begin(disk: &Disk, output: &Path, settings: &Settings) -> Result<Unfinished> {
        let dir = sibling(output, ".parts")?;
        let lock = output::claim(disk, &dir)?;
        let path = dir.join(NUMBERS);
        let (mut file, numbers) = read(disk, &path)?;
        let before: Option<Settings> = match dir.join(STATE) {
            state if state.is_file() => serde_json::from_slice(&disk.read_small(&state, SMALL)?).ok(),
            _ => None,
        };
        if before.as_ref() == Some(settings) {
            let done = dir.join(DONE).is_file();
            return Ok(Unfinished { dir, disk: disk.clone(), file, numbers, done, _lock: lock });
        }
        if let Some(before) = before.filter(|_| !numbers.is_empty()) {
            return Err(other(output, &dir, &before, settings));
        }
        disk.remove(&dir.join(DONE))?;
        file.truncate(0)?;
        file.sync()?;
        let text = format!("{:#}\n", serde_json::json!(settings));
        disk.replace(&dir.join(STATE), text.as_bytes())?;
        disk.sync_dir(parent(&dir))?;
        Ok(Unfinished { dir, disk: disk.clone(), file, numbers: Vec::new(), done: false, _lock: lock })
    }

    /// The numbers of all finished parts.
    pub fn numbers(&self) -> &[f32] {
        &self.numbers
    }

    /// Whether all was computed before, so that the outputs may be there.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// Keeps the numbers of the next part.
    ///
    /// # Errors
    /// A failure of the system; the part does not count then.
    pub fn append(&mut self, numbers: &[f32]) -> Result<()> {
        let mut bytes = (numbers.len() as u32).to_le_bytes().to_vec();
        bytes.extend_from_slice(bytemuck::cast_slice(numbers));
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        self.file.put(&bytes)?;
        self.file.sync()?;
        self.numbers.extend_from_slice(numbers);
        Ok(())
    }

    /// Notes that all is computed; from now on the outputs may appear.
    ///
    /// # Errors
    /// A failure of the system.
    pub fn complete(&mut self) -> Result<()> {
        self.disk.replace(&self.dir.join(DONE), b"")?;
        self.done = true;
        Ok(())
    }

    /// Removes what was kept: the outputs are written.
    ///
    /// # Errors
    /// A failure of the system.
    pub fn remove(self) -> Result<()> {
        self.disk.remove(&self.dir)?;
        self.disk.sync_dir(parent(&self.dir))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.numbers.is_empty() {
            // Best effort: the next work for this output removes what is left.
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

fn other(output: &Path, dir: &Path, before: &Settings, now: &Settings) -> Error {
    let of = |settings: &Settings, key: &str| settings.get(key).cloned().unwrap_or("unset".into());
    let keys = before.keys().chain(now.keys()).filter(|key| before.get(*key) != now.get(*key));
    let mut differ: Vec<&String> = keys.collect();
    differ.sort();
    differ.dedup();
    let said: Vec<String> =
        differ.iter().take(3).map(|key| format!("{key} was {}, is {}", of(before, key), of(now, key))).collect();
    let more = if differ.len() > 3 { format!(" and {} more", differ.len() - 3) } else { String::new() };
    Error::refused(format!("is half done with other settings: {}{more}", said.join(", ")))
        .path(output)
        .remedy(format!("give the same ones, or remove {} to begin anew", dir.display()))
}

/// The file of the numbers, cut after its last whole part, and what it holds.
fn read(disk: &Disk, path: &Path) -> Result<(File, Vec<f32>)> {
    let mut file = disk.append(path)?;
    let (mut bytes, mut numbers, mut at) = (Vec::new(), Vec::new(), 0);
    file.read_to_end(&mut bytes).at(path, "cannot read")?;
    while let Some((part, next)) = part(&bytes, at) {
        let words = part.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]]));
        numbers.extend(words);
        at = next;
    }
    if at < bytes.len() {
        file.truncate(at as u64)?;
    }
    Ok((file, numbers))
}

/// The numbers' bytes of the part at `at`, and where the next one begins; none when it is not whole.
fn part(bytes: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let end = at.checked_add(4)?.checked_add((word(at)? as usize).checked_mul(4)?)?;
    let crc = word(end)?;
    (crc32c::crc32c(&bytes[at..end]) == crc).then_some((&bytes[at + 4..end], end + 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_survive_and_what_was_cut_off_does_not() -> Result<()> {
        let folder = tempfile::tempdir().at("temporary folder", "cannot create")?;
        let (disk, output) = (Disk::default(), folder.path().join("run.trec"));
        let settings = |k: &str| Settings::from([("top-k".to_string(), k.to_string())]);
        let mut work = Unfinished::begin(&disk, &output, &settings("10"))?;
        work.append(&[1.0, 2.0])?;
        work.append(&[3.0])?;
        let held = Unfinished::begin(&disk, &output, &settings("10")).err().map(|e| e.to_string());
        assert!(held.is_some_and(|text| text.contains("is writing to this output folder")));
        drop(work);
        let path = folder.path().join(".run.trec.parts").join(NUMBERS);
        let whole = std::fs::read(&path).at(&path, "cannot read")?;
        for (cut, expected) in [(whole.len(), 3), (whole.len() - 1, 2), (13, 0), (0, 0)] {
            std::fs::write(&path, &whole[..cut]).at(&path, "cannot write")?;
            let work = Unfinished::begin(&disk, &output, &settings("10"))?;
            assert_eq!(work.numbers(), &[1.0, 2.0, 3.0][..expected]);
            drop(work);
            std::fs::create_dir_all(parent(&path)).at(&path, "cannot create")?;
            let state = format!("{:#}\n", serde_json::json!(settings("10")));
            std::fs::write(path.with_file_name(STATE), state).at(&path, "cannot write")?;
        }
        let mut changed = whole.clone();
        changed[5] ^= 1;
        std::fs::write(&path, &changed).at(&path, "cannot write")?;
        assert!(Unfinished::begin(&disk, &output, &settings("10"))?.numbers().is_empty());
        // Another work is refused while there is something to lose.
        let mut work = Unfinished::begin(&disk, &output, &settings("10"))?;
        work.append(&[4.0])?;
        drop(work);
        let refused =
            Unfinished::begin(&disk, &output, &settings("20")).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(
            refused.contains("is half done with other settings: top-k was 10, is 20; give the same ones"),
            "{refused}"
        );
        Unfinished::begin(&disk, &output, &settings("10"))?.remove()?;
        assert!(Unfinished::begin(&disk, &output, &settings("20"))?.numbers().is_empty());
        assert_eq!(disk.list(folder.path())?, Vec::<String>::new());
        Ok(())
    }
}
