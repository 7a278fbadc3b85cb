"""The plan: which route, which polynomial, how many nodes, and what it promises."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern._library import bad_value
from llmkern.ops.rope_attention.reference import compute_dtype
from llmkern.ops.toeplitz_attention.arguments import Arguments
from llmkern.ops.toeplitz_attention.cost import GAIN, Work, blocks_seconds, exact_seconds, fft_seconds, rows_seconds
from llmkern.ops.toeplitz_attention.fast import score_bounds, symbols_of
from llmkern.ops.toeplitz_attention.layout import (
    Layout,
    cut,
    extended,
    interpolation_errors,
    sums_over_far,
)
from llmkern.ops.toeplitz_attention.reference import relative_scores
from llmkern.polynomial import Fit, fit_exponential, monomials, round_up_bound
from llmkern.polynomial.fit import MAX_BOUND

FAST = ("blocks", "fft")
# Tokens of a block (tiles take 192 at a time), and beyond how many tokens it is twice that.
BLOCK, LONG = 192, 32768
NODES = (1, 2, 3, 4, 5, 6, 8, 10, 12)
# What smooth tables need as a rule: where these do not pay no plan is made.
USUAL_NODES = 3
CONTACTS = (2, 4, 6)
MAX_DEGREE, MAX_FEATURES = 10, 20_000
# Rows that may fail their certificate, to be computed on their own.
MAX_FAILING = 0.02
# Pairs that a plan looks at, and rows of one head at most and at least.
SAMPLED_PAIRS, MOST_ROWS, FEWEST_ROWS, SAMPLED_KEYS = 2**17, 64, 8, 128
# Shares of rtol: the polynomial's, and that of interpolation; the rest is for what a sample misses.
POLYNOMIAL_SHARE, INTERPOLATION_SHARE = 0.65, 0.2
# Exact attention that is over sooner leaves no time to plan.
SHORT_SECONDS = 8e-3


@dataclass(frozen=True, eq=False)
class ToeplitzPlan:
    """How ``toeplitz_attention`` computes: made by ``plan_toeplitz_attention``, accepted as its argument ``plan``.

    Rows are certified as they are computed, for any data and table; those that fail are computed exactly.

    Attributes:
        method: "exact", "blocks" (low rank between far blocks) or "fft".
        degree, contact, features: of the polynomial; its order of contact with exp at zero; its monomials.
        block, nodes: tokens of a block at most, and nodes that a block is interpolated from; 0 for other routes.
        bound: of the scores that the polynomial stands for, without the bias.
        error_bound: every row errs by at most this times max_j |v_j - o_i|, beside rounding; 0 for exact.
        predicted_error: what a sample of the rows promises.
        predicted_cost: seconds by route.
        reason: why this route.
    """

    method: str
    rtol: float
    reason: str
    predicted_cost: dict[str, float] = field(default_factory=dict)
    error_bound: float = 0.0
    predicted_error: float = 0.0
    features: int = 0
    bound: float = 0.0
    block: int = 0
    nodes: int = 0
    is_causal: bool = False
    scale: float = 1.0
    fit: Fit | None = None
    key_shift: Tensor | None = None

    @property
    def degree(self) -> int:
        return 0 if self.fit is None else self.fit.degree

    @property
    def contact(self) -> int:
        return 0 if self.fit is None else self.fit.contact

    def __str__(self) -> str:
        if self.method == "exact":
            return f"exact attention: {self.reason}"
        far = (
            f"blocks of {self.block} tokens, near ones exact, far ones through {self.nodes} nodes"
            if self.method == "blocks"
            else "FFT over all distances"
        )
        gain = self.predicted_cost["exact"] / self.predicted_cost[self.method]
        return (
            f"polynomial of degree {self.degree} ({self.features} features) for scores within {self.bound:.3g}, {far}: "
            f"each row errs by at most {self.error_bound:.2g} of max|v - o| (predicted {self.predicted_error:.2g}, "
            f"rows that fail are computed exactly), predicted {gain:.1f} times as fast as exact attention"
        )


@dataclass(frozen=True)
class _Candidate:
    method: str
    fit: Fit
    features: int
    seconds: float
    error: float
    failing: float
    block: int = 0
    nodes: int = 0


def make_plan(op: str, args: Arguments, rtol: float, method: str) -> ToeplitzPlan:
    work = Work.of(args)
    exact = exact_seconds(work)
    if method == "exact":
        return ToeplitzPlan("exact", rtol, "asked for", {"exact": exact})
    if method == "auto":
        least = math.comb((work.places or work.dim) + 2, 2)
        if exact < SHORT_SECONDS or GAIN * _cheapest(work, least) >= exact:
            reason = f"{work.rows} by {work.keys} tokens are too few for the {least} features of degree 2 to pay"
            return ToeplitzPlan("exact", rtol, reason, {"exact": exact})
    return _Planner(op, args, rtol, method, work, exact).plan()


def _cheapest(work: Work, features: int) -> float:
    return min(blocks_seconds(work, _layout(work), features, USUAL_NODES), fft_seconds(work, features))


def _layout(work: Work) -> Layout:
    longest = max(work.rows, work.keys)
    return Layout.of(longest, BLOCK if longest <= LONG else 2 * BLOCK, work.is_causal)


class _Planner:
    """Scores of some rows with all keys tell what the certificate will be; the rows themselves say it in the end."""

    def __init__(self, op: str, args: Arguments, rtol: float, method: str, work: Work, exact: float) -> None:
        self.op, self.args, self.rtol, self.method, self.work, self.exact = op, args, rtol, method, work, exact
        self.best_reach = math.inf

    @torch.no_grad()
    def plan(self) -> ToeplitzPlan:
        args, dtype = self.args, compute_dtype(self.args.q.dtype)
        q, k, self.relative = (t.to(dtype) for t in (args.q, args.k, args.relative))
        live = None if args.key_bias is None else (args.key_bias == 0)[:, None, :, None]
        if live is not None:
            k = torch.where(live, k, 0.0)
        shift = None
        if args.support is None:
            shift = (
                k.mean(2, keepdim=True)
                if live is None
                else k.sum(2, keepdim=True) / live.sum(2, keepdim=True).clamp(min=1)
            )
            k = k - shift if live is None else (k - shift) * live
        self.shift, k = shift, k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        visible = cut(self.relative, self.work.rows, self.work.keys)
        bound = float(score_bounds(q, k, visible, args.support, args.scale).amax())
        # The margin is for the same norms in another order of additions.
        self.bound = bound * (1 + 1e-4)
        if not self.bound <= MAX_BOUND / 1.1:
            return self._refuse(f"scores are bounded by {bound:.3g} only")
        self._sample(q, k)
        found = [c for name in FAST if self.method in ("auto", name) for c in self._candidates(name)]
        best = min(found, key=lambda c: c.seconds, default=None)
        costs = {"exact": self.exact, **({} if best is None else {best.method: best.seconds})}
        if best is None:
            return self._refuse(f"scores are bounded by {bound:.3g}")
        if self.method == "auto" and GAIN * best.seconds >= self.exact:
            reason = f"{best.method} with {best.features} features certifies rtol {self.rtol:g} but is no faster"
            return ToeplitzPlan("exact", self.rtol, reason, costs)
        return ToeplitzPlan(
            best.method,
            self.rtol,
            "faster" if self.method == "auto" else "asked for",
            costs,
            error_bound=self.rtol,
            predicted_error=best.error,
            features=best.features,
            bound=best.fit.bound,
            block=best.block,
            nodes=best.nodes,
            is_causal=args.is_causal,
            scale=args.scale,
            fit=best.fit,
            key_shift=shift,
        )

    def _refuse(self, found: str) -> ToeplitzPlan:
        reach = "no bound below 1" if not self.best_reach < 1 else f"a bound of {self.best_reach:.2g} at best"
        if self.method != "auto":
            raise bad_value(
                self.op,
                f"data and a table for which {self.method} certifies rtol {self.rtol:g}",
                f"{reach} ({found})",
                "raise rtol, bound the scores (normalise q and k), or take method='auto'",
            )
        return ToeplitzPlan("exact", self.rtol, f"{found}, and rtol {self.rtol:g} has {reach}", {"exact": self.exact})

    def _sample(self, q: Tensor, k: Tensor) -> None:
        """Scores of sampled rows (B, H, rows, M), less the bias, and the shares of their keys; see ``_moment``."""
        args, work = self.args, self.work
        count = max(FEWEST_ROWS, min(MOST_ROWS, SAMPLED_PAIRS // max(1, work.heads * work.keys)))
        rows = torch.linspace(0, work.rows - 1, min(count, work.rows), device=q.device).long()
        if args.support is None:
            self.s = (args.scale * q[:, :, rows]) @ k.mT
            table = cut(self.relative[:, 0], work.rows, work.keys).flip(-1)
        else:
            self.s = relative_scores(q[:, :, rows], k, self.relative, args.support, args.scale, rows)
            table = self.s.new_zeros(1, work.rows + work.keys - 1)
        if args.is_causal:
            table = table[:, : work.rows]
        top = table.amax(-1, keepdim=True)
        weights = F.pad((table - top).exp(), (0, work.rows + work.keys - 1 - table.shape[1]))
        # Row i sees a window of the table, last distance first: from i behind the first key on.
        windows = weights.unfold(-1, work.keys, 1)
        weights = torch.stack([windows[:, work.rows - 1 - i] for i in rows.tolist()], 1)
        if args.key_bias is not None:
            weights = weights * (args.key_bias == 0)[:, None, None]
        total = (self.s.exp() * weights).sum(-1)
        self.lse = top + total.log()
        self.shares = weights / total.clamp(min=torch.finfo(total.dtype).tiny).unsqueeze(-1)
        self.rows = rows
        keys = torch.linspace(0, work.keys - 1, min(SAMPLED_KEYS, work.keys), device=q.device).long()
        x, y = args.scale * q[:, :, rows].mT, k[:, :, keys].mT
        if args.support is not None:
            x, y = x[:, :, args.support[:, 0]], y[:, :, args.support[:, 1]]
        self.x, self.y = x, y

    def _moments(self, layout: Layout | None) -> dict[int, Tensor]:
        """By order, sum of shares w_j s^m over the far keys of each row, over its normaliser."""
        shares = self.shares
        if layout is not None:
            blocks = self.rows // layout.size
            lag = blocks[:, None] - torch.arange(self.work.keys, device=shares.device) // layout.size
            shares = shares * (lag.abs() > 1)
        squares, power, found = self.s.square(), shares, {}
        for order in CONTACTS:
            power = power * squares
            found[order] = power.sum(-1)
        return found

    def _candidates(self, name: str) -> Iterator[_Candidate]:
        layout = _layout(self.work)
        if name == "fft":
            yield from self._polynomials(name, None)
        elif layout.count > 3 and not (self.args.is_free and self.method == "auto"):
            yield from self._polynomials(name, layout)

    def _polynomials(self, name: str, layout: Layout | None) -> Iterator[_Candidate]:
        """The one of fewest features that certifies rtol, if any."""
        moments, variables = self._moments(layout), self.x.shape[2]
        for degree in range(2, MAX_DEGREE + 1):
            features = math.comb(variables + degree, degree)
            least = (
                fft_seconds(self.work, features) if layout is None else blocks_seconds(self.work, layout, features, 1)
            )
            if features > MAX_FEATURES or (self.method == "auto" and GAIN * least >= self.exact):
                return
            for contact in CONTACTS[: degree // 2]:
                fit = fit_exponential(degree, contact, round_up_bound(self.bound))
                share = fit.error * moments[contact]
                error = torch.where(share < 0.5, share / (1 - 2 * share).clamp(min=1e-9), torch.inf)
                kept = error <= POLYNOMIAL_SHARE * self.rtol
                failing = 1 - float(kept.to(error).mean())
                self.best_reach = min(self.best_reach, float(error.max()))
                if failing > MAX_FAILING:
                    continue
                nodes = 0 if layout is None else self._nodes(layout, fit)
                if nodes is None:
                    return
                seconds = least if layout is None else blocks_seconds(self.work, layout, features, nodes)
                seconds += rows_seconds(self.work, failing)
                largest = float(error[kept].max()) if kept.any() else 0.0
                yield _Candidate(
                    name, fit, features, seconds, largest, failing, 0 if layout is None else layout.size, nodes
                )
                return

    def _nodes(self, layout: Layout, fit: Fit) -> int | None:
        """The fewest nodes whose interpolation takes up its share of rtol at most."""
        args = self.args
        relative = extended(self.relative, layout.tokens)
        tables = monomials(self.x.shape[2], fit.degree)
        unseen = layout.tokens - 1 if layout.is_causal else 0
        made = [symbols_of(head, tables, args.support, unseen) for head in relative]
        tops = torch.stack([top for _, top in made])
        weights = tables.coefficients(self.x.new_tensor([abs(a) for a in fit.coefficients]))
        # (B, H, R, rows): each monomial of a row, times what a block of keys holds of it.
        held = tables.rows(self.y).abs().mean(-1, keepdim=True) * layout.size * weights[:, None]
        parts = tables.rows(self.x).abs() * held
        share = torch.where(self.lse == -torch.inf, 0.0, (tops[:, None] - self.lse).exp())
        blocks = self.rows // layout.size

        def reach(nodes: int) -> float:
            # The certificate will look at all of it; where that disagrees much, all rows are exact.
            errors = torch.stack([interpolation_errors(symbols, layout, nodes, sparsely=True) for symbols, _ in made])
            of_rows = sums_over_far(errors, layout)[:, :, blocks]
            return float(((parts * of_rows).sum(2) * share).nan_to_num(nan=torch.inf).amax())

        # A table that most nodes cannot follow is rough, and fewer need no trial.
        most = reach(NODES[-1])
        if not most <= INTERPOLATION_SHARE * self.rtol:
            self.best_reach = max(self.rtol, most)
            return None
        return next((n for n in NODES[:-1] if reach(n) <= INTERPOLATION_SHARE * self.rtol), NODES[-1])
