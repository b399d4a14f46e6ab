#!/usr/bin/env python3
"""Tables out of the raw results of a part: steps against the baselines, kernels against PyTorch's, runs against each other."""
import argparse
import json
import pathlib
import re
import statistics
import sys


def lines(path):
    """The objects of a file of JSON lines; none of a file that is not there."""
    path = pathlib.Path(path)
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")] if path.is_file() else []


def table(head, rows, left=1):
    print("| " + " | ".join(head) + " |")
    print("| " + " | ".join(["---"] * left + ["---:"] * (len(head) - left)) + " |")
    for row in rows:
        print("| " + " | ".join(str(x) for x in row) + " |")


def number(x, digits=2):
    return "" if x is None else f"{x:.{digits}f}"


# ---------------------------------------------------------------- steps

# Goals for BERT-base, by workload and mode: how many times the engine's milliseconds the mode must take.
GOALS = {("full512", "compiled"): "G1 1.3", ("full512", "varlen"): "G1 1.3", ("full512", "seed"): "G1b 3",
         ("passages", "compiled"): "G2 2.2", ("passages", "varlen"): "G2 1.3",
         ("finetune", "compiled"): "G13 1.4", ("finetune", "seed"): "G13 2.5"}


def steps(args):
    """Every line of the engine's step bench and of the baselines: equal work, then the ratio of each mode to the engine."""
    found = [r for path in args.results for r in lines(path) if "ms" in r]
    rows, unequal = [], []
    for workload in dict.fromkeys(r["workload"] for r in found):
        runs = [r for r in found if r["workload"] == workload]
        ours = [r for r in runs if r["mode"] == "engine"]
        for r in runs:
            same = ours and all(r[k] == ours[0][k] for k in ("model", "sequences", "real_tokens")) and \
                abs(r["model_tflop"] - ours[0]["model_tflop"]) <= 1e-3 * ours[0]["model_tflop"] + 1e-4   # the baselines round it
            if not same:
                unequal.append(f"{workload} {r['mode']}")
        for mode in dict.fromkeys(r["mode"] for r in runs):
            of = [r for r in runs if r["mode"] == mode]
            best = min(of, key=lambda r: r["ms"])
            all_ms = " ".join(number(r["ms"]) for r in of)
            ratios = [r["ms"] / o["ms"] for r, o in zip(of, ours)]
            ratio = "" if not ratios else f"{statistics.mean(ratios):.2f}" + (
                f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else "")
            rows.append([workload, mode, all_ms, f"{best['tokens_per_s']:.0f}", number(best["tflops"], 1), number(best.get("mfu"), 3),
                         number(best.get("matmul_ceiling_tflops"), 0), number(best.get("peak_gib") or best.get("planned_gib"), 1),
                         f"{best['first_loss']:.3f}", ratio, GOALS.get((workload, mode), "") if best["model"] == "base" else ""])
    table(["workload", "mode", "ms of each run", "tokens/s", "TFLOP/s", "MFU", "product", "GiB", "first loss",
           "times the engine's ms", "goal"], rows, 2)
    for r in found:
        if r.get("graph_error"):
            print(f"{r['workload']} {r['mode']}: no CUDA graph: {r['graph_error'][:100]}")
    if unequal:
        print(f"NOT EQUAL WORK: {', '.join(dict.fromkeys(unequal))}")
    return not unequal and bool(found)


# ---------------------------------------------------------------- kernels

# Goal, kernels of the engine whose times add up, and names of PyTorch's that do the same work, of which the fastest counts.
PAIRS = [
    ("attention 64 x 512, forward (G5)", ["attention full512 forward"], r"sdpa .*\(64, 12, 512, 64\) dropout 0\.1 fwd"),
    ("attention 64 x 512, both (G5)", ["attention full512 forward", "attention full512 backward"],
     r"sdpa .*\(64, 12, 512, 64\) dropout 0\.1 fwd\+bwd"),
    ("attention passages, both (G5b)", ["attention passages forward", "attention passages backward"],
     r"varlen flash .*dropout 0\.1 fwd\+bwd"),
    ("position masks 64 x 512, both (G5c)", ["enhanced decoding full512 forward", "enhanced decoding full512 backward"],
     r"masked (sdpa .*dropout 0\.1|flex .*) fwd\+bwd"),
    ("LM head and loss (G6)", ["LM head and loss"], r"linear\+CE .* fwd\+bwd"),
    ("LayerNorm, forward (G7)", ["layernorm forward"], r"dropout\+residual\+LayerNorm .* fwd"),
    ("LayerNorm, both (G7)", ["layernorm forward", "layernorm backward"], r"dropout\+residual\+LayerNorm .* fwd\+bwd"),
    ("GELU, both", ["gelu forward", "gelu backward"], r"bias\+GELU .* fwd\+bwd"),
    ("AdamW (G7)", ["AdamW"], r"AdamW fused .*one tensor"),
    ("norm of the gradient", ["squared norm"], r"clip_grad_norm .*"),
    ("contrastive 4096 x 32768, both", ["contrastive 4096 x 32768 forward", "contrastive 4096 x 32768 backward"],
     r"contrastive .* 4096x32768x\d+ fwd\+bwd"),
    ("product of qkv", ["linear qkv forward"], r"matmul 32768x768x2304"),
    ("product of up", ["linear up forward"], r"matmul 32768x768x3072"),
]


def kernels(args):
    found = [r for path in args.results for r in lines(path)]
    ours = [r for r in found if "kernel" in r]
    theirs = [r for r in found if "micro" in r]
    rows = []
    for label, names, pattern in PAIRS:
        mine = [[r["ms"] for r in ours if r["kernel"].startswith(n)] for n in names]
        other = [r for r in theirs if re.fullmatch(pattern, r["micro"])]
        if not all(mine) or not other:
            continue
        ms, best = sum(min(x) for x in mine), min(other, key=lambda r: r["ms"])
        rows.append([label, number(ms, 4), number(best["ms"], 4), number(best["ms"] / ms), best["micro"]])
    table(["what", "engine ms", "PyTorch ms", "ratio", "the fastest of PyTorch"], rows)
    copies = [r["gb_per_s"] for r in theirs if r["micro"].startswith("device copy")]
    if copies and ours:
        print(f"copy: PyTorch {max(copies):.0f} GB/s, the engine's rows {ours[0]['copy_ceiling_gb_per_s']:.0f} GB/s")
    return bool(ours)


# ---------------------------------------------------------------- runs

def metrics(folder):
    return lines(pathlib.Path(folder) / "metrics.jsonl")


def runs(args):
    """Losses of runs beside each other; `--like` within `--within`, `--same` to the bit."""
    names = [pathlib.Path(f).name for f in args.folders]
    losses = [{(r["split"], r["step"]): r for r in metrics(f)} for f in args.folders]
    good, verdicts = all(losses), []
    if not good:
        verdicts.append("a run has no metrics")
    keys = list(losses[-1])
    shown = [k for i, k in enumerate(keys) if k[0] == "eval" or k[1] <= 5 or i % max(1, len(keys) // 8) == 0]
    table(["step", *names], [[f"{step}{' held out' if split == 'eval' else ''}",
                              *(number(x[(split, step)]["loss"], 4) if (split, step) in x else "" for x in losses)]
                             for split, step in shown])
    if args.like:
        reference, worst, count = {(r["split"], r["step"]): r["loss"] for r in metrics(args.like)}, 0.0, 0
        for name, run in zip(names, losses):
            for key, r in run.items():
                if key in reference:
                    gap = abs(r["loss"] / reference[key] - 1)
                    worst, count = max(worst, gap if gap == gap else float("inf")), count + 1
        good &= count > 0 and worst <= args.within
        verdicts.append(f"largest difference from {pathlib.Path(args.like).name}: {worst:.1e} of {args.within} allowed, {count} losses")
    if args.same:
        a, b = ([(r["step"], r["split"], r["loss_bits"], r.get("grad_norm_bits")) for r in metrics(f)] for f in args.same)
        same = bool(a) and a == b
        models = [pathlib.Path(f) / "model" / "model.safetensors" for f in args.same]
        same &= all(m.is_file() for m in models) and models[0].read_bytes() == models[1].read_bytes()
        good &= same
        verdicts.append(f"{len(a)} losses and the model of two runs: {'the same bits' if same else 'NOT THE SAME BITS'}")
    print("; ".join(verdicts))
    return good


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    sub = ap.add_subparsers(required=True)
    for name, f in (("steps", steps), ("kernels", kernels)):
        p = sub.add_parser(name)
        p.add_argument("results", nargs="+", help="files of JSON lines")
        p.set_defaults(run=f)
    p = sub.add_parser("runs")
    p.add_argument("folders", nargs="+")
    p.add_argument("--like", help="run whose losses the others must have")
    p.add_argument("--within", type=float, default=0.02, help="largest relative difference")
    p.add_argument("--same", nargs=2, help="two runs that must agree to the bit")
    p.set_defaults(run=runs)
    args = ap.parse_args()
    sys.exit(0 if args.run(args) else 1)


main()
