"""How right is right enough: no tolerance is typed by hand.

truth = the reference in float64, base = the reference in the tested dtype; ours passes where

    max|ours - truth|  <=  factor max|base - truth| + 4 eps(dtype) max|truth|

with factor 2, or what a case asks for and explains. One evaluation may be right by luck, so base is the worse of two:
of the inputs as they are, and of inputs moved to a neighbour. In float64 the first would be the truth itself; there the
second moves the inputs by 256 units in the last place (5.7e-14), since rounding that all tokens share, as in a sum over
the vocabulary, does more than rounding of each on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FACTOR = 2.0


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, change) for item in value)
    return value


def nudge(x: Tensor) -> Tensor:
    """Every finite entry moved up or down by turns: one unit in the last place, in float64 256."""
    units = 256 if x.dtype == torch.float64 else 1
    signs = 1 - 2.0 * (torch.arange(x.numel(), device=x.device).reshape(x.shape) % 2)
    return torch.where(torch.isfinite(x), x * (1 + units * torch.finfo(x.dtype).eps * signs.to(x.dtype)), x)


def value_and_gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor | None], names: Sequence[str]):
    """{"forward": ..., name: gradient} under one fixed upstream gradient; entries of -inf take no part in it."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    live = torch.isfinite(out)
    present = [(name, leaf) for name, leaf in zip(names, leaves) if leaf is not None]
    grads = torch.autograd.grad(out[live], [leaf for _, leaf in present], upstream[live], allow_unused=True)
    results = {"forward": out.detach()}
    for (name, leaf), grad in zip(present, grads):
        results[name] = torch.zeros_like(leaf) if grad is None else grad
    return results


def assert_no_worse_than_torch(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    names: Sequence[str],
    factor: float = FACTOR,
) -> None:
    dtype = next(t.dtype for t in tensors if t is not None)
    truth = value_and_gradients(reference, [None if t is None else t.double() for t in tensors], names)
    base = value_and_gradients(reference, tensors, names)
    if dtype in (torch.float32, torch.float64):
        moved = value_and_gradients(reference, [None if t is None else nudge(t) for t in tensors], names)
        base = {name: farther(truth[name], base[name], moved[name]) for name in base}
    ours = value_and_gradients(function, tensors, names)
    for name, expected in truth.items():
        assert_close(name, ours[name], expected, base[name], dtype, factor)


def farther(truth: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where((x - truth).abs() >= (y - truth).abs(), x, y)


def assert_close(name: str, ours: Tensor, truth: Tensor, base: Tensor, dtype: torch.dtype, factor: float) -> None:
    assert torch.equal(torch.isfinite(ours), torch.isfinite(truth)), f"{name}: other entries are infinite"
    live = torch.isfinite(truth)
    ours, base, truth = ours.double()[live], base.double()[live], truth[live]
    if truth.numel() == 0:
        return
    error = (ours - truth).abs()
    # A gradient that is zero by mathematics leaves rounding of the upstream gradient, which is of size one.
    scale = max(float(truth.abs().max()), 1.0 if float(truth.abs().max()) < 1e-6 else 0.0)
    limit = factor * float((base - truth).abs().max()) + 4 * torch.finfo(dtype).eps * scale
    worst = int(error.argmax())
    assert float(error[worst]) <= limit, (
        f"{name}: error {float(error[worst]):.3g} above the limit {limit:.3g} at flat index {worst}: "
        f"ours {float(ours[worst]):.9g}, base {float(base[worst]):.9g}, truth {float(truth[worst]):.9g}"
    )
