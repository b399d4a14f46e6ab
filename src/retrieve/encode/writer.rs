//! The folder of embeddings while it is made.
//!
//! Rows go to `embeddings-00000.npy` and on, and to the files of further columns beside, each complete and durable before `progress.json`
//! names it; ids to `ids.txt.part`, which is cut to what `progress.json` says when the work goes on. `meta.json` comes last: without it
//! nobody takes the folder for complete.

use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::super::embeddings::{Column, Files, IDS, Layout, META, Meta, Part, Spec};
use super::super::npy::{FAISS_HEADER, HEADER, faiss_header, header};
use super::super::representation::Embedded;
use super::{Job, describe, pyserini};
use crate::error::{Error, Result};
use crate::files::disk::File;
use crate::files::sealed::{self, Sealed};
use crate::files::{Disk, Lock};

/// What is done of a folder.
const PROGRESS: &str = "progress.json";
/// Largest of these that is read.
const LARGEST: u64 = 64 << 20;
const PARTIAL_IDS: &str = "ids.txt.part";
const FAISS: &str = "index.faiss";

/// `progress.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    spec: Spec,
    layout: Layout,
    rows_per_file: u64,
    source: String,
    #[serde(flatten)]
    files: Files,
    /// SHA-256 of the input up to the last row of the files.
    digest: String,
    ids_bytes: u64,
    ids_crc: u32,
}

/// The file of a column that is being filled, and the digest of what was written to it.
type Open = (Column, File, u32);

/// Writes the folder.
pub(super) struct Writer<'j> {
    disk: Disk,
    dir: PathBuf,
    job: &'j Job,
    state: State,
    ids: File,
    /// The part that is being filled: its rows, and the files of its columns.
    open: Option<(u64, Vec<Open>)>,
    bytes: Vec<u8>,
    _lock: Lock,
}

impl<'j> Writer<'j> {
    /// Begins the folder, or goes on.
    pub fn open(disk: &Disk, dir: &Path, job: &'j Job, source: &str) -> Result<Writer<'j>> {
        if dir.exists() && !dir.is_dir() {
            return Err(Error::refused("exists and is not a folder").path(dir).remedy("choose another --output"));
        }
        disk.create_dir(dir)?;
        let ours = Meta::is_at(dir) || is_begun(dir);
        // What a run leaves that is killed before it says what it will do.
        let early = [crate::files::lock::FILE, PARTIAL_IDS, ".progress.json.tmp"];
        let others = disk.list(dir)?.into_iter().any(|name| !early.contains(&name.as_str()));
        if others && !ours {
            return Err(Error::refused(format!("is not used: it holds files and no {META} of this program"))
                .path(dir)
                .remedy("choose another --output or remove the folder yourself"));
        }
        let lock = Lock::acquire(dir)?;
        if ours && job.overwrite {
            remove_all(disk, dir)?;
        }
        let fresh = State {
            spec: job.spec.clone(),
            layout: job.layout,
            rows_per_file: job.rows_per_file(),
            source: source.to_string(),
            files: Files::default(),
            digest: String::new(),
            ids_bytes: 0,
            ids_crc: 0,
        };
        let state = if is_begun(dir) { read(disk, dir)? } else { fresh.clone() };
        if let Some((what, was, now)) = state.difference(&fresh) {
            return Err(Error::refused(format!("was begun with {what} {was}; now it is {now}"))
                .path(dir)
                .remedy("use the same settings, or begin anew with --overwrite"));
        }
        let mut ids = disk.append(&dir.join(PARTIAL_IDS))?;
        if ids.size()? < state.ids_bytes {
            return Err(Error::refused("is shorter than progress.json says")
                .path(dir.join(PARTIAL_IDS))
                .remedy("begin anew with --overwrite"));
        }
        ids.truncate(state.ids_bytes)?;
        let writer = Writer {
            disk: disk.clone(),
            dir: dir.to_path_buf(),
            job,
            state,
            ids,
            open: None,
            bytes: Vec::new(),
            _lock: lock,
        };
        writer.save()?;
        Ok(writer)
    }

    /// Rows in complete files.
    pub fn rows(&self) -> u64 {
        self.state.files.rows(&self.state.spec)
    }

    /// Whether the input up to the last of these rows has the digest that it had.
    pub fn agrees_with(&self, digest: &str) -> bool {
        self.state.digest == digest
    }

    /// Appends rows, of one part all; `digest` is that of the input up to the last of them.
    pub fn push(&mut self, ids: &[String], rows: &Embedded, digest: &str) -> Result<()> {
        let spec = &self.job.spec;
        let (before, mut open) = match self.open.take() {
            Some(open) => open,
            None => {
                let begin = |column: &Column| -> Result<_> {
                    let mut file = self.disk.create(&self.temporary(*column))?;
                    file.put(&[0; HEADER])?;
                    Ok((*column, file, 0))
                };
                (0, Column::of(spec).iter().map(begin).collect::<Result<_>>()?)
            }
        };
        for (column, file, crc) in &mut open {
            self.bytes.clear();
            if let Err(at) = column.encode(spec, rows, &mut self.bytes) {
                let (id, numbers) = (&ids[at / column.width(spec)], [&rows.dense, &rows.weights]);
                let value = numbers[usize::from(*column == Column::Weights)][at];
                return Err(Error::refused(format!("the embedding of {id} has {value} in it, too large for f16"))
                    .remedy("store f32, or normalize"));
            }
            file.put(&self.bytes)?;
            *crc = crc32c::crc32c_append(*crc, &self.bytes);
        }
        self.bytes.clear();
        for id in ids {
            self.bytes.extend_from_slice(id.as_bytes());
            self.bytes.push(b'\n');
        }
        self.ids.put(&self.bytes)?;
        self.state.ids_bytes += self.bytes.len() as u64;
        self.state.ids_crc = crc32c::crc32c_append(self.state.ids_crc, &self.bytes);
        self.state.digest = digest.to_string();
        let rows = before + ids.len() as u64;
        self.open = Some((rows, open));
        if rows >= self.state.rows_per_file { self.close() } else { Ok(()) }
    }

    /// Where the open file of a column is written.
    fn temporary(&self, column: Column) -> PathBuf {
        self.dir.join(temporary(column))
    }

    /// Makes the open files a part.
    fn close(&mut self) -> Result<()> {
        let Some((rows, open)) = self.open.take() else { return Ok(()) };
        let (spec, number) = (&self.job.spec, self.state.files.parts(&self.job.spec).len());
        let mut parts = Vec::new();
        for (column, mut file, crc) in open {
            let head = column.header(spec, rows);
            file.put_at(&head, 0)?;
            file.sync()?;
            let crc = crc32c::crc32c_combine(crc32c::crc32c(&head), crc, rows as usize * column.row(spec));
            parts.push((column, Part { file: format!("{}-{number:05}.npy", column.stem()), rows, crc }));
        }
        self.ids.sync()?;
        for (column, part) in parts {
            self.disk.rename(&self.temporary(column), &self.dir.join(&part.file))?;
            self.state.files.push(column, part);
        }
        self.disk.sync_dir(&self.dir)?;
        self.save()
    }

    fn save(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.state)
            .map_err(|e| Error::refused(format!("the progress cannot be described: {e}")).remedy("report this"))?;
        self.disk.replace(&self.dir.join(PROGRESS), sealed::seal(&text).as_bytes())
    }

    /// Completes the folder; `digest` is that of the whole input.
    pub fn finish(mut self, digest: &str) -> Result<()> {
        self.close()?;
        let mut files = std::mem::take(&mut self.state.files);
        let old = files.shards.clone();
        match self.job.layout {
            Layout::Npy => {}
            Layout::FaissFlat | Layout::Retromae => files.shards = vec![self.join(&old)?],
            Layout::Pyserini => files.pyserini = self.pyserini(&files)?,
        }
        self.ids.sync()?;
        let text = describe(self.job, digest, self.state.ids_crc, files.clone()).text()?;
        // The ids keep their old name until the description is there: killed before, the work goes on.
        self.disk.replace(&self.dir.join(IDS), &self.read_ids()?)?;
        if self.job.layout == Layout::Retromae {
            self.offsets(&files.shards[0])?;
        }
        self.disk.replace(&self.dir.join(META), text.as_bytes())?;
        remove_parts(&self.disk, &self.dir, self.job.layout, &old)
    }

    fn read_ids(&self) -> Result<Vec<u8>> {
        self.disk.read_small(&self.dir.join(PARTIAL_IDS), self.state.ids_bytes)
    }

    /// All rows in one file of another layout.
    fn join(&self, parts: &[Part]) -> Result<Part> {
        let (spec, rows) = (&self.job.spec, parts.iter().map(|part| part.rows).sum());
        let (name, head): (String, Vec<u8>) = match self.job.layout {
            Layout::FaissFlat => (FAISS.into(), faiss_header(rows, spec.dim as u32).to_vec()),
            _ => (format!("{0}_reps/{0}.npy", spec.side), header(spec.dtype, rows, spec.dim).to_vec()),
        };
        debug_assert!([FAISS_HEADER, HEADER].contains(&head.len()));
        let path = self.dir.join(&name);
        let folder = path.parent().unwrap_or(&self.dir).to_path_buf();
        self.disk.create_dir(&folder)?;
        let temporary = folder.join(".joined.tmp");
        let mut to = self.disk.create(&temporary)?;
        to.put(&head)?;
        let mut crc = crc32c::crc32c(&head);
        let mut buffer = vec![0; 1 << 20];
        for part in parts {
            let from_path = self.dir.join(&part.file);
            let mut from = self.disk.open(&from_path)?;
            let read = |e: std::io::Error| Error::io(&from_path, "cannot read", &e);
            from.seek(SeekFrom::Start(HEADER as u64)).map_err(read)?;
            loop {
                let n = std::io::Read::read(&mut from, &mut buffer).map_err(read)?;
                if n == 0 {
                    break;
                }
                crc = crc32c::crc32c_append(crc, &buffer[..n]);
                to.put(&buffer[..n])?;
            }
        }
        to.sync()?;
        self.disk.rename(&temporary, &path)?;
        self.disk.sync_dir(&folder)?;
        Ok(Part { file: name, rows, crc })
    }

    /// The lexical embeddings as Pyserini reads them, a file for each part.
    fn pyserini(&self, files: &Files) -> Result<Vec<Part>> {
        let ids = self.read_ids()?;
        let mut ids = ids.split(|b| *b == b'\n');
        let folder = self.dir.join(pyserini::FOLDER);
        self.disk.create_dir(&folder)?;
        let mut written = Vec::new();
        for (i, of) in files.lexical_ids.iter().zip(&files.lexical_weights).enumerate() {
            let (temporary, name) = (folder.join(".vectors.tmp"), format!("vectors-{i:05}.jsonl"));
            let from = [of.0, of.1].map(|part| self.dir.join(&part.file));
            let mut to = self.disk.create(&temporary)?;
            let crc = pyserini::write(&self.disk, self.job, from, of.0.rows, &mut ids, &mut to)?;
            to.sync()?;
            self.disk.rename(&temporary, &folder.join(&name))?;
            written.push(Part { file: format!("{}/{name}", pyserini::FOLDER), rows: of.0.rows, crc });
        }
        self.disk.sync_dir(&folder)?;
        Ok(written)
    }

    /// The published code's list of ids: `offset\tid`.
    fn offsets(&self, part: &Part) -> Result<()> {
        let ids = self.read_ids()?;
        let mut text = Vec::with_capacity(ids.len() * 2);
        for (offset, id) in ids.split(|b| *b == b'\n').take(part.rows as usize).enumerate() {
            // Writing to memory does not fail.
            let _ = write!(text, "{offset}\t");
            text.extend_from_slice(id);
            text.push(b'\n');
        }
        let side = &self.job.spec.side;
        let path = self.dir.join(format!("{side}_reps/offset2{side}id.txt"));
        self.disk.replace(&path, &text)
    }
}

/// The first setting in which two descriptions differ: what, and both values.
fn difference(was: (&Spec, Layout), now: (&Spec, Layout)) -> Option<(String, String, String)> {
    let fields = |(spec, layout): (&Spec, Layout)| {
        let value = serde_json::to_value(spec).unwrap_or_default();
        let mut spec = value.as_object().cloned().unwrap_or_default();
        // Left out where they are these.
        for (key, usual) in [("representation", json!("cls")), ("lexical_top_k", json!(0)), ("vocab_size", json!(0))] {
            spec.entry(key).or_insert(usual);
        }
        // The name of a model may change; its digest says whether it is another.
        let named = spec.into_iter().filter(|(key, _)| key != "model").map(|(key, value)| (key, value.to_string()));
        named.chain([("layout".into(), format!("{layout:?}"))]).collect::<Vec<(String, String)>>()
    };
    let pair = fields(was).into_iter().zip(fields(now)).find(|(a, b)| a != b);
    pair.map(|((what, was), (_, now))| (what, was, now))
}

impl State {
    /// The first setting that differs from `now`: what, was, is.
    fn difference(&self, now: &State) -> Option<(String, String, String)> {
        difference((&self.spec, self.layout), (&now.spec, now.layout)).or_else(|| {
            let others =
                |state: &State| [("rows a file", state.rows_per_file.to_string()), ("the input", state.source.clone())];
            let pair = others(self).into_iter().zip(others(now)).find(|(a, b)| a != b);
            pair.map(|((what, was), (_, now))| (what.to_string(), was, now))
        })
    }
}

/// The description of a folder that is complete already, and of the same job; what it was made from is removed if a run was killed
/// before it did so.
pub(super) fn complete(disk: &Disk, dir: &Path, job: &Job) -> Result<Option<Meta>> {
    if job.overwrite || !Meta::is_at(dir) {
        return Ok(None);
    }
    let _lock = Lock::acquire(dir)?;
    let meta = Meta::read(dir)?;
    if let Some((what, was, now)) = difference((&meta.spec, meta.layout), (&job.spec, job.layout)) {
        return Err(Error::refused(format!("holds embeddings with {what} {was}; now it is {now}"))
            .path(dir)
            .remedy("choose another --output or add --overwrite"));
    }
    if dir.join(PROGRESS).is_file() {
        remove_parts(disk, dir, job.layout, &read(disk, dir)?.files.shards)?;
    }
    Ok(Some(meta))
}

/// Removes what a complete folder was made from.
fn remove_parts(disk: &Disk, dir: &Path, layout: Layout, parts: &[Part]) -> Result<()> {
    if matches!(layout, Layout::FaissFlat | Layout::Retromae) {
        parts.iter().try_for_each(|part| disk.remove(&dir.join(&part.file)))?;
    }
    // The list of the parts last: as long as there is one, they can be found.
    [PARTIAL_IDS, PROGRESS].iter().try_for_each(|name| disk.remove(&dir.join(name)))?;
    disk.sync_dir(dir)
}

/// Whether an encode into `dir` was begun and not completed.
pub fn is_begun(dir: &Path) -> bool {
    dir.join(PROGRESS).is_file() && !dir.join(META).is_file()
}

fn read(disk: &Disk, dir: &Path) -> Result<State> {
    let path = dir.join(PROGRESS);
    let bad = || {
        Error::refused("is damaged, so that the work cannot go on").path(&path).remedy("begin anew with --overwrite")
    };
    let text = String::from_utf8(disk.read_small(&path, LARGEST)?).map_err(|_| bad())?;
    let Sealed::Whole(body) = sealed::open(&text) else { return Err(bad()) };
    serde_json::from_str(&body).map_err(|_| bad())
}

/// What the open file of a column is called.
fn temporary(column: Column) -> String {
    format!(".{}.tmp", column.stem())
}

/// Removes what this module writes, the description first.
fn remove_all(disk: &Disk, dir: &Path) -> Result<()> {
    let columns = [Column::Dense, Column::Ids, Column::Weights];
    let others = [PROGRESS, IDS, PARTIAL_IDS, FAISS, "passage_reps", "query_reps", pyserini::FOLDER];
    let own = |name: &str| {
        let part = |column: &Column| {
            let number = name.strip_prefix(column.stem()).and_then(|n| n.strip_prefix('-')?.strip_suffix(".npy"));
            number.is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit())) || name == temporary(*column)
        };
        columns.iter().any(part) || others.contains(&name)
    };
    disk.remove(&dir.join(META))?;
    disk.sync_dir(dir)?;
    for name in disk.list(dir)?.iter().filter(|name| own(name)) {
        disk.remove(&dir.join(name))?;
    }
    Ok(())
}
