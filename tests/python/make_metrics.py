"""Writes tests/golden/metrics: random runs and judgements with what trec_eval says of them.

    pip install pytrec_eval-terrier && python make_metrics.py OUTPUT

The runs have ties, scores that tie only as f32, queries without judgements, judged queries without a list, lists without a relevant
passage, queries without any, negative and graded judgements, and a query that is its own passage. `expected.json` also has the figures
of MS MARCO's rules, computed here as its script does.
"""

import json
import pathlib
import random
import sys

import pytrec_eval

CUTS = (1, 3, 10, 100)


def case(rng, queries, passages, longest, graded, ties):
    ids = [f"d{i}" for i in range(passages)] + ["D10", "é7", "Zoë"]
    qrels, run = {}, {}
    for q in range(queries):
        query = f"q{q}"
        if rng.random() < 0.9:
            grades = [-1, 0, 0, 1, 2, 3] if graded else [0, 1]
            judged = {d: rng.choice(grades) for d in rng.sample(ids, rng.randint(1, 12))}
            if rng.random() < 0.15:
                judged = dict.fromkeys(judged, 0)
            qrels[query] = judged
        if rng.random() < 0.9:
            listed = rng.sample(ids, rng.randint(1, longest))
            scores = {}
            for d in listed:
                score = rng.choice([0.5, 1.0, 1.5, 2.0, -3.0]) if ties else rng.uniform(-5, 5)
                if rng.random() < 0.2:
                    score += rng.choice([1e-9, -1e-9])
                scores[d] = score
            run[query] = scores
    return qrels, run


def trec(qrels, run):
    measures = {f"{m}.{','.join(map(str, CUTS))}" for m in ("ndcg_cut", "recall", "P")} | {"map", "recip_rank"}
    found = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    out = {}
    for query, values in found.items():
        mine = {"map": values["map"]}
        for k in CUTS:
            mine[f"ndcg@{k}"] = values[f"ndcg_cut_{k}"]
            mine[f"recall@{k}"] = values[f"recall_{k}"]
            mine[f"p@{k}"] = values[f"P_{k}"]
            rank = values["recip_rank"]
            mine[f"mrr@{k}"] = rank if rank >= 1 / k - 1e-12 else 0.0
        out[query] = mine
    return out


def msmarco(qrels, ranked):
    """Ranks as in the file; the mean is over all judged queries."""
    out = {}
    for k in CUTS:
        mrr = recall = 0.0
        for query, judged in qrels.items():
            relevant = {d for d, grade in judged.items() if grade > 0}
            top = ranked.get(query, [])[:k]
            places = [i for i, d in enumerate(top) if d in relevant]
            mrr += 1 / (places[0] + 1) if places else 0.0
            recall += len(places) / len(relevant) if relevant else 0.0
        out[f"mrr@{k}"], out[f"recall@{k}"] = mrr / len(qrels), recall / len(qrels)
    return out


def main(folder):
    rng = random.Random(7)
    shapes = [(40, 60, 30, True, True), (40, 60, 30, False, True), (30, 300, 150, True, False), (12, 8, 8, True, True)]
    for number, shape in enumerate(shapes):
        qrels, run = case(rng, *shape)
        name = folder / f"case{number}"
        name.mkdir(parents=True, exist_ok=True)
        lines = [f"{q} 0 {d} {g}\n" for q, judged in qrels.items() for d, g in judged.items()]
        (name / "qrels.txt").write_text("".join(lines))
        ranked, lines = {}, []
        for query, scores in run.items():
            # Any order of ranks: trec_eval does not look at them, MS MARCO's script at nothing else.
            order = sorted(scores, key=lambda d: (-scores[d], rng.random()))
            ranked[query] = order
            listed = [f"{query} Q0 {d} {i + 1} {scores[d]!r} made\n" for i, d in enumerate(order)]
            rng.shuffle(listed)
            lines += listed
        (name / "run.txt").write_text("".join(lines))
        expected = {"trec": trec(qrels, run), "msmarco": msmarco(qrels, ranked)}
        (name / "expected.json").write_text(json.dumps(expected, sort_keys=True) + "\n")


main(pathlib.Path(sys.argv[1]))
