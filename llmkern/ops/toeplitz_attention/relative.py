"""What scores depend on beside q and k: functions of the distance t = i - j of query i and key j."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llmkern._library import bad_type, bad_value, has_values
from llmkern.ops.rope_attention.rotary import Rotary


def distances(length: int, device: torch.device | str | None = None) -> Tensor:
    """i - j of every entry of a table for ``length`` tokens: -(length - 1) .. length - 1."""
    return torch.arange(1 - length, length, device=device)


def _length(name: str, table: Tensor) -> int:
    if table.shape[-1] % 2 == 0:
        raise bad_value(
            name,
            "an odd number of distances, 2 L - 1 for L tokens",
            table.shape[-1],
            "entry t + L - 1 is for i - j = t",
        )
    return (table.shape[-1] + 1) // 2


class RelativeBias:
    r"""A bias of each distance: s_ij = scale q_i.k_j + table[h, i - j + L - 1].

    Args:
        table: (Hq, 2 L - 1), float; serves sequences of up to L tokens. Gradients flow to it.

    T5's buckets, ALiBi's slopes and any function of the distance have constructors.
    """

    def __init__(self, table: Tensor) -> None:
        if not isinstance(table, Tensor) or not table.is_floating_point():
            raise bad_type("RelativeBias", "table as a floating tensor", getattr(table, "dtype", type(table).__name__))
        if table.dim() != 2:
            raise bad_value("RelativeBias", "table of shape (heads, 2 L - 1)", tuple(table.shape))
        self.table, self.length = table, _length("RelativeBias", table)

    @property
    def heads(self) -> int:
        return self.table.shape[0]

    @classmethod
    def from_t5(
        cls, weight: Tensor, length: int, *, bidirectional: bool = True, max_distance: int = 128
    ) -> RelativeBias:
        """T5's buckets (Raffel et al. 2020): ``weight`` (buckets, heads), as in its embedding; differentiable.

        Half of the buckets of a direction are for one distance each, the others widen up to ``max_distance``.
        ``bidirectional=False``, as in decoders, puts all later keys into bucket 0.
        """
        if weight.dim() != 2:
            raise bad_value("RelativeBias.from_t5", "weight of shape (buckets, heads)", tuple(weight.shape))
        buckets = t5_buckets(distances(length, weight.device), weight.shape[0], bidirectional, max_distance)
        return cls(weight[buckets].t())

    @classmethod
    def from_alibi(
        cls,
        heads: int,
        length: int,
        *,
        slopes: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> RelativeBias:
        """-slope |i - j| (Press et al. 2022); ``slopes`` (heads,), which may be learned, by default the paper's."""
        slopes = alibi_slopes(heads).to(device, dtype) if slopes is None else slopes
        if slopes.shape != (heads,):
            raise bad_value("RelativeBias.from_alibi", f"slopes of shape ({heads},)", tuple(slopes.shape))
        return cls(-slopes[:, None] * distances(length, slopes.device).abs().to(slopes.dtype))

    @classmethod
    def from_function(
        cls, function: Callable[[Tensor], Tensor], length: int, *, device: torch.device | str | None = None
    ) -> RelativeBias:
        """``function`` maps the distances (2 L - 1,), int64, to biases (heads, 2 L - 1)."""
        return cls(function(distances(length, device)))


class RelativeMatrix:
    r"""The papers' general form: s_ij = scale q_i^T W_{i-j} k_j, W_t zero but on a support of S places for all t.

        s_ij = scale sum_s q_i[support[s, 0]] matrix[h, s, i - j + L - 1] k_j[support[s, 1]]

    Args:
        matrix: (Hq, S, 2 L - 1), float: the entries of W by place and distance. Gradients flow to it.
        support: (S, 2) integers, a row of W for the entry of q and a column for that of k. No place twice.
    """

    def __init__(self, matrix: Tensor, support: Tensor) -> None:
        if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
            got = getattr(matrix, "dtype", type(matrix).__name__)
            raise bad_type("RelativeMatrix", "matrix as a floating tensor", got)
        if matrix.dim() != 3 or matrix.shape[1] == 0:
            raise bad_value("RelativeMatrix", "matrix of shape (heads, places, 2 L - 1)", tuple(matrix.shape))
        if not isinstance(support, Tensor) or support.is_floating_point() or support.dtype == torch.bool:
            raise bad_type(
                "RelativeMatrix", "support as a tensor of integers", getattr(support, "dtype", type(support))
            )
        if support.shape != (matrix.shape[1], 2):
            raise bad_value("RelativeMatrix", f"support of shape ({matrix.shape[1]}, 2)", tuple(support.shape))
        self.length = _length("RelativeMatrix", matrix)
        self.matrix, self.support = matrix, support.long()
        # Under the compiler nobody looks; kernels then refuse what is out of range.
        self.least = self.largest = 0
        if has_values(support):
            places = support.tolist()
            if len({tuple(place) for place in places}) < len(places):
                raise bad_value("RelativeMatrix", "every place of the support once", "some twice", "add their entries")
            self.least, self.largest = int(support.min()), int(support.max())

    @property
    def heads(self) -> int:
        return self.matrix.shape[0]

    @classmethod
    def from_rotary(
        cls,
        rotary: Rotary,
        heads: int,
        length: int,
        *,
        head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> RelativeMatrix:
        """Rotary positions in this form, as a test of it: they factorise, so ``rope_attention`` computes them faster.

        ``head_dim`` beyond that of ``rotary``: the entries that it leaves alone.
        """
        half, dim = rotary.head_dim // 2, rotary.head_dim if head_dim is None else head_dim
        t = distances(length, device).double()
        angles = rotary.frequencies(length, t.device).to(t.device)[:, None] * t
        cos, sin = (f(angles) * rotary.attention_factor**2 for f in (torch.cos, torch.sin))
        first = torch.arange(half)
        rest = torch.arange(2 * half, dim)
        rows = torch.cat([first, first + half, first, first + half, rest])
        columns = torch.cat([first, first + half, first + half, first, rest])
        entries = torch.cat([cos, cos, sin, -sin, torch.ones(len(rest), len(t), dtype=t.dtype, device=t.device)])
        return cls(
            entries.to(dtype).expand(heads, *entries.shape).contiguous(), torch.stack([rows, columns], 1).to(device)
        )


Relative = RelativeBias | RelativeMatrix


def t5_buckets(t: Tensor, buckets: int, bidirectional: bool = True, max_distance: int = 128) -> Tensor:
    """Bucket of each distance t = i - j. The logarithm is taken in float32, as models were trained with it."""
    behind = t.clamp(min=0)
    offset = torch.zeros_like(t)
    if bidirectional:
        buckets //= 2
        offset, behind = (t < 0).long() * buckets, t.abs()
    single = buckets // 2
    octaves = torch.log(behind.clamp(min=1).float() / single) / math.log(max_distance / single)
    wide = (single + (octaves * (buckets - single)).long()).clamp(max=buckets - 1)
    return offset + torch.where(behind < single, behind, wide)


def alibi_slopes(heads: int) -> Tensor:
    """2^(-8 k / n), k = 1 .. n, for a power of two n; other numbers take every other one of 2 n beside them."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * k / power) for k in range(1, power + 1)]
    between = [2 ** (-4 * k / power) for k in range(1, 2 * power, 2)]
    return torch.tensor([*slopes, *between[: heads - power]])
