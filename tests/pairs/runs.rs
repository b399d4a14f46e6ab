//! Runs: every format read and written, and turned into text numbers.

use retromae_engine::data::pairs::ids::IdIndex;
use retromae_engine::data::pairs::runs::{Run, RunFormat, RunWriter};

use super::support::*;

type Listed = Vec<(String, Vec<(String, u32, f32)>)>;

fn read(text: &str, format: Option<RunFormat>) -> (RunFormat, Listed) {
    let dir = Dir::new();
    let run = Run::read(&dir.write("run", text), format).unwrap_or_else(|e| panic!("{e}"));
    let hits = |i| run.hits(i).map(|h| (h.id.to_string(), h.rank, h.score)).collect();
    (run.format(), run.queries().iter().enumerate().map(|(i, q)| (q.clone(), hits(i))).collect())
}

/// Id, rank and score.
type Hit<'a> = (&'a str, u32, f32);

fn listed(lists: &[(&str, &[Hit<'_>])]) -> Listed {
    let hits = |list: &[Hit<'_>]| list.iter().map(|&(id, rank, score)| (id.into(), rank, score)).collect();
    lists.iter().map(|&(query, list)| (query.into(), hits(list))).collect()
}

#[test]
fn every_format_is_known_by_its_first_line() {
    let ranked = listed(&[("q", &[("a", 1, 9.5), ("b", 2, 9.5)]), ("r", &[("a", 1, 3.0)])]);
    // The order is that of the ranks, whatever that of the lines.
    let trec = "q Q0 b 2 9.5 t\nr Q0 a 1 3 t\nq Q0 a 1 9.5 t\n";
    assert_eq!(read(trec, None), (RunFormat::Trec, ranked.clone()));
    assert_eq!(read(&trec.replace(' ', "\t").replace('\n', "\r\n"), None), (RunFormat::Trec, ranked.clone()));
    assert_eq!(read("q\tb\t2\t9.5\nr\ta\t1\t3\nq\ta\t1\t9.5\n", None), (RunFormat::Msmarco, ranked.clone()));
    let tevatron = "q\ta\t9.5\nr\ta\t3\nq\tb\t9.5\n";
    assert_eq!(read(tevatron, None), (RunFormat::Tevatron, ranked));
    let unscored = listed(&[("q", &[("a", 1, -1.0), ("b", 2, -2.0)])]);
    assert_eq!(read("q\tb\t2\nq\ta\t1\n", None), (RunFormat::Msmarco, unscored.clone()));
    assert_eq!(read("q\ta\nq\tb\n", None), (RunFormat::Pairs, unscored.clone()));
    // MS MARCO's candidates for reranking: the texts are not read.
    assert_eq!(read("q\ta\twhat is it\tit is six words of text\nq\tb\tw\tt\n", None), (RunFormat::Pairs, unscored));
    // A score that looks like a rank is one only where the user says so.
    let whole = listed(&[("q", &[("a", 1, 7.0)])]);
    assert_eq!(read("q\ta\t7\n", Some(RunFormat::Tevatron)), (RunFormat::Tevatron, whole));
}

#[test]
fn what_is_written_is_read_again() {
    let lists = [("q1", vec![("a", 3.25f32), ("b", 3.25), ("c", 1e-30), ("d", -123456.79)]), ("q2", vec![("a", 0.1)])];
    for format in [RunFormat::Trec, RunFormat::Msmarco, RunFormat::Tevatron, RunFormat::Pairs] {
        let mut writer = RunWriter::new(Vec::new(), format, "tag");
        for (query, list) in &lists {
            writer.query(query, list.iter().copied()).unwrap();
        }
        assert_eq!(writer.nudged(), 1);
        let text = String::from_utf8(writer.into_inner()).unwrap();
        let (found, read) = read(&text, None);
        assert_eq!(found, format, "{text}");
        for ((query, list), (read_query, read_list)) in lists.iter().zip(&read) {
            assert_eq!(query, read_query);
            let ids: Vec<(&str, u32)> = read_list.iter().map(|(id, rank, _)| (id.as_str(), *rank)).collect();
            assert_eq!(ids, list.iter().map(|(id, _)| *id).zip(1..).collect::<Vec<_>>());
        }
        if matches!(format, RunFormat::Trec | RunFormat::Tevatron) {
            let scores: Vec<f32> = read[0].1.iter().map(|hit| hit.2).collect();
            assert_eq!(scores, [3.25, 3.25f32.next_down(), 1e-30, -123456.79]);
        }
    }
}

#[test]
fn lines_have_the_published_form() {
    let line = |format| {
        let mut writer = RunWriter::new(Vec::new(), format, "tag");
        writer.query("q", [("d", 2.5f32), ("e", 1.0)]).unwrap();
        String::from_utf8(writer.into_inner()).unwrap()
    };
    assert_eq!(line(RunFormat::Trec), "q Q0 d 1 2.5 tag\nq Q0 e 2 1 tag\n");
    assert_eq!(line(RunFormat::Msmarco), "q\td\t1\nq\te\t2\n");
    assert_eq!(line(RunFormat::Tevatron), "q\td\t2.5\nq\te\t1.0\n");
    assert_eq!(line(RunFormat::Pairs), "q\td\nq\te\n");
}

#[test]
fn ids_become_numbers_and_unknown_ones_are_counted() {
    let dir = Dir::new();
    let queries = IdIndex::new(dir.set("q", [("q0", vec![9]), ("q1", vec![9])])).unwrap();
    let passages = IdIndex::new(dir.set("p", [("a", vec![9]), ("b", vec![8]), ("c", vec![7])])).unwrap();
    let input = dir.write("run", "q1\tc\t5.5\nq1\tx\t5.25\nq1\ta\t5.0\nq7\ta\t1.0\nq0\tb\t0.5\n");
    let run = Run::read(&input, None).unwrap();
    let found = run.resolve(&input, &queries, &passages).unwrap();
    assert_eq!((found.queries, found.scores), (vec![1, 0], vec![5.5, 5.0, 0.5]));
    assert_eq!((found.lists.get(0), found.lists.get(1), found.lists.len()), (&[2, 0][..], &[1][..], 2));
    assert_eq!((found.unknown_queries.count, found.unknown_passages.count), (1, 1));
    assert!(found.unknown_queries.first.unwrap().ends_with("run:4: q7"));
    assert!(found.unknown_passages.first.unwrap().ends_with("run:2: x"));
}
