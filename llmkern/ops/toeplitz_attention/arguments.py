"""What toeplitz_attention accepts, in one form; refusal of the rest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmkern._library import bad_type, bad_value, has_values
from llmkern.ops.rope_attention.arguments import check_tensors
from llmkern.ops.rope_attention.reference import compute_dtype
from llmkern.ops.toeplitz_attention.relative import Relative, RelativeBias, RelativeMatrix

METHODS = ("auto", "exact", "blocks", "fft")


class Arguments(NamedTuple):
    """``relative`` (Hq, S, 2 L - 1), with ``support`` (S, 2) unless it is a bias; ``key_bias`` (B, M): 0 or -inf.
    ``is_free``: its entries are themselves what is learned."""

    q: Tensor
    k: Tensor
    v: Tensor
    relative: Tensor
    support: Tensor | None
    key_bias: Tensor | None
    is_causal: bool
    scale: float
    is_free: bool = False


def check_arguments(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Relative,
    is_causal: bool,
    scale: float | None,
    rtol: float,
    method: str,
    key_mask: Tensor | None,
) -> Arguments:
    check_tensors(op, q, k, v, enable_gqa=True)
    if not rtol > 0:
        raise bad_value(op, "rtol above 0", rtol, "1e-2 is the default, method='exact' has no error")
    if method not in METHODS:
        raise bad_value(op, f"method as one of {', '.join(METHODS)}", repr(method))
    symbols, support = _check_relative(op, q, k, relative)
    bias = None
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise bad_type(op, "key_mask of dtype bool, True where a key takes part", key_mask.dtype)
        if key_mask.shape != (k.shape[0], k.shape[2]):
            raise bad_value(op, f"key_mask of shape {(k.shape[0], k.shape[2])}, (B, M)", tuple(key_mask.shape))
        bias = torch.zeros(key_mask.shape, dtype=compute_dtype(q.dtype), device=q.device)
        bias = bias.masked_fill(~key_mask, -torch.inf)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    entries = relative.table if isinstance(relative, RelativeBias) else relative.matrix
    is_free = entries.is_leaf and entries.requires_grad and torch.is_grad_enabled()
    return Arguments(q, k, v, symbols, support, bias, is_causal, scale, is_free)


def _check_relative(op: str, q: Tensor, k: Tensor, relative: Relative) -> tuple[Tensor, Tensor | None]:
    if isinstance(relative, RelativeBias):
        name, symbols, support = "table", relative.table.unsqueeze(1), None
    elif isinstance(relative, RelativeMatrix):
        name, symbols, support = "matrix", relative.matrix, relative.support
        if relative.least < 0 or relative.largest >= q.shape[3]:
            raise bad_value(
                op,
                f"places of the support in 0 .. {q.shape[3] - 1} (D = {q.shape[3]})",
                f"{relative.least} .. {relative.largest}",
            )
    else:
        raise bad_type(op, "relative as a RelativeBias or a RelativeMatrix", type(relative).__name__)
    if relative.heads != q.shape[1]:
        raise bad_value(op, f"a {name} of {q.shape[1]} heads, as many as q has", relative.heads)
    longest = max(q.shape[2], k.shape[2])
    if relative.length < longest:
        raise bad_value(
            op,
            f"a {name} of at least {2 * longest - 1} distances, for {longest} tokens",
            2 * relative.length - 1,
            f"make it for length {longest}",
        )
    if symbols.device != q.device:
        raise bad_type(op, f"a {name} on the device of q, {q.device}", symbols.device)
    if has_values(symbols) and not bool(torch.isfinite(symbols).all()):
        raise bad_value(op, f"a finite {name}", "NaN or infinity", "mask keys with key_mask or is_causal")
    return symbols, support
