//! The consumers themselves: transformers and sentence-transformers load what was exported. Left out, in one line, without Python.

use crate::export::{bi_encoder, source, spec};
use retromae_engine::model::element::Dtype;
use retromae_engine::model::export::{ExportKind, Pooling, export};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The interpreter in `RETROMAE_PYTHON`, else `python3`.
fn interpreter() -> String {
    std::env::var("RETROMAE_PYTHON").unwrap_or_else(|_| "python3".into())
}

/// A folder inside an installed Python package.
pub fn package_folder(package: &str, inside: &str) -> Option<PathBuf> {
    let program = format!("import importlib.util as u; print(u.find_spec({package:?}).submodule_search_locations[0])");
    let output = Command::new(interpreter()).args(["-c", &program]).output().ok()?;
    let folder = Path::new(String::from_utf8(output.stdout).ok()?.trim()).join(inside);
    (output.status.success() && folder.is_dir()).then_some(folder)
}

/// Whether the consumers can be run. `RETROMAE_PYTHON` set and unusable is a failure, not a reason to leave the test out.
fn available() -> bool {
    let program = "import importlib.util as u, sys; \
                   sys.exit(not all(map(u.find_spec, ('torch', 'transformers', 'sentence_transformers'))))";
    let found = Command::new(interpreter()).args(["-c", program]).output().is_ok_and(|o| o.status.success());
    assert!(
        found || std::env::var_os("RETROMAE_PYTHON").is_none(),
        "RETROMAE_PYTHON lacks torch, transformers or sentence-transformers"
    );
    found
}

#[test]
fn exports_load_in_transformers_and_sentence_transformers() {
    if !available() {
        eprintln!("left out: no Python with torch, transformers and sentence-transformers (set RETROMAE_PYTHON)");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut split = spec(ExportKind::MaskedLm, folder.path());
    split.max_shard_bytes = 200_000;
    let mut half = spec(ExportKind::MaskedLm, folder.path());
    half.dtype = Dtype::Bf16;
    let mut pooler = spec(bi_encoder(Pooling::Mean, true, true), folder.path());
    pooler.pooler = true;
    let cases = [
        ("pretrained", spec(ExportKind::MaskedLm, folder.path())),
        ("split", split),
        ("half", half),
        ("cls", spec(bi_encoder(Pooling::Cls, false, false), folder.path())),
        ("mean-normalized-dense", pooler),
        ("reranker", spec(ExportKind::CrossEncoder, folder.path())),
    ];
    let mut command = Command::new(interpreter());
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/load_export.py"));
    for (name, spec) in &cases {
        let out = folder.path().join(name);
        export(spec, &out, &mut source).unwrap();
        command.arg(out);
    }
    let output = command.env("HF_HUB_OFFLINE", "1").output().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}\n{errors}");
    assert_eq!(text.lines().filter(|l| l.starts_with("ok ")).count(), cases.len(), "{text}\n{errors}");
    println!("{text}");
}
