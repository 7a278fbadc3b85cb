"""Rotary positions in the Hugging Face half-rotation convention."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmkern._library import bad_type, bad_value, define_op
from llmkern.ops.rope_attention.reference import rope_attention_rotate_reference

define_op(
    "rope_attention_rotate",
    "(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor",
    stem="rope_attention",
    reference=rope_attention_rotate_reference,
    fake=lambda x, *_: x.new_empty(x.shape),
)

KINDS = ("default", "linear", "dynamic", "ntk", "yarn")


class _Rotation(torch.autograd.Function):
    """Of x (B, H, N, D); its gradient is the turn back."""

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
        return torch.ops.llmkern.rope_attention_rotate(x, cos, sin, back)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
        _, cos, sin, ctx.back = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Rotation.apply(grad, *ctx.saved_tensors, not ctx.back), None, None, None


class Rotary:
    r"""Cos and sin tables: entries t and t + D/2 of a head are turned by position / base^(2t/D).

    .. math::  y = x \cos + [-x_{D/2:}, x_{:D/2}] \sin

    Args:
        head_dim: how many leading entries of a head turn (all of them, or less: partial rotation); even.
        base: of the geometric series of frequencies (``rope_theta``).
        scaling: None, or a mapping as in ``config.rope_parameters`` of transformers: ``rope_type`` one of

            ============  ==========================================================================================
            ``linear``    positions divided by ``factor``
            ``ntk``       base times factor^(D/(D-2)): the frequencies of "NTK-aware" scaling, at any length
            ``dynamic``   the same with a factor that grows with the length beyond ``original_max_position_embeddings``
            ``yarn``      low frequencies divided by ``factor``, high ones kept, a ramp between (``beta_fast``,
                          ``beta_slow``, ``truncate``), cos and sin times ``attention_factor`` (or ``mscale``)
            ============  ==========================================================================================

    ``rotary(x, positions)`` turns x (.., N, D); positions (N,) or (B, N), by default 0 .. N-1. Differentiable in x.
    """

    def __init__(self, head_dim: int, base: float = 10000.0, scaling: Mapping[str, Any] | None = None) -> None:
        if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
            raise bad_value("Rotary", "head_dim as an even number of at least 2", head_dim)
        if not base > 0:
            raise bad_value("Rotary", "base above 0", base)
        self.head_dim, self.base = head_dim, float(base)
        self.scaling = dict(scaling or {})
        self.kind = self.scaling.get("rope_type", self.scaling.get("type", "default"))
        if self.kind not in KINDS:
            raise bad_value("Rotary", f"rope_type as one of {', '.join(KINDS)}", repr(self.kind))
        for name, kinds in {"factor": KINDS[1:], "original_max_position_embeddings": ("dynamic", "yarn")}.items():
            value = self.scaling.get(name)
            if self.kind in kinds and not (isinstance(value, int | float) and value > 0):
                raise bad_value("Rotary", f"scaling with {name} above 0 for rope_type {self.kind!r}", value)
        self.factor = float(self.scaling.get("factor", 1.0))
        self.original_length = int(self.scaling.get("original_max_position_embeddings") or 0)
        self.attention_factor = self._attention_factor()
        self._kept: tuple[object, tuple[Tensor, Tensor]] | None = None

    def __repr__(self) -> str:
        scaling = f", scaling={self.scaling}" if self.scaling else ""
        return f"Rotary({self.head_dim}, base={self.base:g}{scaling})"

    def frequencies(self, length: int = 0, device: torch.device | str = "cpu") -> Tensor:
        """(head_dim / 2,) angles per position, float64; ``length`` matters for ``dynamic`` alone."""
        d, base, factor = self.head_dim, self.base, self.factor
        steps = torch.arange(0, d, 2, dtype=torch.float64, device=device) / d
        if self.kind == "ntk":
            base *= factor ** (d / max(d - 2, 1))
        if self.kind == "dynamic":
            grown = factor * max(length, self.original_length) / self.original_length - (factor - 1)
            base *= grown ** (d / max(d - 2, 1))
        plain = base**-steps
        if self.kind == "linear":
            return plain / factor
        if self.kind == "yarn":
            kept = 1 - self._ramp(device)
            return plain / factor * (1 - kept) + plain * kept
        return plain

    def tables(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """cos and sin, (.., head_dim / 2), angles in float64."""
        length = 0
        if self.kind == "dynamic":
            length = int(positions.max()) + 1 if positions.numel() else 0
        angles = positions.double().unsqueeze(-1) * self.frequencies(length, positions.device)
        return (angles.cos() * self.attention_factor).to(dtype), (angles.sin() * self.attention_factor).to(dtype)

    def __call__(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if x.shape[-1] < self.head_dim:
            raise bad_value("Rotary", f"heads of at least {self.head_dim} entries", x.shape[-1])
        if positions is not None:
            _check_positions(x, positions)
        heads = x if x.dim() == 4 else x.reshape(1, math.prod(x.shape[:-2]), *x.shape[-2:])
        return _Rotation.apply(heads, *self._whole_tables(x, positions), False).view(x.shape)

    def _whole_tables(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and, with the sign of the half that it meets, sin of whole heads. Those of 0 .. N-1 are kept: layers, and
        queries and keys, turn alike."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = (x.shape[-2], x.device, dtype)
        plain = type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
        if positions is None and plain and self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        # Kept tables serve calls that record gradients, too.
        with torch.inference_mode(False) if plain else contextlib.nullcontext(), torch.no_grad():
            at = torch.arange(x.shape[-2], device=x.device) if positions is None else positions
            cos, sin = self.tables(at if at.dim() == 2 else at.unsqueeze(0), dtype)
            whole = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        if positions is None and plain:
            self._kept = (key, whole)
        return whole

    def _attention_factor(self) -> float:
        if self.kind != "yarn":
            return 1.0
        given = self.scaling.get("attention_factor")
        if given is not None:
            return float(given)

        def magnitude(mscale: float) -> float:
            return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        mscale, mscale_all = self.scaling.get("mscale"), self.scaling.get("mscale_all_dim")
        return magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)

    def _ramp(self, device: torch.device | str) -> Tensor:
        """0 where a frequency is kept (many turns within the original length), 1 where it is divided by the factor."""
        d, fast, slow = self.head_dim, self.scaling.get("beta_fast") or 32, self.scaling.get("beta_slow") or 1

        def dimension(turns: float) -> float:
            return d * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.base))

        low, high = dimension(fast), dimension(slow)
        if self.scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d - 1)
        steps = torch.arange(d // 2, dtype=torch.float64, device=device)
        return ((steps - low) / max(high - low, 0.001)).clamp(0, 1)


def _check_positions(x: Tensor, positions: Tensor) -> None:
    batches = (1, x.shape[0]) if x.dim() == 4 else (1,)
    fits = positions.shape[-1:] == x.shape[-2:-1] and (
        positions.dim() == 1 or (positions.dim() == 2 and positions.shape[0] in batches)
    )
    if positions.dtype.is_floating_point or not fits:
        wanted = f"({x.shape[-2]},)" + (f" or ({x.shape[0]}, {x.shape[-2]})" if x.dim() == 4 else "")
        raise bad_type("Rotary", f"positions of whole numbers, {wanted}", f"{positions.dtype} {tuple(positions.shape)}")
