//! What the tests of both attentions share: a packed problem, its form on the device, and attention as a plain bf16 implementation
//! computes it.

use crate::harness::*;
use retromae_engine::device::gpu::Gpu;
use retromae_engine::device::launch::{Kernel, Shape};
use retromae_engine::device::{Tensor, kernels};
use retromae_engine::ops::attention::hopper::{self, Whole};
use retromae_engine::ops::attention::{self, Pass};
use retromae_engine::ops::{RowNames, SiteDropout};

/// Packed sequences, and the positions of each that ask.
pub struct Problem {
    pub heads: usize,
    pub head_size: usize,
    pub lengths: Vec<usize>,
    pub positions: Vec<Vec<u32>>,
    pub dropout: SiteDropout,
}

/// First element of each sequence, and the end.
fn borders(lengths: impl Iterator<Item = usize>) -> Vec<u32> {
    let mut cu = vec![0];
    for length in lengths {
        cu.push(cu[cu.len() - 1] + length as u32);
    }
    cu
}

impl Problem {
    pub fn width(&self) -> usize {
        self.heads * self.head_size
    }

    pub fn rows(&self) -> usize {
        self.positions.iter().map(Vec::len).sum()
    }

    pub fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    pub fn cu_rows(&self) -> Vec<u32> {
        borders(self.positions.iter().map(Vec::len))
    }

    pub fn cu_seqlens(&self) -> Vec<u32> {
        borders(self.lengths.iter().copied())
    }

    /// Sample numbers need both words of a counter.
    pub fn samples(&self) -> Vec<u64> {
        (0..self.lengths.len() as u64).map(|s| (1 << 40) + 3 * s).collect()
    }

    /// Tensors of the names of the query rows: samples, sequences, positions.
    pub fn names(&self) -> [Tensor; 3] {
        let sequences: Vec<u32> =
            self.positions.iter().enumerate().flat_map(|(s, p)| vec![s as u32; p.len()]).collect();
        [
            Tensor::from_slice(&self.samples()),
            Tensor::from_slice(&sequences),
            Tensor::from_slice(&self.positions.concat()),
        ]
    }

    /// The sequences' borders as tensors: of queries, of keys.
    pub fn borders(&self) -> [Tensor; 2] {
        [Tensor::from_slice(&self.cu_rows()), Tensor::from_slice(&self.cu_seqlens())]
    }

    pub fn shape<'a>(&self, [cu_rows, cu_seqlens]: &'a [Tensor; 2]) -> attention::Shape<'a> {
        let sequences = self.lengths.len();
        let (heads, head_size) = (self.heads, self.head_size);
        attention::Shape { sequences, heads, head_size, cu_rows, cu_seqlens, work: None }
    }
}

pub fn row_names([samples, sequence, position]: &[Tensor; 3]) -> RowNames<'_> {
    RowNames { samples, sequence, position }
}

/// Blocks of a grid past the end of the work, as a batch below capacity has them.
const IDLE_BLOCKS: usize = 2;

/// A problem's borders, names and tables of work on the device.
pub struct DeviceBatch {
    cu_rows: Buffer<u32>,
    cu_seqlens: Buffer<u32>,
    position: Buffer<u32>,
    sample: Buffer<u64>,
    /// Tiles of queries, of keys, whole sequences.
    tiles: [(Buffer<u32>, Buffer<i32>, usize); 3],
    key: Buffer<u32>,
    dropout: SiteDropout,
    heads: usize,
    head_size: usize,
    longest: usize,
}

impl DeviceBatch {
    pub fn new(device: &'static Gpu, p: &Problem) -> Self {
        let (cu_rows, cu_seqlens) = (p.cu_rows(), p.cu_seqlens());
        let table = |tiles: Vec<[u32; 2]>| {
            let room = 2 * (tiles.len() + IDLE_BLOCKS);
            let count = Buffer::of(device, &[tiles.len() as i32]);
            (Buffer::with_room(device, &tiles.concat(), room), count, tiles.len())
        };
        let whole = attention::whole_sequences(&cu_seqlens);
        let tiles =
            [attention::tiles(&cu_rows, &cu_seqlens), attention::tiles(&cu_seqlens, &cu_rows), whole].map(table);
        let [cu_rows, cu_seqlens, position] =
            [cu_rows, cu_seqlens, p.positions.concat()].map(|x| Buffer::of(device, &x));
        let key = Buffer::of(device, &p.dropout.mask.key);
        let (sample, dropout) = (Buffer::of(device, &p.samples()), p.dropout);
        DeviceBatch {
            cu_rows,
            cu_seqlens,
            position,
            sample,
            tiles,
            key,
            dropout,
            heads: p.heads,
            head_size: p.head_size,
            longest: p.lengths.iter().max().copied().unwrap_or(0),
        }
    }

    fn tiles(&self, pass: Pass) -> &(Buffer<u32>, Buffer<i32>, usize) {
        match pass {
            Pass::Forward | Pass::Queries => &self.tiles[0],
            Pass::Keys => &self.tiles[1],
            Pass::Whole => &self.tiles[2],
        }
    }

    pub fn get(&self, pass: Pass) -> kernels::AttentionBatch {
        let (tiles, tile_count, _) = self.tiles(pass);
        kernels::AttentionBatch {
            cu_rows: self.cu_rows.get(),
            cu_seqlens: self.cu_seqlens.get(),
            position: self.position.get(),
            sample: self.sample.get(),
            tiles: tiles.get(),
            tile_count: tile_count.get(),
        }
    }

    pub fn dropout(&self) -> kernels::Dropout {
        device_dropout(self.dropout, &self.key)
    }

    pub fn site(&self) -> u32 {
        self.dropout.site
    }

    pub fn launch(&self, kernel: &Kernel, pass: Pass, element: usize) -> Shape {
        let blocks = (self.tiles(pass).2 + IDLE_BLOCKS) as u32;
        Shape {
            grid: [blocks, self.heads as u32, 1],
            block: [kernel.max_threads, 1, 1],
            shared_bytes: pass.shared_bytes(self.head_size, element),
        }
    }

    /// The forward by warpgroups.
    pub fn launch_warpgroups(&self, kernel: &Kernel) -> Shape {
        Shape { shared_bytes: hopper::FORWARD_BYTES, ..self.launch(kernel, Pass::Forward, 2) }
    }

    /// The backward in one pass, and the tiles of its longest sequence.
    pub fn launch_whole(&self, kernel: &Kernel, whole: Whole) -> (Shape, i32) {
        let shape = Shape { shared_bytes: whole.shared_bytes(self.longest), ..self.launch(kernel, Pass::Whole, 2) };
        (shape, self.longest.div_ceil(attention::TILE) as i32)
    }
}

/// Values of one attention: queries `[R, C]`, keys and values `[T, C]`, gradient of the output `[R, C]`, and which key a position of a
/// sequence sees.
pub struct Operands<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub dout: &'a [f32],
    pub sees: &'a dyn Fn(usize, usize, usize) -> bool,
}

/// Output and gradients as a plain implementation in storage `T` computes them: whole matrices, each rounded when it is stored. The
/// softmax and its backward are f32 inside, as PyTorch's are.
pub struct Plain {
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
    pub dq: Vec<f32>,
    pub dk: Vec<f32>,
    pub dv: Vec<f32>,
}

impl Plain {
    pub fn new<T: Storage>(p: &Problem, x: &Operands<'_>) -> Plain {
        let (rows, tokens) = (p.rows() * p.width(), p.tokens() * p.width());
        let lse = vec![f32::INFINITY; p.rows() * p.heads];
        let mut y =
            Plain { out: vec![0.0; rows], lse, dq: vec![0.0; rows], dk: vec![0.0; tokens], dv: vec![0.0; tokens] };
        for s in 0..p.lengths.len() {
            for head in 0..p.heads {
                y.head::<T>(p, x, s, head);
            }
        }
        y
    }

    fn head<T: Storage>(&mut self, p: &Problem, x: &Operands<'_>, s: usize, head: usize) {
        let (c, d, length) = (p.width(), p.head_size, p.lengths[s]);
        let (first_row, first_key) = (p.cu_rows()[s] as usize, p.cu_seqlens()[s] as usize);
        let row_at = |i: usize| (first_row + i) * c + head * d..(first_row + i) * c + (head + 1) * d;
        let key_at = |j: usize| (first_key + j) * c + head * d..(first_key + j) * c + (head + 1) * d;
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let scale = 1.0 / (d as f32).sqrt();
        let (mut dk, mut dv) = (vec![0.0; length * d], vec![0.0; length * d]);
        for (i, &position) in p.positions[s].iter().enumerate() {
            let (q, dout) = (&x.q[row_at(i)], &x.dout[row_at(i)]);
            let visible: Vec<bool> = (0..length).map(|j| (x.sees)(s, position as usize, j)).collect();
            let score = |j: usize| round::<T>(scale * round::<T>(dot(q, &x.k[key_at(j)])));
            let scores: Vec<f32> = (0..length).map(|j| if visible[j] { score(j) } else { f32::NEG_INFINITY }).collect();
            let top = scores.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            if top == f32::NEG_INFINITY {
                continue;
            }
            let sum: f32 = scores.iter().map(|s| (s - top).exp()).sum();
            self.lse[(first_row + i) * p.heads + head] = top + sum.ln();
            let probability: Vec<f32> = scores.iter().map(|s| round::<T>((s - top).exp() / sum)).collect();
            let mut kept = vec![1.0; length];
            if p.dropout.mask.is_on() {
                let (mask, sample) = (p.dropout.mask, p.samples()[s]);
                mask.each(p.dropout.site, sample, position, (head as u32) << 13, length, |j, keep| {
                    kept[j] = if keep { mask.scale() as f32 } else { 0.0 };
                });
            }
            let dropped: Vec<f32> = probability.iter().zip(&kept).map(|(p, k)| round::<T>(p * k)).collect();
            let dp: Vec<f32> =
                (0..length).map(|j| round::<T>(kept[j] * round::<T>(dot(dout, &x.v[key_at(j)])))).collect();
            let delta = dot(&dp, &probability);
            let ds: Vec<f32> =
                (0..length).map(|j| round::<T>(scale * round::<T>(probability[j] * (dp[j] - delta)))).collect();
            let (mut out, mut dq) = (vec![0.0; d], vec![0.0; d]);
            for j in 0..length {
                let (k, v) = (&x.k[key_at(j)], &x.v[key_at(j)]);
                for e in 0..d {
                    out[e] += dropped[j] * v[e];
                    dq[e] += ds[j] * k[e];
                    dv[j * d + e] += dropped[j] * dout[e];
                    dk[j * d + e] += ds[j] * q[e];
                }
            }
            self.out[row_at(i)].copy_from_slice(&rounded::<T>(&out));
            self.dq[row_at(i)].copy_from_slice(&rounded::<T>(&dq));
        }
        for j in 0..length {
            self.dk[key_at(j)].copy_from_slice(&rounded::<T>(&dk[j * d..(j + 1) * d]));
            self.dv[key_at(j)].copy_from_slice(&rounded::<T>(&dv[j * d..(j + 1) * d]));
        }
    }
}

/// What the kernels of one attention leave.
pub struct Results {
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
    pub delta: Vec<f32>,
    pub dq: Vec<f32>,
    pub dk: Vec<f32>,
    pub dv: Vec<f32>,
}

impl Results {
    pub fn all(self) -> Vec<Vec<f32>> {
        vec![self.out, self.lse, self.delta, self.dq, self.dk, self.dv]
    }

    /// Against exact values (f64, in the order out, dq, dk, dv) and the plain computation.
    pub fn judge<T: Storage>(&self, p: &Problem, dout: &[f32], exact: &[Vec<f64>; 4], lse: &[f64], plain: &Plain) {
        judge::<T>("out", &self.out, &exact[0], &plain.out);
        judge::<T>("dq", &self.dq, &exact[1], &plain.dq);
        judge::<T>("dk", &self.dk, &exact[2], &plain.dk);
        judge::<T>("dv", &self.dv, &exact[3], &plain.dv);
        let finite = |x: f64| if x.is_finite() { x } else { 0.0 };
        let finite_f32 = |x: &[f32]| x.iter().map(|&x| finite(f64::from(x)) as f32).collect::<Vec<_>>();
        assert!(self.lse.iter().zip(lse).all(|(x, e)| f64::from(*x) == *e || (x.is_finite() && e.is_finite())));
        let lse: Vec<f64> = lse.iter().map(|&x| finite(x)).collect();
        judge::<T>("lse", &finite_f32(&self.lse), &lse, &finite_f32(&plain.lse));
        let heads = self.out.chunks(p.head_size).zip(dout.chunks(p.head_size));
        let sum = |(a, b): (&[f32], &[f32])| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
        // One pass keeps it to itself.
        if !self.delta.is_empty() {
            judge::<f32>("delta", &self.delta, &heads.map(sum).collect::<Vec<f64>>(), &[]);
        }
    }
}

/// Rows of several matrices of `width` columns, side by side.
pub fn side_by_side(parts: &[&[f32]], width: usize) -> Vec<f32> {
    let rows = parts[0].len() / width;
    (0..rows).flat_map(|r| parts.iter().flat_map(move |p| p[r * width..(r + 1) * width].to_vec())).collect()
}

/// Columns `part` of `parts` side by side.
pub fn columns<E: Copy>(x: &[E], width: usize, part: usize, parts: usize) -> Vec<E> {
    x.chunks(parts * width).flat_map(|row| row[part * width..(part + 1) * width].to_vec()).collect()
}
