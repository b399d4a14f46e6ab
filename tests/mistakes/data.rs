//! Data that do not belong together: tokenizers, delimiters, ids, scores of a teacher, embeddings.

use crate::desk::{Desk, PAIRS, TRAIN, between};

/// A model of two steps, in `run/model`.
fn model(desk: &Desk) {
    desk.works(&format!("{TRAIN} --data shards --output run"));
}

#[test]
fn tokenizer_mismatch() {
    let desk = Desk::new();
    model(&desk);
    let words = desk.read("tokenizer/vocab.txt");
    let swapped = words.replace("library\n", "@\n").replace("package\n", "library\n").replace("@\n", "package\n");
    std::fs::create_dir(desk.path("other")).unwrap();
    desk.write("other/vocab.txt", &swapped);
    desk.works("retromae-engine tokenize --input texts.txt --tokenizer other --output theirs");
    let train = "retromae-engine train --model run/model --device cpu --threads 1 --steps 2 --output out --data";
    let told = desk.refused_at_once(&format!("{train} theirs"));
    let expected = "theirs: made with another tokenizer than that of run/model: token 6 is \"library\" in the data and \"package\" in \
                    the model; tokenize with --tokenizer run/model";
    assert_eq!(told, expected);
    let advice = between(&told, "tokenize with ", "\n");
    desk.works(&format!("retromae-engine tokenize --input texts.txt {advice} --output ours"));
    desk.works(&format!("{train} ours"));
    let told =
        desk.refused_at_once("retromae-engine encode --model run/model --device cpu --input theirs --output emb");
    let expected = "theirs: was tokenized with another tokenizer than the model; tokenize queries and passages with the model's own \
                    tokenizer: tokenize --tokenizer MODEL";
    assert_eq!(told, expected);
}

/// Each wrong file, and the command of the message typed.
#[test]
fn wrong_delimiter() {
    let desk = Desk::new();
    let [qrels, negatives, scores, queries] =
        ["qrels.tsv", "negatives.tsv", "scores.tsv", "queries.tsv"].map(|name| desk.read(name));
    let tabs = |command: &str| desk.works(between(command, "by tabs: ", ", and give")).len();

    for (mark, words) in [(",", "commas"), (" ", "blanks"), (";", "semicolons")] {
        desk.write("wrong.tsv", &qrels.replace('\t', mark));
        let told = desk.refused_at_once(&format!("{PAIRS} --output out --qrels wrong.tsv"));
        let first = format!("\"q0{mark}p0\" has {words} in place of tabs | ");
        assert!(told.starts_with("wrong.tsv:1: ") && told.contains(&first), "{told}");
        let end = format!(
            " | 24 errors in all; separate the columns by tabs: sed 's/{mark}/\\t/' wrong.tsv > tabs.tsv, and give tabs.tsv"
        );
        assert!(told.ends_with(&end), "{told}");
        tabs(&told);
        assert_eq!(desk.read("tabs.tsv"), qrels);
    }
    desk.write("wrong.tsv", &negatives.replace('\t', ","));
    let told = desk.refused_at_once(&format!("{PAIRS} --output out --qrels qrels.tsv --negatives wrong.tsv"));
    assert!(told.contains(" has commas in place of tabs | ") && told.contains("sed 's/,/\\t/' wrong.tsv"), "{told}");
    tabs(&told);
    assert_eq!(desk.read("tabs.tsv"), negatives);
    desk.write("wrong.tsv", &scores.replace('\t', ","));
    let told = desk.refused_at_once(&format!("{PAIRS} --output out --qrels qrels.tsv --teacher-scores wrong.tsv"));
    assert!(told.contains(" has commas in place of tabs | ") && told.contains("sed 's/,/\\t/g' wrong.tsv"), "{told}");
    tabs(&told);
    assert_eq!(desk.read("tabs.tsv"), scores);

    // Lists whose passages something else than commas separates.
    desk.write("wrong.tsv", &negatives.replace(',', " "));
    let told = desk.refused_at_once(&format!("{PAIRS} --output out --qrels qrels.tsv --negatives wrong.tsv"));
    assert!(told.contains("holds white space") && told.ends_with("a list by commas: qid<TAB>pid,pid"), "{told}");
    desk.write("wrong.tsv", &negatives.replace(',', ";"));
    let told = desk.refused_at_once(&format!("{PAIRS} --output out --qrels qrels.tsv --negatives wrong.tsv"));
    let expected = "none of the 24 negatives is in the corpus (first: wrong.tsv:1: p5;p10;p15;p20;p25;p30); give those of this corpus, \
                    by its ids: qid<TAB>pid,pid, or leave --negatives out";
    assert_eq!(told, expected);

    // Texts.
    let tokenize = "retromae-engine tokenize --tokenizer tokenizer --output out --overwrite --input";
    desk.write("wrong.tsv", &queries.replace('\t', ","));
    let told = desk.refused(&format!("{tokenize} wrong.tsv"));
    let expected = "wrong.tsv:1: 1 tab-separated column: the line has commas in place of tabs; separate the columns by tabs: sed \
                    's/,/\\t/' wrong.tsv > tabs.tsv, and give tabs.tsv";
    assert_eq!(told, expected);
    tabs(&told);
    desk.works(&format!("{tokenize} tabs.tsv"));
    desk.write("texts.csv", "q1,\"a file, of text\"\nq2,the server\n");
    let told = desk.refused_at_once(&format!("{tokenize} texts.csv"));
    assert!(told.starts_with("texts.csv: columns separated by commas are not read; write tabs: python3 -c "), "{told}");
    if desk.typed("python3 --version").status.success() {
        desk.works(between(&told, "write tabs: ", ", and give"));
        assert_eq!(desk.read("texts.tsv"), "q1\ta file, of text\nq2\tthe server\n");
    }
    assert!(desk.works(&format!("{tokenize} texts.csv --format txt")).contains("documents                2"));
    assert!(!desk.path("run").exists());
}

#[test]
fn ids_that_do_not_match() {
    let desk = Desk::new();
    let qrels = desk.read("qrels.tsv");
    desk.write("queries-of-others.tsv", &qrels.replace('q', "x"));
    let told = desk.refused_at_once(&format!("{PAIRS} --output out --qrels queries-of-others.tsv"));
    let expected = "there is no query to train on: 24 lines name a query that is not among the queries; left out (first: \
                    queries-of-others.tsv:1: x0); 24 queries have no positive and are not trained on (first: q0); check that \
                    judgements, queries and corpus belong together";
    assert_eq!(told, expected);
    desk.write("passages-of-others.tsv", &qrels.replace('p', "x"));
    let told = desk.refused_at_once(&format!("{PAIRS} --output out --qrels passages-of-others.tsv"));
    assert!(
        told.contains("24 positives are not in the corpus; left out (first: passages-of-others.tsv:1: x0); "),
        "{told}"
    );
    desk.write("negatives-of-others.tsv", &desk.read("negatives.tsv").replace('p', "x"));
    let told =
        desk.refused_at_once(&format!("{PAIRS} --output out --qrels qrels.tsv --negatives negatives-of-others.tsv"));
    assert!(told.contains(" negatives is in the corpus (first: negatives-of-others.tsv:1: x5); give those"), "{told}");
    // A corpus without ids.
    desk.works("retromae-engine tokenize --input texts.txt --tokenizer tokenizer --output plain");
    let told = desk.refused_at_once(&format!("{} --output out --qrels qrels.tsv", PAIRS.replace("passages", "plain")));
    let expected = "plain: no text has an id, so that nothing can refer to them; tokenize an input with ids: tsv, or jsonl with _id";
    assert_eq!(told, expected);

    let evaluate = "retromae-engine evaluate --run run.trec --qrels";
    let told = desk.refused_at_once(&format!("{evaluate} queries-of-others.tsv"));
    let expected = "run.trec: none of the 24 queries of the run (as q0) is among the 24 judged ones (as x0); check that run and \
                    judgements belong together";
    assert_eq!(told, expected);
    let told = desk.warned(&format!("{evaluate} passages-of-others.tsv"), "run.trec");
    let expected =
        "run.trec: no passage on any list is judged; it names p5, the judgements x0; check that both belong together";
    assert_eq!(told, expected);
    let figures = desk.works(&format!("{evaluate} passages-of-others.tsv"));
    assert!(figures.contains("ndcg@10        0.0000\n"), "{figures}");
}

#[test]
fn missing_teacher_scores() {
    let desk = Desk::new();
    let part: String = desk.read("scores.tsv").lines().skip(2).map(|line| format!("{line}\n")).collect();
    desk.write("part.tsv", &part);
    let train =
        format!("{PAIRS} --qrels qrels.tsv --negatives negatives.tsv --group-size 3 --output out --teacher-scores");
    let told = desk.refused_at_once(&format!("{train} part.tsv"));
    let expected = "2 pairs have no score of the teacher (first: query q0 and passage p0); score them too, as rerank --scores does, or \
                    give --missing-teacher drop";
    assert_eq!(told, expected);
    desk.works(&format!("{train} part.tsv --missing-teacher drop"));
    let told = desk.refused_at_once(&format!("{train} absent.tsv"));
    assert_eq!(told, "absent.tsv: cannot open: No such file or directory; check the path");
}

#[test]
fn embeddings_of_another_model() {
    let desk = Desk::new();
    model(&desk);
    desk.works(&format!("{TRAIN} --data shards --output other --seed 7"));
    let encode = "retromae-engine encode --device cpu";
    desk.works(&format!("{encode} --model run/model --kind query --input queries.tsv --output emb/queries"));
    for (name, more) in
        [("other", "--model other/model"), ("mean", "--model run/model --pooling mean"), ("same", "--model run/model")]
    {
        desk.works(&format!("{encode} {more} --kind passage --input passages.tsv --output emb/{name}"));
    }
    let search = |corpus: &str| {
        format!("retromae-engine search --device cpu --queries emb/queries --corpus emb/{corpus} --output out.trec")
    };
    let told = desk.refused_at_once(&search("other"));
    assert!(told.starts_with("emb/queries: differs in the model: run/model ("), "{told}");
    assert!(told.contains("); that of emb/other is other/model ("), "{told}");
    assert!(told.ends_with("); encode queries and passages with the same model and settings"), "{told}");
    let told = desk.refused_at_once(&search("mean"));
    let expected = "emb/queries: differs in the pooling: cls; that of emb/mean is mean; encode queries and passages with the same \
                    model and settings";
    assert_eq!(told, expected);
    desk.works(&search("same"));
}
