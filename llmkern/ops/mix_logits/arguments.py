"""What mix_logits and sample_mixed accept, checked once for both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from llmkern._library import bad_type, bad_value, has_values

DIVERGENCES = ("reverse_kl", "forward_kl", "alpha", "jsd")
NORMALIZERS = ("exact", "zero")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class MixArguments(NamedTuple):
    """Arguments as the ops take them: models cut to the shared vocabulary, weights (B, M) in fp32 or float64."""

    logits: tuple[Tensor, ...]
    weights: Tensor
    reference: Tensor | None
    carry: Tensor | None
    divergence: str
    alpha: float
    exact: bool


def check_mix_arguments(
    op: str,
    logits: Sequence[Tensor] | Tensor,
    weights: Tensor | Sequence[float],
    reference: Tensor | None,
    divergence: str,
    alpha: float | None,
    normalizer: str,
    carry: Tensor | None,
) -> MixArguments:
    if isinstance(logits, Tensor):
        if logits.dim() != 3:
            raise bad_value(op, "logits as M tensors (B, V) or one (M, B, V)", f"one of shape {tuple(logits.shape)}")
        logits = logits.unbind(0)
    if len(logits) == 0:
        raise bad_value(op, "logits of at least one model", "none", "pass a list of (B, V) tensors")
    first = logits[0]
    models = len(logits)
    # One comparison a model in the common case: at a batch of one these lines cost as much as the kernel.
    rows = first.shape[0] if first.dim() == 2 else -1
    dtype, device = first.dtype, first.device
    sizes = []
    for index, row in enumerate(logits):
        if row.dim() != 2 or row.shape[0] != rows or row.dtype != dtype or row.device != device:
            _refuse_row(op, f"logits[{index}]", row, first)
        sizes.append(row.shape[1])
    if reference is not None:
        if reference.dim() != 2 or reference.shape[0] != rows or reference.dtype != dtype or reference.device != device:
            _refuse_row(op, "reference", reference, first)
        sizes.append(reference.shape[1])
    if dtype not in DTYPES:
        _refuse_row(op, "logits[0]", first, first)
    vocabulary = min(sizes)
    if vocabulary == 0:
        raise bad_value(op, "a vocabulary of at least one token", 0)
    if max(sizes) != vocabulary:
        logits = [row[:, :vocabulary] for row in logits]
        reference = None if reference is None else reference[:, :vocabulary]

    if divergence not in DIVERGENCES:
        raise bad_value(op, f"divergence to be one of {', '.join(DIVERGENCES)}", repr(divergence))
    if normalizer not in NORMALIZERS:
        raise bad_value(op, "normalizer to be 'exact' or 'zero'", repr(normalizer))
    if divergence == "alpha":
        if alpha is None or not 0 < alpha <= 1:
            raise bad_value(op, "alpha in (0, 1] with divergence='alpha'", alpha, "forward KL is alpha = 1")
    elif alpha is not None:
        raise bad_value(op, "alpha only with divergence='alpha'", f"alpha={alpha} with {divergence!r}", "drop it")
    if reference is None and (divergence == "jsd" or (divergence != "reverse_kl" and normalizer == "exact")):
        raise bad_value(
            op, f"reference with divergence={divergence!r}, normalizer={normalizer!r}", "none", "pass its logits (B, V)"
        )

    shape = (rows, models)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return MixArguments(
        tuple(logits),
        _per_model(op, "weights", weights, shape, device, accumulate),
        reference,
        None if carry is None else _carry(op, carry, shape, device, accumulate, divergence, alpha, normalizer),
        divergence,
        1.0 if alpha is None else float(alpha),
        normalizer == "exact",
    )


def _refuse_row(op: str, name: str, row: Tensor, first: Tensor) -> NoReturn:
    if row.dim() != 2 or first.dim() != 2 or row.shape[0] != first.shape[0]:
        rows = first.shape[0] if first.dim() else "B"
        raise bad_value(op, f"{name} of shape ({rows}, V)", tuple(row.shape), "flatten leading dimensions into rows")
    if row.dtype != first.dtype or row.dtype not in DTYPES:
        raise bad_type(op, f"{name} of one dtype among float32, float16, bfloat16, float64", row.dtype, "cast it")
    raise bad_value(op, f"{name} on the device of logits[0], {first.device}", row.device, "move it there")


def _per_model(
    op: str,
    name: str,
    value: Tensor | Sequence[float],
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=dtype, device=device)
    if value.shape != shape and value.shape != shape[1:]:
        expected = f"{name} of shape ({shape[1]},) or {shape}, one per model"
        raise bad_value(op, expected, tuple(value.shape))
    if not value.is_floating_point():
        raise bad_type(op, f"{name} of a floating dtype", value.dtype, "cast it")
    if value.device != device:
        raise bad_value(op, f"{name} on the device of the logits, {device}", value.device, "move it there")
    _refuse_nonfinite(op, name, value)
    return (value if value.dtype == dtype else value.to(dtype)).expand(shape)


def _carry(
    op: str,
    carry: Tensor,
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    divergence: str,
    alpha: float | None,
    normalizer: str,
) -> Tensor:
    carry = _per_model(op, "carry", carry, shape, device, dtype)
    # The search for Z sees carry through exp(alpha * carry); beyond this the numbers leave the range of the dtype.
    limit = 600.0 if dtype == torch.float64 else 60.0
    scale = alpha if alpha is not None else 1.0
    searched = divergence != "reverse_kl" and normalizer == "exact"
    if searched and carry.device.type == "cpu" and carry.numel() and has_values(carry):
        top = scale * float(carry.detach().abs().max())
        if top > limit:
            fix = "pass log pi_i(prefix) - log ref(prefix), or normalizer='zero', which has no limit"
            raise bad_value(op, f"|alpha * carry| of at most {limit:g} with normalizer='exact'", f"{top:.4g}", fix)
    return carry


def _refuse_nonfinite(op: str, name: str, value: Tensor) -> None:
    """A look at the values is free of a wait only on the CPU; on a GPU the assertion is queued with the kernels."""
    if not has_values(value):
        return
    if value.device.type != "cpu":
        torch._assert_async(torch.isfinite(value).all())
        return
    # One weight a model is read faster from a list than by an op of torch.
    total = sum(value.tolist()) if value.dim() == 1 else value.detach().sum()
    if not math.isfinite(total) and not bool(torch.isfinite(value).all()):
        raise bad_value(op, f"finite {name}", "NaN or infinity", "a model to leave out has weight 0")
