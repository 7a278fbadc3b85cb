"""Decoding with a state of constant size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern._library import bad_type, bad_value
from llmkern.ops.rope_attention.plan import AttentionPlan
from llmkern.ops.rope_attention.reference import ROUNDING_PARTS, TABLE_TAIL, compute_dtype
from llmkern.polynomial import monomials


class RopeAttentionState:
    r"""Keys and values seen so far, in R (Dv + 1) numbers a head instead of n (D + Dv).

    The last ``window`` to 2 ``window`` - 1 tokens are kept as they are and count exactly; older ones enter the moments
    sum_j k_j^alpha [v_j, 1] of the plan's polynomial. Keys above the plan's limit stay as they are (``exact_keys`` of
    them), so that the certificate holds for whatever comes.

    Args:
        plan: a polynomial plan, as ``plan_attention(.., method="polynomial")`` makes it of a prompt or of typical data;
            its batch and heads are those of the state. The scale and the limits of the norms are taken from it.
        value_dim: Dv.
        window: tokens that are exact at least.
        strict: raise where a row's certificate exceeds the plan's rtol; else see ``last_bound``.

    ``extend(k, v)`` appends tokens (B, Hkv, n, ..), rotary applied; ``attend(q)`` gives softmax attention of q
    (B, Hq, n, D) to all of them, to within the certificate. ``last_bound`` (B, Hq, n) holds the certificates of the
    last call: error over max_j |v_j - o|. ``state_dict()`` and ``from_state_dict`` store and restore. No gradients.
    """

    def __init__(self, plan: AttentionPlan, value_dim: int, *, window: int = 128, strict: bool = True) -> None:
        if not isinstance(plan, AttentionPlan):
            raise bad_type("RopeAttentionState", "plan as an AttentionPlan", type(plan).__name__)
        if plan.method != "polynomial" or plan.table is None:
            raise bad_value(
                "RopeAttentionState",
                "a polynomial plan",
                f"one of method {plan.method!r} ({plan.reason})",
                "make it with method='polynomial', or keep a KV cache",
            )
        if window < 1:
            raise bad_value("RopeAttentionState", "window of at least 1", window)
        self.plan, self.value_dim, self.window, self.strict = plan, value_dim, window, strict
        self.last_bound: Tensor | None = None
        self.length = 0
        self._tables = monomials(plan.dim, plan.degree, plan.leading)
        self._moments: Tensor | None = None
        self._mean: Tensor | None = None
        self._flushed: Tensor | None = None
        self._recent: list[Tensor] = []
        self._kept: list[Tensor] = []

    @property
    def exact_keys(self) -> int:
        """Tokens before the window that some head keeps as they are."""
        return self._kept[0].shape[2] if self._kept else 0

    @torch.no_grad()
    def extend(self, k: Tensor, v: Tensor) -> None:
        """Append tokens: k (B, Hkv, n, D), v (B, Hkv, n, Dv)."""
        table = self.plan.table
        assert table is not None
        batch, heads = table.shape[:2]
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or k.shape[0] != batch or heads % k.shape[1]:
            raise bad_value(
                "extend",
                f"k and v of shape ({batch}, heads, n, head size) with heads dividing {heads}",
                f"{tuple(k.shape)} and {tuple(v.shape)}",
            )
        if k.shape[3] != self.plan.dim or v.shape[3] != self.value_dim:
            raise bad_value(
                "extend", f"head sizes {self.plan.dim} and {self.value_dim}", f"{k.shape[3]} and {v.shape[3]}"
            )
        if self._recent and k.shape[1] != self._recent[0].shape[1]:
            raise bad_value("extend", f"{self._recent[0].shape[1]} key heads as before", k.shape[1])
        dtype = compute_dtype(k.dtype)
        new = [self.plan.transform_keys(k.to(dtype)), v.to(dtype)]
        self._recent = [torch.cat([a, b], 2) for a, b in zip(self._recent, new)] if self._recent else new
        self.length += k.shape[2]
        surplus = self._recent[0].shape[2] - self.window
        if surplus >= self.window:
            count = surplus // self.window * self.window
            self._flush(*(t[:, :, :count] for t in self._recent))
            self._recent = [t[:, :, count:].clone() for t in self._recent]

    @torch.no_grad()
    def attend(self, q: Tensor, *, is_causal: bool = False) -> Tensor:
        """Attention of q (B, Hq, n, D) to all tokens; ``is_causal``: q belongs to the last n of them."""
        table = self.plan.table
        assert table is not None
        if q.dim() != 4 or (*q.shape[:2], q.shape[3]) != (*table.shape[:2], self.plan.dim):
            shape = f"({table.shape[0]}, {table.shape[1]}, n, {self.plan.dim})"
            raise bad_value("attend", f"q of shape {shape}", tuple(q.shape))
        if is_causal and q.shape[2] > min(self.length, self.window):
            raise bad_value(
                "attend", f"at most {min(self.length, self.window)} causal queries (length, window)", q.shape[2]
            )
        dtype = compute_dtype(q.dtype)
        x = self.plan.transform_queries(q.to(dtype))
        total, z = x.new_zeros((*q.shape[:3], self.value_dim)), x.new_zeros(q.shape[:3])
        bound = x.new_zeros(q.shape[:3])
        if not self.length:
            self.last_bound = bound
            return total.to(q.dtype)
        mean = self._mean_value(x)
        top = z.new_full(q.shape[:3], 0.0)
        for keys, values, live in self._exact_parts(q.shape[2] if is_causal else 0, mean):
            group = x.shape[1] // keys.shape[1]
            s = x @ keys.repeat_interleave(group, 1).mT
            s = s.masked_fill(~(live if live.shape[1] == 1 else live.repeat_interleave(group, 1)), -torch.inf)
            # A score may be as large as it likes here: the rest is scaled down with it.
            higher = torch.maximum(top, s.amax(-1)) if s.shape[-1] else top
            fade = (top - higher).exp()
            e = (s - higher.unsqueeze(-1)).exp()
            total = total * fade.unsqueeze(-1) + e @ values.repeat_interleave(group, 1)
            z, top = z * fade + e.sum(-1), higher
        if self._moments is not None and self._flushed is not None:
            total, z, bound = self._add_moments(x, total, z, top)
        self.last_bound = bound
        if self.strict and not bool((bound <= self.plan.rtol).all()):
            raise bad_value(
                "attend",
                f"queries for which the state certifies rtol {self.plan.rtol:g}",
                f"a bound of {float(bound.max()):.2g}",
                "plan for larger norms, or pass strict=False and read last_bound",
            )
        return (total / z.unsqueeze(-1) + mean.repeat_interleave(x.shape[1] // mean.shape[1], 1)).to(q.dtype)

    def _add_moments(self, x: Tensor, total: Tensor, z: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table, plan = self.plan.table, self.plan
        assert table is not None
        assert self._moments is not None
        assert self._flushed is not None
        group = x.shape[1] // self._moments.shape[1]
        moments, flushed = self._moments.repeat_interleave(group, 1), self._flushed.repeat_interleave(group, 1)
        row = table.to(x)
        polynomial, (error, tail1, tail0, q_limit, _, rounding) = (
            row[..., :-TABLE_TAIL],
            row[..., -TABLE_TAIL:].unbind(-1),
        )
        scaled = self._tables.coefficients(polynomial).unsqueeze(-1) * moments
        features = self._tables.features(x)
        fade = (-top).exp()
        part = features @ scaled
        z_part = part[..., -1]

        def form(rows: Tensor) -> Tensor:
            """The sum of s^m over the keys in the moments, of the rows given."""
            weights = rows * torch.from_numpy(self._tables.multiplicity).to(x)
            return (features @ (weights.unsqueeze(-1) * moments[..., -1:])).squeeze(-1)

        degrees = torch.from_numpy(self._tables.degrees).to(x.device)
        d = error.unsqueeze(-1) * form((degrees == plan.contact).to(x))
        if plan.leading < plan.dim:
            t2 = form(torch.from_numpy(self._tables.tail).to(x)).clamp(min=0)
            s2 = form((degrees == 2).to(x)).clamp(min=0)
            d = d + tail1.unsqueeze(-1) * (s2 * t2).sqrt() + tail0.unsqueeze(-1) * t2
        slack = (rounding * flushed).unsqueeze(-1) * fade
        total, z = total + part[..., :-1] * fade.unsqueeze(-1), z + z_part * fade
        d = d * fade
        low = z - d - 2 * slack
        bound = torch.where(low > 0, (d + ROUNDING_PARTS * slack) / low, torch.inf)
        beyond = ~(x.square().sum(-1).sqrt() <= q_limit.unsqueeze(-1))
        return total, z, bound.masked_fill(beyond, torch.inf)

    def _mean_value(self, x: Tensor) -> Tensor:
        """(B, Hkv, 1, Dv): subtracted from values before sums, for the sake of rounding."""
        if self._mean is not None:
            return self._mean
        return self._recent[1].mean(2, keepdim=True)

    def _exact_parts(self, causal: int, mean: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        keys, values = self._recent
        live = torch.ones((1, 1, max(causal, 1), keys.shape[2]), dtype=torch.bool, device=keys.device)
        if causal:
            live = live.tril(keys.shape[2] - causal)
        parts = [(keys, values - mean, live)]
        if self._kept:
            parts.append((self._kept[0], self._kept[1] - mean, self._kept[2].unsqueeze(2)))
        return parts

    def _flush(self, k: Tensor, v: Tensor) -> None:
        assert self.plan.table is not None
        group = self.plan.table.shape[1] // k.shape[1]
        limit = self.plan.table[:, ::group, -2].to(k).unsqueeze(-1)
        heavy = ~(k.square().sum(-1).sqrt() <= limit)
        if self._moments is None:
            self._mean = v.mean(2, keepdim=True)
            rows = self._tables.count
            self._moments = k.new_zeros((*k.shape[:2], rows, self.value_dim + 1))
            self._flushed = k.new_zeros(k.shape[:2])
        assert self._flushed is not None
        assert self._mean is not None
        weight = (~heavy).to(k).unsqueeze(-1)
        columns = torch.cat([v - self._mean, torch.ones_like(v[..., :1])], -1) * weight
        for begin in range(0, k.shape[2], self.window):
            piece = slice(begin, begin + self.window)
            # What is heavy may overflow in the features.
            features = self._tables.features(k[:, :, piece] * weight[:, :, piece])
            self._moments = self._moments + features.mT @ columns[:, :, piece]
        self._flushed = self._flushed + weight.sum((2, 3))
        places = heavy.any((0, 1)).nonzero().squeeze(-1)
        if len(places):
            kept = [k[:, :, places], v[:, :, places], heavy[:, :, places]]
            self._kept = [torch.cat([a, b], 2) for a, b in zip(self._kept, kept)] if self._kept else kept

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, the plan among them: what ``torch.save`` takes and ``weights_only`` loads."""
        return {
            "plan": self.plan.state_dict(),
            "value_dim": self.value_dim,
            "window": self.window,
            "strict": self.strict,
            "length": self.length,
            "moments": self._moments,
            "mean": self._mean,
            "flushed": self._flushed,
            "recent": list(self._recent),
            "kept": list(self._kept),
        }

    @classmethod
    def from_state_dict(cls, stored: dict[str, Any]) -> RopeAttentionState:
        plan = AttentionPlan.from_state_dict(stored["plan"])
        state = cls(plan, stored["value_dim"], window=stored["window"], strict=stored["strict"])
        state.length = stored["length"]
        state._moments, state._mean, state._flushed = stored["moments"], stored["mean"], stored["flushed"]
        state._recent, state._kept = list(stored["recent"]), list(stored["kept"])
        return state
