//! Hard negatives: every rule, and what is told of it.

use retromae_engine::data::pairs::runs::Run;
use retromae_engine::data::source::Input;
use retromae_engine::eval::qrels::Qrels;
use retromae_engine::retrieve::mine::{Equality, Mined, Pick, Rules, mine, read_scores};

use crate::support::Dir;

/// Ten passages `a` … `j` with scores 10 … 1 for q1; `c` and `f` answer it. Two for q2, which `z` answers; q3 has no judgement.
fn run(dir: &Dir) -> Run {
    let mut text = String::new();
    for (i, id) in "abcdefghij".chars().enumerate() {
        text += &format!("q1 Q0 {id} {} {} t\n", i + 1, 10 - i);
    }
    text += "q2 Q0 x 1 2 t\nq2 Q0 y 2 1 t\nq3 Q0 x 1 1 t\n";
    Run::read(&input(dir, "run", &text), None).unwrap()
}

fn input(dir: &Dir, name: &str, text: &str) -> Input {
    Input { path: dir.write(name, text), bytes: None }
}

fn qrels(dir: &Dir) -> Qrels {
    Qrels::read(&input(dir, "qrels", "q1 0 c 1\nq1 0 f 2\nq1 0 a 0\nq2 0 z 1\nq4 0 z 1\n"), None).unwrap().0
}

fn rules() -> Rules {
    Rules { count: 100, pick: Pick::Top, ..Rules::default() }
}

fn list<'r>(mined: &Mined<'r>, query: &str) -> String {
    let found = mined.lists.iter().find(|(q, _)| *q == query);
    found.map(|(_, list)| list.concat()).unwrap_or_default()
}

#[test]
fn each_rule_drops_what_it_says() {
    let dir = Dir::new();
    let (run, qrels) = (run(&dir), qrels(&dir));
    let with = |rules: Rules| mine(&run, &qrels, &Equality::Unknown, None, &rules).unwrap();
    let all = with(rules());
    assert_eq!((list(&all, "q1").as_str(), list(&all, "q2").as_str(), all.lists.len()), ("abdeghij", "xy", 2));
    assert_eq!((all.dropped.positives, all.without_positive, all.not_in_run), (2, 1, 1));
    assert_eq!(all.short, [("q1", 8), ("q2", 2)]);
    let ranks = with(Rules { ranks: [2, 8], ..rules() });
    assert_eq!((list(&ranks, "q1").as_str(), ranks.dropped.outside_ranks), ("bdegh", 4));
    let most = with(Rules { max_score: Some(7.0), ..rules() });
    assert_eq!((list(&most, "q1").as_str(), most.dropped.max_score), ("deghij", 2));
    // The lowest positive on the list scores 5; that of q2 is not on it.
    let margin = with(Rules { margin: Some(1.0), ..rules() });
    assert_eq!((list(&margin, "q1").as_str(), list(&margin, "q2").as_str(), margin.dropped.margin), ("ghij", "", 6));
    let share = with(Rules { relative_margin: Some(0.4), ..rules() });
    assert_eq!(list(&share, "q1"), "hij");
    let grade = with(Rules { least_grade: 2, ..rules() });
    assert_eq!((list(&grade, "q1").as_str(), grade.without_positive), ("abcdeghij", 2));
    let count = with(Rules { count: 3, ..rules() });
    assert_eq!((list(&count, "q1").as_str(), count.dropped.not_needed, count.short.len()), ("abd", 5, 1));
}

#[test]
fn texts_equal_to_a_positive_or_taken_already_are_dropped() {
    let dir = Dir::new();
    let (run, qrels) = (run(&dir), qrels(&dir));
    // a is what f says, e repeats d; i and j have no text.
    let texts = [
        ("a", "The answer"),
        ("b", "b"),
        ("c", "c"),
        ("d", "same"),
        ("e", " Same"),
        ("f", "the  answer"),
        ("g", "g"),
        ("h", "h"),
    ];
    let lines: String = texts.iter().map(|(id, text)| format!("{id}\t{text}\n")).collect();
    let equality = Equality::of_documents(&[input(&dir, "corpus.tsv", &lines)], &run, &qrels).unwrap();
    let found = mine(&run, &qrels, &equality, None, &rules()).unwrap();
    assert_eq!(list(&found, "q1"), "bdghij");
    assert_eq!((found.dropped.equal_to_positive, found.dropped.equal_to_earlier), (1, 1));
}

#[test]
fn a_cross_encoder_decides_by_its_own_scores() {
    let dir = Dir::new();
    let (run, qrels) = (run(&dir), qrels(&dir));
    let scores = "q1\tc\t9\nq1\tf\t7\nq1\ta\t4.5\nq1\tb\t4\nq1\td\t3.9\nq1\tg\t[-2]\n";
    let scores = read_scores(&[input(&dir, "scores", scores)]).unwrap();
    let found = mine(&run, &qrels, &Equality::Unknown, Some(&scores), &Rules { ce_margin: 3.0, ..rules() }).unwrap();
    assert_eq!(list(&found, "q1"), "bdg");
    assert_eq!((found.dropped.ce_margin, found.dropped.unscored), (1, 4 + 2));
}

#[test]
fn random_ones_are_of_all_ranks_and_depend_on_seed_and_query_alone() {
    let dir = Dir::new();
    let (run, qrels) = (run(&dir), qrels(&dir));
    let draw = |seed| {
        let rules = Rules { count: 4, pick: Pick::Random, seed, ..rules() };
        list(&mine(&run, &qrels, &Equality::Unknown, None, &rules).unwrap(), "q1")
    };
    let mut times = [0usize; 8];
    for seed in 0..400 {
        let drawn = draw(seed);
        assert_eq!(drawn, draw(seed));
        assert!(drawn.len() == 4 && drawn.as_bytes().is_sorted_by(|a, b| a < b), "{drawn}");
        drawn.chars().for_each(|id| times["abdeghij".find(id).unwrap()] += 1);
    }
    assert!(times.iter().all(|&n| (150..250).contains(&n)), "{times:?}");
}

#[test]
fn judgements_of_other_queries_are_refused() {
    let dir = Dir::new();
    let run = run(&dir);
    let other = Qrels::read(&input(&dir, "other", "1048585 0 7187158 1\n"), None).unwrap().0;
    let message = dir.message(mine(&run, &other, &Equality::Unknown, None, &rules()));
    let expected = "none of the 3 queries of the run (as q1) has a positive among the judgements (as of 1048585); ";
    assert!(message.starts_with(expected), "{message}");
}
