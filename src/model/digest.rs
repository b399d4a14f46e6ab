//! A digest of a model: two models of one digest compute the same.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::config::BertConfig;
use super::towers::SIDES;
use super::weights::ENHANCED_DECODER;
use crate::error::{IoContext, Result};
use crate::files::hex16;

/// What a model is told apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parts {
    /// What embeds or scores.
    Inference,
    /// That, and the decoder that pre-training goes on with.
    All,
}

/// 64 bits, in hex, of a SHA-256 over the configuration and every file of weights of the model at `path`, a folder or a file of weights,
/// modules and both sides' folders included: models are told apart by it, nothing is protected by it. Without a path, of the
/// configuration alone.
///
/// # Errors
/// A file cannot be read.
pub fn of(path: Option<&Path>, config: &BertConfig, parts: Parts) -> Result<String> {
    let mut sha = Sha256::new();
    sha.update(serde_json::Value::Object(config.to_map()).to_string());
    let mut files = Vec::new();
    match path {
        Some(folder) if folder.is_dir() => collect(folder, parts, &mut files)?,
        Some(file) => files.push(file.to_path_buf()),
        None => {}
    }
    for path in files {
        let mut file = std::fs::File::open(&path).at(&path, "cannot open")?;
        std::io::copy(&mut file, &mut sha).at(&path, "cannot read")?;
    }
    Ok(hex16(&sha.finalize()))
}

/// The files of weights in `folder`, and in the folders of its modules and sides, by name.
fn collect(folder: &Path, parts: Parts, files: &mut Vec<PathBuf>) -> Result<()> {
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(folder).at(folder, "cannot list the folder")? {
        entries.push(entry.at(folder, "cannot list the folder")?.path());
    }
    entries.sort();
    for path in entries {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        // `2_Dense`: sentence-transformers numbers its modules.
        let module = name.starts_with(|c: char| c.is_ascii_digit()) && name.contains('_');
        if path.is_dir() {
            if module || SIDES.contains(&name.as_str()) {
                collect(&path, parts, files)?;
            }
        } else if path.extension().is_some_and(|e| e == "safetensors" || e == "bin")
            && (parts == Parts::All || name != ENHANCED_DECODER)
        {
            files.push(path);
        }
    }
    Ok(())
}
