"""Searches parts of a corpus, as `encode --format faiss-flat --shard I/N` writes them, with faiss's IndexShards.

    python faiss_shards.py QUERIES K PART ...

QUERIES is a folder of the same format. Prints `query passage score` lines, best first. Needs faiss-cpu.
"""
import pathlib
import sys

import faiss

queries, k, *parts = sys.argv[1:]


def ids(folder):
    return pathlib.Path(folder, "ids.txt").read_text().split("\n")[:-1]


def read(folder):
    # Rows stay in the file, where this version of faiss can do that.
    return faiss.read_index(str(pathlib.Path(folder, "index.faiss")), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))


first = read(queries)
# Parts are searched by a thread each; the numbers of a part go on where those of the one before end.
index = faiss.IndexShards(first.d, True, True)
opened = [read(part) for part in parts]
for part in opened:
    index.add_shard(part)
names = [name for part in parts for name in ids(part)]
assert index.ntotal == len(names), (index.ntotal, len(names))
scores, found = index.search(first.reconstruct_n(0, first.ntotal), int(k))
for query, row, numbers in zip(ids(queries), scores, found):
    for score, number in zip(row, numbers):
        print(query, names[number], float(score))
