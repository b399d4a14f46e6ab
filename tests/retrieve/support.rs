//! Small models, folders of embeddings and runs of the binary.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use retromae_engine::Result;
use retromae_engine::data::shard::TitleSep;
use retromae_engine::data::source;
use retromae_engine::device::{DType, Device};
use retromae_engine::files::Disk;
use retromae_engine::model::config::BertConfig;
use retromae_engine::model::element::Dtype;
use retromae_engine::model::names;
use retromae_engine::model::safetensors::writer::{Spec, Writer};
use retromae_engine::model::tensor_file::Info;
use retromae_engine::ops::pool::Pooling;
use retromae_engine::retrieve::embedder::Kind;
use retromae_engine::retrieve::encode::{self, Encoded, Job};
use retromae_engine::retrieve::model::{Model, Overrides, Reading, Texts};
use retromae_engine::rng::{Site, Stream};
use serde_json::json;

pub const CPU: (Device, DType) = (Device::Cpu, DType::F32);
/// Width of the small models.
pub const WIDTH: usize = 64;

/// A folder for one test.
pub struct Dir(tempfile::TempDir);

impl Dir {
    pub fn new() -> Dir {
        Dir(tempfile::tempdir().unwrap())
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn arg(&self, name: &str) -> String {
        self.at(name).to_str().unwrap().into()
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.at(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// An error's message without this folder.
    #[track_caller]
    pub fn message<T>(&self, result: Result<T>) -> String {
        let error = result.err().expect("an error").to_string();
        error.replace(&format!("{}/", self.0.path().display()), "")
    }

    /// A small model of random weights, with the tokenizer of a real one, as sentence-transformers lays it out.
    pub fn model(&self, name: &str, seed: u64) -> PathBuf {
        let dir = self.at(name);
        encoder(&dir, seed, false);
        dir
    }

    /// The same with an MLM head.
    pub fn headed(&self, name: &str, seed: u64) -> PathBuf {
        let dir = self.at(name);
        encoder(&dir, seed, true);
        dir
    }

    /// The same with an encoder for each side.
    pub fn untied(&self, name: &str) -> PathBuf {
        let dir = self.at(name);
        encoder(&dir.join("query_model"), 11, false);
        encoder(&dir.join("passage_model"), 12, false);
        dir
    }
}

fn encoder(dir: &Path, seed: u64, head: bool) {
    std::fs::create_dir_all(dir.join("1_Pooling")).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/minilm");
    for file in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"] {
        std::fs::copy(golden.join(file), dir.join(file)).unwrap();
    }
    let write = |name: &str, value: serde_json::Value| std::fs::write(dir.join(name), value.to_string()).unwrap();
    write(
        "config.json",
        json!({"model_type": "bert", "vocab_size": 30522, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
               "intermediate_size": 600, "max_position_embeddings": 64, "hidden_act": if head { "relu" } else { "gelu" }}),
    );
    write("1_Pooling/config.json", json!({"pooling_mode": "mean"}));
    let module =
        |path: &str, class: &str| json!({"path": path, "type": format!("sentence_transformers.models.{class}")});
    write(
        "modules.json",
        json!([module("", "Transformer"), module("1_Pooling", "Pooling"), module("2_Normalize", "Normalize")]),
    );
    write("config_sentence_transformers.json", json!({"prompts": {"query": "find this: ", "document": ""}}));
    write("sentence_bert_config.json", json!({"max_seq_length": 48}));
    let config = BertConfig::read(dir.join("config.json")).unwrap();
    let mut params = names::encoder(&config);
    if head {
        params.extend(names::mlm_head(&config));
    }
    let specs = params.iter().map(|param| Spec {
        name: param.name.replacen("bert.", "", 1),
        info: Info { dtype: Dtype::F32, shape: param.shape.clone() },
    });
    let mut file = Writer::create(dir.join("model.safetensors"), specs.collect(), &[]).unwrap();
    for (i, param) in (0..).zip(&params) {
        let mut stream = Stream::new(seed, 0, Site::Init, i);
        let range = if param.name.contains("word_embeddings") { 1.0 } else { 0.1 };
        let norm = param.name.ends_with("LayerNorm.weight");
        let count = param.shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| if norm { 1.0 } else { stream.normal() * range }).collect();
        file.write_f32(&param.name.replacen("bert.", "", 1), &values).unwrap();
    }
    file.finish().unwrap();
}

/// Texts of many lengths, an empty one and a long one among them.
pub fn texts(count: usize) -> Vec<String> {
    let words =
        ["wing", "flow", "of", "heat", "in", "supersonic", "boundary", "layers", "and", "the", "package", "manager"];
    let mut stream = Stream::new(5, 0, Site::Split, 0);
    let text = |i: usize| match i {
        3 => String::new(),
        5 => "long words without end ".repeat(40),
        _ => {
            let n = 1 + stream.below(30) as usize;
            (0..n).map(|_| words[stream.below(words.len() as u32) as usize]).collect::<Vec<_>>().join(" ")
        }
    };
    (0..count).map(text).collect()
}

pub fn jsonl(texts: &[String]) -> String {
    let line = |(i, text): (usize, &String)| format!("{}\n", json!({ "_id": format!("d{i}"), "text": text }));
    texts.iter().enumerate().map(line).collect()
}

pub fn open(path: &Path) -> Model {
    Model::open("small", path, &Overrides { batch_tokens: Some(200), ..Overrides::default() }).unwrap()
}

pub fn reading() -> Reading {
    Reading { title_sep: TitleSep::Space, format: None, blank_lines: false, only: None }
}

/// Encodes a file of documents.
pub fn encode_on(disk: &Disk, model: &Model, input: &Path, output: &Path, texts: &Texts) -> Result<Encoded> {
    let job = model.job(CPU, texts)?;
    encode_job(disk, model, input, output, texts.kind, &job)
}

pub fn encode_job(disk: &Disk, model: &Model, input: &Path, output: &Path, kind: Kind, job: &Job) -> Result<Encoded> {
    let inputs = source::expand(&[input.to_str().unwrap().to_string()])?;
    let source = model.documents(job, inputs, reading())?;
    let mut embedder = model.embedder(CPU, kind, job)?;
    encode::run(disk, source, &mut embedder, job, output, &|_| {})
}

pub fn passages(shard_rows: u64) -> Texts {
    Texts { shard_rows: Some(shard_rows), ..Texts::new(Kind::Passage) }
}

/// The files below a folder and what is in them, the lock left out.
pub fn content(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(
                content(&path)
                    .into_iter()
                    .map(|(name, bytes)| (Path::new(path.file_name().unwrap()).join(name), bytes)),
            );
        } else if path.file_name().unwrap() != ".lock" {
            found.push((path.file_name().unwrap().into(), std::fs::read(&path).unwrap()));
        }
    }
    found.sort();
    found
}

/// A folder of these vectors, written as encode writes it.
pub fn folder(
    dir: &Path,
    ids: &[String],
    width: usize,
    rows: &[f32],
    change: impl FnOnce(&mut retromae_engine::retrieve::embeddings::Spec),
) {
    use retromae_engine::retrieve::embeddings::{Layout, Meta, Part, Spec};
    use retromae_engine::retrieve::npy::{Stored, header};
    use retromae_engine::retrieve::representation::Representation;
    std::fs::create_dir_all(dir).unwrap();
    let mut spec = Spec {
        dim: width,
        dtype: Stored::F32,
        representation: Representation::Cls,
        lexical_top_k: 0,
        vocab_size: 0,
        normalized: false,
        pooling: Pooling::Cls,
        prefix: String::new(),
        max_len: 32,
        side: "passage".into(),
        model_sha256: "0123456789abcdef".into(),
        model: "m".into(),
        computed: "by hand".into(),
    };
    change(&mut spec);
    let half = ids.len().div_ceil(2);
    let mut parts = Vec::new();
    for (i, (ids, rows)) in ids.chunks(half).zip(rows.chunks(half * width)).enumerate() {
        let mut bytes = header(spec.dtype, ids.len() as u64, width).to_vec();
        spec.dtype.encode(rows, &mut bytes).unwrap();
        let file = format!("embeddings-{i:05}.npy");
        std::fs::write(dir.join(&file), &bytes).unwrap();
        parts.push(Part { file, rows: ids.len() as u64, crc: crc32c::crc32c(&bytes) });
    }
    let list: String = ids.iter().map(|id| format!("{id}\n")).collect();
    std::fs::write(dir.join("ids.txt"), &list).unwrap();
    let meta = Meta::new(Layout::Npy, spec, "source".into(), crc32c::crc32c(list.as_bytes()), parts);
    std::fs::write(dir.join("meta.json"), meta.text().unwrap()).unwrap();
}

pub fn ids(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|i| format!("{prefix}{i}")).collect()
}

pub fn vectors(seed: u64, count: usize) -> Vec<f32> {
    let mut stream = Stream::new(seed, 0, Site::Init, 1);
    (0..count).map(|_| stream.normal()).collect()
}

pub fn binary<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_retromae-engine")).args(args).stdin(Stdio::null()).output().unwrap()
}

/// Standard output of a run that must succeed.
#[track_caller]
pub fn ok<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> String {
    let out = binary(args);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// The one error line of a run that must fail with `code`.
#[track_caller]
pub fn fails<S: AsRef<std::ffi::OsStr>>(code: i32, args: &[S]) -> String {
    let out = binary(args);
    let err = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(code), "{err}");
    let errors: Vec<&str> = err.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{err}");
    assert!(errors[0].contains("; ") && !err.contains("panicked"), "{err}");
    errors[0]["error: ".len()..].to_string()
}

/// A disk that calls `hook` with the number of every operation.
pub fn counting(hook: impl Fn(usize) -> std::io::Result<()> + Send + Sync + 'static) -> Disk {
    let count = std::sync::atomic::AtomicUsize::new(0);
    Disk::with_hook(Arc::new(move |_, _| hook(count.fetch_add(1, std::sync::atomic::Ordering::Relaxed))))
}
