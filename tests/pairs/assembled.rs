//! Queries, judgements, negatives and scores put together: what is kept, what is left out and told, what is refused.

use std::sync::Arc;

use retromae_engine::Result;
use retromae_engine::data::pairs::files::{PairFiles, from_files};
use retromae_engine::data::pairs::{Draft, MissingScore, Pairs, PairsSettings};
use retromae_engine::data::shard::{Packing, ShardSet};

use super::support::*;

/// Queries q0 … q4 and passages p0 … p9.
struct World {
    dir: Dir,
    queries: Arc<ShardSet>,
    passages: Arc<ShardSet>,
}

const SETTINGS: PairsSettings = PairsSettings { group: 2, depth: 3, missing_score: MissingScore::Error };

fn world() -> World {
    let dir = Dir::new();
    let names = |letter: char, n: u32| (0..n).map(|i| format!("{letter}{i}")).collect::<Vec<_>>();
    let (q, p) = (names('q', 5), names('p', 10));
    let queries = dir.set("queries", q.iter().enumerate().map(|(i, id)| (id.as_str(), vec![100 + i as u32])));
    let passages = dir.set("passages", p.iter().enumerate().map(|(i, id)| (id.as_str(), vec![200 + i as u32])));
    World { dir, queries, passages }
}

impl World {
    fn files(&self, qrels: &str, negatives: &str, teacher: &str) -> PairFiles {
        let one = |name: &str, text: &str| {
            if text.is_empty() { Vec::new() } else { vec![self.dir.write(name, text)] }
        };
        let (qrels, negatives, teacher) = (one("qrels", qrels), one("neg", negatives), one("scores", teacher));
        PairFiles { qrels, negatives, teacher, ..PairFiles::default() }
    }

    fn pairs(&self, files: &PairFiles, settings: PairsSettings) -> Result<Pairs> {
        from_files(self.queries.clone(), self.passages.clone(), files, settings, None)
    }

    fn lines(&self, pairs: &Pairs) -> Vec<String> {
        let prefix = format!("{}/", self.dir.at("").display()).replace("//", "/");
        pairs.findings().lines().iter().map(|line| line.replace(&prefix, "")).collect()
    }
}

/// Each row's query, positives and negatives.
fn rows(pairs: &Pairs) -> Vec<(u32, Vec<u32>, Vec<u32>)> {
    let row = |r| (pairs.query(r), pairs.positives(r).to_vec(), pairs.negatives(r).to_vec());
    (0..pairs.rows()).map(row).collect()
}

#[test]
fn lists_are_kept_by_rank_and_everything_left_out_is_told() {
    let world = world();
    let qrels = "q3 0 p5 1\nq0 0 p7 2\nq0 0 p2 1\nq0 0 p3 0\nq0 0 p2 1\nq9 0 p1 1\nq1 0 p77 1\nq1 0 p78 1\n";
    let negatives = "q0\tp9,p2,p4,p9\nq3\tp1\nq0\tp8,p1,p44\nq4\tp0\nq8\tp1\n";
    let pairs = world.pairs(&world.files(qrels, negatives, ""), SETTINGS).unwrap();
    assert_eq!(rows(&pairs), [(0, vec![2, 7], vec![9, 4, 8]), (3, vec![5], vec![1])]);
    assert!(pairs.is_positive(0, 7) && !pairs.is_positive(0, 3) && !pairs.is_positive(1, 7));
    assert_eq!(
        world.lines(&pairs),
        [
            "2 lines name a query that is not among the queries; left out (first: qrels:6: q9)",
            "2 positives are not in the corpus; left out (first: qrels:7: p77)",
            "1 negative is not in the corpus; left out (first: neg:3: p44)",
            "3 queries have no positive and are not trained on (first: q1)",
            "1 negative is a positive of its query; dropped (first: p2 of query q0)",
        ]
    );
    let findings = pairs.findings();
    assert_eq!((findings.queries, findings.trained, findings.passages), (5, 2, 10));
    let formats: Vec<&str> = findings.files.iter().map(|(_, format)| *format).collect();
    assert_eq!(formats, ["TREC judgements", "query and list of negatives"]);
    assert!(!pairs.has_scores() && pairs.positive_scores(0).is_none());
}

#[test]
fn the_lowest_grade_of_a_positive_can_be_chosen() {
    let world = world();
    let files = PairFiles { least_grade: 2, ..world.files("q0 0 p0 1\nq0 0 p1 2\nq1 0 p2 1\n", "", "") };
    assert_eq!(rows(&world.pairs(&files, SETTINGS).unwrap()), [(0, vec![1], vec![])]);
}

#[test]
fn triples_alone_say_what_is_positive_and_judgements_overrule_them() {
    let world = world();
    let triples = "q0\tp0\tp5\nq0\tp0\tp6\nq0\tp1\tp5\nq2\tp3\tp4\n";
    let pairs = world.pairs(&world.files("", triples, ""), SETTINGS).unwrap();
    assert_eq!(rows(&pairs), [(0, vec![0, 1], vec![5, 6]), (2, vec![3], vec![4])]);
    let pairs = world.pairs(&world.files("q0 0 p6 1\n", triples, ""), SETTINGS).unwrap();
    assert_eq!(rows(&pairs), [(0, vec![6], vec![5])]);
}

#[test]
fn short_lists_are_told() {
    let world = world();
    let settings = PairsSettings { group: 4, ..SETTINGS };
    let pairs = world.pairs(&world.files("q0\tp0\nq1\tp1\n", "q0\tp5,p6,p7\nq1\tp5\n", ""), settings).unwrap();
    let told = world.lines(&pairs);
    assert!(told[1].starts_with("1 query has fewer negatives than a group takes; random passages fill it (first: q1)"));
}

#[test]
fn scores_lie_beside_their_passages() {
    let world = world();
    let scores =
        "q0\tp9\t[0.5]\nq1\tp1\t4\nq0\tp2\t7\nq0\tp7\t6\nq0\tp4\t-1\nq1\tp0\t2\nq7\tp0\t1\nq0\tp55\t1\nq0\tp4\t-2\n";
    let files = world.files("q0\tp7,p2\nq1\tp1\n", "q0\tp9,p4\nq1\tp0\n", scores);
    let pairs = world.pairs(&files, SETTINGS).unwrap();
    assert_eq!(pairs.positive_scores(0).unwrap(), [7.0, 6.0]);
    assert_eq!(pairs.negative_scores(0).unwrap(), [0.5, -2.0]);
    assert_eq!((pairs.positive_scores(1).unwrap(), pairs.negative_scores(1).unwrap()), (&[4.0][..], &[2.0][..]));
    let told = world.lines(&pairs).join("\n");
    assert!(told.contains("1 pair is scored twice and differently; the last score counts"), "{told}");
    assert!(told.contains("1 scored passage is not in the corpus; left out (first: scores:8: p55)"), "{told}");
}

#[test]
fn missing_scores_are_refused_or_drop_their_passages() {
    let world = world();
    let scores = "q0\tp7\t6\nq0\tp9\t1\nq1\tp1\t3\n";
    let files = world.files("q0\tp7,p2\nq1\tp1\n", "q0\tp4,p9\nq1\tp0\n", scores);
    assert_eq!(
        world.pairs(&files, SETTINGS).err().unwrap().to_string(),
        "3 pairs have no score of the teacher (first: query q0 and passage p2); score them too, as rerank --scores does, or give \
         --missing-teacher drop"
    );
    let drop = PairsSettings { missing_score: MissingScore::Drop, ..SETTINGS };
    let pairs = world.pairs(&files, drop).unwrap();
    assert_eq!(rows(&pairs), [(0, vec![7], vec![9])]);
    assert_eq!((pairs.positive_scores(0).unwrap(), pairs.negative_scores(0).unwrap()), (&[6.0][..], &[1.0][..]));
    let told = world.lines(&pairs).join("\n");
    assert!(told.contains("3 passages have no score of the teacher; dropped"), "{told}");
    assert!(
        told.contains("1 query has too few scored passages for a group and is not trained on (first: q1)"),
        "{told}"
    );
    // Nobody has scored the random passages that would fill a group.
    let files = world.files("q0\tp7\n", "q0\tp9\n", scores);
    let error = world.pairs(&files, PairsSettings { group: 3, ..SETTINGS }).err().unwrap().to_string();
    assert!(error.starts_with("1 queries have fewer than 2 scored negatives (first: q0); score more"), "{error}");
}

#[test]
fn a_corpus_that_has_none_of_it_is_refused_with_the_reasons() {
    let world = world();
    let error = world.pairs(&world.files("q0\tx\nq9\tp1\n", "", ""), SETTINGS).err().unwrap().to_string();
    assert!(error.starts_with("there is no query to train on: 1 line names a query that is not among"), "{error}");
    assert!(error.contains("1 positive is not in the corpus") && error.contains("; check that"), "{error}");
    let error = world.pairs(&world.files("", "q0\tp1\n", ""), SETTINGS).err().unwrap().to_string();
    assert!(error.contains("5 queries have no positive"), "{error}");
}

#[test]
fn groups_that_cannot_be_are_refused() {
    let world = world();
    let files = world.files("q0\tp0\n", "", "");
    let refused = |group| world.pairs(&files, PairsSettings { group, ..SETTINGS }).err().unwrap().to_string();
    assert_eq!(
        refused(11),
        "groups of 11 passages from a corpus of 10; choose smaller groups or give the whole corpus"
    );
    assert_eq!(refused(0), "groups of 0 passages; choose from 1 to 65535");
    assert_eq!(refused(65_536), "groups of 65536 passages; choose from 1 to 65535");
    assert!(world.pairs(&files, PairsSettings { group: 10, ..SETTINGS }).is_ok());
}

#[test]
fn sets_of_another_tokenizer_or_of_blocks_are_refused() {
    let world = world();
    let files = world.files("q0\tp0\n", "", "");
    let ask = |passages: &Arc<ShardSet>, model: Option<&str>| {
        let found = from_files(world.queries.clone(), passages.clone(), &files, SETTINGS, model);
        world.dir.message(found)
    };
    let other = world.dir.set_of("other", 8, Packing::Docs, [("p0", vec![9]), ("p1", vec![8])]);
    let told = ask(&other, None);
    assert!(told.starts_with("other: was tokenized with another tokenizer than "), "{told}");
    let (right, wrong) = ("07".repeat(32), "09".repeat(32));
    let told = ask(&world.passages, Some(&wrong));
    assert!(told.starts_with("queries: was tokenized with another tokenizer than the model; tokenize"), "{told}");
    let blocks = world.dir.set_of("blocks", 7, Packing::Blocks, [("p0", vec![9]), ("p0", vec![8])]);
    assert!(ask(&blocks, Some(&right)).starts_with("blocks: holds blocks: a text may be several sequences there"));
    assert!(from_files(world.queries.clone(), world.passages.clone(), &files, SETTINGS, Some(&right)).is_ok());
    let nameless = world.dir.set("nameless", [("", vec![9]), ("", vec![8])]);
    assert!(ask(&nameless, None).starts_with("nameless: no text has an id, so that nothing can refer to them"));
}

#[test]
fn a_damaged_shard_is_an_error_and_not_a_missing_id() {
    let world = world();
    let shard = world.dir.at("passages/shard-00000.rms");
    let mut bytes = std::fs::read(&shard).unwrap();
    let at = bytes.windows(2).position(|w| w == b"p5").unwrap();
    bytes[at + 1] = b'x';
    std::fs::write(&shard, bytes).unwrap();
    let passages = Arc::new(ShardSet::open(&world.dir.at("passages")).unwrap());
    let found = from_files(world.queries.clone(), passages, &world.files("q0\tp0\n", "", ""), SETTINGS, None);
    let told = world.dir.message(found);
    assert!(told.contains("does not match its digest") && told.starts_with("passages"), "{told}");
}

#[test]
fn millions_of_lines_keep_only_the_best_of_each_query() {
    // More pairs than are held between two compactions, of interleaved queries, each passage twice.
    let mut draft = Draft::new(50);
    let queries = 20;
    for rank in 0..150_000u32 {
        for query in 0..queries {
            for _ in 0..2 {
                draft.negative(query, (rank * 7 + query) % 1_000_003);
            }
        }
    }
    (0..queries).for_each(|query| draft.positive(query, query));
    let passages = distinct(100, 1000, 3);
    let settings = PairsSettings { group: 2, depth: 50, missing_score: MissingScore::Error };
    let pairs = draft.finish(side(distinct(queries, 10, 3)), side(passages), settings).unwrap();
    for row in 0..pairs.rows() {
        // The first of all is the query's own positive.
        let expected: Vec<u32> = (1..51).map(|rank| rank * 7 + row as u32).collect();
        assert_eq!(pairs.negatives(row), expected);
    }
    assert!(pairs.bytes() < 10_000, "{}", pairs.bytes());
}
