//! Search over folders: order, ids, several folders, forms of the run.

use retromae_engine::data::pairs::runs::{Run, RunFormat};
use retromae_engine::data::source::Input;
use retromae_engine::device::{DType, Device};
use retromae_engine::retrieve::npy::Stored;
use retromae_engine::retrieve::search::{Rows, Searched, Written, search, write_run};

use crate::support::{CPU, Dir, folder, ids, vectors};

/// Small integers: their sums are exact, and many are equal.
fn integers(seed: u64, count: usize) -> Vec<f32> {
    vectors(seed, count).iter().map(|x| (x * 1.5).round()).collect()
}

const WIDTH: usize = 16;

fn brute(query: &[f32], rows: &[f32], k: usize) -> Vec<(u32, f32)> {
    let score = |row: &[f32]| row.iter().zip(query).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let mut all: Vec<(u32, f64)> = (0..).zip(rows.chunks(WIDTH).map(score)).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    all.truncate(k);
    all.into_iter().map(|(row, score)| (row, score as f32)).collect()
}

/// Two folders of queries and three of passages, one of them in f16.
fn folders(dir: &Dir) -> (Rows, Rows, Vec<f32>, Vec<f32>) {
    let (queries, rows) = (integers(1, 9 * WIDTH), integers(2, 1000 * WIDTH));
    let cut = |range: std::ops::Range<usize>| range.start * WIDTH..range.end * WIDTH;
    for (name, range) in [("q0", 0..4), ("q1", 4..9)] {
        folder(&dir.at(name), &ids("q", 9)[range.clone()], WIDTH, &queries[cut(range)], |spec| {
            spec.side = "query".into()
        });
    }
    for (name, range) in [("c0", 0..700), ("c1", 700..701), ("c2", 701..1000)] {
        folder(&dir.at(name), &ids("d", 1000)[range.clone()], WIDTH, &rows[cut(range)], |spec| {
            spec.dtype = if name == "c2" { Stored::F16 } else { Stored::F32 };
        });
    }
    let open = |names: &[&str]| Rows::open(&names.iter().map(|name| dir.at(name)).collect::<Vec<_>>()).unwrap();
    (open(&["q0", "q1"]), open(&["c0", "c1", "c2"]), queries, rows)
}

#[test]
fn lists_over_several_folders_are_those_of_a_brute_force() {
    let dir = Dir::new();
    let (queries, corpus, q, rows) = folders(&dir);
    assert_eq!((queries.len(), corpus.len(), corpus.id(700), corpus.id(999)), (9, 1000, "d700", "d999"));
    for k in [1, 10, 1000, 5000] {
        let mut seen = 0;
        search(CPU, (&queries, &corpus), k, &|_| {}, |id, list| {
            assert_eq!(id, format!("q{seen}"));
            assert_eq!(list, brute(&q[seen * WIDTH..(seen + 1) * WIDTH], &rows, k));
            seen += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, 9);
    }
}

#[test]
fn the_emulated_gpu_finds_the_same_lists() {
    let dir = Dir::new();
    let (queries, corpus, ..) = folders(&dir);
    let (gpu, _) = Device::open("emulator").unwrap();
    // Small integers are exact in f16 too.
    for storage in [DType::F32, DType::F16] {
        let lists = |target| {
            let mut all = Vec::new();
            search(target, (&queries, &corpus), 30, &|_| {}, |id, list| {
                all.push((id.to_string(), list.to_vec()));
                Ok(())
            })
            .unwrap();
            all
        };
        assert!(lists((gpu, storage)) == lists(CPU), "{storage:?}");
    }
}

/// Folders of f16 are searched as they are, f32 ones rounded, and the lists are those of f64 sums over what f16 leaves of the numbers.
#[test]
fn lists_in_f16_are_those_of_a_brute_force_over_f16() {
    let dir = Dir::new();
    // 300 to 420 in steps of a tenth: f16 has quarters there, bf16 only even numbers. Sums of 16 products need less than 24 digits.
    let numbers = |seed, rows: usize| -> Vec<f32> {
        vectors(seed, rows * WIDTH).iter().map(|x| 360.0 + (x * 150.0).round().clamp(-600.0, 600.0) / 10.0).collect()
    };
    let signs = |rows: usize| -> Vec<f32> {
        vectors(5, rows * WIDTH).iter().map(|x| x.signum() * if x.abs() < 1.0 { 1.0 } else { 0.25 }).collect()
    };
    // More queries and rows than a tile has; a row of zeros, a query of zeros, rows twice in one file and across files.
    let (mut queries, mut rows) = (signs(130), numbers(6, 700));
    queries[WIDTH..2 * WIDTH].fill(0.0);
    rows[16 * 3..16 * 4].fill(0.0);
    rows.copy_within(0..16 * 30, 16 * 250);
    rows.copy_within(0..16 * 30, 16 * 600);
    let half: Vec<f32> = rows.iter().map(|&x| half::f16::from_f32(x).to_f32()).collect();
    assert!(half != rows && half.iter().any(|&x| half::bf16::from_f32(x).to_f32() != x));
    let (gpu, _) = Device::open("emulator").unwrap();
    let mut seen = Vec::new();
    for stored in [Stored::F16, Stored::F32] {
        let name = |side: &str| format!("{side}-{}", stored.name());
        folder(&dir.at(&name("q")), &ids("q", 130), WIDTH, &queries, |spec| {
            (spec.side, spec.dtype) = ("query".into(), stored);
        });
        folder(&dir.at(&name("c")), &ids("d", 700), WIDTH, &rows, |spec| spec.dtype = stored);
        let open = |side: &str| Rows::open(&[dir.at(&name(side))]).unwrap();
        let (q, c) = (open("q"), open("c"));
        assert!(q.are_f16() == (stored == Stored::F16) && c.are_f16() == q.are_f16());
        // Fewer than there are, all, and more.
        for k in [1, 300, 900] {
            let mut at = 0;
            search((gpu, DType::F16), (&q, &c), k, &|_| {}, |_, list| {
                assert_eq!(list, brute(&queries[at * WIDTH..][..WIDTH], &half, k), "query {at}, the {k} best");
                at += 1;
                Ok(())
            })
            .unwrap();
            seen.push(at);
        }
    }
    assert_eq!(seen, [130; 6]);
    let mixed = Rows::open(&[dir.at("c-f16"), dir.at("c-f32")]).unwrap();
    assert!(!mixed.are_f16());
}

#[test]
fn runs_come_back_in_the_order_of_the_search_in_every_form() {
    let dir = Dir::new();
    let (queries, corpus, q, rows) = folders(&dir);
    for (name, format) in [("t", RunFormat::Trec), ("m", RunFormat::Msmarco), ("v", RunFormat::Tevatron)] {
        let path = dir.at(name);
        let done =
            write_run(CPU, (&queries, &corpus), 50, &Written { path: &path, format, tag: "tag" }, &|_| {}).unwrap();
        let counts = Searched { seconds: 0.0, nudged: 0, ..done };
        assert_eq!(counts, Searched { queries: 9, rows: 1000, hits: 450, nudged: 0, seconds: 0.0 });
        assert!(done.nudged > 0);
        let run = Run::read(&Input { path, bytes: None }, None).unwrap();
        assert_eq!(run.format(), format);
        for (i, query) in q.chunks(WIDTH).enumerate() {
            let expected = brute(query, &rows, 50);
            let found: Vec<(u32, String)> = run.hits(i).map(|hit| (hit.rank, hit.id.to_string())).collect();
            let expected: Vec<(u32, String)> = (1..).zip(expected.iter().map(|hit| format!("d{}", hit.0))).collect();
            assert_eq!(found, expected, "{name}");
        }
    }
}

#[test]
fn a_failed_search_leaves_the_old_run() {
    let dir = Dir::new();
    let (queries, corpus, ..) = folders(&dir);
    let path = dir.write("run", "old");
    let twice = Rows::open(&[dir.at("c1"), dir.at("c0"), dir.at("c1")]).unwrap();
    let to = Written { path: &path, format: RunFormat::Trec, tag: "tag" };
    let message = dir.message(write_run(CPU, (&queries, &twice), 1000, &to, &|_| {}));
    assert!(message.starts_with("two passages of the corpus have the id d700; "), "{message}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
    let same = Rows::open(&[dir.at("q0"), dir.at("q0")]).unwrap();
    let message = dir.message(write_run(CPU, (&same, &corpus), 10, &to, &|_| {}));
    assert!(message.starts_with("two queries have the id q0; "), "{message}");
    assert!(std::fs::read_dir(dir.at(".")).unwrap().all(|e| !e.unwrap().file_name().to_str().unwrap().contains("tmp")));
}
