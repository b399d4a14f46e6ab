"""Writes tests/golden/rows: training rows as pyarrow (and so the datasets library) stores them.

    pip install pyarrow && python make_rows.py OUTPUT
"""

import pathlib
import sys

import pyarrow as pa
import pyarrow.parquet as pq

folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
query, red = ["red", "blue"], ["a fox", "a sea"]

# FlagEmbedding: lists, one of them null, one empty; large strings; scores as lists of float.
pq.write_table(
    pa.table(
        {
            "query": pa.array(query, pa.large_string()),
            "pos": pa.array([[t] for t in red], pa.list_(pa.string())),
            "neg": pa.array([["a house", "the sea"], []], pa.large_list(pa.large_string())),
            "pos_scores": pa.array([[1.5], [2.5]], pa.list_(pa.float32())),
            "neg_scores": pa.array([[-1.0, -2.0], None], pa.list_(pa.float64())),
        }
    ),
    folder / "flag_embedding.parquet",
    compression="zstd",
)

# sentence-transformers: dictionaries, a column with nulls.
pq.write_table(
    pa.table(
        {
            "anchor": pa.array(query).dictionary_encode(),
            "positive": pa.array(red).dictionary_encode(),
            "negative": pa.array(["a house", None]),
        }
    ),
    folder / "triplets.parquet",
    compression="snappy",
)

# Tevatron: lists of structs.
passage = pa.struct([("docid", pa.string()), ("title", pa.string()), ("text", pa.string())])
rows = [[{"docid": str(i), "title": "Fox" if i == 0 else None, "text": t}] for i, t in enumerate(red)]
pq.write_table(
    pa.table(
        {
            "query_id": pa.array(["1", "2"]),
            "query": pa.array(query),
            "positive_passages": pa.array(rows, pa.list_(passage)),
            "negative_passages": pa.array([[{"docid": "9", "title": "", "text": "a house"}], []], pa.list_(passage)),
        }
    ),
    folder / "tevatron.parquet",
    compression="gzip",
)
