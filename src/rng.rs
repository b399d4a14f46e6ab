//! Counter-based randomness: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
//!
//! Every random decision of a run is a pure function of (seed, step, site, sample, position, element). Nothing depends on thread,
//! rank, batch split or wall clock, and the CPU and the GPU produce equal streams (`kernels/common.cuh` holds the twin).

pub(crate) const M0: u32 = 0xD251_1F53;
pub(crate) const M1: u32 = 0xCD9E_8D57;
pub(crate) const W0: u32 = 0x9E37_79B9;
pub(crate) const W1: u32 = 0xBB67_AE85;

/// Ten rounds of Philox4x32 on counter `c` under key `k`.
#[inline(always)]
pub fn philox4x32(mut k: [u32; 2], mut c: [u32; 4]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = u64::from(M0) * u64::from(c[0]);
        let p1 = u64::from(M1) * u64::from(c[2]);
        c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
        k = [k[0].wrapping_add(W0), k[1].wrapping_add(W1)];
    }
    c
}

/// [`philox4x32`] on `N` counters that differ in their first word, `first`, `first + 1`, …; a loop over lanes, so that it vectorises.
/// Result `[w][i]` is word `w` of counter `first + i`.
#[inline(always)]
pub fn philox4x32_lanes<const N: usize>(mut k: [u32; 2], first: u32, c: [u32; 3]) -> [[u32; N]; 4] {
    let mut x = [[0; N], [c[0]; N], [c[1]; N], [c[2]; N]];
    for (i, word) in x[0].iter_mut().enumerate() {
        *word = first.wrapping_add(i as u32);
    }
    for _ in 0..10 {
        #[allow(clippy::needless_range_loop)] // `i` names one lane of all four words
        for i in 0..N {
            let p0 = u64::from(M0) * u64::from(x[0][i]);
            let p1 = u64::from(M1) * u64::from(x[2][i]);
            (x[0][i], x[2][i]) = ((p1 >> 32) as u32 ^ x[1][i] ^ k[0], (p0 >> 32) as u32 ^ x[3][i] ^ k[1]);
            (x[1][i], x[3][i]) = (p1 as u32, p0 as u32);
        }
        k = [k[0].wrapping_add(W0), k[1].wrapping_add(W1)];
    }
    x
}

/// Where randomness is used; part of every counter or key, so that no two sites share a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Site {
    /// Weight initialisation.
    Init = 1,
    /// Order of the samples in an epoch.
    Order = 2,
    /// Encoder mask of a text.
    EncoderMask = 3,
    /// Visibility rows of the enhanced decoder.
    DecoderMask = 4,
    /// Choice of the held-out split.
    Split = 5,
    /// Positive and negative passages of a query.
    Passages = 6,
    /// Key of the dropout masks of a step.
    Dropout = 7,
    /// Exchanges of a randomisation test.
    Compare = 8,
    /// Choice of mined negatives.
    Mine = 9,
}

/// Key of all counters of (`seed`, `step`, `site`): the seed's own stream at that step.
pub fn key(seed: u64, step: u64, site: Site) -> [u32; 2] {
    let r = philox4x32([seed as u32, (seed >> 32) as u32], [step as u32, (step >> 32) as u32, site as u32, 0x5EED]);
    [r[0], r[1]]
}

/// Words of randomness drawn at a time.
const WORDS: usize = 256;

/// The words of counters `first`, `first + 1`, … in order, four a counter. Compiled once, for the widest vectors of the processor.
#[inline(never)]
fn fill(key: [u32; 2], first: u32, c: [u32; 3], words: &mut [u32]) {
    const N: usize = 16;
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            for (i, words) in words.chunks_mut(4 * N).enumerate() {
                let x = philox4x32_lanes::<N>(key, first.wrapping_add((i * N) as u32), c);
                for (lane, words) in words.chunks_exact_mut(4).enumerate() {
                    words.copy_from_slice(&[x[0][lane], x[1][lane], x[2][lane], x[3][lane]]);
                }
            }
        },
    );
}

/// Dropout masks of one step, replayed and never stored.
///
/// An element is named by the sample number of its text, its position in the text, a site (which dropout layer of the graph) and an
/// index: the channel for hidden states, `head << 16 | key position` for attention probabilities. Eight neighbouring elements share
/// one Philox call: element `e` is half-word `e % 8` (low half first) of counter `[e / 8, position | site << 16, sample_lo, sample_hi]`.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// Philox key of the step, from [`key`] with [`Site::Dropout`].
    pub key: [u32; 2],
    /// An element is dropped when its 16 bits are below this: round(p · 65536).
    pub threshold: u32,
}

impl Dropout {
    /// No dropout: evaluation and `step`.
    pub const OFF: Dropout = Dropout { key: [0, 0], threshold: 0 };

    /// Probability `p` (0 ≤ p < 1) in step `step` of the run with `seed`.
    pub fn new(seed: u64, step: u64, p: f32) -> Self {
        Dropout { key: key(seed, step, Site::Dropout), threshold: (p * 65536.0).round() as u32 }
    }

    /// What a kept element is multiplied by.
    #[inline]
    pub fn scale(&self) -> f64 {
        65536.0 / f64::from(65536 - self.threshold)
    }

    /// Whether anything is dropped.
    pub fn is_on(&self) -> bool {
        self.threshold > 0
    }

    /// Calls `f(element, kept)` for the elements `0..n` of one row. Call inside `device::cpu::vectorized`.
    #[inline(always)]
    pub fn each(&self, site: u32, sample: u64, position: u32, base: u32, n: usize, mut f: impl FnMut(usize, bool)) {
        let c = [position | site << 16, sample as u32, (sample >> 32) as u32];
        let mut words = [0; WORDS];
        for start in (0..n).step_by(2 * WORDS) {
            let count = (n - start).min(2 * WORDS);
            fill(self.key, base + (start / 8) as u32, c, &mut words[..count.div_ceil(8) * 4]);
            for e in 0..count {
                f(start + e, words[e / 2] >> (e % 2 * 16) & 0xFFFF >= self.threshold);
            }
        }
    }

    /// The sixteen-bit randoms of the eight elements `8·group .. 8·group + 8`.
    #[inline(always)]
    pub fn bits(&self, site: u32, sample: u64, position: u32, group: u32) -> [u16; 8] {
        let w = philox4x32(self.key, [group, position | site << 16, sample as u32, (sample >> 32) as u32]);
        [
            w[0] as u16,
            (w[0] >> 16) as u16,
            w[1] as u16,
            (w[1] >> 16) as u16,
            w[2] as u16,
            (w[2] >> 16) as u16,
            w[3] as u16,
            (w[3] >> 16) as u16,
        ]
    }
}

/// A sequential stream below a key: 32-bit words numbered from 0, four a Philox call.
#[derive(Clone, Debug)]
pub struct Stream {
    key: [u32; 2],
    counter: [u32; 4],
    words: [u32; 4],
    used: usize,
}

impl Stream {
    /// The stream of (`seed`, `step`, `site`, `sample`).
    pub fn new(seed: u64, step: u64, site: Site, sample: u64) -> Self {
        let counter = [0, 0, sample as u32, (sample >> 32) as u32];
        Stream { key: key(seed, step, site), counter, words: [0; 4], used: 4 }
    }

    /// The next 32 random bits.
    #[inline]
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.words = philox4x32(self.key, self.counter);
            let (low, carry) = self.counter[0].overflowing_add(1);
            self.counter[0] = low;
            self.counter[1] = self.counter[1].wrapping_add(u32::from(carry));
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// The next 64 random bits.
    #[inline]
    pub fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) | u64::from(self.next_u32()) << 32
    }

    /// Uniform in `0..n` (multiply-high; bias below 2⁻³² · n). `n` must be positive.
    #[inline]
    pub fn below(&mut self, n: u32) -> u32 {
        ((u64::from(self.next_u32()) * u64::from(n)) >> 32) as u32
    }

    /// Uniform in [0, 1) with 24 bits.
    #[inline]
    pub fn uniform(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Standard normal (Box–Muller on two words).
    pub fn normal(&mut self) -> f32 {
        let u = (f64::from(self.next_u32()) + 1.0) / 4_294_967_296.0;
        let v = f64::from(self.next_u32()) / 4_294_967_296.0;
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    }
}

/// A pseudo-random permutation of `0..n` that is computed at any index in O(1): a four-round Feistel network over Philox on the
/// smallest even-bit domain that holds `n`, with cycle walking.
#[derive(Clone, Debug)]
pub struct Permutation {
    key: [u32; 2],
    n: u64,
    half_bits: u32,
}

impl Permutation {
    /// The permutation of `0..n` that belongs to (`seed`, `epoch`, `site`).
    pub fn new(seed: u64, epoch: u64, site: Site, n: u64) -> Self {
        let bits = 64 - n.saturating_sub(1).leading_zeros();
        Permutation { key: key(seed, epoch, site), n, half_bits: bits.div_ceil(2).max(1) }
    }

    /// Where index `i` (below `n`) goes.
    pub fn at(&self, i: u64) -> u64 {
        debug_assert!(i < self.n);
        let mask = (1u64 << self.half_bits) - 1;
        let mut x = i;
        loop {
            let (mut l, mut r) = (x >> self.half_bits, x & mask);
            for round in 0..4 {
                let f = philox4x32(self.key, [r as u32, (r >> 32) as u32, round, 0x00F1_57E1]);
                let f = u64::from(f[0]) | u64::from(f[1]) << 32;
                (l, r) = (r, l ^ (f & mask));
            }
            x = l << self.half_bits | r;
            if x < self.n {
                return x;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_known_answers() {
        // Random123 distribution, kat_vectors, philox4x32 with 10 rounds.
        assert_eq!(philox4x32([0, 0], [0; 4]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox4x32([u32::MAX; 2], [u32::MAX; 4]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        let (c, k) = ([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]);
        assert_eq!(philox4x32(k, c), [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]);
    }

    #[test]
    fn lanes_equal_single_calls_and_rows_equal_their_groups() {
        let lanes = philox4x32_lanes::<5>([7, 8], u32::MAX - 1, [1, 2, 3]);
        for i in 0..5u32 {
            let one = philox4x32([7, 8], [(u32::MAX - 1).wrapping_add(i), 1, 2, 3]);
            assert_eq!(one, [lanes[0][i as usize], lanes[1][i as usize], lanes[2][i as usize], lanes[3][i as usize]]);
        }
        let d = Dropout::new(1, 2, 0.3);
        let mut kept = 0;
        d.each(5, 1 << 40 | 9, 77, 3, 1001, |e, keep| {
            let bits = d.bits(5, 1 << 40 | 9, 77, 3 + (e / 8) as u32)[e % 8];
            assert_eq!(keep, u32::from(bits) >= d.threshold, "element {e}");
            kept += u32::from(keep);
        });
        assert!((600..800).contains(&kept), "{kept} of 1001 kept at p = 0.3");
    }

    #[test]
    fn permutation_is_a_bijection_at_every_size() {
        for n in [1u64, 2, 3, 7, 64, 65, 1000, 4097] {
            let p = Permutation::new(9, 3, Site::Order, n);
            let mut seen = vec![false; n as usize];
            for i in 0..n {
                let j = p.at(i) as usize;
                assert!(!seen[j]);
                seen[j] = true;
            }
        }
        let (a, b) = (Permutation::new(9, 3, Site::Order, 1000), Permutation::new(9, 4, Site::Order, 1000));
        assert!((0..1000).filter(|&i| a.at(i) == b.at(i)).count() < 20);
    }

    #[test]
    fn streams_differ_by_every_part_of_their_name() {
        let first = |seed, step, site, sample| Stream::new(seed, step, site, sample).next_u64();
        let a = first(1, 2, Site::Init, 3);
        assert_eq!(a, first(1, 2, Site::Init, 3));
        for b in [
            first(2, 2, Site::Init, 3),
            first(1, 3, Site::Init, 3),
            first(1, 2, Site::Order, 3),
            first(1, 2, Site::Init, 4),
        ] {
            assert_ne!(a, b);
        }
    }
}
