//! Sums over ranks beside other work: which call stands where among those to the driver and to NCCL.
//!
//! The fake driver knows what each piece of work touches, and refuses what may run at the same time as a sum of the same gradients.

use std::sync::Arc;

use retromae_engine::Result;
use retromae_engine::data::batch::{Builder, PretrainBatch};
use retromae_engine::data::corpus::{MemoryCorpus, Tokens};
use retromae_engine::data::masking::{MaskRules, Vocabulary};
use retromae_engine::data::order::{Order, Part};
use retromae_engine::device::kernels::ConformanceReductions;
use retromae_engine::device::launch::Shape;
use retromae_engine::device::{DType, Device, Tensor};
use retromae_engine::graph::Capacity;
use retromae_engine::model::config::{Activation, BertConfig};
use retromae_engine::ops::optimizer::AdamW;
use retromae_engine::train::collective::tcp::Tcp;
use retromae_engine::train::collective::{Team, nccl};
use retromae_engine::train::step::{Objective, Pretrainer};
use retromae_engine::train::updates::Trainable;

use crate::fakes::{Libraries, Said};
use crate::ranks::both_of;
use crate::scenarios::mark;

const LAYERS: usize = 3;

/// Two numbers: each is computed, summed over ranks beside what follows, and used.
pub fn beside(tcp: &Arc<Tcp>, device: Device) -> Result<String> {
    let Device::Gpu(gpu) = device else { return Ok("no GPU".into()) };
    let team = nccl::team(&Team::new(tcp.clone()), device, &mut |line| panic!("{line}"))?;
    let of = |value: f32| device.tensor(&[value]);
    let (own, [g, h, x, y]) = (of(team.rank() as f32), [0.0; 4].map(of));
    let plus_one = |to: &Tensor, from: &Tensor| {
        gpu.keep(|| ConformanceReductions { out: to.get_mut(), x: from.get() }.launch(gpu, Shape::linear(1, 32)));
    };
    for (to, from) in [(&g, &own), (&h, &own)] {
        plus_one(to, from);
        team.begin_all_reduce(to)?;
    }
    team.finish()?;
    plus_one(&x, &g);
    plus_one(&y, &h);
    let numbers = [x, y].map(|t| t.to_vec::<f32>());
    device.check()?;
    Ok(format!("{numbers:?}"))
}

fn config() -> BertConfig {
    BertConfig {
        vocab_size: 40,
        hidden_size: 32,
        num_hidden_layers: LAYERS,
        num_attention_heads: 1,
        intermediate_size: 32,
        hidden_act: Activation::Gelu,
        hidden_dropout_prob: 0.1,
        attention_probs_dropout_prob: 0.1,
        max_position_embeddings: 64,
        type_vocab_size: 2,
        initializer_range: 0.02,
        layer_norm_eps: 1e-12,
        pad_token_id: 0,
        raw: serde_json::Map::new(),
    }
}

/// The batch of some of eight texts of 60 tokens.
fn batch(samples: std::ops::Range<u64>) -> PretrainBatch {
    let mut corpus = MemoryCorpus::default();
    for text in 0..8u32 {
        let ids: Vec<u32> = [1].into_iter().chain((0..58).map(|i| 5 + (text * 13 + i * 7) % 35)).chain([2]).collect();
        corpus.push(Tokens { ids: &ids, word_start: &[true; 60] });
    }
    let vocabulary = Vocabulary { size: 40, cls: 1, sep: 2, pad: 0, mask: 4, unk: Some(3) };
    let rules = MaskRules::new(3, vocabulary, 0.3, Some(0.5)).unwrap();
    Builder::new(rules, Order::new(3, 8, 0).unwrap(), Part::Train, 64).build(&corpus, samples).unwrap()
}

/// Five steps. Rank 0 records its batch in the second; rank 1 has another in that, and none in the fourth; both have two in the last.
pub fn steps(tcp: &Arc<Tcp>, device: Device, too_early: bool) -> Result<String> {
    let team = nccl::team(&Team::new(tcp.clone()), device, &mut |line| panic!("{line}"))?;
    let capacity = Capacity { tokens: 480, sequences: 8, length: 64, encoder_labels: 480 };
    let mut model = Pretrainer::new(device, &config(), Objective::RetroMae, capacity, DType::BF16)?;
    model.params().load(3, 0.1, |_, _, _| Ok(false))?;
    let rank = team.rank();
    model.optimizer_mut().join(team);
    model.optimizer_mut().cut(1);
    for t in 1..=5 {
        let micro: &[PretrainBatch] = match (rank, t) {
            (1, 2) => &[batch(0..7)],
            (1, 4) => &[],
            (_, 5) => &[batch(0..2), batch(2..4)],
            _ => &[batch(0..2)],
        };
        mark(&format!("step {t}"));
        if too_early && t == 3 {
            model.optimizer().complete(model.params(), &(0..model.params().entries()))?;
        }
        model.step(micro, &AdamW::default(), 0.01, t, 3)?;
    }
    mark("end");
    device.check()?;
    Ok(format!("{} buckets", model.optimizer().buckets().len()))
}

#[test]
fn sums_begun_beside_other_work_come_behind_what_they_sum_and_before_what_needs_them() {
    let run = |more: &[(&str, &str)]| both_of("beside", [Libraries::All; 2], [""; 2], more);
    let Some(late) = run(&[]) else { return };
    let Some(early) = run(&[("FAKE_EARLY", "1")]) else { return };
    for Said { lines, .. } in late.iter().chain(&early) {
        assert_eq!(lines, &["[[4.0], [4.0]]"]);
    }
    // Without waits the driver notices, and what it notices is real.
    let Some(noticed) = run(&[("FAKE_UNORDERED", "1")]) else { return };
    for Said { lines, .. } in &noticed {
        assert!(lines[0].contains("a sum over ranks: NCCL error 1 (fake failure)"), "{lines:?}");
    }
    assert!(noticed.iter().any(|said| said.log.iter().any(|line| line == "race of stream 2")));
    for early in ["0", "1"] {
        let Some(wrong) = run(&[("FAKE_UNORDERED", "2"), ("FAKE_EARLY", early)]) else { return };
        for (rank, Said { lines, .. }) in wrong.iter().enumerate() {
            assert_ne!(lines, &["[[4.0], [4.0]]"], "rank {rank}, early {early}");
        }
    }
}

/// Where calls stand among those of a step.
fn places(step: &[String], begin: &str) -> Vec<usize> {
    (0..step.len()).filter(|&i| step[i].starts_with(begin)).collect()
}

#[test]
fn buckets_are_summed_while_the_backward_goes_on_and_awaited_by_the_optimizer() {
    for more in [&[][..], &[("FAKE_EARLY", "1")]] {
        let Some(said) = both_of("steps", [Libraries::All; 2], [""; 2], more) else { return };
        for (rank, Said { lines, log }) in said.iter().enumerate() {
            // The decoder and the head, a layer each, the embeddings, and what does not decay.
            let buckets = 1 + LAYERS + 2;
            assert_eq!(lines, &[format!("{buckets} buckets")], "rank {rank}");
            let steps: Vec<&[String]> = log.split(|line| line.starts_with("-- ")).collect();
            assert_eq!(steps.len(), 7, "rank {rank}");
            for (t, step) in (1..).zip(&steps[1..6]) {
                let what = format!("rank {rank}, step {t}: {step:#?}");
                let sums = places(step, "ncclAllReduce");
                assert_eq!(sums.len(), buckets, "{what}");
                for &at in &sums {
                    assert_eq!(step[at - 2..at], ["cuEventRecord", "cuStreamWaitEvent 2 for 1"], "{what}");
                }
                let (joins, updates) =
                    (places(step, "cuStreamWaitEvent 1 for 2"), places(step, "cuLaunchKernel adamw"));
                assert!(joins.len() == 1 && updates.len() == 1, "{what}");
                assert!(sums[buckets - 1] < joins[0] && joins[0] < updates[0], "{what}");
                let replays = places(step, "cuGraphLaunch");
                if (rank, t) == (1, 4) {
                    assert!(replays.is_empty() && places(step, "cublasLtMatmul").is_empty(), "{what}");
                    continue;
                }
                // The gradients of embeddings come behind the sums of all layers.
                let direct = places(step, "cuLaunchKernel embed_backward");
                let last = *direct.iter().chain(&replays).max().expect("work");
                assert!(sums[LAYERS] < last, "{what}");
                if t == 3 {
                    assert_eq!(replays.len(), LAYERS + 2, "{what}");
                    let between = |i: usize| sums.iter().filter(|&&at| replays[i] < at && at < replays[i + 1]).count();
                    assert!((0..=LAYERS).all(|i| between(i) == 1), "{what}");
                }
            }
        }
    }
}

/// Where all work is waited for when it is queued, and records are lists.
#[test]
fn buckets_are_summed_where_all_work_is_waited_for() {
    let Some(said) = both_of("steps", [Libraries::All; 2], [""; 2], &[("RETROMAE_SYNC", "1")]) else { return };
    for Said { lines, log } in &said {
        assert_eq!(lines, &[format!("{} buckets", 1 + LAYERS + 2)]);
        let sums: Vec<usize> = places(log, "ncclAllReduce");
        assert!(sums.len() == 5 * (1 + LAYERS + 2) && sums.iter().all(|&at| log[at + 1] == "cuStreamSynchronize"));
    }
}

#[test]
fn a_bucket_that_is_summed_too_early_or_not_awaited_is_found() {
    let Some(said) = both_of("too early", [Libraries::All; 2], [""; 2], &[]) else { return };
    for Said { lines, .. } in &said {
        assert!(lines[0].starts_with("error: ") && lines[0].contains("CUDA_ERROR_LAUNCH_FAILED"), "{lines:?}");
    }
    assert!(said.iter().any(|said| said.log.iter().any(|line| line == "race of stream 1")));
    let Some(said) = both_of("steps", [Libraries::All; 2], [""; 2], &[("FAKE_UNORDERED", "1")]) else { return };
    assert!(said.iter().all(|said| said.lines[0].contains("a sum over ranks: NCCL error 1")), "{:?}", said[0].lines);
    assert!(said.iter().any(|said| said.log.iter().any(|line| line == "race of stream 2")));
}

#[test]
fn a_failure_at_any_sum_ends_both_ranks_with_one_line() {
    let nccl = "a sum over ranks: NCCL error 5 (fake failure); run again with NCCL_DEBUG=WARN, which says more";
    let driver = "ordering two queues: CUDA_ERROR_LAUNCH_FAILED (what the fake was told to say)";
    let sums = (0..2 * (LAYERS + 3)).map(|calls| (format!("ncclAllReduce:5:{calls}"), nccl));
    let waits = [0, 6, 9].map(|calls| (format!("cuStreamWaitEvent:719:{calls}"), driver));
    let opening = ("cuStreamCreateWithPriority:719".to_string(), "opening a second queue of the GPU");
    for (failing, cause) in sums.chain(waits).chain([opening]) {
        let Some(said) = both_of("steps", [Libraries::All; 2], ["", &failing], &[]) else { return };
        let [first, second] = said.map(|said| said.lines.concat());
        assert!(second.starts_with(&format!("error: {cause}")), "{failing}: {second}");
        assert_eq!(first, second.replacen("error: ", "error: rank 1: ", 1), "{failing}");
    }
}
