#!/usr/bin/env python3
"""Passages a second from text with transformers and PyTorch: the other side of goal G10.

    encode_peer.py --model FOLDER --input corpus.jsonl[.gz] [--max-length 128] [--device cuda|cpu] [--no-compile] [--json FILE]

What sentence-transformers does, without what it adds: texts sorted by length, padded batches, pooling of the model's folder, normalisation where
the folder has it; bf16 and torch.compile with dynamic shapes on a GPU. Tokenizing is inside the time, loading the model and compiling are not.
"""
import argparse
import gzip
import json
import os
import time

import torch
from transformers import AutoModel, AutoTokenizer


def texts_of(path):
    opened = gzip.open(path, "rt") if path.endswith(".gz") else open(path)
    with opened as lines:
        documents = [json.loads(line) for line in lines]
    return [(d.get("title", "") + " " + d["text"]).strip() for d in documents]


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--model", required=True)
    args.add_argument("--input", required=True)
    args.add_argument("--max-length", type=int, default=128)
    args.add_argument("--batch", type=int, default=256)
    args.add_argument("--device", default="cuda")
    args.add_argument("--no-compile", action="store_true")
    args.add_argument("--json")
    a = args.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
    bert = AutoModel.from_pretrained(a.model, dtype=dtype, add_pooling_layer=False).to(a.device).eval()
    model = bert if a.no_compile else torch.compile(bert, dynamic=True)
    read = lambda name: json.load(open(os.path.join(a.model, name)))
    mean = read("1_Pooling/config.json").get("pooling_mode_mean_tokens", False)
    normalize = any(module["type"].endswith("Normalize") for module in read("modules.json"))
    texts = texts_of(a.input)

    @torch.inference_mode()
    def encode(some):
        order = sorted(range(len(some)), key=lambda i: -len(some[i]))
        rows = []
        for start in range(0, len(some), a.batch):
            batch = [some[i] for i in order[start:start + a.batch]]
            tokens = tokenizer(batch, padding=True, truncation=True, max_length=a.max_length, return_tensors="pt").to(a.device)
            states = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"][..., None]
            row = (states * mask).sum(1) / mask.sum(1) if mean else states[:, 0]
            rows.append(torch.nn.functional.normalize(row, dim=-1) if normalize else row)
        return torch.cat(rows).float().cpu()

    encode(texts[: 4 * a.batch])
    encode(texts[: 4 * a.batch])
    times = []
    for _ in range(3):
        start = time.perf_counter()
        encode(texts)
        times.append(time.perf_counter() - start)
    seconds = sorted(times)[1]
    result = {"texts": len(texts), "seconds": times, "texts_per_s": len(texts) / seconds, "device": a.device, "compiled": not a.no_compile,
              "torch": torch.__version__}
    print(json.dumps(result))
    if a.json:
        with open(a.json, "a") as out:
            out.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
