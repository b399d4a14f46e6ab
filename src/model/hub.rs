//! Where a model is: a folder, a file, or a name of the Hugging Face hub, in the local cache or fetched into it.

#[cfg(feature = "hub")]
pub mod download;

use super::small_file;
use crate::error::{Error, Result};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Finds the folder or file that `--model` means. A hub name may end in `@revision`; the default is `main`. What is in the cache is taken
/// as it is; what is not is fetched, unless `HF_HUB_OFFLINE` is set.
///
/// # Errors
/// It is neither a path nor in the cache, and cannot be fetched; the line says where was looked.
pub fn resolve(model: &str) -> Result<PathBuf> {
    let cache = cache_folder(|key| std::env::var_os(key));
    let found = resolve_in(model, &cache);
    #[cfg(feature = "hub")]
    if found.is_err() && !Path::new(model).exists() {
        let (name, revision) = model.split_once('@').unwrap_or((model, "main"));
        if is_hub_name(name) && is_revision(revision) {
            return match download::forbidden() {
                None => download::fetch(name, revision, &cache),
                Some(variable) => found.map_err(|e| {
                    let advice = format!("{}, or unset {variable} to fetch it now", e.advice());
                    e.remedy(advice)
                }),
            };
        }
    }
    found
}

/// [`resolve`] with the cache folder given.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_in(model: &str, cache: &Path) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    let (name, revision) = model.split_once('@').unwrap_or((model, "main"));
    if !is_hub_name(name) || !is_revision(revision) {
        return Err(Error::refused("no such file or folder, and not a hub name").path(path).remedy("check the path"));
    }
    let folder = cache.join(format!("models--{}", name.replace('/', "--")));
    if !folder.is_dir() {
        let cause = format!("no such file or folder, and {} is not in the local cache", folder.display());
        let remedy = format!("check the path, or fetch it first: hf download {name}");
        return Err(Error::refused(cause).path(path).remedy(remedy));
    }
    let reference = folder.join("refs").join(revision);
    let commit = if reference.is_file() { read_commit(&reference)? } else { revision.to_string() };
    let snapshot = folder.join("snapshots").join(&commit);
    let has = |name: &&str| snapshot.join(name).is_file();
    if !has(&"config.json") || !super::weights::WEIGHT_FILES.iter().any(has) {
        let cause = format!("{name} is in the local cache without a complete revision {revision}");
        let remedy = format!("fetch it again: hf download {name} --revision {revision}");
        return Err(Error::refused(cause).path(snapshot).remedy(remedy));
    }
    Ok(snapshot)
}

/// The cache folder, by the rules of `huggingface_hub`. `variable` looks an environment variable up.
pub fn cache_folder(variable: impl Fn(&str) -> Option<OsString>) -> PathBuf {
    let set = |key: &str| variable(key).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(folder) = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE")) {
        return folder;
    }
    let home = set("HF_HOME").or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")));
    let home = home.or_else(|| set("HOME").map(|home| home.join(".cache").join("huggingface")));
    home.unwrap_or_else(|| PathBuf::from(".cache/huggingface")).join("hub")
}

/// `name` or `organisation/name`, as the hub allows them; nothing that could lead out of the cache.
pub fn is_hub_name(name: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty()
            && p.len() <= 96
            && !p.contains("--")
            && !p.contains("..")
            && !p.starts_with(['-', '.'])
            && p.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    name.split('/').count() <= 2 && name.split('/').all(part)
}

fn is_revision(revision: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty() && p != "." && p != ".." && p.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    revision.len() <= 256 && revision.split('/').all(part)
}

fn read_commit(reference: &Path) -> Result<String> {
    let text = small_file::text(reference, 256, "a commit of the hub's cache")?;
    let commit = text.trim();
    if commit.is_empty() || !commit.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(Error::refused("holds no commit").path(reference).remedy("fetch the model again"));
    }
    Ok(commit.to_string())
}
