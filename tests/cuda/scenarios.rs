//! What a child does on the fake driver. Each scenario says one line.

use std::io::Write;

use half::bf16;
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::kernels::{ConformanceLdmatrix, ConformanceReductions};
use retromae_engine::device::launch::{ConstPtr, MutPtr, Shape};
use retromae_engine::device::trace::{self, Detail, Piece};
use retromae_engine::device::{DType, Device, Matmul, Matrix, Output, Product, Tensor};
use retromae_engine::error::Result;
use retromae_engine::graph::records::Records;
use retromae_engine::train::collective::launch;

/// Runs the scenario of this name and says how it went.
pub fn run(name: &str) {
    if let Ok(Some(place)) = launch::detect(&|name| std::env::var(name).ok()) {
        Device::choose_cuda(place.local_rank);
    }
    let said = match name {
        "auto" => Device::open("auto").map(|(device, told)| match told {
            Some(told) => format!("{device:?}, {told}"),
            None => format!("{device:?}"),
        }),
        "tuned" => Device::open("cuda").and_then(|(device, told)| tuned(device, told)),
        _ => Device::cuda().and_then(|device| on(name, device)),
    };
    println!("said: {}", said.unwrap_or_else(|e| format!("error: {e}")));
}

fn on(name: &str, device: Device) -> Result<String> {
    let Device::Gpu(gpu) = device else { return Ok("no GPU".into()) };
    match name {
        "open" => {
            let f = gpu.facts();
            let (capability, units, shared) = (f.capability, f.multiprocessors, f.shared_bytes);
            return Ok(format!("{}, {capability:?}, {units}, {shared}, {}, {}", f.name, f.memory, f.software));
        }
        "sequence" => return sequence(device, gpu),
        "products" => return products(device),
        "uploads" => return uploads(device),
        "tuned in a capture" => {
            let case = KINDS[0];
            let (a, b) = (device.tensor(&numbers(1, case.m * case.k)), device.tensor(&numbers(2, case.n * case.k)));
            let c = device.zeros(DType::F32, case.m * case.n);
            let (product, m, n, k) = (case.product, case.m, case.n, case.k);
            let of = |t, columns| Matrix::new(t, columns);
            let (a, b, c, output) = (of(&a, k), of(&b, k), of(&c, n), Output::Set);
            let captured = gpu.capture(|| device.matmul(&Matmul { product, m, n, k, a, b, c, output, bias: None }));
            if let Some(captured) = captured {
                gpu.replay(&*captured);
            }
        }
        "results" => return results(device, gpu),
        "records" => return records(device),
        "ranks" | "beside" | "steps" | "too early" => return crate::ranks::scenario(name, device),
        "memory" => drop(gpu.memory(3 << 30, 0)),
        "launch" => reductions(device, gpu, Shape::linear(1, 32)),
        "shared" => reductions(device, gpu, Shape::linear(1, 32).shared(200_000)),
        "threads" => reductions(device, gpu, Shape::linear(1, 2048)),
        "replay" => {
            let (x, y) = (device.tensor(&[2f32]), device.tensor(&[0f32]));
            let kernel = ConformanceReductions { out: y.get_mut(), x: x.get() };
            let work = || {
                gpu.keep(|| kernel.launch(gpu, Shape::linear(1, 32)));
            };
            if let Some(captured) = gpu.capture(work) {
                gpu.replay(&*captured);
            }
        }
        "product" => {
            let t = device.tensor(&[1f32; 12]);
            let c = device.zeros(DType::F32, 6);
            let (a, b) = (Matrix::new(&t, 4), Matrix::new(&t, 4));
            let (m, n, k) = (2, 3, 4);
            let output = Output::Set;
            device.matmul(&Matmul { product: Product::NT, m, n, k, a, b, c: Matrix::new(&c, 3), output, bias: None });
        }
        other => return Ok(format!("there is no scenario {other}")),
    }
    gpu.synchronize()?;
    Ok("fine".into())
}

fn reductions(device: Device, gpu: &'static Gpu, shape: Shape) {
    let (x, y) = (device.tensor(&[2f32]), device.tensor(&[0f32]));
    gpu.keep(|| ConformanceReductions { out: y.get_mut(), x: x.get() }.launch(gpu, shape));
}

/// The results of a step are read behind the upload of what follows it, to the same place, and are still those of the step.
fn results(device: Device, gpu: &'static Gpu) -> Result<String> {
    let (x, y) = (device.tensor(&[2f32]), device.tensor(&[0f32]));
    let mut told = Vec::new();
    for time in 1..=2 {
        mark(&format!("step {time}"));
        gpu.keep(|| ConformanceReductions { out: y.get_mut(), x: x.get() }.launch(gpu, Shape::linear(1, 32)));
        y.begin_read();
        x.upload(&[10.0 * time as f32]);
        y.upload(&[7f32]);
        told.extend(y.end_read::<f32>());
    }
    mark("end");
    told.extend(y.to_vec::<f32>());
    gpu.check()?;
    Ok(format!("{told:?}"))
}

/// Leaves a mark among the calls.
pub fn mark(text: &str) {
    let path = std::env::var_os("FAKE_LOG").expect("children have a log");
    let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
    writeln!(file.expect("the log can be written"), "-- {text}").expect("the log can be written");
}

fn sequence(device: Device, gpu: &'static Gpu) -> Result<String> {
    let same = matches!(Device::cuda()?, Device::Gpu(again) if std::ptr::eq(again, gpu));
    mark("work");
    let a = device.tensor(&[1f32, 2.0, 3.0, 4.0]);
    let x = device.tensor(&[2f32, 0.0, 0.0, 0.0]);
    let c = device.zeros(DType::F32, 4);
    let spare = device.zeros(DType::F32, 4);
    let reductions = || {
        gpu.keep(|| ConformanceReductions { out: x.get_mut(), x: x.get() }.launch(gpu, Shape::linear(1, 32)));
    };
    let product = |output| {
        let of = |t| Matrix::new(t, 2);
        let (m, n, k) = (2, 2, 2);
        device.matmul(&Matmul { product: Product::NN, m, n, k, a: of(&a), b: of(&a), c: of(&c), output, bias: None });
    };
    reductions();
    product(Output::Set);
    product(Output::Set);
    let first = c.to_vec::<f32>();
    let captured = gpu.capture(|| {
        let (out, matrix) = (MutPtr::new(x.address()), ConstPtr::new(x.address()));
        gpu.keep(|| ConformanceLdmatrix { out, tile: matrix }.launch(gpu, Shape::linear(1, 32)));
        drop(spare);
        c.clear(4);
        product(Output::Set);
        reductions();
    });
    let Some(captured) = captured else { return gpu.check().map(|()| "nothing was captured".into()) };
    let start = gpu.event()?;
    gpu.replay(&*captured);
    gpu.replay(&*captured);
    let end = gpu.event()?;
    let queued = end.since(&*start)?;
    let (again, x_end) = (c.to_vec::<f32>(), x.to_vec::<f32>()[0]);
    drop((start, end, captured));
    drop((a, x, c));
    gpu.check()?;
    Ok(format!("products {first:?} {again:?}, reductions {x_end}, queued {queued}, same GPU {same}"))
}

/// Rounds of other numbers through work that is recorded, and through the same queued piece by piece between events.
fn records(device: Device) -> Result<String> {
    let Device::Gpu(gpu) = device else { return Ok("no GPU".into()) };
    let set = || [4, 4, 1].map(|len| device.zeros(DType::F32, len));
    let work = |[a, c, x]: &[Tensor; 3]| {
        let of = |t| Matrix::new(t, 2);
        let (output, bias) = (Output::Add, None);
        let (a, c) = (of(a), of(c));
        device.matmul(&Matmul { product: Product::NT, m: 2, n: 2, k: 2, a, b: a, c, output, bias });
        gpu.keep(|| ConformanceReductions { out: x.get_mut(), x: x.get() }.launch(gpu, Shape::linear(1, 32)));
        a.tensor.clear(1);
    };
    let (recorded, direct, mut records) = (set(), set(), Records::default());
    let (mut replays, mut times) = (0, 0);
    for round in 1..=5u8 {
        let numbers = [1.0, 2.0, 3.0, 4.0].map(|x: f32| x * f32::from(round));
        for [a, ..] in [&recorded, &direct] {
            a.upload(&numbers);
        }
        let mut run = |set: &[Tensor; 3], detail| {
            let queue = || {
                records.run(device, (), || work(set));
                Ok(())
            };
            trace::record(device, detail, queue).map(|((), trace)| trace)
        };
        let (queued, pieces) = (run(&recorded, Detail::Queued)?, run(&direct, Detail::PieceTimes)?);
        replays += queued.pieces.iter().filter(|(_, piece)| *piece == Piece::Replay).count();
        times += pieces.segments.iter().filter(|segment| segment.milliseconds > 0.0).count();
        let bits =
            |set: &[Tensor; 3]| -> Vec<u32> { set.iter().flat_map(|t| t.to_vec::<f32>()).map(f32::to_bits).collect() };
        let (a, b) = (bits(&recorded), bits(&direct));
        if a != b {
            return Ok(format!("round {round}: {a:?} and {b:?}"));
        }
    }
    let [_, c, x] = &recorded;
    device.check()?;
    Ok(format!("{:?}, {:?}: {replays} replays, {times} times", c.to_vec::<f32>(), x.to_vec::<f32>()))
}

fn uploads(device: Device) -> Result<String> {
    let values =
        |seed: u32, len: usize| -> Vec<u32> { (0..len as u32).map(|i| i.wrapping_mul(2_654_435_761) ^ seed).collect() };
    mark("uploads");
    // More than both pieces hold, so that each is used again; then more than the largest piece, which goes in parts.
    let small: Vec<Tensor> = (0..40).map(|i| device.tensor(&values(i, (1 << 18) + 3))).collect();
    let large = device.tensor(&values(99, (70 << 20) / 4 + 1));
    mark("downloads");
    let kept = small.iter().zip(0..).all(|(t, i)| t.to_vec::<u32>() == values(i, t.len()));
    let kept = kept && large.to_vec::<u32>() == values(99, large.len());
    device.check()?;
    Ok(if kept { "fine" } else { "content was lost" }.into())
}

const KIND: Case =
    Case { product: Product::NT, m: 6, n: 5, k: 7, add: false, bias: true, input: DType::BF16, out: DType::BF16 };

/// Kinds of product whose algorithms are chosen: one that sets, one that adds.
const KINDS: [Case; 2] = [KIND, Case { product: Product::TN, add: true, bias: false, out: DType::F32, ..KIND }];

/// Each kind twice: the algorithm is chosen the first time, and a sum is added to once each time.
fn tuned(device: Device, told: Option<String>) -> Result<String> {
    for case in &KINDS {
        for time in ["first", "second"] {
            mark(&format!("{time} {:?}", case.product));
            let error = case.error(device);
            if !(error <= 0.004) {
                return Ok(format!("{case:?}: off by {error}"));
            }
        }
    }
    device.check()?;
    Ok(told.unwrap_or_else(|| "fine".into()))
}

/// Every kind of product, with odd sizes and rows that are longer than the matrix.
fn products(device: Device) -> Result<String> {
    let mut agreed = 0;
    for (product, add, bias) in [Product::NT, Product::NN, Product::TN]
        .into_iter()
        .flat_map(|p| [(p, false, false), (p, true, false), (p, false, true), (p, true, true)])
    {
        for (m, n, k) in [(3, 5, 7), (1, 8, 4), (6, 1, 1), (4, 3, 0), (16, 16, 16)] {
            for (input, out) in [(DType::F32, DType::F32), (DType::BF16, DType::F32), (DType::BF16, DType::BF16)] {
                let case = Case { product, m, n, k, add, bias, input, out };
                let error = case.error(device);
                if !(error <= 0.004) {
                    return Ok(format!("{case:?}: off by {error}"));
                }
                agreed += 1;
            }
        }
    }
    device.check()?;
    Ok(format!("{agreed} products agree"))
}

#[derive(Clone, Copy, Debug)]
struct Case {
    product: Product,
    m: usize,
    n: usize,
    k: usize,
    add: bool,
    bias: bool,
    input: DType,
    out: DType,
}

fn tensor(device: Device, dtype: DType, values: &[f32]) -> Tensor {
    match dtype {
        DType::BF16 => device.tensor(&values.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>()),
        _ => device.tensor(values),
    }
}

fn values(dtype: DType, t: &Tensor) -> Vec<f32> {
    match dtype {
        DType::BF16 => t.to_vec::<bf16>().into_iter().map(bf16::to_f32).collect(),
        _ => t.to_vec(),
    }
}

/// Small numbers that bf16 holds exactly.
fn numbers(seed: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7 + seed * 13) % 17) as f32 / 8.0 - 1.0).collect()
}

impl Case {
    /// The largest difference from the definition, relative to the largest value; infinite when something beside the output changed.
    fn error(&self, device: Device) -> f32 {
        let &Case { product, m, n, k, add, bias, input, out } = self;
        let ((a_rows, a_columns), (b_rows, b_columns)) = match product {
            Product::NT => ((m, k), (n, k)),
            Product::NN => ((m, k), (k, n)),
            Product::TN => ((k, m), (k, n)),
        };
        // Rows are longer than the matrix by these, and the output begins behind some elements that stay.
        let (sa, sb, sc, offset) = (a_columns + 3, b_columns + 1, n + 2, 4);
        let (a, b) = (numbers(1, a_rows * sa + 1), numbers(2, b_rows * sb + 1));
        let (c, d) = (numbers(3, offset + m * sc), numbers(4, n));
        let on = |dtype, values: &[f32]| tensor(device, dtype, values);
        let (ta, tb, tc, td) = (on(input, &a), on(input, &b), on(out, &c), on(out, &d));
        device.matmul(&Matmul {
            product,
            m,
            n,
            k,
            a: Matrix::new(&ta, sa),
            b: Matrix::new(&tb, sb),
            c: Matrix::columns(&tc, offset, sc),
            output: if add { Output::Add } else { Output::Set },
            bias: bias.then_some(&td),
        });
        let got = values(out, &tc);
        let mut expected = c.clone();
        for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
            let term = |l: usize| match product {
                Product::NT => a[i * sa + l] * b[j * sb + l],
                Product::NN => a[i * sa + l] * b[l * sb + j],
                Product::TN => a[l * sa + i] * b[l * sb + j],
            };
            let at = offset + i * sc + j;
            let sum = (0..k).map(term).sum::<f32>() + if bias { d[j] } else { 0.0 };
            expected[at] = if add { c[at] + sum } else { sum };
        }
        let scale = expected.iter().fold(1f32, |most, v| most.max(v.abs()));
        let inside = |at: usize| at >= offset && (at - offset) % sc < n;
        let off = got.iter().zip(&expected).enumerate().map(|(at, (x, y))| match inside(at) {
            true => (x - y).abs() / scale,
            false if x == y => 0.0,
            false => f32::INFINITY,
        });
        off.fold(0.0, |most, e| if e <= most { most } else { e })
    }
}
