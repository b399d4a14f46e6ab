//! The consumers themselves: transformers and sentence-transformers load what was exported. Left out, in one line, without Python.

use crate::export::{bi_encoder, either, source, spec, untied};
use retromae_engine::device::{DType, Device};
use retromae_engine::graph::Capacity;
use retromae_engine::graph::inference::Inference;
use retromae_engine::model::config::BertConfig;
use retromae_engine::model::element::Dtype;
use retromae_engine::model::export::{ExportKind, Pooling, export};
use retromae_engine::model::names;
use retromae_engine::model::parameters::Parameters;
use retromae_engine::model::reranker::Reranker;
use retromae_engine::model::safetensors::writer::{Spec, Writer};
use retromae_engine::model::tensor_file::Info;
use retromae_engine::model::towers::{SIDES, Towers};
use retromae_engine::model::weights::Checkpoint;
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
    // Two encoders in one folder: each is a model by itself.
    let two = folder.path().join("two");
    export(&untied(folder.path()), &two, &mut either).unwrap();
    command.args(SIDES.map(|side| two.join(side)));
    let output = command.env("HF_HUB_OFFLINE", "1").output().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}\n{errors}");
    assert_eq!(text.lines().filter(|l| l.starts_with("ok ")).count(), cases.len() + 2, "{text}\n{errors}");
    println!("{text}");
}

/// Hidden states of the exported golden model, computed here: two texts of different length, in the form that the script compares.
fn write_hidden_states(model: &Path, file: &Path) {
    let config = BertConfig::read(model).unwrap();
    let (length, width) = (12, config.hidden_size);
    let texts: [Vec<u32>; 2] = [(0..12).map(|i| 2 + i * 61 % 900).collect(), (0..5).map(|i| 700 - i * 37).collect()];
    let capacity = Capacity { tokens: 17, sequences: 2, length, encoder_labels: 0 };
    let mut encoder = Inference::new(Device::Cpu, &config, capacity, DType::F32).unwrap();
    let weights = Checkpoint::open(model).unwrap();
    let load = encoder.params().load(0, 0.0, |name, shape, out| weights.read_f32(name, shape, out).map(|()| true));
    assert!(load.unwrap().is_empty());
    let rows: Vec<u32> = (0..17).collect();
    let packed = encoder.hidden_states(&texts.concat(), &[0; 17], &[0, 12, 17], &rows).to_vec::<f32>();

    let (mut ids, mut mask, mut hidden) = (vec![0; 24], vec![0; 24], vec![0.0; 24 * width]);
    let mut row = 0;
    for (text, tokens) in texts.iter().enumerate() {
        for (i, &id) in tokens.iter().enumerate() {
            let cell = text * length + i;
            (ids[cell], mask[cell]) = (i64::from(id), 1);
            hidden[cell * width..(cell + 1) * width].copy_from_slice(&packed[row * width..(row + 1) * width]);
            row += 1;
        }
    }
    let spec =
        |name: &str, dtype, shape: &[usize]| Spec { name: name.into(), info: Info { dtype, shape: shape.into() } };
    let specs = vec![
        spec("input_ids", Dtype::I64, &[2, length]),
        spec("attention_mask", Dtype::I64, &[2, length]),
        spec("last_hidden_state", Dtype::F32, &[2, length, width]),
    ];
    let mut writer = Writer::create(file, specs, &[]).unwrap();
    writer.write_i64("input_ids", &ids).unwrap();
    writer.write_i64("attention_mask", &mask).unwrap();
    writer.write_f32("last_hidden_state", &hidden).unwrap();
    writer.finish().unwrap();
}

#[test]
fn hidden_states_equal_those_of_transformers() {
    if !available() {
        eprintln!("left out: no Python with torch, transformers and sentence-transformers (set RETROMAE_PYTHON)");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (out, file) = (folder.path().join("pretrained"), folder.path().join("hidden.safetensors"));
    export(&spec(ExportKind::MaskedLm, folder.path()), &out, &mut source).unwrap();
    write_hidden_states(&out, &file);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/load_export.py");
    let mut command = Command::new(interpreter());
    command.arg(script).arg(&out).arg("--reference").arg(&file).env("HF_HUB_OFFLINE", "1");
    let output = command.output().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("hidden states within"), "{text}\n{errors}");
    println!("{text}");
}

/// Folders that sentence-transformers itself saves, in whatever form its version writes them, read as they were.
#[test]
fn what_sentence_transformers_saves_is_read() {
    if !available() {
        eprintln!("left out: no Python with torch, transformers and sentence-transformers (set RETROMAE_PYTHON)");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mut bi = spec(bi_encoder(Pooling::Mean, true, true), folder.path());
    bi.prompts = ["query: ".into(), "passage: ".into()];
    export(&bi, path("bi"), &mut source).unwrap();
    export(&spec(ExportKind::CrossEncoder, folder.path()), path("cross"), &mut source).unwrap();
    let program = "import sys; from sentence_transformers import CrossEncoder, SentenceTransformer; \
                   SentenceTransformer(sys.argv[1] + '/bi').save(sys.argv[1] + '/bi-saved'); \
                   CrossEncoder(sys.argv[1] + '/cross').save(sys.argv[1] + '/cross-saved')";
    let mut command = Command::new(interpreter());
    let output = command.args(["-c", program]).arg(folder.path()).env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let (given, saved) = (Towers::open(&path("bi")).unwrap(), Towers::open(&path("bi-saved")).unwrap());
    assert_eq!((saved.projection, saved.settings.pooling), (Some(16), Some(Pooling::Mean)));
    assert_eq!((saved.settings.normalize, &saved.settings.prompts), (Some(true), &given.settings.prompts));
    assert!(saved.tokenizer().is_some() && saved.settings.max_seq_length == given.settings.max_seq_length);
    let mut names: Vec<String> = names::encoder(&given.config).into_iter().map(|p| p.name).collect();
    names.extend(["linear.weight", "linear.bias"].map(String::from));
    same(&given, &saved, &names);
    let (given, saved) = (Reranker::open(&path("cross")).unwrap(), Reranker::open(&path("cross-saved")).unwrap());
    assert_eq!((saved.max_length, saved.note.as_deref()), (Some(given.config.max_position_embeddings), None));
    let mut names: Vec<String> = names::encoder(&given.config).into_iter().map(|p| p.name).collect();
    names.extend(["classifier.weight", "bert.pooler.dense.weight"].map(String::from));
    same(&given, &saved, &names);
}

fn same(given: &dyn Parameters, saved: &dyn Parameters, names: &[String]) {
    for name in names {
        let shape = given.find(name).unwrap();
        let [mut a, mut b] = [0.0, 1.0].map(|x| vec![x; shape.iter().product()]);
        assert!(given.read(name, &shape, &mut a).unwrap() && saved.read(name, &shape, &mut b).unwrap(), "{name}");
        assert!(a == b, "{name}");
    }
}
