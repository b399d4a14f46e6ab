//! Runs of the program, and what they leave.

use std::path::Path;
use std::process::{Command, Output};

use safetensors::SafeTensors;
use serde_json::Value;

use crate::world::stderr;

/// A line of `metrics.jsonl` without what depends on the clock.
pub fn metrics(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let mut line: serde_json::Map<String, Value> = serde_json::from_str(line).unwrap();
            for key in ["ts", "tps", "data_wait_s", "mem_gib"] {
                line.remove(key);
            }
            Value::Object(line)
        })
        .collect()
}

/// Tensors by name.
pub type Tensors = Vec<(String, Vec<f32>)>;

/// The tensors of a file of the newest checkpoint.
pub fn tensors(out: &Path, file: &str) -> Tensors {
    let newest = std::fs::read_to_string(out.join("checkpoints/latest")).unwrap();
    let bytes = std::fs::read(out.join("checkpoints").join(newest.trim()).join(file)).unwrap();
    let mut all: Tensors = SafeTensors::deserialize(&bytes)
        .unwrap()
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let floats = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            (name, floats.collect())
        })
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(!all.is_empty());
    all
}

/// ‖a − b‖ / ‖b‖ over all tensors together.
pub fn apart(a: &Tensors, b: &Tensors) -> f64 {
    assert_eq!(a.len(), b.len());
    let (mut difference, mut size) = (0.0, 0.0);
    for ((name, a), (other, b)) in a.iter().zip(b) {
        assert_eq!((name, a.len()), (other, b.len()));
        for (a, b) in a.iter().zip(b) {
            difference += f64::from(a - b).powi(2);
            size += f64::from(*b).powi(2);
        }
    }
    (difference / size).sqrt()
}

/// Runs to a good end.
#[track_caller]
pub fn good(command: &mut Command) -> Output {
    let done = command.output().unwrap();
    assert!(done.status.success(), "{}", stderr(&done));
    done
}

/// Two runs saw the same texts and found the same losses, gradients and weights, up to the order of sums. `free` are parameters whose
/// gradient is nothing but rounding, since the loss does not depend on them: AdamW makes steps of full length of it.
#[track_caller]
pub fn assert_same_training(a: &Path, b: &Path, free: &[&str]) {
    let (one, other) = (metrics(a), metrics(b));
    assert_eq!(one.len(), other.len());
    for (x, y) in one.iter().zip(&other) {
        for key in ["step", "split", "tokens", "labels", "lr", "skipped"] {
            assert_eq!(x[key], y[key], "{key} of {x} and {y}");
        }
        for key in ["loss", "grad_norm"] {
            if let (Some(p), Some(q)) = (x[key].as_f64(), y[key].as_f64()) {
                assert!((p - q).abs() <= 2e-5 * q.abs().max(1e-3), "{key} of {x} and {y}");
            }
        }
    }
    assert!(one.iter().any(|line| line["loss"].as_f64().is_some()));
    for (file, most) in [("weights.safetensors", 1e-5), ("moment1.safetensors", 1e-4)] {
        let [a, b] = [a, b].map(|out| {
            let mut all = tensors(out, file);
            let before = all.len();
            all.retain(|(name, _)| !free.contains(&name.as_str()));
            assert_eq!(all.len() + free.len(), before, "{free:?}");
            all
        });
        let distance = apart(&a, &b);
        assert!(distance < most, "{file}: {distance}");
    }
}

/// Two runs left the same bits.
#[track_caller]
pub fn assert_same_bits(a: &Path, b: &Path) {
    assert_eq!(metrics(a), metrics(b));
    for file in ["weights.safetensors", "moment1.safetensors", "moment2.safetensors"] {
        let bits = |out| tensors(out, file).into_iter().map(|(_, x)| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
        assert!(bits(a).eq(bits(b)), "{file}");
    }
}
