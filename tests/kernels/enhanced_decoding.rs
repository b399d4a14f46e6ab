//! Attention of the enhanced decoder: queries in two parts, a visibility mask for every position.

use crate::harness::*;
use crate::reference::*;
use half::bf16;
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::{DType, Device, Matrix, Tensor, kernels};
use retromae_engine::ops::attention::Pass;
use retromae_engine::ops::attention::hopper::Whole;
use retromae_engine::ops::enhanced_decoding::{self as op, Backward, Forward, Queries, Visible};

/// Rows of poison after every packed matrix.
const ROOM: usize = 3;

/// Bit rows of a sequence's pool; less than a row a position, as in a long text.
const POOL: usize = 4;

/// `mask` says whether pool row `r` of a sequence shows key `j`.
#[derive(Clone, Copy)]
struct Case<'a> {
    heads: usize,
    head_size: usize,
    lengths: &'a [usize],
    queries: Queried<'a>,
    mask: fn(usize, usize) -> bool,
    p: f32,
    /// By warpgroups, with this backward.
    whole: Option<Whole>,
}

/// Positions that ask.
#[derive(Clone, Copy)]
enum Queried<'a> {
    /// All but the first and the last, as in pre-training.
    Words,
    These(&'a [&'a [u32]]),
}

const PLAIN: Case =
    Case { heads: 2, head_size: 64, lengths: &[3, 33, 40], queries: Queried::Words, mask: half, p: 0.0, whole: None };

/// Every second key or so.
fn half(row: usize, key: usize) -> bool {
    below(1, 2, (row * 1000 + key) as u64)[0] == 0
}

/// Bit rows: first word of each sequence, words, row of each token.
struct Bits {
    offsets: Vec<u32>,
    words: Vec<u32>,
    row: Vec<u16>,
}

/// Query parts by position and by sequence, keys, values, gradient of the output.
type Inputs = [Vec<f32>; 5];

/// One run's buffers.
struct Buffers<T> {
    position: Buffer<T>,
    sentence: Buffer<T>,
    kv: Buffer<T>,
    out: Buffer<T>,
    dout: Buffer<T>,
    dq: Buffer<T>,
    dkv: Buffer<T>,
    lse: Buffer<f32>,
    delta: Buffer<f32>,
    bits: (Buffer<u32>, Buffer<u32>, Buffer<u16>),
}

trait Kernels: Storage {
    fn launch(device: &'static Gpu, batch: &DeviceBatch, case: &Case, x: &Buffers<Self>);

    fn launch_whole(_: &'static Gpu, _: &DeviceBatch, _: &Case, _: &Buffers<Self>, _: Whole) {
        panic!("warpgroups multiply bf16 only");
    }
}

macro_rules! kernels_of {
    ($t:ty: $($d:literal => $forward:ident $dq:ident $dkv:ident)* $(; $more:item)?) => {
        impl Kernels for $t {
            $($more)?

            fn launch(device: &'static Gpu, batch: &DeviceBatch, case: &Case, x: &Buffers<$t>) {
                let (heads, site, dropout) = (case.heads as i32, batch.site(), batch.dropout());
                let width = case.heads * case.head_size;
                let (q_position, q_sentence) = (x.position.get(), x.sentence.get());
                let (k, v, dout) = (x.kv.get(), x.kv.get().offset(width), x.dout.get());
                let (k_stride, v_stride) = (2 * width as i32, 2 * width as i32);
                let (offsets, words, row) = (x.bits.0.get(), x.bits.1.get(), x.bits.2.get());
                let visible = kernels::VisibleKeys { offsets, words, row };
                let shape = |kernel, pass| batch.launch(kernel, pass, size_of::<$t>());
                match case.head_size {
                    $($d => {
                        let forward = kernels::$forward {
                            out: x.out.get_mut(), lse: x.lse.get_mut(), q_position, q_sentence, k, k_stride, v, v_stride, visible,
                            batch: batch.get(Pass::Forward), dropout, site, heads,
                        };
                        let queries = kernels::$dq {
                            dq: x.dq.get_mut(), delta: x.delta.get_mut(), q_position, q_sentence, k, k_stride, v, v_stride,
                            out: x.out.get(), lse: x.lse.get(), dout, visible, batch: batch.get(Pass::Queries), dropout, site, heads,
                        };
                        let keys = kernels::$dkv {
                            dkv: x.dkv.get_mut(), q_position, q_sentence, k, k_stride, v, v_stride, lse: x.lse.get(),
                            delta: x.delta.get(), dout, visible, batch: batch.get(Pass::Keys), dropout, site, heads,
                        };
                        forward
                            .launch(device, shape(kernels::$forward::kernel(), Pass::Forward))
                            .and_then(|()| queries.launch(device, shape(kernels::$dq::kernel(), Pass::Queries)))
                            .and_then(|()| keys.launch(device, shape(kernels::$dkv::kernel(), Pass::Keys)))
                            .expect("a correct kernel raises nothing");
                    })*
                    other => panic!("no kernel for heads of {other}"),
                }
            }
        }
    };
}

kernels_of!(f32:
    32 => EnhancedDecodingForwardD32F32 EnhancedDecodingBackwardDqD32F32 EnhancedDecodingBackwardDkvD32F32
    64 => EnhancedDecodingForwardD64F32 EnhancedDecodingBackwardDqD64F32 EnhancedDecodingBackwardDkvD64F32
    128 => EnhancedDecodingForwardD128F32 EnhancedDecodingBackwardDqD128F32 EnhancedDecodingBackwardDkvD128F32);
kernels_of!(bf16:
32 => EnhancedDecodingForwardD32Bf16 EnhancedDecodingBackwardDqD32Bf16 EnhancedDecodingBackwardDkvD32Bf16
64 => EnhancedDecodingForwardD64Bf16 EnhancedDecodingBackwardDqD64Bf16 EnhancedDecodingBackwardDkvD64Bf16
128 => EnhancedDecodingForwardD128Bf16 EnhancedDecodingBackwardDqD128Bf16 EnhancedDecodingBackwardDkvD128Bf16;

fn launch_whole(device: &'static Gpu, batch: &DeviceBatch, case: &Case, x: &Buffers<bf16>, whole: Whole) {
    let (heads, site, dropout, width) = (case.heads as i32, batch.site(), batch.dropout(), case.heads * case.head_size);
    let (q_position, q_sentence) = (x.position.get(), x.sentence.get());
    let (k, v, dout) = (x.kv.get(), x.kv.get().offset(width), x.dout.get());
    let (k_stride, v_stride) = (2 * width as i32, 2 * width as i32);
    let (offsets, words, row) = (x.bits.0.get(), x.bits.1.get(), x.bits.2.get());
    let visible = kernels::VisibleKeys { offsets, words, row };
    let forward = kernels::EnhancedDecodingForwardHopperD64Bf16 {
        out: x.out.get_mut(), lse: x.lse.get_mut(), q_position, q_sentence, k, k_stride, v, v_stride, visible,
        batch: batch.get(Pass::Forward), dropout, site, heads,
    };
    let shape = batch.launch_warpgroups(kernels::EnhancedDecodingForwardHopperD64Bf16::kernel());
    forward.launch(device, shape).expect("a correct kernel raises nothing");
    macro_rules! backward {
        ($kernel:ident) => {{
            let (shape, tiles) = batch.launch_whole(kernels::$kernel::kernel(), whole);
            kernels::$kernel {
                dq: x.dq.get_mut(), dkv: x.dkv.get_mut(), q_position, q_sentence, k, k_stride, v, v_stride,
                out: x.out.get(), lse: x.lse.get(), dout, visible, batch: batch.get(Pass::Whole), dropout, site, heads, tiles,
            }
            .launch(device, shape)
        }};
    }
    let done = match whole {
        Whole::Short => backward!(EnhancedDecodingBackwardShortD64Bf16),
        Whole::Long => backward!(EnhancedDecodingBackwardLongD64Bf16),
    };
    done.expect("a correct kernel raises nothing");
});

impl Case<'_> {
    fn problem(&self) -> Problem {
        Problem {
            heads: self.heads,
            head_size: self.head_size,
            lengths: self.lengths.to_vec(),
            positions: match self.queries {
                Queried::Words => self.lengths.iter().map(|&n| (1..n as u32 - 1).collect()).collect(),
                Queried::These(queries) => queries.iter().map(|q| q.to_vec()).collect(),
            },
            dropout: dropout(self.p, 12),
        }
    }

    fn bits(&self) -> Bits {
        let (mut offsets, mut words) = (vec![0], Vec::new());
        for &n in self.lengths {
            for row in 0..POOL {
                let bit = |j: usize| u32::from((self.mask)(row, j)) << (j % 32);
                words.extend((0..n).step_by(32).map(|w| (w..n.min(w + 32)).map(bit).sum::<u32>()));
            }
            offsets.push(words.len() as u32);
        }
        let row = self.lengths.iter().flat_map(|&n| (0..n).map(|i| (i % POOL) as u16)).collect();
        Bits { offsets, words, row }
    }

    fn inputs<T: Storage>(&self) -> Inputs {
        let p = self.problem();
        let longest = self.lengths.iter().max().copied().unwrap_or(0);
        let counts = [longest, self.lengths.len(), p.tokens(), p.tokens(), p.rows()];
        std::array::from_fn(|i| rounded::<T>(&normal(counts[i] * p.width(), 10 + i as u64)))
    }

    fn run<T: Kernels>(&self, device: &'static Gpu, [position, sentence, k, v, dout]: &Inputs) -> Results {
        let (p, bits) = (self.problem(), self.bits());
        let (c, rows, tokens) = (p.width(), p.rows(), p.tokens());
        let x = Buffers {
            position: stored(device, position, ROOM * c),
            sentence: stored(device, sentence, ROOM * c),
            kv: stored(device, &side_by_side(&[k, v], c), ROOM * 2 * c),
            out: Buffer::<T>::poisoned(device, (rows + ROOM) * c),
            dout: stored(device, dout, ROOM * c),
            dq: Buffer::poisoned(device, (rows + ROOM) * c),
            dkv: Buffer::poisoned(device, (tokens + ROOM) * 2 * c),
            lse: Buffer::poisoned(device, (rows + ROOM) * self.heads),
            delta: Buffer::poisoned(device, (rows + ROOM) * self.heads),
            bits: (Buffer::of(device, &bits.offsets), Buffer::of(device, &bits.words), Buffer::of(device, &bits.row)),
        };
        let batch = DeviceBatch::new(device, &p);
        match self.whole {
            Some(whole) => T::launch_whole(device, &batch, self, &x, whole),
            None => T::launch(device, &batch, self, &x),
        }
        let dkv = widened(x.dkv.take(tokens * 2 * c));
        Results {
            out: widened(x.out.take(rows * c)),
            lse: x.lse.take(rows * self.heads),
            delta: if self.whole.is_none() { x.delta.take(rows * self.heads) } else { Vec::new() },
            dq: widened(x.dq.take(rows * c)),
            dk: columns(&dkv, c, 0, 2),
            dv: columns(&dkv, c, 1, 2),
        }
    }

    /// Output, gradients and log-sum-exp of the CPU's op in f64.
    fn exact(&self, x: &Inputs) -> ([Vec<f64>; 4], Vec<f64>) {
        let (p, bits) = (self.problem(), self.bits());
        let (c, [position, sentence, k, v, dout]) = (p.width(), x.each_ref().map(|x| Tensor::from_slice(&f64s(x))));
        let zeros = |len| Tensor::zeros(DType::F64, len);
        let (out, lse) = (zeros(p.rows() * c), zeros(p.rows() * p.heads));
        let (dq, dkv) = (zeros(p.rows() * c), zeros(p.tokens() * 2 * c));
        let (borders, names) = (p.borders(), p.names());
        let (offsets, words) = (Tensor::from_slice(&bits.offsets), Tensor::from_slice(&bits.words));
        let row = Tensor::from_slice(&bits.row);
        let forward = || Forward {
            shape: p.shape(&borders),
            queries: Queries::Parts { position: &position, sentence: &sentence },
            k: Matrix::new(&k, c),
            v: Matrix::new(&v, c),
            visible: Visible { offsets: &offsets, words: &words, row: &row },
            names: row_names(&names),
            dropout: p.dropout,
            out: &out,
            lse: &lse,
        };
        op::forward(Device::Cpu, &forward());
        op::backward(Device::Cpu, &Backward { forward: forward(), dout: &dout, dq: &dq, dkv: &dkv });
        let dkv = dkv.to_vec::<f64>();
        ([out.to_vec(), dq.to_vec(), columns(&dkv, c, 0, 2), columns(&dkv, c, 1, 2)], lse.to_vec())
    }

    fn judge<T: Kernels>(&self, device: &'static Gpu) {
        let (p, x) = (self.problem(), self.inputs::<T>());
        let (exact, lse) = self.exact(&x);
        let c = p.width();
        let names = p.positions.iter().enumerate().flat_map(|(s, p)| p.iter().map(move |&p| (s, p as usize)));
        let q: Vec<f32> = names
            .flat_map(|(s, position)| (0..c).map(move |e| (position * c + e, s * c + e)))
            .map(|(a, b)| round::<T>(x[0][a] + x[1][b]))
            .collect();
        let sees = |_: usize, position: usize, key: usize| key != position && (self.mask)(position % POOL, key);
        let plain = Plain::new::<T>(&p, &Operands { q: &q, k: &x[2], v: &x[3], dout: &x[4], sees: &sees });
        self.run::<T>(device, &x).judge::<T>(&p, &x[4], &exact, &lse, &plain);
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

#[test]
fn pools_of_random_masks() {
    check(PLAIN);
    check(Case { p: 0.1, ..PLAIN });
}

/// Words of 32 keys and tiles of 64 that end with the text, one before and one behind.
#[test]
fn lengths_around_every_border() {
    check(Case { lengths: &[31, 32, 33, 63, 64, 65, 66, 67], heads: 1, ..PLAIN });
    check(Case { lengths: &[96, 127, 128, 129, 130, 131], heads: 1, p: 0.1, ..PLAIN });
}

#[test]
fn head_sizes() {
    for head_size in [32, 64, 128] {
        check(Case { head_size, lengths: &[3, 70, 130], p: 0.2, ..PLAIN });
    }
}

/// [CLS] word [SEP] is the shortest text with a label; [CLS] [SEP] has none.
#[test]
fn sequences_without_a_query() {
    check(Case { lengths: &[2, 3, 70, 2], ..PLAIN });
    check(Case { lengths: &[70, 4], queries: Queried::These(&[&[], &[2]]), mask: |_, _| true, ..PLAIN });
}

/// The first and the last position ask too, and positions with gaps.
#[test]
fn any_position_may_ask() {
    check(Case { lengths: &[80], queries: Queried::These(&[&[0, 31, 32, 63, 64, 79]]), ..PLAIN });
}

#[test]
fn long_sequences() {
    check(Case { heads: 1, lengths: &[512], p: 0.1, ..PLAIN });
    check(Case { heads: 1, head_size: 32, lengths: &[3, 700], p: 0.1, ..PLAIN });
}

/// Rows of the pool that show nothing, everything, only the first key, and only keys of the second tile.
fn extreme(row: usize, key: usize) -> bool {
    match row {
        0 => false,
        1 => true,
        2 => key == 0,
        _ => key >= 64,
    }
}

#[test]
fn rows_that_see_nothing_are_zero() {
    let case = Case { lengths: &[70, 66], mask: extreme, p: 0.1, ..PLAIN };
    check(case);
    let device = gpu();
    let (p, y) = (case.problem(), case.run::<bf16>(device, &case.inputs::<bf16>()));
    let c = p.width();
    for (row, &position) in p.positions.concat().iter().enumerate().filter(|(_, p)| (**p as usize).is_multiple_of(POOL))
    {
        assert!(position > 0 && y.lse[row * p.heads..(row + 1) * p.heads].iter().all(|&x| x == f32::INFINITY));
        assert!(y.out[row * c..(row + 1) * c].iter().chain(&y.dq[row * c..(row + 1) * c]).all(|&x| x == 0.0));
    }
}

/// A position that its own bit alone shows sees nothing.
#[test]
fn no_position_sees_itself() {
    let own = Case {
        lengths: &[40],
        queries: Queried::These(&[&[1, 33]]),
        mask: |_, key| [1, 5, 33].contains(&key),
        ..PLAIN
    };
    check(own);
    let alone = Case { queries: Queried::These(&[&[33]]), mask: |_, key| key == 33, ..own };
    let device = gpu();
    let y = alone.run::<f32>(device, &alone.inputs::<f32>());
    assert!(y.lse.iter().all(|&x| x == f32::INFINITY));
    assert!(y.out.iter().chain(&y.dq).chain(&y.dk).chain(&y.dv).all(|&x| x == 0.0));
}

#[test]
fn every_order_gives_the_same_bits() {
    for head_size in [32, 64, 128] {
        let case = Case { head_size, lengths: &[70, 3], p: 0.1, heads: 1, ..PLAIN };
        in_every_order(|device| case.run::<f32>(device, &case.inputs::<f32>()).all());
        in_every_order(|device| case.run::<bf16>(device, &case.inputs::<bf16>()).all());
    }
    let case = Case { lengths: &[140, 3], p: 0.1, heads: 1, ..PLAIN };
    for &whole in wholes(&case) {
        let case = Case { whole: Some(whole), ..case };
        in_every_order(|device| case.run::<bf16>(device, &case.inputs::<bf16>()).all());
    }
}
