//! The safetensors reader against malformed files, and the writer against the reader and the reference implementation.

use crate::{golden, line};
use retromae_engine::model::element::Dtype;
use retromae_engine::model::safetensors::SafeTensors;
use retromae_engine::model::safetensors::writer::{Spec, Writer};
use retromae_engine::model::tensor_file::{Info, TensorFile};
use std::path::Path;

fn file(header: &str, data: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::Builder::new().suffix(".safetensors").tempfile().unwrap();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    std::fs::write(file.path(), bytes).unwrap();
    file
}

fn refused(header: &str, data: &[u8]) -> String {
    line(SafeTensors::open(file(header, data).path()))
}

fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> Spec {
    Spec { name: name.into(), info: Info { dtype, shape: shape.to_vec() } }
}

/// A file of ours with four tensors.
fn ours(path: &Path) {
    let specs = vec![
        spec("a", Dtype::F32, &[2, 3]),
        spec("b", Dtype::F16, &[2]),
        spec("c", Dtype::Bf16, &[2]),
        spec("d", Dtype::I64, &[1]),
    ];
    let mut writer = Writer::create(path, specs, &[("note", "x")]).unwrap();
    writer.write_f32("a", &[1.0, -2.0, 3.5, 0.0, 1e-20, 7.0]).unwrap();
    writer.write_f32("b", &[0.5, 65504.0]).unwrap();
    writer.write_f32("c", &[0.5, 3e38]).unwrap();
    writer.write_i64("d", &[-3]).unwrap();
    let written = writer.finish().unwrap();
    let bytes = std::fs::read(path).unwrap();
    assert_eq!((written.size, written.crc32c), (bytes.len() as u64, crc32c::crc32c(&bytes)));
}

#[test]
fn what_is_written_is_read_back_here_and_by_the_reference_implementation() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    ours(&path);
    let opened = SafeTensors::open(&path).unwrap();
    let mut a = [0.0; 6];
    opened.read_f32("a", &[2, 3], &mut a).unwrap();
    assert_eq!(a, [1.0, -2.0, 3.5, 0.0, 1e-20, 7.0]);
    let mut b = [0.0; 2];
    opened.read_f64("b", &[2], &mut b).unwrap();
    assert_eq!(b, [0.5, 65504.0]);
    let mut d = [0];
    opened.read_i64("d", &[1], &mut d).unwrap();
    assert_eq!(d, [-3]);
    assert_eq!(opened.metadata()["format"], "pt");

    let bytes = std::fs::read(&path).unwrap();
    let reference = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(reference.len(), 4);
    assert_eq!(reference.tensor("b").unwrap().data(), [half_bytes(0.5), half_bytes(65504.0)].concat());
}

fn half_bytes(value: f32) -> [u8; 2] {
    half::f16::from_f32(value).to_le_bytes()
}

#[test]
fn every_flipped_bit_and_every_truncation_of_our_own_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    ours(&path);
    let good = std::fs::read(&path).unwrap();
    let damaged = folder.path().join("y.safetensors");
    for bit in 0..good.len() * 8 {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&damaged, &bytes).unwrap();
        assert!(SafeTensors::open(&damaged).is_err(), "bit {bit} of byte {:?}", good[bit / 8] as char);
    }
    for length in 0..good.len() {
        std::fs::write(&damaged, &good[..length]).unwrap();
        assert!(SafeTensors::open(&damaged).is_err(), "{length} bytes");
    }
}

#[test]
fn impossible_headers_are_refused() {
    let one =
        |shape: &str, offsets: &str| format!(r#"{{"x":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#);
    assert!(refused(&one("[2]", "[0,4]"), &[0; 4]).contains("#x: 4 bytes of values where F32 [2] needs 8"));
    assert!(refused(&one("[2]", "[0,8]"), &[0; 4]).contains("outside"));
    assert!(refused(&one("[2]", "[8,0]"), &[0; 8]).contains("outside"));
    assert!(refused(&one("[4294967296,4294967296,4]", "[0,0]"), &[]).contains("impossible"));
    assert!(refused(&one("[1]", "[0,4]"), &[0; 5]).contains("1 bytes belong to no tensor"));
    assert!(refused(&one("[1]", "[4,8]"), &[0; 8]).contains("gap"));
    assert!(refused(&one("[1,1,1,1,1,1,1,1,1]", "[0,4]"), &[0; 4]).contains("dimensions"));
    assert!(refused(&one("[-1]", "[0,4]"), &[0; 4]).contains("malformed"));
    assert!(refused(r#"{"x":{"dtype":"F31","shape":[],"data_offsets":[0,4]}}"#, &[0; 4]).contains("F31"));
    let entry = r#""x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    assert!(refused(&format!("{{{entry},{entry}}}"), &[0; 4]).contains("two tensors are called \"x\""));
    let other = entry.replace("\"x\"", "\"y\"");
    assert!(refused(&format!("{{{entry},{other}}}"), &[0; 4]).contains("overlap"));
    assert!(refused("[]", &[]).contains("malformed"));
    assert!(refused(&"[".repeat(1 << 20), &[]).contains("malformed"));
    assert!(refused(r#"{"__metadata__":{"retromae_engine.version":"1"}}"#, &[]).contains("digest"));
}

#[test]
fn lengths_that_lie_are_refused_without_allocating() {
    for length in [u64::MAX, 1 << 40, 100_000_001, 17 << 20] {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), length.to_le_bytes()).unwrap();
        assert!(line(SafeTensors::open(file.path())).contains("header length"));
    }
    assert!(line(SafeTensors::open("/dev/null")).contains("not a regular file"));
}

#[test]
fn reads_check_shape_type_and_values() {
    let opened = SafeTensors::open(golden("head32/retromae/model/model.safetensors")).unwrap();
    let name = "bert.embeddings.LayerNorm.bias";
    let mut out = [0.0; 64];
    opened.read_f32(name, &[64], &mut out).unwrap();
    assert!(
        line(opened.read_f32(name, &[8, 8], &mut out))
            .contains(&format!("#{name}: shape [64] where [8, 8] is expected"))
    );
    assert!(line(opened.read_i64(name, &[64], &mut [0; 64])).contains("element type F32"));
    assert!(line(opened.read_f32("nothing", &[64], &mut out)).contains("#nothing: tensor is missing"));
    let header = r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    let data = [1.0f32.to_le_bytes(), f32::NAN.to_le_bytes()].concat();
    let opened = SafeTensors::open(file(header, &data).path()).unwrap();
    assert!(line(opened.read_f32("x", &[2], &mut [0.0; 2])).contains("NaN at element 1"));
}

#[test]
fn the_writer_refuses_what_would_not_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let create =
        |name: &str, dtype| Writer::create(folder.path().join(name), vec![spec("x", dtype, &[1])], &[]).unwrap();
    assert!(
        create("a", Dtype::F16).write_f32("x", &[70000.0]).unwrap_err().to_string().contains("cannot be stored as F16")
    );
    assert!(create("b", Dtype::F32).write_f32("x", &[f32::INFINITY]).is_err());
    assert!(create("c", Dtype::F32).write_f32("x", &[1.0, 2.0]).is_err());
    assert!(create("d", Dtype::F32).write_f32("y", &[1.0]).is_err());
    assert!(create("e", Dtype::F32).finish().is_err());
    assert!(create("f", Dtype::F32).write_i64("x", &[1]).is_err());
    assert!(Writer::create(folder.path().join("f"), vec![], &[]).is_err(), "an existing file is never overwritten");
}
