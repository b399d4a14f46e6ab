//! NCCL with the one GPU that is here: a single rank, for whom every operation gives back its own numbers. What several ranks do is
//! tested in tests/cuda, on libraries that stand in for it.

use retromae_engine::device::Device;
use retromae_engine::device::ring::{Ring, Together};

use crate::device::{opened, real};

#[test]
fn one_rank_keeps_its_numbers() {
    let Some(name) = real() else {
        println!("left out: NCCL, which only a real GPU has");
        return;
    };
    let gpu = opened(Device::open(&name).map(|(device, _)| device));
    let device = Device::Gpu(gpu);
    // A machine for tests with a GPU has it; without it this is a failure.
    Ring::is_possible(gpu).unwrap();
    let ring = Ring::new(gpu, &Ring::id(gpu).unwrap(), 0, 1).unwrap();
    // Longer than a piece that NCCL sends at a time, and of odd length.
    let numbers: Vec<f32> = (0..(4 << 20) + 1).map(|i| (i as f32 * 0.37).sin()).collect();
    for what in [Together::AllReduce, Together::AllGather, Together::ReduceScatter, Together::Broadcast] {
        let all = device.tensor(&numbers);
        ring.run(what, &all).unwrap();
        assert_eq!(all.to_vec::<f32>(), numbers, "{}", what.name());
    }
    // On the second stream, behind an upload and before a download; several at once, and again.
    for _ in 0..3 {
        let parts: Vec<_> = (0..4).map(|i| device.tensor(&numbers[i << 20..(i + 1) << 20])).collect();
        parts.iter().for_each(|part| ring.begin_sum(part).unwrap());
        ring.finish().unwrap();
        for (i, part) in parts.iter().enumerate() {
            assert_eq!(part.to_vec::<f32>(), numbers[i << 20..(i + 1) << 20], "bucket {i}");
        }
    }
    gpu.check().unwrap();
}
