"""Up to how many tokens shared_lora_mlp had better stream its weights, over shapes and forms of the weights.

``python bench/_mlp_crossover.py``, on a quiet machine, takes three minutes. A call streams up to the number of tokens
that few_tokens() in csrc/shared_lora_mlp.cpp gives; with keep=True it goes by products of matrices at any number, which
shows in the last bits. Beyond, the time of streaming is on a line through the last ones that were measured. Prints
where the two ways meet, and at which number of tokens a call takes longest beside the faster way; fails where that is
half as long again.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator

import torch
from _rope_choice import turns
from shared_lora_mlp import as_lora
from torch import Tensor

import llmkern
from llmkern import MlpWeights
from llmkern.ops.shared_lora_mlp.arguments import flatten_arguments

SHAPES = {(576, 1536): 16, (896, 4864): 64, (2048, 8192): 64, (4096, 11008): 64}
FORMS = {"float32": None, "bfloat16": None, "bf16 pack": "bf16", "int8 pack": "int8", "int4 pack": "int4"}
TOKENS = (1, 4, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32)
ALLOWED = 1.5
# Above the last-level cache.
ROTATION_BYTES = 100e6


def layers(shape: tuple[int, int], rank: int, form: str) -> list[tuple[object, llmkern.MlpLora]]:
    hidden, inner = shape
    dtype = torch.float32 if form == "float32" else torch.bfloat16
    ins_outs = ((hidden, inner), (hidden, inner), (inner, hidden))

    def normal(*size: int) -> Tensor:
        return (torch.randn(size) / size[-1] ** 0.5).to(dtype)

    found, stored = [], 0.0
    while stored < ROTATION_BYTES or len(found) < 2:
        weights = MlpWeights(*(normal(outs, ins) for ins, outs in ins_outs))
        lora = as_lora([t for ins, outs in ins_outs for t in (normal(rank, ins), normal(outs, rank))])
        packing = FORMS[form]
        if packing is None:
            found.append((weights, lora))
            stored += sum(w.nbytes for w in weights)
        else:
            found.append((llmkern.pack_mlp(weights, dtype=packing, group_size=32), llmkern.pack_lora(lora)))
            stored += found[-1][0].nbytes
    return found


def times(form: str, found: list[tuple[object, llmkern.MlpLora]], hidden: int) -> dict[int, tuple[float, float, bool]]:
    """By tokens: seconds of a call, seconds by products of matrices, and whether the call streams."""
    dtype = torch.float32 if form == "float32" else torch.bfloat16

    def call(keep: bool, x: Tensor, turn: Iterator[tuple[object, llmkern.MlpLora]]) -> Tensor:
        flat = flatten_arguments(x, *next(turn), "silu", 0.0)
        return torch.ops.llmkern.shared_lora_mlp_fwd(
            flat.x, flat.weights, flat.group_size, flat.lora, flat.scaling, [None] * 3, "silu", keep
        )[0]

    measured = {}
    for n in TOKENS:
        x = torch.randn(n, hidden).to(dtype)
        streams = not torch.equal(*(call(keep, x, iter(found)) for keep in (False, True)))
        taken, products = turns([functools.partial(call, keep, x, itertools.cycle(found)) for keep in (False, True)])
        measured[n] = taken, products, streams
    return measured


def streaming(measured: dict[int, tuple[float, float, bool]]) -> dict[int, float]:
    """Seconds of streaming; of more tokens than calls stream, on a line through the last two multiples of 4."""
    found = {n: taken for n, (taken, _, streams) in measured.items() if streams}
    one, two = [n for n in found if n % 4 == 0][-2:]
    each = (found[two] - found[one]) / (two - one)
    return {n: found.get(n, found[two] + (n - two) * each) for n in measured}


@torch.no_grad()
def main() -> int:
    torch.manual_seed(0)
    worst, failures = 0.0, 0
    print("| weights | shape | ways meet | longest beside the faster | us of a call by tokens |")
    print("|---" * 5 + "|")
    for form, (shape, rank) in itertools.product(FORMS, SHAPES.items()):
        measured = times(form, layers(shape, rank, form), shape[0])
        stream = streaming(measured)
        meet = next((str(n) for n in TOKENS if measured[n][1] < stream[n]), f"over {TOKENS[-1]}")
        ratios = {n: taken / min(stream[n], products) for n, (taken, products, _) in measured.items()}
        at = max(ratios, key=lambda n: ratios[n])
        failures += ratios[at] > ALLOWED
        worst = max(worst, ratios[at])
        last = max(n for n in TOKENS if measured[n][2])
        cells = " ".join(f"{n}:{taken * 1e6:.0f}" for n, (taken, _, _) in measured.items())
        print(
            f"| {form} | {shape[0]}x{shape[1]} | {meet}, calls part at {last} | {ratios[at]:.2f} at {at} | {cells} |",
            flush=True,
        )
    print(f"a call takes at most {worst:.2f} times as long as the faster way; {failures} cases above what is allowed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
