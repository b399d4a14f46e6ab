"""What data-parallel training should reach on GPUs that nobody has lent us: a simulation, not a measurement.

    python3 benches/scaling.py            # Python's standard library only; same output every time

Ranks compute a step in the time that one H200 was measured to take, a little apart from each other. Gradients are summed by ring
all-reduce, in buckets while the backward pass goes on (what the engine does: src/train/buckets.rs), or in one piece behind it (what it
did before). A ring takes what NCCL itself expects of it: a latency a step, and bytes over the slowest link. Not simulated: kernels slowed
down by NCCL's beside them, trees in place of rings, switches with other traffic, reading data, evaluations, checkpoints.
"""

import random

# --- Inputs, and where they come from -------------------------------------------------------------------------------------------------
STEP_MS = 76.7  # measured, 64 x 512 tokens, bf16: benches/results/h200-2026-11-28.md
TOKENS = 64 * 512  # a rank and step, the same run
UPDATE_MS = 1.0  # norm and AdamW, the same run
HEAD_MS = 17.0 * 2 / 3  # backward of the LM head and loss: 17 ms both ways in the same run, a backward taken as two thirds
EMBED_MS = 0.24  # backward of the embeddings, the same run
SPREAD_MS = 0.35  # standard deviation of a rank's step: two processes took 77.4 and 76.7 ms in the same run
LAYERS = 13  # 12 of the encoder and the decoder's; they share the rest of the backward equally (taken)
# Parameters: matrices in the order in which the backward completes them, and what lies behind them all, biases and LayerNorms. The word
# embeddings are also the LM head's: complete at the very end.
EMBEDDINGS, LAYER, HEAD = (30_528 + 512 + 2) * 768, 4 * 768 * 768 + 2 * 768 * 3_072, 768 * 768
VECTORS = LAYERS * (4 * 768 + 3_072 + 768 + 4 * 768) + 2 * 768 + 3 * 768 + 30_528
BYTES = 4  # gradients are f32
NVLINK = 450e9  # bytes/s each way a GPU (NVLink 4: 900 GB/s both ways, NVIDIA's data sheet of the H200)
NETWORK = 50e9  # bytes/s each way a GPU: one adapter of 400 Gb/s each (taken: as in NVIDIA's DGX H200)
NODE = 8  # GPUs of a machine
REACHED = 0.8  # of a link's bytes/s in large transfers (taken)
BASE_S, NVLINK_S, NETWORK_S = 8.4e-6, 3.4e-6, 9.6e-6  # an operation, a step within and between machines: NCCL, tuning.cc, Ring/Simple
BUCKET = 25 * 2**20  # bytes, at least (src/train/buckets.rs, as PyTorch's DistributedDataParallel)
CUT_S = 5e-6  # the GPU between two pieces of a recorded backward (taken)
NORMS_S = 20e-6  # a copy from the GPU that is waited for: the norms of a rank's own buckets (taken)
EXCHANGES = 3  # small messages a step through rank 0: stop, labels, losses (counted in src/train)
WAY_S, CALL_S = 25e-6, 5e-6  # TCP one way; a system call of rank 0, which for each rank reads once and writes once (taken)
THREADS = 8  # of rank 0 that read and write (taken: a machine with eight GPUs has at least as many cores for each)
DRAWS = 200


def ring(ranks, size, steps):
    """Seconds of a ring: `steps` x (n - 1) steps of size / n bytes. Between machines there is a ring for each of a machine's adapters."""
    if ranks == 1:
        return 0.0
    nodes = -(-ranks // NODE)
    rate = NVLINK if nodes == 1 else min(NVLINK, NETWORK * NODE)
    far = steps * (nodes - 1)
    near = steps * (ranks - 1) - far
    return BASE_S + near * NVLINK_S + far * NETWORK_S + steps * (ranks - 1) / ranks * size / (rate * REACHED)


def single_ring(ranks, size):
    """An all-reduce whose only ring crosses machines through one adapter."""
    return ring(ranks, size, 2) if ranks <= NODE else ring(ranks, size * min(NVLINK, NETWORK * NODE) / NETWORK, 2)


def exchanges(ranks):
    """Seconds of a step's small messages."""
    return 0.0 if ranks == 1 else EXCHANGES * (2 * WAY_S + 2 * CALL_S * (ranks - 1) / min(ranks - 1, THREADS))


def buckets():
    """(seconds before the end of the backward, bytes) of each bucket, in the order of the backward."""
    backward = (STEP_MS - UPDATE_MS) * 2 / 3
    layer = (backward - HEAD_MS - EMBED_MS) / LAYERS
    # The head and the decoder are one part.
    pieces = [(HEAD_MS + layer, HEAD + LAYER)] + [(layer, LAYER)] * (LAYERS - 1) + [(EMBED_MS, EMBEDDINGS)]
    found, size, left = [], 0, backward
    for ms, parameters in pieces:
        left -= ms
        size += parameters * BYTES
        if size >= BUCKET or left < 1e-9:
            found.append((max(left, 0.0) / 1e3, size))
            size = 0
    return found + [(0.0, VECTORS * BYTES)]


def step(ranks, overlap, reduce=lambda n, size: ring(n, size, 2)):
    """Mean seconds of a step of `ranks` ranks: all wait for the last one."""
    draw, total = random.Random(1), 0.0
    computing, pieces = (STEP_MS - UPDATE_MS) / 1e3, buckets()
    whole = sum(size for _, size in pieces)
    for _ in range(DRAWS if ranks > 1 else 1):
        last = computing + (max(draw.gauss(0, SPREAD_MS / 1e3) for _ in range(ranks)) if ranks > 1 else 0.0)
        end = last
        if overlap and ranks > 1:
            last += CUT_S * (len(pieces) - 2)
            free = 0.0
            for before_end, size in pieces:
                free = max(free, last - before_end) + reduce(ranks, size)
            end = max(last, free) + NORMS_S
        else:
            end += reduce(ranks, whole)
        total += end + exchanges(ranks) + UPDATE_MS / 1e3
    return total / (DRAWS if ranks > 1 else 1)


def main():
    parameters = HEAD + LAYERS * LAYER + EMBEDDINGS + VECTORS
    size = parameters * BYTES
    print(f"SIMULATION. {parameters / 1e6:.1f} M parameters, {size / 1e6:.1f} MB of gradients, {STEP_MS} ms a step on one GPU")
    print("buckets (ms before the end of the backward: MB): " + ", ".join(f"{t * 1e3:.1f}: {b / 1e6:.0f}" for t, b in buckets()))
    one = step(1, False)
    heads = "GPUs | step, ms | tokens/s | of n GPUs | one ring: step, ms | in one piece: all-reduce, ms | step, ms | tokens/s | of n GPUs"
    print(f"\n| {heads} |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for n in (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096):
        plain, over, single = step(n, False), step(n, True), step(n, True, single_ring)
        reduce = ring(n, size, 2) * 1e3
        rate = lambda s: f"{n * TOKENS / s:,.0f} | {one / s:.1%}"
        print(f"| {n} | {over * 1e3:.1f} | {rate(over)} | {single * 1e3:.1f} | {reduce:.2f} | {plain * 1e3:.1f} | {rate(plain)} |")
    print("\nwhat a step of n GPUs waits for, ms (each alone)")
    for n in (8, 64, 1024):
        draw = random.Random(1)
        late = sum(max(draw.gauss(0, SPREAD_MS) for _ in range(n)) for _ in range(DRAWS)) / DRAWS
        behind = (step(n, True) - exchanges(n) - NORMS_S) * 1e3 - STEP_MS - late
        print(f"{n:5}: sums behind the backward, and cuts, {behind:.2f}, last rank {late:.2f}, small messages {exchanges(n) * 1e3:.2f}")
    for overlap in (True, False):
        for part in (0.9, 0.5):
            n = 1
            while n < 1 << 16 and one / step(n, overlap) >= part:
                n *= 2
            print(f"{'in buckets' if overlap else 'in one piece'}: below {part:.0%} of n GPUs first at {n} (powers of two)")
    print("\nnegatives of all ranks, 64 queries and 512 passages a rank x 768, bf16: passages to all, sums of their gradients back")
    print("\n| GPUs | passages a query | all-gather, ms | reduce-scatter, ms |\n| ---: | ---: | ---: | ---: |")
    for n in (1, 8, 64):
        each = ring(n, n * 512 * 768 * 2, 1) * 1e3
        print(f"| {n} | {n * 512:,} | {each:.3f} | {each:.3f} |")


if __name__ == "__main__":
    main()
