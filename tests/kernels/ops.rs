//! The ops on a GPU against the ops on the CPU: their launches, that is grids, strides, offsets, scratch memory and counts of rows.
//!
//! What the kernels compute is tested beside this, with all their shapes. Here every matrix has room for more rows than are in use, as
//! recorded work has it. These hold NaN, so that whoever reads one without need shows.

mod attention;
mod groups;
mod joined;
mod lexical;
mod losses;
mod rows;
mod search;

use crate::harness::*;
use half::{bf16, f16};
use retromae_engine::device::emulator::Options;
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::{DType, Device, Element, Tensor};
use retromae_engine::ops::{Count, RowNames};
use std::sync::{Mutex, PoisonError};

/// Rows of every bound that are not in use.
const SPARE: usize = 5;

/// Relative error of a bf16 result: it and the stored values that it is made of, at most three, are off by at most 2^-9 each.
const BF16_ERROR: f64 = 4.0 / 512.0;

/// Where an op runs.
#[derive(Clone, Copy)]
struct Place {
    /// Nothing: on the CPU, in f64.
    gpu: Option<&'static Gpu>,
    /// What matrices are stored in. The CPU computes with the values that are left then.
    storage: DType,
}

/// What is behind the part of a tensor that is in use.
#[derive(Clone, Copy, PartialEq)]
enum Rest {
    Untouched,
    Zero,
    /// Products write all rows of the bound.
    Any,
}

/// Names and values of what an op computes.
type Results = Vec<(&'static str, Vec<f64>)>;

impl Place {
    fn device(self) -> Device {
        self.gpu.map_or(Device::Cpu, Device::Gpu)
    }

    /// Values in the place's type for them, and poison for `room` more elements, which the CPU has no use for.
    fn tensor<T: Element>(self, values: &[T], room: usize) -> Tensor {
        let Some(gpu) = self.gpu else { return Tensor::from_slice(values) };
        let poison = vec![0xFFu8; room * size_of::<T>()];
        Device::Gpu(gpu).tensor(&[values, &bytemuck::pod_collect_to_vec(&poison)].concat())
    }

    /// Hidden states, weights of products, and their gradients.
    fn matrix(self, x: &[f32], room: usize) -> Tensor {
        match (self.gpu, self.storage) {
            (Some(_), DType::BF16) => self.tensor(&x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>(), room),
            (None, DType::BF16) => self.wide(&rounded::<bf16>(x), room),
            (Some(_), DType::F16) => self.tensor(&x.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>(), room),
            (None, DType::F16) => self.wide(&rounded::<f16>(x), room),
            _ => self.wide(x, room),
        }
    }

    /// What is f32 whatever the storage.
    fn wide(self, x: &[f32], room: usize) -> Tensor {
        if self.gpu.is_some() { self.tensor(x, room) } else { self.tensor(&f64s(x), 0) }
    }

    /// A matrix to be written.
    fn unset(self, len: usize, room: usize) -> Tensor {
        self.matrix(&vec![f32::NAN; len], room)
    }

    fn unset_wide(self, len: usize, room: usize) -> Tensor {
        self.wide(&vec![f32::NAN; len], room)
    }

    /// A number of rows, for [`Self::count`].
    fn number(self, n: usize) -> Tensor {
        self.tensor(&[n as u32], 0)
    }

    fn count(self, n: usize, exact: &Tensor) -> Count<'_> {
        if self.gpu.is_some() { Count::on_device(n + SPARE, exact) } else { n.into() }
    }

    /// Names of rows here, for [`row_names`](crate::reference::row_names).
    fn names(self, n: &RowNames<'_>) -> [Tensor; 3] {
        let [sequence, position] = [n.sequence, n.position].map(|x| self.tensor::<u32>(&x.to_vec(), SPARE));
        [self.tensor::<u64>(&n.samples.to_vec(), SPARE), sequence, position]
    }

    /// The first `used` elements, after a look at the others.
    #[track_caller]
    fn take(self, tensor: &Tensor, used: usize, rest: Rest) -> Vec<f64> {
        let all: Vec<f64> = match tensor.dtype() {
            DType::F32 => f64s(&tensor.to_vec()),
            DType::BF16 => f64s(&widened(tensor.to_vec::<bf16>())),
            DType::U32 => tensor.to_vec::<u32>().into_iter().map(f64::from).collect(),
            _ => tensor.to_vec(),
        };
        self.device().check().expect("correct ops raise nothing");
        let (used, others) = all.split_at(used);
        let untouched = |x: &f64| x.is_nan() || *x == f64::from(u32::MAX);
        match rest {
            Rest::Untouched => assert!(others.iter().all(untouched), "rows that are not in use were written"),
            Rest::Zero => assert!(others.iter().all(|&x| x == 0.0), "rows that are not in use were to become zero"),
            Rest::Any => {}
        }
        used.to_vec()
    }
}

/// The GPU; a new one where it is emulated. That has no scratch memory yet, so guard pages show an op that asks for too little.
fn fresh() -> &'static Gpu {
    match real() {
        Some(_) => gpu(),
        None => opened(Device::emulator(Options::default())),
    }
}

/// Runs `op` on the GPU and on the CPU, in both storage types; both must agree.
#[track_caller]
fn check(what: &str, op: impl Fn(Place) -> Results) {
    for (storage, allowed) in [(DType::F32, 1e-5), (DType::BF16, BF16_ERROR)] {
        let exact = op(Place { gpu: None, storage });
        let got = {
            // The ops of a real GPU share its scratch memory, and dropout its key.
            static TURN: Mutex<()> = Mutex::new(());
            let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
            let gpu = fresh();
            gpu.set_dropout_key(dropout(0.5, 0).mask.key);
            op(Place { gpu: Some(gpu), storage })
        };
        for ((name, got), (_, exact)) in got.iter().zip(&exact) {
            let error = relative(&got.iter().map(|&x| x as f32).collect::<Vec<_>>(), exact);
            assert!(error <= allowed, "{name} of {what} in {storage:?}: relative error {error:e}, allowed {allowed:e}");
        }
    }
}
