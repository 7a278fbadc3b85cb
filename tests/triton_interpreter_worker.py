"""Cases for Triton's interpreter, which runs the launchers on CPU tensors. Started by test_triton_interpreter.py.

The variable TRITON_INTERPRET has to be set before triton is imported, and a process that has it cannot compile: so
these cases have a process of their own. It reads names of cases, and prints for each a line of JSON: name, and what
failed or nothing.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
import triton_rope_attention
import triton_shared_lora_mlp
import triton_toeplitz_attention
from oracle import assert_close, farther, map_tensors, nudge
from torch import Tensor

from llmkern.kernels import _pairs, _tiles, mix_logits, pairwise_scores, sample_mixed, vas_score
from llmkern.ops.mix_logits import reference as mix_reference
from llmkern.ops.pairwise_scores.neg_clip_loss import negatives_reference
from llmkern.ops.pairwise_scores.norm_sim import norm_sim_power_backward_reference, norm_sim_reference
from llmkern.ops.pairwise_scores.two_way_lse import two_way_lse_backward_reference, two_way_lse_reference
from llmkern.ops.sample_mixed import philox_uniform, sample_mixed_reference
from llmkern.ops.vas_score.score import vas_score_reference

# Two programs a row, and several steps of each, at a few hundred tokens.
SMALL = _tiles.Tile(block=128, warps=4, row_block=128, row_warps=4, search_block=128)
SPLITS = 2
MODELS = 3
NAMES = ("logits0", "logits1", "logits2", "weights", "reference", "carry")
# The reason is in cases.py, at SEARCH: searched and exponential forms magnify rounding at random.
SEARCHED_FACTOR = 8.0

Mix = tuple[Any, ...]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def make_mix(
    width: int, dtype: torch.dtype, divergence: str, exact: bool, reference: bool, carry: bool, weights: str
) -> Mix:
    """Arguments of mix_logits_fwd: rows of a wider tensor, so that strides count, and some entries of -inf."""
    generator = torch.Generator().manual_seed(width)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    common = 2 * normal(generator, 3, width)
    logits = []
    for i in range(MODELS):
        row = common + normal(generator, 3, width)
        if width > 4:
            row[0, i] = -math.inf
        padded = torch.full((3, width + i), math.nan, dtype=dtype)
        padded[:, :width] = row.to(dtype)
        logits.append(padded[:, :width])
    if reference and width > 4:
        common[2, 4] = -math.inf
    values = {"simplex": (0.2, 0.5, 0.3), "less": (0.3, 0.4, 0.1), "zero": (0.6, 0.0, 0.3), "signed": (0.9, 0.2, -0.2)}
    w = torch.tensor(values[weights], dtype=compute).repeat(3, 1)
    if weights == "simplex":
        # Within the rounding of the sum, so the reference must not count: it excludes a token of this row.
        w[2, 0] -= 2.0**-24
    if weights == "signed" and width > 4:
        logits[2] = logits[2].clone()
        logits[2][0, 2] = 0.0
    return (
        logits,
        w,
        common.to(dtype) if reference else None,
        normal(generator, 3, MODELS).to(compute) if carry else None,
        divergence,
        0.4 if divergence == "alpha" else 1.0,
        exact,
    )


def doubled(args: Mix) -> Mix:
    return map_tensors(args, torch.Tensor.double)


def needs_of(args: Mix) -> list[bool]:
    return [True] * (MODELS + 1) + [args[2] is not None, args[3] is not None]


def forward_and_gradients(forward: Callable[..., Any], backward: Callable[..., Any], args: Mix) -> dict[str, Tensor]:
    out, stats = forward(*args)
    upstream = normal(torch.Generator().manual_seed(1), *out.shape).to(out.dtype)
    grads = backward(upstream, stats, *args, needs_of(args))
    return {"forward": out, **{name: grad for name, grad, need in zip(NAMES, grads, needs_of(args)) if need}}


def check_mix(*case: Any) -> None:
    args = make_mix(*case)
    dtype = args[0][0].dtype
    references = mix_reference.mix_logits_reference, mix_reference.mix_logits_backward_reference
    truth = forward_and_gradients(*references, doubled(args))
    base = forward_and_gradients(*references, args)
    if dtype != torch.float16:
        moved = forward_and_gradients(*references, map_tensors(args, nudge))
        base = {name: farther(truth[name], base[name], moved[name]) for name in base}
    before = map_tensors(args, torch.Tensor.clone)
    ours = forward_and_gradients(mix_logits.mix_logits_fwd, mix_logits.mix_logits_bwd, args)
    linear = args[4] == "reverse_kl"
    for name in truth:
        assert_close(name, ours[name], truth[name], base[name], dtype, 2.0 if linear else SEARCHED_FACTOR)
    for now, then in zip([*args[0], *args[1:4]], [*before[0], *before[1:4]]):
        assert now is None or torch.equal(now.nan_to_num(), then.nan_to_num()), "an input was written to"


def check_needs() -> None:
    """Any subset of gradients equals its part of all of them, and what is not asked for stays empty."""
    args = make_mix(17, torch.float32, "jsd", True, True, True, "less")
    out, stats = mix_logits.mix_logits_fwd(*args)
    upstream = torch.ones_like(out)
    full = mix_logits.mix_logits_bwd(upstream, stats, *args, [True] * 6)
    for chosen in range(6):
        needs = [i == chosen for i in range(6)]
        for i, grad in enumerate(mix_logits.mix_logits_bwd(upstream, stats, *args, needs)):
            assert torch.equal(grad, full[i]) if needs[i] else grad.numel() == 0, f"{NAMES[i]} with needs {needs}"


def check_absent_model(divergence: str, exact: bool) -> None:
    """What a model without weight holds has no effect, and its gradient is zero."""
    args = make_mix(70, torch.float32, divergence, exact, True, True, "zero")
    spoilt = ([args[0][0], torch.full_like(args[0][1], math.nan), args[0][2]], *args[1:])
    clean, ours = (
        forward_and_gradients(mix_logits.mix_logits_fwd, mix_logits.mix_logits_bwd, a) for a in (args, spoilt)
    )
    assert not ours["logits1"].any()
    for name in ("forward", "logits0", "logits2", "reference", "carry"):
        assert torch.equal(ours[name], clean[name]), name
    assert torch.equal(ours["weights"][:, ::2], clean["weights"][:, ::2])


def check_rows_without_distribution(divergence: str) -> None:
    """NaN rows, token -1, and untouched neighbours: NaN and +inf in a logit, nothing but -inf, disjoint supports."""
    args = make_mix(70, torch.float32, divergence, True, True, False, "simplex")
    logits = [row.clone().repeat(2, 1) for row in args[0]]
    rows = (logits, args[1].repeat(2, 1), args[2].clamp(min=-9).repeat(2, 1), *args[3:])
    expected = mix_logits.mix_logits_fwd(*rows)[0]
    logits[0][1, 5], logits[1][2, 6], logits[2][3] = math.nan, math.inf, -math.inf
    logits[0][4, ::2], logits[1][4, 1::2] = -math.inf, -math.inf
    out = mix_logits.mix_logits_fwd(*rows)[0]
    assert out[1:5].isnan().all(), out[1:5]
    assert torch.equal(out[::5], expected[::5])
    filters = torch.tensor([[0.0, 0, 1, 0], [1, 0, 1, 0], [1, 5, 0.9, 0.1]], dtype=torch.float64).repeat(2, 1)
    tokens, log_probs = sample_mixed.sample_mixed(*rows, filters, torch.zeros(6, 3, dtype=torch.int64))
    assert tokens[1:5].tolist() == [-1] * 4
    assert log_probs[1:5].isnan().all()
    assert (tokens[::5] >= 0).all()
    assert log_probs[::5].isfinite().all()


def check_empty_batch() -> None:
    args = make_mix(70, torch.float32, "jsd", True, True, True, "less")
    none = ([row[:0] for row in args[0]], args[1][:0], args[2][:0], args[3][:0], *args[4:])
    out, stats = mix_logits.mix_logits_fwd(*none)
    assert out.shape == (0, 70)
    grads = mix_logits.mix_logits_bwd(out, stats, *none, [True] * 6)
    assert [grad.shape[0] for grad in grads] == [0] * 6
    tokens, _ = sample_mixed.sample_mixed(*none, torch.empty(0, 4).double(), torch.empty(0, 3).long())
    assert tokens.shape == (0,)


# temperature, top_k, top_p, min_p of the rows of one batch
FILTERS = {
    "greedy": [(0.0, 0, 1.0, 0.0)],
    "no_filter": [(1.0, 0, 1.0, 0.0), (0.3, 0, 1.0, 0.0), (2.5, 0, 1.0, 0.0)],
    "top_k": [(1.0, 1, 1.0, 0.0), (0.7, 3, 1.0, 0.0), (1.5, 50, 1.0, 0.0), (1.0, 10**6, 1.0, 0.0)],
    "top_p": [(1.0, 0, 0.05, 0.0), (0.8, 0, 0.5, 0.0), (1.3, 0, 0.95, 0.0), (1.0, 0, 1e-6, 0.0)],
    "min_p": [(1.0, 0, 1.0, 0.02), (2.0, 0, 1.0, 0.3), (1.0, 0, 1.0, 1.0)],
    "mixed": [(0.0, 5, 0.5, 0.1), (1.0, 0, 1.0, 0.0), (0.9, 20, 0.9, 0.01), (1.2, 7, 0.6, 0.0), (1e-3, 2, 1.0, 0.0)],
}


def check_sampling(kind: str, width: int, dtype: torch.dtype, divergence: str, steps: int) -> None:
    rows = FILTERS[kind]
    mix = make_mix(width, dtype, divergence, True, True, False, "less")
    if width > 64 and divergence == "reverse_kl":
        # Equal scores at the cut and at the top: order by id has to decide.
        for row in (*mix[0], mix[2]):
            row[:, 7::16] = 8.0
    args = (
        map_tensors(mix[0], lambda x: x[:1].expand(len(rows), -1)),
        *map_tensors(mix[1:3], lambda x: x[:1].expand(len(rows), -1)),
        *mix[3:],
    )
    filters = torch.tensor(rows, dtype=torch.float64)
    for step in range(steps):
        seeds = 2**40 * torch.arange(-2, len(rows) - 2) + 12345
        draws = torch.stack([seeds, torch.arange(len(rows)), torch.full_like(seeds, step + 2**33)], -1)
        tokens, log_probs = sample_mixed.sample_mixed(*args, filters, draws)
        expected, base = sample_mixed_reference(*args, filters, draws)
        assert torch.equal(tokens, expected), f"tokens {tokens.tolist()}, expected {expected.tolist()}"
        truth = sample_mixed_reference(*doubled(args), filters, draws)[1]
        assert_close("log_probs", log_probs, truth, base, log_probs.dtype, SEARCHED_FACTOR)


@triton.jit
def uniforms(out, draws, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK // 4)
    for start in range(0, V, BLOCK):
        words = sample_mixed.philox_words(draws, row, start, BLOCK // 4)
        for w in tl.static_range(4):
            ids = start + 64 * (lanes // 16) + 16 * w + lanes % 16
            tl.store(out + row * V + ids, sample_mixed.uniform(words[w]), ids < V)


def check_philox() -> None:
    """Seeds, rows and steps of both signs and of more than 32 bits."""
    draws = torch.tensor([[0, 0, 0], [-5, 3, 2**40 + 7], [2**62 + 12345, 2**31 + 1, -1], [1, 2**35, 2**31]])
    out = torch.empty(4, 1000)
    uniforms[(4,)](out, draws, 1000, 256)
    assert torch.equal(out.double(), philox_uniform(draws, 1000))


def check_splits_do_not_matter() -> None:
    """The token and, to rounding, the log-probs are the same with one program a row."""
    args = make_mix(300, torch.float32, "reverse_kl", True, True, False, "less")
    filters = torch.tensor([[1.0, 0, 1, 0], [1, 40, 1, 0], [1, 0, 0.8, 0.01]], dtype=torch.float64)
    draws = torch.tensor([[1, 2, 3]]).repeat(3, 1)
    many = sample_mixed.sample_mixed(*args, filters, draws)
    with mock.patch.object(_tiles, "MAX_SPLITS", 1):
        one = sample_mixed.sample_mixed(*args, filters, draws)
    assert torch.equal(many[0], one[0])
    torch.testing.assert_close(many[1], one[1])


def check_pairs(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    args: tuple[Any, ...],
    dtype: torch.dtype,
    factor: float = 2.0,
) -> Any:
    """Every floating output by the oracle's rule, others exactly; returns what the kernel gave."""

    def results(function: Callable[..., Any], change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        out = function(*map_tensors(args, lambda t: change(t) if t.is_floating_point() else t))
        return [out] if isinstance(out, Tensor) else list(out)

    truth, base = results(reference, torch.Tensor.double), results(reference, torch.Tensor.clone)
    moved = results(reference, nudge) if dtype == torch.float32 else base
    ours = results(kernel, torch.Tensor.clone)
    for i, (got, true, one, other) in enumerate(zip(ours, truth, base, moved)):
        if got.is_floating_point():
            assert_close(f"output {i}", got, true, farther(true, one, other), got.dtype, factor)
        else:
            assert torch.equal(got, true), f"output {i}"
    return ours


def rows_of(n: int, d: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows of a wider matrix, so that strides count."""
    padded = torch.full((n, d + 3), math.nan, dtype=dtype)
    padded[:, :d] = (normal(torch.Generator().manual_seed(seed), n, d) / d**0.25).to(dtype)
    return padded[:, :d]


def check_vas(n: int, d: int, dtype: torch.dtype, cross: bool) -> None:
    x, y = rows_of(n, d, dtype, 0), rows_of(n, d, dtype, 1) if cross else None
    check_pairs(vas_score.vas_score_fwd, vas_score_reference, (x, rows_of(d, d, torch.float32, 2), y, False), dtype)


def check_norm_sim(n: int, m: int, d: int, dtype: torch.dtype, p: float) -> None:
    x, target = rows_of(n, d, dtype, 0), rows_of(m, d, dtype, 1)
    # Powers come from logarithms, which are rounded at the size of p.
    factor = 2.0 if p == math.inf else 8.0
    out, _ = check_pairs(pairwise_scores.norm_sim_fwd, norm_sim_reference, (x, target, p, False), dtype, factor)
    if p != math.inf:
        args = (torch.ones(n), x, target, out, p, [True, True])
        check_pairs(pairwise_scores.norm_sim_power_bwd, norm_sim_power_backward_reference, args, dtype, factor)


def check_lse(n: int, m: int, d: int, dtype: torch.dtype, offset: int) -> None:
    image, text, scale = rows_of(n, d, dtype, 0), rows_of(m, d, dtype, 1), torch.tensor(3.0)
    forward = (image, text, scale, offset, False)
    rows, columns, _ = check_pairs(pairwise_scores.two_way_lse_fwd, two_way_lse_reference, forward, dtype, 4.0)
    generator = torch.Generator().manual_seed(5)
    upstream = [normal(generator, size).float() for size in (n, m, n)]
    args = (image, text, scale, rows, columns, *upstream, offset, [True] * 3)
    check_pairs(pairwise_scores.two_way_lse_bwd, two_way_lse_backward_reference, args, dtype, 4.0)
    if n == m:
        order, bounds = torch.randperm(n, generator=generator), [0, n // 3, n]
        args = (image, text, scale, order, bounds, False)
        check_pairs(pairwise_scores.negatives, negatives_reference, args, dtype, 4.0)


def check_bad_rows_of_pairs() -> None:
    x, target = rows_of(20, 9, torch.float32, 0), rows_of(30, 9, torch.float32, 1)
    for p in (math.inf, 3.0):
        clean, _ = pairwise_scores.norm_sim_fwd(x, target, p, False)
        spoilt = x.clone()
        spoilt[3], spoilt[17, 2] = 0, math.nan
        scores, _ = pairwise_scores.norm_sim_fwd(spoilt, target, p, False)
        assert scores[3] == 0
        assert scores[17].isnan()
        others = [i for i in range(20) if i not in (3, 17)]
        assert torch.equal(scores[others], clean[others])


def mixes() -> Iterator[tuple[Any, ...]]:
    """(width, dtype, divergence, exact, reference, carry, weights) without the combinations that no mix admits."""
    divergences = ("reverse_kl", "forward_kl", "alpha", "jsd")
    for divergence, exact, reference in itertools.product(divergences, (True, False), (True, False)):
        if not reference and (divergence == "jsd" or (divergence != "reverse_kl" and exact)):
            continue
        for weights in ("zero", "signed") if reference else ("zero",):
            yield 150, torch.float32, divergence, exact, reference, True, weights
        yield 70, torch.float16, divergence, exact, reference, False, "less"
    for divergence in divergences:
        yield 17, torch.float64, divergence, True, True, True, "less"
        yield 280, torch.float32, divergence, True, True, False, "simplex"
    yield 1000, torch.float32, "reverse_kl", True, True, False, "less"
    yield 1, torch.float32, "reverse_kl", True, False, False, "simplex"
    yield 1, torch.float32, "jsd", True, True, False, "simplex"


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    def named(check: Callable[..., None], *case: Any) -> tuple[str, Callable[[], None]]:
        words = [check.__name__.removeprefix("check_"), *(str(part).removeprefix("torch.") for part in case)]
        return "-".join(words), lambda: check(*case)

    yield named(check_philox)
    for case in mixes():
        yield named(check_mix, *case)
    yield named(check_needs)
    for divergence, exact in (("reverse_kl", True), ("alpha", False), ("jsd", True)):
        yield named(check_absent_model, divergence, exact)
    for divergence in ("reverse_kl", "jsd"):
        yield named(check_rows_without_distribution, divergence)
    yield named(check_empty_batch)
    for kind in FILTERS:
        yield named(check_sampling, kind, 300, torch.float32, "reverse_kl", 2)
        yield named(check_sampling, kind, 70, torch.float16, "forward_kl", 1)
    yield named(check_sampling, "mixed", 70, torch.float64, "jsd", 1)
    yield named(check_sampling, "mixed", 17, torch.float32, "reverse_kl", 1)
    yield named(check_sampling, "mixed", 1, torch.float32, "reverse_kl", 1)
    yield named(check_splits_do_not_matter)
    for dtype in (torch.float32, torch.float16):
        yield named(check_vas, 21, 37, dtype, False)
        yield named(check_vas, 16, 16, dtype, True)
        for p in (math.inf, 1.0, 3.5):
            yield named(check_norm_sim, 19, 37, 21, dtype, p)
        yield named(check_lse, 35, 35, 20, dtype, 0)
        yield named(check_lse, 18, 50, 33, dtype, 7)
    yield named(check_vas, 1, 1, torch.float32, False)
    yield named(check_lse, 1, 1, 1, torch.float32, 0)
    yield named(check_bad_rows_of_pairs)
    yield from triton_rope_attention.cases()
    yield from triton_shared_lora_mlp.cases()
    yield from triton_toeplitz_attention.cases()


def main() -> None:
    # NumPy's, where kernels compute what they mask afterwards.
    warnings.simplefilter("ignore", RuntimeWarning)
    torch.set_num_threads(1)
    wanted = set(sys.stdin.read().split())
    small_pairs = dict.fromkeys(_pairs.PAIR_TILES, (16, 16, 16, 4, 2))
    with (
        mock.patch.multiple(_tiles, tile_for=lambda x, rows: SMALL, MAX_SPLITS=SPLITS),
        mock.patch.dict(_pairs.PAIR_TILES, small_pairs),
        # The weights of a few rows at a time.
        mock.patch.object(pairwise_scores, "WORKSPACE", 600),
    ):
        for name, check in cases():
            if name not in wanted:
                continue
            try:
                check()
                problem = ""
            except Exception:
                problem = traceback.format_exc()
            print(json.dumps({"case": name, "problem": problem}), flush=True)


if __name__ == "__main__":
    main()
