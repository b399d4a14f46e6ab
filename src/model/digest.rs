//! A digest of a model: two models of one digest compute the same.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::config::BertConfig;
use super::weights::ENHANCED_DECODER;
use crate::error::{IoContext, Result};

/// 64 bits, in hex, of a SHA-256 over the configuration and every file of weights of the model at `path`, a folder or a file of weights:
/// models are told apart by it, nothing is protected by it.
///
/// # Errors
/// A file cannot be read, or the configuration is none.
pub fn of(path: &Path, config: &BertConfig) -> Result<String> {
    let mut sha = Sha256::new();
    sha.update(serde_json::Value::Object(config.to_map()).to_string());
    let mut files = Vec::new();
    if path.is_dir() {
        for entry in std::fs::read_dir(path).at(path, "cannot list the folder")? {
            files.push(entry.at(path, "cannot list the folder")?.path());
        }
        files.retain(|file| file.extension().is_some_and(|e| e == "safetensors" || e == "bin"));
        files.retain(|file| file.file_name().is_none_or(|name| name != ENHANCED_DECODER));
        files.sort();
    } else {
        files.push(path.to_path_buf());
    }
    for path in files {
        let mut file = std::fs::File::open(&path).at(&path, "cannot open")?;
        std::io::copy(&mut file, &mut sha).at(&path, "cannot read")?;
    }
    Ok(sha.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect())
}
