"""The plan: which route, which polynomial, and what it certifies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmkern._library import bad_value
from llmkern.ops.rope_attention.arguments import Arguments
from llmkern.ops.rope_attention.cost import (
    GAIN,
    TORCH_BACKWARD,
    Work,
    degree_two_seconds,
    exact_seconds,
    rates,
    torch_seconds,
)
from llmkern.ops.rope_attention.exact import tiles_win
from llmkern.ops.rope_attention.measure import (
    ALL_KEYS,
    ALL_ROWS,
    FEWEST_KEYS,
    FEWEST_ROWS,
    MAX_FAILING,
    SAMPLED_KEYS,
    SAMPLED_ROWS,
    Candidate,
    Limits,
    balance,
    candidates,
    find_limits,
    is_flat,
    measure,
    sample,
    usable,
)
from llmkern.ops.rope_attention.reference import ROUNDING_PARTS, compute_dtype

CHUNK = 240
# Shares of tokens of largest norm that a split computes exactly.
SPLITS = (0.0, 1 / 256, 1 / 32)
# A plan that finds nothing costs about this much: none is made where exact attention would then take a twentieth more
# than torch's, or a fifth more than without.
LOOK_SECONDS = 1e-3
# Heads from this size on are looked at for directions of little variance.
BALANCED_DIM = 16


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """How ``rope_attention`` computes: made by ``plan_attention``, accepted as its argument ``plan``.

    The result is certified for any data, also where the plan was made for others: rows whose certificate fails, rows
    and keys beyond the limits are computed exactly. Then more of them are.

    Attributes:
        method: "polynomial" or "exact".
        degree, contact: of the polynomial; its order of contact with exp at zero.
        leading: directions that go to that degree; the others go to degree 2.
        top_bf16: whether values are multiplied with features of the highest degree as bfloat16, summed in float32,
            where the processor does that at twice the rate and the certificate bears it; not where gradients are
            recorded.
        features: numbers R that a key contributes to; the state holds R (Dv + 1) of them.
        bound: of the scores of all pairs that the polynomial computes.
        split: share of the tokens, those of largest norm, that are computed exactly.
        error_bound: every row errs by at most this times max_j |v_j - o|; 0 for exact.
        rounding: what floating point may add, as a share of max_j |v_j| (included in the certificate).
        predicted_error: what the moments of the data promise.
        predicted_cost: seconds by route; forward and backward where q, k or v required gradients.
        reason: why this route.
    """

    method: str
    rtol: float
    reason: str
    predicted_cost: dict[str, float] = field(default_factory=dict)
    error_bound: float = 0.0
    rounding: float = 0.0
    predicted_error: float = 0.0
    degree: int = 0
    contact: int = 0
    leading: int = 0
    top_bf16: bool = False
    features: int = 0
    bound: float = 0.0
    split: float = 0.0
    chunk: int = CHUNK
    is_causal: bool = False
    dim: int = 0
    scale: float = 1.0
    table: Tensor | None = None
    key_shift: Tensor | None = None
    query_map: Tensor | None = None
    key_map: Tensor | None = None

    @property
    def speedup(self) -> float:
        costs = self.predicted_cost
        return costs["exact"] / costs["polynomial"] if len(costs) == 2 else 1.0

    def transform_queries(self, q: Tensor) -> Tensor:
        """What the polynomial is applied to: q in the basis of the plan."""
        if self.query_map is None:
            return q
        return q @ self.query_map.to(q).repeat_interleave(q.shape[1] // self.query_map.shape[1], 1)

    def transform_keys(self, k: Tensor) -> Tensor:
        """The same for keys: less the planned mean, which no softmax notices, scaled, and in the dual basis."""
        if self.key_map is not None:
            k = k @ (self.key_map.to(k) * self.scale)
            return k if self.key_shift is None else k - self.key_shift.to(k) @ (self.key_map.to(k) * self.scale)
        return (
            k * self.scale
            if self.key_shift is None
            else torch.add(-self.scale * self.key_shift.to(k), k, alpha=self.scale)
        )

    def state_dict(self) -> dict[str, Any]:
        """All fields, as plain numbers and tensors."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_state_dict(cls, stored: dict[str, Any]) -> AttentionPlan:
        return cls(**stored)

    def __str__(self) -> str:
        if self.method == "exact":
            return f"exact attention: {self.reason}"
        where = (
            "" if self.leading >= self.dim else f" in {self.leading} of {self.dim} directions, degree 2 in the others"
        )
        split = f" but for {self.split:.1%} of the tokens, which are exact," if self.split else ""
        return (
            f"polynomial of degree {self.degree}{where} ({self.features} features"
            f"{', of the highest degree in bfloat16' if self.top_bf16 else ''}) for scores within {self.bound:.3g}:"
            f"{split} each row errs by at most {self.error_bound:.2g} of max|v - o| (predicted "
            f"{self.predicted_error:.2g}, rows that fail are computed exactly), predicted {self.speedup:.1f} times as "
            "fast as exact attention"
        )


def is_short(pairs: int, size: int, device: str, gradients: bool) -> bool:
    """Whether exact attention is over before a plan could be made; ``pairs`` of all heads, of this size."""
    work = 2 * pairs * size * (1 + TORCH_BACKWARD if gradients else 1)
    return size >= 8 and work < 20 * LOOK_SECONDS * rates(device).slowest * torch.get_num_threads()


def make_plan(
    op: str, args: Arguments, is_causal: bool, rtol: float, method: str, splits: tuple[float, ...] = SPLITS
) -> AttentionPlan:
    work = Work.of(args, is_causal, CHUNK, tiles_win(args.q, args.k, args.v, is_causal))
    exact = exact_seconds(work)
    if method == "exact":
        return AttentionPlan("exact", rtol, "asked for", {"exact": exact}, is_causal=is_causal)
    if method == "auto":
        least = degree_two_seconds(work)
        if GAIN * least >= exact or exact + LOOK_SECONDS > 1.05 * torch_seconds(work) or exact < 5 * LOOK_SECONDS:
            reason = (
                f"{work.rows} by {work.keys} tokens are too few for the {math.comb(work.dim + 2, 2)} features of "
                "degree 2 to pay"
            )
            return AttentionPlan("exact", rtol, reason, {"exact": exact, "polynomial": least}, is_causal=is_causal)
    return _Planner(op, args, is_causal, rtol, method, work, exact, splits).plan()


class _Basis(NamedTuple):
    """What q and k are turned into: k less its shift and scaled, times maps (B, Hkv, D, D)."""

    shift: Tensor
    q: Tensor | None = None
    k: Tensor | None = None


class _Planner:
    """Looks at a sample first; what it recommends is held against the norms of all tokens."""

    def __init__(
        self,
        op: str,
        args: Arguments,
        is_causal: bool,
        rtol: float,
        method: str,
        work: Work,
        exact: float,
        splits: tuple[float, ...],
    ) -> None:
        self.op, self.args, self.is_causal, self.rtol, self.method = op, args, is_causal, rtol, method
        self.work, self.exact, self.splits = work, exact, splits
        self.bound = math.inf
        # A decode state has no second way: there no row may fail.
        self.allowed = MAX_FAILING if len(splits) > 1 else 0.0
        self.dtype = compute_dtype(args.q.dtype)
        self.group = args.q.shape[1] // args.k.shape[1]

    @torch.no_grad()
    def plan(self) -> AttentionPlan:
        args = self.args
        q = sample(args.q, SAMPLED_ROWS, ALL_ROWS, FEWEST_ROWS).to(self.dtype)
        k = sample(args.k, SAMPLED_KEYS, ALL_KEYS, FEWEST_KEYS).to(self.dtype)
        count: Tensor | int = max(k.shape[2], 1)
        live = None
        if args.key_mask is not None:
            live = sample(args.key_mask[:, None, :, None], SAMPLED_KEYS, ALL_KEYS, FEWEST_KEYS)
            k = torch.where(live, k, torch.zeros_like(k))
            count = live.sum(2).clamp(min=1)
        shift = k.sum(2, keepdim=True) / (count if isinstance(count, int) else count.unsqueeze(-1))
        centred = (k - shift if live is None else (k - shift) * live) * self.args.scale
        raw_bound = self._bound(q, k) * abs(self.args.scale)
        basis = _Basis(shift)
        tried = self._look(q, centred, count, raw_bound, basis)
        if self._may_lead(tried) and not is_flat(q, centred):
            maps = balance(q, centred)
            basis = _Basis(shift, *maps)
            tried += self._look(
                q @ maps[0].repeat_interleave(self.group, 1), centred @ maps[1], count, raw_bound, basis
            )
        good = [pair for pair in tried if pair[0].good]
        if not good or (self.method == "auto" and GAIN * min(c.seconds for c, _ in good) >= self.exact):
            return self._exact([c for c, _ in tried])
        return self._settle(sorted(good, key=lambda pair: pair[0].seconds))

    def _settle(self, good: list[tuple[Candidate, _Basis]]) -> AttentionPlan:
        """The fastest plan under the norms of all tokens, which set the limits: what the sample says of moments grows
        with them. Where that costs a candidate its certificate, those of other splits and bases are looked at."""
        eps = torch.finfo(self.dtype).eps
        norms: dict[int, tuple[Tensor, Tensor]] = {}
        seen: set[int] = set()
        again: list[Candidate] = []
        fit: list[tuple[Candidate, _Basis]] = []
        for first, basis in good:
            if fit and min(c.seconds for c, _ in fit) <= first.seconds:
                break
            if id(first.limits) in seen:
                continue
            seen.add(id(first.limits))
            if id(basis) not in norms:
                norms[id(basis)] = self._all_norms(basis)
            of_all = norms[id(basis)]
            found = find_limits(*of_all, first.split, eps) or find_limits(*of_all, 0.0, eps)
            assert found is not None
            known = self._candidates(first.limits.grown(*found) if usable(found) else None, first.features)
            again += known
            fit += [(c, basis) for c in known if c.good]
        if not fit or (self.method == "auto" and GAIN * min(c.seconds for c, _ in fit) >= self.exact):
            return self._exact(again)
        return self._polynomial(*min(fit, key=lambda pair: pair[0].seconds))

    def _look(
        self, q: Tensor, k: Tensor, count: Tensor | int, raw_bound: float, basis: _Basis
    ) -> list[tuple[Candidate, _Basis]]:
        self.bound = min(self.bound, self._bound(q, k))
        seen = measure(q, k, count, self.splits, raw_bound, basis.q is not None, self.allowed)
        return [(c, basis) for limits in seen for c in self._candidates(limits)]

    def _may_lead(self, tried: list[tuple[Candidate, _Basis]]) -> bool:
        """Whether features of directions of little variance are worth a look: the others cost more than it."""
        if self.work.dim < BALANCED_DIM:
            return False
        best = min((c.seconds for c, _ in tried if c.good), default=math.inf)
        return best - degree_two_seconds(self.work) > 2 * LOOK_SECONDS

    def _all_norms(self, basis: _Basis) -> tuple[Tensor, Tensor]:
        """(B, Hq, N) and (B, Hkv, M), of keys that take part."""
        norms = torch.ops.llmkern.rope_attention_norms
        query_map = None if basis.q is None else basis.q.repeat_interleave(self.group, 1)
        shift = basis.shift.expand(*self.args.k.shape[:2], 1, -1)
        of_keys = norms(self.args.k.detach(), shift, basis.k) * abs(self.args.scale)
        if self.args.key_mask is not None:
            of_keys = of_keys.masked_fill(~self.args.key_mask.unsqueeze(1), 0.0)
        return norms(self.args.q.detach(), None, query_map), of_keys

    def _bound(self, q: Tensor, k: Tensor) -> float:
        if not q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]:
            return 0.0
        first, second = (torch.linalg.vector_norm(x, dim=-1).amax(-1) for x in (q, k))
        return float((first * second.repeat_interleave(self.group, 1)).amax())

    def _candidates(self, limits: Limits | None, least_features: int = 0) -> list[Candidate]:
        if limits is None:
            return []
        # Samples err, prefixes are only like the whole; forced, all that the certificate allows.
        margin = 0.97 if self.method == "polynomial" and self.allowed else (0.8 if self.is_causal else 0.92)
        ceiling = self.exact / GAIN if self.method == "auto" else math.inf
        return candidates(limits, self.work, margin * self.rtol, self.dtype, self.exact, ceiling, least_features)

    def _polynomial(self, best: Candidate, basis: _Basis) -> AttentionPlan:
        q = self.args.q
        fits = best.fits
        rest = (fits.error, fits.tail1, fits.tail0, best.limits.q[:, None], best.limits.k[:, None])
        rows = np.concatenate([fits.coefficients, *rest, np.full_like(fits.error, best.slack)], 1)
        table = torch.from_numpy(rows).to(q.device).reshape(*q.shape[:2], best.degree + 7)
        if self.args.cu_q is not None:
            table = table.expand(len(self.args.cu_q) - 1, *table.shape[1:]).contiguous()
        return AttentionPlan(
            "polynomial",
            self.rtol,
            "faster" if self.method == "auto" else "asked for",
            {"exact": self.exact, "polynomial": best.seconds},
            error_bound=self.rtol,
            rounding=ROUNDING_PARTS * best.rounding,
            predicted_error=best.error,
            degree=best.degree,
            contact=best.contact,
            leading=best.leading,
            top_bf16=best.top_bf16,
            features=best.features,
            bound=float(fits.bounds.max(initial=0.0)),
            split=best.split,
            is_causal=self.is_causal,
            dim=self.work.dim,
            scale=self.args.scale,
            table=table,
            key_shift=basis.shift,
            query_map=basis.q,
            key_map=basis.k,
        )

    def _exact(self, tried: list[Candidate]) -> AttentionPlan:
        meeting = [c for c in tried if c.good]
        if meeting:
            best = min(meeting, key=lambda c: c.seconds)
            costs = {"exact": self.exact, "polynomial": best.seconds}
            reason = f"degree {best.degree} ({best.features} features) certifies rtol {self.rtol:g} but is no faster"
            return AttentionPlan("exact", self.rtol, reason, costs, is_causal=self.is_causal)
        reach = min((c.total for c in tried), default=math.inf)
        found = f"scores are bounded by {self.bound:.3g} only"
        if self.method == "polynomial":
            reached = "no bound below 1" if not reach < 1 else f"a bound of {reach:.2g} at best"
            raise bad_value(
                self.op,
                f"data for which a polynomial certifies rtol {self.rtol:g}",
                f"{reached} ({found})",
                "raise rtol, bound the scores (normalise q and k), or take method='auto'",
            )
        reason = f"{found}, and no polynomial certifies rtol {self.rtol:g}"
        if reach < 1:
            reason += f" (best bound {reach:.2g})"
        return AttentionPlan("exact", self.rtol, reason, {"exact": self.exact}, is_causal=self.is_causal)
