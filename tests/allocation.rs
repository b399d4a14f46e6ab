//! What losses over all pairs allocate, measured in the emulator: never the matrix of scores. In a process of its own, since every piece
//! of memory that any test takes would count.

use half::bf16;
use retromae_engine::device::{DType, Device};
use retromae_engine::ops::cross_entropy::Scale;
use retromae_engine::ops::{Count, contrastive};

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
