"""Cases of toeplitz_attention for Triton's interpreter (triton_interpreter_worker.py): launchers against references."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from oracle import assert_close, farther, map_tensors, nudge
from torch import Tensor

from llmkern.kernels import toeplitz_attention as kernels
from llmkern.ops.toeplitz_attention import reference

BOTH = (reference.toeplitz_exact_reference, reference.toeplitz_exact_backward_reference)
OURS = (kernels.toeplitz_exact_fwd, kernels.toeplitz_exact_bwd)
NAMES = ("dq", "dk", "dv", "drelative")


def everything(forward: Callable[..., Any], backward: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Tensor]:
    out, lse = forward(*args)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out)
    grads = backward(grad, *args[:6], out, lse, *args[6:], True)
    return {"out": out, "lse": lse, **dict(zip(NAMES, grads))}


def check_toeplitz(rows: int, keys: int, dtype: torch.dtype, is_causal: bool, masked: bool) -> None:
    generator = torch.Generator().manual_seed(rows + keys)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    length = max(rows, keys) + 2
    tensors = (normal(2, 4, rows, 5), normal(2, 2, keys, 5), normal(2, 2, keys, 3), normal(4, 1, 2 * length - 1))
    bias = None
    if masked:
        bias = torch.zeros(2, keys)
        bias[0, ::3] = -torch.inf
        bias[1] = -torch.inf
    args = (*(t.to(dtype) for t in tensors), None, bias, is_causal, 0.4)
    wide = (*(t.double() for t in args[:4]), None, None if bias is None else bias.double(), *args[6:])
    truth, base = everything(*BOTH, wide), everything(*BOTH, args)
    moved = everything(*BOTH, (*map_tensors(args[:4], nudge), *args[4:]))
    before = map_tensors(args[:4], torch.Tensor.clone)
    # Tiles of 16, so that there are several.
    with mock.patch.object(kernels, "block_for", return_value=16):
        ours = everything(*OURS, args)
    for now, then in zip(args[:4], before):
        assert torch.equal(now, then), "an input was written to"
    for name, wanted in truth.items():
        found = ours[name]
        assert found.shape == wanted.shape, name
        assert found.dtype == base[name].dtype, name
        worse = base[name] if dtype == torch.float16 else farther(wanted, base[name], moved[name])
        assert_close(name, found, wanted, worse, torch.float32 if name == "lse" else dtype, 2.0)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for case in (
        (37, 37, torch.float32, True, False),
        (20, 50, torch.float32, False, True),
        (50, 20, torch.float16, False, False),
        (1, 1, torch.float32, True, True),
    ):
        words = "-".join(str(part).removeprefix("torch.") for part in case)
        yield f"toeplitz-{words}", lambda case=case: check_toeplitz(*case)
