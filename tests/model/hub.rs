//! Finding a model: paths, the local cache, and what is said when it is neither.

use crate::line;
use retromae_engine::model::hub::{cache_folder, resolve_in};
use std::path::{Path, PathBuf};

#[test]
fn a_path_wins_and_a_cached_name_is_found() {
    let cache = tempfile::tempdir().unwrap();
    assert_eq!(resolve_in(cache.path().to_str().unwrap(), cache.path()).unwrap(), cache.path());
    let model = cache.path().join("models--Shitao--RetroMAE");
    let snapshot = model.join("snapshots/0123abc");
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(model.join("refs")).unwrap();
    std::fs::write(model.join("refs/main"), "0123abc\n").unwrap();
    assert!(line(resolve_in("Shitao/RetroMAE", cache.path())).contains("without a complete revision main"));
    std::fs::write(snapshot.join("config.json"), "{}").unwrap();
    assert!(line(resolve_in("Shitao/RetroMAE", cache.path())).contains("without a complete revision main"));
    std::fs::write(snapshot.join("pytorch_model.bin"), "").unwrap();
    assert_eq!(resolve_in("Shitao/RetroMAE", cache.path()).unwrap(), snapshot);
    assert_eq!(resolve_in("Shitao/RetroMAE@0123abc", cache.path()).unwrap(), snapshot);
    std::fs::write(model.join("refs/main"), "../../etc").unwrap();
    assert!(line(resolve_in("Shitao/RetroMAE", cache.path())).contains("holds no commit"));
}

#[test]
fn what_was_looked_for_is_said() {
    let cache = tempfile::tempdir().unwrap();
    let message = line(resolve_in("bert-base-uncased", cache.path()));
    assert!(message.contains("models--bert-base-uncased is not in the local cache"), "{message}");
    for bad in ["a/b/c", "../x", "a--b", "", "x y", "/absent", "a@../b", "-x"] {
        assert!(line(resolve_in(bad, cache.path())).contains("not a hub name"), "{bad}");
    }
}

#[test]
fn the_cache_is_where_the_variables_say() {
    let with = |set: &[(&str, &str)]| {
        let set: Vec<(String, String)> = set.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        cache_folder(move |key| set.iter().find(|(k, _)| k == key).map(|(_, v)| v.into()))
    };
    let home = ("HOME", "/home/me");
    assert_eq!(with(&[home]), Path::new("/home/me/.cache/huggingface/hub"));
    assert_eq!(with(&[home, ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
    assert_eq!(with(&[home, ("HF_HOME", "/h")]), Path::new("/h/hub"));
    assert_eq!(with(&[home, ("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]), PathBuf::from("/c"));
    assert_eq!(with(&[home, ("HF_HUB_CACHE", "")]), Path::new("/home/me/.cache/huggingface/hub"));
}
