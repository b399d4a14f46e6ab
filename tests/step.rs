//! The step contract through the binary: golden cases at their tolerances, and one clear line for every wrong input.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

fn step(objective: &str, model: &Path, batch: &Path, output: &Path) -> Output {
    command_on("cpu", objective, model, batch, output).output().unwrap()
}

fn command_on(device: &str, objective: &str, model: &Path, batch: &Path, output: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_retromae-engine"));
    command.args(["step", "--device", device, "--objective", objective, "--model"]).arg(model);
    command.arg("--batch").arg(batch).arg("--output").arg(output);
    command
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Every tensor of a file of floats.
fn floats(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f64>)> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let read = |view: &TensorView<'_>| {
        assert_eq!(view.dtype(), Dtype::F32);
        view.data().chunks_exact(4).map(|c| f64::from(f32::from_le_bytes(c.try_into().unwrap()))).collect()
    };
    file.tensors().into_iter().map(|(name, view)| (name, (view.shape().to_vec(), read(&view)))).collect()
}

/// ‖x − reference‖ / ‖reference‖. Some gradients are zero in exact arithmetic, those of key biases among them: there the reference is
/// rounding noise, and the difference is taken in parts of `whole`, the norm of the whole gradient.
fn error(x: &[f64], reference: &[f64], whole: f64) -> f64 {
    let size = norm(reference.iter().copied());
    norm(x.iter().zip(reference).map(|(x, r)| x - r)) / if size < 1e-12 * whole { whole } else { size }
}

fn norm(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|x| x * x).sum::<f64>().sqrt()
}

fn check(case: &str, objective: &str, more: &[&str]) {
    check_on("cpu", case, objective, more);
    // The emulated GPU, or the device that is named.
    check_on(&std::env::var("RETROMAE_DEVICE").unwrap_or_else(|_| "emulator".into()), case, objective, more);
}

fn check_on(device: &str, case: &str, objective: &str, more: &[&str]) {
    let case = golden(case);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.safetensors");
    let mut command = command_on(device, objective, &case.join("model"), &case.join("batch.safetensors"), &out);
    let ran = command.args(["--precision", "fp32"]).args(more).output().unwrap();
    assert!(ran.status.success(), "{}", stderr(&ran));
    let (found, expected) = (floats(&out), floats(&case.join("expected.safetensors")));
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    assert!(found.len() > 30, "{} tensors", found.len());
    let gradients = expected.iter().filter(|(name, _)| name.starts_with("grad."));
    let whole = norm(gradients.flat_map(|(_, (_, values))| values.iter().copied()));
    for (name, (shape, reference)) in &expected {
        let (got, values) = &found[name];
        assert_eq!(got, shape, "{name}");
        let (error, limit) = (error(values, reference, whole), if name.starts_with("loss") { 1e-5 } else { 1e-4 });
        assert!(error <= limit, "{name}: error {error:.2e}");
    }
    let stdout = String::from_utf8_lossy(&ran.stdout).into_owned();
    assert!(stdout.starts_with("loss "), "{stdout}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
}

#[test]
fn golden_retromae_head32() {
    check("head32/retromae", "retromae", &[]);
}

#[test]
fn golden_mlm_head32() {
    check("head32/mlm", "mlm", &[]);
}

#[test]
fn golden_retromae_head64() {
    check("head64/retromae", "retromae", &[]);
}

#[test]
fn golden_dupmae_head32() {
    check("head32/dupmae", "dupmae", &[]);
}

/// Products of bf16 on the CPU: as far from the reference as PyTorch's own bf16 may be (1.2e-2 for the whole gradient), and not fp32.
#[test]
fn bf16_products_on_the_cpu_stay_within_their_rounding() {
    let (case, dir) = (golden("head64/retromae"), tempfile::tempdir().unwrap());
    let out = dir.path().join("out.safetensors");
    let mut command = command_on("cpu", "retromae", &case.join("model"), &case.join("batch.safetensors"), &out);
    let ran = command.args(["--precision", "bf16"]).output().unwrap();
    assert!(ran.status.success(), "{}", stderr(&ran));
    let (found, expected) = (floats(&out), floats(&case.join("expected.safetensors")));
    let (loss, wanted) = (found["loss"].1[0], expected["loss"].1[0]);
    assert!((loss / wanted - 1.0).abs() < 2e-3, "{loss} for {wanted}");
    let gradients = || expected.iter().filter(|(name, _)| name.starts_with("grad."));
    let whole = norm(gradients().flat_map(|(_, (_, values))| values.iter().copied()));
    let off = norm(gradients().flat_map(|(name, (_, x))| x.iter().zip(&found[name].1).map(|(a, b)| a - b)));
    assert!((1e-4..1.2e-2).contains(&(off / whole)), "{}", off / whole);
}

/// The weight changes the sum, not the parts.
#[test]
fn another_weight_of_the_bag_of_words_loss() {
    let (case, dir) = (golden("head32/dupmae"), tempfile::tempdir().unwrap());
    let out = dir.path().join("out.safetensors");
    let mut command = command_on("cpu", "dupmae", &case.join("model"), &case.join("batch.safetensors"), &out);
    let ran = command.args(["--bow-loss-weight", "2.5"]).output().unwrap();
    assert!(ran.status.success(), "{}", stderr(&ran));
    let (found, expected) = (floats(&out), floats(&case.join("expected.safetensors")));
    let of = |all: &BTreeMap<String, (Vec<usize>, Vec<f64>)>, name: &str| all[name].1[0];
    let sum = of(&expected, "loss.encoder") + of(&expected, "loss.decoder") + 2.5 * of(&expected, "loss.bow");
    assert!((of(&found, "loss") / sum - 1.0).abs() < 1e-5);
    assert!((of(&found, "loss.bow") / of(&expected, "loss.bow") - 1.0).abs() < 1e-5);
    assert!(String::from_utf8_lossy(&ran.stdout).lines().any(|line| line.starts_with("loss.bow ")));
    let mut command = command_on("cpu", "dupmae", &case.join("model"), &case.join("batch.safetensors"), &out);
    std::fs::remove_file(&out).unwrap();
    let ran = command.arg("--bow-loss-weight=-1").output().unwrap();
    assert_eq!(stderr(&ran), "error: --bow-loss-weight -1: no weight of a loss; choose a number that is at least 0\n");
}

/// The golden batch of DupMAE with other bags: words and weight of text 0, and the shape.
#[track_caller]
fn dupmae_with(bags: impl Fn(&mut Vec<usize>, &mut Vec<f32>)) -> (Output, Option<f64>) {
    let (case, dir) = (golden("head32/dupmae"), tempfile::tempdir().unwrap());
    let bytes = std::fs::read(case.join("batch.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor("bag_word_weight").unwrap();
    let mut shape = view.shape().to_vec();
    let mut weights =
        view.data().chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect::<Vec<_>>();
    bags(&mut shape, &mut weights);
    let changed: Vec<u8> = weights.iter().flat_map(|x| x.to_le_bytes()).collect();
    let others = file.tensors().into_iter().filter(|(name, _)| name != "bag_word_weight");
    let changed = (!shape.is_empty()).then(|| TensorView::new(Dtype::F32, shape, &changed).unwrap());
    let all = others.chain(changed.map(|view| ("bag_word_weight".to_string(), view)));
    let (path, out) = (dir.path().join("batch.safetensors"), dir.path().join("out.safetensors"));
    safetensors::serialize_to_file(all, None, &path).unwrap();
    let ran = step("dupmae", &case.join("model"), &path, &out);
    let loss = ran.status.success().then(|| {
        let all = floats(&out);
        assert!(all.values().flat_map(|(_, x)| x).all(|x| x.is_finite()), "every loss and gradient is finite");
        all["loss.bow"].1[0]
    });
    (ran, loss)
}

#[test]
fn bags_that_are_none_or_odd() {
    let refused = |bags: &dyn Fn(&mut Vec<usize>, &mut Vec<f32>), expected: &str| {
        let (ran, _) = dupmae_with(bags);
        let line = stderr(&ran);
        assert_eq!(ran.status.code(), Some(1), "{line}");
        assert!(line.starts_with("error: ") && line.lines().count() == 1 && line.contains("; "), "{line}");
        assert!(line.contains(&format!("batch.safetensors#bag_word_weight: {expected}")), "{line}");
    };
    refused(&|shape, _| shape.clear(), "the input is missing");
    refused(&|shape, _| shape.rotate_left(1), "has shape [1003, 5], not [5, 1003]");
    refused(&|_, weights| weights[700] = 0.5, "row 0 weighs its words differently: ");
    refused(&|_, weights| weights.fill(f32::NAN), "value NaN at element 0 is not finite");
    refused(&|_, weights| weights.iter_mut().for_each(|x| *x = -*x), "row 0 holds -0.0217391");
    refused(&|_, weights| weights.fill(0.1), "row 0 weighs 1003 words, but its text has 48 tokens");
    // A text of special tokens only has no words, a text of one token one; the last word of the vocabulary is in no text.
    let (_, none) = dupmae_with(|_, weights| weights.fill(0.0));
    assert_eq!(none, Some(0.0));
    let (_, one) = dupmae_with(|_, weights| {
        weights.fill(0.0);
        weights[1002] = 1.0;
    });
    assert!(one.is_some_and(|loss| loss > 0.0));
}

#[test]
fn golden_fine_tuning() {
    let group = ["--group-size", "4"];
    check("head32/contrastive", "contrastive", &group);
    let mean = ["--group-size", "4", "--pooling", "mean", "--normalize", "--temperature", "0.02"];
    check("head32/contrastive_mean_normalized", "contrastive", &mean);
    let distill = ["--group-size", "4", "--temperature", "0.7", "--contrastive-loss-weight", "0.2"];
    check("head32/distill", "contrastive", &distill);
    check("head32/untied_projection", "contrastive", &group);
    check("head32/cross_encoder", "cross-encoder", &group);
}

/// A batch to be spoilt: integers by name.
#[derive(Clone)]
struct Batch(BTreeMap<String, (Vec<usize>, Vec<i64>)>);

impl Batch {
    fn golden() -> Batch {
        let bytes = std::fs::read(golden("head32/retromae/batch.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let wide = |view: &TensorView<'_>| match view.dtype() {
            Dtype::I64 => view.data().chunks_exact(8).map(|c| i64::from_le_bytes(c.try_into().unwrap())).collect(),
            Dtype::I32 => {
                view.data().chunks_exact(4).map(|c| i64::from(i32::from_le_bytes(c.try_into().unwrap()))).collect()
            }
            Dtype::U8 | Dtype::BOOL => view.data().iter().map(|&b| i64::from(b)).collect(),
            Dtype::I8 => view.data().iter().map(|&b| i64::from(b as i8)).collect(),
            other => panic!("{other:?}"),
        };
        let named = file.tensors().into_iter().filter(|(name, _)| name != "bag_word_weight");
        Batch(named.map(|(name, view)| (name, (view.shape().to_vec(), wide(&view)))).collect())
    }

    fn values(&mut self, name: &str) -> &mut Vec<i64> {
        &mut self.0.get_mut(name).unwrap().1
    }

    /// Length of the padded texts.
    fn length(&self) -> usize {
        self.0["encoder_input_ids"].0[1]
    }

    /// A cell of padding: (text, position).
    fn padding(&self) -> (usize, usize) {
        let at = self.0["encoder_attention_mask"].1.iter().position(|&m| m == 0).unwrap();
        (at / self.length(), at % self.length())
    }

    /// As a file; tensors named in `as_floats` are stored as f32.
    fn write(&self, path: &Path, as_floats: &[&str]) {
        let stored: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = self
            .0
            .iter()
            .map(|(name, (shape, values))| {
                if as_floats.contains(&name.as_str()) {
                    let bytes = values.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect();
                    (name.clone(), Dtype::F32, shape.clone(), bytes)
                } else {
                    (name.clone(), Dtype::I64, shape.clone(), values.iter().flat_map(|v| v.to_le_bytes()).collect())
                }
            })
            .collect();
        let views = stored
            .iter()
            .map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
        std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }
}

/// Runs the spoilt batch and checks the one line.
#[track_caller]
fn refused(batch: &Batch, as_floats: &[&str], expected: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("batch.safetensors");
    batch.write(&path, as_floats);
    let ran = step("retromae", &golden("head32/retromae/model"), &path, &dir.path().join("out.safetensors"));
    let line = stderr(&ran);
    assert_eq!(ran.status.code(), Some(1), "{line}");
    assert!(line.starts_with("error: ") && line.lines().count() == 1 && line.contains("; "), "{line}");
    assert!(expected.iter().all(|e| line.contains(e)), "{line}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "something was left behind");
}

#[test]
fn the_golden_batch_rewritten_is_accepted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("batch.safetensors");
    Batch::golden().write(&path, &[]);
    let ran = step("retromae", &golden("head32/retromae/model"), &path, &dir.path().join("out"));
    assert!(ran.status.success(), "{}", stderr(&ran));
}

#[test]
fn missing_and_misshapen_inputs() {
    let good = Batch::golden();
    for name in good.0.keys() {
        let mut batch = good.clone();
        batch.0.remove(name);
        refused(&batch, &[], &[&format!("batch.safetensors#{name}: the input is missing")]);
    }
    let mut flat = good.clone();
    let (shape, values) = flat.0.get_mut("encoder_input_ids").unwrap();
    *shape = vec![values.len()];
    refused(&flat, &[], &["#encoder_input_ids: has shape [", "not 2 dimensions"]);
    let mut narrow = good.clone();
    let (shape, values) = narrow.0.get_mut("decoder_labels").unwrap();
    shape[1] -= 1;
    values.truncate(shape[0] * shape[1]);
    refused(&narrow, &[], &["#decoder_labels: has shape ["]);
    let mut square = good.clone();
    let (shape, values) = square.0.get_mut("decoder_attention_mask").unwrap();
    shape[2] -= 1;
    values.truncate(shape.iter().product());
    refused(&square, &[], &["#decoder_attention_mask: has shape ["]);
    let mut empty = good.clone();
    for (shape, values) in empty.0.values_mut() {
        shape[0] = 0;
        values.clear();
    }
    refused(&empty, &[], &["#encoder_attention_mask: holds no sequence"]);
}

#[test]
fn floats_where_integers_belong() {
    refused(&Batch::golden(), &["encoder_input_ids"], &["#encoder_input_ids", "F32"]);
    refused(&Batch::golden(), &["decoder_attention_mask"], &["#decoder_attention_mask", "F32"]);
}

#[test]
fn ids_and_labels_outside_their_range() {
    let good = Batch::golden();
    for (name, value) in [("encoder_input_ids", 1_000_000), ("encoder_input_ids", -1), ("decoder_input_ids", 1 << 40)] {
        let mut batch = good.clone();
        batch.values(name)[1] = value;
        let expected = format!("#{name}: row 0 holds id {value}, outside the vocabulary of ");
        refused(&batch, &[], &[&expected]);
    }
    for name in ["encoder_labels", "decoder_labels"] {
        let mut batch = good.clone();
        batch.values(name)[1] = 1_000_000;
        refused(&batch, &[], &[&format!("#{name}: row 0 holds label 1000000 at position 1")]);
        let mut padded = good.clone();
        let ((text, position), length) = (good.padding(), good.length());
        padded.values(name)[text * length + position] = 7;
        refused(&padded, &[], &[&format!("#{name}: row {text} holds label 7 at position {position}: padding")]);
        let mut none = good.clone();
        none.values(name).fill(-100);
        refused(&none, &[], &[&format!("#{name}: holds no label")]);
    }
    let mut mask = good.clone();
    mask.values("encoder_attention_mask")[0] = 0;
    refused(&mask, &[], &["#encoder_attention_mask: row 0 is not ones followed by zeros"]);
    let mut visible = good.clone();
    visible.values("decoder_attention_mask")[3] = 2;
    refused(&visible, &[], &["#decoder_attention_mask: holds 2, neither 0 nor 1"]);
}

#[test]
fn texts_longer_than_the_model() {
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(golden("head32/retromae/model/config.json")).unwrap()).unwrap();
    let positions = config["max_position_embeddings"].as_u64().unwrap() as usize;
    let length = positions + 1;
    let of = |value: i64| vec![value; length];
    let mut batch = Batch(BTreeMap::new());
    for (name, value) in [
        ("encoder_input_ids", 5),
        ("encoder_attention_mask", 1),
        ("encoder_labels", 6),
        ("decoder_input_ids", 5),
        ("decoder_labels", 6),
    ] {
        batch.0.insert(name.into(), (vec![1, length], of(value)));
    }
    batch.0.insert("decoder_attention_mask".into(), (vec![1, length, length], vec![1; length * length]));
    let expected = format!("row 0 has {length} tokens but the model has {positions} positions");
    refused(&batch, &[], &["#encoder_attention_mask", &expected]);
}

#[test]
fn existing_output_and_wrong_model() {
    let dir = tempfile::tempdir().unwrap();
    let (model, batch) = (golden("head32/retromae/model"), golden("head32/retromae/batch.safetensors"));
    let out = dir.path().join("out");
    std::fs::write(&out, "mine").unwrap();
    let one_line = |ran: Output, expected: &str| {
        let line = stderr(&ran);
        assert_eq!(ran.status.code(), Some(1), "{line}");
        assert!(line.starts_with("error: ") && line.lines().count() == 1 && line.contains(expected), "{line}");
    };
    one_line(step("retromae", &model, &batch, &out), "out: exists already; remove it or choose another --output");
    assert_eq!(std::fs::read(&out).unwrap(), b"mine");
    let free = dir.path().join("free");
    one_line(step("retromae", &golden("head32/mlm/model"), &batch, &free), "parameter is missing");
    one_line(step("retromae", &dir.path().join("absent"), &batch, &free), "no such file or folder");
    one_line(step("retromae", &model, &dir.path().join("absent"), &free), "absent: ");
    one_line(step("retromae", &model, &batch, &dir.path().join("no/folder")), "cannot create");
    assert!(!free.exists());
}
