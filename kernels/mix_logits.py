"""Triton kernels of mix_logits.

exact reverse KL    mix_lse_kernel: partial log-sum-exps of the mixed logits -> mix_write_kernel
everything else     find_stats: log-sum-exps and, where exact, the root -> mix_write_kernel
gradients           mix_bwd_sums_kernel: the two sums of H -> mix_bwd_mass_kernel: sums of each model
                    -> mix_bwd_write_kernel; a gradient that needs no sum skips its kernel
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkern.kernels import _tiles
from llmkern.kernels._mix import load_lses, load_tail, mix_tile, open_row, read_tile
from llmkern.kernels._mix_gradients import mix_bwd_mass_kernel, mix_bwd_sums_kernel, mix_bwd_write_kernel
from llmkern.kernels._mix_stats import AotMix, Mix, find_stats
from llmkern.kernels._tiles import INF, add_lanes, join_lanes, log_sum_exp_of_partials, lowest


@triton.jit
def mix_lse_kernel(
    partials,
    rows,
    strides,
    weights,
    V,
    chunk,
    M: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maximum and sum of exponentials of the mixed logits over one chunk of one row: partials (B, 2, splits)."""
    COMPUTE: tl.constexpr = weights.dtype.element_ty
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    opened = open_row(rows, strides, weights, None, None, row, V, M, HAS_REFERENCE, "reverse_kl", False)
    top = tl.zeros((BLOCK,), COMPUTE) + lowest(COMPUTE)
    total = tl.zeros((BLOCK,), COMPUTE)
    for start in range(split * chunk, tl.minimum(V, (split + 1) * chunk), BLOCK):
        ids = start + tl.arange(0, BLOCK)
        a, r = read_tile(opened, ids, M, HAS_REFERENCE)
        z = mix_tile(opened, a, r, None, M, "reverse_kl", 1.0, True)
        top, total = add_lanes(top, total, tl.where(ids < V, z, -INF))
    highest, mass = join_lanes(top, total)
    at = partials + row * 2 * tl.num_programs(1) + split
    tl.store(at, highest)
    tl.store(at + tl.num_programs(1), mass)


@triton.jit
def mix_write_kernel(
    out,
    stats,
    partials,
    rows,
    strides,
    weights,
    carry,
    V,
    splits,
    chunk,
    M: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    ALPHA: tl.constexpr,
    EXACT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The result over one chunk of one row; partials, if any, are those of mix_lse_kernel."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if partials is not None:
        _, row_lse = log_sum_exp_of_partials(partials, row, 0, splits, 2, SPLITS)
        if split == 0:
            tl.store(stats + row * (M + 4) + M + 1, row_lse)
        opened = open_row(rows, strides, weights, None, None, row, V, M, HAS_REFERENCE, DIVERGENCE, False)
        tail = (row_lse, row_lse, row_lse)
    else:
        lses = load_lses(stats, row, M, HAS_REFERENCE)
        row_lse = 0.0
        opened = open_row(rows, strides, weights, carry, lses, row, V, M, HAS_REFERENCE, DIVERGENCE, False)
        tail = load_tail(stats, row, M)
    for start in range(split * chunk, tl.minimum(V, (split + 1) * chunk), BLOCK):
        ids = start + tl.arange(0, BLOCK)
        a, r = read_tile(opened, ids, M, HAS_REFERENCE)
        y = mix_tile(opened, a, r, tail, M, DIVERGENCE, ALPHA, EXACT) - row_lse
        tl.store(out + row * V + ids, y, ids < V)


# Launchers ------------------------------------------------------------------------------------------------------------


def mix_logits_fwd(
    logits: Sequence[Tensor],
    weights: Tensor,
    reference: Tensor | None,
    carry: Tensor | None,
    divergence: str,
    alpha: float,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probs (B, V), statistics (B, M + 4), as ``mix_logits_reference``; a row without distribution is NaN."""
    first = logits[0]
    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    stats = weights.new_zeros(first.shape[0], len(logits) + 4)
    if first.shape[0] == 0:
        return out, stats
    with _tiles.device_guard(first):
        mix = Mix(logits, weights, reference, carry, divergence, alpha, exact)
        partials = None
        if mix.is_linear:
            partials = mix.empty(mix.n_rows, 2, mix.splits)
            mix_lse_kernel[mix.grid](partials, **mix.shared(), **mix.streaming())
        else:
            find_stats(mix, stats)
        mix_write_kernel[mix.grid](
            out,
            stats,
            partials,
            carry=mix.carry,
            splits=mix.splits,
            EXACT=exact,
            SPLITS=mix.padded_splits,
            **mix.shared(),
            **mix.rule(),
            **mix.streaming(),
        )
    return out, stats


def mix_logits_bwd(
    dy: Tensor,
    stats: Tensor,
    logits: Sequence[Tensor],
    weights: Tensor,
    reference: Tensor | None,
    carry: Tensor | None,
    divergence: str,
    alpha: float,
    exact: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (logits 1..M, weights, reference, carry), as ``mix_logits_backward_reference``."""
    models = len(logits)
    inputs = [*logits, weights, reference, carry]
    grads = [
        torch.zeros(x.shape, dtype=x.dtype, device=x.device) if need and x is not None else dy.new_empty(0)
        for x, need in zip(inputs, needs)
    ]
    if stats.shape[0] == 0 or not any(needs):
        return grads
    needs_weights, needs_reference, needs_carry = needs[models:]
    with _tiles.device_guard(dy):
        mix = Mix(logits, weights, reference, carry, divergence, alpha, exact)
        dy = _tiles.unit_stride(dy)
        if needs_weights and not mix.is_linear:
            # The forward pass does not read models of weight zero, but their weights have gradients too.
            stats = stats.clone()
            find_stats(mix, stats, absent=True)
        common = {
            "dy": dy,
            "dy_stride": dy.stride(0),
            "stats": stats,
            "carry": mix.carry,
            "READ_ALL": needs_weights,
            **mix.shared(),
            **mix.rule(),
            **mix.streaming(),
        }
        combined = {"splits": mix.splits, "SPLITS": mix.padded_splits, "EXACT": exact}
        sums = masses = None
        if exact:
            sums = mix.empty(mix.n_rows, 2, mix.splits)
            mix_bwd_sums_kernel[mix.grid](sums, **common)
        if needs_weights or not mix.is_linear:
            masses = mix.empty(mix.n_rows, 2 * models + 1, mix.splits)
            mix_bwd_mass_kernel[mix.grid](masses, sums, **common, **combined)
            if needs_weights:
                grads[models] = masses[:, models : 2 * models].sum(-1)
            if needs_carry and not mix.is_linear:
                grads[-1] = mix.weights * masses[:, :models].sum(-1)
        wanted = sum(1 << i for i in range(models) if needs[i]) | (1 << models if needs_reference else 0)
        if wanted:
            outs = [*grads[:models], *([grads[models + 1]] if mix.has_reference else [])]
            # What is not wanted is not written: any pointer will do.
            outs = tuple(out if wanted >> i & 1 else row for i, (out, row) in enumerate(zip(outs, mix.rows)))
            mix_bwd_write_kernel[mix.grid](
                outs, sums, None if mix.is_linear else masses, **common, **combined, WANTED=wanted
            )
    return grads


AOT = [
    AotMix("bf16", 2, reference=False).sharing(mix_lse_kernel),
    AotMix("fp64", 3).sharing(mix_lse_kernel),
    AotMix("fp32", 6, long=False).sharing(mix_lse_kernel),
    AotMix("bf16", 2, reference=False, carry=False).sharing(mix_write_kernel),
    AotMix("fp16", 3, "alpha", exact=False).sharing(mix_write_kernel, partials=None),
    AotMix("fp64", 3, "jsd").sharing(mix_write_kernel, partials=None),
    AotMix("fp32", 6, "alpha").sharing(mix_write_kernel, partials=None),
]
