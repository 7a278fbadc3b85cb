r"""Plain torch reference of exact attention with relative positions, forward and backward: dense, in blocks of rows.

s_ij = scale q_i.k_j + R[h, 0, i - j + L - 1]                                        without support: a bias
s_ij = scale sum_s q_i[a_s] R[h, s, i - j + L - 1] k_j[b_s],  (a_s, b_s) = support[s]    with one: a matrix
o_i = sum_j P_ij v_j,  P_ij = e^{s_ij + key_bias_j - lse_i}

G_ij = do_i.v_j - do_i.o_i,  ds_ij = P_ij G_ij,  dR[h, s, t] = sum_{i-j=t} ds_ij (1 or scale q_i[a_s] k_j[b_s])
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmkern.ops.rope_attention.reference import compute_dtype

ROWS = 512


def relative_scores(
    q: Tensor, k: Tensor, relative: Tensor, support: Tensor | None, scale: float, positions: Tensor | None = None
) -> Tensor:
    """(B, H, n, M) scores of n queries at ``positions``, by default 0, 1, ..; k (B, H, M, D). Differentiable."""
    places = _places(torch.arange(q.shape[2], device=q.device) if positions is None else positions, k, relative)
    if support is None:
        return scale * (q @ k.mT) + relative[:, 0, places]
    total = q.new_zeros((*q.shape[:3], k.shape[2]))
    for s, (a, b) in enumerate(support.tolist()):
        total = total + (scale * q[..., a, None]) * k[..., None, :, b] * relative[:, s, places]
    return total


def _places(positions: Tensor, k: Tensor, relative: Tensor) -> Tensor:
    return positions[:, None] - torch.arange(k.shape[2], device=k.device) + (relative.shape[2] - 1) // 2


def _blocks(
    q: Tensor,
    k: Tensor,
    relative: Tensor,
    support: Tensor | None,
    key_bias: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their scores, -inf where a key is not seen."""
    for begin in range(0, q.shape[2], ROWS):
        rows = slice(begin, min(begin + ROWS, q.shape[2]))
        positions = torch.arange(rows.start, rows.stop, device=q.device)
        s = relative_scores(q[:, :, rows], k, relative, support, scale, positions)
        if key_bias is not None:
            s = s + key_bias[:, None, None, :]
        if is_causal:
            s = s.masked_fill(torch.arange(k.shape[2], device=q.device) > positions[:, None], -torch.inf)
        yield rows, s


def _per_query_head(q: Tensor, *keys: Tensor) -> list[Tensor]:
    dtype = compute_dtype(q.dtype)
    return [x.to(dtype).repeat_interleave(q.shape[1] // max(x.shape[1], 1), 1) for x in keys]


def toeplitz_exact_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Tensor,
    support: Tensor | None,
    key_bias: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, N, Dv) and log-sum-exp (B, Hq, N) in the dtype of computation: what half types lose in the output
    would be lost in do.o again."""
    x, y, values = _per_query_head(q, q, k, v)
    out = x.new_zeros((*q.shape[:3], v.shape[3]))
    lse = x.new_full(q.shape[:3], -torch.inf)
    bias = None if key_bias is None else key_bias.to(x)
    for rows, s in _blocks(x, y, relative.to(x), support, bias, is_causal, scale):
        if not s.shape[3]:
            continue
        lse[:, :, rows] = s.logsumexp(-1)
        out[:, :, rows] = _shares(s, lse[:, :, rows]) @ values
    return out, lse


def _shares(s: Tensor, lse: Tensor) -> Tensor:
    lse = lse.unsqueeze(-1)
    return torch.where(lse == -torch.inf, 0.0, (s - lse).exp())


def toeplitz_exact_backward_reference(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Tensor,
    support: Tensor | None,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    want_relative: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and relative; the last is empty where it is not wanted."""
    x, y, values = _per_query_head(q, q, k, v)
    upstream, result, symbols = grad.to(x), out.to(x), relative.to(x)
    dq, dk, dv = (t.new_zeros(t.shape) for t in (x, y, values))
    drelative = symbols.new_zeros(symbols.shape)
    bias = None if key_bias is None else key_bias.to(x)
    for rows, s in _blocks(x, y, symbols, support, bias, is_causal, scale):
        if not s.shape[3]:
            continue
        p, g = _shares(s, lse[:, :, rows].to(x)), upstream[:, :, rows]
        ds = p * (g @ values.mT - (g * result[:, :, rows]).sum(-1, keepdim=True))
        dv += p.mT @ g
        places = _places(torch.arange(rows.start, rows.stop, device=q.device), k, symbols)
        xr = scale * x[:, :, rows]
        if support is None:
            dq[:, :, rows] = scale * (ds @ y)
            dk += ds.mT @ xr
            if want_relative:
                drelative[:, 0].index_add_(1, places.flatten(), ds.sum(0).flatten(1))
            continue
        for number, (a, b) in enumerate(support.tolist()):
            pull = ds * symbols[:, number, places]
            dq[:, :, rows, a] += scale * (pull @ y[..., b, None]).squeeze(-1)
            dk[..., b] += (pull.mT @ xr[..., a, None]).squeeze(-1)
            if want_relative:
                each = (ds * xr[..., a, None] * y[..., None, :, b]).sum(0)
                drelative[:, number].index_add_(1, places.flatten(), each.flatten(1))
    dk, dv = (t.unflatten(1, (-1, q.shape[1] // max(k.shape[1], 1))).sum(2) if q.shape[1] else t for t in (dk, dv))
    empty = relative.new_empty(0)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), drelative.to(relative.dtype) if want_relative else empty
