r"""The papers' general case: scores q_i^T W_{i-j} k_j for a W that does not factorise, by ``toeplitz_attention``.

W_t stands on the diagonal and beside it, its entries damped rotations whose phase goes with log(1 + |t|): a power of
the distance or a phase linear in it would be a product of a function of i and one of j, this is none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import llmkern
from llmkern.papers.rope.measure import Heads, fitted_exponent, forward_backward_seconds, repeats_for
from llmkern.papers.rope.synthetic import gaussian_heads

DIM, BOUND, RTOL = 4, 0.5, 1e-2
METHODS = ("exact", "blocks", "fft")
# Below this there are no far blocks.
LEAST = 1000


def general_matrix(length: int, dim: int, dtype: torch.dtype = torch.float32) -> llmkern.RelativeMatrix:
    """One head; 2 dim - 1 places; no W_t has a norm above 1."""
    t = torch.arange(1 - length, length, dtype=torch.float64)
    places = [(a, a) for a in range(dim)] + [(a, a + 1) for a in range(dim - 1)]
    phase = torch.log1p(t.abs() / 20)
    rows = [0.5 * torch.cos(0.3 * (s + 1) * phase + 0.2 * s * t.sign()) for s in range(len(places))]
    return llmkern.RelativeMatrix(torch.stack(rows)[None].to(dtype), torch.tensor(places))


def dense_attention(q: Tensor, k: Tensor, v: Tensor, relative: llmkern.RelativeMatrix) -> Tensor:
    """Causal, with all n^2 scores, from the definition."""
    n = q.shape[2]
    between = torch.arange(n)[:, None] - torch.arange(n)[None, :] + relative.length - 1
    scores = torch.zeros(n, n, dtype=q.dtype)
    for s, (a, b) in enumerate(relative.support.tolist()):
        scores = scores + q[0, 0, :, a, None] * relative.matrix[0, s][between] * k[0, 0, None, :, b]
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def _attend(q: Tensor, k: Tensor, v: Tensor, relative: llmkern.RelativeMatrix, method: str) -> Tensor:
    return llmkern.toeplitz_attention(q, k, v, relative=relative, is_causal=True, scale=1.0, rtol=RTOL, method=method)


@dataclass
class Agreement:
    """Largest errors against dense attention in float64: of a row over max|v - o|, of gradients over their largest
    entry, that of W's size over the sum of |q_i.dq_i|: the sum of q_i.dq_i is what it is, and that may cancel."""

    method: str
    row: float
    dq: float
    dk: float
    dv: float
    dw: float


def agreement(n: int, method: str, seed: int = 0) -> Agreement:
    heads = gaussian_heads(n, DIM, BOUND, seed, torch.float64)
    matrix = general_matrix(n, DIM, torch.float64)
    upstream = torch.randn(heads.v.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    found: list[tuple[Tensor, ...]] = []
    computed: tuple[Callable[..., Tensor], ...] = (dense_attention, functools.partial(_attend, method=method))
    for compute in computed:
        leaves = [x.clone().requires_grad_() for x in (heads.q, heads.k, heads.v)]
        # One parameter of all distances: by blocks the gradient of a table arrives at nodes.
        size = torch.ones((), dtype=torch.float64, requires_grad=True)
        out = compute(*leaves, llmkern.RelativeMatrix(size * matrix.matrix, matrix.support))
        found.append((out.detach(), *torch.autograd.grad(out, [*leaves, size], upstream)))
    truth, ours = found
    reach = (heads.v[0, 0] - truth[0][0, 0][:, None]).abs().amax((1, 2))
    row = float(((ours[0] - truth[0]).abs().amax(-1)[0, 0] / reach).max())
    terms = (heads.q * truth[1]).sum(-1).abs().sum()
    sizes = [*(x.abs().max() for x in truth[1:4]), terms]
    return Agreement(method, row, *(float((b - a).abs().max() / x) for a, b, x in zip(truth[1:], ours[1:], sizes)))


def time_general(n: int) -> dict[str, Any]:
    """Seconds of a forward and backward pass, planning included, by method; W is given and gets no gradient."""
    heads: Heads = gaussian_heads(n, DIM, BOUND)
    relative = general_matrix(n, DIM)
    seconds = {
        method: forward_backward_seconds(
            functools.partial(_attend, relative=relative, method=method), heads, repeats_for(n)
        )
        for method in METHODS
    }
    return {"length": n, **seconds}


def measure_general(lengths: Sequence[int]) -> dict[str, Any]:
    return {
        "agreement": [vars(agreement(LEAST, method)) for method in METHODS],
        "times": [time_general(n) for n in lengths if n >= LEAST],
    }


def exponent(times: list[dict[str, Any]], method: str) -> float:
    return fitted_exponent([row["length"] for row in times], [row[method] for row in times])


def conclusions(general: dict[str, Any]) -> list[str]:
    worst = {row["method"]: row["row"] for row in general["agreement"]}
    held = all(error <= RTOL for error in worst.values())
    sentences = [
        f"A W that does not factorise, {2 * DIM - 1} places, float64: rows err by "
        + ", ".join(f"{error:.1e} ({method})" for method, error in worst.items())
        + f" of max|v - o|, {'within' if held else 'NOT within'} rtol {RTOL:g}."
    ]
    times = general["times"]
    if not math.isnan(exponent(times, "exact")):
        last = times[-1]
        sentences.append(
            "Its time, forward and backward: "
            + ", ".join(f"n^{exponent(times, method):.2f} {method}" for method in METHODS)
            + f"; at {last['length']} tokens blocks are {last['exact'] / last['blocks']:.1f} times as fast as exact "
            f"tiles, FFT {last['exact'] / last['fft']:.1f} times."
        )
    return sentences


def tables(general: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    grads = ("row", "dq", "dk", "dv", "dw")
    return [
        (
            "General W against dense attention, float64",
            ["method", *grads],
            [[row["method"], *(f"{row[name]:.1e}" for name in grads)] for row in general["agreement"]],
        ),
        (
            "General W: seconds, forward and backward",
            ["tokens", *METHODS],
            [[str(row["length"]), *(f"{row[method]:.4f}" for method in METHODS)] for row in general["times"]],
        ),
    ]


def draw(axis: Any, general: dict[str, Any]) -> None:
    times = general["times"]
    for method in METHODS:
        points = [row["length"] for row in times], [row[method] for row in times]
        axis.plot(*points, ".-", label=f"{method}: n^{exponent(times, method):.2f}")
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds", title="W that does not factorise")
    if times:
        axis.legend()
