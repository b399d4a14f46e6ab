//! Fetching a model from the Hugging Face hub into the cache that Python shares (crate `hf-hub`).
//!
//! Only what the engine reads is fetched: configurations, the tokenizer, and one form of the weights. A file has its final name when it is
//! whole; one that was interrupted goes on where it stopped. `config.json` comes last: a snapshot that has it and weights is complete.

use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use super::super::weights::ENHANCED_DECODER;
use crate::error::{Error, IoContext, Result};
use crate::files::hex;

/// The hub's address where `HF_ENDPOINT` names no other.
const HUB: &str = "https://huggingface.co";

/// Files that are no use here, by their folders.
const FOREIGN_FOLDERS: [&str; 4] = ["onnx", "openvino", "coreml", "runs"];

/// Why nothing can be fetched, if so: a variable of `huggingface_hub` forbids it.
pub fn forbidden() -> Option<&'static str> {
    ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].into_iter().find(|name| {
        std::env::var(name).is_ok_and(|value| matches!(value.to_lowercase().as_str(), "1" | "on" | "yes" | "true"))
    })
}

/// Fetches a model into the cache folder and returns its snapshot.
///
/// # Errors
/// No network, no such model or revision, no access, or a file that does not have the hub's digest.
pub fn fetch(name: &str, revision: &str, cache: &Path) -> Result<PathBuf> {
    let endpoint = std::env::var("HF_ENDPOINT").ok().filter(|e| !e.is_empty()).unwrap_or_else(|| HUB.into());
    let hub = Hub { name, revision, endpoint: endpoint.trim_end_matches('/').to_string() };
    let folder = Cache::new(cache.to_path_buf());
    let variable = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"].into_iter().find_map(|v| std::env::var(v).ok());
    let token = variable.map(|t| t.trim().to_string()).filter(|t| !t.is_empty()).or_else(|| folder.token());
    let api = ApiBuilder::from_cache(folder)
        .with_endpoint(hub.endpoint.clone())
        .with_token(token)
        .with_progress(std::io::stderr().is_terminal())
        .with_user_agent("retromae-engine", env!("CARGO_PKG_VERSION"))
        .build()
        .map_err(|e| hub.error("", &e))?;
    hub.fetch(&api)
}

/// A revision of a model, and where it is.
struct Hub<'a> {
    name: &'a str,
    revision: &'a str,
    endpoint: String,
}

impl Hub<'_> {
    fn fetch(&self, api: &Api) -> Result<PathBuf> {
        let repo = Repo::with_revision(self.name.into(), RepoType::Model, self.revision.into());
        let repo = api.repo(repo);
        let info = repo.info().map_err(|e| self.error("", &e))?;
        let files = wanted(info.siblings.iter().map(|file| file.rfilename.as_str()));
        let Some(config) = files.iter().find(|file| *file == "config.json") else {
            let cause = "is a repository without config.json, so no model of transformers";
            return Err(Error::refused(cause).path(self.name).remedy("check the name"));
        };
        for file in files.iter().filter(|file| *file != config) {
            self.file(&repo, file)?;
        }
        let path = self.file(&repo, config)?;
        Ok(path.parent().map(Path::to_path_buf).unwrap_or(path))
    }

    fn file(&self, repo: &hf_hub::api::sync::ApiRepo, file: &str) -> Result<PathBuf> {
        let path = repo.get(file).map_err(|e| self.error(file, &e))?;
        // Large files are named by their SHA-256.
        let blob = path.canonicalize().at(&path, "cannot read")?;
        let name = blob.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit()) && digest(&blob)? != name.to_lowercase() {
            std::fs::remove_file(&blob).and_then(|()| std::fs::remove_file(&path)).at(&blob, "cannot remove")?;
            let cause = format!("{file} of {} did not arrive as the hub has it, and is removed", self.name);
            return Err(Error::refused(cause).path(blob).remedy("run the command again"));
        }
        Ok(path)
    }

    /// What went wrong, in one line that says what to do.
    fn error(&self, file: &str, e: &ApiError) -> Error {
        let what = if file.is_empty() { self.name.to_string() } else { format!("{}, {file}", self.name) };
        let at = format!("{what}, revision {}", self.revision);
        let cause = match e {
            ApiError::TooManyRetries(cause) => cause.as_ref(),
            e => e,
        };
        let (cause, remedy) = match cause {
            ApiError::RequestError(e) => match **e {
                ureq::Error::StatusCode(404) => {
                    let cause = format!("no such folder here, and {} has no such model or revision", self.endpoint);
                    (cause, "check the name".to_string())
                }
                ureq::Error::StatusCode(401 | 403) => (
                    format!("{} gives it to known users only, or it does not exist", self.endpoint),
                    "check the name, accept its terms on the hub, and set HF_TOKEN".into(),
                ),
                ureq::Error::StatusCode(code) => {
                    (format!("{} answered with status {code}", self.endpoint), "run the command again later".into())
                }
                ref e => (
                    format!("no such folder here, and fetching it from {}: {e}", self.endpoint),
                    "check the network, set HF_ENDPOINT to a mirror, or give a folder; a rerun goes on where it stopped".into(),
                ),
            },
            e => (
                format!("fetching it from {}: {e}", self.endpoint),
                "run the command again; it goes on where it stopped".into(),
            ),
        };
        Error::refused(cause.replace('\n', " ")).path(at).remedy(remedy)
    }
}

/// The files of a repository that the engine reads. Weights in safetensors make those of PyTorch needless.
fn wanted<'a>(files: impl Iterator<Item = &'a str> + Clone) -> Vec<String> {
    let own = |file: &str| {
        let safe = file.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
        let first = file.split_once('/').map_or("", |(folder, _)| folder);
        safe && !first.starts_with('.') && !FOREIGN_FOLDERS.contains(&first) && !first.starts_with("checkpoint-")
    };
    let folder = |file: &str| file.rsplit_once('/').map_or(String::new(), |(folder, _)| folder.to_string());
    let safetensors = |folder_of: &str| {
        let weights = files.clone().filter(|file| own(file) && folder(file) == folder(folder_of));
        weights.into_iter().any(|file| file.ends_with(".safetensors") && !file.ends_with(ENHANCED_DECODER))
    };
    let reads = |file: &&str| {
        let name = file.rsplit('/').next().unwrap_or(file);
        let torch = name == "pytorch_model.bin" || (name.starts_with("pytorch_model") && name.contains("-of-"));
        let kind = name.ends_with(".safetensors") || name.ends_with(".json") || name == "vocab.txt" || torch;
        let torch_index = name.starts_with("pytorch_model") && name.ends_with(".index.json");
        own(file) && kind && !((torch || torch_index) && safetensors(file))
    };
    files.clone().filter(reads).map(String::from).collect()
}

/// SHA-256 of a file, in hex.
fn digest(path: &Path) -> Result<String> {
    let (mut file, mut sha) = (File::open(path).at(path, "cannot open")?, Sha256::new());
    std::io::copy(&mut file, &mut sha).at(path, "cannot read")?;
    Ok(hex(&sha.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_read_is_fetched() {
        let all = [
            "README.md",
            ".gitattributes",
            "config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "tf_model.h5",
            "vocab.txt",
            "tokenizer.json",
            "modules.json",
            "1_Pooling/config.json",
            "2_Dense/pytorch_model.bin",
            "onnx/model.onnx",
            "onnx/config.json",
            "../evil.json",
            "a//b.json",
            "enhanced_decoder.safetensors",
            "checkpoint-9/config.json",
        ];
        let expected = [
            "config.json",
            "model.safetensors",
            "vocab.txt",
            "tokenizer.json",
            "modules.json",
            "1_Pooling/config.json",
            "2_Dense/pytorch_model.bin",
            "enhanced_decoder.safetensors",
        ];
        assert_eq!(wanted(all.into_iter()), expected);
        let torch = ["config.json", "pytorch_model.bin", "enhanced_decoder.safetensors"];
        assert_eq!(wanted(torch.into_iter()), torch);
        let parts = ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "training_args.bin"];
        assert_eq!(wanted(parts.into_iter()), parts[..2]);
    }
}
