#!/usr/bin/env python3
"""Judges what `retromae-engine step` made of the golden cases, in fp32 and in bf16.

fp32: ||x - reference|| / ||reference|| of at most 1e-5 for losses and 1e-4 for every gradient.
bf16: at most twice the error that PyTorch makes on the same case under bf16 autocast, here and now: of the loss (or twice half a unit
of bf16's last place, since one number may be exact by luck) and of all gradients taken together. The gradient of a key bias is zero in
exact arithmetic; in fp32 it must be as small as noise, in bf16 it is left out.
"""
import argparse
import json
import pathlib
import sys

import torch
from safetensors.torch import load_file

HALF_UNIT = 2.0 ** -9


def norm(tensors):
    return sum(float((t.double() ** 2).sum()) for t in tensors) ** 0.5


def errors(found, expected):
    """{tensor: relative error}, and the error of all gradients as one vector."""
    if missing := set(expected) - set(found):
        raise SystemExit(f"missing: {sorted(missing)[:3]}")
    each, gaps, sizes = {}, [], []
    for name, reference in expected.items():
        gap = found[name].cpu().double() - reference.double()
        if name.endswith("self.key.bias"):
            each[name] = float(gap.norm()) * 1e5
            continue
        error = float(gap.norm() / reference.double().norm())
        each[name] = error if error == error else float("inf")   # max() may pass over a NaN
        if name.startswith("grad."):
            gaps.append(gap), sizes.append(reference)
    return each, norm(gaps) / norm(sizes)


def pytorch_bf16(case, objective, losses):
    """The same case in PyTorch: fp32 weights, bf16 autocast, on the GPU if there is one."""
    from transformers import BertForMaskedLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm = BertForMaskedLM.from_pretrained(case / "model", attn_implementation="eager").float().eval().to(device)
    batch = {k: v.to(device) for k, v in load_file(case / "batch.safetensors").items()}
    decoder = None
    if objective in ("retromae", "dupmae"):
        decoder = losses.EnhancedDecoder(lm.config).eval().to(device)
        weights = load_file(case / "model" / "enhanced_decoder.safetensors")
        decoder.load_state_dict({k.removeprefix("c_head."): v for k, v in weights.items()})
    with torch.autocast(device, torch.bfloat16):
        if objective == "retromae":
            out = losses.retromae(lm, decoder, batch)
        elif objective == "dupmae":
            out = losses.dupmae(lm, decoder, batch)
        else:
            hidden = lm.bert(batch["encoder_input_ids"], attention_mask=batch["encoder_attention_mask"]).last_hidden_state
            loss = losses.token_loss(lm, hidden, batch["encoder_labels"])
            out = {"loss": loss}
    out["loss"].backward()
    named = dict(lm.named_parameters())
    if decoder is not None:
        named.update({"c_head." + n: p for n, p in decoder.named_parameters()})
    grads = {"grad." + n: p.grad for n, p in named.items() if p.grad is not None}
    return {**{k: v.detach() for k, v in out.items()}, **grads}, device


def judge(case, made, losses):
    options = json.loads((case / "case.json").read_text())
    expected = load_file(case / "expected.safetensors")
    name = "-".join(case.parts[-2:])
    rows = []
    for precision in ("fp32", "bf16"):
        path = made / f"{name}-{precision}.safetensors"
        row = {"case": name, "precision": precision}
        rows.append(row)
        if not path.is_file():
            row["verdict"] = "not made"
            continue
        each, whole = errors(load_file(path), expected)
        row["loss"] = max(e for n, e in each.items() if n.startswith("loss"))
        row["gradients"] = whole
        gradients = {n: e for n, e in each.items() if n.startswith("grad.") and (precision == "fp32" or not n.endswith("self.key.bias"))}
        row["worst"] = max(gradients, key=gradients.get)
        row["worst_error"] = gradients[row["worst"]]
        if precision == "fp32":
            row["allowed_loss"], row["allowed_gradients"] = 1e-5, 1e-4
            good = row["loss"] <= 1e-5 and row["worst_error"] <= 1e-4
        else:
            torch_found, row["pytorch_on"] = pytorch_bf16(case, options["objective"], losses)
            torch_found = {n: torch_found[n] for n in expected if n in torch_found}
            torch_each, torch_whole = errors(torch_found, expected)
            torch_loss = max(e for n, e in torch_each.items() if n.startswith("loss"))
            row["allowed_loss"], row["allowed_gradients"] = 2 * max(torch_loss, HALF_UNIT), 2 * torch_whole
            row["worst_of_pytorch"] = torch_each[row["worst"]]
            good = row["loss"] <= row["allowed_loss"] and whole <= row["allowed_gradients"]
        row["verdict"] = "ok" if good else "FAILED"
    return rows


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--cases", type=pathlib.Path, required=True)
    ap.add_argument("--made", type=pathlib.Path, required=True, help="folder of CASE-PRECISION.safetensors")
    ap.add_argument("--reference", type=pathlib.Path, required=True, help="folder of losses.py")
    ap.add_argument("--json", type=pathlib.Path)
    args = ap.parse_args()
    sys.path.insert(0, str(args.reference))
    import losses
    rows = [row for case in ("head32/mlm", "head32/retromae", "head64/retromae", "head32/dupmae") for row in judge(args.cases / case, args.made, losses)]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print("| golden case | loss error | allowed | gradient error | allowed | worst gradient | verdict |")
    print("| --- | ---: | ---: | ---: | ---: | --- | --- |")
    for r in rows:
        if "loss" not in r:
            print(f"| {r['case']} {r['precision']} | | | | | | {r['verdict']} |")
            continue
        worst = f"{r['worst'].removeprefix('grad.')} {r['worst_error']:.1e}"
        print(f"| {r['case']} {r['precision']} | {r['loss']:.1e} | {r['allowed_loss']:.1e} | {r['gradients']:.1e} | "
              f"{r['allowed_gradients']:.1e} | {worst} | {r['verdict']} |")
    bad = [r for r in rows if r["verdict"] != "ok"]
    print(f"{len(rows) - len(bad)} of {len(rows)} golden cases ok")
    sys.exit(1 if bad else 0)


main()
