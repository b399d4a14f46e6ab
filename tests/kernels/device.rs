//! The GPU that kernels are tested on, its buffers, and the orders that must not change a bit.
//!
//! It is the emulated one unless `RETROMAE_DEVICE` names another; a GPU that is named and not there is a failure.

use retromae_engine::device::Device;
use retromae_engine::device::emulator::{Asynchronous, Options};
use retromae_engine::device::gpu::{Gpu, Memory};
use retromae_engine::device::launch::{ConstPtr, MutPtr};
use std::sync::OnceLock;

/// Runs on a real GPU that must give the same bits.
const REPEATS: usize = 3;

/// A GPU and the order in which it runs.
type Ordered = (String, &'static Gpu);

thread_local! {
    /// The emulator with every schedule and asynchronous mode. Each test has its own, so that no failure reaches another.
    static EMULATED: Vec<Ordered> = orders().into_iter().map(|o| (format!("{o:?}"), opened(Device::emulator(o)))).collect();
}

fn orders() -> Vec<Options> {
    let mut all = vec![Options::default()];
    for asynchronous in [Asynchronous::Late, Asynchronous::AtIssue, Asynchronous::Random] {
        for seed in [0, 1, 2] {
            all.push(Options { seed, asynchronous, threads: 1 + (seed as u32 & 1), ..Options::default() });
        }
    }
    all
}

/// The GPU that is there now.
pub fn opened(device: retromae_engine::Result<Device>) -> &'static Gpu {
    match device {
        Ok(Device::Gpu(gpu)) => gpu,
        Ok(Device::Cpu) => panic!("kernels run on a GPU or in the emulator"),
        Err(e) => panic!("{e}"),
    }
}

/// Name of the real GPU to test on, if any.
pub fn real() -> Option<String> {
    std::env::var("RETROMAE_DEVICE").ok().filter(|name| name != "emulator")
}

/// Whether tests of the emulator itself make sense; says what is left out where they do not.
pub fn emulated(what: &str) -> bool {
    if real().is_some() {
        println!("left out: {what}, which only the emulator has");
    }
    real().is_none()
}

fn devices() -> Vec<Ordered> {
    static REAL: OnceLock<&Gpu> = OnceLock::new();
    match real() {
        None => EMULATED.with(Vec::clone),
        Some(name) => {
            let gpu = REAL.get_or_init(|| opened(Device::open(&name).map(|(device, _)| device)));
            (1..=REPEATS).map(|i| (format!("run {i} on {}", gpu.facts().name), *gpu)).collect()
        }
    }
}

/// The device to test on.
pub fn gpu() -> &'static Gpu {
    devices()[0].1
}

/// Runs `f` under every schedule and asynchronous mode, on a real GPU several times, and returns what it computed: the same bits each
/// time.
pub fn in_every_order(f: impl Fn(&'static Gpu) -> Vec<Vec<f32>>) -> Vec<Vec<f32>> {
    let bits = |x: &[Vec<f32>]| x.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
    let mut first = None;
    for (order, gpu) in devices() {
        let got = f(gpu);
        gpu.synchronize().expect("correct kernels raise nothing");
        let first = first.get_or_insert_with(|| got.clone());
        assert!(bits(&got) == bits(first), "other bits under {order}");
    }
    first.unwrap_or_default()
}

/// A device buffer.
pub struct Buffer<T> {
    memory: Memory,
    len: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: bytemuck::Pod> Buffer<T> {
    /// `len` elements of all bits set: NaN.
    pub fn poisoned(gpu: &'static Gpu, len: usize) -> Self {
        let bytes = len * size_of::<T>();
        // What the emulator hands out is poisoned already, and its checker knows that nobody wrote it.
        let memory = if real().is_some() { gpu.memory(bytes, 0xFF) } else { gpu.uninitialised(bytes) };
        Buffer { memory, len, element: std::marker::PhantomData }
    }

    pub fn of(gpu: &'static Gpu, values: &[T]) -> Self {
        Self::with_room(gpu, values, values.len())
    }

    /// `values`, and poison up to `len` elements.
    pub fn with_room(gpu: &'static Gpu, values: &[T], len: usize) -> Self {
        let buffer = Self::poisoned(gpu, len);
        buffer.memory.write(0, bytemuck::cast_slice(values));
        buffer
    }

    /// The first `used` elements; the others must still be poison.
    pub fn take(&self, used: usize) -> Vec<T> {
        let mut bytes = vec![0; self.len * size_of::<T>()];
        self.memory.read(0, &mut bytes);
        self.memory.gpu().check().expect("correct kernels raise nothing");
        let split = used * size_of::<T>();
        assert!(bytes[split..].iter().all(|&b| b == 0xFF), "written past the {used} elements that are in use");
        bytemuck::pod_collect_to_vec(&bytes[..split])
    }

    pub fn get(&self) -> ConstPtr<T> {
        ConstPtr::new(self.memory.address())
    }

    pub fn get_mut(&self) -> MutPtr<T> {
        MutPtr::new(self.memory.address())
    }
}
