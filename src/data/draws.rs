//! Random numbers for masks, many Philox calls at a time.
//!
//! A text needs some 50,000 bounded draws for its 256 visibility rows, so a draw must cost about a nanosecond. Two things give that:
//! eight independent Philox calls run side by side in vector registers, and one 64-bit word serves several bounded draws.
//!
//! The words are those of [`rng::Stream`] under the same key, with the row in the counter's second word: row `r` of a sample is words
//! `4·2³²·r …` of that stream, whatever is drawn for other rows.

use crate::rng::{self, Site};

/// Philox calls made together.
const LANES: usize = 8;
/// 64-bit words they give.
const WORDS: usize = 2 * LANES;

/// The 64-bit words of one row of one sample.
pub(super) struct Draws {
    key: [u32; 2],
    /// Row and sample: the counter but for its first word.
    name: [u32; 3],
    next_call: u32,
    words: [u64; WORDS],
    used: usize,
}

impl Draws {
    /// Draws for (`seed`, `pass`, `site`, `sample`), at row 0.
    pub fn new(seed: u64, pass: u64, site: Site, sample: u64) -> Self {
        let name = [0, sample as u32, (sample >> 32) as u32];
        Draws { key: rng::key(seed, pass, site), name, next_call: 0, words: [0; WORDS], used: WORDS }
    }

    /// Goes to the first word of row `row`.
    #[inline(always)]
    pub fn seek(&mut self, row: u32) {
        self.name[0] = row;
        self.next_call = 0;
        self.used = WORDS;
    }

    /// The next 64 random bits.
    #[inline(always)]
    pub fn next_u64(&mut self) -> u64 {
        if self.used == WORDS {
            self.words = philox_words(self.key, self.next_call, self.name);
            self.next_call = self.next_call.wrapping_add(LANES as u32);
            self.used = 0;
        }
        let word = self.words[self.used];
        self.used += 1;
        word
    }
}

/// Takes a number uniform in `0..n` off a random word; what is left of the word serves the next draw.
///
/// The word is a fraction of 2⁶⁴: its product with `n` has the draw above the point and a fresh fraction below it. After draws from
/// n₁, n₂, … the last probability is off by at most n₁·n₂·…/2⁶⁴ relative, which callers keep below 2⁻²⁴.
#[inline(always)]
pub(super) fn below(word: &mut u64, n: u64) -> u64 {
    let product = u128::from(*word) * u128::from(n);
    *word = product as u64;
    (product >> 64) as u64
}

/// The calls `first .. first + LANES` of `rng::philox4x32`, as 64-bit words in order. Written over lanes for the vectoriser.
#[inline(always)]
fn philox_words(mut k: [u32; 2], first: u32, name: [u32; 3]) -> [u64; WORDS] {
    let mut c: [[u32; LANES]; 4] = [[0; LANES], [name[0]; LANES], [name[1]; LANES], [name[2]; LANES]];
    for (lane, word) in c[0].iter_mut().enumerate() {
        *word = first.wrapping_add(lane as u32);
    }
    for _ in 0..10 {
        let mut next = c;
        for lane in 0..LANES {
            let p0 = u64::from(rng::M0) * u64::from(c[0][lane]);
            let p1 = u64::from(rng::M1) * u64::from(c[2][lane]);
            next[0][lane] = (p1 >> 32) as u32 ^ c[1][lane] ^ k[0];
            next[1][lane] = p1 as u32;
            next[2][lane] = (p0 >> 32) as u32 ^ c[3][lane] ^ k[1];
            next[3][lane] = p0 as u32;
        }
        c = next;
        k = [k[0].wrapping_add(rng::W0), k[1].wrapping_add(rng::W1)];
    }
    let mut words = [0; WORDS];
    for lane in 0..LANES {
        words[2 * lane] = u64::from(c[0][lane]) | u64::from(c[1][lane]) << 32;
        words[2 * lane + 1] = u64::from(c[2][lane]) | u64::from(c[3][lane]) << 32;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    #[test]
    fn row_zero_is_the_stream_of_the_sample() {
        let sample = 7 << 33 | 5;
        let mut stream = Stream::new(3, 1, Site::DecoderMask, sample);
        let mut draws = Draws::new(3, 1, Site::DecoderMask, sample);
        for i in 0..200 {
            assert_eq!(draws.next_u64(), stream.next_u64(), "word {i}");
        }
    }

    #[test]
    fn a_row_does_not_depend_on_what_was_drawn_before() {
        let mut draws = Draws::new(3, 0, Site::DecoderMask, 11);
        draws.seek(9);
        let first: Vec<u64> = (0..40).map(|_| draws.next_u64()).collect();
        let call = rng::philox4x32(rng::key(3, 0, Site::DecoderMask), [1, 9, 11, 0]);
        assert_eq!(first[2], u64::from(call[0]) | u64::from(call[1]) << 32);
        draws.seek(8);
        draws.next_u64();
        draws.seek(9);
        let again: Vec<u64> = (0..40).map(|_| draws.next_u64()).collect();
        assert_eq!(first, again);
    }

    #[test]
    fn draws_from_one_word_are_its_digits() {
        // 0.0101 1100… in binary: digits to base 4 are 1, 1, 3, 0.
        let mut word = 0b0101_1100 << 56;
        assert_eq!([0; 4].map(|_: u64| below(&mut word, 4)), [1, 1, 3, 0]);
        let mut top = u64::MAX;
        assert_eq!(below(&mut top, 380), 379);
        let mut zero = 0;
        assert_eq!(below(&mut zero, 380), 0);
    }
}
