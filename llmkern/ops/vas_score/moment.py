r"""Second moments in exact integer arithmetic.

Entries are read as integers a = round(x / 2^e), |a| <= 1.25 * 2^24, and the sums of a_i a_j are integers. A float64
holds every integer up to 2^53, and sum |a_ri a_rj| <= sum_r max_i a_ri^2; so as long as that bound stays within 2^53
any matrix product in float64, in any order and by any library, gives the very integers. They go to 96-bit totals before
the bound is reached. Hence nothing depends on the order of rows and blocks, on threads, processes or devices, and
subtracting rows leaves what the others alone would have given, bit for bit.

What is rounded is the input, to multiples of 2^e with e = log2(bound) - 24. Every float16 number is a multiple of
2^-24, so up to bound = 1, which unit vectors obey, float16 is exact; float32 loses what lies below 2^-25 bound.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmkern._library import bad_type, bad_value, define_op
from llmkern.ops.embeddings import Embeddings, check_embeddings, row_blocks

# Binary places below the bound, and how far above it entries may lie.
PLACES = 24
HEADROOM = 1.25
EXACT = 2.0**53
LIMB = 2**32


def second_moment_sum_reference(x: Tensor, exponent: int) -> Tensor:
    """Sum of a a^T over the rows of x, a = round(x / 2^exponent), as (2, d, d): value = [1] 2^32 + [0]."""
    d = x.shape[1]
    limbs = torch.zeros(2, d, d, dtype=torch.int64, device=x.device)
    limit = HEADROOM * 2.0**PLACES
    for block in row_blocks(x.shape[0], d):
        a = torch.round(x[block].double() * 2.0**-exponent)
        tops = a.abs().amax(1)
        if not bool((tops <= limit).all()):
            refuse_row(block.start + int((~(tops <= limit)).nonzero()[0]))
        # So many rows at once that the largest square for each stays exact.
        step = max(1, int(EXACT / max(1.0, float(tops.max()) ** 2)))
        for start in range(0, len(a), step):
            part = a[start : start + step]
            total = (part.t() @ part).to(torch.int64)
            limbs[0] += total & (LIMB - 1)
            limbs[1] += total >> 32
    return carried(limbs)


def carried(limbs: Tensor) -> Tensor:
    """The same value with the lower limb in [0, 2^32)."""
    return torch.stack([limbs[0] & (LIMB - 1), limbs[1] + (limbs[0] >> 32)])


def refuse_row(row: int) -> None:
    raise bad_value(
        "second_moment",
        "finite rows with entries of at most 1.25 times the bound of the accumulator",
        f"others in row {row}",
        "drop or normalise that row, or pass a larger bound",
    )


define_op(
    "second_moment_sum",
    "(Tensor x, int exponent) -> Tensor",
    stem="vas_score",
    reference=second_moment_sum_reference,
    fake=lambda x, exponent: x.new_empty((2, x.shape[1], x.shape[1]), dtype=torch.int64),
)


class SecondMoment:
    r"""A sum of x x^T that takes rows, gives rows back and joins others, all exactly.

    Blocks may come in any order and from any number of processes (``merge``): the bits are the same. ``subtract``
    undoes ``add``: what is left equals the moment of the remaining rows bit for bit (the downdate of VAS-D).

    Args:
        dim: d, the length of the rows.
        bound: a power of two, the size that entries reach: 1 for unit vectors. Rows are read to bound * 2^-24, exact
            for float16 up to bound = 1. Entries above 1.25 bound are refused.
    """

    def __init__(self, dim: int, *, bound: float = 1.0, device: torch.device | str = "cpu") -> None:
        if dim < 1:
            raise bad_value("SecondMoment", "dim of at least 1", dim)
        if not bound > 0 or not math.isfinite(bound) or math.frexp(bound)[0] != 0.5:
            raise bad_value("SecondMoment", "bound as a power of two", bound, "unit vectors have bound 1")
        self.exponent = math.frexp(bound)[1] - 1 - PLACES
        self.count = 0
        self.limbs = torch.zeros(2, dim, dim, dtype=torch.int64, device=device)

    @property
    def dim(self) -> int:
        return self.limbs.shape[-1]

    def add(self, x: Embeddings) -> SecondMoment:
        """Take the rows of x (N, d)."""
        return self._change(x, 1)

    def subtract(self, x: Embeddings) -> SecondMoment:
        """Give back the rows of x, which were added before."""
        return self._change(x, -1)

    def merge(self, other: SecondMoment) -> SecondMoment:
        """Take all that another accumulator of the same dim and bound holds."""
        if (other.dim, other.exponent) != (self.dim, self.exponent):
            raise bad_value(
                "SecondMoment.merge",
                f"dim {self.dim} and bound {2.0 ** (self.exponent + PLACES):g}",
                f"dim {other.dim} and bound {2.0 ** (other.exponent + PLACES):g}",
            )
        self.limbs = carried(self.limbs + other.limbs.to(self.limbs.device))
        self.count += other.count
        return self

    def mean(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(1/N) sum x x^T, (d, d)."""
        if self.count < 1:
            raise bad_value("SecondMoment.mean", "at least one row", self.count, "add some first")
        return (self.sum(torch.float64) / self.count).to(dtype)

    def sum(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """sum x x^T, (d, d)."""
        # Two exact conversions and one rounding: the upper limb has fewer than 53 bits.
        total = self.limbs[1].double() * float(LIMB) + self.limbs[0].double()
        return (total * 2.0 ** (2 * self.exponent)).to(dtype)

    def copy(self) -> SecondMoment:
        twin = SecondMoment(self.dim, bound=2.0 ** (self.exponent + PLACES), device=self.limbs.device)
        twin.limbs, twin.count = self.limbs.clone(), self.count
        return twin

    def state_dict(self) -> dict[str, Tensor | int]:
        """What a file has to hold; ``load_state_dict`` takes it back."""
        return {"limbs": self.limbs, "count": self.count, "exponent": self.exponent}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        limbs = state["limbs"]
        if not isinstance(limbs, Tensor) or limbs.shape != self.limbs.shape or limbs.dtype != torch.int64:
            raise bad_value("SecondMoment.load_state_dict", f"limbs of shape {tuple(self.limbs.shape)}", limbs)
        self.limbs = limbs.to(self.limbs.device).clone()
        self.count, self.exponent = int(state["count"]), int(state["exponent"])

    def _change(self, x: Embeddings, sign: int) -> SecondMoment:
        x = _check_rows(x, self.limbs)
        if len(x):
            self.limbs = carried(self.limbs + sign * torch.ops.llmkern.second_moment_sum(x.detach(), self.exponent))
        self.count += sign * len(x)
        return self


def second_moment(x: Embeddings) -> Tensor:
    r"""Uncentred second moment of embeddings, the target of the variance alignment score (arXiv 2402.02055):

    .. math::  S = \frac{1}{N} \sum_i x_i x_i^T

    Args:
        x: (N, d) in float32, float16 or bfloat16, a tensor or an array (np.memmap included).

    Returns:
        (d, d) float32, exactly symmetric. The sum is exact for entries read as multiples of 2^-24 m, m the power of two
        that bounds |x|: what float16 unit vectors hold, and float32 to within 2^-25 m. The bits depend neither on the
        order of the rows nor on the number of threads nor on the device.

    Raises:
        ValueError: no rows, or NaN and infinity, named by row.

    Not differentiable. N d^2 flops in float64, half of a product's. For streams, downdates and several processes see
    ``SecondMoment``.
    """
    x = _check_rows(x, None).detach()
    if len(x) == 0:
        raise bad_value("second_moment", "at least one row", tuple(x.shape))
    return SecondMoment(x.shape[1], bound=power_of_two_bound(x), device=x.device).add(x).mean()


def power_of_two_bound(x: Tensor) -> float:
    """The least power of two that is at least max |x|, within the range that totals can hold."""
    top = max(float(torch.linalg.vector_norm(x[block].flatten(), math.inf)) for block in row_blocks(*x.shape))
    if not math.isfinite(top):
        return 1.0
    mantissa, exponent = math.frexp(top)
    return 2.0 ** min(max(exponent - (mantissa == 0.5), -400), 400) if top > 0 else 1.0


def _check_rows(x: Embeddings, like: Tensor | None) -> Tensor:
    x = check_embeddings("second_moment", "x", x)
    if x.dtype == torch.float64:
        raise bad_type(
            "second_moment", "x in float32, float16 or bfloat16", x.dtype, "cast it, or use x.T @ x / len(x)"
        )
    if like is not None and (x.shape[1] != like.shape[-1] or x.device != like.device):
        raise bad_value(
            "second_moment", f"x of shape (N, {like.shape[-1]}) on {like.device}", f"{tuple(x.shape)} on {x.device}"
        )
    return x
