//! Twenty-four queries, forty passages, and what belongs to what, in the words of the tokenizer beside them.

use std::path::Path;

/// Words of a query and of the passage that answers it.
fn words(i: usize) -> [usize; 3] {
    [i % 24, (i * 7 + 3) % 24, (i * 11 + 5) % 24]
}

/// Query `q<i>` is answered by passage `p<i>`, which holds its words among others; passages from `p24` on answer none. Each query has
/// six negatives, and each of its passages a score.
pub fn write(dir: &Path) {
    let vocabulary = std::fs::read_to_string(dir.join("tokenizer/vocab.txt")).unwrap();
    let vocabulary: Vec<&str> = vocabulary.lines().skip(5).collect();
    let text = |words: &[usize]| words.iter().map(|w| vocabulary[w % 24]).collect::<Vec<_>>().join(" ");
    let queries: String = (0..24).map(|i| format!("q{i}\t{}\n", text(&words(i)))).collect();
    let passage = |i: usize| {
        let [a, b, c] = words(i);
        text(&[i * 5 + 1, a, b, i * 3, c, a + i % 4])
    };
    let passages: String = (0..40).map(|i| format!("p{i}\t{}\n", passage(i))).collect();
    let qrels: String = (0..24).map(|i| format!("q{i}\tp{i}\n")).collect();
    let lists = |i: usize| (1..7).map(|k| (i + k * 5) % 40).filter(|&n| n != i).collect::<Vec<_>>();
    let ids = |list: Vec<usize>| list.iter().map(|n| format!("p{n}")).collect::<Vec<_>>().join(",");
    let negatives: String = (0..24).map(|i| format!("q{i}\t{}\n", ids(lists(i)))).collect();
    let score = |i: usize, p: usize| format!("q{i}\tp{p}\t[{}]\n", if p == i { 4.0 } else { -0.25 * p as f64 });
    let scores: String = (0..24)
        .flat_map(|i| std::iter::once(i).chain(lists(i)).map(move |p| score(i, p)).collect::<Vec<_>>())
        .collect();
    let run: String = (0..24)
        .flat_map(|i| {
            let list: Vec<usize> = lists(i).into_iter().take(4).chain([i]).collect();
            let line = move |(rank, p): (usize, &usize)| format!("q{i} Q0 p{p} {} {} x\n", rank + 1, 9 - rank);
            list.iter().enumerate().map(line).collect::<Vec<_>>()
        })
        .collect();
    for (name, contents) in [
        ("queries.tsv", &queries),
        ("passages.tsv", &passages),
        ("qrels.tsv", &qrels),
        ("negatives.tsv", &negatives),
        ("scores.tsv", &scores),
        ("run.trec", &run),
    ] {
        std::fs::write(dir.join(name), contents).unwrap();
    }
}
