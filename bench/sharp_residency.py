"""Whether the second layer of a group finds the shared MLP in a cache, with real attention of the model in between.

``python bench/sharp_residency.py`` prints, for decode at batch 1, the times of the first and of the second MLP of a
group, and of the second once more at once, which finds everything in a cache, its own correction too: no order of
layers can do better; and their ratios to the first. Then the rate at which buffers of growing size are read a second
time, which shows the cache that this machine really gives. Two cores of an AMD EPYC, whose L3 has 32 MB: reading
again falls from above 100 GB/s to 60 beyond 20 MB, and memory itself yields 50 to 75; the second MLP takes 0.91
(576x1536, int8) and 0.90 (896x4864, int8) times as long as the first, and 0.78 and 0.77 with everything in a cache.

Streaming every second call from the end, where the one before left the cache, was measured in turns with this, in one
process: 0.85 against 0.87 at 896x4864 in bf16, of which a part fits, but 0.95 against 0.90 there in int8, and 0.95
against 0.91 and 1.00 against 0.94 at 576x1536 in int8 and int4. It does not pay, and is not built.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

import llmkern
from llmkern import MlpLora, MlpWeights

BF16 = torch.bfloat16
# Hidden and inner size, key-value heads of 64, rank; the context whose keys and values are read.
SHAPES = {"576x1536": (576, 1536, 3, 16), "896x4864": (896, 4864, 2, 64)}
CONTEXT, HEAD = 512, 64
# A model of some layers, far larger than any cache: what comes round again has been driven out.
MODEL_BYTES = 120e6
ROUNDS = 30


def normal(*size: int) -> Tensor:
    return (torch.randn(size) / size[-1] ** 0.5).to(BF16)


class Attention:
    """Projections and a step over a cache of keys and values, as a layer of the model runs it at one token."""

    def __init__(self, hidden: int, kv_heads: int) -> None:
        self.q, self.o = normal(hidden, hidden), normal(hidden, hidden)
        self.k, self.v = normal(kv_heads * HEAD, hidden), normal(kv_heads * HEAD, hidden)
        self.keys, self.values = (normal(1, kv_heads, CONTEXT, HEAD) for _ in range(2))

    def __call__(self, x: Tensor) -> Tensor:
        self.keys[:, :, -1] = F.linear(x, self.k).view(1, -1, HEAD)
        self.values[:, :, -1] = F.linear(x, self.v).view(1, -1, HEAD)
        q = F.linear(x, self.q).view(1, -1, 1, HEAD)
        y = F.scaled_dot_product_attention(q, self.keys, self.values, enable_gqa=True)
        return F.linear(y.reshape(1, -1), self.o)


def residency(hidden: int, inner: int, kv_heads: int, rank: int, packing: str) -> tuple[list[float], int]:
    """Median seconds of the first and the second MLP of a group of two, and of the second again; bytes of the base."""

    def layer() -> tuple[Attention, MlpLora]:
        ins_outs = ((hidden, inner), (hidden, inner), (inner, hidden))
        lora = MlpLora(*((normal(rank, i), normal(o, rank)) for i, o in ins_outs))
        return Attention(hidden, kv_heads), llmkern.pack_lora(lora)

    def base() -> llmkern.PackedMlp:
        weights = MlpWeights(normal(inner, hidden), normal(inner, hidden), normal(hidden, inner))
        return llmkern.pack_mlp(weights, dtype=packing, group_size=32)

    first = base()
    groups = [(base(), layer(), layer()) for _ in range(max(2, round(MODEL_BYTES / first.nbytes)))]
    times: tuple[list[float], ...] = ([], [], [])
    x = normal(1, hidden)
    for turn in range(ROUNDS):
        packed, one, two = groups[turn % len(groups)]
        for found, (attention, lora) in zip(times, (one, two, (None, two[1]))):
            if attention is not None:
                x = F.normalize(attention(x), dim=-1)
            start = time.perf_counter()
            y = llmkern.shared_lora_mlp(x, packed, lora)
            found.append(time.perf_counter() - start)
            x = F.normalize(y, dim=-1)
    return [statistics.median(found) for found in times], first.nbytes


def second_read(megabytes: int) -> float:
    """GB/s of reading again what was just read."""
    numbers = torch.ones(megabytes * 2**18)
    flush = torch.ones(2**26)
    seconds = []
    for _ in range(7):
        flush.sum()
        numbers.sum()
        start = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / statistics.median(seconds) / 1e9


def main() -> None:
    torch.manual_seed(0)
    for name, sizes in SHAPES.items():
        for packing in ("bf16", "int8", "int4"):
            (one, two, again), stored = residency(*sizes, packing)
            print(
                f"{name} {packing} ({stored / 1e6:.1f} MB): {one * 1e6:.0f} us, {two * 1e6:.0f} us: {two / one:.2f}x, "
                f"all in a cache {again * 1e6:.0f} us: {again / one:.2f}x"
            )
    for megabytes in (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 48, 64, 128):
        print(f"{megabytes} MB read again: {second_read(megabytes):.1f} GB/s")


if __name__ == "__main__":
    main()
