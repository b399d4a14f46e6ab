//! What losses over all pairs and over bags of words allocate, measured in the emulator: never the matrix of scores, never all logits.
//! In a process of its own, since every piece of memory that any test takes would count.

use std::path::Path;

use half::bf16;
use retromae_engine::data::batch::{Bags, DecoderBatch, PretrainBatch, Visibility};
use retromae_engine::device::{DType, Device};
use retromae_engine::graph::{Capacity, StepDropout};
use retromae_engine::model::config::BertConfig;
use retromae_engine::ops::cross_entropy::Scale;
use retromae_engine::ops::{Count, contrastive};
use retromae_engine::train::step::{Objective, Pretrainer};
use retromae_engine::train::updates::Trainable;

/// 512 queries against 4,096 passages, 768 wide, forward and backward.
#[test]
fn the_contrastive_loss_never_holds_its_scores() {
    let (device, _) = Device::open("emulator").unwrap();
    let Device::Gpu(gpu) = device else { panic!("the emulator is a GPU") };
    let (queries, passages, width) = (512, 4096, 768);
    let embeddings = |rows: usize, name: usize| {
        let tensor = device.zeros(DType::BF16, rows * width);
        let x: Vec<bf16> =
            (0..rows * width).map(|i| bf16::from_f32(((i * 31 + name) % 97) as f32 / 970.0 - 0.05)).collect();
        tensor.upload(&x);
        tensor
    };
    let (q, p) = (embeddings(queries, 1), embeddings(passages, 2));
    let f32s = |len| device.zeros(DType::F32, len);
    let (targets, correct) = (device.zeros(DType::U32, queries), device.zeros(DType::U32, queries));
    targets.upload(&(0..queries as u32).map(|b| 8 * b).collect::<Vec<_>>());
    let (loss, lse, weight) = (f32s(queries), f32s(3 * queries), f32s(1));
    weight.upload(&[1.0f32 / queries as f32]);
    let (dq, dp) = (device.zeros(DType::BF16, queries * width), device.zeros(DType::BF16, passages * width));
    let [q_count, p_count] = [queries, passages].map(|n| {
        let exact = device.zeros(DType::U32, 1);
        exact.upload(&[n as u32]);
        exact
    });
    let shape = contrastive::Shape {
        queries: Count::on_device(queries, &q_count),
        passages: Count::on_device(passages, &p_count),
        width,
        temperature: 0.05,
        targets: &targets,
        hidden: None,
    };
    let scale = Scale { value: 1.0 / queries as f64, on_device: Some(&weight) };
    let before = gpu.allocated();
    contrastive::forward(
        device,
        &contrastive::Forward { shape, q: &q, p: &p, loss: &loss, lse: &lse, correct: &correct },
    );
    let forward = gpu.allocated() - before;
    let backward = contrastive::Backward { shape, scale, q: &q, p: &p, lse: &lse, dq: &dq, dp: &dp };
    contrastive::backward(device, &backward);
    let both = gpu.allocated() - before;
    gpu.synchronize().unwrap();
    assert!(loss.to_vec::<f32>().iter().all(|x| x.is_finite() && *x > 0.0));
    println!("{forward} bytes forward, {both} in all");
    // A matrix of f32 scores has 8 MiB; partial sums of rows are all there is.
    let scores = (queries * passages * 4) as u64;
    assert!(forward < scores / 16, "{forward} bytes");
    assert!(both < scores, "{both} bytes");
}

/// Texts of 64 tokens, every third with an encoder label, all visible to the decoder.
fn texts(tokens: usize) -> PretrainBatch {
    let ids: Vec<u32> = (0..tokens as u32).map(|i| 1000 + i * 37 % 29_000).collect();
    let texts = tokens / 64;
    let (mut bags, rows): (Bags, Vec<u32>) = (Bags::new(), (0..tokens as u32).filter(|row| row % 64 > 0).collect());
    for text in ids.chunks(64) {
        let mut words = text.to_vec();
        words.sort_unstable();
        words.dedup();
        bags.push(&words, 1.0 / 64.0);
    }
    let labelled: Vec<u32> = rows.iter().copied().filter(|row| row % 3 == 0).collect();
    let of = |rows: &[u32]| rows.iter().map(|&row| ids[row as usize]).collect();
    let visibility = Visibility {
        offsets: (0..=texts as u32).map(|s| 2 * s).collect(),
        words: vec![u32::MAX; 2 * texts],
        row: vec![0; tokens],
    };
    PretrainBatch {
        cu_seqlens: (0..=texts as u32).map(|s| 64 * s).collect(),
        samples: (0..texts as u64).collect(),
        encoder_ids: ids.clone(),
        encoder_label_ids: of(&labelled),
        encoder_label_rows: labelled,
        decoder: Some(DecoderBatch { label_ids: of(&rows), label_rows: rows, ids: ids.clone(), visibility }),
        bags: Some(bags),
    }
}

/// A step of few and of many texts over BERT's vocabulary, of DupMAE and of RetroMAE: all memory but that of the parameters.
#[test]
fn the_bag_of_words_loss_holds_the_logits_of_a_chunk() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/head32/dupmae/model");
    let config = BertConfig {
        vocab_size: 30_522,
        num_hidden_layers: 1,
        max_position_embeddings: 64,
        ..BertConfig::read(model).unwrap()
    };
    let bytes = |objective, tokens: usize| {
        let (device, _) = Device::open("emulator").unwrap();
        let Device::Gpu(gpu) = device else { panic!("the emulator is a GPU") };
        let capacity = Capacity { tokens, sequences: tokens / 64, length: 64, encoder_labels: tokens };
        let mut model = Pretrainer::new(device, &config, objective, capacity, DType::BF16).unwrap();
        model.params().load(1, 0.02, |_, _, _| Ok(false)).unwrap();
        let losses = model.gradients(&[texts(tokens)], StepDropout::OFF).unwrap();
        assert!(losses.total().is_finite() && (losses.bow > 0.0) == (objective == Objective::DupMae));
        gpu.allocated()
    };
    let (few, many) = (bytes(Objective::DupMae, 512), bytes(Objective::DupMae, 2048));
    let without = bytes(Objective::RetroMae, 2048);
    println!("{few} bytes for 512 rows, {many} for 2048; RetroMAE: {without}");
    // 512 rows are a chunk on a GPU. Its maxima take less than its logits; rows beyond take their hidden states and tables.
    let logits = |rows: u64| rows * 30_528 * 2;
    assert!(many - few < logits(1536) / 4, "{} bytes for 1,536 more rows", many - few);
    assert!(many - without < logits(512), "{} bytes more than RetroMAE", many - without);
}
