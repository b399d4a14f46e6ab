//! `pytorch_model.bin`: values equal to those of the safetensors twin, everything hostile refused, nothing ever run.

use crate::{golden, line};
use retromae_engine::model::weights::Checkpoint;
use std::io::Write;
use std::path::Path;

fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let shape = checkpoint.shape(name).unwrap();
    let mut out = vec![0.0; shape.iter().product()];
    checkpoint.read_f32(name, &shape, &mut out).unwrap();
    out
}

#[test]
fn a_published_checkpoint_has_the_values_of_its_safetensors_twin() {
    let twin = Checkpoint::open(golden("head32/retromae/model/model.safetensors")).unwrap();
    let full = Checkpoint::open(golden("pytorch_bin")).unwrap();
    let half = Checkpoint::open(golden("pytorch_bin/pytorch_model_fp16.bin")).unwrap();
    let mut compared = 0;
    for name in twin.names().filter(|name| !name.starts_with("c_head.")) {
        let expected = values(&twin, name);
        assert_eq!(values(&full, name), expected, "{name}");
        let rounded: Vec<f32> = expected.iter().map(|v| half::f16::from_f32(*v).to_f32()).collect();
        assert_eq!(values(&half, name), rounded, "{name}");
        compared += 1;
    }
    assert_eq!(compared, 42);
    assert_eq!(full.names().count(), 42, "the tied decoder and position_ids are no parameters");
}

#[test]
fn the_format_before_torch_1_6_is_read() {
    let twin = Checkpoint::open(golden("head32/retromae/model/model.safetensors")).unwrap();
    let legacy = Checkpoint::open(golden("pytorch_bin/legacy_format.bin")).unwrap();
    assert_eq!(legacy.names().count(), 4);
    for name in legacy.names() {
        let expected = values(&twin, name);
        let found = values(&legacy, name);
        assert_eq!(found, expected[..found.len()], "{name}");
    }
}

#[test]
fn a_pickle_that_would_run_a_command_is_refused_and_nothing_is_run() {
    let message = line(Checkpoint::open(golden("pytorch_bin/hostile.bin")));
    assert!(message.contains("posix.system") && message.contains("nothing was run"), "{message}");
    assert!(!Path::new("PICKLE_RAN").exists());
}

/// A state dict of one tensor `cls.predictions.bias`: the pickle up to its view, which `view` completes.
fn pickle(storage: &str, length: u8, view: &[u8]) -> Vec<u8> {
    let mut p =
        b"\x80\x02}X\x14\0\0\0cls.predictions.biasctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n"
            .to_vec();
    p.extend_from_slice(storage.as_bytes());
    p.extend_from_slice(b"\nX\x01\0\0\x000X\x03\0\0\0cpuK");
    p.push(length);
    p.extend_from_slice(b"tQ");
    p.extend_from_slice(view);
    p.extend_from_slice(b"\x89ccollections\nOrderedDict\n)RtRs.");
    p
}

fn archive(pickle: &[u8], data: &[u8], deflated: bool) -> tempfile::NamedTempFile {
    let file = tempfile::Builder::new().suffix(".bin").tempfile().unwrap();
    let mut zip = zip::ZipWriter::new(file.reopen().unwrap());
    let method = if deflated { zip::CompressionMethod::Deflated } else { zip::CompressionMethod::Stored };
    let options = zip::write::SimpleFileOptions::default().compression_method(method);
    for (name, bytes) in [("m/data.pkl", pickle), ("m/data/0", data)] {
        zip.start_file(name, options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
    file
}

fn floats(count: u8) -> Vec<u8> {
    (0..count).flat_map(|i| f32::from(i).to_le_bytes()).collect()
}

#[test]
fn views_of_a_storage_are_read_in_row_major_order() {
    // Offset, shape and strides over the storage 0, 1, 2, … 11.
    let cases: [(&[u8], &[usize], &[f32]); 4] = [
        (b"K\0K\x0c\x85K\x01\x85", &[12], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]),
        (b"K\x08K\x02K\x02\x86K\x02K\x01\x86", &[2, 2], &[8.0, 9.0, 10.0, 11.0]),
        (b"K\x01K\x02K\x03\x86K\x01K\x04\x86", &[2, 3], &[1.0, 5.0, 9.0, 2.0, 6.0, 10.0]),
        (b"K\x03K\x02K\x02\x86K\0K\x01\x86", &[2, 2], &[3.0, 4.0, 3.0, 4.0]),
    ];
    for deflated in [false, true] {
        for (view, shape, expected) in cases {
            let file = archive(&pickle("FloatStorage", 12, view), &floats(12), deflated);
            let checkpoint = Checkpoint::open(file.path()).unwrap();
            for _again in 0..2 {
                let mut out = vec![0.0; expected.len()];
                checkpoint.read_f32("cls.predictions.bias", shape, &mut out).unwrap();
                assert_eq!(out, expected, "{shape:?}");
            }
        }
    }
}

#[test]
fn views_that_leave_their_storage_are_refused() {
    for view in [
        b"K\x01K\x0c\x85K\x01\x85".as_slice(),
        b"K\0K\x0d\x85K\x01\x85",
        b"K\0K\x02\x85K\x0c\x85",
        b"K\0J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86",
        b"J\xff\xff\xff\xffK\x01\x85K\x01\x85",
        b"K\0K\x01\x85J\xff\xff\xff\xff\x85",
        b"K\0K\x02K\x02\x86K\x01\x85",
    ] {
        let file = archive(&pickle("FloatStorage", 12, view), &floats(12), false);
        line(Checkpoint::open(file.path()));
    }
}

#[test]
fn storages_that_do_not_fit_are_refused() {
    let view = b"K\0K\x0c\x85K\x01\x85";
    let read = |pickle: &[u8], data: &[u8]| {
        let file = archive(pickle, data, false);
        Checkpoint::open(file.path())?.read_f32("cls.predictions.bias", &[12], &mut [0.0; 12])
    };
    read(&pickle("FloatStorage", 12, view), &floats(12)).unwrap();
    assert!(line(read(&pickle("FloatStorage", 12, view), &floats(11))).contains("44 bytes"));
    assert!(line(read(&pickle("DoubleStorage", 12, view), &floats(12))).contains("48 bytes"));
    assert!(line(read(&pickle("IntStorage", 12, view), &floats(12))).contains("I32"));
    assert!(line(read(&pickle("QInt8Storage", 12, view), &floats(12))).contains("torch.QInt8Storage"));
}

#[test]
fn flipped_bits_and_truncations_never_panic() {
    let good = std::fs::read(golden("pytorch_bin/legacy_format.bin")).unwrap();
    let zipped = archive(&pickle("FloatStorage", 12, b"K\0K\x0c\x85K\x01\x85"), &floats(12), true);
    let zipped = std::fs::read(zipped.path()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pytorch_model.bin");
    let try_it = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let Ok(checkpoint) = Checkpoint::open(&path) else { return };
        for name in checkpoint.names() {
            let shape = checkpoint.shape(name).unwrap();
            let count = shape.iter().product::<usize>();
            if count < 1 << 20 {
                // Foreign files have no digest: a flipped value may be read, but nothing may fall over.
                let _ = checkpoint.read_f32(name, &shape, &mut vec![0.0; count]);
            }
        }
    };
    for bytes in [&good[..900], &zipped[..]] {
        // One bit of every byte; which one changes from byte to byte.
        for bit in (0..bytes.len()).map(|i| i * 8 + i * 5 % 8) {
            let mut damaged = if bytes.len() == 900 { good.clone() } else { bytes.to_vec() };
            damaged[bit / 8] ^= 1 << (bit % 8);
            try_it(&damaged);
        }
        for length in 0..bytes.len() {
            std::fs::write(&path, &bytes[..length]).unwrap();
            assert!(Checkpoint::open(&path).is_err(), "{length} bytes");
        }
    }
}

#[test]
fn endless_and_deep_pickles_are_refused_quickly() {
    for filler in [b"]".as_slice(), b"(", b"N", b"\x94", b"}q\x01", b"K\x01\x85"] {
        let mut bytes = b"\x80\x02".to_vec();
        while bytes.len() < 5 << 20 {
            bytes.extend_from_slice(filler);
        }
        line(Checkpoint::open(archive(&bytes, &[], true).path()));
    }
    // A list that holds itself, as the state dict.
    line(Checkpoint::open(archive(b"\x80\x02]q\0h\0a.", &[], false).path()));
    line(Checkpoint::open(archive(b"\x80\x02}.", &[], false).path()));
}
