//! What the kernels of each op must do: a list of them that grows op by op, in the order in which the ops queue them.
//!
//! Bytes are the least that memory must move for a kernel by itself: every operand in once, every result out once, tables of rows
//! (ids, positions, groups) and partial sums left out. FLOP are those of products and of attention; a multiply-add is two.

use super::{Kernel, Sizes};
use crate::device::{DType, Product};
use crate::graph::stages;
use crate::ops::attention::hopper::Whole;

/// Where the gradient of a linear layer's input goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::bench) enum Input {
    /// Written in the storage type.
    Set,
    /// Added to in the storage type.
    Add,
    /// Added to in f32.
    AddWide,
}

/// An attention: queries, keys, and how many pairs of them there are.
#[derive(Clone, Copy)]
pub(in crate::bench) struct Attention {
    /// What its kernels' names begin with.
    pub stem: &'static str,
    /// Rows of queries that are read: those of `rows`, or of the parts whose sums they are.
    pub queries: usize,
    /// Rows of the output.
    pub rows: usize,
    /// Rows of keys and of values.
    pub keys: usize,
    /// Pairs of a query and a key.
    pub pairs: u64,
}

/// The kernels so far; those of one name in one stage and phase are one.
pub(in crate::bench) struct List {
    pub(super) sizes: Sizes,
    pub phase: &'static str,
    pub stage: &'static str,
    pub kernels: Vec<Kernel>,
}

impl List {
    pub(super) fn new(sizes: Sizes) -> Self {
        List { sizes, phase: stages::UPDATE, stage: stages::OPTIMIZER, kernels: Vec::new() }
    }

    /// What `add` adds belongs to this stage.
    pub fn within(&mut self, stage: &'static str, add: impl FnOnce(&mut Self)) {
        let before = std::mem::replace(&mut self.stage, stage);
        add(self);
        self.stage = before;
    }

    /// Bytes of one element of the storage type.
    pub fn element(&self) -> u64 {
        self.sizes.storage.size() as u64
    }

    /// C.
    pub fn width(&self) -> u64 {
        self.sizes.dims.hidden as u64
    }

    /// Bytes of so many rows of hidden states.
    fn hidden(&self, rows: usize) -> u64 {
        rows as u64 * self.width() * self.element()
    }

    /// One launch of the kernel of this name.
    pub fn plain(&mut self, name: &str, flop: u64, bytes: u64) {
        let (phase, stage) = (self.phase, self.stage);
        let same = |k: &&mut Kernel| k.phase == phase && k.stage == stage && k.name == name;
        match self.kernels.iter_mut().find(same) {
            Some(kernel) => {
                kernel.launches += 1;
                kernel.flop += flop;
                kernel.bytes += bytes;
            }
            None => {
                let name = name.to_string();
                self.kernels.push(Kernel { phase, stage, name, launches: 1, flop, bytes, products: Vec::new() });
            }
        }
    }

    /// One launch of the kernel for the storage type.
    pub fn kernel(&mut self, stem: &str, flop: u64, bytes: u64) {
        let suffix = if self.sizes.storage == DType::BF16 { "bf16" } else { "f32" };
        self.plain(&format!("{stem}_{suffix}"), flop, bytes);
    }

    /// A product; without rows there is none.
    pub fn product(&mut self, product: Product, size: [usize; 3], bytes: u64) {
        if size[0] == 0 || size[1] == 0 {
            return;
        }
        let (name, flop) = (super::product_name(product), 2 * size.iter().map(|&n| n as u64).product::<u64>());
        self.plain(&name, flop, bytes);
        let (phase, stage) = (self.phase, self.stage);
        let same = |k: &&mut Kernel| k.phase == phase && k.stage == stage && k.name == name;
        if let Some(kernel) = self.kernels.iter_mut().find(same) {
            kernel.products.push((product, size));
        }
    }

    /// Bytes that are set.
    pub fn fill(&mut self, bytes: u64) {
        self.plain("fill", 0, bytes);
    }

    /// `y = x wᵀ + b` of `rows` rows, from `k` to `n` columns.
    pub fn linear_forward(&mut self, (rows, k, n): (usize, usize, usize), bias: bool) {
        let elements = rows * k + n * k + rows * n + if bias { n } else { 0 };
        let bytes = elements as u64 * self.element();
        self.product(Product::NT, [rows, n, k], bytes);
    }

    /// Its gradients: `dx = dy w`, `dw += dyᵀ x` in f32, `db` as column sums. Rows past the true number are zeroed where it is on the
    /// device.
    pub fn linear_backward(&mut self, (rows, k, n): (usize, usize, usize), bias: bool, input: Input, tails: bool) {
        let (s, [rk, nk, rn]) = (self.element(), [rows * k, n * k, rows * n].map(|x| x as u64));
        if tails {
            self.kernel("zero_tails", 0, 0);
        }
        let out = match input {
            Input::Set => rk * s,
            Input::Add => 2 * rk * s,
            Input::AddWide => 8 * rk,
        };
        self.product(Product::NN, [rows, k, n], (rn + nk) * s + out);
        self.product(Product::TN, [n, k, rows], (rn + rk) * s + 8 * nk);
        if bias {
            self.kernel("column_sums", 0, rn * s);
            self.plain("column_sums_add", 0, 8 * n as u64);
        }
    }

    /// Attention's forward: `Q Kᵀ` and `P V`, 4 C FLOP a pair of a query and a key. Reads q, k, v; writes out and lse.
    pub fn attention_forward(&mut self, a: Attention) {
        let (size, statistics) = (self.sizes.dims.head_size(), self.statistics(a.rows));
        let bytes = self.hidden(a.queries + 2 * a.keys + a.rows) + statistics;
        let form = if self.sizes.warpgroups() { "forward_hopper" } else { "forward" };
        self.kernel(&format!("{}_{form}_d{size}", a.stem), 4 * self.width() * a.pairs, bytes);
    }

    /// Attention's backward: scores again, `dO Vᵀ`, `dS K`, `Pᵀ dO` and `dSᵀ Q`. So 10 C FLOP a pair, 2.5 times the forward (Dao, arXiv
    /// 2307.08691, section 4.1), in one kernel or in two: the first three and the others, whose repetition of the first two is not
    /// required.
    pub fn attention_backward(&mut self, a: Attention) {
        let (c, size, statistics) = (self.width(), self.sizes.dims.head_size(), self.statistics(a.rows));
        if let Some(whole) = self.sizes.whole() {
            let form = if whole == Whole::Short { "short" } else { "long" };
            // q, k, v, out, its gradient and lse in; dq, dk and dv out.
            let bytes = self.hidden(a.queries + 4 * a.keys + 3 * a.rows) + statistics;
            return self.kernel(&format!("{}_backward_{form}_d{size}", a.stem), 10 * c * a.pairs, bytes);
        }
        // q, k, v, out and its gradient in, dq out; q, k, v and the gradient in, dk and dv out. Of either, besides: lse in, and the row
        // sums of dO ∘ out, which the first writes and the second reads.
        let first = self.hidden(a.queries + 2 * a.keys + 3 * a.rows) + 2 * statistics;
        let second = self.hidden(a.queries + 4 * a.keys + a.rows) + 2 * statistics;
        self.kernel(&format!("{}_backward_dq_d{size}", a.stem), 6 * c * a.pairs, first);
        self.kernel(&format!("{}_backward_dkv_d{size}", a.stem), 4 * c * a.pairs, second);
    }

    /// Bytes of one f32 a row and head.
    fn statistics(&self, rows: usize) -> u64 {
        4 * (rows * self.sizes.dims.heads) as u64
    }

    /// Embedding layer of `rows` rows whose words are of `words` distinct ones, their positions of `positions`.
    pub fn embed_forward(&mut self, rows: usize, words: usize, positions: usize) {
        let bytes = self.hidden(words + positions + 1) + self.hidden(rows) + 8 * rows as u64;
        self.within(stages::ROWS, |list| list.kernel("embed_forward", 0, bytes));
    }

    /// Its gradients: through the norm, then sums of rows by word, position and type into f32.
    pub fn embed_backward(&mut self, rows: usize, words: usize, positions: usize) {
        let bytes = self.hidden(words + positions + 1) + 2 * self.hidden(rows) + 8 * rows as u64;
        self.within(stages::ROWS, |list| {
            list.kernel("embed_backward", 0, bytes);
            list.plain("layernorm_backward_sums", 0, 16 * list.width());
            [words, positions, 1].into_iter().for_each(|groups| list.group_sums(rows, groups));
        });
    }

    /// Sums of `rows` rows in `groups` groups, added to f32.
    pub fn group_sums(&mut self, rows: usize, groups: usize) {
        let bytes = self.hidden(rows) + 8 * groups as u64 * self.width();
        self.kernel("group_sums", 0, bytes);
        self.plain("group_sums_spans", 0, 0);
    }

    /// Dropout, residual and LayerNorm: x and residual in, their sum and y out. Without both only x in and y out.
    pub fn layernorm_forward(&mut self, rows: usize, residual: bool) {
        let bytes = (if residual { 4 } else { 2 }) * self.hidden(rows) + 8 * rows as u64;
        self.kernel("layernorm_forward", 0, bytes);
    }

    /// The sum and dy in, the gradient of the residual out, with dropout also that of x.
    pub fn layernorm_backward(&mut self, rows: usize, dropout: bool) {
        let bytes = (if dropout { 4 } else { 3 }) * self.hidden(rows) + 8 * rows as u64;
        self.kernel("layernorm_backward", 0, bytes);
        self.plain("layernorm_backward_sums", 0, 16 * self.width());
    }

    /// Activation of `rows` rows `width` wide.
    pub fn activation_forward(&mut self, rows: usize, width: usize) {
        let bytes = 2 * (rows * width) as u64 * self.element();
        self.kernel("activation_forward", 0, bytes);
    }

    /// u and dy in, du out.
    pub fn activation_backward(&mut self, rows: usize, width: usize) {
        let bytes = 3 * (rows * width) as u64 * self.element();
        self.kernel("activation_backward", 0, bytes);
    }

    /// The same with the bias gradient of the linear layer before, summed on the way.
    pub fn activation_backward_sums(&mut self, rows: usize, width: usize) {
        let bytes = 3 * (rows * width) as u64 * self.element();
        self.kernel("activation_backward_sums", 0, bytes);
        self.plain("column_sums_add", 0, 8 * width as u64);
    }

    /// Rows that are moved: in and out; added: in twice.
    pub fn moved(&mut self, stem: &str, rows: usize) {
        if rows > 0 {
            let times = if stem == "scatter_add" { 3 } else { 2 };
            self.kernel(stem, 0, times * self.hidden(rows));
        }
    }

    /// Sums in f32 that become rows of the storage type.
    pub fn rounded(&mut self, rows: usize) {
        if self.sizes.storage == DType::BF16 {
            self.plain("round_rows_bf16", 0, 6 * rows as u64 * self.width());
        }
    }

    /// LM head's products with the vocabulary and what `between` queues between them, for `rows` rows at a time. The logits are made to
    /// stay in the second-level cache: they count for nothing. The weight and its gradient in f32 are too large for that, so every
    /// chunk moves them.
    pub fn vocabulary(&mut self, rows: usize, between: impl FnOnce(&mut Self, u64)) {
        let (c, v, s) = (self.sizes.dims.hidden, self.sizes.dims.vocabulary, self.element());
        let (h, w) = ((rows * c) as u64 * s, (v * c) as u64 * s);
        self.product(Product::NT, [rows, v, c], h + w);
        between(self, 4 * v as u64);
        self.product(Product::NN, [rows, c, v], h + w);
        self.product(Product::TN, [v, c, rows], h + 8 * (v * c) as u64);
    }
}
