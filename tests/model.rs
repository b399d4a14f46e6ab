//! Model folders: configurations, checkpoints in every published form, damaged and hostile ones, exports and who can load them.

#[path = "model/config.rs"]
mod config;
#[path = "model/export.rs"]
mod export;
#[path = "model/hub.rs"]
mod hub;
#[path = "model/hub_server.rs"]
#[cfg(feature = "hub")]
mod hub_server;
#[path = "model/names.rs"]
mod names;
#[path = "model/python.rs"]
mod python;
#[path = "model/safetensors.rs"]
mod safetensors;
#[path = "model/torch_bin.rs"]
mod torch_bin;
#[path = "model/towers.rs"]
mod towers;
#[path = "model/weights.rs"]
mod weights;

use std::path::{Path, PathBuf};

/// A file of `tests/golden`.
fn golden(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(relative)
}

/// The error of a call that must fail, as the user sees it: one line with cause and remedy.
#[track_caller]
fn line<T: std::fmt::Debug>(result: retromae_engine::Result<T>) -> String {
    let text = result.expect_err("must be refused").to_string();
    assert!(!text.contains('\n'), "{text}");
    assert!(text.contains("; "), "no remedy: {text}");
    text
}
