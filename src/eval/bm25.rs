//! BM25: ranks passages by the words they share with a query. The baseline that a dense retriever is compared with.
//!
//! A passage d scores, for each word w of the query (twice for a word that is there twice),
//!
//! ```text
//! ln(1 + (N − n + 0.5) / (n + 0.5)) · f / (f + k1 · (1 − b + b · |d| / mean length))
//! ```
//!
//! where n of the N passages have w, d has it f times and |d| counts the words of d: Lucene's form, with the k1 = 0.9 and b = 0.4 of
//! Anserini, whose figures are the usual baseline. A word is a run of letters and digits in lower case; nothing is stemmed or left out.

use ahash::AHashMap;

/// How soon a word that occurs again stops to count.
pub const K1: f64 = 0.9;
/// How much a long passage has to pay.
pub const B: f64 = 0.4;

/// An index of passages.
#[derive(Clone, Debug, Default)]
pub struct Bm25 {
    /// The passages that have a word, by number, and how often.
    postings: AHashMap<String, Vec<(u32, u32)>>,
    /// What is added to f below the line, a passage.
    damping: Vec<f64>,
}

impl Bm25 {
    /// Indexes passages; their numbers are their places, from 0.
    pub fn new<'a>(passages: impl IntoIterator<Item = &'a str>) -> Bm25 {
        let (mut index, mut lengths) = (Bm25::default(), Vec::new());
        for (number, passage) in (0..).zip(passages) {
            let mut length = 0u64;
            for word in words(passage) {
                length += 1;
                let list = index.postings.entry(word).or_default();
                match list.last_mut().filter(|last| last.0 == number) {
                    Some(last) => last.1 += 1,
                    None => list.push((number, 1)),
                }
            }
            lengths.push(length as f64);
        }
        let mean = f64::max(lengths.iter().sum::<f64>() / f64::max(lengths.len() as f64, 1.0), 1.0);
        index.damping = lengths.into_iter().map(|length| K1 * (1.0 - B + B * length / mean)).collect();
        index
    }

    /// The best `k` passages that share a word with the query, best first; of equal ones the first of the corpus.
    pub fn search(&self, query: &str, k: usize) -> Vec<(u32, f32)> {
        let total = self.damping.len() as f64;
        let mut scores: AHashMap<u32, f64> = AHashMap::new();
        for list in words(query).filter_map(|word| self.postings.get(&word)) {
            let having = list.len() as f64;
            let weight = ((total - having + 0.5) / (having + 0.5)).ln_1p();
            for &(number, times) in list {
                let times = f64::from(times);
                *scores.entry(number).or_default() += weight * times / (times + self.damping[number as usize]);
            }
        }
        let mut ranked: Vec<(u32, f64)> = scores.into_iter().collect();
        ranked.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        ranked.into_iter().take(k).map(|(number, score)| (number, score as f32)).collect()
    }
}

/// The words of a text.
fn words(text: &str) -> impl Iterator<Item = String> {
    let lower = text.to_lowercase();
    let found: Vec<String> =
        lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(String::from).collect();
    found.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_runs_of_letters_and_digits() {
        assert_eq!(words("An X11-Client, für_Ärzte!").collect::<Vec<_>>(), ["an", "x11", "client", "für", "ärzte"]);
        assert_eq!(words(" -- ").count(), 0);
    }

    #[test]
    fn scores_are_those_computed_by_hand() {
        // Lengths 2, 3, 1: mean 2. "cat" is in two of three: ln(1 + 1.5 / 2.5) = 0.4700036; "dog" in one: ln(1 + 2.5 / 1.5) = 0.9808293.
        let index = Bm25::new(["cat dog", "Cat, cat; fish", "bird"]);
        // 0: damping 0.9 · (0.6 + 0.4 · 2/2) = 0.9: (0.4700036 + 0.9808293) / 1.9 = 0.7635963.
        // 1: damping 0.9 · (0.6 + 0.4 · 3/2) = 1.08: 0.4700036 · 2 / 3.08 = 0.3051972.
        let found = index.search("the CAT dog", 10);
        assert_eq!(found.iter().map(|hit| hit.0).collect::<Vec<_>>(), [0, 1]);
        assert!((found[0].1 - 0.763_596_3).abs() < 1e-6, "{found:?}");
        assert!((found[1].1 - 0.305_197_2).abs() < 1e-6, "{found:?}");
        // 2: damping 0.9 · (0.6 + 0.4 · 1/2) = 0.72; a word given twice counts twice: 2 · 0.9808293 / 1.72 = 1.1404992.
        let found = index.search("bird bird", 10);
        assert!(found.len() == 1 && (found[0].1 - 1.140_499_2).abs() < 1e-6, "{found:?}");
    }

    #[test]
    fn equal_scores_keep_the_order_of_the_corpus_and_lists_their_length() {
        let index = Bm25::new(["b a", "a b", "c", "a b"]);
        assert_eq!(index.search("a", 10).iter().map(|hit| hit.0).collect::<Vec<_>>(), [0, 1, 3]);
        assert_eq!(index.search("a", 2).len(), 2);
        assert!(index.search("", 10).is_empty() && index.search("z", 10).is_empty());
        assert!(Bm25::new([]).search("a", 10).is_empty());
        assert!(Bm25::new(["", ""]).search("a", 10).is_empty());
    }
}
