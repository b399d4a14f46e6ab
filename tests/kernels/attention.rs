//! Fused attention over packed sequences.

use crate::harness::*;
use crate::reference::*;
use half::bf16;
use retromae_engine::device::emulator::{Emulator, Options};
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::launch::{ConstPtr, MutPtr};
use retromae_engine::device::{DType, Device, Matrix, Tensor, kernels};
use retromae_engine::ops::attention::hopper::Whole;
use retromae_engine::ops::attention::{self, Backward, Forward, Gradient, Pass};

/// Rows of poison after every packed matrix: no kernel reads or writes past the last sequence.
const ROOM: usize = 3;

#[derive(Clone, Copy)]
struct Case<'a> {
    heads: usize,
    head_size: usize,
    lengths: &'a [usize],
    /// Positions that ask in each sequence; `None`: all, in the fused layout `[T, 3C]`, else `[R, C]` and `[T, 2C]`.
    queries: Option<&'a [&'a [u32]]>,
    p: f32,
    /// Size of the queries: scores grow with it.
    size: f32,
    /// By warpgroups, with this backward.
    whole: Option<Whole>,
}

const PLAIN: Case =
    Case { heads: 2, head_size: 64, lengths: &[1, 2, 33], queries: None, p: 0.0, size: 1.0, whole: None };

/// One row, the last, none, and all of a short one.
const SOME: &[&[u32]] = &[&[0], &[1], &[], &[0, 1, 2]];
const SOME_LENGTHS: &[usize] = &[1, 2, 33, 3];

/// Where one run's matrices lie.
struct Views<T> {
    q: ConstPtr<T>,
    k: ConstPtr<T>,
    v: ConstPtr<T>,
    dq: MutPtr<T>,
    dk: MutPtr<T>,
    dv: MutPtr<T>,
    q_stride: i32,
    kv_stride: i32,
}

/// Buffers that the kernels write densely.
struct Dense<T> {
    out: Buffer<T>,
    dout: Buffer<T>,
    lse: Buffer<f32>,
    delta: Buffer<f32>,
}

trait Kernels: Storage {
    fn launch(device: &'static Gpu, batch: &DeviceBatch, case: &Case, x: &Views<Self>, y: &Dense<Self>);

    fn launch_whole(_: &'static Gpu, _: &DeviceBatch, _: &Case, _: &Views<Self>, _: &Dense<Self>, _: Whole) {
        panic!("warpgroups multiply bf16 only");
    }
}

macro_rules! kernels_of {
    ($t:ty: $($d:literal => $forward:ident $dq:ident $dkv:ident)* $(; $more:item)?) => {
        impl Kernels for $t {
            $($more)?

            fn launch(device: &'static Gpu, batch: &DeviceBatch, case: &Case, x: &Views<$t>, y: &Dense<$t>) {
                let (heads, site, dropout) = (case.heads as i32, batch.site(), batch.dropout());
                let (q_stride, k_stride, v_stride) = (x.q_stride, x.kv_stride, x.kv_stride);
                let (dq_stride, dkv_stride) = (x.q_stride, x.kv_stride);
                let (q, k, v, dout) = (x.q, x.k, x.v, y.dout.get());
                let shape = |kernel, pass| batch.launch(kernel, pass, size_of::<$t>());
                let done = match case.head_size {
                    $($d => {
                        let (out, lse, batch) = (y.out.get_mut(), y.lse.get_mut(), batch.get(Pass::Forward));
                        let forward = kernels::$forward {
                            out, lse, q, q_stride, k, k_stride, v, v_stride, batch, dropout, site, heads,
                        };
                        forward.launch(device, shape(kernels::$forward::kernel(), Pass::Forward))
                    })*
                    other => panic!("no kernel for heads of {other}"),
                };
                done.expect("a correct kernel raises nothing");
                let done = match case.head_size {
                    $($d => {
                        let (out, lse, delta) = (y.out.get(), y.lse.get(), y.delta.get_mut());
                        let (dq, batch) = (x.dq, batch.get(Pass::Queries));
                        let queries = kernels::$dq {
                            dq, dq_stride, delta, q, q_stride, k, k_stride, v, v_stride, out, lse, dout, batch, dropout, site, heads,
                        };
                        queries.launch(device, shape(kernels::$dq::kernel(), Pass::Queries))
                    })*
                    other => panic!("no kernel for heads of {other}"),
                };
                done.expect("a correct kernel raises nothing");
                let done = match case.head_size {
                    $($d => {
                        let (lse, delta) = (y.lse.get(), y.delta.get());
                        let (dk, dv, batch) = (x.dk, x.dv, batch.get(Pass::Keys));
                        let keys = kernels::$dkv {
                            dk, dv, dkv_stride, q, q_stride, k, k_stride, v, v_stride, lse, delta, dout, batch, dropout, site, heads,
                        };
                        keys.launch(device, shape(kernels::$dkv::kernel(), Pass::Keys))
                    })*
                    other => panic!("no kernel for heads of {other}"),
                };
                done.expect("a correct kernel raises nothing");
            }
        }
    };
}

kernels_of!(f32:
    32 => AttentionForwardD32F32 AttentionBackwardDqD32F32 AttentionBackwardDkvD32F32
    64 => AttentionForwardD64F32 AttentionBackwardDqD64F32 AttentionBackwardDkvD64F32
    128 => AttentionForwardD128F32 AttentionBackwardDqD128F32 AttentionBackwardDkvD128F32);
kernels_of!(bf16:
32 => AttentionForwardD32Bf16 AttentionBackwardDqD32Bf16 AttentionBackwardDkvD32Bf16
64 => AttentionForwardD64Bf16 AttentionBackwardDqD64Bf16 AttentionBackwardDkvD64Bf16
128 => AttentionForwardD128Bf16 AttentionBackwardDqD128Bf16 AttentionBackwardDkvD128Bf16;

fn launch_whole(
    device: &'static Gpu,
    batch: &DeviceBatch,
    case: &Case,
    x: &Views<bf16>,
    y: &Dense<bf16>,
    whole: Whole,
) {
    let (heads, site, dropout) = (case.heads as i32, batch.site(), batch.dropout());
    let (q_stride, k_stride, v_stride) = (x.q_stride, x.kv_stride, x.kv_stride);
    let (dq_stride, dkv_stride, q, k, v) = (x.q_stride, x.kv_stride, x.q, x.k, x.v);
    let (out, lse, forward_batch) = (y.out.get_mut(), y.lse.get_mut(), batch.get(Pass::Forward));
    let forward = kernels::AttentionForwardHopperD64Bf16 {
        out, lse, q, q_stride, k, k_stride, v, v_stride, batch: forward_batch, dropout, site, heads,
    };
    let shape = batch.launch_warpgroups(kernels::AttentionForwardHopperD64Bf16::kernel());
    forward.launch(device, shape).expect("a correct kernel raises nothing");
    let (out, lse, dout, dq, dk, dv) = (y.out.get(), y.lse.get(), y.dout.get(), x.dq, x.dk, x.dv);
    macro_rules! backward {
        ($kernel:ident) => {{
            let (shape, tiles) = batch.launch_whole(kernels::$kernel::kernel(), whole);
            let batch = batch.get(Pass::Whole);
            kernels::$kernel {
                dq, dq_stride, dk, dv, dkv_stride, q, q_stride, k, k_stride, v, v_stride, out, lse, dout, batch, dropout, site,
                heads, tiles,
            }
            .launch(device, shape)
        }};
    }
    let done = match whole {
        Whole::Short => backward!(AttentionBackwardShortD64Bf16),
        Whole::Long => backward!(AttentionBackwardLongD64Bf16),
    };
    done.expect("a correct kernel raises nothing");
});

/// Queries, keys, values, gradient of the output.
type Inputs = [Vec<f32>; 4];

impl Case<'_> {
    fn problem(&self) -> Problem {
        Problem {
            heads: self.heads,
            head_size: self.head_size,
            lengths: self.lengths.to_vec(),
            positions: match self.queries {
                Some(queries) => queries.iter().map(|q| q.to_vec()).collect(),
                None => self.lengths.iter().map(|&n| (0..n as u32).collect()).collect(),
            },
            dropout: dropout(self.p, 6),
        }
    }

    fn inputs<T: Storage>(&self) -> Inputs {
        let p = self.problem();
        let (rows, tokens) = (p.rows() * p.width(), p.tokens() * p.width());
        let mut x = [normal(rows, 1), normal(tokens, 2), normal(tokens, 3), normal(rows, 4)];
        x[0].iter_mut().for_each(|q| *q *= self.size);
        x.map(|x| rounded::<T>(&x))
    }

    fn run<T: Kernels>(&self, device: &'static Gpu, [q, k, v, dout]: &Inputs) -> Results {
        let p = self.problem();
        let (c, rows, tokens) = (p.width(), p.rows(), p.tokens());
        let dense = Dense {
            out: Buffer::<T>::poisoned(device, (rows + ROOM) * c),
            dout: stored(device, dout, ROOM * c),
            lse: Buffer::poisoned(device, (rows + ROOM) * self.heads),
            delta: Buffer::poisoned(device, (rows + ROOM) * self.heads),
        };
        let batch = DeviceBatch::new(device, &p);
        let launch = |x: &Views<T>| match self.whole {
            Some(whole) => T::launch_whole(device, &batch, self, x, &dense, whole),
            None => T::launch(device, &batch, self, x, &dense),
        };
        let (dq, dk, dv) = if self.queries.is_none() {
            let qkv: Buffer<T> = stored(device, &side_by_side(&[q, k, v], c), ROOM * 3 * c);
            let grad = Buffer::<T>::poisoned(device, (tokens + ROOM) * 3 * c);
            let stride = 3 * c as i32;
            let [q, k, v] = [0, c, 2 * c].map(|at| qkv.get().offset(at));
            let [dq, dk, dv] = [0, c, 2 * c].map(|at| grad.get_mut().offset(at));
            launch(&Views { q, k, v, dq, dk, dv, q_stride: stride, kv_stride: stride });
            let grad = widened(grad.take(tokens * 3 * c));
            (columns(&grad, c, 0, 3), columns(&grad, c, 1, 3), columns(&grad, c, 2, 3))
        } else {
            let (queries, kv): (Buffer<T>, Buffer<T>) =
                (stored(device, q, ROOM * c), stored(device, &side_by_side(&[k, v], c), ROOM * 2 * c));
            let (dq, dkv) = (
                Buffer::<T>::poisoned(device, (rows + ROOM) * c),
                Buffer::<T>::poisoned(device, (tokens + ROOM) * 2 * c),
            );
            let views = Views {
                q: queries.get(),
                k: kv.get(),
                v: kv.get().offset(c),
                dq: dq.get_mut(),
                dk: dkv.get_mut(),
                dv: dkv.get_mut().offset(c),
                q_stride: c as i32,
                kv_stride: 2 * c as i32,
            };
            launch(&views);
            let dkv = widened(dkv.take(tokens * 2 * c));
            (widened(dq.take(rows * c)), columns(&dkv, c, 0, 2), columns(&dkv, c, 1, 2))
        };
        let (out, lse) = (widened(dense.out.take(rows * c)), dense.lse.take(rows * self.heads));
        let delta = if self.whole.is_none() { dense.delta.take(rows * self.heads) } else { Vec::new() };
        Results { out, lse, delta, dq, dk, dv }
    }

    /// Output, gradients and log-sum-exp of the CPU's op in f64.
    fn exact(&self, x: &Inputs) -> ([Vec<f64>; 4], Vec<f64>) {
        let p = self.problem();
        let (c, [q, k, v, dout]) = (p.width(), x.each_ref().map(|x| Tensor::from_slice(&f64s(x))));
        let zeros = |len| Tensor::zeros(DType::F64, len);
        let (out, lse) = (zeros(p.rows() * c), zeros(p.rows() * p.heads));
        let (dq, dkv) = (zeros(p.rows() * c), zeros(p.tokens() * 2 * c));
        let (borders, names, dropout) = (p.borders(), p.names(), p.dropout);
        let (shape, names) = (p.shape(&borders), row_names(&names));
        let [q, k, v] = [&q, &k, &v].map(|x| Matrix::new(x, c));
        let forward = Forward { shape, q, k, v, names, dropout, out: &out, lse: &lse };
        attention::forward(Device::Cpu, &forward);
        let gradient = Gradient::Split(&dq, &dkv);
        attention::backward(Device::Cpu, &Backward { forward, dout: &dout, gradient });
        let dkv = dkv.to_vec::<f64>();
        ([out.to_vec(), dq.to_vec(), columns(&dkv, c, 0, 2), columns(&dkv, c, 1, 2)], lse.to_vec())
    }

    fn judge<T: Kernels>(&self, device: &'static Gpu) {
        let (p, x) = (self.problem(), self.inputs::<T>());
        let (exact, lse) = self.exact(&x);
        let operands = Operands { q: &x[0], k: &x[1], v: &x[2], dout: &x[3], sees: &|_, _, _| true };
        let plain = Plain::new::<T>(&p, &operands);
        self.run::<T>(device, &x).judge::<T>(&p, &x[3], &exact, &lse, &plain);
    }
}

/// The backwards by warpgroups that a case may take besides.
fn wholes(case: &Case) -> &'static [Whole] {
    let fits = case.head_size == 64 && case.lengths.iter().all(|&n| n <= 512) && gpu().facts().warpgroups;
    if fits { &[Whole::Short, Whole::Long] } else { &[] }
}

fn check(case: Case) {
    let device = gpu();
    case.judge::<f32>(device);
    case.judge::<bf16>(device);
    for &whole in wholes(&case) {
        Case { whole: Some(whole), ..case }.judge::<bf16>(device);
    }
}

/// One key: the output is its value, and the gradients of scores are differences of equal numbers, zero but for rounding.
#[test]
fn one_token() {
    fn of<T: Kernels>(device: &'static Gpu) {
        let case = Case { lengths: &[1], ..PLAIN };
        let x = case.inputs::<T>();
        let y = case.run::<T>(device, &x);
        assert_eq!((&y.out, &y.dv), (&x[2], &x[3]));
        let largest = |x: &[f32]| x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
        let size = largest(&y.delta) * largest(&x[0]).max(largest(&x[1]));
        assert!(y.dq.iter().chain(&y.dk).all(|x| x.abs() <= 1e-5 * size));
    }
    let device = gpu();
    of::<f32>(device);
    of::<bf16>(device);
}

/// Around the 16 rows of a fragment, the 32 of a step, and the tile of 64.
#[test]
fn lengths_around_every_border() {
    check(Case { lengths: &[15, 16, 17, 31, 32, 33], heads: 1, ..PLAIN });
    check(Case { lengths: &[63, 64, 65, 96, 97, 127, 128, 129], heads: 1, ..PLAIN });
}

#[test]
fn head_sizes() {
    for head_size in [32, 64, 128] {
        check(Case { head_size, lengths: &[1, 70, 130], p: 0.1, ..PLAIN });
        check(Case { head_size, lengths: &[40, 100], ..PLAIN });
    }
}

#[test]
fn three_heads_and_dropout() {
    check(Case { heads: 3, head_size: 32, lengths: &[5, 80, 2], p: 0.1, ..PLAIN });
    check(Case { heads: 3, head_size: 64, lengths: &[66, 9], p: 0.5, ..PLAIN });
}

/// The longest text, and a longer one of a model with more positions.
#[test]
fn long_sequences() {
    check(Case { heads: 1, lengths: &[512], p: 0.1, ..PLAIN });
    check(Case { heads: 1, head_size: 32, lengths: &[3, 777], p: 0.1, ..PLAIN });
}

#[test]
fn queries_of_some_rows() {
    check(Case { lengths: SOME_LENGTHS, queries: Some(SOME), ..PLAIN });
    check(Case { lengths: SOME_LENGTHS, queries: Some(SOME), p: 0.3, ..PLAIN });
}

/// More than a tile of queries, their positions with gaps; neighbours without any.
#[test]
fn many_queries_with_gaps() {
    let every_third: Vec<u32> = (0..210).step_by(3).collect();
    let queries: &[&[u32]] = &[&[], &every_third, &[7], &[]];
    check(Case { lengths: &[4, 210, 9, 5], queries: Some(queries), p: 0.2, ..PLAIN });
    check(Case { lengths: &[4, 210, 9, 5], queries: Some(queries), head_size: 128, heads: 1, p: 0.2, ..PLAIN });
}

/// Scores far beyond the range of the exponential: the largest is subtracted first.
#[test]
fn large_scores_stay_finite() {
    let case = Case { lengths: &[70, 3], size: 500.0, ..PLAIN };
    let device = gpu();
    let mut all =
        vec![case.run::<f32>(device, &case.inputs::<f32>()), case.run::<bf16>(device, &case.inputs::<bf16>())];
    for &whole in wholes(&case) {
        all.push(Case { whole: Some(whole), ..case }.run::<bf16>(device, &case.inputs::<bf16>()));
    }
    for results in all {
        assert!(results.all().iter().flatten().all(|x| x.is_finite()));
    }
}

#[test]
fn every_order_gives_the_same_bits() {
    let case = Case { lengths: &[70, 3], p: 0.1, heads: 1, ..PLAIN };
    for head_size in [32, 64, 128] {
        let case = Case { head_size, ..case };
        in_every_order(|device| case.run::<f32>(device, &case.inputs::<f32>()).all());
        in_every_order(|device| case.run::<bf16>(device, &case.inputs::<bf16>()).all());
    }
    for &whole in wholes(&case) {
        let case = Case { whole: Some(whole), lengths: &[140, 3], ..case };
        in_every_order(|device| case.run::<bf16>(device, &case.inputs::<bf16>()).all());
    }
}

/// A sequence's result has the same bits with any neighbours.
#[test]
fn neighbours_do_not_matter() {
    let (alone, among) = (Case { lengths: &[97], p: 0.1, ..PLAIN }, Case { lengths: &[97, 5, 140], p: 0.1, ..PLAIN });
    let device = gpu();
    let x = among.inputs::<bf16>();
    let own = x.each_ref().map(|x| x[..97 * PLAIN.heads * PLAIN.head_size].to_vec());
    for whole in std::iter::once(None).chain(wholes(&among).iter().map(|&whole| Some(whole))) {
        let (alone, among) = (Case { whole, ..alone }, Case { whole, ..among });
        let (alone, among) = (alone.run::<bf16>(device, &own), among.run::<bf16>(device, &x));
        for (alone, among) in alone.all().iter().zip(among.all()) {
            assert!(alone.iter().zip(&among).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }
}

/// Shared tiles are read and written without bank conflicts.
#[test]
fn ldmatrix_never_replays() {
    if !emulated("the count of replays") {
        return;
    }
    // It is kept for all devices of the process together.
    let emulator = Emulator::new(Options::default()).expect("the emulator is linked in");
    for head_size in [32, 64, 128] {
        emulator.ldmatrix_stats();
        let case = Case { head_size, lengths: &[130], p: 0.1, ..PLAIN };
        case.run::<bf16>(gpu(), &case.inputs::<bf16>());
        let (phases, replays) = emulator.ldmatrix_stats();
        assert!(phases > 1000 && replays == 0, "{replays} replays in {phases} phases at {head_size}");
    }
}

#[test]
fn work_begins_with_the_longest_sequence() {
    let tiles = attention::tiles(&[0, 0, 64, 129], &[0, 5, 15, 45]);
    assert_eq!(tiles, [[2, 0], [2, 1], [1, 0]]);
    assert!(attention::tiles(&[0, 0], &[0, 7]).is_empty());
}

/// By warpgroups and by tiles, probabilities are rounded at the same places: what differs is the order of sums, an ulp here and there.
#[test]
fn warpgroups_agree_with_tiles() {
    let tiles = Case { lengths: &[150, 64, 7], p: 0.1, ..PLAIN };
    let device = gpu();
    let x = tiles.inputs::<bf16>();
    for &whole in wholes(&tiles) {
        let (expected, got) =
            (tiles.run::<bf16>(device, &x), Case { whole: Some(whole), ..tiles }.run::<bf16>(device, &x));
        let pairs =
            [(&expected.out, &got.out), (&expected.dq, &got.dq), (&expected.dk, &got.dk), (&expected.dv, &got.dv)];
        for (i, (expected, got)) in pairs.into_iter().enumerate() {
            let error = relative(got, &f64s(expected));
            assert!(error < 1e-3, "matrix {i} of {whole:?}: {error:e}");
        }
    }
}
